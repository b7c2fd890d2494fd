"""Names of options and of network arguments that nobody reads, and that nobody complains of."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from blora.preflight.rehearsal import Rehearsal
from blora.preflight.report import Report
from blora.text import first_few, shortened

# What the kohya_ss GUI writes into its --config_file for itself, in any of its versions.
OF_THE_GUI = set(
    "additional_parameters blocks_to_swap epoch huber_scale lora_network_weights loraplus_lr_ratio "
    "loraplus_text_encoder_lr_ratio loraplus_unet_lr_ratio lowvram noise_offset_type "
    "stop_text_encoder_training use_wandb".split()
)
# A value of a network argument that asks for nothing: the GUI gives all of them, always.
OFF = {"", "0", "0.0", "false", "none"}
NEAR = 0.75  # of 1, which is the same name


def with_nearest(unknown: Iterable[str], known: Iterable[str]) -> str:
    """Names, each with the known one that is most likely meant, if any is near."""
    known = sorted(known)
    near = {name: get_close_matches(name.lower().strip("-"), known, 1, NEAR) for name in unknown}
    return first_few(f"{n} (for {near[n][0]}?)" if near[n] else n for n in near)


# ---- Options in a file ---------------------------------------------------------------------------


def check_file(rehearsal: Rehearsal, report: Report) -> None:
    """Settings of --config_file that are no options: argparse takes them into its Namespace."""
    args = rehearsal.args
    if not args.config_file:
        return
    script, file = Path(sys.argv[0]), f"{args.config_file}.toml"
    known = {action.dest for action in sys.modules[script.stem].setup_parser()._actions}
    if unknown := sorted(vars(args).keys() - known - OF_THE_GUI):
        report.warnings.append(
            f'"{shortened(file)}" has settings that {script.name} does not know: '
            f"{with_nearest(unknown, known)}: correct or remove them"
        )


# ---- Network arguments ---------------------------------------------------------------------------


class Name(str):
    """The name of a network argument: it is read if anybody looks it up, or takes it by name.

    A dict and a call with ** compare the names that they hold with the name that is asked for.
    """

    is_read = False
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        is_same = str.__eq__(self, other)
        if is_same is True and not isinstance(other, Name):
            self.is_read = True
        return is_same


class Item(str):
    """NAME=VALUE in --network_args, which sd-scripts splits into a dict's name and value."""

    def split(self, *how: Any) -> list[str]:
        first, *others = super().split(*how)
        self.name = Name(first)
        return [self.name, *others]


def watch_names(rehearsal: Rehearsal) -> None:
    """Let --network_args note what is read of them in the rehearsal."""
    args = rehearsal.args
    if args.network_args and all(isinstance(item, str) for item in args.network_args):
        args.network_args = [Item(item) for item in args.network_args]


def names_in_source(network: Any) -> Iterator[str]:
    """The names that the network's own modules look up in their arguments."""
    for module in {kind.__module__ for kind in type(network).__mro__}:
        if not module.startswith(("torch.", "builtins")):
            source = inspect.getsource(sys.modules[module])
            yield from re.findall(r"""kwargs(?:\.\w+\(|\[)\s*["'](\w+)["']""", source)


def check_network_args(rehearsal: Rehearsal, report: Report) -> None:
    """Network arguments that ask for something, and that the network has not read."""
    items = [item for item in rehearsal.args.network_args or () if hasattr(item, "name")]
    read = {str(item.name) for item in items if item.name.is_read}
    asking = [str(i.name) for i in items if i.partition("=")[2].strip().lower() not in OFF]
    # Of a preset that sd-scripts' own networks do not read, check_network says more.
    if unread := dict.fromkeys(name for name in asking if name not in {*read, "preset"}):
        report.warnings.append(
            f"--network_args has names that {shortened(rehearsal.args.network_module)} does not "
            f"read: {with_nearest(unread, names_in_source(rehearsal.network))}: correct or "
            "remove them"
        )
