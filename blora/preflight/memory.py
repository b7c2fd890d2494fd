"""What a training takes of the card's memory: a sum of its parts, computed and not measured.

The parts are what is known before a training begins: the models in their precision, the LoRA with
gradients and optimizer, and what autograd holds for the backward pass. The driver, torch and its
kernels need some more, so the sum is the least that is needed.
"""

from __future__ import annotations

import shutil
import subprocess
from argparse import Namespace
from dataclasses import dataclass, replace

from blora.preflight.network import Built, bytes_trained
from blora.preflight.report import Report
from blora.text import file_size

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
PIXELS = 1024 * 1024  # of those figures; they grow with pixels and batch alike
SMALL_RANK = 64  # the paper's: a lower one saves little


@dataclass(frozen=True)
class Backward:
    """What decides how much autograd holds for the backward pass."""

    blocks: frozenset[str]  # trained, such as "output_blocks.0.1"
    stops_early: bool  # by blora_network
    checkpointing: bool
    pixels: int  # of a whole batch
    copies: int  # bytes of the LoRA as autocast makes it 16 bits, where it is not


def position(block: str) -> tuple[int, ...]:
    """Where a block comes in the U-Net's forward pass; what is no block comes first."""
    part, *numbers = block.split(".")
    parts = ("input_blocks", "middle_block", "output_blocks", "out")
    return (parts.index(part) if part in parts else -1, *map(int, numbers))


def activations(backward: Backward) -> int:
    """Bytes held for the backward pass, in fp16 or bf16 mixed precision.

    For a block that is not in the table, those of the next one: the least that is held.
    """
    first = min(map(position, backward.blocks), default=())
    later = [figures for block, figures in FROM_BLOCK.items() if position(block) >= first]
    held = later[0] if later else (0, 0)
    if not backward.stops_early or first < position(next(iter(FROM_BLOCK))):
        held = ALL
    size = held[0] if backward.checkpointing else held[1]
    copies = 0 if backward.checkpointing else backward.copies
    return size * backward.pixels // PIXELS + copies


def card_memory() -> int | None:
    """Bytes of the largest card's memory by nvidia-smi; None where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
        return max(int(line) for line in done.stdout.split()) * 2**20
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


# ---- The sum -------------------------------------------------------------------------------------


def model_parts(args: Namespace) -> dict[str, float]:
    """Bytes of the models that stay on the card, each in its precision."""
    each = 4 if args.mixed_precision in (None, "no") else 2
    # sd-scripts before 0.10 has no --fp8_base_unet.
    unet_alone = getattr(args, "fp8_base_unet", False)
    unet_each = 1 if args.fp8_base or unet_alone else each
    text_each = 1 if args.fp8_base and not unet_alone else each
    parts = {f"U-Net in {8 * unet_each} bits": unet_each * UNET}
    if not args.cache_text_encoder_outputs:
        parts["text encoders"] = text_each * TEXT_ENCODERS
    if not args.cache_latents:
        parts["VAE"] = (4 if args.no_half_vae else each) * VAE
    return parts


def backward_pass(network: Built, args: Namespace, pixels: int, stops_early: bool) -> Backward:
    """The backward pass of a training whose largest batch has so many pixels."""
    return Backward(
        network.blocks,
        stops_early and not network.trains_text,
        args.gradient_checkpointing,
        pixels,
        2 * network.parameters if bytes_trained(args) == 4 else 0,
    )


def plan_memory(
    network: Built,
    state: float | None,
    backward: Backward,
    args: Namespace,
    report: Report,
) -> None:
    """The card's memory as a sum of its parts; what is unknown is named, and not in the sum."""
    lora = network.parameters * bytes_trained(args)
    parts = {**model_parts(args), "LoRA": lora, "gradients": lora}
    unknown = []
    optimizer = args.optimizer_type or "AdamW"
    if state is None:
        unknown.append(f"{optimizer} state")
    else:
        parts[f"{optimizer} state"] = lora * state
    hint = ""
    if args.mixed_precision in (None, "no") or not backward.pixels:
        unknown.append("activations")
    else:
        parts["activations"] = held = activations(backward)
        if backward.checkpointing and backward.stops_early:
            more = activations(replace(backward, checkpointing=False)) - held
            hint = (
                " (without --gradient_checkpointing, which is BLORA_SAVE_MEMORY=0: "
                f"{file_size(more)} more)"
            )
    summands = [f"{file_size(size)} {part}" for part, size in parts.items()]
    summands += [f"{part} of unknown size" for part in unknown]
    total = file_size(sum(parts.values()))
    report.plan["memory"] = f"{total} at least, computed: {', '.join(summands)}{hint}"
    check_card(parts, backward, args, report)


def check_card(
    parts: dict[str, float], backward: Backward, args: Namespace, report: Report
) -> None:
    """A warning where the card has less memory than the sum."""
    memory, total = card_memory(), sum(parts.values())
    if memory is not None and total > memory:
        room = memory - total + parts.get("activations", 0)
        report.warnings.append(
            f"the card has {file_size(memory)} of memory, and this training takes at least "
            f"{file_size(total)} (computed): {memory_advice(room, backward, args)}"
        )


def memory_advice(room: float, backward: Backward, args: Namespace) -> str:
    """What to change, the cheapest first; `room` is what the card has for activations."""
    advice = {
        "set BLORA_SAVE_MEMORY to 1, or add --gradient_checkpointing": not backward.checkpointing,
        "lower BLORA_RANK": (args.network_dim or 0) > SMALL_RANK,
        "add --cache_text_encoder_outputs": args.network_train_unet_only
        and not args.cache_text_encoder_outputs,
        "lower batch_size or resolution": room > 0 and backward.pixels > 512 * 512,
    }
    return ", or ".join([text for text, helps in advice.items() if helps] or ["use a larger card"])
