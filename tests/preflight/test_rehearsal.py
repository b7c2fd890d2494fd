"""What of the rehearsal needs no sd-scripts: tensors without numbers, and what is never written.

sd-scripts' own train() is rehearsed by test_real_kohya.py and test_real_cases.py.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from unittest import mock

import lycoris.kohya
import prodigyopt
import pytest
import torch
from accelerate import Accelerator
from library import train_util  # the stand-in's
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader

from blora.preflight.rehearsal import (
    BRAKES,
    FIRST_BATCH,
    ROOT,
    Ready,
    as_started,
    disable_side_effects,
    header_tensors,
    is_safetensors,
    on_meta,
    open_to_read,
    raise_ready,
    state_per_byte,
    trainer_environment,
)

# ---- Tensors without numbers ---------------------------------------------------------------------

TENSORS = {
    "matrix": torch.ones(3, 2, dtype=torch.float16),
    "kernel": torch.ones(2, 2, 3, 3),
    "one row": torch.ones(1, 4, dtype=torch.bfloat16),
    "empty": torch.ones(0, 4),
    "alpha": torch.tensor(8.0),
    "alpha in a list": torch.tensor([4.0]),
    "numbers": torch.arange(3),
}


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "a.safetensors"
    save_file(TENSORS, path)
    return path


def test_a_file_is_read_as_far_as_its_header(file):
    with on_meta():
        read = header_tensors(file, device="cpu")
    loaded = load_file(file)
    assert {n: (t.shape, t.dtype) for n, t in read.items()} == {
        n: (t.shape, t.dtype) for n, t in loaded.items()
    }
    with_numbers = {name for name, tensor in read.items() if not tensor.is_meta}
    assert with_numbers == {"alpha", "alpha in a list"}
    assert (read["alpha"].item(), read["alpha in a list"].item()) == (8, 4)


def test_what_is_made_has_no_numbers_and_goes_to_no_device():
    with on_meta():
        made = torch.zeros(2, 2)
        moved = [made.cpu(), made.to("cpu"), made.to(0), made.to(torch.device("cpu"), torch.half)]
        moved += [made.to(device="cpu", dtype=torch.half), nn.Linear(2, 2).to("cpu").weight]
    assert all(tensor.is_meta for tensor in (made, *moved))
    assert [tensor.dtype for tensor in moved[3:5]] == [torch.half, torch.half]


def test_a_number_that_is_there_stays_one():
    with on_meta():
        assert torch.tensor(4.0).item() == 4
        assert torch.ones(1, device="cpu").to("cpu").item() == 1
    assert not torch.zeros(1).is_meta


class Transformer2DModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.conv = nn.Linear(64, 64), nn.Conv2d(64, 64, 3)


ALGOS = ("lora", "locon", "loha", "lokr", "dylora", "full", "ia3", "glora", "diag-oft", "boft")


@pytest.mark.parametrize("dora", ["False", "True"])
@pytest.mark.parametrize("algo", ALGOS)
def test_lycoris_builds_the_same_modules_without_numbers_as_with(algo, dora):
    def build(model: nn.Module) -> dict[str, torch.Size]:
        unet = nn.Module()
        unet.block = model
        options = {"algo": algo, "dora_wd": dora, "conv_dim": "4"}
        network = lycoris.kohya.create_network(1.0, 4, 4, None, nn.Module(), unet, **options)
        network.apply_to(nn.Module(), unet, False, True)
        return {name: tensor.shape for name, tensor in network.state_dict().items()}

    real = build(Transformer2DModel())
    with on_meta():
        rehearsed = build(Transformer2DModel().to("cpu"))
    assert rehearsed == real
    assert real


# ---- What it leaves alone ------------------------------------------------------------------------


def test_options_that_write_show_or_read_much_are_taken_away(tmp_path, file):
    empty = tmp_path / "empty"
    empty.mkdir()
    given_and_left = {
        "logging_dir": ("logs", "temporary"),
        "wandb_api_key": ("secret", None),
        "console_log_file": ("log.txt", None),
        "disable_mmap_load_safetensors": (True, False),
        "debug_dataset": (True, False),
        "vae": ("stabilityai/sdxl-vae", None),
        "tokenizer_cache_dir": (str(empty), None),
    }
    args = argparse.Namespace(**{name: given for name, (given, _) in given_and_left.items()})
    disable_side_effects(args, "temporary")
    assert vars(args) == {name: left for name, (_, left) in given_and_left.items()}
    read = {"vae": str(file), "tokenizer_cache_dir": str(tmp_path)}
    args = argparse.Namespace(**read, logging_dir=None)
    disable_side_effects(args, "temporary")
    off = {"logging_dir": None, "disable_mmap_load_safetensors": False, "debug_dataset": False}
    assert vars(args) == read | off


# ---- The optimizer -------------------------------------------------------------------------------


class ScheduleFree(torch.optim.SGD):
    """Steps in training alone, as the schedule-free ones do."""

    def train(self) -> None:
        self.defaults["momentum"] = self.param_groups[0]["momentum"] = 0.9


@pytest.mark.parametrize(
    ("optimizer", "option", "dtype", "expected"),
    [
        (torch.optim.SGD, "", torch.float32, 0),
        (torch.optim.AdamW, "", torch.float32, 2),  # and its count of steps, which is a number
        (torch.optim.AdamW, "full_bf16", torch.bfloat16, 2),
        (torch.optim.AdamW, "full_fp16", torch.float16, 2),
        (torch.optim.Adafactor, "", torch.float32, 2 / 256),  # a row and a column of each matrix
        (prodigyopt.Prodigy, "", torch.float32, 3.5),  # no p0 of zeros
        (ScheduleFree, "", torch.float32, 1),
    ],
)
def test_an_optimizers_state_is_counted_after_a_first_step(
    monkeypatch, optimizer, option, dtype, expected
):
    def get_optimizer(_args, parameters):
        assert {parameter.dtype for parameter in parameters} == {dtype}
        return "", "", optimizer(parameters, lr=1e-3)

    monkeypatch.setattr(train_util, "get_optimizer", get_optimizer, raising=False)
    args = argparse.Namespace(full_bf16=option == "full_bf16", full_fp16=option == "full_fp16")
    assert state_per_byte(args) == pytest.approx(expected, abs=1e-3)


# ---- The script ----------------------------------------------------------------------------------


@pytest.mark.parametrize("python_path", [[], ["/other", str(ROOT)]])
def test_the_scripts_folder_comes_first_and_ours_stays_where_pythonpath_has_it(
    tmp_path, monkeypatch, python_path
):
    before = [str(ROOT), "/elsewhere"]
    monkeypatch.setattr(sys, "path", before)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(python_path))
    with as_started(tmp_path / "script.py", ["--a", "b"]):
        assert sys.path == [str(tmp_path), *(before if python_path else before[1:])]
        assert sys.argv == [str(tmp_path / "script.py"), "--a", "b"]
    assert sys.path == [str(ROOT), "/elsewhere"]


@pytest.mark.parametrize(("before", "width"), [(None, "1000"), ("80", "80")])
def test_what_the_trainer_prints_is_kept_in_lines_of_their_own_length(
    monkeypatch, capsys, before, width
):
    monkeypatch.setattr(os, "environ", {"COLUMNS": before} if before else {})
    with trainer_environment(Path("script.py"), []) as environment:
        print("log")
        print("warning", file=sys.stderr)
        assert os.environ == {"COLUMNS": width}
    assert environment.printed.getvalue() == "log\nwarning\n"
    assert capsys.readouterr() == ("", "")


def test_files_are_read_and_never_written(tmp_path):
    path = tmp_path / "metadata_cache.json"
    for mode in ("w", "a", "x", "wb"):
        with open_to_read(path, mode) as file:
            file.write(b"a" if "b" in mode else "a")
    assert not path.exists()
    path.write_text("a")
    with open_to_read(path, "r", encoding="utf-8") as file:
        assert file.read() == "a"


def test_a_link_is_a_checkpoint_if_sd_scripts_finds_its_target(file, monkeypatch, tmp_path):
    models = tmp_path / "models"
    models.mkdir()
    (models / "relative.safetensors").symlink_to("../a.safetensors")
    (models / "absolute.safetensors").symlink_to(file)
    monkeypatch.chdir(models)
    for name in ("../a.safetensors", "absolute.safetensors", "relative.safetensors"):
        assert is_safetensors(name), name
    monkeypatch.chdir(tmp_path)
    for name in ("models/relative.safetensors", "models"):
        assert not is_safetensors(name), name


# ---- The brakes: test_real_cases.py takes them out of sd-scripts itself --------------------


def train(dropped: tuple[str, ...]) -> None:
    """What sd-scripts calls before its first step, less some of it."""
    accelerator = Accelerator(cpu=True)
    calls = {
        "register_load_state_pre_hook": lambda: accelerator.register_load_state_pre_hook(print),
        "init_trackers": lambda: accelerator.init_trackers("it"),
        FIRST_BATCH: lambda: next(iter(accelerator.prepare(DataLoader([1.0])))),
    }
    for name, call in calls.items():
        if name not in dropped:
            call()


@pytest.mark.parametrize("dropped", [(), BRAKES[:1], BRAKES[1:], BRAKES])
def test_what_a_release_drops_of_the_brakes_leaves_the_next(dropped):
    train(dropped)  # goes through without any
    with (
        mock.patch.multiple(Accelerator, **dict.fromkeys(BRAKES, raise_ready)),
        mock.patch.multiple(DataLoader, **{FIRST_BATCH: raise_ready}),
        pytest.raises(Ready),
    ):
        train(dropped)
