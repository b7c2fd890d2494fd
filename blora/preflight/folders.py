"""Pictures in trained folders that are not trained, or whose loss counts nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from blora.preflight.dataset import Folder
from blora.preflight.report import Report
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
