"""A sheet: pictures with words under them, on one web page that needs nothing else.

The thumbnails are in the page as data: URIs. A Content-Security-Policy forbids scripts and whatever
would be loaded from elsewhere. Words are escaped, wrap, and are found by the browser's own search.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from blora.text import BloraError, printable, written_whole

if TYPE_CHECKING:
    from PIL import Image

MARK = '<meta name="generator" content="B-LoRA sheet">'  # by which an earlier sheet is known
MARK_WITHIN = 1024  # bytes from the start of the page
# Of all thumbnails: as base64 17.3 MB, which leaves 2.7 MB for the words of a page under 20 MB.
ALL_THUMBNAILS = 13_000_000
LARGEST_THUMBNAIL = 60_000  # bytes; a photo of 480 x 480 takes some 40,000
# Pixels a side and WebP quality, from the best to the least: some 1,000 bytes.
STEPS = ((480, 80), (320, 75), (240, 65), (160, 55), (96, 40))
# What HTML or UTF-8 cannot hold: control characters, and bytes of file names that are not UTF-8.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")

HEAD = f"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{MARK}
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark">
"""
STYLE = Path(__file__).with_suffix(".css")


@dataclass(frozen=True)
class Line:
    """Words under a picture; `cut` follows `text`, struck out."""

    text: str
    kind: str = ""  # "name", which a picture has by itself, "detail", "alarm" or "note"
    cut: str = ""


@dataclass(frozen=True)
class Picture:
    """A thumbnail with its name and other words under it."""

    name: str
    thumbnail: bytes | None  # WebP; None draws an empty frame
    lines: tuple[Line, ...] = ()
    is_out: bool = False  # drawn grey
    link: str = ""  # a path, relative to the page, that a click opens
    rows: int = 1  # of a section with columns that it stands beside, in sight all along


@dataclass(frozen=True)
class Section:
    """Pictures under one title: as many a row as there is room for, or one in each column."""

    title: str
    pictures: tuple[Picture, ...]
    columns: tuple[str, ...] = ()  # their headings


# ---- Thumbnails ----------------------------------------------------------------------------------


def thumbnail_limit(pictures: int) -> int:
    """Bytes for each thumbnail on a page of so many."""
    return min(LARGEST_THUMBNAIL, ALL_THUMBNAILS // max(pictures, 1))


def make_thumbnail(image: Image.Image, limit: int) -> bytes:
    """An image as WebP, in the best of STEPS that takes no more than `limit` bytes, or the last."""
    image.draft("RGB", 2 * STEPS[0][:1])  # a JPEG is then decoded at a fraction of its size
    image = image.convert("RGB")
    for side, quality in STEPS:
        image.thumbnail((side, side))
        file = BytesIO()
        image.save(file, "WEBP", quality=quality)
        if file.tell() <= limit:
            break
    return file.getvalue()


# ---- The page ------------------------------------------------------------------------------------


def words(text: str) -> str:
    """A text for HTML, in an element or an attribute."""
    return escape(CONTROLS.sub(lambda control: printable(control[0]), text))


def line_html(line: Line) -> str:
    """A paragraph; each finds its own direction, as Arabic runs from the right."""
    kind = f' class="{line.kind}"' if line.kind else ""
    cut = f"<del>{words(line.cut)}</del>" if line.cut else ""
    return f'<p{kind} dir="auto">{words(line.text)}{cut}</p>\n'


def picture_html(picture: Picture) -> str:
    """A figure."""
    image = ""
    if picture.thumbnail is not None:
        source = f"data:image/webp;base64,{b64encode(picture.thumbnail).decode()}"
        image = f'<img alt="{words(picture.name)}" decoding="async" src="{source}">'
    link = f' href="{quote(picture.link, errors="surrogateescape")}"' if picture.link else ""
    kind = ' class="out"' if picture.is_out else ""
    if picture.rows > 1:
        kind += f' style="--rows: {picture.rows}"'
    lines = "".join(map(line_html, (Line(picture.name, "name"), *picture.lines)))
    # In which language a caption is written is not known.
    return (
        f'<figure{kind}><a class="mat"{link}>{image}</a>\n'
        f'<figcaption lang="">\n{lines}</figcaption></figure>\n'
    )


def section_html(number: int, section: Section) -> Iterator[str]:
    """A heading, and the pictures in a grid."""
    yield f'<h2 id="s{number}" dir="auto">{titled(section)}</h2>\n'
    columns = f' style="--columns: {len(section.columns)}"' if section.columns else ""
    yield f'<div class="grid"{columns}>\n'
    yield from (f'<h3 dir="auto">{words(heading)}</h3>\n' for heading in section.columns)
    yield from map(picture_html, section.pictures)
    yield "</div>\n"


def titled(section: Section) -> str:
    """A section's title, with the number of its pictures where these are not in columns."""
    if section.columns:
        return words(section.title)
    return f"{words(section.title)} <small>{len(section.pictures)}</small>"


def page_html(title: str, intro: Line, sections: list[Section]) -> Iterator[str]:
    """The page from top to bottom; several sections are listed first."""
    style = STYLE.read_text(encoding="utf-8")
    yield f"{HEAD}<title>{words(title)}</title>\n<style>\n{style}</style>\n</head>\n"
    yield f"<body>\n<h1>{words(title)}</h1>\n"
    yield line_html(intro)
    if len(sections) > 1:
        links = (f'<a href="#s{i}">{titled(section)}</a>' for i, section in enumerate(sections))
        yield "<nav>\n{}\n</nav>\n".format("\n".join(links))
    for number, section in enumerate(sections):
        yield from section_html(number, section)
    yield "</body>\n</html>\n"


# ---- The file ------------------------------------------------------------------------------------


def check_page(path: Path, option: str) -> None:
    """Refuse, as a BloraError, a path at which an option must not write a sheet."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise BloraError(f'{option} writes a web page, not "{path}": end its name in .html')
    if not path.parent.is_dir():
        raise BloraError(f'no folder "{path.parent}" for {option}: create it, or choose another')
    if path.exists():
        with suppress(OSError), path.open("rb") as file:
            if MARK.encode() in file.read(MARK_WITHIN):
                return
        raise BloraError(f'"{path}" is not an earlier sheet: give {option} another name')


def write_page(path: Path, title: str, intro: Line, sections: Iterable[Section]) -> None:
    """Write a sheet, whole or not at all; BloraError where that fails."""
    with written_whole(path) as part, part.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(page_html(title, intro, list(sections)))
