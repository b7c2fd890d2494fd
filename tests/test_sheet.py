"""blora/sheet.py: a page's words, its thumbnails, and where it may be written.

What a browser makes of a page is in test_sheet_browser.py.
"""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blora.sheet import (
    ALL_THUMBNAILS,
    LARGEST_THUMBNAIL,
    MARK,
    STEPS,
    Line,
    Picture,
    Section,
    check_page,
    make_thumbnail,
    picture_html,
    thumbnail_limit,
    words,
    write_page,
)
from blora.text import BloraError

INTRO = Line("An introduction")


def written(path: Path, *sections: Section) -> str:
    write_page(path, "A title", INTRO, sections)
    return path.read_text(encoding="utf-8")


# ---- Words ---------------------------------------------------------------------------------------

WORDS = {
    "<script>alert(1)</script>": "&lt;script&gt;alert(1)&lt;/script&gt;",
    "\" onload='x' & <b>": "&quot; onload=&#x27;x&#x27; &amp; &lt;b&gt;",
    "&lt;": "&amp;lt;",
    "a\x1b[2Jb\x00\x7f\x9f": r"a\x1b[2Jb\x00\x7f\x9f",
    "not UTF-8: \udce9": r"not UTF-8: \udce9",  # as Python reads such a file name
    "two\nlines\tand a tab": "two\nlines\tand a tab",
    "\u72ac\u3000\u5b50\u72ac": "\u72ac\u3000\u5b50\u72ac",
    "\u0645\u06cc\u200c\u062e": "\u0645\u06cc\u200c\u062e",  # Persian, parted without a space
    "\U0001f469\u200d\U0001f680": "\U0001f469\u200d\U0001f680",  # joined to one astronaut
}


@pytest.mark.parametrize("text", WORDS, ids=ascii)
def test_words_are_escaped_and_every_script_stays_as_it_is(text):
    assert words(text) == WORDS[text]


def test_words_are_escaped_wherever_they_stand(tmp_path):
    odd = "<i>\"'"
    line = Line(odd, "detail", odd)
    section = Section(odd, (Picture(odd, b"", (line,)),), (odd,))
    write_page(tmp_path / "a.html", odd, line, [section, section])
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    # The title twice; of the introduction text and cut; of each section link, heading and column;
    # of its picture the name twice, text and cut.
    assert page.count(words(odd)) == 2 + 2 + 2 * (3 + 4)
    assert odd not in page


@pytest.mark.parametrize(
    ("line", "html"),
    [
        (Line("a dog"), '<p dir="auto">a dog</p>'),
        (Line("it is empty", "alarm"), '<p class="alarm" dir="auto">it is empty</p>'),
        (Line("a dog", cut=" and"), '<p dir="auto">a dog<del> and</del></p>'),
    ],
)
def test_a_line_finds_its_own_direction_and_its_cut_is_deleted_text(line, html):
    assert html in picture_html(Picture("a.png", None, (line,)))


def test_a_thumbnail_is_in_the_page_and_named():
    html = picture_html(Picture("a.png", b"RIFF"))
    assert '<figcaption lang="">\n<p class="name" dir="auto">a.png</p>\n</figcaption>' in html
    assert html.startswith('<figure><a class="mat"><img alt="a.png" decoding="async" src="data:')
    assert 'src="data:image/webp;base64,UklGRg=="' in html


def test_without_a_thumbnail_there_is_an_empty_frame():
    assert "<img" not in picture_html(Picture("a.png", None))


@pytest.mark.parametrize(
    ("link", "href"),
    [
        ("full/a b&c.png", "full/a%20b%26c.png"),
        ("../\u72ac.png", "../%E7%8A%AC.png"),
        ('"><script>', "%22%3E%3Cscript%3E"),
        ("javascript:alert(1)", "javascript%3Aalert%281%29"),  # the name of a file, and no program
    ],
)
def test_a_link_is_a_relative_path(link, href):
    assert f'<a class="mat" href="{href}">' in picture_html(Picture("a.png", None, link=link))


def test_several_sections_are_listed_first_each_with_its_number_of_pictures(tmp_path):
    picture = Picture("a.png", None)
    page = written(tmp_path / "a.html", Section("dogs", (picture,) * 3), Section("cats", ()))
    assert '<a href="#s0">dogs <small>3</small></a>\n<a href="#s1">cats <small>0</small>' in page
    assert '<h2 id="s1" dir="auto">cats <small>0</small></h2>' in page
    assert "<nav>" not in written(tmp_path / "a.html", Section("dogs", (picture,)))


def test_nothing_is_loaded_from_elsewhere_and_no_script_runs(tmp_path):
    page = written(tmp_path / "a.html", Section("dogs", (Picture("a.png", b"", link="b.png"),)))
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert f'http-equiv="Content-Security-Policy"\n  content="{policy}"' in page
    # A policy counts for what comes after it.
    assert page.index(policy) < page.index("<style>")
    assert not re.search(r"<script|<link|url\(|@import|https?:", page)
    assert re.findall(r'(?:src|href)="(?!data:)([^"]*)', page) == ["b.png"]


# ---- Thumbnails ----------------------------------------------------------------------------------


def noise(side: int) -> Image.Image:
    """The image that takes the most bytes."""
    pixels = np.random.default_rng(side).integers(0, 256, (side, side, 3), np.uint8)
    return Image.fromarray(pixels)


def opened(thumbnail: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(thumbnail))
    assert (image.format, image.mode) == ("WEBP", "RGB")
    return image


def test_a_thumbnail_is_the_best_that_fits():
    image, limit = noise(512), 10**9
    for side, _ in STEPS:
        thumbnail = make_thumbnail(image, limit)
        assert opened(thumbnail).size == (side, side)
        assert make_thumbnail(image, len(thumbnail)) == thumbnail
        limit = len(thumbnail) - 1  # a byte too few for it


def test_the_last_step_is_taken_where_none_fits():
    assert opened(make_thumbnail(noise(512), 0)).size == (96, 96)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F"])
def test_any_kind_of_image_makes_a_thumbnail(mode):
    assert opened(make_thumbnail(Image.new(mode, (30, 20)), 10_000)).size == (30, 20)


@pytest.mark.parametrize(("size", "drawn"), [((1, 1), (1, 1)), ((9000, 30), (480, 2))])
def test_any_shape_makes_a_thumbnail(size, drawn):
    assert opened(make_thumbnail(Image.new("RGB", size), 10_000)).size == drawn


def test_the_image_itself_is_not_changed():
    image = Image.new("RGB", (1000, 1000))
    make_thumbnail(image, 10_000)
    assert image.size == (1000, 1000)


@pytest.mark.parametrize(
    ("pictures", "limit"), [(0, 60_000), (1, 60_000), (216, 60_000), (1000, 13_000), (10**9, 0)]
)
def test_the_more_pictures_the_fewer_bytes_for_each(pictures, limit):
    assert thumbnail_limit(pictures) == limit
    assert (LARGEST_THUMBNAIL, ALL_THUMBNAILS) == (60_000, 13_000_000)


# ---- The file ------------------------------------------------------------------------------------

EARLIER = '"{}" is not an earlier sheet: give --preview another name'
REFUSED = {
    "sheet.jpg": '--preview writes a web page, not "{}": end its name in .html',
    "sheet": '--preview writes a web page, not "{}": end its name in .html',
    "none/sheet.html": 'no folder "{.parent}" for --preview: create it, or choose another',
    "other.html": EARLIER,
    "late.html": EARLIER,
    "folder.html": EARLIER,
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_sheet_is_refused_where_anything_else_would_be_lost(tmp_path, name):
    (tmp_path / "other.html").write_text("<!DOCTYPE html>\n<title>my page</title>")
    (tmp_path / "late.html").write_text(f"{' ' * 1024}{MARK}")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(BloraError) as refusal:
        check_page(tmp_path / name, "--preview")
    assert str(refusal.value) == REFUSED[name].format(tmp_path / name)


@pytest.mark.parametrize("name", ["sheet.html", "SHEET.HTML", "sheet.htm"])
def test_a_new_sheet_and_an_earlier_one_are_not_refused(tmp_path, name):
    check_page(tmp_path / name, "--preview")
    first = written(tmp_path / name, Section("dogs", ()))
    check_page(tmp_path / name, "--preview")
    assert written(tmp_path / name, Section("cats", ())) != first
    assert list(tmp_path.iterdir()) == [tmp_path / name]


def test_where_it_cannot_be_written_there_is_a_sentence_and_the_earlier_one_stays(tmp_path):
    path = tmp_path / "sheet.html"
    first = written(path, Section("dogs", ()))

    def failing():
        yield Section("cats", ())
        raise OSError(28, "No space left on device")

    with pytest.raises(BloraError, match=r"^cannot write .*sheet\.html \(.*No space left"):
        write_page(path, "A title", INTRO, failing())
    assert path.read_text(encoding="utf-8") == first
    assert list(tmp_path.iterdir()) == [path]
