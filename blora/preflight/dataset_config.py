"""What a dataset config, or --train_data_dir, names and sd-scripts does not train."""

from __future__ import annotations

import os
import re
from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from blora.preflight.folders import holds_pictures, is_picture
from blora.preflight.report import Report
from blora.text import first_few

# What both launchers give, so that a dataset config may say nothing of it, or something else.
RECIPE = {
    "resolution": (1024, 1024),
    "enable_bucket": True,
    "min_bucket_reso": 512,
    "bucket_reso_steps": 32,
    "random_crop": True,
    "caption_extension": ".txt",
}
CONFIG_NAMES = {"train_batch_size": "batch_size", "dataset_repeats": "num_repeats"}


def config_subsets(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The subsets of a dataset config; a key of an outer table counts unless the inner has it."""
    return [
        {**config.get("general", {}), **dataset, **subset}
        for dataset in config.get("datasets", [])
        for subset in dataset.get("subsets", [])
    ]


# ---- Its folders ---------------------------------------------------------------------------------


def image_folders(subsets: Iterable[Mapping[str, Any]]) -> list[str]:
    """Each folder that is named, once."""
    return list(dict.fromkeys(str(s["image_dir"]) for s in subsets if "image_dir" in s))


def check_missing(subsets: list[dict[str, Any]], path: Path, report: Report) -> None:
    """Folders that do not exist: errors, unless the training has others."""
    folders = image_folders(subsets)
    missing = [folder for folder in folders if not Path(folder).is_dir()]
    has_others = len(missing) < len(folders) or any("metadata_file" in s for s in subsets)
    for folder in missing:
        (report.warnings if has_others else report.errors).append(
            f'no folder of images at "{folder}": correct image_dir in "{path}"'
        )


def in_full(path: Path) -> Path:
    """The absolute path without "..", by its names alone: links are not followed."""
    return Path(os.path.normpath(path.absolute()))


def other_project(folders: Iterable[str], path: Path) -> str | None:
    """The first folder of another project, where no folder is of the config's own.

    A folder beside the config's is a project if it has a config of the same name.
    """
    own = in_full(path).parent
    others = []
    for folder in folders:
        parents = [in_full(Path(folder)), *in_full(Path(folder)).parents]
        if own in parents:
            return None
        beside = [parent for parent in parents if parent.parent == own.parent]
        others += [folder for project in beside if (project / path.name).is_file()]
    return others[0] if others else None


def passed_over(subsets: Iterable[Mapping[str, Any]], trained: Iterable[Path]) -> list[str]:
    """Sentences on the folders of a dataset config that exist and are not trained at all."""
    seen = {path.resolve() for path in trained}
    sentences, listed = [], set()
    for subset in subsets:
        folder = Path(str(subset.get("image_dir", "")))
        if folder in listed and "metadata_file" not in subset:
            sentences.append(
                f'"{folder}" is listed twice but counts once: use num_repeats to weight it'
            )
        listed.add(folder)
        if "image_dir" not in subset or folder.resolve() in seen or not folder.is_dir():
            continue
        if subset.get("num_repeats", 1) == 0:
            why = "num_repeats = 0): give it 1"
        elif others := [path for path in sorted(folder.iterdir()) if is_picture(path)]:
            names = first_few(path.name for path in others)
            why = f"sd-scripts does not read {names}): save them as .png or .jpg"
        else:
            why = "no pictures): put some there, or correct image_dir"
        sentences.append(f'"{folder}" is skipped ({why}')
    return sentences


def unnumbered(parent: Path) -> list[str]:
    """Sentences on folders of --train_data_dir that are skipped for their names."""
    return [
        f'"{folder}" is skipped, since its name does not begin with a number of repeats: '
        f'call it "1_{folder.name}"'
        for folder in sorted(parent.iterdir())
        if not re.match(r"\d+(_|$)", folder.name) and holds_pictures(folder)
    ]


# ---- Options beside it ---------------------------------------------------------------------------


def overridden(
    given: Mapping[str, Any], subsets: Iterable[Mapping[str, Any]], path: Path
) -> list[str]:
    """A sentence on options that do nothing, since the dataset config says otherwise.

    `given` holds the options of the command line alone. What the recipe gives is passed over.
    """

    def plain(name: str, value: Any) -> Any:
        if name == "resolution" and isinstance(value, str):
            value = [int(side) for side in value.split(",")]
        if isinstance(value, list | tuple):
            return tuple(value) if len(value) > 1 else (*value, *value)
        return (value, value) if name == "resolution" else value

    idle, lines = [], []
    for option, value in given.items():
        name = CONFIG_NAMES.get(option, option)
        settings = [plain(name, t[name]) for t in subsets if t.get(name) is not None]
        other = [item for item in settings if item != plain(name, value)]
        if other and plain(name, value) != RECIPE.get(option):
            idle.append(f"--{option}={shown(plain(name, value))}")
            lines += [f"{name} = {shown(item)}" for item in dict.fromkeys(other)]
    if not idle:
        return []
    return [
        f'{" and ".join(idle)} {"has" if len(idle) == 1 else "have"} no effect, since "{path}" has '
        f"{' and '.join(lines)}: change it there"
    ]


def shown(value: Any) -> str:
    """A setting's value as a config or a command line has it."""
    if isinstance(value, tuple):
        return ",".join(str(side) for side in dict.fromkeys(value))
    return str(value).lower() if isinstance(value, bool) else str(value)


# ---- All of it -----------------------------------------------------------------------------------


def check_config(args: Namespace, given: Mapping[str, Any], report: Report) -> None:
    """What a dataset config names that is missing or another project's, and what it overrides.

    A config that sd-scripts refuses is left to the rehearsal.
    """
    from library import config_util  # sd-scripts' own

    path = Path(args.dataset_config)
    try:
        config = config_util.load_user_config(args.dataset_config)
        subsets = config_subsets(config)
    except Exception:
        return
    check_missing(subsets, path, report)
    if folder := other_project(image_folders(subsets), path):
        report.warnings.append(
            f'"{path}" names the pictures of another project, "{folder}": change its image_dir'
        )
    report.warnings += overridden(given, subsets, path)
    for option in ("train_data_dir", "reg_data_dir", "in_json"):
        if getattr(args, option, None):
            report.warnings.append(
                f"--{option} has no effect beside --dataset_config: remove one of the two"
            )


def check_skipped(args: Namespace, trained: Iterable[Path], report: Report) -> None:
    """Folders that exist and are not trained; `trained` are those that are."""
    from library import config_util

    if args.dataset_config:
        subsets = config_subsets(config_util.load_user_config(args.dataset_config))
        report.warnings += passed_over(subsets, trained)
    elif args.train_data_dir:
        report.warnings += unnumbered(Path(args.train_data_dir))
