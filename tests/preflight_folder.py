"""A folder in which a training could begin, and the command line that pre-flight checks there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from kohya_folder import install
from make_checkpoint import main as make_checkpoint
from make_dataset import main as make_dataset

import blora_memory
import blora_preflight

CONFIG = "_in/lora/sdxl/my_project/config.toml"
IMAGES = "_in/lora/sdxl/my_project/images"


def make_trainable(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The bundle, a checkpoint and six captioned images; the folder becomes the working directory.

    Pre-flight finds no graphics card, whatever this machine has.
    """
    install(path)
    monkeypatch.chdir(path)
    monkeypatch.setattr(blora_memory, "card", lambda: None)
    Path("sdxl_train_network.py").touch()
    make_checkpoint(["sdxl.safetensors"])
    make_dataset([str(Path(CONFIG).parent), "--images", "6", "--repeats", "2"])
    return path


OPTIONS = {
    "pretrained_model_name_or_path": "sdxl.safetensors",
    "dataset_config": CONFIG,
    "output_dir": "_out",
    "output_name": "my_project_1",
    "network_module": "lycoris.kohya",
    "network_args": ["preset=lycoris_presets/blora_content_style.toml"],
    "network_dim": "64",
    "network_alpha": "64",
    "network_train_unet_only": True,
    "resolution": "1024,1024",
    "caption_extension": ".txt",
    "max_train_steps": "3000",
    "save_every_n_steps": "1000",
    "mixed_precision": "fp16",
    "optimizer_type": "prodigy",
}
OURS = {"network_module": "blora_network", "gradient_checkpointing": True, "cache_latents": True}
WITH_BYPASS = [*OPTIONS["network_args"], "bypass_mode=True"]


def words(**changes: object) -> list[str]:
    """A command line of OPTIONS; None leaves one out, True gives it without a value."""
    line = []
    for name, value in (OPTIONS | changes).items():
        if value is True:
            line.append(f"--{name}")
        elif isinstance(value, list):
            line += [f"--{name}", *value]
        elif value is not None:
            line.append(f"--{name}={value}")
    return line


def checked(capsys, **changes: object) -> dict:
    """The JSON of a check, whose exit code says whether there were errors."""
    code = blora_preflight.main(["--json", "sdxl_train_network.py", *words(**changes)])
    captured = capsys.readouterr()
    assert captured.err == ""
    report = json.loads(captured.out)
    assert code == (1 if report["errors"] else 0)
    return report


def edit_config(old: str, new: str) -> None:
    path = Path(CONFIG)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def add_to_config(text: str) -> None:
    with Path(CONFIG).open("a") as file:
        file.write(text)
