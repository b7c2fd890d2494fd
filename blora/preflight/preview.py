"""--preview: a sheet of the pictures as the trainer sees them, resized and cropped by its own code.

Under each stand its name, its bucket, its repeats and its caption; what is cut off a caption is
struck out. The pictures that are left out come last, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from PIL import Image

from blora.preflight.captions import unread_lines
from blora.preflight.dataset import Folder
from blora.preflight.dataset import Picture as Trained
from blora.preflight.folders import left_out
from blora.preflight.opening import Opened, in_size
from blora.preflight.report import Report
from blora.sheet import Line, Picture, Section, make_thumbnail, thumbnail_limit, write_page
from blora.text import BloraError

TITLE = "The pictures as the trainer sees them"
UNSEEN = "The pictures that the trainer sees, which this sd-scripts could not be asked to open"
INTRO = Line(
    "Resized and cropped by sd-scripts itself. It does not train ", cut="what is struck out"
)


def trained_picture(picture: Trained, folder: Folder, opened: Opened | None) -> Picture:
    """A picture that is trained; `opened` is None where sd-scripts could not be asked."""
    end = 0 if folder.dropped_by else picture.kept
    kept, cut = picture.prompt[:end], picture.prompt[end:]
    stored = f" of {in_size(picture.size)}" if picture.size != picture.bucket else ""
    repeats = f", x{picture.repeats}" if picture.repeats != 1 else ""
    lines = [
        Line(f"{in_size(picture.bucket)}{stored}{repeats}", "detail"),
        Line(kept, cut=cut) if kept.strip() else Line("(no words) ", "note", cut),
        *(Line("", cut=line) for line in unread_lines(picture, folder)),
    ]
    if not opened:
        lines.insert(1, Line("not opened, as this sd-scripts cannot be asked", "alarm"))
    elif opened.change:
        lines.insert(1, Line(opened.change, "alarm"))
    if opened and opened.orientation != 1:
        lines.insert(1, Line("stored turned (EXIF)", "alarm"))
    return Picture(picture.path.name, opened.thumbnail if opened else None, tuple(lines))


def left_out_picture(path: Path, reason: str, limit: int) -> Picture:
    """A picture that is not trained, as far as PIL can show it."""
    thumbnail = None
    with suppress(Exception), Image.open(path) as image:  # PIL raises all kinds for a broken file
        thumbnail = make_thumbnail(image, limit)
    return Picture(path.name, thumbnail, (Line(reason, "alarm"),), is_out=True)


def reasons(folder: Folder) -> Iterator[tuple[Path, str]]:
    """The pictures of a folder that sd-scripts does not see, or does not take, with the reason."""
    yield from ((item.path, item.reason) for item in left_out(folder))
    trained = {picture.path for picture in folder.pictures}
    reason = "surplus regularization image" if folder.is_reg else "kept for validation"
    if listed_in := folder.metadata or folder.cache:
        reason = f"not in {listed_in.name}"
    for path in sorted((folder.seen | folder.uncached) - trained):
        yield path, "left out by skip_image_resolution" if path in folder.too_small else reason


def sections_of(folders: Iterable[Folder], opened: Iterable[Opened]) -> list[Section]:
    """Each folder, and then what is left out of all of them."""
    by_bucket = {(picture.path, picture.bucket): picture for picture in opened}
    sections, lost, trained = [], [], 0
    for folder in folders:
        pictures = []
        for picture in folder.pictures:
            seen = by_bucket.get((picture.path, picture.bucket))
            if seen and seen.error:
                lost.append((picture.path, seen.error))
            else:
                pictures.append(trained_picture(picture, folder, seen))
        sections.append(Section(f"{folder.name}{' (is_reg)' * folder.is_reg}", tuple(pictures)))
        trained += len(pictures)
        lost += reasons(folder)
    if not lost:
        return sections
    limit = thumbnail_limit(trained + len(lost))
    grey = tuple(left_out_picture(path, reason, limit) for path, reason in lost)
    return [*sections, Section("Left out", grey)]


def write_preview(
    sheet: Path, folders: Iterable[Folder], opened: Iterable[Opened], report: Report
) -> None:
    """Write the sheet, and say in the report what it shows, or why there is none."""
    sections = sections_of(folders, opened)
    trained = [p.thumbnail for section in sections for p in section.pictures if not p.is_out]
    drawn = len(trained) - trained.count(None)
    intro = INTRO if drawn else replace(INTRO, text="It does not train ")
    try:
        write_page(sheet, TITLE if drawn else UNSEEN, intro, sections)
    except BloraError as error:
        report.errors.append(str(error))
        return
    if 0 < drawn == len(trained):
        report.notes.append(f'"{sheet}" shows the pictures as the trainer will see them')
    else:
        report.warnings.append(
            f'"{sheet}" shows {drawn} of {len(trained)} pictures: pre-flight could not open the '
            "others as this release of sd-scripts does"
        )
