"""Damaged and strange files to give to the slicer, and the sound ones they are made of."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from lora_files import CONTENT
from safetensors.torch import save
from slicing import LOOKS, Slicer, opens, too_new

NAME = CONTENT.format(0, 1, "q")
UP, DOWN = f"{NAME}.lora_up.weight", f"{NAME}.lora_down.weight"


def small_lora(name: str = NAME) -> dict[str, torch.Tensor]:
    """One module, with tensors of two types.

    A LoKr of rank 1 is the smallest change of a layer of 1280 x 1280, (32 x 32) by (40 x 40): so
    small that each of its bytes can be damaged.
    """
    noise = torch.Generator().manual_seed(0)
    shapes = {"w1_a": (32, 1), "w1_b": (1, 32), "w2_a": (40, 1), "w2_b": (1, 40)}
    factors = {
        f"{name}.lokr_{suffix}": torch.randn(shape, generator=noise).half()
        for suffix, shape in shapes.items()
    }
    return factors | {f"{name}.alpha": torch.tensor(1.0)}


def small_file() -> bytes:
    """The same as a file, with metadata: one entry, as their order changes from save to save."""
    return save(small_lora(), {"ss_network_dim": "1"})


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of any header, whether or not that makes sense."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def header_of(data: bytes) -> tuple[dict[str, object], bytes]:
    """The header of a whole file, and the bytes after it."""
    start = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:start]), data[start:]


def tensor(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def survey(slicer: Slicer, cases: Iterable[tuple[object, bytes]]) -> dict[int, int]:
    """Run many damaged files, each cut and done otherwise in turn; how often each exit code came.

    What safetensors itself refuses must be refused, with all failures told at once.
    """
    ways = [["--alphas", "0.5"], *LOOKS, ["--save_precision", "float"]]
    lora = slicer.folder / "damaged.safetensors"
    failures, codes = [], {0: 0, 1: 0}
    for index, (what, data) in enumerate(cases):
        lora.write_bytes(data)
        whole = opens(lora) or too_new(lora)
        for way in ([], ways[index % len(ways)]):
            try:
                code = slicer(lora, *way)
                assert whole or code == 1, "taken, though safetensors refuses it"
            except (Exception, AssertionError) as error:
                failures.append(f"{what} {' '.join(way)}: {type(error).__name__} {error}")
                slicer.capsys.readouterr()
                continue
            codes[code] += 1
    assert not failures, "\n".join(failures[:5])
    return codes


STRANGERS: dict[str, Callable[[Path], object]] = {
    "an empty file": lambda path: path.write_bytes(b""),
    "a text": lambda path: path.write_text("404: Not Found\n"),
    "a page": lambda path: path.write_text("<!DOCTYPE html><html>" + "a" * 5000),
    "zeros": lambda path: path.write_bytes(b"\0" * 100_000),
    "noise": lambda path: path.write_bytes(random.Random(0).randbytes(100_000)),
    "a zip": lambda path: path.write_bytes(b"PK\x05\x06" + b"\0" * 18),
    "a pickle": lambda path: torch.save(small_lora(), path),
    "a folder": lambda path: path.mkdir(),
    "nothing": lambda path: None,
}
