"""What a strength does to values: decode, multiply, encode, and DoRA against the base model.

blora_slicer.py and cut.py load it where values change, inspection.py to look at them. A
tensor that changes is described at once and computed when it is written, so that a cut needs little
memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from blora.sdxl import checkpoint_weight
from blora.slicer.keys import ALPHA, DORA, LORA_DOWN, LORA_MID, LORA_UP, UP_BIAS
from blora.slicer.modules import ADDED, UNKNOWN, Module, with_alpha
from blora.tensorfile import (
    FLOAT8,
    FLOATS,
    FORMATS,
    Files,
    Span,
    Tensor,
    as_fp32,
    fp32_holds,
    number,
    read_header,
)
from blora.text import BloraError, first_few, printable

# ---- Values --------------------------------------------------------------------------------------

PIECE = 1 << 18  # bytes of stored values that are changed at a time: they stay in the cache
# The smallest numbers that round to inf.
OVERFLOW = {"F16": 65520.0, "BF16": (2 - 2**-8) * 2.0**127, "F32": (2 - 2**-24) * 2.0**127}


def decode(data: bytes, dtype: str, shape: tuple[int, ...] = (-1,)) -> np.ndarray:
    """Stored bytes as fp32, or as fp64 where they are that; BloraError for types without values."""
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
    """A stored tensor's values, in fp32 or better."""
    return decode(tensor.read(), tensor.dtype, tensor.shape)


def convert(data: bytes, stored: str, factor: float, dtype: str) -> tuple[bytes, np.ndarray]:
    """Stored values times a factor, as `dtype`; and which of them became inf on the way."""
    with np.errstate(all="ignore"):  # what becomes inf is reported; the rest was in the LoRA
        before = decode(data, stored)
        exact = before if factor == 1 else before * before.dtype.type(factor)
        over = np.abs(exact) >= OVERFLOW.get(dtype, math.inf)
        return encode(exact, dtype), over & np.isfinite(before)


@lru_cache(maxsize=8)  # 0.3 MB each, and a join has a factor for each alpha
def every_value(stored: str, factor: float, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """convert() of all 65,536 values of a 16-bit type, to be looked up by their bits."""
    data, became_inf = convert(np.arange(1 << 16, dtype="<u2").tobytes(), stored, factor, dtype)
    return np.frombuffer(data, f"<u{FLOATS[dtype]}"), became_inf


@dataclass(frozen=True)
class Changed(Tensor):
    """A tensor to write whose values are those of its source times a factor, or are solved for."""

    key: str
    stored: str  # the type of the source
    factor: float = 1.0
    solve: Callable[[], np.ndarray] | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape) * FLOATS[self.dtype]

    def chunks(self, files: Files) -> Iterator[bytes | memoryview]:
        """The bytes to write; BloraError where a value becomes inf that was none."""
        if self.solve:
            with np.errstate(all="ignore"):  # what has no solution is refused in a sentence
                made = np.ascontiguousarray(self.solve())
            wide = "F64" if made.dtype.itemsize == 8 else "F32"
            yield self.checked(*convert(made.tobytes(), wide, self.factor, self.dtype))
            return
        at_hand = isinstance(self.source, bytes)
        pieces = [self.source] if at_hand else files.chunks(self.source, PIECE)
        for piece in pieces:
            if FLOATS.get(self.stored) != 2:
                yield self.checked(*convert(piece, self.stored, self.factor, self.dtype))
                continue
            table, became_inf = every_value(self.stored, self.factor, self.dtype)
            bits = np.frombuffer(piece, "<u2")
            if became_inf.any():
                self.checked(b"", np.take(became_inf, bits, mode="wrap"))
            yield np.take(table, bits, mode="wrap").view("u1").data

    def checked(self, data: bytes, became_inf: np.ndarray) -> bytes:
        """The data, unless some of its values became inf."""
        if became_inf.any():
            raise BloraError(
                f"{printable(self.key)} has values that {self.dtype} cannot hold: lower --alphas, "
                "or use --save_precision float"
            )
        return data


# ---- Strength ------------------------------------------------------------------------------------


def changed(module: Module, suffix: str, factor: float = 1.0, dtype: str = "") -> Tensor:
    """A tensor of the module, multiplied, and stored as `dtype` where one is given."""
    tensor = module.tensors[suffix]
    dtype = dtype or tensor.dtype
    if isinstance(tensor, Changed):
        return replace(tensor, factor=tensor.factor * factor, dtype=dtype)
    if factor == 1 and dtype == tensor.dtype:
        return tensor
    key = f"{module.name}.{suffix}"
    return Changed(dtype, tensor.shape, tensor.source, key, tensor.dtype, factor)


def check_floats(module: Module, suffixes: Iterable[str]) -> None:
    """Refuse to change tensors of a type that can only be copied."""
    for suffix in suffixes:
        dtype = module.tensors[suffix].dtype
        if dtype not in FLOATS:
            precision = "add --save_precision, or " if dtype in FLOAT8 else ""
            raise BloraError(
                f"{module.name} is stored as {dtype}, which can be copied but not changed: "
                f"{precision}cut it at 1.0 and set the strength where the LoRA is used"
            )


def multiply(module: Module, factor: float, suffixes: Iterable[str]) -> Module:
    """The module with these of its tensors multiplied, computed when they are written.

    BloraError where fp32 cannot hold the factor, or a tensor's type cannot be changed.
    """
    if not fp32_holds(factor):
        raise BloraError(f"{module.name} would be multiplied by {factor:g}, which fp32 cannot "
                         "hold: correct --alphas, or the LoRA's alpha")  # fmt: skip
    present = [suffix for suffix in suffixes if suffix in module.tensors]
    check_floats(module, present)
    made = {suffix: changed(module, suffix, factor) for suffix in present}
    return replace(module, tensors=module.tensors | made)


def at_strength(module: Module, strength: float, lora: Path, base: BaseModel | None) -> Module:
    """The module with its change multiplied by the strength; BloraError where it cannot be.

    The strength goes into one factor alone: the change is a product of factors, so each further
    one would bring it in once more. alpha stays: some programs read 0 as "alpha = rank".
    """
    strength *= module.factor
    if strength == 1:
        return module
    is_known = not module.unknown
    if is_known and DORA not in module.tensors and module.algorithm.scaled:
        return multiply(module, strength, {*module.algorithm.scaled, *ADDED})
    if is_known and module.label == "DoRA" and base and not BIASES & module.tensors.keys():
        baked = bake_dora(module, strength, base.weight(module))
        return multiply(baked, strength, ADDED)
    raise no_strength(module, lora)


BIASES = {UP_BIAS, "bias_values"}  # parts of the change that bake_dora does not solve for


def no_strength(module: Module, lora: Path) -> BloraError:
    """Why a strength cannot go into a module, and what to do."""
    because = f"it is {module.label} and {module.algorithm.reason}"
    advice = "cut it at 1.0 and set the strength where the LoRA is used"
    if module.unknown and module.algorithm is not UNKNOWN:
        because = not_known(module)
    elif DORA in module.tensors and BIASES & module.tensors.keys():
        because = f"it is {module.label} and has a bias among its factors"
    elif DORA in module.tensors:
        because = f"it is {module.label} and it needs the weights it was trained on"
        if module.label == "DoRA":
            advice = f"give the checkpoint as --base_model, or {advice}"
    return BloraError(
        f"the strength of {module.name} in {lora} cannot go into the file, because {because}: "
        f"{advice}"
    )


def not_known(module: Module) -> str:
    """That some of a module's tensors are of no kind known here."""
    return f"what {first_few(f'{module.name}.{s}' for s in module.unknown)} does is unknown"


def at_precision(module: Module, dtype: str) -> Module:
    """The module with all its floats stored as `dtype`, as kohya's tools do.

    An alpha that no program reads stays: LyCORIS' whole LoKr has 100,000, which fp16 cannot hold.
    BloraError where a tensor is of a type that can only be copied.
    """
    made = {}
    for suffix, tensor in module.tensors.items():
        if suffix == ALPHA and not module.alpha_is_read:
            continue
        if tensor.dtype in FLOATS or tensor.dtype in FLOAT8:
            made[suffix] = changed(module, suffix, dtype=dtype)
        elif tensor.dtype.startswith("F"):
            raise BloraError(
                f"{module.name} is stored as {tensor.dtype}, which can be copied but not "
                "converted: leave out --save_precision"
            )
    return replace(module, tensors=module.tensors | made)


def from_float8(module: Module, dtype: str) -> Module:
    """The module at this precision where it has 8-bit floats: then a strength can go into it."""
    has_any = any(tensor.dtype in FLOAT8 for tensor in module.tensors.values())
    return at_precision(module, dtype) if has_any else module


def with_common_alpha(modules: list[Module]) -> list[Module]:
    """The same changes under one alpha, where the LoRA modules have several.

    diffusers scales all U-Net modules by the alpha it meets most, over each one's own rank. The
    smallest becomes the common one: then each lora_up takes a ratio above 1, where a smaller one
    would push fp16 into its subnormal numbers. Modules that have it already stay as they are.
    """
    loras = [module for module in modules if module.algorithm.name == "LoRA" and module.rank]
    smallest = min((module.alpha or float(module.rank) for module in loras), key=abs)
    common = as_fp32(smallest)  # it is stored as that

    def unified(module: Module) -> Module:
        if module.algorithm.name != "LoRA" or not module.rank or module.alpha == common:
            return module
        if not fp32_holds(common) or not fp32_holds(module.alpha or 0):
            raise BloraError(f"{module.name} has an alpha that fp32 cannot hold")
        if module.unknown:
            raise BloraError(
                f"{module.name} cannot take the alpha of the others, because {not_known(module)}: "
                "write the slices apart with --not_combined"
            )
        ratio = (module.alpha or module.rank) / common
        return with_alpha(multiply(module, ratio, module.algorithm.scaled), common)

    return [unified(module) for module in modules]


# ---- DoRA ----------------------------------------------------------------------------------------


def through_core(core: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """[rank, in, ...] of a tucker core [rank, rank, ...] and the factor [rank, in] behind it."""
    return np.einsum("rs...,si->ri...", core, factor.reshape(factor.shape[:2]))


def lora_change(module: Module, shape: tuple[int, ...]) -> np.ndarray:
    """alpha / rank * up @ mid @ down, in the shape of the weight it changes: [out, in, ...].

    up is [out, rank], down [rank, in, ...]; with mid [rank, rank, ...] down is [rank, in].
    """
    up, down = (values(module.tensors[suffix]) for suffix in (LORA_UP, LORA_DOWN))
    if LORA_MID in module.tensors:
        down = through_core(values(module.tensors[LORA_MID]), down)
    change = up.reshape(up.shape[0], -1) @ down.reshape(down.shape[0], -1)
    return (change * up.dtype.type(module.scale)).reshape(shape)


@dataclass(frozen=True)
class Dora:
    """A DoRA module whose final weight is (1 - s) W + s W', W' being the one that was trained.

    With V = W + change, m = dora_scale, and norms and products by row for m of [out, 1], by
    column for [1, in]: c = m / |V|, k = (1 - s) + s c; then the factor is multiplied by s c / k,
    and the new m is |(1 - s) W + s c V|, with the sign of k, which V's direction has turned by.
    The new m is stored as fp32: it is as large as the weight's rows, so that rounded to fp16 or
    bf16 it would be off by 0.4 or 3.4 % of the change.
    """

    module: Module
    strength: float
    weight: Tensor

    @property
    def axis(self) -> int:
        """That of the weight along which dora_scale has its numbers: 0 for out, 1 for in."""
        return 0 if self.module.tensors[DORA].shape[0] != 1 else 1

    @property
    def factor(self) -> str:
        """The suffix of the factor whose rows, or columns, are those of dora_scale."""
        return LORA_UP if self.axis == 0 else LORA_DOWN

    @property
    def misfit(self) -> BloraError:
        return BloraError(
            f"{self.module.name} does not fit its weight in {self.weight.source.path}: give the "
            "checkpoint that the LoRA was trained on, or cut it at 1.0"
        )

    def norm(self, matrix: np.ndarray) -> np.ndarray:
        """|matrix| by row or by column, with the matrix's number of axes."""
        others = tuple(index for index in range(matrix.ndim) if index != self.axis)
        return np.sqrt(np.square(matrix).sum(axis=others, keepdims=True))

    @cached_property
    def solution(self) -> tuple[np.ndarray, np.ndarray]:
        """(s c / k, the new m), each of one number a row or column."""
        strength = self.strength
        try:
            base = values(self.weight)
            trained = base + lora_change(self.module, base.shape)
            length = self.norm(trained)
            c = values(self.module.tensors[DORA]).reshape(length.shape) / length
        except (IndexError, ValueError, TypeError) as error:
            raise self.misfit from error
        k = (1 - strength) + strength * c
        wanted = self.norm((1 - strength) * base + strength * c * trained)
        if not (np.isfinite(c).all() and np.isfinite(wanted).all() and k.all()):
            raise BloraError(
                f"{self.module.name} is a DoRA that cannot be cut at {strength:g}: use 1.0"
            )
        return strength * c / k, wanted * np.sign(k)

    def new_factor(self) -> np.ndarray:
        """The factor times s c / k."""
        old = values(self.module.tensors[self.factor])
        by = self.solution[0].reshape([-1 if axis == self.axis else 1 for axis in range(old.ndim)])
        if by.size != old.shape[self.axis]:
            raise self.misfit
        return old * by

    def new_scale(self) -> np.ndarray:
        """The new m, in the shape of the old."""
        return self.solution[1].reshape(self.module.tensors[DORA].shape)


def bake_dora(module: Module, strength: float, weight: Tensor) -> Module:
    """The module at this strength, which holds for this weight; solved when it is written.

    BloraError then, where module and weight do not fit.
    """
    dora, old = Dora(module, strength, weight), module.tensors
    check_floats(module, (dora.factor, DORA))
    wide = "F64" if old[DORA].dtype == "F64" else "F32"

    def solved(suffix: str, dtype: str, solve: Callable[[], np.ndarray]) -> Changed:
        return Changed(dtype, old[suffix].shape, b"", f"{module.name}.{suffix}", dtype, solve=solve)

    made = {
        dora.factor: solved(dora.factor, old[dora.factor].dtype, dora.new_factor),
        DORA: solved(DORA, wide, dora.new_scale),
    }
    return replace(module, tensors=old | made)


def rows_of_three(tensor: Tensor, third: int) -> Tensor:
    """A third of a tensor's rows, counted from 0; bake_dora refuses what then does not fit."""
    size = tensor.size // 3
    start = tensor.source.start + third * size
    shape = (tensor.shape[0] // 3, *tensor.shape[1:]) if tensor.shape else ()
    return replace(tensor, shape=shape, source=Span(tensor.source.path, start, start + size))


@dataclass(frozen=True)
class BaseModel:
    """An SDXL checkpoint, of which a DoRA needs the weights that it was trained on."""

    path: Path
    tensors: dict[str, Tensor]

    def weight(self, module: Module) -> Tensor:
        """The weight of the module's layer; BloraError where the checkpoint has none."""
        key, third = checkpoint_weight(module.layer) or ("", None)
        if key not in self.tensors:
            raise BloraError(
                f"{self.path} holds no weight for {module.name}: give the SDXL checkpoint, as one "
                ".safetensors file, that the LoRA was trained on"
            )
        tensor = self.tensors[key]
        return tensor if third is None else rows_of_three(tensor, third)


def read_base_model(path: Path) -> BaseModel:
    """The checkpoint by its header; BloraError where it cannot be read."""
    if not path.is_file():
        raise BloraError(f"no file at {path}: correct --base_model")
    return BaseModel(path, read_header(path)[0])
