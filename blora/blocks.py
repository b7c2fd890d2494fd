"""Every name of a block of SDXL: kohya's, diffusers', LBW's.

LBW is github.com/hako-mikan/sd-webui-lora-block-weight, an extension of A1111 and Forge, whose
names of blocks and lists of 12 and 20 numbers other programs took over.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from blora.sdxl import Layer, block_of, sdxl_layers
from blora.text import BloraError, shortened

LBW_12 = ("BASE", "IN04", "IN05", "IN07", "IN08", "MID", *(f"OUT0{n}" for n in range(6)))
LBW_20 = ("BASE", *(f"IN0{n}" for n in range(9)), "MID", *(f"OUT0{n}" for n in range(9)))
WAYS = {"input_blocks": "IN", "output_blocks": "OUT", "middle_block": "MID"}


def slot(layer: Layer) -> str | None:
    """The place in LBW's lists of the block that a layer lies in; None where it is in no block."""
    if layer.network != "unet":
        return "BASE"
    first, number, *_ = layer.name.split(".")
    way = WAYS.get(first)
    return f"{way}0{number}" if way and way != "MID" else way


def block_names(layer: Layer) -> Iterator[str]:
    """Every name of every block that the layer lies in, in lower case, with underscores.

    These are LBW's and the beginnings of sgm's and diffusers' names: "out00", "output_blocks_0",
    "output_blocks_0_1", "up_blocks_0_attentions_0".
    """
    place = slot(layer)
    if not place:
        return
    yield place.lower()
    if place == "BASE":
        yield layer.network
        yield {"te1": "text_encoder", "te2": "text_encoder_2"}[layer.network]
        return
    shortest = 1 if place == "MID" else 2  # the others are counted
    for name, further in ((layer.name, 2), (layer.diffusers, 3)):
        parts = name.split(".")
        yield from ("_".join(parts[:n]) for n in range(shortest, shortest + further))


@cache
def modules_by_block() -> dict[str, list[str]]:
    """kohya's names of the modules in each block, by each of its names."""
    blocks: dict[str, list[str]] = {}
    for layers in sdxl_layers().values():
        for layer in layers.values():
            for name in {*block_names(layer)}:
                blocks.setdefault(name, []).append(layer.module)
    return blocks


def plain_block(word: str) -> str:
    """A block as block_names has it: "Out5", "MID00", "lora_unet_output_blocks_0_1_"."""
    name = word.lower().replace(".", "_").strip("_")
    name = re.sub(r"^(lora_)?((unet|model|diffusion_model)_)*", "", name)
    name = re.sub(r"^(m0+|mid0+)$", "mid", name)  # the extension's own name of it is M00
    return re.sub(r"^(in|out)0*(\d)$", r"\g<1>0\2", name)


# ---- Attention blocks ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """An attention block of the U-Net by its names."""

    lbw: str  # "OUT00"
    kohya: str  # "output_blocks.0.1"
    diffusers: str  # "up_blocks.0.attentions.0"

    @property
    def prefix(self) -> str:
        """With what kohya's names of its modules begin: "lora_unet_output_blocks_0_1_"."""
        return f"lora_unet_{self.kohya.replace('.', '_')}_"


# No block, but the U-Net's other use of the text: the second text encoder's pooled output, which
# reaches every block with the time step.
POOLED = Block("POOLED", "label_emb", "add_embedding")


@cache
def attention_blocks() -> dict[str, Block]:
    """SDXL's eleven by LBW's names, in the order of the forward pass."""
    blocks = {}
    for layer in sdxl_layers()["unet"].values():
        diffusers, _, inside = layer.diffusers.partition(".transformer_blocks.")
        if inside and (place := slot(layer)):
            blocks[place] = Block(place, layer.block, diffusers)
    return blocks


def attention_block(word: str) -> Block:
    """The attention block by any of its names; BloraError where SDXL has none of this name."""
    parts = {block_of(module) for module in modules_by_block().get(plain_block(word), ())}
    blocks = [block for block in attention_blocks().values() if block.kohya in parts]
    if len(blocks) != 1:  # "up_blocks.0" has three of them
        names = ", ".join(attention_blocks())
        raise BloraError(f'SDXL has no attention block "{shortened(word)}": choose one of {names}')
    return blocks[0]
