"""What a LoRA is: algorithms and their tensors, a module, a file's modules."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from blora.sdxl import Layer, layers_by_module
from blora.slicer.keys import ALPHA, DORA, LORA_DOWN, LORA_MID, LORA_UP, SUFFIXES, UP_BIAS
from blora.tensorfile import Constant, Tensor, number


@dataclass(frozen=True)
class Algorithm:
    """A way to store a change: its markers, what it needs, and what a strength multiplies.

    Each of `scaled` is a factor of a separate part of the change, so multiplying all of them
    multiplies the change once. `reason` says why there are none.
    """

    name: str
    markers: tuple[str, ...]
    scaled: tuple[str, ...]
    rank: str = ""  # the tensor whose length is the rank
    needs: tuple[tuple[str, ...], ...] = ((),)  # beside the markers, all of one of these
    may_have: tuple[str, ...] = ()
    reason: str = ""


# As LyCORIS 4.1 writes them (github.com/KohakuBlueleaf/LyCORIS, lycoris/modules); what a strength
# multiplies was measured in the programs of docs/what_loads_where.md. The sparse bias of
# LyCORIS' extract_locon.py is added to the product of the factors and multiplied by alpha / rank
# with it, as PEFT's bias of lora_B is.
ROTATION = "a rotation cannot be multiplied"
ALGORITHMS = (
    Algorithm("LoRA", (LORA_UP,), (LORA_UP, UP_BIAS, "bias_values"), LORA_DOWN, ((LORA_DOWN,),),
              (LORA_MID, UP_BIAS, "bias_indices", "bias_values", "bias_size")),
    Algorithm("LoHa", ("hada_w1_a",), ("hada_w1_a",), "hada_w1_b",
              (("hada_w1_b", "hada_w2_a", "hada_w2_b"),), ("hada_t1", "hada_t2")),
    Algorithm("LoKr", ("lokr_w1",), ("lokr_w1",), "lokr_w2_b",
              (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b")), ("lokr_t2",)),
    Algorithm("LoKr", ("lokr_w1_a",), ("lokr_w1_a",), "lokr_w1_b",
              (("lokr_w1_b", "lokr_w2"), ("lokr_w1_b", "lokr_w2_a", "lokr_w2_b")), ("lokr_t2",)),
    Algorithm("full", ("diff",), ("diff",)),
    Algorithm("norm", ("w_norm",), ("w_norm",)),
    Algorithm("IA3", ("weight", "on_input"), ("weight",)),
    Algorithm("GLoRA", ("a2.weight", "b2.weight"), ("a2.weight", "b2.weight"), "a2.weight",
              (("a1.weight", "b1.weight"),), ("bm.weight",)),
    Algorithm("T-LoRA", ("lambda_layer",), (), needs=(("q_layer.weight", "p_layer.weight"),),
              reason="the factors it started from are not in it"),
    Algorithm("OFT", ("oft_blocks",), (), may_have=("rescale",), reason=ROTATION),
    Algorithm("OFT", ("oft_R.weight",), (), may_have=("oft_R.scaled_oft",), reason=ROTATION),
    Algorithm("bias", ("diff_b",), ("diff_b",)),
)  # fmt: skip
# Further changes that any algorithm can have beside its factors.
ADDED = ("diff", "diff_b", "w_norm", "b_norm")
UNKNOWN = Algorithm("unknown", (), ())

# What the axes of each tensor mean; the last one takes all that remain. The change has o times p
# rows and i times j times k columns (a kernel is part of the columns), and a letter has one size in
# the whole module. "n" is the number of outputs, "c" of inputs, "m" either.
AXES = {
    LORA_UP: "o r", LORA_DOWN: "r i",
    "hada_w1_a": "o r", "hada_w1_b": "r i", "hada_w2_a": "o s", "hada_w2_b": "s i",
    "lokr_w1": "p j", "lokr_w1_a": "p q", "lokr_w1_b": "q j",
    "lokr_w2": "o i", "lokr_w2_a": "o r", "lokr_w2_b": "r i",
    "b1.weight": "o r", "b2.weight": "r i k", "a1.weight": "i s", "a2.weight": "s i",
    "p_layer.weight": "o r", "q_layer.weight": "r c", "oft_blocks": "p o o",
    "diff": "o i", "w_norm": "o", "diff_b": "n", "b_norm": "n", "weight": "m", DORA: "m",
    UP_BIAS: "n",
}  # fmt: skip
# The same with a tucker core, which has the kernel, between the two ranks.
TUCKER = {
    LORA_MID: {LORA_MID: "r s k", LORA_DOWN: "s i"},
    "hada_t1": {"hada_t1": "r s k", "hada_w1_a": "r o", "hada_w1_b": "s i"},
    "hada_t2": {"hada_t2": "t u k", "hada_w2_a": "t o", "hada_w2_b": "u i"},
    "lokr_t2": {"lokr_t2": "r s k", "lokr_w2_a": "r o", "lokr_w2_b": "s i"},
}


@dataclass(frozen=True)
class Module:
    """What a LoRA changes in one layer: the tensors by suffix, such as "lora_up.weight"."""

    name: str
    tensors: dict[str, Tensor]
    factor: float = 1.0  # what its program multiplies the change with, beside alpha / rank
    is_guess: bool = False  # whether it needs an alpha, and none is stored

    @property
    def layer(self) -> Layer:
        """The layer of SDXL that it changes."""
        return layers_by_module()[self.name]

    @cached_property
    def algorithm(self) -> Algorithm:
        """The first whose markers are all there; UNKNOWN where there is none."""
        for algorithm in ALGORITHMS:
            if all(marker in self.tensors for marker in algorithm.markers):
                return algorithm
        return UNKNOWN

    @property
    def label(self) -> str:
        """The algorithm's usual name."""
        name = self.algorithm.name
        blocks = self.tensors.get("oft_blocks")
        if name == "OFT" and blocks and len(blocks.shape) == 4:
            name = "BOFT"
        if DORA in self.tensors:
            name = "DoRA" if name == "LoRA" else f"{name} with DoRA"
        return name

    @property
    def rank(self) -> int | None:
        """None where the algorithm has none, or the tensor that shows it is missing."""
        tensor = self.tensors.get(self.algorithm.rank) if self.algorithm.rank else None
        return tensor.shape[0] if tensor and tensor.shape else None

    @cached_property
    def alpha(self) -> float | None:
        """As stored; None where it is missing, which means the rank."""
        alpha = self.tensors.get(ALPHA)
        if alpha is None or not math.prod(alpha.shape):
            return None
        data = alpha.read()
        return number(alpha.dtype, data[: len(data) // math.prod(alpha.shape)])

    @property
    def alpha_is_read(self) -> bool:
        """Whether programs read its alpha: not that of a change without a rank, as a whole LoKr."""
        return not self.algorithm.scaled or self.rank is not None

    @property
    def effective_alpha(self) -> float:
        """alpha as programs read it: 0 means the rank, as does none."""
        return self.alpha or float(self.rank or 0)

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied with."""
        return self.factor * (self.effective_alpha / self.rank if self.rank else 1.0)

    @property
    def is_ranked_lora(self) -> bool:
        """Whether it is one of the modules that diffusers scales by a single alpha."""
        return self.algorithm.name == "LoRA" and bool(self.rank)

    @property
    def unknown(self) -> list[str]:
        """Its tensors that are not part of its algorithm: what they do is not known."""
        kind = self.algorithm
        known = {*kind.markers, *sum(kind.needs, ()), *kind.may_have, ALPHA, DORA, *ADDED}
        return [suffix for suffix in self.tensors if suffix not in known]

    @cached_property
    def is_incomplete(self) -> bool:
        """Whether it lacks a factor, or has a tucker core that does not fit."""
        if self.algorithm is UNKNOWN:
            return self.tensors.keys() <= SUFFIXES.keys()
        is_whole = any(self.tensors.keys() >= {*group} for group in self.algorithm.needs)
        return not is_whole or (bool(TUCKER.keys() & self.tensors.keys()) and not self.fits)

    @cached_property
    def sizes(self) -> dict[str, int] | None:
        """The size of each axis, by its letter in AXES; None where two tensors disagree."""
        axes = dict(AXES)
        for core, with_core in TUCKER.items():
            axes |= with_core if core in self.tensors else {}
        sizes: dict[str, int] = {}
        for suffix in axes.keys() & self.tensors.keys():
            shape, letters = self.tensors[suffix].shape, axes[suffix].split()
            if suffix == "oft_blocks":  # BOFT has several layers of them
                shape = shape[-3:]
            # A factor of a matrix is a matrix; what changes a norm has one axis.
            if len(shape) < min(len(letters), 2 if self.layer.shape[1:] else 1):
                return None
            last = len(letters) - 1
            lengths = (*shape[:last], math.prod(shape[last:]))
            if any(sizes.setdefault(a, n) != n for a, n in zip(letters, lengths, strict=False)):
                return None
        return sizes

    @property
    def columns(self) -> int | None:
        """Of the change, as a matrix; None where it has none, or its tensors disagree."""
        sizes = self.sizes or {}
        return math.prod(sizes.get(axis, 1) for axis in "ijk") if "i" in sizes else None

    @cached_property
    def fits(self) -> bool:
        """Whether the factors fit each other and the layer's weight."""
        if self.sizes is None:
            return False
        outputs, *inputs = self.layer.shape
        sizes, rows = self.sizes, math.prod(self.sizes.get(axis, 1) for axis in "op")
        return (
            ("o" not in sizes or rows == outputs)
            and self.columns in (None, math.prod(inputs))
            and sizes.get("n", outputs) == outputs
            and ("c" not in sizes or sizes["c"] in inputs[:1])
            and sizes.get("m", outputs) in (outputs, *inputs[:1])
        )


def with_alpha(module: Module, alpha: float) -> Module:
    """The module with this alpha, as fp32, whatever it had."""
    constant = Constant("F32", (), struct.pack("<f", alpha))
    return replace(module, tensors=module.tensors | {ALPHA: constant})


def with_rank_as_alpha(module: Module) -> Module:
    """The module with alpha = rank where it has none: this means the same, and LyCORIS needs it.

    A LoKr of two whole factors needs one too, which LyCORIS does not read.
    """
    if module.alpha is not None or not module.algorithm.rank or module.rank == 0:
        return module
    return with_alpha(module, float(module.rank or 1))


@dataclass(frozen=True)
class Lora:
    """A LoRA file, its modules in kohya's names."""

    path: Path
    modules: dict[str, Module]
    metadata: dict[str, str]
    unplaced: list[str]  # keys of no layer of SDXL
    layer_weights: list[str]  # keys of plain weights or biases of a layer
    namings: list[str]  # which programs' naming it has
    copies: dict[str, list[Module]]  # further ones of modules that it holds more than once
