"""Two processes train one LoRA: the real launcher and accelerate, with the stand-in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kohya_folder import ROOT, install
from lora_files import change
from make_checkpoint import main as make_checkpoint
from make_dataset import main as make_dataset
from safetensors.torch import load_file

STEPS = 4


@pytest.fixture
def kohya(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kohya folder whose training script is the stand-in."""
    path = tmp_path / "kohya"
    path.mkdir()
    install(path)
    for script in (ROOT / "tests/standin").glob("*.py"):
        shutil.copy(script, path)
    shutil.copy(ROOT / "tests/data/sdxl_train_network_options.json", path)
    monkeypatch.chdir(path)
    make_checkpoint(["toy.safetensors"])
    make_dataset(["_in/lora/sdxl/two"])
    return path


@pytest.mark.skipif(sys.platform == "win32", reason="the .sh launchers are for Linux")
def test_two_processes_train_one_lora_and_save_it_once(kohya):
    settings = {
        "BLORA_NAME": "two",
        "BLORA_RANK": "2",
        "BLORA_CHECKPOINT": "toy.safetensors",
        # --multi_gpu is accelerate's word for several processes; port 0 is any free one.
        "BLORA_ACCELERATE_ARGS": "--multi_gpu --num_processes=2 --num_machines=1 "
        "--mixed_precision=no --dynamo_backend=no --main_process_port=0",
    }
    options = ["--mixed_precision=no", f"--max_train_steps={STEPS}", "--lr_warmup_steps=0"]
    done = subprocess.run(
        ["./sdxl_blora_fast.sh", *options, "--save_every_n_steps=2"],
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "processes: 2" in done.stdout
    assert done.stdout.count("saving checkpoint: ") == 3
    saved = sorted(path.name for path in Path("_out/lora/sdxl/two_1").iterdir())
    assert saved == [
        "two_1-step00000002.safetensors",
        "two_1-step00000004.safetensors",
        "two_1.safetensors",
    ]
    lora = Path("_out/lora/sdxl/two_1/two_1.safetensors")
    modules = {key.split(".")[0] for key in load_file(lora)}
    assert len(modules) == 160
    assert all(change(lora, module).norm() > 0 for module in modules)
