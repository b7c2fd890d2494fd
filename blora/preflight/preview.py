"""--preview: a sheet of the pictures as the trainer sees them, resized and cropped by its own code.

Under each stand its name, its bucket, its repeats and its caption; what is cut off a caption is
struck out. The pictures that are left out come last, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from blora.preflight.captions import unread_lines
from blora.preflight.dataset import Folder, Picture
from blora.preflight.folders import left_out
from blora.preflight.images import Opened, in_size
from blora.text import BloraError, printable, written_whole

MARK = b"B-LoRA preview"  # the JPEG comment by which an earlier sheet is known
PAPER, INK, FAINT, RULE, ALARM = "#fbfaf7", "#26262a", "#8d8b86", "#dcd9d2", "#c0392b"
# PIL takes an image of more pixels for an attack, and a JPEG has no side of more than 65,535.
MOST_PIXELS, LONGEST_SIDE = 85_000_000, 65_000
# Fonts with more letters than PIL's own, on Windows, macOS and Linux.
FONTS = (
    "DejaVuSans.ttf",
    "arial.ttf",
    "NotoSans-Regular.ttf",
    "Arial Unicode.ttf",
    "msyh.ttc",
    "msgothic.ttc",
    "malgun.ttf",
    "PingFang.ttc",
    "NotoSansCJK-Regular.ttc",
    "wqy-microhei.ttc",
    "DroidSansFallbackFull.ttf",
)
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


@dataclass(frozen=True)
class Style:
    """How large a sheet of so many pictures draws them; all in pixels but the lines."""

    most: int  # pictures
    side: int  # of a picture
    columns: int
    text: int  # height of letters
    kept_lines: int  # of a caption
    cut_lines: int

    @property
    def gap(self) -> int:
        """The room around a picture."""
        return self.side // 10

    @property
    def line(self) -> int:
        """From one line of text to the next."""
        return round(self.text * 1.35)


STYLES = (
    Style(30, 320, 4, 15, 9, 3),
    Style(150, 200, 8, 12, 6, 2),
    Style(1200, 144, 20, 11, 4, 2),
    Style(4000, 96, 32, 10, 2, 1),
)


@dataclass(frozen=True)
class Cell:
    """A picture of the sheet, with the words under it."""

    thumbnail: Image.Image | None
    name: str
    detail: str
    kept: str = ""  # of its caption
    cut: str = ""
    alarm: str = ""

    def fitting(self, side: int) -> Cell:
        """The same, with a picture of no more than so many pixels a side."""
        if self.thumbnail and max(self.thumbnail.size) > side:
            return replace(self, thumbnail=ImageOps.contain(self.thumbnail, (side, side)))
        return self

    def height(self, style: Style) -> int:
        """Pixels that the picture takes, or the frame in its place."""
        return self.thumbnail.height if self.thumbnail else style.side // 3


@dataclass(frozen=True)
class Section:
    """Pictures under one heading."""

    title: str
    cells: tuple[Cell, ...]


# ---- What the sheet says -------------------------------------------------------------------------


def thumbnail_side(pictures: int) -> int:
    """Pixels a side that thumbnails of so many pictures need."""
    return next((style for style in STYLES if pictures <= style.most), STYLES[-1]).side


def sections_of(folders: Iterable[Folder], opened: Iterable[Opened], side: int) -> list[Section]:
    """Each folder, and then what is left out of all of them."""
    found = {(picture.path, picture.bucket): picture for picture in opened}
    sections, lost = [], []
    for folder in folders:
        cells = []
        for picture in folder.pictures:
            looked = found.get((picture.path, picture.bucket))
            if looked and looked.error:
                lost.append(lost_cell(picture.path, looked.error, side))
            else:
                cells.append(cell_of(picture, folder, looked))
        kind = " (is_reg)" if folder.is_reg else ""
        sections.append(Section(f"{folder.path}{kind}: {len(cells)}", tuple(cells)))
        lost += lost_cells(folder, side)
    return sections + ([Section(f"Left out: {len(lost)}", tuple(lost))] if lost else [])


def cell_of(picture: Picture, folder: Folder, looked: Opened | None) -> Cell:
    """A picture that is trained."""
    kept, rest = picture.prompt[: picture.kept], picture.prompt[picture.kept :]
    turned = looked is not None and looked.orientation != 1
    cut_from = f" of {in_size(picture.size)}" if picture.size != picture.bucket else ""
    repeats = f", x{picture.repeats}" if picture.repeats != 1 else ""
    return Cell(
        looked.thumbnail if looked else None,
        picture.path.name,
        f"{in_size(picture.bucket)}{cut_from}{repeats}",
        kept.strip() or "(no words)",
        " ".join([rest, *unread_lines(picture, folder)]).strip(),
        "stored turned (EXIF)" if turned else "",
    )


def lost_cells(folder: Folder, side: int) -> Iterator[Cell]:
    """The pictures of a folder that sd-scripts does not see, or does not take."""
    for item in left_out(folder):
        yield lost_cell(item.path, item.reason, side)
    taken = {picture.path for picture in folder.pictures}
    for path in sorted(folder.seen - taken):
        reason = "surplus regularization image" if folder.is_reg else "kept for validation"
        yield lost_cell(path, reason, side)


def lost_cell(path: Path, reason: str, side: int) -> Cell:
    """A picture that is left out, as far as PIL can show it."""
    thumbnail = None
    with suppress(Exception), Image.open(path) as image:  # PIL raises all kinds for a broken file
        image.draft("RGB", (side, side))
        thumbnail = image.convert("RGB")
        thumbnail.thumbnail((side, side))
        paper = Image.new("RGB", thumbnail.size, PAPER)
        thumbnail = Image.blend(ImageOps.grayscale(thumbnail).convert("RGB"), paper, 0.5)
    return Cell(thumbnail, path.name, "", alarm=reason)


# ---- Text ----------------------------------------------------------------------------------------


def own_font(size: int) -> Font:
    """PIL's own font, which before Pillow 10.1 has one size."""
    try:
        return ImageFont.load_default(size)
    except TypeError:
        return ImageFont.load_default()


def missing_letters(font: Font, letters: Iterable[str]) -> int:
    """How many of the letters a font has no glyph for."""
    if not isinstance(font, ImageFont.FreeTypeFont):
        return sum(letter > "\xff" for letter in letters)
    nothing = bytes(font.getmask("\U0010ffff"))
    return sum(bytes(font.getmask(letter)) == nothing for letter in letters)


def best_font(texts: Iterable[str], size: int) -> Font:
    """PIL's own font, or the one of this system that has the most of the letters it has not."""
    best = own_font(size)
    letters = {c for text in texts for c in text if not c.isspace()}
    lacking = missing_letters(best, letters)
    for name in FONTS if lacking else ():
        with suppress(OSError):
            font = ImageFont.truetype(name, size)
            if (lacks := missing_letters(font, letters)) < lacking:
                best, lacking = font, lacks
    return best


def drawable(font: Font, text: str) -> str:
    """The text as a font can draw it: PIL's old one refuses what is not Latin."""
    if isinstance(font, ImageFont.FreeTypeFont):
        return text
    return text.encode("latin-1", "replace").decode("latin-1")


@lru_cache(100_000)
def width_of(font: Font, text: str) -> float:
    """Pixels that a text takes; captions begin alike."""
    return font.getlength(text)


def wrap(font: Font, text: str, width: int, most: int) -> list[str]:
    """A text in lines of so many pixels, no more than `most`; "..." stands for the rest."""
    lines = [""]
    for word in printable_words(font, text):
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if not lines[-1] or width_of(font, longer) <= width:
            lines[-1] = longer
        elif len(lines) == most:
            lines[-1] += " ..."
            break
        else:
            lines.append(word)
    return [shortened(font, line, width) for line in lines if line]


def printable_words(font: Font, text: str) -> Iterator[str]:
    """The words of a text; of languages without spaces, their letters by sixes."""
    for word in printable(drawable(font, " ".join(text.split()))).split(" "):
        step = 6 if len(word) > 30 else len(word) or 1
        yield from (word[i : i + step] for i in range(0, len(word), step))


def shortened(font: Font, text: str, width: int) -> str:
    """The text, with its end as "..." where it is too long for a line."""
    if font.getlength(text) <= width:
        return text
    text = text.removesuffix(" ...")
    while text and font.getlength(f"{text} ...") > width:
        text = text[:-1]
    return f"{text} ..."


# ---- Drawing -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A line of text under a picture."""

    text: str
    colour: str
    struck: bool = False


def lines_of(cell: Cell, style: Style, font: Font) -> list[Line]:
    """What stands under a picture, in lines."""
    name = shortened(font, printable(drawable(font, cell.name)), style.side)
    lines = [Line(name, INK)]
    for text, colour, most in (
        (cell.detail, FAINT, 1),
        (cell.alarm, ALARM, 3),
        (cell.kept, INK, style.kept_lines),
    ):
        lines += [Line(line, colour) for line in wrap(font, text, style.side, most)]
    cut = wrap(font, cell.cut, style.side, style.cut_lines)
    return lines + [Line(line, FAINT, struck=True) for line in cut]


@dataclass(frozen=True)
class Row:
    """Pictures beside each other with their words, or a heading."""

    height: int
    title: str = ""
    cells: tuple[tuple[Cell, list[Line]], ...] = ()
    pictures: int = 0  # the height of the tallest


def rows_of(sections: Iterable[Section], style: Style, font: Font) -> list[Row]:
    """The sheet from top to bottom."""
    rows = []
    for section in sections:
        rows.append(Row(3 * style.line, title=section.title))
        for start in range(0, len(section.cells), style.columns):
            shown = section.cells[start : start + style.columns]
            cells = tuple((cell, lines_of(cell, style, font)) for cell in shown)
            words = max(len(lines) for _, lines in cells) * style.line
            pictures = max(cell.height(style) for cell in shown)
            rows.append(Row(pictures + words + 2 * style.gap, "", cells, pictures))
    return rows


def attempts(count: int) -> Iterator[tuple[Style, int]]:
    """How to draw so many pictures, from the largest way to ever fewer of them."""
    for style in STYLES:
        if count <= style.most:
            yield style, count
    most = STYLES[-1].most
    while True:
        yield STYLES[-1], most
        most = most * 3 // 4


def draw_sheet(sections: list[Section]) -> Image.Image:
    """The sheet, with as many of the pictures as it can hold."""
    cells = [cell for section in sections for cell in section.cells]
    texts = [text for cell in cells for text in (cell.name, cell.kept, cell.cut)]
    texts += [section.title for section in sections]
    widest = max((len(section.cells) for section in sections), default=0)
    for style, most in attempts(len(cells)):
        style = replace(style, columns=max(2, min(widest, style.columns)))
        font = best_font(texts, style.text)
        heading = best_font(texts, round(1.4 * style.text))
        rows = rows_of(first(sections, most, style.side), style, font)
        width = style.columns * (style.side + style.gap) + style.gap
        height = sum(row.height for row in rows) + style.gap
        if height <= LONGEST_SIDE and width * height <= MOST_PIXELS:
            return draw_rows(rows, (width, height), style, font, heading)
    raise AssertionError("attempts() does not end")


def first(sections: list[Section], most: int, side: int) -> list[Section]:
    """The sections with the first so many pictures, so large; a heading says what is not drawn."""
    short = []
    for section in sections:
        cells = tuple(cell.fitting(side) for cell in section.cells[:most])
        most -= len(cells)
        more = len(section.cells) - len(cells)
        if cells or not more:
            title = f"{section.title}, {more} of them not drawn" if more else section.title
            short.append(Section(title, cells))
    return short


def draw_rows(
    rows: list[Row], size: tuple[int, int], style: Style, font: Font, heading: Font
) -> Image.Image:
    """The rows on one sheet."""
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    top, right = 0, size[0] - style.gap
    for row in rows:
        if row.title:
            title = shortened(heading, printable(drawable(heading, row.title)), right - style.gap)
            pen.text((style.gap, top + 0.8 * style.line), title, INK, heading)
            pen.line((style.gap, top + 2.5 * style.line, right, top + 2.5 * style.line), RULE)
        for number, (cell, lines) in enumerate(row.cells):
            left = style.gap + number * (style.side + style.gap)
            base = top + style.gap + row.pictures
            draw_picture(sheet, cell, (left, base), style)
            for line in lines:
                draw_line(pen, line, (left, base + style.gap // 3), style, font)
                base += style.line
        top += row.height
    return sheet


def draw_picture(sheet: Image.Image, cell: Cell, corner: tuple[int, int], style: Style) -> None:
    """A picture over its lower left corner, or an empty frame."""
    left, base = corner
    if cell.thumbnail:
        sheet.paste(cell.thumbnail, (left, base - cell.thumbnail.height))
    else:
        top = base - cell.height(style)
        ImageDraw.Draw(sheet).rectangle((left, top, left + style.side - 1, base - 1), None, RULE)


def draw_line(
    pen: ImageDraw.ImageDraw, line: Line, corner: tuple[int, int], style: Style, font: Font
) -> None:
    """A line of text, struck out if it is cut off."""
    pen.text(corner, line.text, line.colour, font)
    if line.struck:
        left, middle = corner[0], corner[1] + round(0.6 * style.text)
        pen.line((left, middle, left + font.getlength(line.text), middle), line.colour)


# ---- The file ------------------------------------------------------------------------------------


def check_sheet(sheet: Path, folders: Iterable[Path] = ()) -> None:
    """Refuse, as a BloraError, a name under which no sheet must be written.

    `folders` are those of the dataset, where it would be trained the next time.
    """
    if sheet.suffix.lower() not in (".jpg", ".jpeg"):
        raise BloraError(f'--preview writes a JPEG, not "{sheet}": end its name in .jpg')
    if not sheet.parent.is_dir():
        raise BloraError(f'no folder "{sheet.parent}" for --preview: make it, or give another')
    if sheet.exists() and not is_sheet(sheet):
        raise BloraError(f'"{sheet}" is not an earlier preview: give --preview another name')
    if sheet.resolve().parent in {folder.resolve() for folder in folders}:
        raise BloraError(
            f'"{sheet}" would be saved among the pictures and trained: give --preview another '
            "folder"
        )


def is_sheet(path: Path) -> bool:
    """Whether a file is an earlier sheet, and so may be written over."""
    with suppress(Exception), Image.open(path) as image:  # PIL raises all kinds for other files
        return image.info.get("comment") == MARK
    return False


def write_preview(sheet: Path, folders: list[Folder], opened: list[Opened]) -> None:
    """Write the sheet, whole or not at all; BloraError where that fails."""
    check_sheet(sheet, (folder.path for folder in folders))
    side = thumbnail_side(sum(len(folder.pictures) for folder in folders))
    image = draw_sheet(sections_of(folders, opened, side))
    with written_whole(sheet) as part:
        image.save(part, "JPEG", quality=88, optimize=True, comment=MARK)
