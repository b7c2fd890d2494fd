"""A sheet in a real browser: its words, its pictures, light and dark, and a thousand of them."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from browser import Browser
from PIL import Image

from blora.preflight.captions import Folder
from blora.preflight.captions import Picture as Trained
from blora.preflight.images import Opened
from blora.preflight.preview import write_preview
from blora.preflight.report import Report
from blora.sheet import (
    Line,
    Picture,
    Section,
    make_thumbnail,
    thumbnail_limit,
    write_page,
)  # fmt: skip

pytestmark = pytest.mark.slow
SCRIPT = "<script>document.title='x'</script><img src=x onerror=\"document.title='x'\">"
CAPTIONS = {
    SCRIPT: "ltr",
    "\u0642\u0637\u0629 \u062d\u0645\u0631\u0627\u0621, a red cat": "rtl",
    "\u8d64\u3044\u732b\u3001\u767d\u3044\u80cc\u666f": "ltr",
    "\U0001f469\u200d\U0001f680 an astronaut": "ltr",
    "x" * 3000: "ltr",
}
SCHEMES = ("light", "dark")


def picture(number: int, *lines: Line, **more: object) -> Picture:
    image = Image.new("RGB", (64, 32), (40 * number, 80, 120))
    return Picture(f"{number}.png", make_thumbnail(image, 10_000), lines, **more)


@pytest.fixture(scope="module")
def sheet(tmp_path_factory) -> Path:
    """A page with every kind of line, picture and section."""
    path = tmp_path_factory.mktemp("sheet") / "sheet.html"
    kinds = [Line(kind, kind) for kind in ("detail", "alarm", "note")]
    pictures = [picture(n, Line(caption, cut=" cut")) for n, caption in enumerate(CAPTIONS)]
    others = picture(5, *kinds, is_out=True), Picture("gone.png", None)
    columns = [picture(number, link=f"full/a b{number}.png") for number in range(8)]
    write_page(path, "A title", Line("An introduction"), [
        Section("<b>dogs</b>", (*pictures, *others)),
        Section("side by side", tuple(columns), ("without", "content", "style", "both")),
    ])  # fmt: skip
    return path


def test_captions_are_words_in_every_script(browser: Browser, sheet):
    browser.open(sheet)
    shown = "[...document.querySelectorAll('figcaption p:last-child')].map(p => p.innerText)"
    assert browser.ask(shown)[: len(CAPTIONS)] == [f"{caption} cut" for caption in CAPTIONS]
    assert browser.ask("document.title") == "A title"
    assert browser.ask("document.querySelectorAll('b, script').length") == 0
    directions = shown.replace("p.innerText", "getComputedStyle(p).direction")
    assert browser.ask(directions)[: len(CAPTIONS)] == list(CAPTIONS.values())


def test_what_is_cut_is_struck_out_and_what_is_left_out_is_grey(browser: Browser, sheet):
    browser.open(sheet)
    style = "getComputedStyle(document.querySelector('{}')).{}"
    assert browser.ask(style.format("del", "textDecorationLine")) == "line-through"
    assert browser.ask(style.format("p", "textDecorationLine")) == "none"
    assert "grayscale(1)" in browser.ask(style.format(".out img", "filter"))
    assert "grayscale" not in browser.ask(style.format("img", "filter"))


def test_every_thumbnail_is_decoded(browser: Browser, sheet):
    browser.open(sheet)
    sizes = "Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth)))"
    assert browser.ask(sizes) == [64] * 14


@pytest.mark.parametrize("width", [1100, 360])
def test_nothing_is_wider_than_the_window(browser: Browser, sheet, width):
    browser.open(sheet, width)
    assert browser.ask("document.documentElement.scrollWidth") == width
    assert browser.ask("document.documentElement.clientWidth") == width
    right = (
        "Math.max(...[...document.querySelectorAll('p')].map(p => p.scrollWidth - p.clientWidth))"
    )
    assert browser.ask(right) == 0


@pytest.mark.parametrize("width", [1100, 360])
def test_columns_stay_columns_and_other_pictures_fill_the_width(browser: Browser, sheet, width):
    browser.open(sheet, width)
    tops = (
        "[...document.querySelectorAll('.grid')[{}].querySelectorAll('{}')].map(f => f.offsetTop)"
    )
    first, second = (len(set(browser.ask(tops.format(n, "figure")))) for n in (0, 1))
    assert (first, second) == ((2, 2) if width == 1100 else (7, 2))
    assert len(set(browser.ask(tops.format(1, "h3")))) == 1


def test_a_link_leads_to_the_full_picture_beside_the_page(browser: Browser, sheet):
    browser.open(sheet)
    link = browser.ask("document.querySelector('figure a[href]').href")
    assert link == (sheet.parent / "full/a b0.png").as_uri()


def luminance(colour: str) -> float:
    """Of "rgb(1, 2, 3)", as WCAG 2 has it."""
    channels = [int(part) / 255 for part in colour.removeprefix("rgb(").rstrip(")").split(",")]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(c * weight for c, weight in zip(linear, (0.2126, 0.7152, 0.0722), strict=True))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_words_can_be_read_on_a_light_and_on_a_dark_screen(browser: Browser, sheet, scheme):
    browser.open(sheet, scheme=scheme)
    paper = luminance(browser.ask("getComputedStyle(document.body).backgroundColor"))
    assert paper > 0.9 if scheme == "light" else paper < 0.02
    for element in ("h1", "h2", "p", ".name", ".detail", ".alarm", ".note", "del", "small"):
        colour = f"getComputedStyle(document.querySelector('{element}')).color"
        darker, lighter = sorted([paper, luminance(browser.ask(colour))])
        assert (lighter + 0.05) / (darker + 0.05) > 4.5, element  # WCAG's level AA


def test_nothing_is_loaded_from_elsewhere(browser: Browser, sheet):
    browser.open(sheet)
    page, *others = browser.requests()
    assert page == sheet.as_uri()
    assert {url.partition(":")[0] for url in others} == {"data"}


def test_the_page_itself_forbids_scripts_and_pictures_from_elsewhere(browser: Browser, sheet):
    """Also where a caption should find a way to become a part of the page."""
    Image.new("RGB", (8, 8)).save(sheet.parent / "other.png")
    browser.open(sheet)
    blocked = browser.ask("""new Promise(resolve => {
      const found = [];
      document.addEventListener("securitypolicyviolation", event => {
        found.push(event.effectiveDirective);
        if (found.length == 2) resolve(found.sort());
      });
      setTimeout(() => resolve(found), 2000);
      document.body.insertAdjacentHTML("beforeend", arguments[0]);
    })""", SCRIPT.replace("src=x", "src=other.png"))  # fmt: skip
    assert blocked == ["img-src", "script-src-attr"]
    assert browser.ask("document.title") == "A title"


# ---- A thousand pictures -------------------------------------------------------------------------


def photo(number: int) -> Image.Image:
    """Soft shapes with the grain of a photo at ISO 3200, 1024 x 1024."""
    random = np.random.default_rng(number)
    shapes = Image.fromarray(random.integers(0, 256, (12, 12, 3), np.uint8))
    soft = np.asarray(shapes.resize((1024, 1024), Image.Resampling.BICUBIC), np.float32)
    grain = random.normal(0, 24, soft.shape).astype(np.float32)
    return Image.fromarray((soft + grain).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def thousand(tmp_path_factory) -> Path:
    """A preview of a thousand photos, of which 40 are alike, with captions of 75 tokens."""
    folder, report = tmp_path_factory.mktemp("thousand"), Report()
    limit = thumbnail_limit(1000)
    photos = [make_thumbnail(photo(number), limit) for number in range(25)]
    trained, seen = [], []
    for number in range(1000):
        path, caption = folder / f"{number}.png", f"{'many words, ' * 60}photo {number}, last"
        trained.append(Trained(path, (512, 512), (512, 512), 1, caption, caption, 75, 400))
        seen.append(Opened(path, (512, 512), (512, 512), thumbnail=photos[number % 25]))
    write_preview(folder / "a.html", [Folder(folder, tuple(trained), frozenset())], seen, report)
    assert report.warnings == report.errors == []
    return folder / "a.html"


def test_a_thousand_photos_take_less_than_20_mb_and_are_more_than_stamps(browser, thousand):
    assert thousand.stat().st_size < 20_000_000
    browser.open(thousand)
    widths = "Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth)))"
    assert browser.ask(widths) == [320] * 1000


def test_among_a_thousand_photos_the_last_is_found_by_its_caption(browser, thousand):
    start = time.perf_counter()
    browser.open(thousand)
    assert browser.ask("window.find('photo 999, last')")
    last = browser.ask("document.images[999].getBoundingClientRect().toJSON()")
    assert 0 < last["bottom"] < 900
    assert time.perf_counter() - start < 10  # 1 on two cores
