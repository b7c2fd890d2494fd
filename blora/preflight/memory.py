"""What a training takes of the card's memory: a sum of its parts, computed and not measured.

plan.py tells it. The parts are what is known before a training begins: the models in
their precision, the LoRA with gradients and optimizer, and what autograd holds for the backward
pass. The driver, torch and its kernels need some more, so the sum is the least that is needed.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass

# Parameters of SDXL's models, as sd-scripts builds them.
UNET = 2_567_463_684
TEXT_ENCODERS = 123_060_480 + 694_659_840
VAE = 83_653_863

# Bytes that autograd holds at most, in fp16 mixed precision at 1024 x 1024 and batch 1, by the
# first attention block that is trained: with gradient checkpointing, and without. They are what
# `tests/bench_blora_training.py --blocks` counts.
MEGABYTE = 1_000_000
ALL = (1198 * MEGABYTE, 6674 * MEGABYTE)  # where the backward pass goes through the whole U-Net
FROM_BLOCK = {
    "input_blocks.4.1": (1154 * MEGABYTE, 6356 * MEGABYTE),
    "input_blocks.5.1": (1128 * MEGABYTE, 6040 * MEGABYTE),
    "input_blocks.7.1": (1100 * MEGABYTE, 5780 * MEGABYTE),
    "input_blocks.8.1": (1066 * MEGABYTE, 5113 * MEGABYTE),
    "middle_block.1": (1032 * MEGABYTE, 4446 * MEGABYTE),
    "output_blocks.0.1": (993 * MEGABYTE, 3735 * MEGABYTE),
    "output_blocks.1.1": (956 * MEGABYTE, 3050 * MEGABYTE),
    "output_blocks.2.1": (920 * MEGABYTE, 2372 * MEGABYTE),
    "output_blocks.3.1": (871 * MEGABYTE, 1572 * MEGABYTE),
    "output_blocks.4.1": (839 * MEGABYTE, 1219 * MEGABYTE),
    "output_blocks.5.1": (821 * MEGABYTE, 882 * MEGABYTE),
}
PIXELS = 1024 * 1024  # of those figures; what is held grows with pixels and batch alike


BYTES = {"float": 4, "fp16": 2, "bf16": 2}  # of a number, by --save_precision


@dataclass(frozen=True)
class Backward:
    """What decides how much autograd holds: see activations()."""

    blocks: frozenset[str]  # trained, such as "output_blocks.0.1"
    stops_early: bool  # by blora_network
    checkpointing: bool
    pixels: int  # of a whole batch
    copies: int  # bytes of the LoRA as autocast makes it 16 bits, where it is not


def position(block: str) -> tuple[int, ...]:
    """Where a block comes in the U-Net's forward pass; what is none of them comes first."""
    part, *numbers = block.split(".")
    parts = ("input_blocks", "middle_block", "output_blocks", "out")
    return (parts.index(part) if part in parts else -1, *map(int, numbers))


def activations(backward: Backward) -> int:
    """Bytes held for the backward pass, in fp16 or bf16 mixed precision.

    Of a block that is not in the table, the next one's: the least that is held.
    """
    first = min(map(position, backward.blocks), default=())
    later = [figures for block, figures in FROM_BLOCK.items() if position(block) >= first]
    held = later[0] if later else (0, 0)
    if not backward.stops_early or first < position(next(iter(FROM_BLOCK))):
        held = ALL
    size = held[0] if backward.checkpointing else held[1]
    copies = 0 if backward.checkpointing else backward.copies
    return size * backward.pixels // PIXELS + copies


def card() -> int | None:
    """Bytes of the largest card's memory, as nvidia-smi tells them; None where it does not."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
        return max(int(line) for line in done.stdout.split()) * 2**20
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
