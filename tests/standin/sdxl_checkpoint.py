"""SDXL's checkpoint as sd-scripts saves it: names and shapes, and files of the header alone.

Needs sdxl_checkpoint.json beside this file, or in the bundle: the 2,514 tensors of a file that
sd-scripts saves, as a tree by the dots of their names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
Shapes = dict[str, tuple[int, ...]]
BYTES = {"F16": 2, "BF16": 2, "F32": 4}


def leaves(tree: dict[str, Any], start: str = "") -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, inside in tree.items():
        if isinstance(inside, list):
            yield start + name, tuple(inside)
        else:
            yield from leaves(inside, f"{start}{name}.")


def sdxl_shapes() -> Shapes:
    places = HERE, HERE.parent.parent / "blora/preflight"
    table = next(filter(Path.is_file, (folder / "sdxl_checkpoint.json" for folder in places)))
    return dict(leaves(json.loads(table.read_text(encoding="utf-8"))))


def write_checkpoint(
    path: Path, shapes: Shapes, metadata: dict[str, str] | None = None, dtype: str = "F16"
) -> None:
    """A whole safetensors file; its weights are a hole, which takes no room on the disk."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + BYTES[dtype] * prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)
