"""A dataset that shows what --preview is for: shapes of all kinds, and what goes wrong.

Five landscapes that are trained, of which two have a caption that is cut and one is stored turned,
and two that are not.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from PIL import Image, ImageColor, ImageDraw, ImageOps

CONFIG = """\
[general]
caption_extension = ".txt"

[[datasets]]
resolution = 1024
max_bucket_reso = 2048

  [[datasets.subsets]]
  image_dir = "sample"
  num_repeats = 3
"""
LONG = (
    ", painted in oil on rough canvas, seen from a hill, with a low sun behind a thin haze and one "
    "range of hills behind the other, each paler than the one before it, the colour laid on thick "
    "and without a gap, light falling from the left, nobody to be seen, a wide and quiet sky, in "
    "the manner of a poster of the nineteen twenties, high quality, best quality, masterpiece, "
    "highly detailed"
)
# The size, the word, and the colours: the sky's from top to bottom, the sun, the nearest hills.
LANDSCAPES = {
    "dawn.png": ((1152, 896), "dawn", "#6f86c9 #ffd3b0 #fff3d6 #33415c"),
    "dusk_panorama.png": ((2400, 900), "dusk", "#3b2a5f #ff8f6b #ffd27a #2a1a3a"),
    "night.png": ((1024, 1024), "night", "#0b1230 #31507f #e9eefc #060a18"),
    "noon_photo.jpg": ((1200, 1600), "noon", "#2f7fc4 #cfeaf7 #fffbe0 #2f5b3a"),
    "winter_tall.png": ((800, 1400), "winter", "#9fb4c7 #f3f1ee #ffffff #5a6f82"),
    "autumn_half.jpg": ((1024, 1024), "autumn", "#c98a4b #f6e3bf #fff0c2 #6b2f1a"),
    "spring.tiff": ((1024, 1024), "spring", "#7cc0d8 #f4f7d9 #fffde0 #4b7a35"),
}


def paint(name: str) -> Image.Image:
    """The sun over hills."""
    size, _, colours = LANDSCAPES[name]
    (width, height), side = size, min(size)
    high, low, sun, hills = colours.split()
    image = ImageOps.colorize(Image.linear_gradient("L").resize(size), high, low)
    pen = ImageDraw.Draw(image)
    x, y, radius = width * 0.62, height * 0.42, side * 0.11
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), sun)
    near, far = (ImageColor.getrgb(colour) for colour in (hills, low))
    for row in range(5):
        share = 0.25 + 0.75 * row / 4
        colour = tuple(round(share * a + (1 - share) * b) for a, b in zip(near, far, strict=True))
        top, xs = height * (0.55 + 0.1 * row), range(0, width + 8, 8)
        waves = (
            0.6 * math.sin(4.1 * (x / side) + 2.3 * row)
            + 0.4 * math.sin(9.7 * (x / side) + 1.1 * row * row)
            for x in xs
        )
        ridge = [(x, top - side * 0.07 * wave) for x, wave in zip(xs, waves, strict=True)]
        pen.polygon([*ridge, (width, height), (0, height)], colour)
    return image


def make_sample(folder: Path) -> None:
    """The pictures, their captions and the dataset config."""
    images = folder / "sample"
    images.mkdir(parents=True)
    (folder / "config.toml").write_text(CONFIG, encoding="utf-8")
    for name, (_, word, _) in LANDSCAPES.items():
        text = f"the sun over hills, {word}"
        text += {"dawn.png": LONG, "night.png": "\nthis line is not read"}.get(name, "")
        (images / name).with_suffix(".txt").write_text(text, encoding="utf-8")
        paint(name).save(images / name)
    photo, exif = images / "noon_photo.jpg", Image.Exif()
    exif[0x0112] = 6  # a camera that was held upright stores it like this
    paint(photo.name).transpose(Image.Transpose.ROTATE_90).save(photo, exif=exif)
    half = images / "autumn_half.jpg"
    os.truncate(half, half.stat().st_size // 2)
