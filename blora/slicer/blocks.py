"""Blocks of SDXL and their weights: what --blocks keeps, and LBW's list for a slice.

LBW is github.com/hako-mikan/sd-webui-lora-block-weight, an extension of A1111 and Forge, whose
names of blocks and lists of 12 and 20 numbers other programs took over.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

from blora.sdxl import Layer, sdxl_layers
from blora.tensorfile import fp32_holds
from blora.text import BloraError, shortened

LBW_12 = ("BASE", "IN04", "IN05", "IN07", "IN08", "MID", *(f"OUT0{n}" for n in range(6)))
LBW_20 = ("BASE", *(f"IN0{n}" for n in range(9)), "MID", *(f"OUT0{n}" for n in range(9)))
WAYS = {"input_blocks": "IN", "output_blocks": "OUT", "middle_block": "MID"}
HOW = (
    "give blocks with their weights, such as OUT00=1 OUT01=0.3 or output_blocks.0.1=1, or a list "
    "of 12 numbers (BASE IN04 IN05 IN07 IN08 MID OUT00 to OUT05) or of 20 (BASE IN00 to IN08 MID "
    "OUT00 to OUT08)"
)


@dataclass(frozen=True)
class Blocks:
    """Weights of blocks by their names, and of SDXL's modules that lie in them; none is 0."""

    weights: dict[str, float]
    modules: dict[str, float]

    def __str__(self) -> str:
        return " ".join(f"{block}={number_text(weight)}" for block, weight in self.weights.items())


def number_text(number: float) -> str:
    """A weight with the digits that fp32 has: "1", "0.3"; -0 is "0"."""
    return f"{number + 0.0:.9g}"


# ---- Names ---------------------------------------------------------------------------------------


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


# ---- The option ----------------------------------------------------------------------------------


def parse_blocks(words: list[str]) -> Blocks:
    """What the words behind --blocks mean; BloraError where they mean nothing.

    Blanks may stand between entries, and around each comma and each equals sign.
    """
    text = re.sub(r"\s*([,=])\s*", r"\1", " ".join(words).strip())
    entries = re.split(r",|\s+", text)
    if "=" in text:
        return gather(parse_pair(entry) for entry in entries)
    weights = [parse_weight(entry) for entry in entries]
    for places in (LBW_12, LBW_20):
        if len(weights) == len(places):
            return gather(zip(places, weights, strict=True))
    raise BloraError(f"a list of {len(weights)} is not for SDXL: {HOW}")


def parse_pair(entry: str) -> tuple[str, float]:
    """A block and its weight, from "OUT00=1"."""
    name, equals, weight = entry.partition("=")
    if not equals:
        raise BloraError(f'"{shortened(entry)}" is no block with a weight: {HOW}')
    return name, parse_weight(weight)


def parse_weight(text: str) -> float:
    """A number that fp32 holds."""
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not fp32_holds(weight):
        raise BloraError(f'the weight "{shortened(text)}" is not a finite fp32 number: {HOW}')
    return weight


def gather(pairs: Iterable[tuple[str, float]]) -> Blocks:
    """Blocks and their weights; BloraError where SDXL has no such block, or two overlap."""
    weights: dict[str, float] = {}
    modules: dict[str, float] = {}
    owners: dict[str, str] = {}
    for word, weight in pairs:
        plain = plain_block(word)
        name = plain.upper() if plain.upper() in LBW_20 else plain
        if plain not in modules_by_block():
            raise BloraError(f'SDXL has no block "{shortened(word)}": {HOW}')
        for module in modules_by_block()[plain]:
            if owner := owners.get(module):
                raise BloraError(f"{name} and {owner} have layers in common: give one of them")
            owners[module] = name
            modules |= {module: weight} if weight else {}
        weights |= {name: weight} if weight else {}
    if not weights:
        raise BloraError("every weight is 0, so that nothing is kept: give another to some block")
    return Blocks(weights, modules)
