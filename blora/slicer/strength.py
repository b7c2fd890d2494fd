"""Values of tensors, and how slices change them: strength, a common alpha, a precision.

blora_slicer.py imports it where a value changes, inspection.py to measure values. A tensor that
changes is described here and computed when it is written, so that a cut needs little memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial

import numpy as np

from blora.slicer.cut import Cut, Slice
from blora.slicer.keys import ALPHA, DORA, LORA_DOWN, LORA_MID, LORA_UP, UP_BIAS
from blora.slicer.modules import ADDED, Module, with_alpha
from blora.slicer.reader import BaseModel
from blora.tensorfile import DTYPES, FLOAT8, FLOATS, FORMATS, Stored, Tensor, fp32_holds, number
from blora.text import BloraError, shortened

# ---- Values --------------------------------------------------------------------------------------

PIECE = 1 << 18  # bytes of stored values that are changed at a time: they stay in the cache
# The smallest numbers that round to inf.
OVERFLOW = {"F16": 65520.0, "BF16": (2 - 2**-8) * 2.0**127, "F32": (2 - 2**-24) * 2.0**127}


def decode(data: bytes | memoryview, dtype: str, shape: tuple[int, ...] = (-1,)) -> np.ndarray:
    """Stored bytes as fp32, or as fp64 where they are 8 bytes a number; BloraError for others."""
    if dtype == "BF16":
        wide = np.frombuffer(data, "<u2").astype("<u4") << 16
        return wide.view("<f4").reshape(shape)
    if dtype in FLOAT8:
        every = np.array([number(dtype, bytes([bits])) for bits in range(256)], dtype="f4")
        return every.take(np.frombuffer(data, "u1")).reshape(shape)
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


def through_core(core: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """[rank, in, ...] of a tucker core [rank, rank, ...] and the factor [rank, in] behind it."""
    behind: np.ndarray = np.einsum("rs...,si->ri...", core, factor.reshape(factor.shape[:2]))
    return behind


def convert(
    data: bytes | memoryview, stored: str, factor: float, dtype: str
) -> tuple[bytes | memoryview, np.ndarray]:
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
            if FLOATS.get(source.dtype) != 2:
                data, overflowing = convert(piece, source.dtype, self.factor, self.dtype)
                became_inf = overflowing.any()
            else:
                table, overflows = conversion_table(source.dtype, self.factor, self.dtype)
                bits = np.frombuffer(piece, "<u2")
                data = np.take(table, bits, mode="wrap").view("u1").data
                became_inf = overflows.any() and np.take(overflows, bits, mode="wrap").any()
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


# ---- Strength ------------------------------------------------------------------------------------


def change_values(
    slices: list[Slice], base: BaseModel | None, dtype: str | None, alpha: float | None
) -> list[Module]:
    """The modules of all slices, each at the strength that its cut gives it.

    `alpha` is the one that all LoRA modules get, `dtype` the precision; None leaves them as they
    are. BloraError where a module cannot be changed.
    """
    changed = []
    for piece in slices:
        for module in piece.modules:
            # 8-bit floats are too coarse to be multiplied.
            if dtype and any(tensor.dtype in FLOAT8 for tensor in module.tensors.values()):
                module = at_precision(module, dtype)
            module = at_strength(with_plain_bias(module), piece.cut, base)
            if alpha is not None:
                module = at_alpha(module, alpha)
            changed.append(at_precision(module, dtype) if dtype else module)
    return changed


def change(module: Module, suffix: str, factor: float = 1.0, dtype: str = "") -> Tensor:
    """A tensor of the module, multiplied, and stored as `dtype` where one is given."""
    tensor = module.tensors[suffix]
    dtype = dtype or tensor.dtype
    if isinstance(tensor, Changed):
        return replace(tensor, factor=tensor.factor * factor, dtype=dtype)
    if factor == 1 and dtype == tensor.dtype:
        return tensor
    return Changed(dtype, tensor.shape, f"{module.name}.{suffix}", tensor, factor)


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
    """The module with these of its tensors multiplied; BloraError where fp32 lacks the factor."""
    if not fp32_holds(factor):
        raise BloraError(
            f"{module.name} would be multiplied by {factor:g}, which overflows fp32: correct "
            "--alphas, or the LoRA's alpha"
        )
    present = [suffix for suffix in suffixes if suffix in module.tensors]
    check_floats(module, present)
    multiplied = {suffix: change(module, suffix, factor) for suffix in present}
    return replace(module, tensors=module.tensors | multiplied)


def at_strength(module: Module, cut: Cut, base: BaseModel | None) -> Module:
    """The module with its change multiplied by the strength; BloraError where it cannot be.

    The strength goes into one factor alone: the change is a product of factors, so each further
    one would bring it in once more. alpha stays: some programs read 0 as "alpha = rank".
    """
    strength = cut.strength_of(module.name) * module.factor
    if strength == 1:
        return module
    if DORA not in module.tensors and module.algorithm.scaled:
        return multiply(module, strength, {*module.algorithm.scaled, *ADDED})
    if module.label == "DoRA" and base and not BIASES & module.tensors.keys():
        baked = bake_dora(module, strength, base.weight(module))
        return multiply(baked, strength, ADDED)
    because, advice = why_not(module)
    raise BloraError(f"cannot rescale {module.name} in {cut.lora}, because {because}: {advice}")


BIASES = {UP_BIAS, "bias_values"}  # parts of the change that bake_dora does not solve for


def why_not(module: Module) -> tuple[str, str]:
    """Why the strength of a module cannot change, and what to do."""
    advice = "cut it at 1.0 and set the strength where the LoRA is used"
    reason = module.algorithm.reason
    if DORA in module.tensors and BIASES & module.tensors.keys():
        reason = "has a bias among its factors"
    elif DORA in module.tensors:
        reason = "it needs the weights it was trained on"
        if module.label == "DoRA":
            advice = f"give the checkpoint as --base_model, or {advice}"
    return f"it is {module.label} and {reason}", advice


def with_plain_bias(module: Module) -> Module:
    """The module with a bias of lora_up, as PEFT and ai-toolkit have it, as change of the bias.

    alpha / rank is multiplied in. No program reads lora_up.bias under kohya's names, and Forge
    refuses a file with more than 12 such keys; diff_b is read by ComfyUI, the Forges and Fooocus.
    """
    tensors = dict(module.tensors)
    bias, added = tensors.pop(UP_BIAS, None), tensors.get("diff_b")
    ratio = module.effective_alpha / module.rank if module.rank else math.nan
    can_change = ratio == 1 or (bias and bias.dtype in FLOATS and fp32_holds(ratio))
    if not bias or DORA in tensors or not module.alpha or not can_change:
        return module
    if not added:
        return replace(module, tensors=tensors | {"diff_b": change(module, UP_BIAS, ratio)})
    check_floats(module, (UP_BIAS, "diff_b"))
    wide = "F64" if "F64" in (bias.dtype, added.dtype) else "F32"
    both = Solved(wide, added.shape, lambda: values(bias) * ratio + values(added))
    changed = Changed(added.dtype, added.shape, f"{module.name}.diff_b", both)
    return replace(module, tensors=tensors | {"diff_b": changed})


# ---- Alpha and precision -------------------------------------------------------------------------


def at_alpha(module: Module, alpha: float) -> Module:
    """The module with the same change under this alpha, where it is a LoRA of another one but 0."""
    if not module.is_ranked_lora or module.alpha in (0, alpha):
        return module
    if not alpha or not fp32_holds(alpha) or not fp32_holds(module.effective_alpha):
        raise BloraError(
            f"the alpha of {module.name} is not a finite fp32 number: write separate files with "
            "--not_combined"
        )
    ratio = module.effective_alpha / alpha
    return with_alpha(multiply(module, ratio, module.algorithm.scaled), alpha)


def at_precision(module: Module, dtype: str) -> Module:
    """The module with all its floats stored as `dtype`, as kohya's tools do.

    An alpha that no program reads stays: LyCORIS' whole LoKr has 100,000, which fp16 cannot hold.
    BloraError where a tensor is of a type that can only be copied.
    """
    converted = {}
    for suffix, tensor in module.tensors.items():
        if suffix == ALPHA and not module.alpha_is_read:
            continue
        if tensor.dtype in FLOATS or tensor.dtype in FLOAT8:
            converted[suffix] = change(module, suffix, dtype=dtype)
        elif tensor.dtype.startswith("F"):
            raise BloraError(
                f"{module.name} is stored as {tensor.dtype}, which can be copied but not "
                "converted: leave out --save_precision"
            )
    return replace(module, tensors=module.tensors | converted)


# ---- DoRA ----------------------------------------------------------------------------------------


def lora_change(module: Module, shape: tuple[int, ...]) -> np.ndarray:
    """alpha / rank * up @ mid @ down, in the shape of the weight it changes: [out, in, ...].

    up is [out, rank], down [rank, in, ...]; with mid [rank, rank, ...] down is [rank, in].
    """
    up, down = (values(module.tensors[suffix]) for suffix in (LORA_UP, LORA_DOWN))
    if LORA_MID in module.tensors:
        down = through_core(values(module.tensors[LORA_MID]), down)
    product: np.ndarray = up.reshape(up.shape[0], -1) @ down.reshape(down.shape[0], -1)
    product *= up.dtype.type(module.scale)
    return product.reshape(shape)


def solve_dora(
    module: Module, strength: float, weight: Stored, axis: int
) -> tuple[np.ndarray, np.ndarray]:
    """What to multiply a DoRA's factor with, and its new dora_scale, as numbers along the axis.

    They make the final weight (1 - s) W + s W', W' being the one that was trained. With
    V = W + change, m = dora_scale, and norms and products by row for m of [out, 1], by column for
    [1, in]: c = m / |V|, k = (1 - s) + s c; then the factor is multiplied by s c / k, and the new m
    is |(1 - s) W + s c V|, with the sign of k, which V's direction has turned by.
    BloraError where module and weight do not fit.
    """

    def norm(matrix: np.ndarray) -> np.ndarray:
        """|matrix| by row or by column, with the matrix's number of axes."""
        others = tuple(index for index in range(matrix.ndim) if index != axis)
        lengths: np.ndarray = np.sqrt(np.square(matrix).sum(axis=others, keepdims=True))
        return lengths

    try:
        base = values(weight)
        trained = base + lora_change(module, base.shape)
        length = norm(trained)
        c = values(module.tensors[DORA]).reshape(length.shape) / length
        if module.tensors[(LORA_UP, LORA_DOWN)[axis]].shape[axis] != c.size:
            raise ValueError  # the factor and dora_scale disagree
    except (IndexError, ValueError, TypeError) as error:
        raise BloraError(
            f"{module.name} does not fit its weight in {weight.path}: give the checkpoint that the "
            "LoRA was trained on, or cut it at 1.0"
        ) from error
    k = (1 - strength) + strength * c
    wanted = norm((1 - strength) * base + strength * c * trained)
    if not (np.isfinite(c).all() and np.isfinite(wanted).all() and k.all()):
        raise BloraError(f"{module.name} is a DoRA that cannot be cut at {strength:g}: use 1.0")
    return strength * c / k, wanted * np.sign(k)


def bake_dora(module: Module, strength: float, weight: Stored) -> Module:
    """The module at this strength, which holds for this weight; solved when it is written.

    The new dora_scale is stored as fp32: it is as large as the weight's rows, so that rounded to
    fp16 or bf16 it would be off by 0.4 or 3.4 % of the change.
    """
    old = module.tensors
    axis = 0 if old[DORA].shape[0] != 1 else 1  # of the weight: dora_scale has a number for each
    factor = (LORA_UP, LORA_DOWN)[axis]  # whose rows, or columns, are those of dora_scale
    check_floats(module, (factor, DORA))
    sources = (weight, old[LORA_UP], old[LORA_DOWN], old[DORA])
    wide = "F64" if any(DTYPES.get(tensor.dtype) == 64 for tensor in sources) else "F32"
    solution = cache(partial(solve_dora, module, strength, weight, axis))

    def solved(suffix: str, dtype: str, solve: Callable[[], np.ndarray]) -> Changed:
        shape = old[suffix].shape
        return Changed(dtype, shape, f"{module.name}.{suffix}", Solved(wide, shape, solve))

    dtype = "F64" if old[DORA].dtype == "F64" else "F32"
    scale = solved(DORA, dtype, lambda: solution()[1].reshape(old[DORA].shape))
    stored = old[factor]
    along = [-1 if n == axis else 1 for n in range(len(stored.shape))]
    scaled = solved(factor, stored.dtype, lambda: values(stored) * solution()[0].reshape(along))
    return replace(module, tensors=old | {factor: scaled, DORA: scale})
