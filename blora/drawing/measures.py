"""How far two pictures are apart, in colours and in shapes: aids to the eye, which decide nothing.

Both are computed by scikit-image, and scipy, which comes with it, of pictures shrunk to 256 pixels:
0 is the same, 1 as far as can be.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.spatial.distance import jensenshannon
from skimage.color import rgb2gray, rgb2lab
from skimage.metrics import structural_similarity

SIDE, LEAST = 256, 32  # pixels; the window of SSIM is 7 wide
# Of CIE Lab: lightness, green to red, blue to yellow. The last two are odd, so that grey is in the
# middle of a bin: at the edge between two, a tint that nobody sees would count as another colour.
BINS = (8, 15, 15)
RANGES = ((0, 100), (-128, 128), (-128, 128))


def read(path: Path) -> np.ndarray:
    """[height, width, 3] of 0 to 255: a picture in its colours, shrunk."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    scale = max(SIDE / max(image.size), LEAST / min(image.size))
    image.thumbnail((image.width * scale, image.height * scale))
    return np.asarray(image)


def colour_distance(one: np.ndarray, two: np.ndarray) -> float:
    """The Jensen-Shannon distance of two pictures' histograms in CIE Lab; where a colour is does
    not matter.
    """
    counts = [
        np.histogramdd(rgb2lab(pixels).reshape(-1, 3), BINS, RANGES)[0].ravel()
        for pixels in (one, two)
    ]
    return float(jensenshannon(*counts, base=2))


def shape_distance(one: np.ndarray, two: np.ndarray) -> float:
    """1 minus the structural similarity (SSIM) of the grey pictures.

    A similarity below 0, of what is dark in one picture and light in the other, counts as none.
    """
    similarity = structural_similarity(rgb2gray(one), rgb2gray(two), data_range=1)
    return 1 - max(float(similarity), 0.0)


DISTANCES = {"colours": colour_distance, "shapes": shape_distance}


def distances(first: Path, others: Iterable[Path]) -> Iterator[dict[str, float]]:
    """How far each of the other pictures is from the first, by each of DISTANCES."""
    one = read(first)
    for two in map(read, others):
        yield {name: distance(one, two) for name, distance in DISTANCES.items()}
