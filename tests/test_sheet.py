"""A sheet: its words, its thumbnails, where it may be written, and what a real browser shows of it.

The tests with a browser are slow, and need Chrome or Chromium with its chromedriver.
"""

from __future__ import annotations

import io
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blora import sheet
from blora.sheet import (
    Bar,
    Heading,
    Line,
    Picture,
    Section,
    first_column,
    heading_html,
    line_html,
    make_thumbnail,
    picture_html,
    words,
    write_page,
)
from blora.text import BloraError

INTRO = Line("An introduction")


def written(path: Path, *sections: Section) -> str:
    write_page(path, "A title", INTRO, sections)
    return path.read_text(encoding="utf-8")


def test_words_are_escaped_and_every_script_stays_as_it_is():
    expected = {
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
    assert {text: words(text) for text in expected} == expected


def test_words_are_escaped_wherever_they_stand(tmp_path):
    odd = "<i>\"'"
    line = Line(odd, "detail", odd)
    picture = Picture(odd, b"", (line, Bar(odd, 0.5)))
    section = Section(odd, (picture,), (Heading(odd, (odd,), odd),))
    write_page(tmp_path / "a.html", odd, line, [section, section])
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    # The title twice; of the introduction text and cut; of each section link and title; of its
    # column name, line and mark; of its picture the name twice, text, cut and bar.
    assert page.count(words(odd)) == 2 + 2 + 2 * (2 + 3 + 5)
    assert odd not in page


def test_a_picture_is_in_the_page_with_its_name_and_lines_whose_cut_is_deleted_text():
    lines = Line("a dog", cut=" and"), Line("it is empty", "alarm")
    assert picture_html(Picture("a.png", b"RIFF", lines, link="full/a.png")) == (
        '<figure><a class="mat" href="full/a.png">'
        '<img alt="a.png" decoding="async" src="data:image/webp;base64,UklGRg=="></a>\n'
        '<figcaption lang="">\n<p class="name" dir="auto">a.png</p>\n'
        '<p dir="auto">a dog<del> and</del></p>\n<p class="alarm" dir="auto">it is empty</p>\n'
        "</figcaption></figure>\n"
    )
    # Without a thumbnail there is an empty frame.
    assert picture_html(Picture("a.png", None, is_out=True)) == (
        '<figure class="out"><a class="mat"></a>\n'
        '<figcaption lang="">\n<p class="name" dir="auto">a.png</p>\n</figcaption></figure>\n'
    )


def test_a_heading_has_small_lines_below_its_name_and_a_mark_beside_it():
    assert heading_html(Heading("both")) == '<h3 dir="auto">both</h3>\n'
    lines = "output_blocks.0.1", "up_blocks.0.attentions.0"
    assert heading_html(Heading("OUT00", lines, "content")) == (
        '<h3 dir="auto">OUT00 <span class="mark">content</span>\n'
        "<small>output_blocks.0.<wbr>1</small>\n"
        "<small>up_blocks.0.<wbr>attentions.0</small></h3>\n"
    )


def test_a_bar_is_words_and_a_share_that_is_not_cut_to_fit():
    bar = '<p class="bar" style="--share: {}" dir="auto">colours</p>\n'
    expected = {0: "0", 0.42: "0.42", 2 / 3: "0.6667", 1e-9: "1e-09", 1: "1"}
    assert {share: line_html(Bar("colours", share)) for share in expected} == {
        share: bar.format(written) for share, written in expected.items()
    }
    for share in (-0.01, 1.01, float("nan")):
        with pytest.raises(ValueError, match=f"a bar's share is from 0 to 1, not {share}"):
            Bar("colours", share)


def test_the_first_column_is_a_picture_a_row_or_one_beside_several_rows():
    picture, headings = Picture("a.png", None), (Heading("a"),) * 3
    tall = replace(picture, rows=2)
    expected = {
        (): [],
        (picture,) * 6: [0, 3],
        (picture,) * 7: [0, 3, 6],
        (tall, *(picture,) * 4): [0],
        (tall, *(picture,) * 4, tall, *(picture,) * 4): [0, 5],
    }
    assert [list(first_column(Section("", p, headings))) for p in expected] == [*expected.values()]
    assert list(first_column(Section("", (picture,) * 3))) == []


def test_a_link_is_a_relative_path():
    expected = {
        "full/a b&c.png": "full/a%20b%26c.png",
        "../\u72ac.png": "../%E7%8A%AC.png",
        '"><script>': "%22%3E%3Cscript%3E",
        "javascript:alert(1)": "javascript%3Aalert%281%29",  # the name of a file, and no program
    }
    pages = {link: picture_html(Picture("a.png", None, link=link)) for link in expected}
    assert {link: re.findall('href="(.*?)"', pages[link])[0] for link in expected} == expected


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


def size(thumbnail: bytes) -> tuple[int, int]:
    image = Image.open(io.BytesIO(thumbnail))
    assert (image.format, image.mode) == ("WEBP", "RGB")
    return image.size


def test_a_thumbnail_is_the_best_that_fits_and_the_last_where_none_does():
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    image, limit = Image.fromarray(noise), 10**9
    shrunk = image.copy()
    for side, quality in ((480, 80), (320, 75), (240, 65), (160, 55), (96, 40)):
        thumbnail, drawn = make_thumbnail(image, limit), io.BytesIO()
        shrunk.thumbnail((side, side))
        shrunk.save(drawn, "WEBP", quality=quality)
        assert thumbnail == drawn.getvalue()
        assert make_thumbnail(image, len(thumbnail)) == thumbnail
        limit = len(thumbnail) - 1  # a byte too few for it
    assert make_thumbnail(image, limit) == thumbnail
    assert image.size == (512, 512)  # the image itself is not changed


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F"])
def test_an_image_of_any_kind_and_shape_makes_a_thumbnail(mode):
    for shape, drawn in {(30, 20): (30, 20), (1, 1): (1, 1), (9000, 30): (480, 2)}.items():
        assert size(make_thumbnail(Image.new(mode, shape), 10_000)) == drawn


def test_a_thousand_photos_take_less_than_20_mb_and_are_more_than_stamps(tmp_path):
    limits = {0: 60_000, 1: 60_000, 216: 60_000, 217: 59_907, 1000: 13_000, 10**9: 0}
    assert {pictures: sheet.thumbnail_limit(pictures) for pictures in limits} == limits
    random = np.random.default_rng(0)
    shapes = Image.fromarray(random.integers(0, 256, (12, 12, 3), np.uint8))
    soft = np.asarray(shapes.resize((1024, 1024), Image.Resampling.BICUBIC), np.float32)
    grain = random.normal(0, 24, soft.shape)  # as of a photo at ISO 3200
    photo = Image.fromarray((soft + grain).clip(0, 255).astype(np.uint8))
    assert size(make_thumbnail(photo, 13_000)) == (320, 320)
    picture = Picture("a.png", bytes(13_000), (Line("many words, " * 60),))
    assert len(written(tmp_path / "a.html", Section("photos", (picture,) * 1000))) < 20_000_000


def test_a_sheet_is_refused_where_anything_else_would_be_lost(tmp_path):
    (tmp_path / "other.html").write_text("<!DOCTYPE html>\n<title>my page</title>")
    (tmp_path / "late.html").write_text(f"{' ' * 1024}{sheet.MARK}")
    (tmp_path / "folder.html").mkdir()
    no_page = '--preview writes a web page, not "{}": end its name in .html'
    earlier = '"{}" is not an earlier sheet: give --preview another name'
    for name, sentence in {
        **dict.fromkeys(["sheet", "sheet.jpg"], no_page),
        "none/sheet.html": 'no folder "{.parent}" for --preview: create it, or choose another',
        **dict.fromkeys(["other.html", "late.html", "folder.html"], earlier),
    }.items():
        with pytest.raises(BloraError) as refusal:
            sheet.check_page(tmp_path / name, "--preview")
        assert str(refusal.value) == sentence.format(tmp_path / name)


def test_a_new_sheet_and_an_earlier_one_are_not_refused(tmp_path):
    for path in (tmp_path / "sheet.html", tmp_path / "SHEET.HTM"):
        sheet.check_page(path, "--preview")
        first = written(path, Section("dogs", ()))
        sheet.check_page(path, "--preview")
        assert written(path, Section("cats", ())) != first
    assert len(list(tmp_path.iterdir())) == 2


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


# ---- In a browser --------------------------------------------------------------------------------

SCRIPT = "<script>document.title='x'</script><img src=x onerror=\"document.title='x'\">"
CAPTIONS = {
    SCRIPT: "ltr",
    "\u0642\u0637\u0629 \u062d\u0645\u0631\u0627\u0621, a red cat": "rtl",
    "\u8d64\u3044\u732b\u3001\u767d\u3044\u80cc\u666f": "ltr",
    "\U0001f469\u200d\U0001f680 an astronaut": "ltr",
    "x" * 3000: "ltr",
}


SHARES = (0, 0.25, 2 / 3, 1)


def picture(number: int, *lines: Line | Bar, **more: object) -> Picture:
    image = Image.new("RGB", (64, 32), (40 * number, 80, 120))
    return Picture(f"{number}.png", make_thumbnail(image, 10_000), lines, **more)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """A page with every kind of line, picture and section."""
    path = tmp_path_factory.mktemp("sheet") / "sheet.html"
    pictures = [picture(n, Line(caption, cut=" cut")) for n, caption in enumerate(CAPTIONS)]
    kinds = [Line(kind, kind) for kind in ("detail", "alarm", "note")]
    bars = [Bar(f"colours {share:.2f}", share) for share in SHARES]
    pictures += [picture(5, *kinds, *bars, is_out=True), Picture("gone.png", None)]
    columns = tuple(picture(number, link=f"full/a b{number}.png") for number in range(8))
    marked = Heading("content", ("up_blocks.0.attentions.0",), "trained")
    headings = (Heading("without"), marked, Heading("style"), Heading("both"))
    sections = Section("<b>dogs</b>", tuple(pictures)), Section("side by side", columns, headings)
    written(path, *sections)
    return path


@pytest.mark.slow
def test_captions_are_words_in_every_script_and_what_is_cut_is_struck_out(browser, page):
    browser.open(page)
    shown = "[...document.querySelectorAll('figcaption p:last-child')].map(p => p.innerText)"
    assert browser.ask(shown)[: len(CAPTIONS)] == [f"{caption} cut" for caption in CAPTIONS]
    assert browser.ask("document.title") == "A title"
    assert browser.ask("document.querySelectorAll('b, script').length") == 0
    directions = shown.replace("p.innerText", "getComputedStyle(p).direction")
    assert browser.ask(directions)[: len(CAPTIONS)] == list(CAPTIONS.values())
    style = "getComputedStyle(document.querySelector('{}')).{}"
    assert browser.ask(style.format("del", "textDecorationLine")) == "line-through"
    assert browser.ask(style.format("p", "textDecorationLine")) == "none"
    assert "grayscale(1)" in browser.ask(style.format(".out img", "filter"))
    assert "grayscale" not in browser.ask(style.format("img", "filter"))


WIDTHS = "Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth)))"
CUT_OFF = "Math.max(...[...document.querySelectorAll('p')].map(p => p.scrollWidth - p.clientWidth))"
TOPS = "[...document.querySelectorAll('.grid')[{}].querySelectorAll('{}')].map(f => f.offsetTop)"


@pytest.mark.slow
@pytest.mark.parametrize(("width", "rows"), [(1100, [2, 2]), (360, [7, 2])])
def test_pictures_fill_the_window_and_columns_stay_columns(browser, page, width, rows):
    browser.open(page, width)
    assert browser.ask(WIDTHS) == [64] * 14
    assert browser.ask("document.documentElement.scrollWidth") == width
    assert browser.ask("document.documentElement.clientWidth") == width
    assert browser.ask(CUT_OFF) == 0
    assert [len(set(browser.ask(TOPS.format(n, "figure")))) for n in (0, 1)] == rows
    assert len(set(browser.ask(TOPS.format(1, "h3")))) == 1


def luminance(colour: str) -> float:
    """Of "rgb(1, 2, 3)", as WCAG 2 has it."""
    channels = [int(part) / 255 for part in colour.removeprefix("rgb(").rstrip(")").split(",")]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(c * weight for c, weight in zip(linear, (0.2126, 0.7152, 0.0722), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_can_be_read_on_a_light_and_on_a_dark_screen(browser, page, scheme):
    browser.open(page, scheme=scheme)
    paper = luminance(browser.ask("getComputedStyle(document.body).backgroundColor"))
    assert paper > 0.9 if scheme == "light" else paper < 0.02
    for element in (
        *("h1", "h2", "h3", "h3 small", ".mark", "p", ".name", ".detail", ".alarm", ".note"),
        *(".bar", "del", "small"),
    ):
        style = f"getComputedStyle(document.querySelector('{element}'))"
        behind = browser.ask(f"{style}.backgroundColor")
        below = paper if behind == "rgba(0, 0, 0, 0)" else luminance(behind)
        darker, lighter = sorted([below, luminance(browser.ask(f"{style}.color"))])
        assert (lighter + 0.05) / (darker + 0.05) > 4.5, element  # WCAG's level AA


@pytest.mark.slow
def test_a_bar_is_as_long_as_its_share_of_the_picture(browser, page):
    browser.open(page)
    bars = "[...document.querySelectorAll('.bar')].map(p => [p.clientWidth, {}])"
    after = "parseFloat(getComputedStyle(p, '::after').width)"
    widths = browser.ask(bars.format(after))
    assert [bar / full for full, bar in widths] == pytest.approx(SHARES, abs=0.01)
    mats = browser.ask("[...document.querySelectorAll('.out .mat')].map(m => m.offsetWidth)")
    assert {full for full, _ in widths} == set(mats)


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A page of thirty columns and ten rows, and one picture beside ten rows of twelve columns."""
    path = tmp_path_factory.mktemp("wide") / "sheet.html"
    lines = "output_blocks.0.1", "up_blocks.0.attentions.0"
    headings = tuple(Heading(f"column {number}", lines, "style") for number in range(30))
    one = picture(0, Bar("colours 0.42", 0.42), link="a.png")
    cells = tuple(replace(one, name=f"{row}, {c}") for row in range(10) for c in range(30))
    beside = (replace(one, name="beside", rows=10), *cells[: 10 * 11])
    written(path, Section("words " * 60, cells, headings), Section("b", beside, headings[:12]))
    return path


MATS = "[...document.querySelectorAll('.mat')].map(m => m.offsetWidth)"
# The left or upper edges of a section's pictures, in the page.
EDGES = "[...document.querySelectorAll('.grid')[{}].querySelectorAll('figure')].map(f => f.{})"


def shown_at(browser, *points: tuple[int, int]) -> list[str]:
    """What one sees at points of the window: the name of a heading or of a picture."""
    at = "document.elementFromPoint({}, {}).closest('h3, figure')"
    name = "(e => e?.querySelector('.name')?.innerText ?? e?.firstChild.data.trim())({})"
    return [browser.ask(name.format(at.format(*point))) for point in points]


@pytest.mark.slow
def test_many_columns_keep_a_least_width_and_words_stay_in_the_window(browser, wide):
    browser.open(wide, 1280)
    assert min(browser.ask(MATS)) == 128
    # No frame of a picture that is not in sight makes a row higher.
    assert browser.ask("document.querySelector('figure').offsetHeight") < 2 * 128
    words = "[...document.querySelectorAll('h1, body > p, nav, h2')]"
    edges = f"{words}.map(e => e.getBoundingClientRect()).map(b => [b.left, b.right <= 1248])"
    for x in (0, 1000, 10_000):
        browser.ask(f"window.scrollTo({x}, 0)")
        assert browser.ask(edges) == [[32, True]] * 5
    y = browser.ask(EDGES.format(0, "offsetTop"))[0]
    assert shown_at(browser, (1200, y + 9)) == ["0, 29"]
    browser.open(wide, 4800)  # there is room for all
    assert browser.ask("document.documentElement.scrollWidth") == 4800
    assert min(browser.ask(MATS)) > 140


@pytest.mark.slow
def test_headings_and_the_first_column_stay_in_sight_and_the_others_pass_under_them(browser, wide):
    browser.open(wide, 1280)
    row, column = 4, 10
    x = browser.ask(EDGES.format(0, "offsetLeft"))[column]
    y = browser.ask(EDGES.format(0, "offsetTop"))[row * 30]
    browser.ask(f"window.scrollTo({x - 400}, {y - 300})")
    assert shown_at(browser, (410, 310), (410, 10)) == [f"{row}, {column}", f"column {column}"]
    assert shown_at(browser, (5, 310), (150, 310), (162, 310)) == [f"{row}, 0"] * 3
    for step in range(0, 240, 30):  # whatever passes under the headings
        browser.ask(f"window.scrollTo({x - 400}, {y + step})")
        assert shown_at(browser, (5, 5), (150, 10), (162, 40)) == ["column 0"] * 3
        assert shown_at(browser, (410, 10)) == [f"column {column}"]


@pytest.mark.slow
def test_a_picture_beside_rows_stays_in_sight_both_ways(browser, wide):
    browser.open(wide, 1280)
    y = browser.ask(EDGES.format(1, "offsetTop"))[50]
    browser.ask(f"window.scrollTo(300, {y})")
    box = browser.ask("document.querySelector('figure div').getBoundingClientRect().toJSON()")
    assert (box["left"], box["top"]) == (32, 44)
    # Below it nothing shows of the others in its column.
    assert shown_at(browser, (150, 150), (150, 600)) == ["beside"] * 2


@pytest.mark.slow
def test_a_link_that_the_keyboard_comes_to_is_not_under_what_stays(browser, wide):
    browser.open(wide, 1280)
    x, y = (browser.ask(EDGES.format(0, side))[5 * 30 + 6] for side in ("offsetLeft", "offsetTop"))
    for left, top in ((20, 300), (400, 20)):  # under the first column, and under the headings
        browser.ask(f"window.scrollTo({x - left}, {y - top})")
        assert shown_at(browser, (left + 9, top + 9)) != ["5, 6"]
        browser.ask("document.querySelectorAll('.mat')[5 * 30 + 6].focus()")
        box = browser.ask("document.activeElement.getBoundingClientRect().toJSON()")
        assert shown_at(browser, (box["left"] + 9, box["top"] + 9)) == ["5, 6"]
        browser.ask("document.activeElement.blur()")


@pytest.mark.slow
def test_on_a_phone_many_columns_are_moved_inside_their_section(browser, wide):
    browser.open(wide, 360)
    assert browser.ask("document.documentElement.scrollWidth") == 360
    assert min(browser.ask(MATS)) == 112  # 7rem
    browser.ask("document.querySelector('.grid').scrollIntoView()")
    browser.ask("document.querySelector('.grid').scrollTo(1300, 900)")
    corner, heading, first, cell = shown_at(browser, (40, 10), (250, 10), (40, 400), (250, 400))
    row, column = map(int, cell.split(", "))
    assert (corner, heading, first) == ("column 0", f"column {column}", f"{row}, 0")
    assert (row > 2, column > 9) == (True, True)


@pytest.mark.slow
def test_among_a_thousand_pictures_the_last_is_found_by_its_caption_within_10_s(browser, tmp_path):
    captions = [Line(f"{'many words, ' * 60}photo {number}, last") for number in range(1000)]
    drawn = picture(0)
    pictures = tuple(replace(drawn, lines=(caption,)) for caption in captions)
    written(tmp_path / "a.html", Section("photos", pictures))
    start = time.perf_counter()
    browser.open(tmp_path / "a.html")
    assert browser.ask("window.find('photo 999, last')")
    last = browser.ask("document.images[999].getBoundingClientRect().toJSON()")
    assert 0 < last["bottom"] < 900
    assert time.perf_counter() - start < 10  # 1 on two cores
