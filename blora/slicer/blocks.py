"""Blocks of SDXL and their weights: what --blocks keeps, and the list of LBW that does the same.

LBW is github.com/hako-mikan/sd-webui-lora-block-weight, an extension of A1111 and Forge, whose
names of blocks and lists of 12 and 20 numbers other programs took over.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from blora.sdxl import Layer, sdxl_layers
from blora.slicer.keys import DORA, PREFIX
from blora.slicer.modules import ADDED, Lora, Module
from blora.tensorfile import fp32_number
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
    weight = fp32_number(text)
    if weight is None:
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


# ---- LBW's list ----------------------------------------------------------------------------------

# What LBW does was read and run in scripts/lora_block_weight.py of b403cb7 (2025-06-19). In Forge
# it keeps patches of the first algorithms alone; the others have no further part in A1111 at 0.
WEIGHTED, TAKEN_OUT = ("LoRA", "LoHa", "LoKr"), ("full", "IA3")


def lbw_list(lora: Lora, strengths: Mapping[str, float]) -> tuple[str, str]:
    """LBW's list under which the whole file acts as a slice of it, and why there is none.

    `strengths` has those of the slice's modules, by their names. One of the two texts is empty.
    """
    if others := [naming for naming in lora.namings if not naming.startswith("kohya")]:
        return "", f"A1111 reads kohya's names alone, not those of {others[0]}"
    by_place: dict[str, tuple[str, float]] = {}
    for name, module in lora.modules.items():
        strength = strengths.get(name, 0.0)
        place = lbw_place(module.layer)
        if place:
            other, same = by_place.setdefault(place, (name, strength))
            if strength != same:
                pair = " and ".join(at_strength(*m) for m in ((other, same), (name, strength)))
                return "", f"in {place} {pair}"
        elif strength != 1:
            return "", f"{at_strength(name, strength)}, and LBW has no weight for it"
        if reason := "is there twice" if name in lora.copies else not_weighted(module, strength):
            return "", f"{name} {reason}"
        if wrapped := [key for key in module.keys.values() if not is_kohyas(key, module)]:
            return "", f"A1111 reads kohya's names alone, not {shortened(wrapped[0])}"
    kept = {place for place, (_, strength) in by_place.items() if strength}
    places = LBW_12 if kept <= {*LBW_12} else LBW_20
    return ",".join(number_text(by_place.get(place, ("", 0.0))[1]) for place in places), ""


def is_kohyas(key: str, module: Module) -> bool:
    """Whether a key has kohya's prefix and no other, and names one layer."""
    prefix = PREFIX.match(key.replace(".", "_"))
    is_alone = prefix and prefix[0] == f"lora_{module.layer.network}_"
    return bool(is_alone and not module.fused)


def lbw_text(lora: Lora, strengths: Mapping[str, float]) -> str:
    """The list, or why there is none, for a line of text."""
    weights, reason = lbw_list(lora, strengths)
    return weights or f"none, because {reason}"


def lbw_place(layer: Layer) -> str | None:
    """The place of its weight in the list; None where LBW has no weight for it, and takes 1.

    It knows a text encoder's layers by the word "encoder", and so not the embeddings, the last norm
    and the projection.
    """
    return slot(layer) if layer.network == "unet" or ".encoder." in layer.name else None


def at_strength(name: str, strength: float) -> str:
    """A module and what becomes of it."""
    return f"{name} is at {number_text(strength)}" if strength else f"{name} is left out"


def not_weighted(module: Module, strength: float) -> str:
    """Why LBW does not make of the module what the slice has; empty where it does."""
    kind = module.algorithm
    if module.is_incomplete:
        return "is incomplete"
    if module.unknown:
        return f"has a tensor that is not known ({shortened(module.unknown[0])})"
    added = [suffix for suffix in ADDED if suffix in {*module.tensors} - {*kind.markers}]
    if strength and kind.name not in WEIGHTED:
        return f"is {module.label}, which LBW drops in Forge"
    if strength and added:
        return f"has {added[0]}, which LBW drops in Forge"
    if kind.name not in WEIGHTED and (added or kind.name not in TAKEN_OUT):
        return f"is {module.label}, which LBW may not take out at 0 in A1111"
    if DORA in module.tensors and strength != 1:
        return f"is {module.label}, whose {DORA} LBW applies at any weight in A1111"
    if kind.name == "LoKr" and "lokr_w1" not in module.tensors:
        return "is a LoKr without a whole lokr_w1, at which LBW fails in A1111"
    return ""
