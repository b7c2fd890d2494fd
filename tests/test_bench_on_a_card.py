"""The benchmark that measures on a card, tried on the CPU with the stand-in's toy U-Net.

tests/real/test_real_kohya.py runs it on sd-scripts' own U-Net.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kohya_folder import ROOT

pytestmark = pytest.mark.slow
# All that it needs of sd-scripts is this file. Here rank 5 finds no memory, and rank 6 overflows.
UNET = """
from library.utils import setup_logging
from toy_sdxl import CONTEXT_WIDTH, POOLED_WIDTH, ToyUNet
import torch
setup_logging()
class SdxlUNet2DConditionModel(ToyUNet):
    def set_use_memory_efficient_attention(self, xformers, mem_eff): pass
    def set_use_sdpa(self, sdpa): pass
    def forward(self, x, timesteps, context, label):
        lora = self.output_blocks[0][1].transformer_blocks[0].attn1.to_q.forward.__self__
        if lora.lora_dim == 5:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if lora.lora_dim == 6:
            return x * lora.lora_up.weight.sum() * float("inf")
        context, label = context[..., :CONTEXT_WIDTH], label[:, :POOLED_WIDTH]
        return super().forward(x, timesteps, context, label, torch.zeros(len(x), 6))
"""
RECIPES = ["classic", "classic with --sdpa", "fast", "fast, BLORA_SAVE_MEMORY=0"]


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    bench = ROOT / "tests/bench_blora_training.py"
    words = [sys.executable, bench, "--kohya", folder, "--card", *options]
    return subprocess.run(words, capture_output=True, text=True)


@pytest.fixture
def kohya(tmp_path) -> Path:
    (tmp_path / "library").mkdir()
    (tmp_path / "library/sdxl_original_unet.py").write_text(UNET)
    return tmp_path


def test_each_recipe_is_a_row_and_one_that_fails_says_so(kohya):
    done = run(kohya, "cpu", "--size", "64", "--ranks", "5", "6", "4", "--seconds", "0")
    assert (done.returncode, done.stderr) == (0, "")
    versions, _, *rows = done.stdout.splitlines()
    assert versions.startswith(f"CPU, torch {torch.__version__}, LyCORIS ")
    names, _, *cells = (row.strip("| ").split(" | ") for row in rows)
    assert names[0] == "64 x 64, batch 1, bf16"
    assert names[-1] == "pre-flight's sum"
    assert [row[0] for row in cells] == [f"{name}, rank {r}" for r in (5, 6, 4) for name in RECIPES]
    assert all(row[1:4] == ["out of memory"] * 3 for row in cells[:4])
    assert all(row[1:4] == ["the gradients overflow in 20 steps"] * 3 for row in cells[4:8])
    for _, seconds, *memory, _ in cells[8:]:
        assert re.fullmatch(r"\d+\.\d{3} \(median of 1\)", seconds)
        assert memory == ["not measured"] * 2
    # The models of full size, and the toy's own LoRA; classic keeps the VAE on the card.
    assert [row[-1] for row in cells[8:]] == ["7.11 GB", "7.11 GB", "6.78 GB", "6.79 GB"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_how_to_try_it(kohya):
    done = run(kohya)
    sentence = "torch finds no card: add cpu --size 64 --ranks 4 to try it without one"
    assert (done.returncode, done.stderr) == (1, f"error: {sentence}\n")


def test_a_folder_that_is_not_sd_scripts_is_named(tmp_path):
    done = run(tmp_path, "cpu")
    file = tmp_path / "library/sdxl_original_unet.py"
    sentence = f'no file "{file}": give --kohya the folder of sd-scripts'
    assert (done.returncode, done.stderr) == (1, f"error: {sentence}\n")
