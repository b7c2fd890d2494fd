"""Draw docs/blocks.svg and docs/rank.svg from SDXL's layers and the traits file.

Run it as: python tools/draw_blora.py
"""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from blora.preflight.memory import BYTES
from blora.sdxl import Layer, load_traits, sdxl_layers

ROOT = Path(__file__).resolve().parent.parent
TIMES = " \N{MULTIPLICATION SIGN} "


# ---- What is drawn -------------------------------------------------------------------------------


def unet_leaves() -> list[Layer]:
    """The U-Net's Linear and Conv2d layers, in the order of its forward pass."""
    return [layer for layer in sdxl_layers()["unet"].values() if layer.is_leaf]


def trained_layers(*names: str) -> list[Layer]:
    """Those that these traits keep; content and style are what both recipes train."""
    traits = load_traits(ROOT / "blora_traits.json")
    chosen = [traits[name] for name in names or ("content", "style")]
    return [layer for layer in unet_leaves() if any(t.keeps(layer.module) for t in chosen)]


def early_stop(*names: str) -> tuple[Layer, int]:
    """The first layer that is trained, and how many lie before its block: fast spares them."""
    first = trained_layers(*names)[0]
    return first, [layer.block for layer in unet_leaves()].index(first.block)


# ---- SVG -----------------------------------------------------------------------------------------

FONTS = (
    'text{font:20px system-ui,-apple-system,"Segoe UI",Roboto,Helvetica,Arial,sans-serif}'
    '.mono{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace}'
    ".bold{font-weight:700}.title{font-size:28px;font-weight:700}.end{text-anchor:end}"
    ".middle{text-anchor:middle}.trait{font-size:18px}.small{font-size:15px}path.open{fill:none}"
)
# .quiet is the colour of text outside the boxes: some viewers put the other scheme's background
# behind it, and it can be read on both.
LIGHT = (
    "text{fill:#1f2328}.quiet{fill:#656d76}.on-mark{fill:#ffffff}"
    ".flow{stroke:#8c959f;fill:none}.head{fill:#8c959f}"
    ".plain{fill:#f6f8fa;stroke:#8c959f}.spared{fill:#eef1f4;stroke:#8c959f}"
    ".purple{stroke:#8250df;fill:none}.purple-mark{fill:#8250df}"
    ".blue{fill:#dcefff;stroke:#0b66b8}.blue-mark{fill:#0b66b8}"
    ".orange{fill:#ffeadb;stroke:#b84a00}.orange-mark{fill:#b84a00}"
    ".green{fill:#d9f5ea;stroke:#00795a}.green-mark{fill:#00795a}"
)
DARK = (
    "text{fill:#f0f6fc}.quiet{fill:#8b949e}.on-mark{fill:#0d1117}"
    ".flow{stroke:#6e7681;fill:none}.head{fill:#6e7681}"
    ".plain{fill:#1b222b;stroke:#6e7681}.spared{fill:#1f262e;stroke:#6e7681}"
    ".purple{stroke:#a371f7;fill:none}.purple-mark{fill:#a371f7}"
    ".blue{fill:#102c4a;stroke:#58a6ff}.blue-mark{fill:#58a6ff}"
    ".orange{fill:#42210b;stroke:#ff9d57}.orange-mark{fill:#ff9d57}"
    ".green{fill:#073b2f;stroke:#3ccb9c}.green-mark{fill:#3ccb9c}"
)
# The corners of each shape around its point; an arrow head's point is its tip.
CORNERS = {
    "diamond": ((0, -11), (11, 0), (0, 11), (-11, 0)),
    "triangle": ((0, -10), (11, 9), (-11, 9)),
    "left": ((0, 0), (8, -6), (8, 6)),
    "right": ((0, 0), (-8, -6), (-8, 6)),
    "far right": ((0, 0), (-16, -10), (-16, 10)),
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


def box(x: float, y: float, width: float, height: float, kind: str, more: str = "") -> str:
    """A rectangle around a point; `more` are further attributes."""
    left, top = x - width / 2, y - height / 2
    return (
        f'<rect x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}" rx="6" '
        f'class="{kind}"{more}/>'
    )


def line(path: str, width: float, kind: str = "flow", more: str = "") -> str:
    """An open path; `more` are further attributes."""
    return f'<path d="{path}" class="{kind}" stroke-width="{width}"{more}/>'


def picture(title: str, description: str, size: tuple[int, int], *elements: str) -> str:
    """The whole file; the reader's colour scheme picks the colours."""
    width, height = size
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" aria-labelledby="title desc">',
        f'<title id="title">{title}</title>',
        f'<desc id="desc">{description}</desc>',
        f"<style>{FONTS}{LIGHT}@media (prefers-color-scheme:dark){{{DARK}}}</style>",
        *elements,
        "</svg>\n",
    ]
    return "\n".join(lines)


# ---- The blocks ----------------------------------------------------------------------------------

ACROSS, PITCH = 63, 68  # x of the first block, and from one to the next
IN, OUT, TURN = 152, 288, 706  # y of the way in and of the way out, and x of the middle block
LOOKS = {
    # trait: its colour, its shape, what it is, and where its names are
    "layout": ("green", "triangle", "composition", (584, 55)),
    "style": ("orange", "diamond", "the look", (238, 380)),
    "content": ("blue", "circle", "the subject", (584, 380)),
}
SLOT = re.compile(r"(in|out)put_blocks\.(\d)|middle_block")
ABOUT_SLOTS = (
    "The boxes are slots of LBW (block weights):",
    "a list BASE, IN.., MID, OUT.. for extensions",
    "such as sd-webui-lora-block-weight",
)


@dataclass(frozen=True)
class Block:
    """A part of the U-Net that has a slot of its own, with the names of its attention."""

    slot: str
    spared: bool  # by fast, where content and style are trained
    trait: str = ""
    kohya: str = ""
    diffusers: str = ""

    @property
    def at(self) -> tuple[float, float]:
        """Its place: the way in goes right, and the way out comes back below it."""
        if self.slot == "MID":
            return TURN, (IN + OUT) / 2
        number = int(self.slot[-2:])
        if self.slot.startswith("IN"):
            return ACROSS + PITCH * number, IN
        return ACROSS + PITCH * (8 - number), OUT


def slot_name(layer: Layer) -> str:
    """The slot of a layer: IN08, MID, OUT00."""
    way, number = SLOT.match(layer.name).groups()
    return f"{way.upper()}0{number}" if way else "MID"


def unet_blocks() -> dict[str, Block]:
    """All blocks by slot, in the order of the forward pass."""
    traits = {slot_name(layer): trait for trait in LOOKS for layer in trained_layers(trait)}
    stop, _ = early_stop()
    blocks = {}
    for layer in filter(lambda layer: SLOT.match(layer.name), sdxl_layers()["unet"].values()):
        slot = slot_name(layer)
        spared = slot_name(stop) not in {slot, *blocks}
        blocks.setdefault(slot, Block(slot, spared))
        if layer.kind == "Transformer2DModel":
            names = layer.name, layer.diffusers
            blocks[slot] = Block(slot, spared, traits.get(slot, ""), *names)
    return blocks


def draw_block(block: Block) -> list[str]:
    """A box with the slot; that of a trait is larger, and full of its colour if it is trained."""
    x, y = block.at
    if not block.trait:
        kind, more = ("spared", ' stroke-dasharray="4 4"') if block.spared else ("plain", "")
        name = text(x, y + 6, block.slot, "mono small middle quiet")
        return [box(x, y, 58, 34, kind, more), name]
    colour, mark, *_ = LOOKS[block.trait]
    fill, on_fill = (colour, f"{colour}-mark") if block.spared else (f"{colour}-mark", "on-mark")
    return [
        box(x, y, 62, 54, f"{colour} {fill}", ' stroke-width="2.5"'),
        shape(mark, x, y - 10, on_fill),
        text(x, y + 19, block.slot, f"mono small bold middle {on_fill}"),
    ]


def draw_names(block: Block) -> list[str]:
    """All names of a trait's block in a box of their own, and a line to it from the block."""
    colour, mark, words, (x, y) = LOOKS[block.trait]
    left, (block_x, block_y) = x - 168, block.at
    toward = math.copysign(1, y - block_y)
    start, end = block_y + 27 * toward, y - 47 * toward
    foot = min(max(block_x, left + 20), x + 148)
    path = f"M{block_x:g} {start:g}V{(start + end) / 2:g}H{foot:g}V{end:g}"
    title = f'<tspan class="bold">{block.trait.upper()}</tspan> {words}'
    return [
        line(path, 2.5, f"{colour} open"),
        box(x, y, 336, 94, colour, ' stroke-width="2.5"'),
        shape(mark, left + 22, y - 24, f"{colour}-mark"),
        text(left + 42, y - 17, title, "trait"),
        box(x + 126, y - 24, 62, 28, f"{colour}-mark"),
        text(x + 126, y - 18, block.slot, "mono small bold middle on-mark"),
        text(left + 12, y + 12, "kohya", "small"),
        text(left + 88, y + 12, block.kohya, "mono small bold"),
        text(left + 12, y + 35, "diffusers", "small"),
        text(left + 88, y + 35, block.diffusers, "mono small"),
    ]


def draw_stop(block: Block, spared: int) -> list[str]:
    """How far fast's gradients come back, and a ground of its own for all that lies before it."""
    x = block.at[0] + 40
    count = f"{spared} of the U-Net's {len(unet_leaves())} layers"
    return [
        f'<path d="M20 {IN - 36}H752V{OUT + 38}H{x:g}V{IN + 62}H20z" class="spared" '
        'stroke-width="0"/>',
        text(34, IN + 50, f"fast sends no gradients here: {count} are spared", "small quiet"),
        text(x - 22, OUT - 52, "fast: gradients come back to here, and no further",
             "small bold end purple-mark"),
        line(f"M34 {OUT - 40}H{x - 16:g}", 5, "purple"),
        shape("far right", x - 3, OUT - 40, "purple-mark"),
        line(f"M{x:g} {OUT - 62}V{OUT + 38}", 5, "purple", ' id="stop"'),
    ]  # fmt: skip


def draw_text_encoders() -> list[str]:
    """Their slot, small: B-LoRA trains the U-Net."""
    x, y = 34, 380
    return [
        box(x, y, 52, 94, "plain"),
        text(x, y - 16, "te1,", "small middle quiet"),
        text(x, y + 4, "te2", "small middle quiet"),
        text(x, y + 32, "BASE", "mono small middle quiet"),
    ]


def describe_blocks(blocks: dict[str, Block]) -> str:
    """The picture in words."""
    traits = "; ".join(
        f"{b.trait} is {b.kohya} in kohya, {b.diffusers} in diffusers, slot {b.slot}"
        for b in blocks.values() if b.trait
    )  # fmt: skip
    (stop, spared), (other, fewer) = early_stop(), early_stop("layout")
    return (
        "A U that lies on its side: nine blocks of the way in, the middle block, and below them "
        f"nine blocks of the way out. {traits}. Where content and style are trained, fast's "
        f"gradients come back from the output to {stop.block} and no further: {spared} of the "
        f"U-Net's {len(unet_leaves())} layers are spared. Where layout is trained too, they come "
        f"back to {other.block}, and {fewer} are spared. The slots are those of block weights "
        "(LBW), in which BASE is the text encoders te1 and te2."
    )


def blocks_picture() -> str:
    """The U-Net as a U on its side, the names of each trait's block, and where fast stops."""
    blocks = unet_blocks()
    stop, spared = early_stop()
    flow = f"M8 {IN}H{TURN - 14}q14 0 14 14V{OUT - 14}q0 14 -14 14H12"
    return picture(
        "Where content, style and layout are in SDXL's U-Net, and where fast's gradients stop",
        describe_blocks(blocks),
        (760, 432),
        text(8, 36, "B-LoRA in SDXL's U-Net", "title quiet"),
        *(text(8, 62 + 20 * row, words, "small quiet") for row, words in enumerate(ABOUT_SLOTS)),
        *draw_stop(blocks[slot_name(stop)], spared),
        line(flow, 2),
        shape("right", 34, IN, "head"),
        shape("left", 8, OUT, "head"),
        *(part for block in blocks.values() if block.trait for part in draw_names(block)),
        *(part for block in blocks.values() for part in draw_block(block)),
        *draw_text_encoders(),
    )


# ---- The ranks -----------------------------------------------------------------------------------

WIDTH = 720
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


def draw_sizes(per_rank: float, colour: str, mark: str, key_y: int, *names: str) -> list[str]:
    """A line through the sizes at all ranks, each with its number, and its names in a key at y."""
    points = [(across(rank), upwards(per_rank * rank)) for rank in RANKS]
    (x, y), (last_x, last_y) = points[0], points[-1]
    drawn = [
        line(f"M{x:g} {y:g}L{last_x:g} {last_y:g}", 3, f"{colour} open"),
        shape(mark, 24, key_y - 7, f"{colour}-mark"),
        *(text(46, key_y + 26 * row, name, "quiet") for row, name in enumerate(names)),
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
        text(WIDTH // 2, FLOOR + 124, f"parameters: {per_rank:,}{TIMES}rank", "middle quiet"),
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
        (WIDTH, FLOOR + 138),
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
        path = ROOT / f"docs/{name}.svg"
        path.write_text(svg, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
