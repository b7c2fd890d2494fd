"""Folders of images, and the dataset config that names them: what is missing or not trained."""

from __future__ import annotations

import os
import re
from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blora.preflight.dataset import Folder
from blora.preflight.report import Report
from blora.preflight.trainer import own
from blora.text import first_few

# What a file is that holds a picture, by the end of its name or by its first bytes.
PICTURE_ENDINGS = frozenset(
    ".png .jpg .jpeg .jpe .jfif .pjpeg .webp .bmp .gif .apng .tif .tiff .avif .avifs .heic .heif "
    ".hif .jxl .jp2 .j2k .jpx .tga .psd .qoi .ppm .dng .cr2 .cr3 .nef .arw .raf .orf .rw2".split()
)
SIGNATURES = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8", b"BM")
NO_PICTURES = frozenset(".txt .caption .npz .json .toml .safetensors .csv .md .zip .db".split())
PLUGINS = {".avif": "pip install pillow-avif-plugin", ".jxl": "pip install pillow-jxl-plugin"}


@dataclass(frozen=True)
class LeftOut:
    """A picture that is not trained."""

    path: Path
    reason: str
    remedy: str


def is_picture(path: Path) -> bool:
    """Whether a file is a picture by its name or its first bytes."""
    if path.name.startswith(".") or not path.is_file():  # ._000.png is macOS' own, not a picture
        return False
    ending = path.suffix.lower()
    if ending in PICTURE_ENDINGS or ending in NO_PICTURES:
        return ending in PICTURE_ENDINGS
    try:
        with path.open("rb") as file:
            start = file.read(12)
    except OSError:
        return False
    return start.startswith(SIGNATURES) or start[8:12] == b"WEBP"


def left_out(folder: Folder) -> list[LeftOut]:
    """Pictures in a folder that the trainer does not read for the ending of their names."""
    endings = {path.suffix for path in folder.seen}
    pictures: list[LeftOut] = []
    for path in sorted(folder.path.iterdir()) if folder.caption_extension else ():
        if path in folder.seen or not is_picture(path):
            continue
        ending, plain = path.suffix, path.suffix.lower()
        reason = f"{ending} is not read" if ending else "no ending"
        if plain in endings | {".png", ".jpg", ".jpeg", ".webp", ".bmp"}:
            remedy = "write the ending in lower case"
        else:
            remedy = PLUGINS.get(plain, "save as .png or .jpg")
        pictures.append(LeftOut(path, reason, remedy))
    return pictures


def check_left_out(folder: Folder, report: Report) -> None:
    """A warning for the pictures of a folder that are not read, by what to do about them."""
    by_remedy: dict[str, list[str]] = {}
    for picture in left_out(folder):
        by_remedy.setdefault(picture.remedy, []).append(picture.path.name)
    for remedy, names in by_remedy.items():
        report.warnings.append(
            f'left out of "{folder.path}", unsupported file type: {first_few(names)}: {remedy}'
        )


def holds_pictures(folder: Path) -> bool:
    """Whether a folder itself holds a picture."""
    return folder.is_dir() and any(map(is_picture, folder.iterdir()))


def check_subfolders(folders: list[Folder], report: Report) -> None:
    """A warning for pictures in subfolders of a trained folder, which sd-scripts does not read."""
    trained = {folder.path.resolve() for folder in folders}
    for path in sorted({folder.path for folder in folders if folder.caption_extension}):
        inner = [
            item.name
            for item in sorted(path.iterdir())
            if item.resolve() not in trained and holds_pictures(item)
        ]
        if inner:
            report.warnings.append(
                f'pictures in subfolders of "{path}" are not trained, {first_few(inner)}: move '
                "them up, or add a [[datasets.subsets]] for each folder"
            )


def check_reg(folders: Iterable[Folder], report: Report) -> None:
    """Regularization pictures whose loss counts nothing."""
    idle = [folder for folder in folders if folder.is_reg and folder.loss_weight == 0]
    if not idle:
        return
    total, nothing = (
        sum(picture.repeats for folder in some for picture in folder.pictures)
        for some in (folders, idle)
    )
    report.warnings.append(
        f"{nothing} of {total} pictures an epoch have no effect, since prior_loss_weight is 0 and "
        f"is_reg is set for {first_few(dict.fromkeys(str(folder.path) for folder in idle))}: "
        "remove that folder, or give --prior_loss_weight=1"
    )


def check_folders(folders: Iterable[Folder], report: Report) -> None:
    """Every warning on folders."""
    there = [folder for folder in folders if folder.path.is_dir()]
    for folder in there:
        check_left_out(folder, report)
    check_subfolders(there, report)
    check_reg(folders, report)


# ---- The dataset config --------------------------------------------------------------------------

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


def check_config(args: Namespace, given: Mapping[str, Any], report: Report) -> None:
    """What a dataset config names that is missing or another project's, and what it overrides.

    A config that sd-scripts refuses is left to the rehearsal.
    """
    path, load = Path(args.dataset_config), own("load_user_config")
    try:
        config = load(args.dataset_config)
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
    if args.dataset_config:
        subsets = config_subsets(own("load_user_config")(args.dataset_config))
        report.warnings += passed_over(subsets, trained)
    elif args.train_data_dir:
        report.warnings += unnumbered(Path(args.train_data_dir))
