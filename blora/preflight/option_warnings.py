"""Options that the trainer accepts without a word, although they are most likely mistakes."""

from __future__ import annotations

import re
from argparse import Namespace
from importlib import metadata
from typing import Any

from blora.preflight.names import check_network_args
from blora.preflight.plan import MANY_BLOCKS, Built
from blora.preflight.rehearsal import Rehearsal
from blora.preflight.report import Report

LYCORIS_NETWORKS = ("lycoris.kohya", "blora_network")
SD_SCRIPTS_NETWORKS = "networks."
LYCORIS_TESTED = ("3.2.0.post2", "3.4.0", "4.1.3")
FITTING_PRESET = "preset=lycoris_presets/blora_content_style.toml"
# An optimizer that finds its own rate takes this as a factor, and 1 is meant. sd-scripts itself
# calls 0.1 and less too low for one; the others' usual rates are 1e-3 and less.
LOWEST_FACTOR, HIGHEST_RATE = 0.1, 0.1


def pairs(items: list[str] | None) -> dict[str, str]:
    """NAME=VALUE items, split at the first "=" as sd-scripts splits them."""
    return dict(item.partition("=")[::2] for item in items or [])


def check_network(network: Built, args: Namespace, report: Report) -> None:
    """No preset, one that does nothing, and an alpha above the rank."""
    if args.network_module in LYCORIS_NETWORKS and not args.dim_from_weights:
        check_preset(network, pairs(args.network_args).get("preset"), report)
        check_lycoris(report)
    elif args.network_module.startswith(SD_SCRIPTS_NETWORKS) and "preset" in pairs(
        args.network_args
    ):
        report.warnings.append(
            f"--network_module={args.network_module} takes no preset and trains "
            f"{len(network.modules)} modules: use lycoris.kohya or blora_network for a B-LoRA"
        )
    rank, alpha = args.network_dim, args.network_alpha
    if rank and alpha and alpha > rank:
        report.warnings.append(
            f"--network_alpha={alpha:g} with --network_dim={rank} makes the change "
            f"{alpha / rank:g} times as strong: give both the same, as BLORA_RANK does"
        )


def check_preset(network: Built, preset: str | None, report: Report) -> None:
    """All layers trained where two blocks were meant; LyCORIS' own "full" says so itself."""
    if preset is None:
        report.warnings.append(
            "--network_args have no preset, so LyCORIS trains all "
            f"{len(network.modules)} modules that it can: add {FITTING_PRESET}"
        )
    elif preset.endswith(".toml") and len(network.blocks) > MANY_BLOCKS:
        report.warnings.append(
            f'the preset "{preset}" trains {len(network.modules)} modules in '
            f"{len(network.blocks)} blocks of the U-Net: correct it, if two blocks are meant"
        )


def check_dora(network: Any, report: Report) -> None:
    """Modules whose DoRA LyCORIS creates and saves, and leaves out of its bypass form."""
    if any(getattr(m, "bypass_mode", False) and getattr(m, "wd", False) for m in network.modules()):
        report.warnings.append(
            "with bypass_mode=True LyCORIS trains no DoRA, although dora_wd=True asks for it: "
            "remove one of the two from --network_args"
        )


def check_lycoris(report: Report) -> None:
    """A release of LyCORIS that nothing here was run with."""
    try:
        version = metadata.version("lycoris_lora")
    except metadata.PackageNotFoundError:
        version = "unknown"
    if version not in LYCORIS_TESTED:
        tested = ", ".join(LYCORIS_TESTED)
        report.notes.append(f"LyCORIS {version} was not tested with this bundle; {tested} were")


def check_text_encoders(printed: str, network: Built, args: Namespace, report: Report) -> None:
    """The text encoders' modules of the preset that --network_train_unet_only leaves out.

    LyCORIS and sd-scripts' networks print how many they create.
    """
    created = sum(map(int, re.findall(r"for Text Encoder(?: \d)?: (\d+) modules", printed)))
    if created and not network.trains_text and args.network_train_unet_only:
        report.notes.append(
            f"{created} modules of the text encoders are not trained because of "
            "--network_train_unet_only, as the recipes intend"
        )


def check_rate(groups: list[dict[str, Any]], args: Namespace, report: Report) -> None:
    """A learning rate for another kind of optimizer; `groups` are the optimizer's own."""
    rates = [group.get("initial_lr", group["lr"]) for group in groups]
    rates = [rate for rate in rates if rate is not None]  # Adafactor may find its own
    if not rates:
        return
    optimizer = f"--optimizer_type={args.optimizer_type or 'AdamW'}"
    if any("d" in group for group in groups):  # its estimate of the rate, as Prodigy's are called
        if max(rates) <= LOWEST_FACTOR:
            report.warnings.append(
                f"{optimizer} finds its own learning rate, and {max(rates):g} times that is far "
                "too low: give --learning_rate=1"
            )
    elif max(rates) >= HIGHEST_RATE:
        report.warnings.append(
            f"a learning rate of {max(rates):g} is far too high for {optimizer}: give "
            "--learning_rate=1e-4, for example"
        )


def check_options(rehearsal: Rehearsal, report: Report) -> None:
    """Every warning that the options, the network and the optimizer give cause for."""
    args, printed = rehearsal.args, rehearsal.printed.getvalue()
    if rehearsal.network:
        network = Built(rehearsal.modules)
        check_network(network, args, report)
        check_dora(rehearsal.network, report)
        check_text_encoders(printed, network, args, report)
        # How any other module reads its arguments, nobody can tell; a file's network needs none.
        known = (*LYCORIS_NETWORKS, SD_SCRIPTS_NETWORKS)
        if args.network_module.startswith(known) and not args.dim_from_weights:
            check_network_args(rehearsal, report)
    optimizers = rehearsal.accelerator._optimizers
    check_rate([group for each in optimizers for group in each.param_groups], args, report)
