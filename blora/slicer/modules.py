"""What a LoRA is: algorithms and their tensors, a module, a file's modules."""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from blora.sdxl import Layer, layers_by_module
from blora.slicer.keys import ALPHA, DORA, LORA_DOWN, LORA_MID, LORA_UP, SUFFIXES, UP_BIAS
from blora.tensorfile import Constant, Stored, Tensor, number


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
# Tensors of a PEFT LoRA that only its training uses: its merge, and every other program, do not.
UNREAD = ("lora_velora_embed", "lora_monteclora_sampler")
# How the tensors of algorithms begin that only PEFT has (peft 0.21.2, tuners/*/layer.py).
PEFT_TENSORS = {
    "lora_E": "AdaLoRA", "lora_diag": "KaSA", "adamss_": "AdaMSS", "beft_": "BEFT",
    "boft_": "BOFT", "c3a_": "C3A", "deft_": "DEFT", "delora_": "DeLoRA",
    "fourierft_": "FourierFT", "frod_": "FRoD", "glora_": "GLoRA", "gralora_": "GraLoRA",
    "hira_": "HiRA", "hra_": "HRA", "ia3_": "IA3", "lily_": "Lily", "ln_tuning_": "LN tuning",
    "miss_": "MiSS", "osf_": "OSF", "peanut_": "PEANuT",
    "poly_": "Poly", "psoft_": "PSOFT", "pvera_": "PVeRA", "randlora_": "RandLoRA",
    "road_": "RoAd", "shira_": "SHiRA", "supertuning_": "super tuning", "tinylora_": "TinyLoRA",
    "trainable_tokens_": "trainable tokens", "unilora_": "UniLoRA", "vblora_": "VB-LoRA",
    "vera_": "VeRA", "waveft_": "WaveFT",
}  # fmt: skip
# How factors are stored that fit no layer.
TRANSPOSED = "transposed, as PaddleMIX stores them"
BLOCK_DIAGONAL = "block-diagonal, as PEFT's BD-LoRA stores them"
# Algorithms whose change can be split by rows, as that of fused projections has to be.
BY_ROWS = ("LoRA", "LoHa", "LoKr", "GLoRA", "full", "bias")


def peft_tuner(suffix: str) -> str | None:
    """The algorithm of PEFT alone that a tensor belongs to."""
    match = re.match("|".join(PEFT_TENSORS), suffix)
    return PEFT_TENSORS[match[0]] if match else None


@dataclass(frozen=True)
class Module:
    """What a LoRA changes in one layer: the tensors by suffix, such as "lora_up.weight"."""

    name: str
    tensors: dict[str, Tensor]
    factor: float = 1.0  # what its program multiplies the change with, beside alpha / rank
    is_guess: bool = False  # whether it needs an alpha, and none is stored
    keys: dict[str, str] = field(default_factory=dict)  # of the tensors in the file, by suffix
    fused: str = ""  # the name in the file of the fused projections that it is a part of

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
        """The keys in the file of tensors that are not part of its algorithm."""
        kind = self.algorithm
        known = {*kind.markers, *sum(kind.needs, ()), *kind.may_have, ALPHA, DORA, *ADDED}
        return [self.keys.get(suffix, suffix) for suffix in self.tensors if suffix not in known]

    @property
    def is_unknown(self) -> bool:
        """Whether it holds no algorithm's tensors, but others."""
        return self.algorithm is UNKNOWN and not self.is_incomplete

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
            is_rotation = suffix == "oft_blocks"
            if is_rotation:  # of which BOFT has several layers
                shape = shape[-3:]
            # A factor of a matrix is a matrix, or has a kernel; what changes a norm has one axis.
            fewest = min(len(letters), 2 if self.layer.shape[1:] else 1)
            if len(shape) < fewest or (len(shape) not in (1, 2, 4) and not is_rotation):
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
            and (DORA not in self.tensors or self.dora_axis is not None)
        )

    @property
    def misfit(self) -> str:
        """How factors that do not fit the layer are stored, where that is known."""
        up, down = (self.tensors.get(suffix) for suffix in (LORA_UP, LORA_DOWN))
        if not (up and down and len(up.shape) == len(down.shape) == len(self.layer.shape) == 2):
            return ""
        outputs, inputs = self.layer.shape
        (rows, rank), (ranks, columns) = up.shape, down.shape
        if (ranks, rank, rows) == (inputs, outputs, columns):
            return TRANSPOSED
        has_all_rows = rows == outputs
        is_down = rank == ranks and 0 < columns < inputs and inputs % columns == 0
        is_up = columns == inputs and 0 < rank < ranks and ranks % rank == 0
        return BLOCK_DIAGONAL if has_all_rows and (is_down or is_up) else ""

    @property
    def dora_axis(self) -> int | None:
        """The axis of the weight that a dora_scale has a number for each of, if it is one."""
        shape, weight = self.tensors[DORA].shape, self.layer.shape
        ones = [1] * (len(shape) - 1)
        if [*shape] == [weight[0], *ones]:
            return 0
        return 1 if [*shape] == [1, *weight[1:2], *ones[1:]] else None


def split_by_rows(tensors: dict[str, Stored], number: int) -> list[dict[str, Stored]] | None:
    """The tensors of so many equal parts of a change's rows; None where it cannot be split so.

    A tensor with an axis of rows is split along it, and the others are in every part: the first
    factor of a LoRA and of each half of a LoHa, the small factor of a LoKr.
    """
    whole = Module("", {**tensors})
    is_core = not TUCKER.keys().isdisjoint(tensors)
    if whole.algorithm.name not in BY_ROWS or is_core or "bias_values" in tensors or whole.unknown:
        return None
    axis = "p" if whole.algorithm.name == "LoKr" else "o"
    parts: list[dict[str, Stored]] = [{} for _ in range(number)]
    for suffix, tensor in tensors.items():
        has_rows = suffix == DORA or AXES.get(suffix, "")[:1] in (axis, "n")
        if has_rows and (not tensor.shape or tensor.shape[0] % number or tensor.size % number):
            return None
        for index, part in enumerate(parts):
            part[suffix] = tensor.rows(index, number) if has_rows else tensor
    return parts


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


# Why keys of a file are in none of its modules.
SKIPPED = {
    "own": "plain layer weights, not part of a LoRA",
    "biases": "trained biases, which are whole ones: only PEFT can load them",
    "unread": "tensors that only PEFT's training uses",
    "unplaced": "tensors with unknown names",
}


@dataclass(frozen=True)
class Lora:
    """A LoRA file, its modules in kohya's names."""

    path: Path
    modules: dict[str, Module]
    metadata: dict[str, str]
    skipped: dict[str, list[str]]  # keys of the file that are in no module, by those of SKIPPED
    namings: list[str]  # which programs' naming it has
    copies: dict[str, list[Module]]  # further ones of modules that it holds more than once
    remarks: list[str]  # notes and warnings about the file as a whole
