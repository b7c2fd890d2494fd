"""What a training will be: its length, modules, size, memory and saves, from what was rehearsed.

blora_preflight.py prints it. The modules are those of the network that was built, the batches those
of the trainer's datasets, what the optimizer keeps was counted on the optimizer.
"""

from __future__ import annotations

import argparse
import glob
import math
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import blora.preflight.memory as memory
from blora import ROOT
from blora.preflight.rehearsal import Rehearsal
from blora.preflight.report import Report
from blora.sdxl import Trait, block_of, layers_by_module, load_traits
from blora.text import BloraError, counted, file_size, printable

OUR_NETWORK = "blora_network"  # LyCORIS' own, with a backward pass that ends early
SMALL_RANK = 64  # the paper's: a lower one saves little
MANY_BLOCKS = 11  # the U-Net's blocks with attention: where more are trained, nearly all are


# ---- Its length ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Started:
    """The processes that accelerate will start, on all machines; machine 0 saves the LoRA."""

    processes: int = 1
    machines: int = 1
    machine: int = 0  # this one
    was_said: bool = True  # or does accelerate take all cards by itself
    lacks_multi_gpu: bool = False  # more were asked for


@dataclass(frozen=True)
class Length:
    """How long the training is."""

    steps: int
    epochs: int


def length(args: argparse.Namespace, batches: int, processes: int) -> Length:
    """Steps and epochs by sd-scripts' own sum; each step takes a batch in every process."""
    an_epoch = max(1, math.ceil(batches / processes / args.gradient_accumulation_steps))
    steps = args.max_train_steps
    if args.max_train_epochs is not None:
        steps = args.max_train_epochs * an_epoch
    return Length(steps, math.ceil(steps / an_epoch))


def plan_length(
    length: Length, batches: list[int], started: Started, args: argparse.Namespace, report: Report
) -> None:
    """Steps, epochs, and what a step takes."""
    if length.steps < 1:
        option = "max_train_steps" if args.max_train_epochs is None else "max_train_epochs"
        report.errors.append(f"--{option}={getattr(args, option)} trains nothing: give more")
    sizes = "/".join(str(size) for size in sorted(set(batches)))
    several = f" in each of {started.processes} processes" if started.processes > 1 else ""
    several += f" on {started.machines} machines" if started.machines > 1 else ""
    report.plan["training"] = (
        f"{counted(length.steps, 'step')}, {counted(length.epochs, 'epoch')}, "
        f"batch {sizes}{several}, "
        f"{args.mixed_precision or 'no'} mixed precision"
    )


# ---- Its modules ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Built:
    """The network that will be trained: numbers of each module, by kohya's name."""

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


def built(network: Any) -> Built:
    """How many numbers of each module of a network are trained."""
    modules: Counter[str] = Counter()
    for name, parameter in network.named_parameters():
        modules[name.split(".")[0]] += parameter.numel()
    return Built(dict(modules))


def count_by_trait(modules: list[str], known: dict[str, Trait]) -> str:
    """Modules in words: "80 content (output_blocks.0.1), 80 style (output_blocks.1.1)"."""
    groups: Counter[tuple[str, str]] = Counter()
    for module in modules:
        traits = [trait.name for trait in known.values() if trait.keeps(module)]
        groups[printable(" and ".join(traits)), block_of(module)] += 1
    if len(groups) > MANY_BLOCKS:
        return f"{len(modules)} in {len(groups)} blocks"
    counted = [f"{n} {t} ({b})" if t else f"{n} in {b}" for (t, b), n in groups.items()]
    return f"{len(modules)}: {', '.join(counted)}"


def plan_modules(network: Built, known: dict[str, Trait], report: Report) -> None:
    """Which modules are trained."""
    report.modules = list(network.modules)
    report.plan["modules"] = count_by_trait(report.modules, known)


# ---- Its size ------------------------------------------------------------------------------------


def bytes_trained(args: argparse.Namespace) -> int:
    """Bytes of a number of the LoRA while it is trained."""
    return 2 if args.full_fp16 or args.full_bf16 else 4


def file_bytes(network: Built, args: argparse.Namespace) -> int:
    """Bytes of a saved LoRA."""
    each = memory.BYTES.get(args.save_precision, bytes_trained(args))
    return network.parameters * each


def plan_rank(network: Built, args: argparse.Namespace, report: Report) -> None:
    """Rank, alpha, parameters and a file's size."""
    rank, alpha = args.network_dim, args.network_alpha
    told = f"{rank}, alpha {alpha:g}" if rank else f"as {args.network_module} has it"
    if args.dim_from_weights:
        told = f"as in {args.network_weights}"
    report.plan["rank"] = (
        f"{told}: {network.parameters:,} parameters, {file_size(file_bytes(network, args))} a file"
    )
    layers = layers_by_module()
    # Where rank (in + out) passes in x out, full matrices would be smaller and could do more.
    outgrown = [
        name
        for name, size in network.modules.items()
        if name in layers and size > math.prod(layers[name].shape)
    ]
    if outgrown:
        at = f"at rank {rank} " if rank and not args.dim_from_weights else ""
        report.notes.append(
            f"{at}the LoRA is larger than the matrix it changes in {len(outgrown)} of "
            f"{len(network.modules)} modules"
        )


# ---- Its memory ----------------------------------------------------------------------------------


def model_parts(args: argparse.Namespace) -> dict[str, float]:
    """Bytes of the models that stay on the card, each in its precision."""
    each = 4 if args.mixed_precision in (None, "no") else 2
    # sd-scripts before 0.10 has no --fp8_base_unet.
    unet_alone = getattr(args, "fp8_base_unet", False)
    unet_each = 1 if args.fp8_base or unet_alone else each
    text_each = 1 if args.fp8_base and not unet_alone else each
    parts = {f"U-Net in {8 * unet_each} bits": unet_each * memory.UNET}
    if not args.cache_text_encoder_outputs:
        parts["text encoders"] = text_each * memory.TEXT_ENCODERS
    if not args.cache_latents:
        parts["VAE"] = (4 if args.no_half_vae else each) * memory.VAE
    return parts


def backward(
    network: Built, args: argparse.Namespace, pixels: int, stops_early: bool
) -> memory.Backward:
    """What decides how much autograd holds."""
    return memory.Backward(
        network.blocks,
        stops_early and not network.trains_text,
        args.gradient_checkpointing,
        pixels,
        2 * network.parameters if bytes_trained(args) == 4 else 0,
    )


def plan_memory(
    network: Built,
    state: float | None,
    way_back: memory.Backward,
    args: argparse.Namespace,
    report: Report,
) -> None:
    """The card's memory as a sum of its parts; what is not known is named, and not in the sum."""
    lora = network.parameters * bytes_trained(args)
    parts = {**model_parts(args), "LoRA": lora, "gradients": lora}
    unknown = []
    optimizer = args.optimizer_type or "AdamW"
    if state is None:
        unknown.append(f"{optimizer} state")
    else:
        parts[f"{optimizer} state"] = lora * state
    hint = ""
    if args.mixed_precision in (None, "no") or not way_back.pixels:
        unknown.append("activations")
    else:
        parts["activations"] = kept = memory.activations(way_back)
        if way_back.checkpointing and way_back.stops_early:
            more = memory.activations(replace(way_back, checkpointing=False)) - kept
            hint = (
                " (without --gradient_checkpointing, which is BLORA_SAVE_MEMORY=0: "
                f"{file_size(more)} more)"
            )
    summands = [f"{file_size(size)} {part}" for part, size in parts.items()]
    summands += [f"{part} of unknown size" for part in unknown]
    total = file_size(sum(parts.values()))
    report.plan["memory"] = f"{total} at least, computed: {', '.join(summands)}{hint}"
    check_card(parts, way_back, args, report)


def check_card(
    parts: dict[str, float],
    way_back: memory.Backward,
    args: argparse.Namespace,
    report: Report,
) -> None:
    """A warning where the card has less memory than the sum."""
    card, total = memory.card(), sum(parts.values())
    if card is not None and total > card:
        room = card - total + parts.get("activations", 0)
        report.warnings.append(
            f"the card has {file_size(card)} of memory, and this training takes at least "
            f"{file_size(total)} (computed): {memory_advice(room, way_back, args)}"
        )


def memory_advice(room: float, way_back: memory.Backward, args: argparse.Namespace) -> str:
    """What to change, the cheapest first; `room` is what the card has for activations."""
    advice = {
        "set BLORA_SAVE_MEMORY to 1, or add --gradient_checkpointing": not way_back.checkpointing,
        "lower BLORA_RANK": (args.network_dim or 0) > SMALL_RANK,
        "add --cache_text_encoder_outputs": args.network_train_unet_only
        and not args.cache_text_encoder_outputs,
        "lower batch_size or resolution": room > 0 and way_back.pixels > 512 * 512,
    }
    return ", or ".join([text for text, helps in advice.items() if helps] or ["use a larger card"])


# ---- Its saves -----------------------------------------------------------------------------------


def saves(length: Length, args: argparse.Namespace, kind: str = "") -> int:
    """Files, or with "_state" states, that will be there before the last one."""

    def count(every: int | None, total: int) -> int:
        return total // every if every else 0

    def kept(unit: str) -> int | None:
        last = getattr(args, f"save_last_n_{unit}", None)
        return (kind and getattr(args, f"save_last_n_{unit}_state", None)) or last

    by_step = count(args.save_every_n_steps, length.steps)
    every_epochs = args.save_every_n_epochs
    if args.save_n_epoch_ratio:  # takes its place, in sd-scripts' train() after its network
        every_epochs = length.epochs // args.save_n_epoch_ratio or 1
    by_epoch = count(every_epochs, length.epochs - 1)
    if kept("steps") is not None:  # sd-scripts keeps those within this distance
        by_step = min(by_step, count(args.save_every_n_steps, kept("steps")) + 1)
    if kept("epochs") is not None:
        by_epoch = min(by_epoch, kept("epochs"))
    return by_step + by_epoch


def plan_saves(
    length: Length,
    network: Built,
    state: float | None,
    args: argparse.Namespace,
    report: Report,
) -> None:
    """The saves to come against the free space of the output folder."""
    output = Path(args.output_dir or ".")
    folder = next(
        parent for parent in (output.absolute(), *output.absolute().parents) if parent.is_dir()
    )
    size, number = file_bytes(network, args), saves(length, args) + 1
    free, total = shutil.disk_usage(folder).free, number * size
    told = f"{number} of {file_size(size)}"
    if args.save_state or getattr(args, "save_state_on_train_end", False):
        # A state holds the LoRA as it is trained, and what the optimizer keeps of it.
        each = network.parameters * bytes_trained(args) * (1 + (state or 0))
        states = (saves(length, args, "_state") if args.save_state else 0) + 1
        total += states * each
        told += f" and {states} states of {file_size(each)}"
    report.plan["saves"] = f"{told} in {output} ({file_size(free)} free)"
    earlier = output.glob(f"{glob.escape(args.output_name or 'last')}*.safetensors")
    overwritten = sum(file.stat().st_size for file in earlier)
    if total > free + overwritten:
        report.errors.append(
            f"{told} do not fit into the {file_size(free)} free at "
            f'"{folder}": make room, or raise --save_every_n_steps'
        )


# ---- All of it -----------------------------------------------------------------------------------


def known_traits(report: Report) -> dict[str, Trait]:
    """The traits, by which blocks are named; a training does without."""
    try:
        return load_traits(ROOT / "blora_traits.json")
    except BloraError as error:
        report.warnings.append(str(error))
        return {}


def plan(rehearsal: Rehearsal, started: Started, pixels: int, report: Report) -> None:
    """The training line by line; its largest batch has so many pixels."""
    args, batches = rehearsal.args, [dataset.batch_size for dataset in rehearsal.datasets]
    lasting = length(args, len(rehearsal.group), started.processes)
    plan_length(lasting, batches, started, args, report)
    if rehearsal.network is None:  # deepspeed wraps it
        return
    network = built(rehearsal.network)
    report.plan["network"] = args.network_module
    plan_modules(network, known_traits(report), report)
    plan_rank(network, args, report)
    way_back = backward(network, args, pixels, args.network_module == OUR_NETWORK)
    plan_memory(network, rehearsal.optimizer_state, way_back, args, report)
    if started.machine:
        report.plan["saves"] = "only on the first machine (--machine_rank=0)"
    else:
        plan_saves(lasting, network, rehearsal.optimizer_state, args, report)
