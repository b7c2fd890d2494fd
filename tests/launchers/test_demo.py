"""The main job, end to end: tests/demo.sh with the real launcher, accelerate, LyCORIS, Prodigy."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from kohya_folder import BASH, ROOT
from lora_files import change
from preset_modules import CONTENT, STYLE, block_modules
from safetensors import safe_open
from safetensors.torch import load_file

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Demo:
    """What the demo printed, and the files it left."""

    printed: str
    folder: Path

    @property
    def trained(self) -> Path:
        return self.folder / "demo_1.safetensors"

    def slice(self, trait: str) -> Path:
        return self.folder / f"demo_{trait}.safetensors"


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Demo:
    kohya = tmp_path_factory.mktemp("demo") / "kohya & co (1)!"
    done = subprocess.run(
        [BASH, "tests/demo.sh", kohya],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return Demo(done.stdout, kohya / "_out/lora/sdxl/demo_1")


def modules(path: Path) -> set[str]:
    return {key.split(".")[0] for key in load_file(path)}


def test_every_module_of_content_and_style_has_moved(demo):
    trained = block_modules(CONTENT) | block_modules(STYLE)
    assert modules(demo.trained) == trained
    assert all(change(demo.trained, module).norm() > 0 for module in trained)


@pytest.mark.parametrize(("trait", "block"), [("content", CONTENT), ("style", STYLE)])
def test_a_slice_holds_its_block_with_the_change_that_was_trained(demo, trait, block):
    assert modules(demo.slice(trait)) == block_modules(block)
    trained, kept = load_file(demo.trained), load_file(demo.slice(trait))
    assert all(torch.equal(kept[key], trained[key]) for key in kept)
    for module in block_modules(block):
        assert torch.equal(change(demo.slice(trait), module), change(demo.trained, module))


def test_the_settings_and_overrides_reached_the_training(demo):
    with safe_open(demo.trained, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_output_name"] == "demo_1"
    assert metadata["ss_network_module"] == "lycoris.kohya"
    assert metadata["ss_network_dim"] == "4"
    assert float(metadata["ss_network_alpha"]) == 4
    assert metadata["ss_steps"] == metadata["ss_max_train_steps"] == "10"
    assert metadata["ss_optimizer"].lower().startswith("prodigyopt.prodigy.prodigy")
    network_args = json.loads(metadata["ss_network_args"])
    assert network_args["preset"] == "lycoris_presets/blora_content_style.toml"


def test_it_shows_the_command_the_progress_and_what_each_file_holds(demo):
    assert f'cp -r *blora* lycoris_presets "{demo.folder.parents[3]}/"' in demo.printed
    assert re.search(r"100%\|.*10/10", demo.printed)
    assert re.search(r"content of demo_1\.safetensors at 1: 80 modules, 240 tensors", demo.printed)
    row = r"^(output_blocks\S+) +(\w+, \w+) +80 +LoRA +4 +4 +F32"
    shown = re.findall(row, demo.printed, re.MULTILINE)
    content = ("output_blocks.0.1", "content, content_block")
    style = ("output_blocks.1.1", "style, style_block")
    assert shown == [content, style, content, style]


def test_a_folder_that_exists_is_not_touched(tmp_path):
    done = subprocess.run(
        [BASH, "tests/demo.sh", tmp_path], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == f'"{tmp_path}" exists already: name a folder that is not there yet.\n'
    assert list(tmp_path.iterdir()) == []
