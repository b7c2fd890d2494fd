"""The pictures in docs/ are what their script draws, from the data that the tools use."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from kohya_folder import ROOT

from blora_preflight import unet_layers

SVG = "{http://www.w3.org/2000/svg}"
PICTURES = ["blora_blocks.svg", "blora_rank.svg"]
NAMES = {
    # trait: what kohya, diffusers and a block-weight vector call the block, and how deep it is
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


def draw(root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/draw_blora.py", *options]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


def parsed(name: str, root: Path = ROOT) -> ElementTree.Element:
    return ElementTree.fromstring((root / "docs" / name).read_bytes())


def labels(picture: ElementTree.Element) -> list[str]:
    """Every line of text, in the order it is drawn."""
    return ["".join(text.itertext()) for text in picture.iter(f"{SVG}text")]


def after(label: str, picture: ElementTree.Element, count: int) -> list[str]:
    """The lines of text that follow the one that begins with a label."""
    found = labels(picture)
    start = next(i for i, text in enumerate(found) if f"{text} ".startswith(f"{label} "))
    return found[start + 1 : start + 1 + count]


@pytest.fixture
def bundle(tmp_path) -> Path:
    """A copy of all that the script reads and writes."""
    for path in [*ROOT.glob("blora_*.py"), ROOT / "blora_traits.json"]:
        shutil.copy(path, tmp_path)
    for path in ["tools/draw_blora.py", *(f"docs/{name}" for name in PICTURES)]:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    return tmp_path


def test_the_files_are_what_the_script_draws():
    done = draw(ROOT, "--check")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("name", PICTURES)
def test_a_file_that_differs_or_is_gone_is_named_and_drawn_anew(name, bundle):
    path = bundle / "docs" / name
    as_it_was = path.read_bytes()
    for spoil in (lambda: path.write_bytes(as_it_was.replace(b"\n", b"\r\n")), path.unlink):
        spoil()
        done = draw(bundle, "--check")
        expected = f"not what would be drawn: docs/{name}; python tools/draw_blora.py\n"
        assert (done.returncode, done.stderr) == (1, expected)
    assert draw(bundle).returncode == 0
    assert path.read_bytes() == as_it_was
    assert draw(bundle, "--check").returncode == 0


def test_another_option_is_refused(bundle):
    assert draw(bundle, "--chekc").returncode == 2


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_small_named_described_and_on_its_own(name):
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


def test_a_trait_is_drawn_where_the_traits_file_has_it(bundle):
    path = bundle / "blora_traits.json"
    traits = json.loads(path.read_text())
    traits["mine"] = {"whitelist": ["lora_unet_output_blocks_3_1_"]}
    traits["style"]["whitelist"] = ["lora_unet_output_blocks_2_1_"]
    path.write_text(json.dumps(traits))
    assert draw(bundle, "--check").returncode == 1
    assert draw(bundle).returncode == 0
    picture = parsed("blora_blocks.svg", bundle)
    assert after("STYLE", picture, 1) == ["output_blocks.2.1"]
    assert after("MINE", picture, 1) == ["output_blocks.3.1"]


def trained_shapes() -> list[tuple[int, ...]]:
    """The matrices of content and style, found without the traits."""
    attention = re.compile(r"output_blocks\.[01]\.1\..*attn\d\.to_")
    return [layer.shape for name, layer in unet_layers().items() if attention.match(name)]


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


def test_the_numbers_are_those_of_the_layers():
    per_rank = sum(map(sum, trained_shapes()))
    shown = labels(parsed("blora_rank.svg"))
    assert f"parameters: {per_rank:,} \N{MULTIPLICATION SIGN} rank" in shown
    for rank in (16, 32, 64, 128, 256, 512, 1024):
        parameters = rank * per_rank
        millions = f"{parameters / 1e6:.1f} M" if rank == 16 else f"{parameters / 1e6:.0f} M"
        assert {str(rank), millions, f"{2 * parameters / 1e6:.0f} MB"} <= set(shown)
        memory = 4 * (1 + 4) * parameters  # a gradient and four states of Prodigy
        assert {f"{memory / 1e6:.0f} MB", f"{memory / 1e9:.1f} GB"} & set(shown)
