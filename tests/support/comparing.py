"""A kohya folder in which blora_compare.py draws with the toy, and what it says there."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

from kohya_folder import ROOT, install
from lora_files import CONTENT, STYLE, blora_modules, write

TOYS = ("gen_img.py", "toy_sdxl.py")
CHECKPOINT = "models/sdxl.safetensors"
OF_SDXL = (
    "model.diffusion_model.output_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
    (1280, 2048),
)


def write_checkpoint(
    path: Path, key: str = OF_SDXL[0], shape: tuple[int, ...] = OF_SDXL[1]
) -> Path:
    """A checkpoint of this one weight, which takes no space on the disk."""
    size = 2 * shape[0] * shape[1]
    entry = {"dtype": "F16", "shape": shape, "data_offsets": [0, size]}
    header = json.dumps({key: entry}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(file.tell() + size)
    return path


def make_folder(path: Path, kohya_ss: bool = False) -> Path:
    """A kohya folder with the bundle, the toy generator and a checkpoint."""
    scripts = path / "sd-scripts" if kohya_ss else path
    scripts.mkdir(parents=True)
    install(path)
    for toy in TOYS:
        shutil.copy(ROOT / "tests/standin" / toy, scripts)
    write_checkpoint(path / CHECKPOINT)
    return path


def save(path: Path, steps: int | None, *blocks: str, name: str = "my", rank: int = 2) -> Path:
    """A LoRA of content and style, or of these blocks, as sd-scripts saves it at a step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"ss_output_name": name} | ({"ss_steps": str(steps)} if steps is not None else {})
    return write(path, blora_modules(*(blocks or (CONTENT, STYLE)), rank=rank), metadata)


def command(folder: Path, *words: object, program: str = "blora_compare.py") -> list[str]:
    """The command line of a program that draws, with the checkpoint there."""
    return [sys.executable, program, "--checkpoint", CHECKPOINT, *map(str, words)]


def compare(
    folder: Path, *words: object, program: str = "blora_compare.py"
) -> subprocess.CompletedProcess[str]:
    """Run it."""
    return subprocess.run(
        command(folder, *words, program=program),
        cwd=folder,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
