"""Draw docs/blora_blocks.svg and docs/blora_rank.svg from SDXL's layers and the traits file.

Run it as: python tools/draw_blora.py
"""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from blora_memory import BYTES
from blora_sdxl import Layer, load_traits, sdxl_layers

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 720  # of both pictures; a phone shows half of that, and text of 20 px as 10 px
CENTRE = WIDTH // 2
TIMES = " \N{MULTIPLICATION SIGN} "

# ---- SVG -----------------------------------------------------------------------------------------

FONTS = (
    'text{font:20px system-ui,-apple-system,"Segoe UI",Roboto,Helvetica,Arial,sans-serif}'
    '.mono{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace}'
    ".bold{font-weight:700}.title{font-size:32px;font-weight:700}.end{text-anchor:end}"
    ".middle{text-anchor:middle}.slot{stroke-width:1.5}path.series{fill:none}"
)
# .quiet is the colour of text outside the boxes: some viewers put the other scheme's background
# behind it, and it can be read on both.
LIGHT = (
    "text{fill:#1f2328}.quiet{fill:#5d6570}.on-mark{fill:#ffffff}"
    ".flow{stroke:#8c959f;fill:none}.head{fill:#8c959f}"
    ".plain{fill:#f6f8fa;stroke:#c8d1da}"
    ".blue{fill:#dcefff;stroke:#0b66b8}.blue-mark{fill:#0b66b8}"
    ".orange{fill:#ffeadb;stroke:#b84a00}.orange-mark{fill:#b84a00}"
    ".green{fill:#d9f5ea;stroke:#00795a}.green-mark{fill:#00795a}"
)
DARK = (
    "text{fill:#f0f6fc}.quiet{fill:#8b949e}.on-mark{fill:#0d1117}"
    ".flow{stroke:#6e7681;fill:none}.head{fill:#6e7681}"
    ".plain{fill:#1b222b;stroke:#465059}"
    ".blue{fill:#102c4a;stroke:#58a6ff}.blue-mark{fill:#58a6ff}"
    ".orange{fill:#42210b;stroke:#ff9d57}.orange-mark{fill:#ff9d57}"
    ".green{fill:#073b2f;stroke:#3ccb9c}.green-mark{fill:#3ccb9c}"
)
# The corners of each shape around its point; an arrow head's point is its tip.
CORNERS = {
    "diamond": ((0, -11), (11, 0), (0, 11), (-11, 0)),
    "triangle": ((0, -10), (11, 9), (-11, 9)),
    "down": ((0, 0), (-6, -8), (6, -8)),
    "up": ((0, 0), (-6, 8), (6, 8)),
    "right": ((0, 0), (-8, -6), (-8, 6)),
}


def text(x: float, y: float, words: str, kind: str = "") -> str:
    """A line of text with its baseline at y."""
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{x:g}" y="{y:g}"{style}>{words}</text>'


def shape(name: str, x: float, y: float, kind: str) -> str:
    """A circle, or one of CORNERS, at a point."""
    if name == "circle":
        return f'<circle cx="{x:g}" cy="{y:g}" r="9" class="{kind}"/>'
    points = " ".join(f"{x + dx:g},{y + dy:g}" for dx, dy in CORNERS[name])
    return f'<polygon points="{points}" class="{kind}"/>'


def line(path: str, width: float, kind: str = "flow", more: str = "") -> str:
    """An open path; `more` are further attributes."""
    return f'<path d="{path}" class="{kind}" stroke-width="{width}"{more}/>'


def picture(title: str, description: str, height: int, *elements: str) -> str:
    """The whole file; the reader's colour scheme picks the colours."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" role="img" aria-labelledby="title desc">',
        f'<title id="title">{title}</title>',
        f'<desc id="desc">{description}</desc>',
        f"<style>{FONTS}{LIGHT}@media (prefers-color-scheme:dark){{{DARK}}}</style>",
        *elements,
        "</svg>\n",
    ]
    return "\n".join(lines)


# ---- The blocks ----------------------------------------------------------------------------------

BOX = 336  # width of a box
DOWN, UP = 174, 546  # x of the way down and of the way up
TOP = 140  # y at which the first row begins
LOOKS = {
    # trait: its colour, its shape, and what it is in two or three words
    "content": ("blue", "circle", "the subject"),
    "style": ("orange", "diamond", "colours, strokes"),
    "layout": ("green", "triangle", "composition"),
}
ROLES = {
    "input_blocks.0": "latent in", "input_blocks.3": "downsample", "input_blocks.6": "downsample",
}  # fmt: skip


@dataclass(frozen=True)
class Block:
    """The text of a box; a block without attention has only a name and a role."""

    name: str
    role: str
    diffusers: str = ""
    slot: str = ""
    trait: str = ""

    @property
    def height(self) -> int:
        if not self.slot:
            return 38
        return 136 if self.trait else 98


def slot_name(block: str) -> str:
    """The slot of a block in a block-weight vector: IN08, MID, OUT00."""
    way, number = re.match(r"(in|mid|out)\w+\.(\d)", block).groups()
    return "MID" if way == "mid" else f"{way.upper()}0{number}"


def unet_blocks() -> dict[str, Block]:
    """All blocks by their sgm name, such as "input_blocks.4"."""
    layers, traits = sdxl_layers()["unet"], load_traits(ROOT / "blora_traits.json").values()
    names = [f"{way}_blocks.{number}" for way in ("input", "output") for number in range(9)]
    blocks = {}
    for name in [*names, "middle_block"]:
        attention = f"{name}.1"
        kinds = [layer.kind for n, layer in layers.items() if n.startswith(f"{attention}.")]
        depth = kinds.count("BasicTransformerBlock")
        if not depth:
            blocks[name] = Block(name, ROLES.get(name, "no attention"))
            continue
        query = layers[f"{attention}.transformer_blocks.0.attn1.to_q"].module
        blocks[name] = Block(
            attention,
            f"{depth} transformer blocks",
            layers[attention].diffusers,
            slot_name(attention),
            next((trait.name for trait in traits if trait.keeps(query)), ""),
        )
    return blocks


def draw_names(block: Block, x: float, top: float, pill: str, on_pill: str) -> list[str]:
    """The names in kohya and diffusers, the slot on a pill, and the role."""
    width = len(block.slot) * 12 + 14
    return [
        text(x, top + 28, block.name, "mono bold"),
        text(x, top + 53, block.diffusers, "mono"),
        f'<rect x="{x:g}" y="{top + 62:g}" width="{width}" height="25" rx="6" class="{pill}"/>',
        text(x + 7, top + 81, block.slot, f"mono bold{on_pill}"),
        text(x + width + 10, top + 81, block.role),
    ]


def draw_block(block: Block, x: float, y: float, width: int = BOX, more: str = "") -> list[str]:
    """A box around the point x, y; `more` are attributes of its frame."""
    left, right, top = x - width / 2, x + width / 2, y - block.height / 2
    colour, mark, words = LOOKS[block.trait] if block.trait else ("plain", "", "")
    frame = (
        f'<rect x="{left:g}" y="{top:g}" width="{width}" height="{block.height}" rx="8" '
        f'class="{colour}" stroke-width="{3 if block.trait else 1.5}"{more}/>'
    )
    if not block.slot:
        name = text(left + 12, top + 26, block.name, "mono quiet")
        return [frame, name, text(right - 12, top + 26, block.role, "end quiet")]
    if not block.trait:
        return [frame, *draw_names(block, left + 12, top, "plain slot", "")]
    name = f'<tspan class="bold">{block.trait.upper()}</tspan>'
    return [
        frame,
        shape(mark, left + 23, top + 26, f"{colour}-mark"),
        text(left + 44, top + 33, f"{name} {words}"),
        *draw_names(block, left + 12, top + 38, f"{colour}-mark", " on-mark"),
    ]


def draw_rows(blocks: dict[str, Block]) -> tuple[list[str], int]:
    """Each block on the way down beside the block that takes its result, and y below them all."""
    boxes, skips, y = [], "", TOP
    for number in range(9):
        down, up = blocks[f"input_blocks.{number}"], blocks[f"output_blocks.{8 - number}"]
        height = max(down.height, up.height)
        middle = y + height / 2
        skips += f"M{DOWN + BOX // 2} {middle:g}H{UP - BOX // 2}"
        boxes += draw_block(down, DOWN, middle) + draw_block(up, UP, middle)
        boxes.append(shape("down", DOWN, middle - down.height / 2 - 3, "head"))
        boxes.append(shape("up", UP, middle + up.height / 2 + 3, "head"))
        y += height + 16
    return [line(skips, 2, more=' stroke-dasharray="2 5"'), *boxes], y


def describe_blocks(blocks: dict[str, Block]) -> str:
    """The picture in words."""
    traits = "; ".join(
        f"{b.trait} is {b.name} in kohya, {b.diffusers} in diffusers, slot {b.slot}, {b.role}"
        for trait in LOOKS for b in blocks.values() if b.trait == trait
    )  # fmt: skip
    return (
        "A U: blocks go down on the left, through the middle block, and up on the right, each "
        f"with its name in kohya, in diffusers and as a block-weight slot. {traits}."
    )


def blocks_picture() -> str:
    """The U-Net as a U, and the text encoders below it."""
    blocks = unet_blocks()
    key = Block("name in kohya", "in LBW, and its depth", "name in diffusers", "SLOT")
    encoders = Block("te1, te2", "text, 12 and 32 layers", "text_encoder, text_encoder_2", "BASE")
    rows, end = draw_rows(blocks)
    y = end + 55
    flow = f"M{DOWN} {TOP - 18}V{y - 14}q0 14 14 14H{UP - 14}q14 0 14 -14V{TOP - 18}"
    return picture(
        "The blocks of SDXL's U-Net, with their three names",
        describe_blocks(blocks),
        y + 173,
        text(6, 38, "SDXL's U-Net", "title quiet"),
        text(6, 70, "and the blocks that B-LoRA", "quiet"),
        text(6, 96, "trains and cuts", "quiet"),
        *draw_block(key, UP, 55, more=' stroke-dasharray="6 5"'),
        line(flow, 2),
        *rows,
        shape("right", CENTRE - 161, y, "head"),
        *draw_block(blocks["middle_block"], CENTRE, y, 316),
        *draw_block(encoders, CENTRE, y + 118, 376),
    )


# ---- The ranks -----------------------------------------------------------------------------------

RANKS = (16, 32, 64, 128, 256, 512, 1024)
USERS = {64: "paper", 1024: "original"}  # whose rank it is
# Numbers that Prodigy keeps for each: four of lora_down, three of lora_up, which begins at zero.
PRODIGY = 3.5
FLOOR, CEILING, END = 616, 112, 694  # y of the axis, top of the hatching, right end of both


def size_in_words(size: float) -> str:
    """Bytes as "902 MB" or "10.8 GB"."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def across(rank: float) -> float:
    """x of a rank."""
    return round(94 + 92 * math.log2(rank / RANKS[0]), 1)


def upwards(size: float) -> float:
    """y of a size in bytes; the axis is at 8 MB."""
    return round(FLOOR - 148 * math.log10(size / 8e6), 1)


def draw_sizes(per_rank: float, colour: str, mark: str, key: int, *names: str) -> list[str]:
    """A line through the sizes at all ranks, each with its number, and its names in a key at y."""
    points = [(across(rank), upwards(per_rank * rank)) for rank in RANKS]
    (x, y), (last_x, last_y) = points[0], points[-1]
    drawn = [
        line(f"M{x:g} {y:g}L{last_x:g} {last_y:g}", 3, f"{colour} series"),
        shape(mark, 24, key - 7, f"{colour}-mark"),
        *(text(46, key + 26 * row, name, "quiet") for row, name in enumerate(names)),
    ]
    for rank, (at_x, at_y) in zip(RANKS, points, strict=True):
        drawn.append(shape(mark, at_x, at_y, f"{colour}-mark"))
        # The line goes on to the upper right of every number but the last.
        label_x, anchor = (at_x, "middle") if rank == RANKS[-1] else (at_x + 6, "end")
        words = size_in_words(per_rank * rank)
        drawn.append(text(label_x, at_y - 17, words, f"bold {anchor} quiet"))
    return drawn


def draw_outgrown(rank: int, matrix: str) -> list[str]:
    """The rank above which a LoRA is larger than its matrices, hatched beyond it."""
    x = across(rank)
    hatch = line("M0 12L12 0", 1, more=' opacity="0.6"')
    return [
        '<pattern id="beyond" width="12" height="12" patternUnits="userSpaceOnUse">'
        f"{hatch}</pattern>",
        f'<rect x="{x:g}" y="{CEILING}" width="{END - x:g}" height="{FLOOR - CEILING}" '
        'fill="url(#beyond)"/>',
        line(f"M{x:g} {CEILING}V{FLOOR}", 2.5, more=' id="outgrown"'),
        text(x - 14, FLOOR - 94, f"above rank {rank}", "bold end quiet"),
        text(x - 14, FLOOR - 68, "a LoRA is larger than", "end quiet"),
        text(x - 14, FLOOR - 42, f"the {matrix} matrices", "end quiet"),
        text(x - 14, FLOOR - 16, "that it changes", "end quiet"),
    ]


def draw_axis(per_rank: int) -> list[str]:
    """The ranks, and the parameters below each."""
    drawn = [line(f"M54 {FLOOR}H{END}", 2)]
    for rank in RANKS:
        x, millions = across(rank), rank * per_rank / 1e6
        words = f"{millions:.1f} M" if millions < 10 else f"{millions:.0f} M"
        drawn.append(text(x, FLOOR + 28, str(rank), "bold middle quiet"))
        drawn.append(text(x, FLOOR + 94, words, "bold middle quiet"))
        if rank in USERS:
            drawn.append(text(x, FLOOR + 54, USERS[rank], "middle quiet"))
    return [
        *drawn,
        text(12, FLOOR + 28, "rank", "quiet"),
        text(CENTRE, FLOOR + 124, f"parameters: {per_rank:,}{TIMES}rank", "middle quiet"),
    ]


def trained_layers() -> list[Layer]:
    """The layers that content and style keep."""
    traits = load_traits(ROOT / "blora_traits.json")
    return [
        layer
        for layer in sdxl_layers()["unet"].values()
        if layer.is_leaf
        and any(traits[trait].keeps(layer.module) for trait in ("content", "style"))
    ]


def describe_ranks(per_rank: int, file: int, memory: float, outgrown: dict[int, str]) -> str:
    """The picture in words."""
    ranks = [
        f"Rank {rank}: {per_rank * rank / 1e6:.0f} million parameters, a file of "
        f"{size_in_words(file * rank)} in fp16, {size_in_words(memory * rank)} of memory beside "
        "the model for weights, gradients and Prodigy's state in fp32."
        for rank in (RANKS[0], *USERS)
    ]
    matrices = [
        f"Above rank {rank} a LoRA holds more numbers than the {matrix} matrix it changes."
        for rank, matrix in sorted(outgrown.items())
    ]
    return " ".join(ranks + matrices)


def rank_picture() -> str:
    """Rank against parameters, the file's size and the memory it takes beside the model."""
    layers = trained_layers()
    per_rank = sum(layer.parameters(1) for layer in layers)
    file = BYTES["fp16"] * per_rank
    # For each parameter its value, its gradient and Prodigy's state.
    memory = BYTES["float"] * (1 + 1 + PRODIGY) * per_rank
    # A LoRA of rank (in x out) / (in + out) holds as many numbers as the matrix.
    outgrown = {
        math.prod(layer.shape) // layer.parameters(1): TIMES.join(map(str, layer.shape[::-1]))
        for layer in layers
    }
    return picture(
        "Rank against parameters, file size and memory beside the model",
        describe_ranks(per_rank, file, memory, outgrown),
        FLOOR + 138,
        text(6, 38, "What a rank costs", "title quiet"),
        text(6, 70, f"Content and style together: {len(layers)} layers.", "quiet"),
        text(6, 96, "Both scales are logarithmic: twice the rank, twice the cost.", "quiet"),
        *draw_outgrown(*min(outgrown.items())),
        *draw_sizes(memory, "orange", "diamond", 148, "memory beside the model, in fp32:",
                    "weights, gradients and Prodigy's state"),
        *draw_sizes(file, "blue", "circle", 212, "file, in fp16"),
        *draw_axis(per_rank),
    )  # fmt: skip


def main() -> None:
    for name, svg in (("blocks", blocks_picture()), ("rank", rank_picture())):
        path = ROOT / f"docs/blora_{name}.svg"
        path.write_text(svg, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
