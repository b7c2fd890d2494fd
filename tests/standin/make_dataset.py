"""Draw a small image dataset with captions, and the sd-scripts dataset config for it.

  python make_dataset.py FOLDER
  python make_dataset.py FOLDER --images 12 --size 128

Writes FOLDER/images/*.png with a .txt caption beside each image, and FOLDER/config.toml. The
drawings follow from their number alone. The config names the images by FOLDER as you gave it:
start training from where a relative FOLDER is right.
"""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle")
COLOURS = {"red": "#d03030", "green": "#2f9e44", "blue": "#2f5fd0", "yellow": "#e0b020"}
BACKGROUNDS = {"white": "#f4f4f0", "grey": "#808488", "black": "#202024", "pink": "#f0c0d0"}
STYLES = ("flat", "outlined")

CONFIG = """\
[general]
caption_extension = ".txt"

[[datasets]]
resolution = {size}
batch_size = 1

  [[datasets.subsets]]
  image_dir = "{image_dir}"
  num_repeats = {repeats}
"""


def describe(number: int) -> list[str]:
    lists = {SHAPES: number, (*COLOURS,): number, (*BACKGROUNDS,): number // 2, STYLES: number}
    return [of[n % len(of)] for of, n in lists.items()]


def draw(number: int, size: int) -> Image.Image:
    shape, colour, background, style = describe(number)
    image = Image.new("RGB", (size, size), BACKGROUNDS[background])
    pen, ink = ImageDraw.Draw(image), COLOURS[colour]
    look = {"fill": ink} if style == "flat" else {"outline": ink, "width": max(2, size // 16)}
    centre = size / 2 + (number % 5 - 2) * size / 20
    radius = size * (0.25 + 0.02 * (number % 4))
    if shape == "circle":
        pen.ellipse((centre - radius,) * 2 + (centre + radius,) * 2, **look)
    else:
        pen.regular_polygon((centre, centre, radius), 4 if shape == "square" else 3, **look)
    return image


def make_dataset(folder: Path, images: int, size: int, repeats: int) -> None:
    image_dir = folder / "images"
    image_dir.mkdir(parents=True, exist_ok=True)
    for number in range(images):
        draw(number, size).save(image_dir / f"{number:03d}.png")
        shape, colour, background, style = describe(number)
        caption = f"a sks {shape}, {colour}, {style}, {background} background\n"
        (image_dir / f"{number:03d}.txt").write_text(caption, encoding="utf-8")
    config = CONFIG.format(size=size, image_dir=image_dir.as_posix(), repeats=repeats)
    (folder / "config.toml").write_text(config, encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    for name, default in (("images", 6), ("size", 64), ("repeats", 2)):
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    args = parser.parse_args(argv)
    make_dataset(args.folder, args.images, args.size, args.repeats)
    print(f"{args.images} images and config.toml in {args.folder.as_posix()}")


if __name__ == "__main__":
    main()
