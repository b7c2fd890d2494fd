"""A survey: what each block of a checkpoint does with another prompt; seeds as rows, blocks as
columns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import count, product
from pathlib import Path
from typing import Any

from blora.blocks import POOLED, Block, attention_block, attention_blocks
from blora.drawing.gallery import Gallery
from blora.drawing.pictures import Drawing, Prompt, check_prompt, parse_prompt
from blora.sdxl import Trait
from blora.sheet import Bar, Heading, Picture, Section
from blora.text import BloraError, counted, say, shortened

TOGETHER = "OUT00+OUT01"  # content and style, as a B-LoRA trains them
CHEAP = " --s 4 --w 256 --h 256"  # one step would do, but with fewer than four PNDM fails
VARIANTS = re.compile(r"(?<!\\)\{")  # as gen_img.py has them: "a {red|blue} fox"
INTRO = (
    "Each row is a seed. {} drew the first prompt, the second, and then the first again and again, "
    "each time with one block hearing the second: what changed in a column is what its block did. "
    "A mark is the trait that keeps the block.\nNo block hears the pooled text, one vector for "
    "the whole prompt, which reaches the U-Net with the time step. It stays the first prompt's "
    "except under POOLED, so even all blocks together do not draw the second picture."
)
BARS = (
    "\nThe bars say how far a picture is from the first of its row, from 0, the same, to 1, both "
    "shrunk to 256 pixels. Colours: the Jensen-Shannon distance of their histograms in CIE Lab. "
    "Shapes: 1 minus their structural similarity (SSIM) in grey. They are aids to the eye: a "
    "number decides nothing."
)


# ---- What is asked for ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A prompt, and the other one that blocks hear in its place; both with the same options."""

    name: str
    prompt: Prompt
    other: Prompt


@dataclass(frozen=True)
class Column:
    """Blocks that hear the other prompt together."""

    name: str  # "OUT00+OUT01"
    blocks: tuple[Block, ...]

    def heading(self, traits: list[Trait]) -> Heading:
        """Every name of its blocks, and the traits that they hold."""
        names = (name for block in self.blocks for name in (block.kohya, block.diffusers))
        marks = filter(None, (trait_of(block, traits) for block in self.blocks))
        return Heading(self.name, tuple(names), " and ".join(dict.fromkeys(marks)))


def trait_of(block: Block, traits: list[Trait]) -> str:
    """The first trait that keeps a block's attention: what our presets train it for."""
    module = f"{block.prefix}transformer_blocks_0_attn2_to_k"
    return next((trait.name for trait in traits if trait.keeps(module)), "")


def parse_group(word: str) -> tuple[Block, ...]:
    """The blocks of "OUT00+OUT01" by any of their names, in the U-Net's order, or a BloraError."""
    parts = word.split("+")
    blocks = {POOLED if part.upper() == POOLED.lbw else attention_block(part) for part in parts}
    return tuple(block for block in (*attention_blocks().values(), POOLED) if block in blocks)


def plan_columns(words: list[str]) -> list[Column]:
    """The columns that are asked for, or each block, and content and style together."""
    text = " ".join(words or [*attention_blocks(), TOGETHER]).strip(" ,")
    groups = [parse_group(word) for word in re.split(r"[\s,]+", re.sub(r"\s*\+\s*", "+", text))]
    return [
        Column("+".join(block.lbw for block in group), group) for group in dict.fromkeys(groups)
    ]


def make_pair(name: str, prompt: str, other: str, seeds: list[int], more: str) -> Pair:
    """Two prompts, of which the first one's options hold for both; BloraError where unfit."""
    first = parse_prompt(" ".join(prompt.split()), seeds, more)
    second = Prompt(" ".join(other.split()), first.options, first.seeds)
    check_prompt(first, "--prompt")
    check_prompt(second, "--other")
    if " --" in second.text:  # at which gen_img.py ends the words
        raise BloraError(
            f'"{shortened(second.text)}" has options, and those behind --prompt hold for both: '
            "leave them out of --other"
        )
    if VARIANTS.search(second.text + second.options):
        raise BloraError(
            f'"{shortened(second.text + second.options)}" has variants, and sd-scripts chooses one '
            "by the seed: write one of them"
        )
    if first.text == second.text:
        raise BloraError("both prompts are the same, so nothing would change: change --other")
    return Pair(name, first, second)


# ---- Pictures ------------------------------------------------------------------------------------


def plan_drawings(
    pairs: list[Pair], columns: list[Column], common: dict[str, Any]
) -> list[Drawing]:
    """Every picture, row by row: of both prompts, and of the first with each column's blocks."""
    drawings = []
    numbers = count(1 + len(pairs))  # the model itself and the kept texts come first
    for pair in pairs:
        looks: list[tuple[int, Prompt, str, dict[str, Any]]] = [
            (0, pair.prompt, "first", {}),
            (0, pair.other, "second", {}),
        ]
        for column in columns:
            heard = {"blocks": [block.kohya for block in column.blocks], "hear": pair.other.text}
            looks.append((next(numbers), pair.prompt, column.name, heard))
        for seed, (look, prompt, name, heard) in product(pair.prompt.seeds, looks):
            settings = common | {"prompt": prompt.text + prompt.options, "seed": seed} | heard
            label = f"{pair.name}_{name}_seed{seed}"
            drawings.append(Drawing(look, prompt, seed, label, settings))
    return drawings


@dataclass(frozen=True)
class Survey(Gallery):
    """Pairs of prompts, and the blocks that hear the second one."""

    pairs: list[Pair]
    columns: list[Column]
    traits: list[Trait]
    title = "What each block does"
    module = "blora.drawing.injection"

    def write_looks(self, path: Path) -> None:
        """Write what the network module of gen_img.py reads."""
        from blora.drawing.injection import Look, write_looks

        numbers = range(len(self.pairs))
        looks = [Look(), *(Look(number, is_kept=True) for number in numbers)]
        for number, column in product(numbers, self.columns):
            looks.append(Look(number, tuple(block.kohya for block in column.blocks)))
        write_looks(path, looks)

    def first_lines(self) -> list[str]:
        """The other prompt of each pair, drawn as cheaply as can be: for its text."""
        return [
            f"{pair.other.text}{pair.other.options}{CHEAP} --d 1 --am {look} --f text.png"
            for look, pair in enumerate(self.pairs, start=1)
        ]

    def intro(self) -> str:
        """What the page shows, in words."""
        return INTRO.format(self.checkpoint.name) + (BARS if self.distances else "")

    def rows(self) -> str:
        """What it has rows of, counted."""
        return counted(sum(len(pair.prompt.seeds) for pair in self.pairs), "row")

    def sections(self, advance: Callable[[int], object]) -> Iterator[Section]:
        """One for each pair of prompts: a row a seed, a column a block."""
        headings = (
            Heading("first prompt"),
            Heading("second prompt"),
            *(column.heading(self.traits) for column in self.columns),
        )
        drawings = iter(self.drawings)
        for pair in self.pairs:
            pictures: list[Picture] = []
            for seed in pair.prompt.seeds:
                row = [next(drawings) for _ in headings]
                bars = self.bars(row)
                pictures += [self.cell(d, f"seed {seed}", *bars.get(d, ())) for d in row]
                advance(len(row))
            title = f"{pair.prompt.text} \u2192 {pair.other.text}"
            yield Section(title, tuple(pictures), headings)

    @cached_property
    def distances(self) -> Callable[[Path, Iterable[Path]], Iterator[dict[str, float]]] | None:
        """What measures pictures; None where this Python lacks the libraries."""
        try:
            from blora.drawing.measures import distances
        except (ImportError, ValueError) as error:  # the second for a numpy that does not fit
            if (getattr(error, "name", "") or "").startswith("blora"):
                raise
            advice = "pip install scikit-image"
            say(f"note: nothing is measured ({shortened(str(error))}): {advice}")
            return None
        return distances

    def bars(self, row: list[Drawing]) -> dict[Drawing, list[Bar]]:
        """How far each picture of a row is from the first; nothing of what is not drawn yet."""
        first, *others = row
        if not (self.is_drawn(first) and self.distances):
            return {}
        others = [drawing for drawing in others if self.is_drawn(drawing)]
        measured = self.distances(self.path(first), map(self.path, others))
        return {
            drawing: [Bar(f"{name} {share:.2f}", share) for name, share in distances.items()]
            for drawing, distances in zip(others, measured, strict=True)
        }
