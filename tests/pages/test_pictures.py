"""The map of blocks, which is kept by hand, and the chart of ranks, which plot_ranks.py draws.

What they and the pages say is computed here from SDXL's layers and the traits.
"""

from __future__ import annotations

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import plot_ranks
import pytest
from kohya_folder import ROOT
from network_cases import STOPS
from rehearsed_networks import prodigy_state
from sdxl_checkpoint import sdxl_shapes

from blora.preflight import plan
from blora.sdxl import load_traits, sdxl_layers

SVG = "{http://www.w3.org/2000/svg}"
UNET = sdxl_layers()["unet"]
LEAVES = [layer for layer in UNET.values() if layer.shape[1:]]  # no norms
TRAITS = load_traits(ROOT / "blora_traits.json")
WAY_IN, WAY_OUT = [f"IN0{n}" for n in range(9)], [f"OUT0{n}" for n in range(9)]
# The matrices of content and style, found without the traits, and what a LoRA of rank 1 takes.
ATTENTION = re.compile(r"output_blocks\.[01]\.1\..*attn\d\.to_")
SHAPES = [layer.shape for name, layer in UNET.items() if ATTENTION.match(name)]
PER_RANK = sum(map(sum, SHAPES))
FILES = {rank: f"{2 * PER_RANK * rank / 1e6:.0f} MB" for rank in (16, 32, 64, 128, 256, 512, 1024)}
# fp32: weights, gradients, and Prodigy's four numbers for lora_down, three for lora_up.
BYTES = {rank: 4 * (1 + 1 + prodigy_state()) * PER_RANK * rank for rank in FILES}
MEMORY = {k: f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.0f} MB" for k, n in BYTES.items()}
ROWS, COLUMNS = min(SHAPES, key=math.prod)
STOP, BEFORE = STOPS["blora_content_style"]
OTHER, FEWER = STOPS["blora_content_layout_style"]
# AdamW8bit, which needs a card to be counted, keeps two numbers of a byte each.
ADAM_64 = (4 + 4 + 2) * PER_RANK * 64
# What the pictures and the pages say. A slice is in fp16. A state has both blocks in fp32, and what
# Prodigy keeps of them.
FACTS = {
    "checkpoint": sum(2 * math.prod(shape) for shape in sdxl_shapes().values()) / 1e9,
    "slice_64": PER_RANK * 64 / 1e6, "slice_1024": PER_RANK * 1024 / 1e6,
    "state_64": 4 * (1 + prodigy_state()) * PER_RANK * 64 / 1e9,
    "adam_64": ADAM_64 / 1e9, "card_64": (ADAM_64 + 2 * plan.UNET + plan.FROM_BLOCK[STOP][0]) / 1e9,
    "stop": STOP, "spared": f"{BEFORE} of the U-Net's {len(LEAVES)}",
    "other": OTHER, "fewer": FEWER,
    "layers": len(SHAPES), "per_rank": PER_RANK, "memory": MEMORY,
    "square": f"{COLUMNS} x {ROWS}",
    # The last rank at which a LoRA holds no more numbers than that matrix.
    "outgrown": max(r for r in range(2000) if r * (ROWS + COLUMNS) <= ROWS * COLUMNS),
}  # fmt: skip


def parsed(name: str) -> ElementTree.Element:
    return ElementTree.fromstring((ROOT / "docs" / name).read_bytes())


def texts(name: str) -> list[str]:
    """The text elements in drawing order."""
    return ["".join(text.itertext()) for text in parsed(name).iter(f"{SVG}text")]


def one_line(page: str) -> str:
    return " ".join((ROOT / page).read_text(encoding="utf-8").split())


@pytest.mark.parametrize(
    ("name", "shown", "least"), [("blocks.svg", 830, 16), ("rank.svg", 540, 15)]
)
def test_a_picture_is_readable_described_self_contained_and_has_a_dark_scheme(name, shown, least):
    picture, source = parsed(name), one_line(f"docs/{name}")
    width = float(picture.get("viewBox").split()[2])
    assert min(map(int, re.findall(r"(\d+)px", source))) * shown / width >= least
    assert (picture.get("role"), picture.get("aria-labelledby")) == ("img", "title desc")
    for label in ("title", "desc"):
        assert picture.find(f"{SVG}{label}[@id='{label}']").text.strip()
    assert "@media (prefers-color-scheme: dark)" in source
    source = re.sub(r' xmlns(:xlink)?="http://www.w3.org/[\w/]+"', "", source)
    outside = r'script|href="(?!#)|://|@import|url\((?!#)|<image|foreignObject|\son\w+='
    assert not re.search(outside, source)


def slot_and_diffusers(block: str) -> tuple[str, str]:
    """A block in a list of block weights: IN08, MID, OUT00; and diffusers' name of it."""
    way, number, *_ = block.split(".")
    slot = "MID" if way == "middle_block" else f"{way.removesuffix('put_blocks').upper()}0{number}"
    return slot, UNET[f"{block}.proj_in"].diffusers.removesuffix(".proj_in")


MEANINGS = {"content": "the subject", "style": "the look", "layout": "composition"}


@pytest.mark.parametrize("trait", MEANINGS)
def test_the_map_has_all_names_of_a_trait(trait):
    [block] = {layer.block for layer in LEAVES if TRAITS[trait].keeps(layer.module)}
    slot, diffusers = slot_and_diffusers(block)
    shown = f"{trait.upper()} {MEANINGS[trait]}|{slot}|kohya|{block}|diffusers|{diffusers}"
    assert shown in "|".join(texts("blocks.svg"))
    described = f"{trait} is {block} in kohya, {diffusers} in diffusers, slot {slot}"
    assert described in one_line("docs/blocks.svg")


def test_the_table_of_blocks_is_that_of_the_model():
    rows = {}
    for name, layer in UNET.items():
        if found := re.match(r"(.+)\.transformer_blocks\.\d+\.attn[12]\.to_", name):
            modules, parameters = rows.get(found[1], (0, 0))
            rows[found[1]] = modules + 1, parameters + sum(layer.shape)
    page = (ROOT / "docs/own_blocks.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| `([a-z]+_\w+\.\S+)` \| (.+) \|$", page, re.MULTILINE))
    assert list(told) == list(rows)
    for block, (modules, parameters) in rows.items():
        slot, diffusers = slot_and_diffusers(block)
        names = f"`lora_unet_{block.replace('.', '_')}_` | `{diffusers}` | {slot}"
        assert told[block] == f"{names} | {modules} | {parameters:,}"


def test_the_map_has_every_slot_of_block_weights_and_greys_those_before_content():
    assert {"BASE", *WAY_IN, "MID", *WAY_OUT} <= {*texts("blocks.svg")}
    boxes = pairwise(parsed("blocks.svg"))
    grey = [text.text for box, text in boxes if box.get("class") == "spared" and text.text]
    # The ground's own text comes first. Layout, which other presets train, keeps its colour.
    assert grey[1:] == [*WAY_IN[:-1], "MID"]


def test_the_chart_is_what_the_tool_draws():
    hint = "stale, or not of the pinned matplotlib: run python tools/plot_ranks.py"
    assert (ROOT / "docs/rank.svg").read_bytes() == plot_ranks.svg().encode(), hint


def test_the_charts_numbers_are_those_of_the_layers():
    shown = "|".join(texts("rank.svg"))
    assert "|".join([*MEMORY.values(), *FILES.values()]) in shown
    for rank in FILES:
        assert re.search(rf"\|{rank}\|\w*\|{PER_RANK * rank / 1e6:.3g} M\|", f"|{shown}")
        described = f"rank {rank}: file {FILES[rank]}, memory {MEMORY[rank]};"
        assert described in one_line("docs/rank.svg")


@pytest.mark.parametrize(
    ("page", "sentence"),
    [
        ("docs/blocks.svg", "fast sends no gradients here: {spared} layers are spared"),
        ("docs/blocks.svg", "from the output to {stop} and no further: {spared} layers are spared"),
        ("docs/blocks.svg", "layout is trained too, they come back to {other}, and {fewer} are"),
        ("docs/speed.md", "ends at {stop} and spares {spared} layers"),
        ("README.md", "which spares {spared} layers"),
        ("docs/rank.svg", "rank, and parameters: {per_rank:,} x rank"),
        ("docs/rank.svg", "Content and style: {layers} layers."),
        ("docs/rank.svg", "above rank {outgrown} a LoRA is larger than the {square} matrices"),
        ("docs/speed.md", "Above rank {outgrown} a LoRA is larger than most of the matrices"),
        ("docs/speed.md", "Prodigy's state: {memory[1024]} at rank 1024."),
        ("docs/own_blocks.md", "| content and style: the B-LoRA method | {per_rank:,} |"),
        (
            "README.md",
            "-> my_content.safetensors: 80 modules, 240 tensors, rank 64, {slice_64:.1f} MB",
        ),
        ("docs/recipes.md", "take {adam_64:.2f} GB at rank 64 with AdamW8bit"),
        ("docs/recipes.md", "takes {card_64:.2f} GB of the card's"),
        ("docs/recipes.md", "{memory[1024]} at rank 1024 with Prodigy"),
        ("docs/when_something_fails.md", "takes {memory[1024]}"),
        ("docs/rented_machine.md", "The file is {checkpoint:.2f} GB"),
        ("docs/rented_machine.md", "rank 64 each slice is {slice_64:.0f} MB"),
        ("docs/rented_machine.md", "rank 1024, {slice_1024:.0f} MB"),
        ("docs/rented_machine.md", "takes {state_64:.2f} GB of disk every 1,000 steps"),
    ],
)
def test_the_pictures_and_the_pages_say_the_same(page, sentence):
    assert sentence.format(**FACTS) in one_line(page)


def test_preflights_page_says_the_same_of_rank_64():
    parts = r"([\d.]+) MB LoRA, ([\d.]+) MB its gradients, ([\d.]+) MB the opt"
    numbers = re.search(parts, one_line("docs/preflight.md")).groups()
    assert f"{sum(map(float, numbers)):.0f} MB" == MEMORY[64]
