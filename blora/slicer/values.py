"""The values of tensors: decoded, multiplied and encoded with numpy.

strength.py changes values with it, inspection.py measures them. A cut that changes none does not
import it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from blora.tensorfile import FLOAT8, FLOATS, FORMATS, Stored, Tensor, number
from blora.text import BloraError, shortened

PIECE = 1 << 18  # bytes of stored values that are changed at a time: they stay in the cache
# The smallest numbers that round to inf.
OVERFLOW = {"F16": 65520.0, "BF16": (2 - 2**-8) * 2.0**127, "F32": (2 - 2**-24) * 2.0**127}


def decode(data: bytes | memoryview, dtype: str, shape: tuple[int, ...] = (-1,)) -> np.ndarray:
    """Stored bytes as fp32, or as fp64 where they are 8 bytes a number.

    BloraError for a type whose values are not known.
    """
    if dtype == "BF16":
        wide = np.frombuffer(data, "<u2").astype("<u4") << 16
        return wide.view("<f4").reshape(shape)
    if dtype in FLOAT8:
        every = np.array([number(dtype, bytes([bits])) for bits in range(256)], dtype="f4")
        return every[np.frombuffer(data, "u1")].reshape(shape)
    if dtype not in FORMATS:
        raise BloraError(f"values of type {dtype} can be copied, but not changed: cut at 1.0")
    stored = np.frombuffer(data, FORMATS[dtype]).reshape(shape)
    return stored.astype("f8" if stored.dtype.itemsize == 8 else "f4")


def encode(values: np.ndarray, dtype: str) -> bytes:
    """Values as stored bytes, each rounded once to the nearest."""
    if dtype != "BF16":
        return values.astype(FORMATS[dtype]).tobytes()
    # bf16 is the upper half of fp32; half of the last bit kept, with ties to even, rounds it.
    wide = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    rounded = wide + 0x7FFF + ((wide >> 16) & 1)
    kept = np.where(np.isnan(values), wide | 0x400000, rounded) >> 16
    return kept.astype("<u2").tobytes()


def values(tensor: Tensor) -> np.ndarray:
    """The values of a tensor, in fp32 or better."""
    return decode(tensor.read(), tensor.dtype, tensor.shape)


def convert(
    data: bytes | memoryview, stored: str, factor: float, dtype: str
) -> tuple[bytes, np.ndarray]:
    """Stored values times a factor, as `dtype`; and which of them that made inf."""
    with np.errstate(all="ignore"):  # an overflow is refused; inf and NaN of the LoRA stay
        before = decode(data, stored)
        exact = before if factor == 1 else before * before.dtype.type(factor)
        over = np.abs(exact) >= OVERFLOW.get(dtype, math.inf)
        return encode(exact, dtype), over & np.isfinite(before)


@lru_cache(maxsize=8)  # 0.3 MB each, and a join has a factor for each alpha
def conversion_table(stored: str, factor: float, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """convert() of all 65,536 values of a 16-bit type, for a lookup by their bits."""
    data, became_inf = convert(np.arange(1 << 16, dtype="<u2").tobytes(), stored, factor, dtype)
    return np.frombuffer(data, f"<u{FLOATS[dtype]}"), became_inf


@dataclass(frozen=True)
class Changed(Tensor):
    """Another tensor's values times a factor, computed when they are written."""

    key: str
    source: Tensor
    factor: float = 1.0

    def chunks(self) -> Iterator[bytes | memoryview]:
        """The bytes to write; BloraError where a finite value becomes inf."""
        source = self.source
        pieces = source.chunks(PIECE) if isinstance(source, Stored) else source.chunks()
        for piece in pieces:
            data: bytes | memoryview
            if FLOATS.get(source.dtype) == 2:
                table, overflows = conversion_table(source.dtype, self.factor, self.dtype)
                bits = np.frombuffer(piece, "<u2")
                data = np.take(table, bits, mode="wrap").view("u1").data
                became_inf = overflows.any() and np.take(overflows, bits, mode="wrap").any()
            else:
                data, overflowing = convert(piece, source.dtype, self.factor, self.dtype)
                became_inf = overflowing.any()
            if became_inf:
                raise BloraError(
                    f"{shortened(self.key)} overflows {self.dtype}: lower --alphas, or use "
                    "--save_precision float"
                )
            yield data


@dataclass(frozen=True)
class Solved(Tensor):
    """A tensor of fp32 or fp64 whose values are solved for when it is written."""

    solve: Callable[[], np.ndarray]

    def chunks(self) -> Iterator[bytes | memoryview]:
        with np.errstate(all="ignore"):  # what has no solution is refused in a sentence
            yield self.solve().astype(FORMATS[self.dtype]).tobytes()


def through_core(core: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """[rank, in, ...] of a tucker core [rank, rank, ...] and the factor [rank, in] behind it."""
    return np.einsum("rs...,si->ri...", core, factor.reshape(factor.shape[:2]))
