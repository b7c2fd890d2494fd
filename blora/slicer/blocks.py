"""The option --blocks: weights of blocks, and so of the modules in them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from blora.blocks import LBW_12, LBW_20, modules_by_block, plain_block
from blora.tensorfile import fp32_number
from blora.text import BloraError, number_text, shortened

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
