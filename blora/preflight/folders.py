"""Folders of images, and the dataset config that names them: what is missing or not trained."""

from __future__ import annotations

import os
import re
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blora.preflight.dataset import Folder
from blora.preflight.report import Report
from blora.preflight.trainer import own
from blora.text import counted, first_few

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
        if path in folder.seen | folder.uncached or not is_picture(path):
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


def check_surplus(folders: Iterable[Folder], report: Report) -> None:
    """Regularization pictures of which sd-scripts takes no more than there are others."""
    for folder in folders:
        unused = folder.seen - folder.too_small - {picture.path for picture in folder.pictures}
        if folder.is_reg and folder.loss_weight and unused:
            surplus = counted(len(unused), "regularization picture")
            report.warnings.append(
                f'sd-scripts leaves out {surplus} of "{folder.path}", since it takes no more than '
                "there are other pictures with repeats: raise num_repeats of those, or remove "
                f"{first_few(path.name for path in sorted(unused))}"
            )


def check_lists(folders: Iterable[Folder], report: Report) -> None:
    """Pictures that are not trained because of the file in which sd-scripts looks for them."""
    for folder in folders:
        if folder.uncached:
            names = first_few(path.name for path in sorted(folder.uncached))
            report.warnings.append(
                f'pictures are not trained, since cache_info is set and "{folder.cache}" does not '
                f"list them, {len(folder.uncached)} in all: {names}: delete that file"
            )
        if folder.replaced:
            report.warnings.append(
                f'{counted(folder.replaced, "picture")} of "{folder.metadata}" will not be '
                "trained, since another metadata_file of the dataset has the same names: put it "
                "into a [[datasets]] of its own"
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
    check_surplus(folders, report)
    check_lists(folders, report)


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
MASKS = "conditioning_data_dir"
CONFIG_NAMES = {"train_batch_size": "batch_size", "dataset_repeats": "num_repeats"}


Subset = dict[str, Any]


def config_datasets(config: Mapping[str, Any]) -> list[list[Subset]]:
    """The subsets of each dataset of a config; a key of an outer table counts unless the inner has
    it.
    """
    return [
        [{**config.get("general", {}), **table, **subset} for subset in table.get("subsets", [])]
        for table in config.get("datasets", [])
    ]


def config_subsets(config: Mapping[str, Any]) -> list[Subset]:
    """The subsets of all datasets of a config."""
    return [subset for dataset in config_datasets(config) for subset in dataset]


def image_folders(subsets: Iterable[Mapping[str, Any]]) -> list[str]:
    """Each folder that is named, once."""
    return list(dict.fromkeys(str(s["image_dir"]) for s in subsets if "image_dir" in s))


def check_missing(subsets: list[Subset], path: Path, report: Report) -> None:
    """Folders that do not exist: errors, unless the training has others."""
    folders = image_folders(subsets)
    missing = [folder for folder in folders if not Path(folder).is_dir()]
    has_others = len(missing) < len(folders) or any("metadata_file" in s for s in subsets)
    for folder in missing:
        (report.warnings if has_others else report.errors).append(
            f'no folder of images at "{folder}": correct image_dir in "{path}"'
        )


def check_mask_folders(
    args: Namespace, subsets: Iterable[Subset], path: Path, report: Report
) -> None:
    """Folders of masks that do not exist, by which the training ends at its first step."""
    folders = dict.fromkeys(str(s[MASKS]) for s in subsets if MASKS in s)
    for folder in folders:
        if getattr(args, "masked_loss", False) and not Path(folder).is_dir():
            report.errors.append(f'no folder of masks at "{folder}": correct {MASKS} in "{path}"')


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


def source(subset: Mapping[str, Any] | Any) -> str:
    """What names the pictures of a subset, of a config or of sd-scripts, as it is spelt there."""
    names = subset if isinstance(subset, Mapping) else vars(subset)
    return str(names.get("metadata_file") or names.get("image_dir") or "")


def why_skipped(subset: Mapping[str, Any], path: Path) -> str:
    """Why sd-scripts trains nothing of a subset, and what to do."""
    if subset.get("num_repeats", 1) < 1:
        return "num_repeats = 0): give it 1"
    if path.is_file():  # a metadata_file
        return "no pictures in it): list some there"
    if own("glob_images")(str(path), "*"):
        return "its pictures are all left out): lower skip_image_resolution or validation_split"
    if others := [other for other in sorted(path.iterdir()) if is_picture(other)]:
        names = first_few(other.name for other in others)
        return f"sd-scripts does not read {names}): save them as .png or .jpg"
    return "no pictures): put some there, or correct image_dir"


def passed_over(subsets: Iterable[Mapping[str, Any]], trained: Iterable[str]) -> list[str]:
    """Sentences on what one dataset of a config names and does not train, or only once.

    `trained` are the sources of the subsets that sd-scripts made of it.
    """
    subsets, made = list(subsets), Counter(trained)
    listed = Counter(source(s) for s in subsets if s.get("num_repeats", 1) >= 1)
    sentences = [
        f'"{name}" is listed {"twice" if times == 2 else f"{times} times"} in one dataset but '
        "counts once: use num_repeats to weight it"
        for name, times in listed.items()
        if made[name] == 1 < times
    ]
    for subset in subsets:
        path = Path(source(subset))
        if source(subset) and not made[source(subset)] and path.exists():
            sentences.append(f'"{path}" is skipped ({why_skipped(subset, path)}')
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
        # A config of several values means them.
        if other and len(other) == len(settings) and plain(name, value) != RECIPE.get(option):
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
    check_mask_folders(args, subsets, path, report)
    for option in ("train_data_dir", "reg_data_dir", "in_json"):
        if getattr(args, option, None):
            report.warnings.append(
                f"--{option} has no effect beside --dataset_config: remove one of the two"
            )


def check_skipped(args: Namespace, datasets: Iterable[Any], report: Report) -> None:
    """Folders that exist and are not trained; `datasets` are what sd-scripts made of the config."""
    if args.dataset_config:
        config = config_datasets(own("load_user_config")(args.dataset_config))
        for subsets, dataset in zip(config, datasets, strict=True):
            report.warnings += passed_over(subsets, map(source, dataset.subsets))
    elif args.train_data_dir and not getattr(args, "in_json", None):
        report.warnings += unnumbered(Path(args.train_data_dir))
