"""What --base_weights merges into the models before the training, as the network module does it."""

from __future__ import annotations

import importlib
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from blora.preflight.report import Report
from blora.text import counted, first_few, span

# LyCORIS 3.2 to 4.1.3 take alpha / rank twice where they merge these.
SCALED_TWICE = ("LohaModule", "LokrModule")
SD_SCRIPTS_LORA = "networks.lora"
READ_BY_SD_SCRIPTS = ("lora_up.weight", "lora_down.weight", "alpha")


@dataclass
class Merged:
    """A file of --base_weights, and the strengths at which its modules were merged."""

    file: str
    multiplier: float  # that was asked for
    tensors: list[str]  # their names
    modules: dict[str, float] = field(default_factory=dict)

    @property
    def left_out(self) -> list[str]:
        """Modules of the file that were not merged."""
        names = dict.fromkeys(name.split(".")[0] for name in self.tensors if "." in name)
        return [name for name in names if name not in self.modules]


# ---- Asking the network module -------------------------------------------------------------------


def recording(lora: Any, merged: Merged) -> Callable[..., Any]:
    """A module's merge_to, which notes the strength: LyCORIS passes it, sd-scripts keeps it."""
    merge = lora.merge_to
    own = lora.scale if type(lora).__name__ in SCALED_TWICE else 1.0

    def merge_to(*args: Any, **options: Any) -> None:
        merge(*args, **options)
        numbers = [value for value in args if isinstance(value, int | float)]
        merged.modules[lora.lora_name] = float(own * (numbers or [lora.multiplier])[0])

    return merge_to


def watched(args: Namespace, record: list[Merged]) -> Any:
    """A context in which the network module adds to `record` what it merges.

    The functions' names are in the traceback of what it refuses (trainer_errors.toml).
    """
    network_module = importlib.import_module(args.network_module)
    create = network_module.create_network_from_weights

    def read_base_weights(multiplier: float, file: str, *models: Any, **options: Any) -> Any:
        network, weights = create(multiplier, file, *models, **options)
        # Those of a .pt file have numbers, unlike the models that they are added to.
        large = (n for n, tensor in weights.items() if getattr(tensor, "numel", int)() > 1)
        without = weights | {name: weights[name].to("meta") for name in large}
        loras = [*getattr(network, "unet_loras", ()), *getattr(network, "text_encoder_loras", ())]
        merge = network.merge_to

        def merge_base_weights(*models: Any, **options: Any) -> None:
            merged = Merged(file, multiplier, list(weights))
            for lora in loras:
                lora.merge_to = recording(lora, merged)
            merge(*models, **options)
            if hasattr(network, "unet_loras"):  # else nobody knows how it merges
                record.append(merged)

        network.merge_to = merge_base_weights
        return network, without

    def from_weights(*given: Any, **options: Any) -> Any:
        is_base = options.get("for_inference")  # the other is --dim_from_weights
        return (read_base_weights if is_base else create)(*given, **options)

    return mock.patch.object(network_module, "create_network_from_weights", from_weights)


# ---- What is said of it --------------------------------------------------------------------------


def check_numbers(args: Namespace, report: Report) -> None:
    """Multipliers for no file, and no file."""
    files, numbers = args.base_weights or [], args.base_weights_multiplier or []
    if args.base_weights == []:
        report.warnings.append("--base_weights names no file: name one, or remove it")
    elif len(numbers) > len(files):
        report.warnings.append(
            f"--base_weights_multiplier has {counted(len(numbers), 'number')} for "
            f"{counted(len(files), 'file')} of --base_weights: give one for each file"
        )


def check_what_is_merged(merged: Merged, module: str, report: Report) -> None:
    """Files of which nothing is merged, a part, or nothing of the U-Net."""
    name = f'--base_weights "{merged.file}"'
    left_out = merged.left_out
    if not merged.modules:
        report.warnings.append(
            f"{module} merges nothing of {name}: give an SDXL LoRA that it reads, such as a slice "
            "(blora_slicer.py --inspect shows what a file is)"
        )
    elif left_out:
        number = len(merged.modules)
        report.warnings.append(
            f"{module} merges {number} of {number + len(left_out)} modules of {name}, and not "
            f"{first_few(left_out)}: give a file that it reads whole, such as a slice"
        )
    elif not any(lora.startswith("lora_unet") for lora in merged.modules):
        report.warnings.append(
            f"{name} changes the text encoders alone, and nothing of the U-Net: give a slice of "
            "content, if content is meant"
        )


def check_how_it_is_merged(merged: Merged, module: str, report: Report) -> None:
    """A strength that is not the one asked for, and tensors that are not read."""
    name = f'--base_weights "{merged.file}"'
    strengths = {*merged.modules.values()}
    if strengths - {merged.multiplier}:
        cut = "at the strength that you want"
        if len(strengths) == 1 and all(strengths) and merged.multiplier:
            cut = f"with blora_slicer.py --alphas {merged.multiplier / max(strengths):g}"
        report.warnings.append(
            f"LyCORIS merges {name} at {span(strengths)}, not at {merged.multiplier:g}: cut it "
            f"{cut}, and leave --base_weights_multiplier out"
        )
    parts = [t.partition(".") for t in merged.tensors if module == SD_SCRIPTS_LORA]
    unread = {part for lora, _, part in parts if lora in merged.modules} - {*READ_BY_SD_SCRIPTS}
    if unread:
        report.warnings.append(
            f"{module} merges {name} without its {first_few(sorted(unread))}, which is not what "
            "was trained: use --network_module=lycoris.kohya or blora_network"
        )


def check_base_weights(
    record: list[Merged], trained: Iterable[str], args: Namespace, report: Report
) -> None:
    """Everything to be said of what is merged before `trained`, the network's modules."""
    check_numbers(args, report)
    for merged in record:
        check_what_is_merged(merged, args.network_module, report)
        check_how_it_is_merged(merged, args.network_module, report)
    again = {name for merged in record for name in merged.modules}.intersection(trained)
    if again:
        report.notes.append(
            f"{counted(len(again), 'module')} that will be trained are merged from --base_weights "
            "too: the LoRA will hold what the training adds, not what is merged"
        )
