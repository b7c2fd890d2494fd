"""What blora_compare.py has sd-scripts' gen_img.py draw, on a full-size SDXL of random weights.

With BLORA_E2E=1: two loads of the model on a CPU, five minutes and 16 GB of memory. The pictures
are compared with those that gen_img.py draws by itself, of the model and of the slicer's files with
sd-scripts' own network.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from lora_files import CONTENT, STYLE, TE2, lora_module, write
from real_drawing import SIZE, Kohya, make_kohya, pixels

pytestmark = pytest.mark.slow

PROMPT = r"A \[v\] on a beach --l 7"
TRAITS = "content", "style", "text"
COMPARED = "--loras", "my.safetensors", "--prompts", "p.txt", "--traits", *TRAITS
ALL = "content_and_style_and_text"  # the joined file, as its picture is called


def make_lora(path: Path) -> Path:
    """A LoRA of every attention module of both blocks, and of both text encoders' first layers."""
    tensors: dict[str, torch.Tensor] = {}
    for template in (CONTENT, STYLE):
        for block in range(10):
            for attention in (1, 2):
                for projection in ("q", "k", "v", "out_0"):
                    tensors |= lora_module(template.format(block, attention, projection))
    for projection in ("q", "k", "v", "out"):
        for encoder in (TE2, TE2.replace("te2", "te1")):
            tensors |= lora_module(encoder.format(0, projection))
    # Random text encoders make large changes of small ones: at 25 times this strength a
    # multiplier of 1.0000005 is to be seen in a picture.
    weak = {"lora_unet": 8, "lora_te1_": 200, "lora_te2_": 200}
    down = {k: t / weak[k[:9]] for k, t in tensors.items() if k.endswith("down.weight")}
    return write(path, tensors | down, {"ss_steps": "750", "ss_output_name": "my"})


@pytest.fixture(scope="module")
def kohya(tmp_path_factory) -> Kohya:
    made = make_kohya(tmp_path_factory, "compare")
    make_lora(made.path / "my.safetensors")
    (made.path / "p.txt").write_text(f"{PROMPT}\n")
    made.draw("blora_compare.py", *COMPARED)
    cut = ["blora_slicer.py", "--loras", "my.safetensors", "--traits", *TRAITS]
    made.run(*cut, "--not_combined", "--output_path", "cut.safetensors")
    made.run(*cut, "--output_path", "joined.safetensors")
    looks = {"without": "0,0,0,0", "content": "1,0,0,0", "style": "0,1,0,0", "text": "0,0,1,0"}
    looks[ALL] = "0,0,0,1"
    options = f"--w {SIZE} --h {SIZE} --s 1 --d 1"
    lines = [f"{PROMPT} {options} --am {am} --f {look}.png" for look, am in looks.items()]
    slices = [*(f"cut_{trait}.safetensors" for trait in TRAITS), "joined.safetensors"]
    network = ["--network_module", *["networks.lora"] * 4, "--network_weights", *slices]
    made.gen_img("\n".join(lines), "own", *network)
    return made


def pictures(kohya: Kohya, look: str) -> tuple[np.ndarray, np.ndarray]:
    """A look as blora_compare.py draws it, and as gen_img.py does by itself."""
    name = look if look == "without" else f"my_{look}"
    [drawn] = (kohya.path / "compare").glob(f"{name}_prompt1_seed1_*.png")
    return pixels(drawn), pixels(kohya.path / f"own/{look}.png")


def test_without_a_lora_it_is_the_picture_of_the_bare_model_to_the_bit(kohya):
    ours, own = pictures(kohya, "without")
    assert ours.shape == (SIZE, SIZE, 3)
    assert np.array_equal(ours, own)


@pytest.mark.parametrize("look", [*TRAITS, ALL])
def test_a_slice_is_the_picture_of_its_file_but_for_the_rounding(kohya, look):
    """gen_img.py adds a network's output to the layer's; ours is in the weight, as ComfyUI's."""
    (ours, own), (bare, _) = pictures(kohya, look), pictures(kohya, "without")
    assert np.abs(ours - own).max() <= 1  # of 255
    assert (ours != own).mean() < 0.001
    assert (ours != bare).mean() > 0.1


def test_what_is_there_is_not_drawn_again(kohya):
    before = {path: path.stat().st_mtime_ns for path in (kohya.path / "compare").glob("*.png")}
    shutil.move(kohya.path / "compare.html", kohya.path / "before.html")
    out = kohya.draw("blora_compare.py", *COMPARED)
    assert out == "-> compare.html: 5 pictures of 1 save\n"
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (kohya.path / "compare.html").read_bytes() == (kohya.path / "before.html").read_bytes()
