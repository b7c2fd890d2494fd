"""The plan of a training: its length, modules, size and saves, from what the rehearsal built."""

from __future__ import annotations

import glob
import math
import shutil
from argparse import Namespace
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from blora import ROOT
from blora.preflight.memory import backward_pass, plan_memory
from blora.preflight.network import MANY_BLOCKS, Built, built, bytes_trained, file_bytes
from blora.preflight.processes import Started
from blora.preflight.rehearsal import Rehearsal
from blora.preflight.report import Report
from blora.sdxl import Trait, block_of, layers_by_module, load_traits
from blora.text import BloraError, counted, file_size, printable

OUR_NETWORK = "blora_network"  # LyCORIS' own, with a backward pass that ends early


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


def plan_length(
    length: Length, batches: list[int], started: Started, args: Namespace, report: Report
) -> None:
    """Steps, epochs, and what a step takes."""
    if length.steps < 1:
        option = "max_train_steps" if args.max_train_epochs is None else "max_train_epochs"
        report.errors.append(f"--{option}={getattr(args, option)} means zero steps: raise it")
    sizes = "/".join(str(size) for size in sorted(set(batches)))
    several = f" in each of {started.processes} processes" if started.processes > 1 else ""
    several += f" on {started.machines} machines" if started.machines > 1 else ""
    report.plan["training"] = (
        f"{counted(length.steps, 'step')}, {counted(length.epochs, 'epoch')}, "
        f"batch {sizes}{several}, "
        f"{args.mixed_precision or 'no'} mixed precision"
    )


# ---- Its modules ---------------------------------------------------------------------------------


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
        if name in layers and parameters > math.prod(layers[name].shape)
    ]
    if outgrown:
        at = f"at rank {rank} " if rank and not args.dim_from_weights else ""
        report.notes.append(
            f"{at}the LoRA is larger than the matrix it changes in {len(outgrown)} of "
            f"{len(network.modules)} modules"
        )


# ---- Its saves -----------------------------------------------------------------------------------


def saves(length: Length, args: Namespace, kind: str = "") -> int:
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
    args: Namespace,
    report: Report,
) -> None:
    """The saves to come against the free space of the output folder."""
    output = Path(args.output_dir or ".")
    folder = next(
        parent for parent in (output.absolute(), *output.absolute().parents) if parent.is_dir()
    )
    size, number = file_bytes(network, args), saves(length, args) + 1
    free, total = shutil.disk_usage(folder).free, number * size
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


# ---- All of it -----------------------------------------------------------------------------------


def known_traits(report: Report) -> dict[str, Trait]:
    """The traits, by which blocks are named; a training needs none."""
    try:
        return load_traits(ROOT / "blora_traits.json")
    except BloraError as error:
        report.warnings.append(str(error))
        return {}


def plan(rehearsal: Rehearsal, started: Started, pixels: int, report: Report) -> None:
    """Write the plan line by line; `pixels` are those of the largest batch."""
    args, batches = rehearsal.args, [dataset.batch_size for dataset in rehearsal.datasets]
    duration = length(args, len(rehearsal.group), started.processes)
    plan_length(duration, batches, started, args, report)
    if rehearsal.network is None:  # deepspeed wraps it
        return
    network = built(rehearsal.network)
    report.plan["network"] = args.network_module
    plan_modules(network, known_traits(report), report)
    plan_rank(network, args, report)
    backward = backward_pass(network, args, pixels, args.network_module == OUR_NETWORK)
    plan_memory(network, rehearsal.optimizer_state, backward, args, report)
    if started.machine:
        report.plan["saves"] = "only on the first machine (--machine_rank=0)"
    else:
        plan_saves(duration, network, rehearsal.optimizer_state, args, report)
