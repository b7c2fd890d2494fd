"""The sheet of --preview: what stands on it, how large it is, and where it may be written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image, ImageFont

from blora.preflight.dataset import Folder, Picture
from blora.preflight.images import Opened
from blora.preflight.preview import (
    FAINT,
    LONGEST_SIDE,
    MARK,
    MOST_PIXELS,
    PAPER,
    STYLES,
    Cell,
    Section,
    best_font,
    cell_of,
    check_sheet,
    draw_sheet,
    drawable,
    own_font,
    sections_of,
    thumbnail_side,
    wrap,
    write_preview,
)
from blora.text import BloraError

RED = (200, 30, 30)
FONT = own_font(15)


def make_dataset(
    folder: Path, count: int = 1, side: int = 320
) -> tuple[list[Folder], list[Opened]]:
    """A folder of red pictures with captions, and what was seen of them."""
    folder.mkdir(exist_ok=True)
    pictures, opened = [], []
    for number in range(count):
        path = folder / f"{number}.png"
        Image.new("RGB", (8, 8), RED).save(path)
        pictures.append(Picture(path, (8, 8), (1024, 1024), 1, "a dog", "a dog", 2, 5))
        red = Image.new("RGB", (side, side), RED)
        opened.append(Opened(path, (1024, 1024), (8, 8), thumbnail=red))
    seen = frozenset(picture.path for picture in pictures)
    return [Folder(folder, tuple(pictures), seen, caption_extension=".txt")], opened


def colours(sheet: Image.Image) -> dict[tuple[int, ...], int]:
    """How many pixels of the sheet have each colour."""
    return {colour: count for count, colour in sheet.getcolors(sheet.width * sheet.height)}


# ---- What stands on it ---------------------------------------------------------------------------


def test_a_picture_stands_there_with_its_name_bucket_repeats_and_caption(tmp_path):
    [folder], [looked] = make_dataset(tmp_path / "dogs")
    picture = replace(folder.pictures[0], size=(640, 480), repeats=3)
    cell = cell_of(picture, folder, looked)
    assert (cell.name, cell.detail) == ("0.png", "1024x1024 of 640x480, x3")
    assert (cell.kept, cell.cut, cell.alarm) == ("a dog", "", "")
    assert cell.thumbnail is looked.thumbnail


@pytest.mark.parametrize(
    ("prompt", "kept", "lines", "shown", "struck"),
    [
        ("a dog and a cat", 5, "", "a dog", "and a cat"),
        ("a dog", 5, "a dog\nand a cat\n", "a dog", "and a cat"),
        ("a dog and a cat", 5, "a dog and a cat\nand a bird", "a dog", "and a cat and a bird"),
        ("", 0, "\na dog", "(no words)", "a dog"),
    ],
)
def test_what_is_cut_off_a_caption_stands_there_struck_out(
    tmp_path, prompt, kept, lines, shown, struck
):
    [folder], [looked] = make_dataset(tmp_path / "dogs")
    (tmp_path / "dogs/0.txt").write_text(lines)
    picture = replace(folder.pictures[0], prompt=prompt, kept=kept)
    cell = cell_of(picture, folder, looked)
    assert (cell.kept, cell.cut) == (shown, struck)


def test_a_photo_that_is_stored_turned_says_so(tmp_path):
    [folder], [looked] = make_dataset(tmp_path / "dogs")
    turned = replace(looked, orientation=6)
    assert cell_of(folder.pictures[0], folder, turned).alarm == "stored turned (EXIF)"


def test_what_is_left_out_comes_last_with_its_reason(tmp_path):
    folders, opened = make_dataset(tmp_path / "dogs", 2)
    opened[1] = replace(opened[1], error="the file is empty")
    Image.new("RGB", (8, 8), RED).save(tmp_path / "dogs/z.gif")
    (tmp_path / "dogs/z.heic").write_bytes(b"")
    trained, lost = sections_of(folders, opened, 320)
    assert trained.title == f"{tmp_path / 'dogs'}: 1"
    assert [cell.name for cell in trained.cells] == ["0.png"]
    assert lost.title == "Left out: 3"
    reasons = {cell.name: (cell.alarm, cell.thumbnail is None) for cell in lost.cells}
    assert reasons == {
        "1.png": ("the file is empty", False),
        "z.gif": (".gif is not read", False),
        "z.heic": (".heic is not read", True),
    }


@pytest.mark.parametrize(
    ("is_reg", "reason"), [(True, "surplus regularization image"), (False, "kept for validation")]
)
def test_pictures_that_the_trainer_knows_and_does_not_take_are_left_out(tmp_path, is_reg, reason):
    [folder], opened = make_dataset(tmp_path / "dogs", 2)
    folder = replace(folder, pictures=folder.pictures[:1], is_reg=is_reg)
    _, lost = sections_of([folder], opened, 320)
    assert [(cell.name, cell.alarm) for cell in lost.cells] == [("1.png", reason)]


def test_the_picture_itself_is_drawn_in_its_size(tmp_path):
    folders, opened = make_dataset(tmp_path / "dogs")
    drawn = colours(draw_sheet(sections_of(folders, opened, 320)))
    assert drawn[RED] == 320 * 320


def test_a_thumbnail_that_is_too_large_for_its_sheet_is_made_smaller(tmp_path):
    folders, opened = make_dataset(tmp_path / "dogs", side=640)
    drawn = colours(draw_sheet(sections_of(folders, opened, 320)))
    assert drawn[RED] == 320 * 320


def test_a_line_goes_through_what_is_cut_off_and_through_nothing_else(tmp_path):
    [folder], [looked] = make_dataset(tmp_path / "dogs")
    cell = replace(cell_of(folder.pictures[0], folder, looked), detail="")
    faint = Image.new("RGB", (1, 1), FAINT).getpixel((0, 0))

    def longest(cell: Cell) -> int:
        """Pixels of that colour in the row of pixels that has the most."""
        sheet = draw_sheet([Section("dogs", (cell,))])
        rows = (sheet.crop((0, y, sheet.width, y + 1)) for y in range(sheet.height))
        return max(colours(row).get(faint, 0) for row in rows)

    assert longest(replace(cell, cut="and a cat")) >= int(FONT.getlength("and a cat"))
    assert longest(replace(cell, detail="and a cat")) < FONT.getlength("and a cat") / 2


# ---- Words ---------------------------------------------------------------------------------------


def test_words_are_wrapped_and_the_rest_is_dots():
    lines = wrap(FONT, "word " * 100, 320, 3)
    assert len(lines) == 3
    assert lines[-1].endswith("...")
    assert all(FONT.getlength(line) <= 320 for line in lines)


@pytest.mark.parametrize("text", ["x" * 500, "\u72ac" * 500])
def test_a_text_without_spaces_is_wrapped_too(text):
    lines = wrap(FONT, text, 320, 4)
    assert len(lines) == 4
    assert all(FONT.getlength(line) <= 320 for line in lines)


def test_what_moves_a_cursor_is_drawn_as_an_escape():
    assert wrap(FONT, "a\x1b[2Jb", 320, 1) == ["a\\x1b[2Jb"]


def test_pils_font_of_before_10_1_draws_what_it_can():
    old = ImageFont.load_default_imagefont()
    assert drawable(old, "caf\xe9 \u72ac") == "caf\xe9 ?"
    [line] = wrap(old, "caf\xe9 \u72ac", 320, 1)
    assert old.getlength(line) > 0


def test_a_font_of_the_system_is_taken_where_it_has_more_of_the_letters():
    try:
        ImageFont.truetype("DejaVuSans.ttf", 15)
    except OSError:
        pytest.skip("NOT RUN: this system has no DejaVuSans.ttf")
    assert best_font(["\u0441\u043e\u0431\u0430\u043a\u0430"], 15).getname()[0] != FONT.getname()[0]
    assert best_font(["a dog"], 15).getname() == FONT.getname()


# ---- Its size ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 30, 31, 150, 1000])
def test_any_number_of_pictures_makes_a_sheet_that_opens(tmp_path, count):
    [folder], [looked] = make_dataset(tmp_path / "dogs", side=thumbnail_side(count))
    cell = replace(
        cell_of(folder.pictures[0], folder, looked), kept="a dog, " * 20, cut="cat " * 20
    )
    sheet = draw_sheet([Section("dogs", (cell,) * count)])
    assert max(sheet.size) <= LONGEST_SIDE
    assert sheet.width * sheet.height <= MOST_PIXELS
    side = next(style for style in STYLES if count <= style.most).side
    assert colours(sheet)[RED] == count * side * side


def test_a_sheet_that_would_be_too_large_says_how_many_it_leaves_out(tmp_path, monkeypatch):
    monkeypatch.setattr("blora.preflight.preview.MOST_PIXELS", 1_000_000)
    [folder], [looked] = make_dataset(tmp_path / "dogs", side=96)
    cell = cell_of(folder.pictures[0], folder, looked)
    titles = []
    monkeypatch.setattr(
        "blora.preflight.preview.shortened", lambda font, text, width: titles.append(text) or text
    )
    sheet = draw_sheet([Section("dogs", (cell,) * 300), Section("cats", (cell,))])
    assert sheet.width * sheet.height <= 1_000_000
    drawn = colours(sheet)[RED] // 96**2
    assert 0 < drawn < 300
    assert f"dogs, {300 - drawn} of them not drawn" in titles


# ---- The file ------------------------------------------------------------------------------------


def test_the_sheet_is_a_jpeg_that_is_known_as_one_of_ours_and_alone(tmp_path):
    folders, opened = make_dataset(tmp_path / "dogs")
    sheet = tmp_path / "sheet.jpg"
    write_preview(sheet, folders, opened)
    with Image.open(sheet) as image:
        assert (image.format, image.info["comment"]) == ("JPEG", MARK)
        assert image.getpixel((0, 0)) == pytest.approx(
            Image.new("RGB", (1, 1), PAPER).getpixel((0, 0)), abs=2
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dogs", "sheet.jpg"]
    write_preview(sheet, folders, opened)  # over itself


REFUSED = {
    "another format": ("sheet.png", '--preview writes a JPEG, not "{}": end its name in .jpg'),
    "no folder": (
        "none/sheet.jpg",
        'no folder "{.parent}" for --preview: make it, or give another',
    ),
    "a photo": ("photo.jpg", '"{}" is not an earlier preview: give --preview another name'),
    "a text": ("text.jpg", '"{}" is not an earlier preview: give --preview another name'),
    "among the pictures": (
        "dogs/sheet.jpg",
        '"{}" would be saved among the pictures and trained: give --preview another folder',
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_sheet_is_not_written_over_anything_else(tmp_path, case):
    folders, opened = make_dataset(tmp_path / "dogs")
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.jpg")
    (tmp_path / "text.jpg").write_text("no picture")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    name, sentence = REFUSED[case]
    with pytest.raises(BloraError) as refusal:
        write_preview(tmp_path / name, folders, opened)
    assert str(refusal.value) == sentence.format(tmp_path / name)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


def test_the_name_can_be_checked_before_there_are_folders(tmp_path):
    check_sheet(tmp_path / "sheet.jpg")
    with pytest.raises(BloraError):
        check_sheet(tmp_path / "sheet.png")


def test_where_the_disk_is_full_there_is_a_sentence_and_no_half_sheet(tmp_path, monkeypatch):
    folders, opened = make_dataset(tmp_path / "dogs")

    def full(self, *args, **kwargs):
        Path(args[0]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(BloraError, match=r"cannot write .*No space left"):
        write_preview(tmp_path / "sheet.jpg", folders, opened)
    assert [path.name for path in tmp_path.iterdir()] == ["dogs"]
