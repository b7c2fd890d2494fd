"""Make a dataset that shows what --preview is for: shapes of all kinds, and what goes wrong.

  python sample_pictures.py FOLDER

Writes FOLDER/config.toml, and FOLDER/sample with eight pictures that are trained, of which two have
a caption that is cut and one is stored turned, and two that are not.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from make_dataset import BACKGROUNDS, caption, describe, draw
from PIL import Image

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
SIZES = {
    "circle.png": (1024, 1024),
    "square_wide.png": (1600, 900),
    "triangle_tall.png": (800, 1400),
    "circle_panorama.png": (2400, 900),
    "square_lines.png": (1024, 1024),
    "triangle_photo.jpg": (1200, 1600),
    "circle_long.png": (1152, 896),
    "square_small.png": (640, 640),
    "triangle.tiff": (1024, 1024),
    "circle_half.jpg": (1024, 1024),
}
LONG = (
    ", drawn with a round brush on rough paper, seen from the front, in the middle of the sheet, "
    "with an even line all around it and no shadow, the colour laid on thick and without a gap, "
    "light falling from the left, nothing else in the picture, the edges of the paper not to be "
    "seen, in the manner of a poster of the nineteen twenties, simple, calm and clear, high "
    "quality, best quality, masterpiece, highly detailed"
)


def drawing(number: int, size: tuple[int, int]) -> Image.Image:
    """A drawing of make_dataset.py in the middle of a sheet of any shape."""
    side = min(size)
    sheet = Image.new("RGB", size, BACKGROUNDS[describe(number)[2]])
    sheet.paste(draw(number, side), ((size[0] - side) // 2, (size[1] - side) // 2))
    return sheet


def make_sample(folder: Path) -> None:
    """The pictures, their captions and the dataset config."""
    images = folder / "sample"
    images.mkdir(parents=True)
    (folder / "config.toml").write_text(CONFIG, encoding="utf-8")
    for number, (name, size) in enumerate(SIZES.items()):
        text = caption(number)
        if "long" in name:
            text += LONG
        if "lines" in name:
            text += "\nthis line is not read\n"
        (images / name).with_suffix(".txt").write_text(text, encoding="utf-8")
        drawing(number, size).save(images / name)
    photo, exif = images / "triangle_photo.jpg", Image.Exif()
    exif[0x0112] = 6  # a camera that was held upright stores it like this
    upright = drawing(5, SIZES[photo.name])
    upright.transpose(Image.Transpose.ROTATE_90).save(photo, exif=exif)
    half = io.BytesIO()
    drawing(9, (1024, 1024)).save(half, "JPEG")
    (images / "circle_half.jpg").write_bytes(half.getvalue()[: len(half.getvalue()) // 2])


if __name__ == "__main__":
    make_sample(Path(sys.argv[1]))
