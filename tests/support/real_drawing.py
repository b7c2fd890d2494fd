"""A folder of kohya_ss with a real gen_img.py, and an SDXL of random weights to draw with."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from kohya_folder import install
from PIL import Image
from real_kohya import KOHYA_PYTHON, SUPPORT, make_copy, random_sdxl

NOT_RUN = "NOT RUN: BLORA_E2E=1 draws with a full-size SDXL on the CPU, five minutes"
SIZE = 128


@dataclass(frozen=True)
class Kohya:
    """A folder of kohya_ss: the bundle, and sd-scripts in a folder of it."""

    path: Path
    sdxl: Path

    @property
    def checkpoint(self) -> Path:
        return self.sdxl / "random_sdxl.safetensors"

    def run(self, *words: object) -> str:
        """What a program prints; it finds the bundle, and network modules of the tests."""
        done = subprocess.run(
            [KOHYA_PYTHON, *map(str, words)],
            cwd=self.path,
            env=os.environ
            | {
                "HF_HUB_OFFLINE": "1",
                "PYTHONDONTWRITEBYTECODE": "1",
                "PYTHONPATH": os.pathsep.join([str(self.path), str(SUPPORT)]),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def draw(self, program: str, *words: object) -> str:
        """What a program of ours prints that draws small pictures in one step."""
        given = ["--checkpoint", self.checkpoint, "--size", SIZE, "--steps", "1", *words]
        return self.run(program, *given, "--", *self.tokenizers)

    def gen_img(self, prompts: str, output: str, *words: object) -> None:
        """Have gen_img.py draw prompts by itself, into a folder."""
        (self.path / f"{output}.txt").write_text(prompts)
        given = ["--ckpt", self.checkpoint, "--sdxl", "--from_file", f"{output}.txt"]
        given += ["--outdir", output, *self.tokenizers, *words]
        self.run("sd-scripts/gen_img.py", *given)

    @property
    def tokenizers(self) -> list[object]:
        return ["--tokenizer_cache_dir", self.sdxl / "tokenizers"]


def make_kohya(tmp_path_factory: pytest.TempPathFactory, name: str) -> Kohya:
    """The folder, where BLORA_E2E asks for it."""
    if os.environ.get("BLORA_E2E") != "1":
        pytest.skip(NOT_RUN)
    path = tmp_path_factory.mktemp(name) / "kohya ss"
    make_copy(path / "sd-scripts")
    install(path)
    return Kohya(path, random_sdxl(tmp_path_factory.mktemp("random_sdxl")))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)
