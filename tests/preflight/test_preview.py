"""The sheet of --preview: what stands on it, and what the report says of it.

The page itself is tested in test_sheet.py and in a browser in test_sheet_browser.py.
"""

from __future__ import annotations

import html
import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from blora.preflight.dataset import Folder, Picture
from blora.preflight.images import Opened
from blora.preflight.preview import sections_of, trained_picture, write_preview
from blora.preflight.report import Report
from blora.sheet import Line

RED = (200, 30, 30)
THUMBNAIL = b"RIFF"


@pytest.fixture
def dogs(tmp_path) -> tuple[Folder, list[Opened]]:
    """A folder of two red pictures with captions, and both as they were opened."""
    folder = tmp_path / "dogs"
    folder.mkdir()
    pictures, opened = [], []
    for number in range(2):
        path = folder / f"{number}.png"
        Image.new("RGB", (8, 8), RED).save(path)
        pictures.append(Picture(path, (8, 8), (1024, 1024), 1, "a dog", "a dog", 2, 5))
        opened.append(Opened(path, (1024, 1024), (8, 8), thumbnail=THUMBNAIL))
    seen = frozenset(picture.path for picture in pictures)
    return Folder(folder, tuple(pictures), seen, caption_extension=".txt"), opened


def test_a_picture_stands_there_with_its_name_bucket_repeats_and_caption(dogs):
    folder, [opened, _] = dogs
    trained = replace(folder.pictures[0], size=(640, 480), repeats=3)
    picture = trained_picture(trained, folder, opened)
    assert (picture.name, picture.thumbnail) == ("0.png", THUMBNAIL)
    assert picture.lines == (Line("1024x1024 of 640x480, x3", "detail"), Line("a dog"))


def test_what_is_trained_as_it_is_and_once_says_no_more_than_its_size(dogs):
    folder, [opened, _] = dogs
    trained = replace(folder.pictures[0], size=(1024, 1024))
    assert trained_picture(trained, folder, opened).lines[0] == Line("1024x1024", "detail")


@pytest.mark.parametrize(
    ("prompt", "kept", "file", "shown"),
    [
        ("a dog and a cat", 5, "", [Line("a dog", cut=" and a cat")]),
        ("a dog", 5, "a dog\nand a cat\n", [Line("a dog"), Line("", cut="and a cat")]),
        ("doghouse", 3, "doghouse\na bird", [Line("dog", cut="house"), Line("", cut="a bird")]),
        ("", 0, "\na dog", [Line("(no words) ", "note"), Line("", cut="a dog")]),
    ],
)
def test_what_is_cut_off_a_caption_is_struck_out(dogs, prompt, kept, file, shown):
    folder, [opened, _] = dogs
    (folder.path / "0.txt").write_text(file)
    trained = replace(folder.pictures[0], prompt=prompt, kept=kept)
    assert list(trained_picture(trained, folder, opened).lines[1:]) == shown


def test_a_photo_that_is_stored_turned_says_so(dogs):
    folder, [opened, _] = dogs
    lines = trained_picture(folder.pictures[0], folder, replace(opened, orientation=6)).lines
    assert lines[1:] == (Line("stored turned (EXIF)", "alarm"), Line("a dog"))


def test_what_is_left_out_comes_last_grey_with_its_reason(dogs):
    folder, opened = dogs
    opened[1] = replace(opened[1], error="the file is empty")
    Image.new("RGB", (8, 8), RED).save(folder.path / "z.gif")
    (folder.path / "z.heic").write_bytes(b"")
    trained, lost = sections_of([folder], opened)
    assert (trained.title, lost.title) == (str(folder.path), "Left out")
    assert [(picture.name, picture.is_out) for picture in trained.pictures] == [("0.png", False)]
    assert all(picture.is_out for picture in lost.pictures)
    drawn = {p.name: (*p.lines, p.thumbnail is not None) for p in lost.pictures}
    assert drawn == {
        "1.png": (Line("the file is empty", "alarm"), True),
        "z.gif": (Line(".gif is not read", "alarm"), True),
        "z.heic": (Line(".heic is not read", "alarm"), False),
    }


@pytest.mark.parametrize(
    ("is_reg", "reason"), [(True, "surplus regularization image"), (False, "kept for validation")]
)
def test_pictures_that_the_trainer_knows_and_does_not_take_are_left_out(dogs, is_reg, reason):
    folder, opened = dogs
    trained, lost = sections_of(
        [replace(folder, pictures=folder.pictures[:1], is_reg=is_reg)], opened
    )
    assert trained.title == f"{folder.path}{' (is_reg)' if is_reg else ''}"
    [picture] = lost.pictures
    assert (picture.name, picture.lines) == ("1.png", (Line(reason, "alarm"),))


def test_one_picture_in_two_folders_is_drawn_in_each_as_it_is_trained_there(dogs):
    folder, [opened, _] = dogs
    [picture, _] = folder.pictures
    small = replace(picture, bucket=(512, 512))
    folders = [replace(folder, pictures=(picture,)), replace(folder, pictures=(small,))]
    seen = [opened, replace(opened, bucket=(512, 512), thumbnail=b"small")]
    first, second, *_ = sections_of(folders, seen)
    assert [s.pictures[0].thumbnail for s in (first, second)] == [THUMBNAIL, b"small"]


# ---- The sheet and the report --------------------------------------------------------------------


def preview(sheet: Path, folders: list[Folder], opened: list[Opened]) -> Report:
    report = Report()
    write_preview(sheet, folders, opened, report)
    return report


def test_the_sheet_shows_the_sections_and_the_report_says_so(dogs, tmp_path):
    folder, opened = dogs
    sheet = tmp_path / "sheet.html"
    (folder.path / "z.heic").write_bytes(b"")  # is left out, and cannot be drawn
    assert preview(sheet, [folder], opened) == Report(
        notes=[f'"{sheet}" shows the pictures as the trainer will see them']
    )
    page = sheet.read_text(encoding="utf-8")
    assert re.findall(r"<h2.*?>(.*) <small>(.*)</small>", page) == [
        (html.escape(str(folder.path)), "2"),
        ("Left out", "1"),
    ]
    assert page.count("data:image/webp;base64,UklGRg==") == 2


@pytest.mark.parametrize("shown", [0, 1])
def test_pictures_that_could_not_be_opened_are_not_said_to_be_shown(dogs, tmp_path, shown):
    """As with a release of sd-scripts that opens them in another way."""
    folder, opened = dogs
    sheet = tmp_path / "sheet.html"
    assert preview(sheet, [folder], opened[:shown]) == Report(
        warnings=[
            f'"{sheet}" shows {shown} of 2 pictures: pre-flight could not open the others as this '
            "release of sd-scripts does"
        ]
    )
    assert sheet.read_text(encoding="utf-8").count("a dog") == 2


def test_a_sheet_without_any_picture_is_not_said_to_show_them(tmp_path):
    report = preview(tmp_path / "sheet.html", [], [])
    assert (report.notes, len(report.warnings)) == ([], 1)


def test_a_sheet_that_cannot_be_written_is_an_error(dogs, tmp_path):
    folder, opened = dogs
    report = preview(tmp_path / "gone/sheet.html", [folder], opened)
    [error] = report.errors
    assert error.startswith(f"cannot write {tmp_path / 'gone/sheet.html'} (")
    assert (report.notes, report.warnings) == ([], [])
