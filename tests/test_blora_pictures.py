"""The pictures in docs/ are what tools/draw_blora.py draws from SDXL's layers and the traits."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from kohya_folder import ROOT
from network_cases import STOPS
from PIL import ImageFont

from blora.sdxl import sdxl_layers

SVG = "{http://www.w3.org/2000/svg}"
PICTURES = ["blocks.svg", "rank.svg"]
NAMES = {
    # trait: what it is, its block as a slot of block weights, in kohya and in diffusers
    "CONTENT": ["the subject", "OUT00", "output_blocks.0.1", "up_blocks.0.attentions.0"],
    "STYLE": ["the look", "OUT01", "output_blocks.1.1", "up_blocks.0.attentions.1"],
    "LAYOUT": ["composition", "IN08", "input_blocks.8.1", "down_blocks.2.attentions.1"],
}
MARKS = {"CONTENT": ("blue", 0), "STYLE": ("orange", 4), "LAYOUT": ("green", 3)}
WAY_IN, WAY_OUT = [f"IN0{n}" for n in range(9)], [f"OUT0{n}" for n in range(9)]
SLOTS = ["BASE", *WAY_IN, "MID", *WAY_OUT]  # all that a list of block weights for SDXL can have


def draw(root: Path) -> None:
    subprocess.run([sys.executable, "tools/draw_blora.py"], cwd=root, check=True)


def parsed(name: str, root: Path = ROOT) -> ElementTree.Element:
    return ElementTree.fromstring((root / "docs" / name).read_bytes())


def labels(picture: ElementTree.Element) -> list[str]:
    """Every line of text, in drawing order."""
    return ["".join(text.itertext()) for text in picture.iter(f"{SVG}text")]


def after(label: str, picture: ElementTree.Element, count: int) -> list[str]:
    """The lines of text that follow the first one that begins with a label."""
    lines = labels(picture)
    start = next(i for i, text in enumerate(lines) if f"{text} ".startswith(f"{label} "))
    return lines[start + 1 : start + 1 + count]


def test_the_pictures_are_what_the_tool_draws(bundle):
    (bundle / "docs" / PICTURES[0]).write_bytes(b"an older picture\r\n" * 1000)
    draw(bundle)
    for name in PICTURES:
        drawn = (bundle / "docs" / name).read_bytes()
        hint = f"{name} is stale: run python tools/draw_blora.py"
        assert (ROOT / "docs" / name).read_bytes() == drawn, hint


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_small_named_described_and_self_contained(name):
    data = (ROOT / "docs" / name).read_bytes()
    assert len(data) < 20_000
    assert b"\r" not in data
    picture = parsed(name)
    assert picture.get("role") == "img"
    named = {child.get("id"): child.text for child in picture if child.get("id")}
    assert picture.get("aria-labelledby").split() == ["title", "desc"]
    assert named["title"]
    assert named["desc"]
    source = data.decode().replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(
        r"script|href|://|@import|url\((?!#)|<image|foreignObject|\son\w+=", source
    )
    assert "@media (prefers-color-scheme:dark)" in source


def test_every_class_has_a_rule_every_rule_a_use_and_every_colour_a_dark_one():
    pictures = [parsed(name) for name in PICTURES]
    used = {c for picture in pictures for e in picture.iter() for c in e.get("class", "").split()}
    for picture in pictures:
        light, dark = picture.find(f"{SVG}style").text.split("@media")
        assert set(re.findall(r"\.([a-z][\w-]*)\{", light)) == used
        coloured = [set(re.findall(r"([\w.-]+)\{[^{}]*#", style)) for style in (light, dark)]
        assert coloured[0] == coloured[1]


# ---- Every letter can be read -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shown", "least"),
    [("blocks.svg", 830, 16), ("blocks.svg", 360, 7), ("rank.svg", 360, 10)],
)
def test_text_is_large_enough_for_a_readme_and_for_a_phone(name, shown, least):
    picture = parsed(name)
    width = float(picture.get("viewBox").split()[2])
    assert min(size(text, picture) for text in picture.iter(f"{SVG}text")) * shown / width >= least


def test_the_blocks_are_wide_and_short():
    _, _, width, height = map(float, parsed("blocks.svg").get("viewBox").split())
    assert 720 <= width <= 860
    assert height <= 435


def size(text: ElementTree.Element, picture: ElementTree.Element) -> int:
    """Pixels of its font."""
    style = picture.find(f"{SVG}style").text
    own = [re.search(rf"\.{c}\{{[^}}]*font-size:(\d+)px", style) for c in classes(text)]
    return int(next(filter(None, own), re.search(r"font:(\d+)px", style))[1])


def classes(element: ElementTree.Element) -> list[str]:
    return element.get("class", "").split()


def extent(text: ElementTree.Element, picture: ElementTree.Element) -> tuple[float, ...]:
    """Left, top, right and bottom in DejaVu, the widest of the fonts that browsers may take."""
    style, width = classes(text), 0.0
    for part in (text, *text):
        bold = {"bold", "title"} & {*style, *classes(part)}
        mono, weight = "Mono" * ("mono" in style), "-Bold" * bool(bold)
        font = ImageFont.truetype(f"DejaVuSans{mono}{weight}.ttf", size(text, picture))
        words = part.text if part is text else part.text + (part.tail or "")
        width += font.getlength(words or "")
    x, y, high = float(text.get("x")), float(text.get("y")), size(text, picture)
    left = x - width * ("end" in style) - width / 2 * ("middle" in style)
    return left, y - 0.76 * high, left + width, y + 0.24 * high


def meet(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return all(one[i] < other[i + 2] and other[i] < one[i + 2] for i in (0, 1))


def within(inner: tuple[float, ...], outer: tuple[float, ...], margin: float) -> bool:
    return all(inner[i] >= outer[i] + margin and inner[i + 2] <= outer[i + 2] - margin
               for i in (0, 1))  # fmt: skip


@pytest.mark.parametrize("name", PICTURES)
def test_no_text_leaves_its_box_or_meets_another_in_the_widest_font(name):
    try:
        ImageFont.truetype("DejaVuSansMono-Bold.ttf", 15)
    except OSError:
        stop = pytest.fail if os.environ.get("CI") else pytest.skip
        stop("NOT RUN: this system has no DejaVuSansMono-Bold.ttf")
    picture = parsed(name)
    boxes = [tuple(map(float, picture.get("viewBox").split()))]
    for box in picture.iter(f"{SVG}rect"):
        x, y, width, height = (float(box.get(key)) for key in ("x", "y", "width", "height"))
        boxes.append((x, y, x + width, y + height))
    texts = [("".join(t.itertext()), extent(t, picture)) for t in picture.iter(f"{SVG}text")]
    for number, (words, place) in enumerate(texts):
        assert all(within(place, box, 3) for box in boxes if meet(place, box)), words
        assert not [other for other, taken in texts[:number] if meet(place, taken)], words


# ---- The blocks ----------------------------------------------------------------------------------


def at(label: str, picture: ElementTree.Element) -> tuple[float, float]:
    """Where the last text that is this one stands: a slot's box comes after the names."""
    found = [text for text in picture.iter(f"{SVG}text") if "".join(text.itertext()) == label]
    return float(found[-1].get("x")), float(found[-1].get("y"))


@pytest.mark.parametrize("trait", NAMES)
def test_content_style_and_layout_have_all_their_names(trait):
    picture = parsed("blocks.svg")
    words, slot, kohya, diffusers = NAMES[trait]
    assert f"{trait} {words}" in labels(picture)
    assert after(trait, picture, 5) == [slot, "kohya", kohya, "diffusers", diffusers]
    told = f"{trait.lower()} is {kohya} in kohya, {diffusers} in diffusers, slot {slot}"
    assert told in picture.find(f"{SVG}desc").text


def corners(shape: ElementTree.Element) -> int:
    """Of a triangle or a diamond; a circle has none."""
    return len(shape.get("points", "").split())


@pytest.mark.parametrize("trait", NAMES)
def test_content_style_and_layout_are_told_apart_by_colour_and_by_shape(trait):
    elements, words = [*parsed("blocks.svg")], NAMES[trait]
    texts = ["".join(e.itertext()) if e.tag == f"{SVG}text" else "" for e in elements]
    block = len(texts) - 1 - texts[::-1].index(words[1])
    names = texts.index(f"{trait} {words[0]}")
    for text in (block, names):
        box, shape = elements[text - 2 : text]
        assert (box.tag, MARKS[trait][0] in classes(box)) == (f"{SVG}rect", True)
        assert corners(shape) == MARKS[trait][1]


def test_every_slot_of_block_weights_is_there_and_the_way_out_comes_back_below_the_way_in():
    picture = parsed("blocks.svg")
    assert set(SLOTS) <= set(labels(picture))
    there, back = ([at(slot, picture) for slot in way] for way in (WAY_IN, WAY_OUT))
    assert there == sorted(there)
    assert back == sorted(back, reverse=True)
    # A block of the way out takes what the one above it gave.
    assert [x for x, _ in there] == [x for x, _ in reversed(back)]
    assert max(y for _, y in there) < at("MID", picture)[1] < min(y for _, y in back)
    assert at("MID", picture)[0] > there[-1][0]


def test_it_says_what_the_slots_are():
    shown = " ".join(labels(parsed("blocks.svg")))
    for words in ("LBW (block weights)", "BASE, IN.., MID, OUT..", "sd-webui-lora-block-weight"):
        assert words in shown


def test_fasts_gradients_stop_where_the_network_stops_them():
    block, spared = STOPS["blora_content_style"]
    other, fewer = STOPS["blora_content_layout_style"]
    page = (ROOT / "docs/speed.md").read_text(encoding="utf-8")
    [logged] = re.findall(r"^early stop: .* ends at (\S+) and spares (.*)$", page, re.MULTILINE)
    assert logged == (block, f"{spared} of the U-Net's 794 layers")
    picture = parsed("blocks.svg")
    assert f"fast sends no gradients here: {logged[1]} are spared" in labels(picture)
    described = picture.find(f"{SVG}desc").text
    assert f"from the output to {block} and no further: {logged[1]} are spared" in described
    assert f"come back to {other}, and {fewer} are spared" in described


def stop_line(picture: ElementTree.Element) -> tuple[float, float, float]:
    """x, top and bottom of the line at which the gradients end."""
    [path] = [path for path in picture.iter(f"{SVG}path") if path.get("id") == "stop"]
    return tuple(map(float, re.fullmatch(r"M(\S+) (\S+)V(\S+)", path.get("d")).groups()))


def test_the_line_parts_content_from_all_that_comes_before_it():
    picture = parsed("blocks.svg")
    x, top, bottom = stop_line(picture)
    assert at("OUT00", picture)[0] < x < at("MID", picture)[0]
    assert top < at("OUT00", picture)[1] < bottom
    pairs = zip([*picture], [*picture][1:], strict=False)
    grey = [text.text for box, text in pairs if "spared" in classes(box) and text.text]
    # layout, which other presets train, keeps its colour
    assert [slot for slot in grey if slot in SLOTS] == [*WAY_IN[:-1], "MID"]


def test_a_trait_is_drawn_where_the_traits_file_has_it(bundle):
    path = bundle / "blora_traits.json"
    traits = json.loads(path.read_text())
    traits["content"]["whitelist"] = ["lora_unet_output_blocks_2_1_"]
    path.write_text(json.dumps(traits))
    draw(bundle)
    picture = parsed("blocks.svg", bundle)
    assert after("CONTENT", picture, 3) == ["OUT02", "kohya", "output_blocks.2.1"]
    assert at("OUT01", picture)[0] < stop_line(picture)[0] < at("OUT00", picture)[0]
    names = list(leaves())
    before = next(i for i, name in enumerate(names) if name.startswith("output_blocks.1.1."))
    assert f"{before} of the U-Net's 794 layers" in " ".join(labels(picture))


def leaves() -> list[str]:
    """The 794 Linear and Conv2d layers of the U-Net, in the order of its forward pass."""
    layers = sdxl_layers()["unet"].items()
    return [name for name, layer in layers if layer.kind in ("Linear", "Conv2d")]


# ---- The ranks -----------------------------------------------------------------------------------


def trained_shapes() -> list[tuple[int, ...]]:
    """The matrices of content and style, found without the traits."""
    attention = re.compile(r"output_blocks\.[01]\.1\..*attn\d\.to_")
    return [layer.shape for name, layer in sdxl_layers()["unet"].items() if attention.match(name)]


def test_the_line_is_where_a_lora_outgrows_its_matrices():
    square, *_ = sorted(set(trained_shapes()), key=math.prod)
    rank = next(r for r in range(1, 2000) if r * sum(square) > math.prod(square)) - 1
    picture = parsed("rank.svg")
    assert f"above rank {rank}" in labels(picture)
    assert f"the {square[0]} \N{MULTIPLICATION SIGN} {square[1]} matrices" in labels(picture)
    at = {text.text: float(text.get("x")) for text in picture.iter(f"{SVG}text")}
    line = next(path for path in picture.iter(f"{SVG}path") if path.get("id") == "outgrown")
    x = float(re.match(r"M([\d.]+) ", line.get("d"))[1])
    share = (x - at["512"]) / (at["1024"] - at["512"])
    assert 512 * 2**share == pytest.approx(rank, rel=0.001)


def column(rank: int) -> list[str]:
    """What the picture shows of a rank, from the top."""
    texts = [*parsed("rank.svg").iter(f"{SVG}text")]
    [x] = [float(text.get("x")) for text in texts if text.text == str(rank)]
    found = [
        text for text in texts if abs(float(text.get("x")) - x) < 7 and "bold" in classes(text)
    ]
    return [text.text for text in sorted(found, key=lambda text: float(text.get("y")))]


@pytest.mark.parametrize("rank", [16, 32, 64, 128, 256, 512, 1024])
def test_the_numbers_are_those_of_the_layers(rank):
    parameters = rank * sum(map(sum, trained_shapes()))
    # weights, gradients, and Prodigy's four numbers for lora_down, three for lora_up
    memory = 4 * (1 + 1 + 3.5) * parameters
    assert column(rank) == [
        f"{memory / 1e9:.1f} GB" if memory >= 1e9 else f"{memory / 1e6:.0f} MB",
        f"{2 * parameters / 1e6:.0f} MB",
        str(rank),
        f"{parameters / 1e6:.1f} M" if rank == 16 else f"{parameters / 1e6:.0f} M",
    ]


def test_it_says_what_the_numbers_are():
    shown = labels(parsed("rank.svg"))
    memory = shown.index("memory beside the model, in fp32:")
    assert shown[memory + 1] == "weights, gradients and Prodigy's state"
    assert "file, in fp16" in shown
    per_rank = sum(map(sum, trained_shapes()))
    assert f"parameters: {per_rank:,} \N{MULTIPLICATION SIGN} rank" in shown


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ("docs/recipes.md", "would take {memory} at rank {rank} with Prodigy"),
        ("docs/when_something_fails.md",
         "Rank {rank} with Prodigy takes {memory} beside the model"),
        ("README.md", "Above {outgrown} a LoRA is larger than most of the matrices it changes"),
        ("README.md", "| `blora_content_style` | content and style: the B-LoRA method | {each} |"),
    ],
)  # fmt: skip
def test_the_pages_say_the_same_of_rank_1024(page, words):
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    shown = " ".join(labels(parsed("rank.svg")))
    outgrown, each = re.search(r"above rank (\d+) .* parameters: (\S+)", shown).groups()
    said = words.format(memory=column(1024)[0], rank=1024, outgrown=outgrown, each=each)
    assert said in text


def test_preflights_page_says_the_same_of_rank_64():
    text = (ROOT / "docs/preflight.md").read_text(encoding="utf-8")
    parts = re.search(r"([\d.]+) MB LoRA, ([\d.]+) MB gradients, ([\d.]+) MB prodigy", text)
    assert column(64)[0] == f"{sum(map(float, parts.groups())):.0f} MB"


def test_the_readme_says_the_same_of_the_files():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+)\b[^|]*\| ([^|]+) \|.* GB \|$", text, re.MULTILINE)
    assert len(rows) == 4
    for rank, file in rows:
        assert column(int(rank))[1] == file
