"""The network module of blora_blocks.py: blocks of the U-Net that hear another prompt.

gen_img.py imports it (--network_module blora.drawing.injection) and uses it as any network. The
multiplier that a prompt gives it (--am) is the number of a look. A look either keeps the text of
the prompt that is drawn, as sd-scripts' own tokenizers and text encoders made it, or gives a kept
one to some blocks, in the conditional half of the batch alone. Look 0 is the model itself.

The paper found its two blocks in this way (arXiv 2403.14572, section 4.1).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from blora.blocks import POOLED
from blora.drawing.network import Network
from blora.text import BloraError


@dataclass(frozen=True)
class Look:
    """Which blocks hear which of the other prompts."""

    prompt: int = 0  # the number of the other prompt
    blocks: Sequence[str] = ()  # kohya's names, such as "output_blocks.0.1", and POOLED's
    is_kept: bool = False  # whether it is that prompt itself that is drawn, and its text kept


def write_looks(path: Path, looks: Iterable[Look]) -> None:
    """The file that stands for the network's weights."""
    path.write_text(json.dumps([asdict(look) for look in looks]), "utf-8")


def read_looks(path: Path) -> list[Look]:
    """What write_looks wrote."""
    return [Look(**look) for look in json.loads(path.read_text("utf-8"))]


def with_text(rows: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """A batch [rows, ..., width] whose conditional part has a kept text in its first columns.

    `kept` is the batch of one picture: without guidance its one row is conditional, with guidance
    the second of two.
    """
    if rows.shape[1:-1] != kept.shape[1:-1]:
        raise BloraError(
            f"the first prompt fills {rows.shape[1]} places for tokens and the second "
            f"{kept.shape[1]}: keep both below 76 tokens, and leave BREAK out"
        )
    number = len(rows) // len(kept)
    row = min(1, len(kept) - 1)
    rows = rows.clone()
    rows[row * number : (row + 1) * number, ..., : kept.shape[-1]] = kept[row]
    return rows


class Injection(Network):
    """The network that gen_img.py sees."""

    def __init__(self, looks: list[Look]) -> None:
        self.looks, self.look = looks, looks[0]
        self.kept: dict[tuple[int, bool], torch.Tensor] = {}  # by prompt, and whether it is pooled

    def apply_to(self, text_encoders: list[Any], unet: torch.nn.Module) -> None:
        """Stand before every layer that hears the text."""
        width = text_encoders[-1].text_projection.out_features
        for name, layer in unet.named_modules():
            block, _, inside = name.partition(".transformer_blocks.")
            if inside.endswith("attn2"):
                layer.register_forward_pre_hook(partial(self.at_attention, block), with_kwargs=True)
            elif name == POOLED.kohya:
                layer.register_forward_pre_hook(partial(self.at_pooled, width))

    def set_multiplier(self, number: float) -> None:
        """Take the look of this number."""
        self.look = self.looks[int(number)]

    def at_attention(self, block: str, _: object, args: Any, kwargs: dict[str, Any]) -> Any:
        """Before an attn2 of a block."""
        if "context" not in kwargs:
            raise BloraError("this sd-scripts calls attn2 in a way that is not known here")
        return args, kwargs | {"context": self.hear(block, kwargs["context"])}

    def at_pooled(self, width: int, _: object, args: tuple[torch.Tensor]) -> torch.Tensor:
        """Before the layer that hears the pooled text, in front of the sizes of the picture."""
        return self.hear(POOLED.kohya, args[0], width)

    def hear(self, block: str, rows: torch.Tensor, width: int | None = None) -> torch.Tensor:
        """The text that a layer gets in place of `rows`, of which the first columns are text."""
        key = self.look.prompt, block == POOLED.kohya
        if self.look.is_kept:
            self.kept[key] = rows[..., :width].clone()
        return with_text(rows, self.kept[key]) if block in self.look.blocks else rows


def create_network_from_weights(
    multiplier: float, file: str, vae: object, text_encoder: object, unet: object, **kwargs: object
) -> tuple[Injection, dict[str, Any]]:
    """What gen_img.py asks a network module for; `file` is what write_looks wrote."""
    return Injection(read_looks(Path(file))), {}
