"""The sd-scripts checkout and its Python that tests run on, where the environment names them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

KOHYA_ROOT, KOHYA_PYTHON = os.environ.get("KOHYA_ROOT"), os.environ.get("KOHYA_PYTHON")
if not (KOHYA_ROOT and KOHYA_PYTHON):
    pytest.skip(
        "NOT RUN on a real sd-scripts: set KOHYA_ROOT to a checkout and KOHYA_PYTHON to its python",
        allow_module_level=True,
    )
# Commands run in other folders. A venv's python must stay the link that it is.
KOHYA_ROOT, KOHYA_PYTHON = str(Path(KOHYA_ROOT).absolute()), str(Path(KOHYA_PYTHON).absolute())
BEFORE_0_10 = "validation_split" not in Path(KOHYA_ROOT, "train_network.py").read_text("utf-8")


def make_copy(path: Path, root: str = KOHYA_ROOT) -> None:
    """The tracked files of a checkout, as far as they are there."""
    listed = subprocess.run(
        ["git", "-C", root, "ls-files", "-z"], stdout=subprocess.PIPE, text=True, check=True
    )
    for name in listed.stdout.split("\0")[:-1]:
        if (source := Path(root, name)).is_file():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, path / name)


def tokenizers(tmp: Path, kohya: Path) -> Path:
    """SDXL's own, which are otherwise downloaded."""
    found = Path(os.environ.get("BLORA_RANDOM_SDXL", tmp)).absolute() / "tokenizers"
    if not found.is_dir():
        command = [
            Path(__file__).with_name("make_random_sdxl.py"),
            "--kohya",
            kohya,
            "--out",
            tmp,
            "--no_checkpoint",
        ]
        subprocess.run([KOHYA_PYTHON, *command], check=True)
        return tmp / "tokenizers"
    return found
