"""How far two pictures are apart: what the page's bars show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from make_dataset import draw
from PIL import Image, ImageOps

from blora.drawing.measures import distances

SIDE = 256


@pytest.fixture
def photo(tmp_path) -> Path:
    path = tmp_path / "photo.png"
    draw(3, SIDE).save(path)
    return path


def measured(first: Path, change) -> dict[str, float]:
    """The distances of a picture from what is made of it."""
    with Image.open(first) as image:
        change(image.convert("RGB")).save(first.with_name("other.png"))
    [found] = distances(first, [first.with_name("other.png")])
    return found


def noise(image: Image.Image) -> Image.Image:
    pixels = np.random.default_rng(1).integers(0, 256, (*image.size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def shuffled(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image).reshape(-1, 3)
    return Image.fromarray(np.random.default_rng(1).permutation(pixels).reshape(SIDE, SIDE, 3))


def test_the_same_picture_is_at_0_in_both(photo):
    assert measured(photo, lambda image: image) == {"colours": 0, "shapes": 0}


def test_pixels_in_other_places_are_other_shapes_of_the_same_colours(photo):
    found = measured(photo, shuffled)
    assert found["colours"] == 0
    assert found["shapes"] > 0.5


def test_a_tint_is_other_colours_of_the_same_shapes(photo):
    found = measured(photo, lambda image: ImageOps.colorize(image.convert("L"), "#000", "#ffe0c0"))
    assert found["shapes"] < 0.2
    assert found["colours"] > 0.5


@pytest.mark.parametrize("change", [noise, ImageOps.invert, ImageOps.mirror])
def test_neither_is_ever_below_0_or_above_1(photo, change):
    assert all(0 <= share <= 1 for share in measured(photo, change).values())


def test_light_in_place_of_dark_is_no_further_in_shapes_than_1(photo):
    """Though the similarity is below 0."""
    with Image.open(photo) as image:
        noise(image).save(photo)
    assert measured(photo, ImageOps.invert)["shapes"] == 1


@pytest.mark.parametrize("tint", [(129, 128, 127), (127, 128, 129), (127, 129, 128), (129,) * 3])
def test_a_tint_that_nobody_sees_is_no_other_colour_than_grey(photo, tint):
    Image.new("RGB", (64, 64), (128,) * 3).save(photo)
    assert measured(photo, lambda image: Image.new("RGB", image.size, tint))["colours"] == 0


def test_black_from_white_is_1_in_colours_and_a_flat_picture_is_measured(tmp_path):
    paths = [tmp_path / f"{name}.png" for name in ("black", "white")]
    for path in paths:
        Image.new("RGB", (64, 96), path.stem).save(path)
    [found] = distances(paths[0], paths[1:])
    assert found["colours"] == 1
    assert found["shapes"] == pytest.approx(1, abs=0.01)


def test_a_large_picture_is_measured_as_a_small_one(photo):
    with Image.open(photo) as image:
        image.resize((1024, 1024)).save(photo.with_name("large.png"))
    [found] = distances(photo.with_name("large.png"), [photo])
    assert found["shapes"] < 0.05


def test_a_picture_far_wider_than_high_is_measured_too(photo):
    wide = photo.with_name("wide.png")
    with Image.open(photo) as image:
        image.resize((2048, 32)).save(wide)
    assert list(distances(wide, [wide])) == [{"colours": 0, "shapes": 0}]


def test_each_of_several_pictures_is_measured_from_the_first(photo):
    with Image.open(photo) as image:
        ImageOps.invert(image.convert("RGB")).save(photo.with_name("other.png"))
    one, two = distances(photo, [photo, photo.with_name("other.png")])
    assert one == {"colours": 0, "shapes": 0}
    assert min(two.values()) > 0.1
