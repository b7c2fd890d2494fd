"""What sd-scripts leaves unsaid about a dataset: captions, folders and settings that do less than
they seem to.

Works on what images.py read from sd-scripts' own datasets, and on the files beside the
pictures. Only reads, and needs nothing but the standard library.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blora.preflight.report import Report
from blora.text import first_few

# What a file is that holds a picture, by the end of its name or by its first bytes.
PICTURE_ENDINGS = frozenset(
    ".png .jpg .jpeg .jpe .jfif .pjpeg .webp .bmp .gif .apng .tif .tiff .avif .avifs .heic .heif "
    ".hif .jxl .jp2 .j2k .jpx .tga .psd .qoi .ppm .dng .cr2 .cr3 .nef .arw .raf .orf .rw2".split()
)
SIGNATURES = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8", b"BM")
NO_PICTURES = frozenset(".txt .caption .npz .json .toml .safetensors .csv .md .zip .db".split())
CAPTION_ENDINGS = frozenset(".txt .caption .captions .cap .tag .tags".split())
PLUGINS = {".avif": "pip install pillow-avif-plugin", ".jxl": "pip install pillow-jxl-plugin"}
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


@dataclass(frozen=True)
class Picture:
    """A picture as the trainer holds it."""

    path: Path
    size: tuple[int, int]  # width and height that the trainer sorts it by
    bucket: tuple[int, int]  # width and height that it is trained in
    repeats: int
    caption: str  # what the trainer has read
    prompt: str  # what it trains: with prefix and suffix, one line of several
    tokens: int = 0
    kept: int = 0  # letters of the prompt that are within the limit of tokens


@dataclass(frozen=True)
class Folder:
    """One subset of a dataset, with the settings that decide on its captions."""

    path: Path
    pictures: tuple[Picture, ...]
    seen: frozenset[Path]  # every file that the trainer takes for a picture
    repeats: int = 1
    class_tokens: str = ""
    caption_extension: str = ""  # empty where a metadata_file lists pictures and captions
    has_wildcards: bool = False
    has_affix: bool = False  # caption_prefix or caption_suffix
    is_reg: bool = False
    loss_weight: float = 1.0  # prior_loss_weight, where is_reg
    most_tokens: int = 0  # 0 where it is unknown


@dataclass(frozen=True)
class LeftOut:
    """A picture that is not trained."""

    path: Path
    reason: str
    remedy: str


# ---- Captions ------------------------------------------------------------------------------------


def caption_path(picture: Path, extension: str) -> Path:
    """The caption file of a picture; the extension is put behind its name as it is."""
    return picture.with_name(picture.stem + extension)


def has_caption(picture: Picture, folder: Folder) -> bool:
    """Whether a picture has a caption of its own."""
    if folder.caption_extension and caption_path(picture.path, folder.caption_extension).is_file():
        return True
    return picture.caption != folder.class_tokens


def other_captions(pictures: Iterable[Picture], folder: Folder) -> list[str]:
    """Names of files that look like captions of these pictures, and that are not read."""
    beside: dict[str, list[str]] = {}
    for path in sorted(folder.path.iterdir()):
        if path.suffix.lower() in CAPTION_ENDINGS:
            beside.setdefault(path.stem, []).append(path.name)
    wanted = [name for p in pictures for name in dict.fromkeys((p.path.stem, p.path.name))]
    return [name for key in wanted for name in beside.get(key, [])]


def check_caption_files(folder: Folder, report: Report) -> None:
    """Pictures without a caption, and captions under a name that is not read."""
    missing = [picture for picture in folder.pictures if not has_caption(picture, folder)]
    if not missing or not folder.caption_extension:
        return
    count, extension = len(folder.pictures), folder.caption_extension
    others = other_captions(missing, folder)
    names = first_few(picture.path.name for picture in missing)
    without = f'{len(missing)} of {count} images in "{folder.path}" have no {extension} caption'
    instead = f'"{folder.class_tokens}", the class_tokens'
    if others:
        report.warnings.append(
            f"{without} and are trained {f'as {instead}' if folder.class_tokens else 'without one'}"
            f": {first_few(others)} {'is' if len(others) == 1 else 'are'} not read: rename to "
            f"{extension}, or correct caption_extension"
        )
    elif not folder.class_tokens:
        report.warnings.append(f"{without}: {names}")
    elif len(missing) < count:
        report.notes.append(f"{without} and are trained as {instead}: {names}")


def lines_of(picture: Picture, folder: Folder) -> list[str]:
    """The lines of a picture's caption file, none where it has no such file."""
    path = caption_path(picture.path, folder.caption_extension)
    if not folder.caption_extension or not path.is_file():
        return []
    return path.read_text(encoding="utf-8", errors="replace").split("\n")


def unread_lines(picture: Picture, folder: Folder) -> list[str]:
    """The lines of the caption file that the trainer passes over, without the blank ones."""
    lines = [] if folder.has_wildcards else lines_of(picture, folder)[1:]
    return [line.strip() for line in lines if line.strip()]


def check_caption_lines(folder: Folder, report: Report) -> None:
    """Captions of which only the first line is read, or whose first line is empty."""
    blank, longer = [], []
    for picture in folder.pictures:
        lines = lines_of(picture, folder)
        name = caption_path(picture.path, folder.caption_extension).name
        if lines and not picture.caption:
            blank.append(name)
        elif unread_lines(picture, folder):
            longer.append(name)
    if blank:
        report.warnings.append(
            "captions that begin with an empty line are trained as empty, "
            f'{len(blank)} in "{folder.path}": {first_few(blank)}: put the words on the first line'
        )
    if longer:
        report.warnings.append(
            "captions of several lines are trained with their first line alone, "
            f'{len(longer)} in "{folder.path}": {first_few(longer)}: make it one line, or set '
            "enable_wildcard = true, which draws a line at each step"
        )


def letters_kept(text: str, count: Callable[[str], int], most: int) -> int:
    """How many letters of a text make no more than `most` tokens, by halving."""
    if count(text) <= most:
        return len(text)
    low, high = 0, len(text)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(text[:middle]) <= most else (low, middle)
    return low


def check_caption_length(folder: Folder, report: Report) -> None:
    """Captions that are cut at the trainer's number of tokens."""
    cut = {p.path.name: p.tokens for p in folder.pictures if p.tokens > folder.most_tokens > 0}
    if not cut:
        return
    longest = max(cut.values())
    enough = next((most for most in (150, 225) if longest <= most), 0)
    names = first_few(f"{name} ({tokens})" for name, tokens in cut.items())
    report.warnings.append(
        f"captions are cut after {folder.most_tokens} tokens, {len(cut)} in "
        f'"{folder.path}": {names}: shorten them'
        + (f", or give --max_token_length={enough}" if enough else "")
    )


def check_affix(folder: Folder, report: Report) -> None:
    """A caption_prefix or caption_suffix that cached captions leave out."""
    if folder.has_affix and all(p.prompt == p.caption for p in folder.pictures):
        report.warnings.append(
            f'caption_prefix and caption_suffix of "{folder.path}" are not trained with '
            "--cache_text_encoder_outputs: write them into the captions"
        )


# ---- Folders -------------------------------------------------------------------------------------


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
    """Pictures that lie in a folder and that the trainer does not see, by the end of their name."""
    endings = {path.suffix for path in folder.seen}
    found: list[LeftOut] = []
    for path in sorted(folder.path.iterdir()) if folder.caption_extension else ():
        if path in folder.seen or not is_picture(path):
            continue
        ending, plain = path.suffix, path.suffix.lower()
        reason = f"{ending} is not read" if ending else "no ending"
        if plain in endings | {".png", ".jpg", ".jpeg", ".webp", ".bmp"}:
            remedy = "write the ending in lower case"
        else:
            remedy = PLUGINS.get(plain, "save as .png or .jpg")
        found.append(LeftOut(path, reason, remedy))
    return found


def check_left_out(folder: Folder, report: Report) -> None:
    """Pictures that are passed over for their ending, and those in folders of the folder."""
    by_remedy: dict[str, list[str]] = {}
    for picture in left_out(folder):
        by_remedy.setdefault(picture.remedy, []).append(picture.path.name)
    for remedy, names in by_remedy.items():
        report.warnings.append(
            f'left out of "{folder.path}", as sd-scripts does not read such endings: '
            f"{first_few(names)}: {remedy}"
        )


def holds_pictures(folder: Path) -> bool:
    """Whether a folder itself holds a picture."""
    return folder.is_dir() and any(map(is_picture, folder.iterdir()))


def check_below(folders: list[Folder], report: Report) -> None:
    """A warning of pictures in subfolders of a trained folder, which sd-scripts does not read."""
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


def check_reg(folders: list[Folder], report: Report) -> None:
    """Regularization pictures whose loss counts nothing."""
    idle = [folder for folder in folders if folder.is_reg and folder.loss_weight == 0]
    if not idle:
        return
    total, nothing = (
        sum(picture.repeats for folder in some for picture in folder.pictures)
        for some in (folders, idle)
    )
    report.warnings.append(
        f"{nothing} of {total} pictures an epoch train nothing, since prior_loss_weight is 0 and "
        f"is_reg is set for {first_few(dict.fromkeys(str(folder.path) for folder in idle))}: "
        "leave that folder out, or give --prior_loss_weight=1"
    )


def passed_over(subsets: Iterable[Mapping[str, Any]], trained: Iterable[Path]) -> list[str]:
    """Sentences on the folders of a dataset config that are not trained at all.

    `subsets` are the config's tables; a key of an outer table counts unless the inner has it.
    """
    seen = {path.resolve() for path in trained}
    sentences, named = [], set()
    for subset in subsets:
        folder = Path(str(subset.get("image_dir", "")))
        if folder in named and "metadata_file" not in subset:
            sentences.append(
                f'"{folder}" is listed twice but counts once: use num_repeats to weigh it'
            )
        named.add(folder)
        # The look names those that are not there.
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
    """Sentences on folders of --train_data_dir that are not trained, for want of a number."""
    return [
        f'"{folder}" is skipped, since its name does not begin with a number of repeats: '
        f'call it "1_{folder.name}"'
        for folder in sorted(parent.iterdir())
        if not re.match(r"\d+(_|$)", folder.name) and holds_pictures(folder)
    ]


def config_subsets(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The subsets of a dataset config, each with what its outer tables say."""
    return [
        {**config.get("general", {}), **dataset, **subset}
        for dataset in config.get("datasets", [])
        for subset in dataset.get("subsets", [])
    ]


def overridden(given: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> list[str]:
    """A sentence on options that do nothing, since the dataset config says otherwise.

    `given` holds the options of the command line with their values as argparse read them. What the
    recipe itself gives is no mistake of anybody's, and is passed over.
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
        said = [plain(name, t[name]) for t in config_subsets(config) if t.get(name) is not None]
        other = [item for item in said if item != plain(name, value)]
        if other and plain(name, value) != RECIPE.get(option):
            idle.append(f"--{option}={shown(plain(name, value))}")
            lines += [f"{name} = {shown(item)}" for item in dict.fromkeys(other)]
    if not idle:
        return []
    return [
        f'{" and ".join(idle)} {"does" if len(idle) == 1 else "do"} nothing, since "{path}" says '
        f"{' and '.join(lines)}: change it there"
    ]


def shown(value: Any) -> str:
    """A setting's value as a config or a command line has it."""
    if isinstance(value, tuple):
        return ",".join(str(side) for side in dict.fromkeys(value))
    return str(value).lower() if isinstance(value, bool) else str(value)


# ---- All of it -----------------------------------------------------------------------------------


def check_folders(folders: list[Folder], report: Report) -> None:
    """Every warning and note on captions and folders, into the report."""
    for folder in folders:
        if folder.path.is_dir():
            check_caption_files(folder, report)
            check_caption_lines(folder, report)
            check_caption_length(folder, report)
            check_affix(folder, report)
            check_left_out(folder, report)
    check_below([folder for folder in folders if folder.path.is_dir()], report)
    check_reg(folders, report)


def in_words(folders: Iterable[Folder]) -> str:
    """The folders for the plan: `12 in "cats" (x3), 5 in "dogs"`."""
    return ", ".join(
        f'{len(folder.pictures)} in "{folder.path}"'
        + (f" (x{folder.repeats})" if folder.repeats != 1 else "")
        + (" (is_reg)" if folder.is_reg else "")
        for folder in folders
    )
