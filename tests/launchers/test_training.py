"""The launchers train, with real accelerate, LyCORIS and Prodigy, on the stand-in's toy SDXL.

A training with LyCORIS' network and one with blora_network give the same file, but for what a
second training of any kind changes: the times and the number of the session. Where a launcher is
not run, the trainer gets what it would hand on.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from kohya_folder import ONE_PROCESS, TWO_PROCESSES, make_standin, with_text_encoders
from lora_files import change
from safetensors import safe_open
from safetensors.torch import load_file
from toy_trainer import train as train_toy

import blora_slicer
from blora.launch import chosen_options, chosen_settings, read_launcher

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="the .sh launchers are for Linux"),
]

CLASSIC, FAST = "sdxl_blora_classic.sh", "sdxl_blora_fast.sh"
PRESET = "preset=lycoris_presets/blora_content_style.toml"
DORA = [
    "preset=lycoris_presets/bdora_content_style_clip.toml",
    "dora_wd=True",
    "wd_on_output=False",
]
NETWORKS = ("lycoris.kohya", "blora_network")
STEPS = 3
VOLATILE = ("ss_training_started_at", "ss_training_finished_at", "ss_session_id", "modelspec.date")


@dataclass(frozen=True)
class Trained:
    """What a training printed, and the LoRA that it saved."""

    printed: str
    file: Path

    @property
    def metadata(self) -> dict[str, str]:
        with safe_open(self.file, "pt") as file:
            return {k: v for k, v in file.metadata().items() if k not in VOLATILE}


@pytest.fixture(scope="module")
def kohya(tmp_path_factory) -> Path:
    return make_standin(tmp_path_factory.mktemp("kohya") / "kohya", name="toy")


SETTINGS = {"BLORA_NAME": "toy", "BLORA_RANK": "2", "BLORA_CHECKPOINT": "toy.safetensors"}
SHORT = ["--mixed_precision=no", f"--max_train_steps={STEPS}", "--lr_warmup_steps=0"]


def moved(kohya: Path, printed: str) -> Trained:
    """The file is moved away, so that the next can have its name."""
    file = kohya / f"trained {len(list(kohya.glob('trained *')))}.safetensors"
    shutil.move(kohya / "_out/lora/sdxl/toy_1/toy_1.safetensors", file)
    return Trained(printed, file)


def train(kohya: Path, launcher: str, *options: str, **settings: str) -> Trained:
    """Three steps at rank 2, as the launcher has the trainer do them."""
    text, environ = read_launcher(kohya / launcher), SETTINGS | settings
    argv = chosen_options(text, environ | chosen_settings(text, environ), [*SHORT, *options])
    return moved(kohya, train_toy(kohya / "sdxl_train_network.py", argv, kohya, environ))


def launch(kohya: Path, launcher: str, *options: str, **settings: str) -> Trained:
    """The same by running the launcher, which starts pre-flight and accelerate."""
    done = subprocess.run(
        [f"./{launcher}", *SHORT, *options],
        cwd=kohya,
        env=os.environ | {"BLORA_ACCELERATE_ARGS": ONE_PROCESS} | SETTINGS | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return moved(kohya, done.stdout)


def assert_same_file(ours: Trained, theirs: Trained) -> None:
    """The same tensors bit for bit, under the same metadata."""
    found, expected = load_file(ours.file), load_file(theirs.file)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert ours.metadata == theirs.metadata
    assert ours.metadata["ss_network_module"] == "lycoris.kohya"


# ---- One process ---------------------------------------------------------------------------------

STOPS = "early stop: the backward pass ends at output_blocks.0.1 and spares 387 of the U-Net's 794"
WAYS = {
    # how it is trained: network arguments, settings, and what the log says
    "fast": ([PRESET], {}, STOPS),
    "all kept": ([PRESET], {"BLORA_SAVE_MEMORY": "0"}, STOPS),
    "bypass": ([PRESET, "bypass_mode=True"], {}, STOPS),
    "DoRA": (DORA, {}, STOPS),
    "text encoders": ([PRESET], {}, "no early stop: text encoders are trained"),
}


@pytest.mark.parametrize("way", WAYS)
def test_blora_network_trains_the_file_that_lycoris_trains(kohya, way):
    args, settings, said = WAYS[way]
    launcher = with_text_encoders(kohya / FAST).name if way == "text encoders" else FAST
    theirs, ours = (
        train(kohya, launcher, f"--network_module={module}", "--network_args", *args, **settings)
        for module in NETWORKS
    )
    assert_same_file(ours, theirs)
    assert said in ours.printed
    assert "early stop" not in theirs.printed


@pytest.fixture(scope="module")
def fast(kohya) -> Trained:
    """The launcher as it is."""
    return launch(kohya, FAST)


def test_fast_as_it_is_has_blora_network_and_bypass_mode(fast):
    assert STOPS in fast.printed
    assert "Bypass mode is enabled" in fast.printed


def test_classic_trains_the_same_file_with_blora_network(kohya):
    theirs, ours = (train(kohya, CLASSIC, *o) for o in ([], ["--network_module=blora_network"]))
    assert_same_file(ours, theirs)
    assert STOPS in ours.printed


@pytest.mark.parametrize("more", [[], ["--dim_from_weights"]])
def test_a_training_goes_on_from_a_file_as_with_lycoris(kohya, fast, more):
    theirs, ours = (
        train(
            kohya,
            FAST,
            f"--network_module={module}",
            f"--network_weights={fast.file}",
            *["--network_args", PRESET],
            *more,
        )
        for module in NETWORKS
    )
    assert_same_file(ours, theirs)
    assert STOPS in ours.printed
    before, after = load_file(fast.file), load_file(ours.file)
    assert all(not torch.equal(before[n], after[n]) for n in before if n.endswith("up.weight"))


def test_a_slice_of_what_blora_network_trained_names_lycoris(kohya, tmp_path):
    wide = train(kohya, FAST, TOY_REAL_ATTENTION="1")
    output = tmp_path / "content.safetensors"
    argv = ["--loras", str(wide.file), "--output_path", str(output)]
    assert blora_slicer.main(argv) == 0
    assert Trained("", output).metadata["ss_network_module"] == "lycoris.kohya"


def test_the_trainer_of_a_kohya_ss_folder_finds_blora_network(tmp_path):
    kohya_ss = make_standin(tmp_path / "kohya_ss", name="toy", gui=True)
    assert STOPS in launch(kohya_ss, FAST, BLORA_REHEARSAL="0").printed


def test_dora_that_lycoris_would_drop_is_refused_by_the_network(kohya):
    args = ["--network_args", *DORA, "bypass_mode=True"]
    done = subprocess.run(
        [f"./{FAST}", *args],
        cwd=kohya,
        env=os.environ | SETTINGS | {"BLORA_ACCELERATE_ARGS": ONE_PROCESS},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "\nerror: with bypass_mode=True LyCORIS trains no DoRA" in done.stderr


# ---- Two processes -------------------------------------------------------------------------------


def test_two_processes_train_one_lora_and_save_it_once(kohya):
    theirs, ours = (
        launch(
            kohya,
            FAST,
            f"--network_module={module}",
            *["--network_args", PRESET, "--save_every_n_steps=2"],
            BLORA_ACCELERATE_ARGS=TWO_PROCESSES,
            BLORA_REHEARSAL="0",
        )
        for module in NETWORKS
    )
    assert_same_file(ours, theirs)
    assert "processes: 2" in ours.printed
    assert ours.printed.count("saving checkpoint: ") == 2
    assert ours.printed.count(STOPS) == 2
    modules = {key.split(".")[0] for key in load_file(ours.file)}
    assert len(modules) == 160
    assert all(change(ours.file, module).norm() > 0 for module in modules)
    saved = {path.name for path in (kohya / "_out/lora/sdxl/toy_1").iterdir()}
    assert saved == {"toy_1-step00000002.safetensors"}
    assert "steps: 100%" in ours.printed
