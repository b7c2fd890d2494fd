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
MANY_COLUMNS = 11  # from so many on they keep a least width, and the page scrolls sideways
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
class Bar:
    """Words that tell a number, over a thin bar that is a share of the width."""

    text: str
    share: float  # 0 to 1

    def __post_init__(self) -> None:
        """Refuse what no bar can show; it is not cut to fit."""
        if not 0 <= self.share <= 1:
            raise ValueError(f"a bar's share is from 0 to 1, not {self.share}")


@dataclass(frozen=True)
class Heading:
    """What stands over a column, in sight while one scrolls down."""

    name: str
    lines: tuple[str, ...] = ()  # small, below the name
    mark: str = ""  # a short word that stands out beside the name


@dataclass(frozen=True)
class Picture:
    """A thumbnail with its name and other words under it."""

    name: str
    thumbnail: bytes | None  # WebP; None draws an empty frame
    lines: tuple[Line | Bar, ...] = ()
    is_out: bool = False  # drawn grey
    link: str = ""  # a path, relative to the page, that a click opens
    rows: int = 1  # that a picture of a first column stands beside, in sight all along


@dataclass(frozen=True)
class Section:
    """Pictures under one title: as many a row as there is room for, or one in each column.

    The first column stays in sight where the others are scrolled sideways.
    """

    title: str
    pictures: tuple[Picture, ...]
    columns: tuple[Heading, ...] = ()


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


def line_html(line: Line | Bar) -> str:
    """A paragraph; each finds its own direction, as Arabic runs from the right."""
    if isinstance(line, Bar):
        share = f'style="--share: {line.share:.4g}"'
        return f'<p class="bar" {share} dir="auto">{words(line.text)}</p>\n'
    kind = f' class="{line.kind}"' if line.kind else ""
    cut = f"<del>{words(line.cut)}</del>" if line.cut else ""
    return f'<p{kind} dir="auto">{words(line.text)}{cut}</p>\n'


def heading_html(heading: Heading) -> str:
    """A column's heading, whose lines break as in "up_blocks.0." and "attentions.0"."""
    mark = f' <span class="mark">{words(heading.mark)}</span>' if heading.mark else ""
    lines = (re.sub(r"(?<=\d\.)", "<wbr>", words(line)) for line in heading.lines)
    below = "".join(f"\n<small>{line}</small>" for line in lines)
    return f'<h3 dir="auto">{words(heading.name)}{mark}{below}</h3>\n'


def picture_html(picture: Picture, is_first: bool = False) -> str:
    """A figure; `is_first` where it is in the first of several columns."""
    image = ""
    if picture.thumbnail is not None:
        source = f"data:image/webp;base64,{b64encode(picture.thumbnail).decode()}"
        image = f'<img alt="{words(picture.name)}" decoding="async" src="{source}">'
    link = f' href="{quote(picture.link, errors="surrogateescape")}"' if picture.link else ""
    lines = "".join(map(line_html, (Line(picture.name, "name"), *picture.lines)))
    # In which language a caption is written is not known.
    inside = f'<a class="mat"{link}>{image}</a>\n<figcaption lang="">\n{lines}</figcaption>'
    classes = " ".join(["first"] * is_first + ["out"] * picture.is_out)
    kind = f' class="{classes}"' if classes else ""
    if picture.rows > 1:  # a figure as high as these rows, in which what it shows stays in sight
        kind += f' style="--rows: {picture.rows}"'
        inside = f"<div>{inside}</div>"
    return f"<figure{kind}>{inside}</figure>\n"


def section_html(number: int, section: Section) -> Iterator[str]:
    """A heading, and the pictures in a grid."""
    yield f'<h2 id="s{number}" dir="auto">{titled(section)}</h2>\n'
    count = len(section.columns)
    wide = " wide" if count >= MANY_COLUMNS else ""
    columns = f' style="--columns: {count}"' if count else ""
    yield f'<div class="grid{wide}"{columns}>\n'
    yield from map(heading_html, section.columns)
    firsts = set(first_column(section))
    yield from (picture_html(p, n in firsts) for n, p in enumerate(section.pictures))
    yield "</div>\n"


def first_column(section: Section) -> Iterator[int]:
    """The places of the pictures in the first of a section's columns."""
    place = 0
    while section.columns and place < len(section.pictures):
        yield place
        place += 1 + section.pictures[place].rows * (len(section.columns) - 1)


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
