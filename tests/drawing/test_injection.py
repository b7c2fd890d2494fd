"""The network module for gen_img.py: which layers hear which prompt, in which half of the batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from toy_sdxl import make_unet

from blora.blocks import attention_blocks
from blora.drawing.injection import Look, create_network_from_weights, write_looks
from blora.text import BloraError

BLOCKS = [block.kohya for block in attention_blocks().values()]
POOLED = 1280
FIRST, SECOND, NEGATIVE = 1.0, 2.0, -1.0


class Hearing(nn.Module):
    """In place of a layer that hears the text: it keeps what it got."""

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        self.text = x if context is None else context
        return x


class Model(nn.Module):
    """The toy's names, which are SDXL's, with layers that compute nothing."""

    def __init__(self) -> None:
        super().__init__()
        names = dict(make_unet().named_modules())
        self.layers = {n: Hearing() for n in names if n.endswith("attn2") or n == "label_emb"}

    def named_modules(self):  # as sd-scripts' U-Net for inference passes it on
        return self.layers.items()

    def draw(self, *texts: float, tokens: int = 77) -> None:
        """A step with these rows of text."""
        rows = torch.tensor(texts)
        context = rows[:, None, None].expand(-1, tokens, 2048)
        sizes = torch.full((len(rows), 1536), 0.5)
        for name, layer in self.layers.items():
            if name == "label_emb":
                layer(torch.cat([rows[:, None].expand(-1, POOLED), sizes], 1))
            else:
                layer(torch.zeros(len(rows), 4, 8), context=context)

    def heard(self) -> dict[str, list[float]]:
        """The text of each row, by layer; a row has one text alone."""
        rows = {name: layer.text for name, layer in self.layers.items()}
        rows["label_emb"] = rows["label_emb"][:, :POOLED]
        flat = {name: text.flatten(1) for name, text in rows.items()}
        assert all((text == text[:, :1]).all() for text in flat.values())
        return {name: text[:, 0].tolist() for name, text in flat.items()}

    def others(self, *texts: float) -> dict[str, list[float]]:
        """Of the layers, those that heard anything but these rows."""
        return {name: rows for name, rows in self.heard().items() if rows != list(texts)}


def network(tmp_path: Path, *looks: Look, unet: nn.Module):
    """The network as gen_img.py sets it up, after the model and the second prompt."""
    write_looks(tmp_path / "looks.json", [Look(), Look(is_kept=True), *looks])
    encoder = nn.Module()
    encoder.text_projection = nn.Linear(POOLED, POOLED, bias=False)
    made, weights = create_network_from_weights(
        1.0, str(tmp_path / "looks.json"), None, [None, encoder], unet, for_inference=True
    )
    assert not made.is_mergeable()
    made.apply_to([None, encoder], unet)
    made.load_state_dict(weights, False)
    assert made.to(torch.float16).to("cpu") is made
    return made


def layers_of(unet: Model, *blocks: str) -> set[str]:
    return {name for name in unet.layers if name.startswith(tuple(f"{b}." for b in blocks))}


def test_the_model_and_the_prompt_that_is_kept_hear_their_own_text(tmp_path):
    unet = Model()
    made = network(tmp_path, unet=unet)
    for look in (0, 1):
        made.set_multiplier(look)
        unet.draw(NEGATIVE, FIRST)
        assert unet.others(NEGATIVE, FIRST) == {}


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_hears_the_second_prompt_in_the_conditional_half_and_no_other_does(block, tmp_path):
    unet = Model()
    made = network(tmp_path, Look(blocks=(block,)), unet=unet)
    made.set_multiplier(1.0)
    unet.draw(NEGATIVE, SECOND)
    made.set_multiplier(2.0)
    unet.draw(NEGATIVE, FIRST)
    assert unet.others(NEGATIVE, FIRST) == {
        name: [NEGATIVE, SECOND] for name in layers_of(unet, block)
    }
    made.set_multiplier(0.0)
    unet.draw(NEGATIVE, FIRST)
    assert unet.others(NEGATIVE, FIRST) == {}


@pytest.mark.parametrize(
    ("kept", "drawn", "heard"),
    [
        ([SECOND], [FIRST], [SECOND]),  # without guidance
        ([SECOND], [FIRST] * 2, [SECOND] * 2),
        ([NEGATIVE, SECOND], [NEGATIVE, NEGATIVE, FIRST, FIRST], [NEGATIVE] * 2 + [SECOND] * 2),
        # with --negative_scale, whose third part is unconditional too
        ([NEGATIVE, SECOND, 0.0], [NEGATIVE, FIRST, 0.0], [NEGATIVE, SECOND, 0.0]),
    ],
)
def test_the_conditional_part_of_a_batch_is_that_of_the_kept_one(kept, drawn, heard, tmp_path):
    unet = Model()
    look = Look(blocks=(*BLOCKS, "label_emb"))
    made = network(tmp_path, look, unet=unet)
    made.set_multiplier(1.0)
    unet.draw(*kept)
    made.set_multiplier(2.0)
    unet.draw(*drawn)
    assert unet.others(*drawn) == dict.fromkeys(unet.layers, heard)
    sizes = unet.layers["label_emb"].text[:, POOLED:]
    assert (sizes == 0.5).all()


def test_the_pooled_text_is_heard_by_no_block(tmp_path):
    unet = Model()
    made = network(tmp_path, Look(blocks=("label_emb",)), unet=unet)
    made.set_multiplier(1.0)
    unet.draw(NEGATIVE, SECOND)
    made.set_multiplier(2.0)
    unet.draw(NEGATIVE, FIRST)
    assert unet.others(NEGATIVE, FIRST) == {"label_emb": [NEGATIVE, SECOND]}


def test_each_look_hears_the_prompt_of_its_own_pair(tmp_path):
    unet = Model()
    looks = Look(1, is_kept=True), Look(0, ("middle_block.1",)), Look(1, ("middle_block.1",))
    made = network(tmp_path, *looks, unet=unet)
    for look, text in ((1, SECOND), (2, 3.0)):
        made.set_multiplier(look)
        unet.draw(text)
    for look, text in ((3, SECOND), (4, 3.0)):
        made.set_multiplier(look)
        unet.draw(FIRST)
        assert unet.others(FIRST) == {n: [text] for n in layers_of(unet, "middle_block.1")}


def test_prompts_of_other_lengths_are_refused(tmp_path):
    unet = Model()
    made = network(tmp_path, Look(blocks=("middle_block.1",)), unet=unet)
    made.set_multiplier(1.0)
    unet.draw(SECOND, tokens=152)
    made.set_multiplier(2.0)
    with pytest.raises(BloraError) as error:
        unet.draw(FIRST)
    assert str(error.value) == (
        "the first prompt fills 77 places for tokens and the second 152: keep both below 76 "
        "tokens, and leave BREAK out"
    )


def test_a_layer_that_is_called_in_another_way_is_said_to_be(tmp_path):
    unet = Model()
    network(tmp_path, unet=unet)
    layer = next(layer for name, layer in unet.layers.items() if name.endswith("attn2"))
    with pytest.raises(BloraError, match=r"^this sd-scripts calls attn2 in a way that is not"):
        layer(torch.zeros(1, 4, 8), torch.zeros(1, 77, 2048))
