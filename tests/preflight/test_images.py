"""What pre-flight says of a picture, by what sd-scripts raises or what lies beside the file.

test_real_pictures.py has sd-scripts itself open them.
"""

from __future__ import annotations

import io
import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL
import pytest
from PIL import Image
from reports import reported

from blora.preflight import images
from blora.preflight.dataset import Folder, Picture
from blora.preflight.images import ORIENTATION, Opened, broken_pictures, open_one, read_size
from blora.preflight.report import Report
from blora.sheet import make_thumbnail

BUCKET = (8, 8)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The working directory, with a picture of 8 x 4."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 4)).save("a.png")
    return tmp_path


def opened(path: str, result: object, has_buckets: bool = True, limit: int = 0) -> Opened:
    """The picture, of which sd-scripts makes this array, or raises this."""

    def opener() -> object:
        if isinstance(result, Exception):
            raise result
        return result

    info = SimpleNamespace(absolute_path=path, bucket_reso=BUCKET)
    return open_one(info, has_buckets, opener, limit)


def test_a_picture_is_opened_with_its_size_and_on_request_a_thumbnail():
    array = np.zeros((8, 8, 3), np.uint8)
    assert opened("a.png", array) == Opened(Path("a.png"), BUCKET, (8, 4))
    thumbnail = make_thumbnail(Image.new("RGB", (8, 8)), 1000)
    assert opened("a.png", array, limit=1000).thumbnail == thumbnail


SMALL = AssertionError("image size is small / 画像サイズが小さい")
RE_SAVE = "re-save or remove it"
BUCKETS = "add --enable_bucket, or save it at the size of the resolution"


@pytest.mark.parametrize(
    ("error", "has_buckets", "text", "reason", "remedy"),
    [
        (SMALL, False, None, "image size is small, it is 8x4", BUCKETS),
        (SMALL, True, None, "image size is small, it is 8x4", RE_SAVE),
        (OSError("image file\nis cut"), False, None, "image file", RE_SAVE),
        (ValueError(), False, None, "ValueError", RE_SAVE),
        (PIL.UnidentifiedImageError(), True, None, "PIL cannot read it as a picture", RE_SAVE),
        (SMALL, True, "\n<!DOCTYPE html>", "it is a web page, not a picture", RE_SAVE),
        (ValueError(), True, "", "the file is empty", RE_SAVE),
        (ValueError(), True, " \n", "the file is empty", RE_SAVE),
    ],
)
def test_why_it_cannot_be_opened_is_told_with_the_remedy(error, has_buckets, text, reason, remedy):
    if text is not None:
        Path("a.png").write_text(text)
    [sentence] = broken_pictures([opened("a.png", error, has_buckets)] * 2)
    assert sentence == f'cannot open the picture "a.png" ({reason}): {remedy}'


def test_a_picture_that_is_gone_is_told_in_the_words_of_the_system():
    picture = opened("gone.png", ValueError("a"))
    assert (picture.size, picture.error) == ((0, 0), os.strerror(2))


def test_more_than_three_are_summed_up():
    pictures = [Opened(Path(f"{n}.png"), BUCKET, BUCKET, error="cut") for n in range(4)]
    assert len(broken_pictures(pictures[:3])) == 3
    assert broken_pictures(pictures) == [
        'cannot open 4 pictures, "0.png" (cut), "1.png" (cut), "2.png" (cut) and 1 more: '
        "re-save or remove them"
    ]


@pytest.mark.parametrize("ending", ["png", "jpg"])
@pytest.mark.parametrize("orientation", [None, *range(10)])
def test_a_photo_that_is_stored_turned_is_named(ending, orientation):
    exif = Image.Exif()
    if orientation is not None:
        exif[ORIENTATION] = orientation
    path = Path(f"b.{ending}")
    Image.new("RGB", (8, 4)).save(path, exif=exif)
    size, read = read_size(path)
    assert (size, read) == ((8, 4), 1 if orientation is None else orientation)
    pictures = [Opened(path, BUCKET, size, read), Opened(path, BUCKET, size, read, error="cut")]
    turned = (
        "photos are trained sideways, as the camera stored them, since sd-scripts does not turn "
        f"them by EXIF, 1 in all: b.{ending}: rotate them in an image editor and save"
    )
    warned = reported(images.check_upright, pictures).warnings
    assert warned == [turned] * (orientation in range(2, 9))
    assert reported(images.check_upright, pictures[1:]) == Report()


# ---- All of them ---------------------------------------------------------------------------------


@pytest.fixture
def open_all(monkeypatch):
    """open_pictures() of files and what opens each."""

    def run(*openers: object, stream: io.StringIO | None = None) -> list[Opened]:
        info = SimpleNamespace(absolute_path="a.png", bucket_reso=BUCKET)
        jobs = [(info, True, opener) for opener in openers]
        monkeypatch.setattr(images, "openers", lambda dataset, _cached: dataset)
        return images.open_pictures([jobs], True, stream)

    return run


def test_a_bar_shows_where_it_takes_more_than_a_second(open_all, capsys):
    quick, slow = (lambda: None), (lambda: time.sleep(1.1))
    stream = io.StringIO()
    assert len(open_all(quick, quick, stream=stream)) == 2
    assert stream.getvalue() == ""
    open_all(slow, quick, quick, stream=stream)
    assert "opening pictures: " in stream.getvalue()
    open_all(slow, quick, quick)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("error", [TypeError, AttributeError])
def test_a_call_that_fits_no_picture_is_an_error_of_the_call(open_all, error):
    def call() -> None:
        raise error("one argument more")

    def broken() -> None:
        raise KeyError

    assert [picture.is_api_mismatch for picture in open_all(call, broken)] == [True, False]
    with pytest.raises(TypeError, match=r"^one argument more$"):
        open_all(call, call)
    assert open_all() == []


# ---- What lies beside it -------------------------------------------------------------------------


def make_folder(size: tuple[int, int], **settings: object) -> Folder:
    picture = Picture(Path("a.png"), size, BUCKET, 1, "", "")
    return Folder(Path(), (picture,), frozenset([picture.path]), **settings)


@pytest.mark.parametrize(
    ("size", "beside", "leftover", "is_named"),
    [
        ((16, 8), "a_0016x0008_sdxl.npz", (), True),
        ((16, 8), "metadata_cache.json", (), True),
        ((8, 4), "a_0016x0008_sdxl.npz", (), False),
        ((16, 8), "b_0016x0008_sdxl.npz", (), False),
        ((16, 8), "a_0016x0008_sdxl.npz", {Path("a.png")}, False),  # its cache is trained
    ],
)
def test_a_size_that_is_taken_from_elsewhere_and_is_wrong_is_named(
    size, beside, leftover, is_named
):
    Path(beside).touch()
    report = reported(images.check_sizes, [make_folder(size)], [opened("a.png", None)], leftover)
    assert [": a.png (16x8, is 8x4): " in text for text in report.warnings] == [True] * is_named


@pytest.mark.parametrize(
    ("original", "latents", "age", "why"),
    [
        ((8, 4), (4, 2), 1, ""),
        ((8, 4), (4, 2), 0, ""),
        ((8, 4), (4, 2), -1, "older than the picture"),
        ((9, 4), (4, 2), 1, "of a picture of 9x4, not 8x4"),
        ((8, 4), (4, 3), 1, "of 24x32, not 16x32"),
    ],
)
def test_latents_of_another_picture_are_told_by_their_sizes_and_age(original, latents, age, why):
    np.savez("a.npz", original_size=np.array(original), latents=np.zeros((4, *latents)))
    os.utime("a.png", (1000, 1000))
    os.utime("a.npz", (1000 + age, 1000 + age))
    assert images.why_stale(Path("a.png"), Path("a.npz"), (8, 4), (16, 32)) == why


@pytest.mark.parametrize(
    ("extension", "age", "is_named"),
    [(".txt", -1, True), (".txt", 0, False), (".caption", -1, False), ("", -1, False)],
)
def test_outputs_that_are_older_than_the_caption_are_named(extension, age, is_named):
    for name, seconds in (("a.txt", 1000), ("a_te_outputs.npz", 1000 + age)):
        Path(name).touch()
        os.utime(name, (seconds, seconds))
    folder = make_folder(BUCKET, caption_extension=extension)
    warnings = reported(images.check_cached_captions, [folder]).warnings
    assert [" 1 in all: a_te_outputs.npz: " in text for text in warnings] == [True] * is_named
