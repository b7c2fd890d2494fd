"""The plan of a training: its length, modules, size, memory and saves, as the rehearsal built it.

The card's memory is a sum of its parts, computed and not measured: the models in their precision,
the LoRA with gradients and optimizer, and what autograd holds for the backward pass. The driver,
torch and its kernels need some more, so the sum is the least that is needed.
"""

from __future__ import annotations

import glob
import math
import shutil
from argparse import Namespace
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blora import ROOT
from blora.preflight.base_weights import Merged
from blora.preflight.processes import Started
from blora.preflight.rehearsal import Rehearsal
from blora.preflight.report import Report
from blora.sdxl import Trait, block_of, layers_by_module, load_traits
from blora.text import BloraError, counted, file_size, printable, span

OUR_NETWORK = "blora_network"  # LyCORIS' own, with a backward pass that ends early


# ---- The network ---------------------------------------------------------------------------------

MANY_BLOCKS = 11  # the U-Net's blocks with attention: where more are trained, nearly all are
BYTES = {"float": 4, "fp16": 2, "bf16": 2}  # of a number, by --save_precision


@dataclass(frozen=True)
class Built:
    """The network that will be trained: parameters of each module, by kohya's name."""

    modules: dict[str, int]

    @property
    def parameters(self) -> int:
        return sum(self.modules.values())

    @property
    def blocks(self) -> frozenset[str]:
        return frozenset(block_of(name) for name in self.modules if name.startswith("lora_unet"))

    @property
    def trains_text(self) -> bool:
        return any(name.startswith("lora_te") for name in self.modules)


def bytes_trained(args: Namespace) -> int:
    """Bytes of a number of the LoRA while it is trained."""
    return 2 if args.full_fp16 or args.full_bf16 else 4


def file_bytes(network: Built, args: Namespace) -> int:
    """Bytes of a saved LoRA."""
    return network.parameters * BYTES.get(args.save_precision, bytes_trained(args))


def count_by_trait(modules: list[str], known: dict[str, Trait]) -> str:
    """Modules in words: "80 content (output_blocks.0.1), 80 style (output_blocks.1.1)".

    A module is told by the first trait of the file that keeps it.
    """
    groups: Counter[tuple[str, str]] = Counter()
    for module in modules:
        trait = next((trait.name for trait in known.values() if trait.keeps(module)), "")
        groups[printable(trait), block_of(module)] += 1
    if len(groups) > MANY_BLOCKS:
        return f"{len(modules)} in {len(groups)} blocks"
    counted = [f"{n} {t} ({b})" if t else f"{n} in {b}" for (t, b), n in groups.items()]
    return f"{len(modules)}: {', '.join(counted)}"


def plan_rank(network: Built, args: Namespace, report: Report) -> None:
    """Rank, alpha, parameters and a file's size."""
    rank, alpha = args.network_dim, args.network_alpha
    size = f"{rank}, alpha {alpha:g}" if rank else f"{args.network_module}'s default"
    if args.dim_from_weights:
        size = f"as in {args.network_weights}"
    report.plan["rank"] = (
        f"{size}: {network.parameters:,} parameters, {file_size(file_bytes(network, args))} a file"
    )
    layers = layers_by_module()
    # Where rank (in + out) passes in x out, full matrices would be smaller and could do more.
    outgrown = [
        name
        for name, parameters in network.modules.items()
        if parameters > math.prod(layers[name].shape)
    ]
    if outgrown:
        at = f"at rank {rank} " if rank and not args.dim_from_weights else ""
        report.notes.append(
            f"{at}the LoRA is larger than the matrix it changes in {len(outgrown)} of "
            f"{len(network.modules)} modules"
        )


def plan_merged(record: list[Merged], known: dict[str, Trait], report: Report) -> None:
    """What --base_weights merge before the training, and how strongly."""
    told = [
        f"{count_by_trait([*merged.modules], known)}, at {span(merged.modules.values())} from "
        f"{merged.file}"
        for merged in record
        if merged.modules
    ]
    if told:
        report.plan["merged"] = "; ".join(told)


# ---- Its length ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Length:
    """How long the training is."""

    steps: int
    epochs: int


def length(args: Namespace, batches: int, processes: int) -> Length:
    """Steps and epochs by sd-scripts' own sum; each step takes a batch in every process."""
    an_epoch = max(1, math.ceil(batches / processes / args.gradient_accumulation_steps))
    steps = args.max_train_steps
    if args.max_train_epochs is not None:
        steps = args.max_train_epochs * an_epoch
    return Length(steps, math.ceil(steps / an_epoch))


def batch_sizes(dataset: Any) -> list[int]:
    """Pictures in each batch of an epoch: the last of a bucket may be smaller."""
    most = dataset.batch_size
    manager = getattr(dataset, "bucket_manager", None)
    if manager is None:  # of a --dataset_class
        return [most] * len(dataset)
    buckets = [len(bucket) for bucket in manager.buckets]
    return [min(most, size - start) for size in buckets for start in range(0, size, most)]


def batch_in_words(batches: list[int]) -> str:
    """Sizes of batches: "batch 4", "batches of 1 to 4, 1.5 on average"."""
    least, most = min(batches, default=0), max(batches, default=0)
    if least == most:
        return f"batch {most}"
    return f"batches of {least} to {most}, {sum(batches) / len(batches):.1f} on average"


def plan_length(
    length: Length, batches: list[int], started: Started, args: Namespace, report: Report
) -> None:
    """Steps, epochs, and what a step takes; `batches` are the sizes of those of an epoch."""
    if length.steps < 1:
        option = "max_train_steps" if args.max_train_epochs is None else "max_train_epochs"
        report.errors.append(f"--{option}={getattr(args, option)} means zero steps: raise it")
    several = f" in each of {started.processes} processes" if started.processes > 1 else ""
    several += f" on {started.machines} machines" if started.machines > 1 else ""
    report.plan["training"] = (
        f"{counted(length.steps, 'step')}, {counted(length.epochs, 'epoch')}, "
        f"{batch_in_words(batches)}"
        f"{several}, {args.mixed_precision or 'no'} mixed precision"
    )


# ---- The card's memory ---------------------------------------------------------------------------

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
PARTS = ("time_embed", "label_emb", "input_blocks", "middle_block", "output_blocks", "out")
PIXELS = 1024 * 1024  # of those figures; they grow with pixels and batch alike
# Parts of the sum, in words.
OF_OPTIMIZER, OF_STEP = "the optimizer's memory", "working memory of a step"
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
    """Where a block, or another part with layers, comes in the U-Net's forward pass."""
    part, *numbers = block.split(".")
    return (PARTS.index(part), *map(int, numbers))


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


def card_memory() -> int:
    """Bytes of the largest card's memory; 0 where torch finds none."""
    import torch

    cards = range(torch.cuda.device_count())
    return max((torch.cuda.get_device_properties(card).total_memory for card in cards), default=0)


def model_parts(args: Namespace) -> dict[str, float]:
    """Bytes of the models that stay on the card, each in its precision."""
    each = 4 if args.mixed_precision in (None, "no") else 2
    # sd-scripts before 0.10 has no --fp8_base_unet.
    unet_alone = getattr(args, "fp8_base_unet", False)
    unet_each = 1 if args.fp8_base or unet_alone else each
    text_each = 1 if args.fp8_base and not unet_alone else each
    parts: dict[str, float] = {f"U-Net in {8 * unet_each} bits": unet_each * UNET}
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


def memory_parts(
    network: Built, state: float | None, backward: Backward, args: Namespace
) -> dict[str, float | None]:
    """Bytes on the card, part by part; None for a part of unknown size."""
    lora = network.parameters * bytes_trained(args)
    in_16_bits = args.mixed_precision not in (None, "no")
    return {
        **model_parts(args),
        "LoRA": lora,
        "its gradients": lora,
        OF_OPTIMIZER: None if state is None else lora * state,
        OF_STEP: activations(backward) if in_16_bits and backward.pixels else None,
    }


def plan_memory(
    network: Built, state: float | None, backward: Backward, args: Namespace, report: Report
) -> None:
    """The card's memory as a sum of its parts; what is unknown is named, and not in the sum."""
    every = memory_parts(network, state, backward, args)
    parts = {part: size for part, size in every.items() if size is not None}
    hint = ""
    if OF_STEP in parts and backward.checkpointing and backward.stops_early:
        more = activations(replace(backward, checkpointing=False)) - parts[OF_STEP]
        hint = (
            " (without --gradient_checkpointing, which is BLORA_SAVE_MEMORY=0: "
            f"{file_size(more)} more)"
        )
    summands = [f"{file_size(size)} {part}" for part, size in parts.items()]
    summands += [f"{part} of unknown size" for part in every if part not in parts]
    total = file_size(sum(parts.values()))
    report.plan["memory"] = f"{total} at least, computed: {', '.join(summands)}{hint}"
    check_card(parts, backward, args, report)


def check_card(
    parts: dict[str, float], backward: Backward, args: Namespace, report: Report
) -> None:
    """A warning where the card has less memory than the sum."""
    memory, total = card_memory(), sum(parts.values())
    if memory and total > memory:
        room = memory - total + parts.get(OF_STEP, 0)
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


# ---- Its saves -----------------------------------------------------------------------------------


def saves(length: Length, args: Namespace, kind: str = "") -> int:
    """Files, or with "_state" states, that will be there before the last one."""

    def count(every: int | None, total: int) -> int:
        return total // every if every else 0

    def kept(unit: str) -> int | None:
        last: int | None = getattr(args, f"save_last_n_{unit}")
        return (kind and getattr(args, f"save_last_n_{unit}_state")) or last

    by_step = count(args.save_every_n_steps, length.steps)
    every_epochs = args.save_every_n_epochs
    if args.save_n_epoch_ratio:  # takes its place, in sd-scripts' train() after its network
        every_epochs = length.epochs // args.save_n_epoch_ratio or 1
    by_epoch = count(every_epochs, length.epochs - 1)
    if (distance := kept("steps")) is not None:  # sd-scripts keeps those within this distance
        by_step = min(by_step, count(args.save_every_n_steps, distance) + 1)
    if (most := kept("epochs")) is not None:
        by_epoch = min(by_epoch, most)
    return by_step + by_epoch


def plan_saves(
    length: Length, network: Built, state: float | None, args: Namespace, report: Report
) -> None:
    """The saves to come against the free space of the output folder."""
    output = Path(args.output_dir or "")
    folder = next(
        parent for parent in (output.absolute(), *output.absolute().parents) if parent.is_dir()
    )
    size, number = file_bytes(network, args), saves(length, args) + 1
    free, total = shutil.disk_usage(folder).free, float(number * size)
    files = f"{number} of {file_size(size)}"
    if args.save_state or getattr(args, "save_state_on_train_end", False):
        # A state holds the LoRA as it is trained, and what the optimizer keeps of it.
        each = network.parameters * bytes_trained(args) * (1 + (state or 0))
        states = (saves(length, args, "_state") if args.save_state else 0) + 1
        total += states * each
        files += f" and {states} states of {file_size(each)}"
    report.plan["saves"] = f"{files} in {output} ({file_size(free)} free)"
    earlier = output.glob(f"{glob.escape(args.output_name or 'last')}*.safetensors")
    overwritten = sum(file.stat().st_size for file in earlier)
    if total > free + overwritten:
        report.errors.append(
            f"{files} do not fit into the {file_size(free)} free at "
            f'"{folder}": free some space, or raise --save_every_n_steps'
        )


def known_traits(report: Report) -> dict[str, Trait]:
    """The traits, by which blocks are named; a training needs none."""
    try:
        return load_traits(ROOT / "blora_traits.json")
    except BloraError as error:
        report.warnings.append(str(error))
        return {}


def plan(rehearsal: Rehearsal, started: Started, pixels: int, report: Report) -> None:
    """Write the plan line by line; `pixels` are those of the largest batch."""
    args = rehearsal.args
    batches = [size for dataset in rehearsal.datasets for size in batch_sizes(dataset)]
    duration = length(args, len(rehearsal.group), started.processes)
    plan_length(duration, batches, started, args, report)
    if rehearsal.network is None:  # deepspeed wraps it
        return
    network = Built(rehearsal.modules)
    report.plan["network"] = args.network_module
    report.modules = list(network.modules)
    traits = known_traits(report)
    report.plan["modules"] = count_by_trait(report.modules, traits)
    plan_merged(rehearsal.merged, traits, report)
    plan_rank(network, args, report)
    backward = backward_pass(network, args, pixels, args.network_module == OUR_NETWORK)
    plan_memory(network, rehearsal.optimizer_state, backward, args, report)
    if started.machine:
        report.plan["saves"] = "only on the first machine (--machine_rank=0)"
    else:
        plan_saves(duration, network, rehearsal.optimizer_state, args, report)
