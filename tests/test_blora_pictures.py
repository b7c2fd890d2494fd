"""The pictures in docs/ are what tools/draw_blora.py draws from SDXL's layers and the traits."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from kohya_folder import ROOT

from blora_sdxl import sdxl_layers

SVG = "{http://www.w3.org/2000/svg}"
PICTURES = ["blora_blocks.svg", "blora_rank.svg"]
NAMES = {
    # trait: the block's name in kohya, in diffusers and as a block-weight slot, and its depth
    "CONTENT": ["output_blocks.0.1", "up_blocks.0.attentions.0", "OUT00", "10 transformer blocks"],
    "STYLE": ["output_blocks.1.1", "up_blocks.0.attentions.1", "OUT01", "10 transformer blocks"],
    "LAYOUT": ["input_blocks.8.1", "down_blocks.2.attentions.1", "IN08", "10 transformer blocks"],
}
OTHERS = {
    "input_blocks.4.1": ["down_blocks.1.attentions.0", "IN04", "2 transformer blocks"],
    "input_blocks.5.1": ["down_blocks.1.attentions.1", "IN05", "2 transformer blocks"],
    "input_blocks.7.1": ["down_blocks.2.attentions.0", "IN07", "10 transformer blocks"],
    "middle_block.1": ["mid_block.attentions.0", "MID", "10 transformer blocks"],
    "output_blocks.2.1": ["up_blocks.0.attentions.2", "OUT02", "10 transformer blocks"],
    "output_blocks.3.1": ["up_blocks.1.attentions.0", "OUT03", "2 transformer blocks"],
    "output_blocks.4.1": ["up_blocks.1.attentions.1", "OUT04", "2 transformer blocks"],
    "output_blocks.5.1": ["up_blocks.1.attentions.2", "OUT05", "2 transformer blocks"],
    "te1, te2": ["text_encoder, text_encoder_2", "BASE", "text, 12 and 32 layers"],
}
WITHOUT_ATTENTION = {
    "input_blocks.0": "latent in",
    "input_blocks.1": "no attention",
    "input_blocks.2": "no attention",
    "input_blocks.3": "downsample",
    "input_blocks.6": "downsample",
    "output_blocks.6": "no attention",
    "output_blocks.7": "no attention",
    "output_blocks.8": "no attention",
}


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


def classes(element: ElementTree.Element) -> list[str]:
    return element.get("class", "").split()


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


@pytest.mark.parametrize("name", PICTURES)
def test_text_is_large_enough_for_a_phone(name):
    width = float(parsed(name).get("viewBox").split()[2])
    sizes = re.findall(r"(\d+)px", (ROOT / "docs" / name).read_text(encoding="utf-8"))
    assert min(map(int, sizes)) * 360 / width >= 10


@pytest.mark.parametrize("trait", NAMES)
def test_content_style_and_layout_have_all_their_names(trait):
    picture = parsed("blora_blocks.svg")
    assert after(trait, picture, 4) == NAMES[trait]
    description = picture.find(f"{SVG}desc").text
    assert all(name in description for name in NAMES[trait])


@pytest.mark.parametrize("block", OTHERS)
def test_so_has_every_other_block(block):
    assert after(block, parsed("blora_blocks.svg"), 3) == OTHERS[block]


@pytest.mark.parametrize("block", WITHOUT_ATTENTION)
def test_a_block_without_attention_has_its_name_and_what_it_does(block):
    assert after(block, parsed("blora_blocks.svg"), 1) == [WITHOUT_ATTENTION[block]]


def test_a_trait_is_drawn_where_the_traits_file_has_it(bundle):
    path = bundle / "blora_traits.json"
    traits = json.loads(path.read_text())
    traits["style"]["whitelist"] = ["lora_unet_output_blocks_2_1_"]
    path.write_text(json.dumps(traits))
    draw(bundle)
    assert after("STYLE", parsed("blora_blocks.svg", bundle), 1) == ["output_blocks.2.1"]


def trained_shapes() -> list[tuple[int, ...]]:
    """The matrices of content and style, found without the traits."""
    attention = re.compile(r"output_blocks\.[01]\.1\..*attn\d\.to_")
    return [layer.shape for name, layer in sdxl_layers()["unet"].items() if attention.match(name)]


def test_the_line_is_where_a_lora_outgrows_its_matrices():
    square, *_ = sorted(set(trained_shapes()), key=math.prod)
    rank = next(r for r in range(1, 2000) if r * sum(square) > math.prod(square)) - 1
    picture = parsed("blora_rank.svg")
    assert f"above rank {rank}" in labels(picture)
    assert f"the {square[0]} \N{MULTIPLICATION SIGN} {square[1]} matrices" in labels(picture)
    at = {text.text: float(text.get("x")) for text in picture.iter(f"{SVG}text")}
    line = next(path for path in picture.iter(f"{SVG}path") if path.get("id") == "outgrown")
    x = float(re.match(r"M([\d.]+) ", line.get("d"))[1])
    share = (x - at["512"]) / (at["1024"] - at["512"])
    assert 512 * 2**share == pytest.approx(rank, rel=0.001)


def column(rank: int) -> list[str]:
    """What the picture shows of a rank, from the top."""
    texts = [*parsed("blora_rank.svg").iter(f"{SVG}text")]
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
    shown = labels(parsed("blora_rank.svg"))
    memory = shown.index("memory beside the model, in fp32:")
    assert shown[memory + 1] == "weights, gradients and Prodigy's state"
    assert "file, in fp16" in shown
    per_rank = sum(map(sum, trained_shapes()))
    assert f"parameters: {per_rank:,} \N{MULTIPLICATION SIGN} rank" in shown


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ("docs/blora_recipes.md", "would take {memory} at rank {rank} with Prodigy"),
        ("docs/blora_when_something_fails.md",
         "Rank {rank} with Prodigy takes {memory} beside the model"),
        ("README.md", "Above {outgrown} a LoRA is larger than the matrices it changes"),
        ("README.md", "| `blora_content_style` | content and style: the B-LoRA method | {each} |"),
    ],
)  # fmt: skip
def test_the_pages_say_the_same_of_rank_1024(page, words):
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    shown = " ".join(labels(parsed("blora_rank.svg")))
    outgrown, each = re.search(r"above rank (\d+) .* parameters: (\S+)", shown).groups()
    said = words.format(memory=column(1024)[0], rank=1024, outgrown=outgrown, each=each)
    assert said in text


def test_the_readme_says_the_same_of_rank_64():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    parts = re.search(r"([\d.]+) MB LoRA, ([\d.]+) MB gradients, ([\d.]+) MB prodigy", text)
    [file] = re.findall(r"at rank 64, the paper's, \d+ or (\d+ MB)", text)
    assert column(64)[:2] == [f"{sum(map(float, parts.groups())):.0f} MB", file]
