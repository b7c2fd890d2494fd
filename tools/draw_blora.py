"""Draw docs/blora_blocks.svg and docs/blora_rank.svg from the data that the tools themselves use.

python tools/draw_blora.py            writes them
python tools/draw_blora.py --check    exits 1 where a file is not what would be drawn
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from blora_preflight import BYTES, OPTIMIZER_STATE, Layer, matching, sdxl_layers, unet_layers
from blora_slicer import Trait, block_of, load_traits, sgm_name

ROOT = Path(__file__).resolve().parent.parent
TRAITS_FILE = ROOT / "blora_traits.json"
WIDTH = 720  # of both pictures; half of that on a phone, so that text of 20 has 10 there


# ---- SVG -----------------------------------------------------------------------------------------

# Of each scheme: text in a box, on a mark and outside, lines; then fill and stroke of the boxes.
# What stands outside of boxes can be read on the other scheme's ground too.
COLOURS = {
    "light": {
        "ink": "#1f2328", "paper": "#ffffff", "quiet": "#5d6570", "line": "#8c959f",
        "plain": ("#f6f8fa", "#c8d1da"),
        "blue": ("#dcefff", "#0b66b8"), "orange": ("#ffeadb", "#b84a00"),
        "green": ("#d9f5ea", "#00795a"),
    },
    "dark": {
        "ink": "#f0f6fc", "paper": "#0d1117", "quiet": "#8b949e", "line": "#6e7681",
        "plain": ("#1b222b", "#465059"),
        "blue": ("#102c4a", "#58a6ff"), "orange": ("#42210b", "#ff9d57"),
        "green": ("#073b2f", "#3ccb9c"),
    },
}  # fmt: skip
FONTS = (
    'text{font:20px system-ui,-apple-system,"Segoe UI",Roboto,Helvetica,Arial,sans-serif}'
    '.mono{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace}'
    ".bold{font-weight:700}.title{font-size:32px;font-weight:700}.end{text-anchor:end}"
    ".middle{text-anchor:middle}.slot{stroke-width:1.5}path.series{fill:none}"
)


def colour_rules(scheme: str) -> str:
    """The CSS of one colour scheme."""
    colours = dict(COLOURS[scheme])
    ink, paper, quiet, line = (colours.pop(n) for n in ("ink", "paper", "quiet", "line"))
    rules = [
        f"text{{fill:{ink}}}.quiet{{fill:{quiet}}}.on-mark{{fill:{paper}}}",
        f".flow{{stroke:{line};fill:none}}.head{{fill:{line}}}",
    ]
    for name, (fill, stroke) in colours.items():
        rules.append(f".{name}{{fill:{fill};stroke:{stroke}}}.{name}-mark{{fill:{stroke}}}")
    return "".join(rules)


def number(value: float) -> str:
    """A coordinate with at most one decimal."""
    return f"{value:.1f}".removesuffix(".0")


def tag(name: str, inside: str = "", /, **attributes: float | str) -> str:
    """An element: class_ is its class, stroke_width its stroke-width."""
    told = "".join(
        f' {key.rstrip("_").replace("_", "-")}="'
        f'{escape(value) if isinstance(value, str) else number(value)}"'
        for key, value in attributes.items()
    )
    return f"<{name}{told}>{inside}</{name}>" if inside else f"<{name}{told}/>"


def text(x: float, y: float, words: str, kind: str = "") -> str:
    """A line of text, its baseline at y."""
    style = {"class_": kind} if kind else {}
    return tag("text", escape(words, quote=False), x=x, y=y, **style)


def picture(title: str, description: str, height: float, drawn: Iterable[str]) -> str:
    """The whole file, in the colours of the reader's scheme."""
    style = (
        f"{FONTS}{colour_rules('light')}"
        f"@media (prefers-color-scheme:dark){{{colour_rules('dark')}}}"
    )
    root = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {number(height)}" '
        f'width="{WIDTH}" height="{number(height)}" role="img" aria-labelledby="title desc">'
    )
    lines = [
        root,
        tag("title", escape(title, quote=False), id="title"),
        tag("desc", escape(description, quote=False), id="desc"),
        tag("style", style),
        *drawn,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


# ---- The U-Net -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A part of SDXL with attention: its names, what is in it, the trait that keeps that."""

    kohya: str
    diffusers: str
    slot: str
    inside: str
    trait: str = ""


# How a trait looks (colour and shape), and what it is in two or three words.
LOOKS = {
    "content": ("blue", "circle", "the subject"),
    "style": ("orange", "diamond", "colours, strokes"),
    "layout": ("green", "triangle", "composition"),
}
PLAINLY = ("plain", "", "")  # a block of no trait, or of one that is not among those
# What diffusers may call a block with attention.
DIFFUSERS = (
    "mid_block.attentions.0",
    *(f"{way}.{i}.attentions.{j}" for way in ("down_blocks", "up_blocks") for i in range(4)
      for j in range(3)),
)  # fmt: skip


def kohya_module(layer: str) -> str:
    """The name of a U-Net layer's module in a kohya file."""
    return "lora_unet_" + layer.replace(".", "_")


def diffusers_name(block: str) -> str:
    """What diffusers calls a block, by the slicer's own way from its names to kohya's."""
    sgm = block.replace(".", "_") + "_"
    return next(name for name in DIFFUSERS if sgm_name(name.replace(".", "_") + "_") == sgm)


def slot_name(block: str) -> str:
    """The slot of a block in a block-weight vector: IN08, MID, OUT00."""
    way, index = re.fullmatch(r"(input|middle|output)_blocks?\.(\d)(?:\.1)?", block).groups()
    return {"input": f"IN{int(index):02}", "middle": "MID", "output": f"OUT{int(index):02}"}[way]


def attention_blocks() -> dict[str, Block]:
    """The U-Net's blocks with attention, by their kohya names."""
    layers, traits = unet_layers(), load_traits(TRAITS_FILE)
    found = {}
    for name in (name for name, layer in layers.items() if layer.kind == "Transformer2DModel"):
        inside = {n: layer for n, layer in layers.items() if n.startswith(f"{name}.")}
        depth = sum(layer.kind == "BasicTransformerBlock" for layer in inside.values())
        leaves = [kohya_module(n) for n, layer in inside.items() if layer.is_leaf]
        kept = [t for t in traits.values() if any(t.keeps(leaf) for leaf in leaves)]
        found[name] = Block(
            kohya=block_of(kohya_module(name)),
            diffusers=diffusers_name(name),
            slot=slot_name(name),
            inside=f"{depth} transformer blocks",
            trait=kept[0].name if kept else "",
        )
    return found


def text_encoders() -> Block:
    """Both text encoders, which share the first slot of a block-weight vector."""
    layers = sdxl_layers()
    depths = [
        str(sum(layer.kind == "CLIPEncoderLayer" for layer in layers[name].values()))
        for name in ("te1", "te2")
    ]
    words = f"text, {' and '.join(depths)} layers"
    return Block("te1, te2", "text_encoder, text_encoder_2", "BASE", words)


# ---- The picture of the blocks -------------------------------------------------------------------

BOX, EDGE, PAD = 336, 6, 12  # a box's width, the margin of the picture, the margin in a box
LEFT, RIGHT = EDGE, WIDTH - EDGE - BOX
THIN, PLAIN, BANNER, GAP = 38, 98, 38, 16  # heights
CENTRES = (LEFT + BOX / 2, RIGHT + BOX / 2)


def mark(shape: str, x: float, y: float, colour: str) -> str:
    """The shape of a trait around a point."""
    kind = f"{colour}-mark"
    if shape == "circle":
        return tag("circle", cx=x, cy=y, r=9, class_=kind)
    corners = {"diamond": "0,-11 11,0 0,11 -11,0", "triangle": "0,-10 11,9 -11,9"}[shape]
    points = [tuple(map(float, corner.split(","))) for corner in corners.split()]
    moved = " ".join(f"{number(x + dx)},{number(y + dy)}" for dx, dy in points)
    return tag("polygon", points=moved, class_=kind)


def rectangle(x: float, y: float, width: float, height: float, kind: str, stroke: float) -> str:
    """A box with round corners."""
    return tag("rect", x=x, y=y, width=width, height=height, rx=8, class_=kind, stroke_width=stroke)


def height_of(block: Block | None) -> int:
    """How high a block is drawn; None is one without attention."""
    if block is None:
        return THIN
    return PLAIN + (BANNER if block.trait else 0)


def draw_banner(trait: str, x: float, top: float) -> list[str]:
    """The trait's shape, its name and what it is."""
    colour, shape, words = LOOKS.get(trait, PLAINLY)
    told = tag("tspan", escape(trait.upper(), quote=False), class_="bold") + f" {words}"
    banner = tag("text", told, x=x + 32, y=top + 33)
    return [mark(shape, x + 11, top + 26, colour), banner] if shape else [banner]


def draw_block(block: Block, x: float, middle: float, width: float = BOX) -> list[str]:
    """A box with the trait's banner, the three names and the depth."""
    colour = LOOKS.get(block.trait, PLAINLY)[0]
    top = middle - height_of(block) / 2
    height, stroke = height_of(block), 3 if block.trait else 1.5
    drawn = [rectangle(x, top, width, height, colour, stroke)]
    x += PAD
    if block.trait:
        drawn += draw_banner(block.trait, x, top)
        top += BANNER
    is_plain = colour == PLAINLY[0]
    pill, in_pill = ("plain slot", "") if is_plain else (f"{colour}-mark", " on-mark")
    wide = len(block.slot) * 12 + 14
    return [
        *drawn,
        text(x, top + 28, block.kohya, "mono bold"),
        text(x, top + 53, block.diffusers, "mono"),
        tag("rect", x=x, y=top + 62, width=wide, height=25, rx=6, class_=pill),
        text(x + 7, top + 81, block.slot, f"mono bold{in_pill}"),
        text(x + wide + 10, top + 81, block.inside),
    ]


def draw_thin(name: str, note: str, x: float, middle: float) -> list[str]:
    """A low box for a block without attention."""
    return [
        rectangle(x, middle - THIN / 2, BOX, THIN, "plain", 1.5),
        text(x + PAD, middle + 7, name, "mono quiet"),
        text(x + BOX - PAD, middle + 7, note, "end quiet"),
    ]


def pairs() -> list[tuple[str, str]]:
    """A block down and the block up that its result is handed to, from the image inwards."""
    numbers = {way: set() for way in ("input", "output")}
    for layer in unet_layers():
        if found := re.match(r"(input|output)_blocks\.(\d+)\.", layer):
            numbers[found[1]].add(int(found[2]))
    return [
        (f"input_blocks.{down}", f"output_blocks.{up}")
        for down, up in zip(sorted(numbers["input"]), sorted(numbers["output"])[::-1], strict=True)
    ]


def thin_note(name: str) -> str:
    """What a block without attention does."""
    kinds = {layer.kind for n, layer in unet_layers().items() if n.startswith(f"{name}.")}
    if "Downsample2D" in kinds:
        return "downsample"
    return "no attention" if "ResnetBlock2D" in kinds else "latent in"


def arrow(x: float, y: float, way: str) -> str:
    """A small arrow head with its tip at a point, "down", "up" or "right"."""
    corners = {
        "down": ((-6, -8), (6, -8)), "up": ((-6, 8), (6, 8)), "right": ((-8, -6), (-8, 6)),
    }[way]  # fmt: skip
    points = " ".join(f"{number(x + dx)},{number(y + dy)}" for dx, dy in ((0, 0), *corners))
    return tag("polygon", points=points, class_="head")


def header() -> list[str]:
    """The title, and a box that says what stands where in all the others."""
    sample = Block("name in kohya", "name in diffusers", "SLOT", "in LBW, and its depth")
    drawn = draw_block(sample, RIGHT, 6 + PLAIN / 2)
    drawn[0] = drawn[0].replace("/>", ' stroke-dasharray="6 5"/>')
    return [
        text(LEFT, 38, "SDXL's U-Net", "title quiet"),
        text(LEFT, 70, "and the blocks that B-LoRA", "quiet"),
        text(LEFT, 96, "trains and cuts", "quiet"),
        *drawn,
    ]


def draw_rows(top: float) -> tuple[list[str], float]:
    """Every pair of blocks on a row of its own, with what flows between; and the lower end."""
    blocks = attention_blocks()
    boxes, flow, y = [], [], top
    for down, up in pairs():
        found = [blocks.get(f"{name}.1") for name in (down, up)]
        height = max(map(height_of, found))
        middle = y + height / 2
        flow.append(f"M{LEFT + BOX} {number(middle)}H{RIGHT}")
        for name, block, x in zip((down, up), found, (LEFT, RIGHT), strict=True):
            if block:
                boxes += draw_block(block, x, middle)
            else:
                boxes += draw_thin(name, thin_note(name), x, middle)
        boxes.append(arrow(CENTRES[0], middle - height_of(found[0]) / 2 - 3, "down"))
        boxes.append(arrow(CENTRES[1], middle + height_of(found[1]) / 2 + 3, "up"))
        y += height + GAP
    skips = tag("path", d="".join(flow), class_="flow", stroke_width=2, stroke_dasharray="2 5")
    return [skips, *boxes], y


def blocks_picture() -> str:
    """The U-Net as a U: down on the left, up on the right."""
    top = 140
    rows, y = draw_rows(top)
    middle = y + 6 + PLAIN / 2
    width = 316
    down = f"M{number(CENTRES[0])} {top - 18}V{number(middle - 14)}q0 14 14 14"
    path = f"{down}H{number(CENTRES[1] - 14)}q14 0 14 -14V{top - 18}"
    drawn = [
        *header(),
        tag("path", d=path, class_="flow", stroke_width=2),
        *rows,
        arrow((WIDTH - width) / 2 - 3, middle, "right"),
        *draw_block(attention_blocks()["middle_block.1"], (WIDTH - width) / 2, middle, width),
        *draw_block(text_encoders(), (WIDTH - 376) / 2, middle + PLAIN + 20, 376),
    ]
    return picture(
        "The blocks of SDXL's U-Net, with their three names",
        describe_blocks(attention_blocks().values(), load_traits(TRAITS_FILE)),
        middle + PLAIN * 1.5 + 26,
        drawn,
    )


def describe_blocks(blocks: Iterable[Block], traits: dict[str, Trait]) -> str:
    """The picture in words."""
    order = list(traits)
    marked = sorted((b for b in blocks if b.trait), key=lambda block: order.index(block.trait))
    told = "; ".join(
        f"{b.trait} is {b.kohya} in kohya, {b.diffusers} in diffusers, slot {b.slot}, {b.inside}"
        for b in marked
    )
    return (
        "A U: blocks go down on the left, through the middle block, and up on the right, each "
        f"with its name in kohya, in diffusers and as a block-weight slot. {told}."
    )


# ---- The picture of the ranks --------------------------------------------------------------------

RANKS = [2**exponent for exponent in range(4, 11)]
NOTED = {64: "paper", 1024: "original"}  # whose rank it is
FIRST, STEP, DECADE = 94, 92, 148  # x of the first rank, from rank to rank, and from 1 to 10 bytes
FLOOR, CEILING = 616, 112  # y of the axis, and of the upper end of what is drawn
LOWEST = 7e6  # bytes at the axis
TIMES = " \N{MULTIPLICATION SIGN} "


def trained_layers() -> list[Layer]:
    """The layers that content and style keep."""
    traits = load_traits(TRAITS_FILE)
    return [
        layer
        for name, layer in unet_layers().items()
        if layer.is_leaf
        and any(traits[trait].keeps(kohya_module(name)) for trait in ("content", "style"))
    ]


def outgrown_rank(layer: Layer) -> float:
    """The rank above which a LoRA holds more numbers than the matrix it changes."""
    return math.prod(layer.shape) / layer.parameters(1)


def size_in_words(size: float) -> str:
    """Bytes as "902 MB" or "9.0 GB"."""
    return f"{size / 1e9:.1f} GB" if size >= 999.5e6 else f"{size / 1e6:.0f} MB"


def across(rank: float) -> float:
    """Where a rank is, from left to right."""
    return FIRST + STEP * math.log2(rank / RANKS[0])


def upwards(size: float) -> float:
    """Where a size in bytes is, from the axis up."""
    return FLOOR - DECADE * math.log10(size / LOWEST)


def draw_line(size: Callable[[int], float], name: str, colour: str, shape: str) -> list[str]:
    """The sizes at all ranks, each with its number, and the name along the line."""
    points = [(across(rank), upwards(size(rank))) for rank in RANKS]
    (x, y), (last_x, last_y) = points[0], points[-1]
    path = f"M{number(x)} {number(y)}L{number(last_x)} {number(last_y)}"
    angle = math.degrees(math.atan2(last_y - y, last_x - x))
    drawn = [tag("path", d=path, class_=f"{colour} series", stroke_width=3)]
    for rank, point in zip(RANKS, points, strict=True):
        drawn.append(mark(shape, *point, colour))
        # The line goes on to the upper right of all but the last, where the number would meet it.
        x_end, anchor = (point[0], "middle") if rank == RANKS[-1] else (point[0] + 6, "end")
        drawn.append(text(x_end, point[1] - 17, size_in_words(size(rank)), f"bold {anchor} quiet"))
    turn = f"translate({number(x)} {number(y)}) rotate({angle:.2f})"
    drawn.append(tag("g", text(14, 34, name, f"{colour}-mark"), transform=turn))
    return drawn


def draw_outgrown(rank: float, shape: tuple[int, ...]) -> list[str]:
    """The line at which a LoRA outgrows its matrices, with what is beyond it hatched."""
    x, end = across(rank), across(RANKS[-1]) + 48
    hatch = tag("path", d="M0 12L12 0", class_="flow", stroke_width=1, opacity=0.6)
    sides = TIMES.join(map(str, shape))
    return [
        tag("pattern", hatch, id="beyond", width=12, height=12, patternUnits="userSpaceOnUse"),
        tag("rect", x=x, y=CEILING, width=end - x, height=FLOOR - CEILING, fill="url(#beyond)"),
        tag(
            "path",
            d=f"M{number(x)} {CEILING}V{FLOOR}",
            class_="flow",
            stroke_width=2.5,
            id="outgrown",
        ),
        text(x - 14, FLOOR - 94, f"above rank {rank:.0f}", "bold end quiet"),
        text(x - 14, FLOOR - 68, "a LoRA is larger than", "end quiet"),
        text(x - 14, FLOOR - 42, f"the {sides} matrices", "end quiet"),
        text(x - 14, FLOOR - 16, "that it changes", "end quiet"),
    ]


def draw_axis(per_rank: int) -> list[str]:
    """The ranks, and the parameters below each."""
    drawn = [
        tag("path", d=f"M{FIRST - 40} {FLOOR}H{number(across(RANKS[-1]) + 48)}", class_="flow",
            stroke_width=2)
    ]  # fmt: skip
    for rank in RANKS:
        x, millions = across(rank), rank * per_rank / 1e6
        drawn.append(text(x, FLOOR + 28, str(rank), "bold middle quiet"))
        drawn.append(text(x, FLOOR + 54, NOTED.get(rank, ""), "middle quiet"))
        told = f"{millions:.1f} M" if millions < 10 else f"{millions:.0f} M"
        drawn.append(text(x, FLOOR + 94, told, "bold middle quiet"))
    drawn.append(text(12, FLOOR + 28, "rank", "quiet"))
    drawn.append(
        text(WIDTH / 2, FLOOR + 124, f"parameters: {per_rank:,}{TIMES}rank", "middle quiet")
    )
    return drawn


def rank_picture() -> str:
    """Rank against parameters, file size and the optimizer's memory."""
    layers = trained_layers()
    per_rank = sum(layer.parameters(1) for layer in layers)
    file = BYTES["fp16"] * per_rank
    memory = BYTES["float"] * (1 + matching(OPTIMIZER_STATE, "prodigy")) * per_rank
    first = min(layers, key=outgrown_rank)
    drawn = [
        text(EDGE, 38, "What a rank costs", "title quiet"),
        text(EDGE, 70, f"Content and style together: {len(layers)} layers.", "quiet"),
        text(EDGE, 96, "Both scales are logarithmic: twice the rank, twice the cost.", "quiet"),
        *draw_outgrown(outgrown_rank(first), first.shape),
        *draw_line(lambda rank: memory * rank, "memory: gradients and Prodigy's state, fp32",
                   "orange", "diamond"),
        *draw_line(lambda rank: file * rank, "file, fp16", "blue", "circle"),
        *draw_axis(per_rank),
    ]  # fmt: skip
    return picture(
        "Rank against parameters, file size and memory",
        describe_ranks(per_rank, file, memory, layers),
        FLOOR + 138,
        drawn,
    )


def describe_ranks(per_rank: int, file: float, memory: float, layers: list[Layer]) -> str:
    """The chart in words."""
    told = [
        f"Rank {rank}: {per_rank * rank / 1e6:.0f} million parameters, a file of "
        f"{size_in_words(file * rank)} in fp16, {size_in_words(memory * rank)} of gradients and "
        "Prodigy state."
        for rank in (RANKS[0], *NOTED)
    ]
    ranks = {layer.shape[::-1]: math.floor(outgrown_rank(layer)) for layer in layers}
    for shape, rank in sorted(ranks.items()):
        sides = TIMES.join(map(str, shape))
        told.append(
            f"Above rank {rank} a LoRA holds more numbers than the {sides} matrix it changes."
        )
    return " ".join(told)


# ---- Files ---------------------------------------------------------------------------------------

PICTURES = {"blora_blocks.svg": blocks_picture, "blora_rank.svg": rank_picture}


def main(argv: list[str]) -> int:
    """Write the pictures, or compare them with what would be drawn."""
    if argv not in ([], ["--check"]):
        print(__doc__, file=sys.stderr)
        return 2
    stale = []
    for name, draw in PICTURES.items():
        path, drawn = ROOT / "docs" / name, draw().encode()
        if not argv:
            path.write_bytes(drawn)
        elif not path.is_file() or path.read_bytes() != drawn:
            stale.append(f"docs/{name}")
    if stale:
        told = " and ".join(stale)
        print(f"not what would be drawn: {told}; python tools/draw_blora.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
