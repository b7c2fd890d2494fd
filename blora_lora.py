"""What a LoRA is: the algorithms and their tensors, a module, and a file of any naming as modules.

blora_slicer.py reads LoRAs with it; blora_cut.py, blora_strength.py and blora_inspect.py work on
their modules.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from blora_safetensors import Tensor, as_fp32, number, read_header
from blora_sdxl import Layer, find_layer, layers_by_module
from blora_words import BloraError, first_few, printable

# ---- Algorithms and modules ----------------------------------------------------------------------

LORA_UP, LORA_DOWN, LORA_MID = "lora_up.weight", "lora_down.weight", "lora_mid.weight"
ALPHA, DORA = "alpha", "dora_scale"


@dataclass(frozen=True)
class Algorithm:
    """A way to store a change: how to know it, and which tensors a strength multiplies.

    Each of `scaled` is a factor of a separate part of the change, so multiplying all of them
    multiplies the change once. `reason` says why there are none.
    """

    name: str
    markers: tuple[str, ...]
    scaled: tuple[str, ...]
    rank: tuple[str, ...] = ()  # the first of these that is there has the rank as its length
    reason: str = ""


# As LyCORIS 4.1 writes them (github.com/KohakuBlueleaf/LyCORIS, lycoris/modules); what a strength
# multiplies was measured in six programs.
ALGORITHMS = (
    Algorithm("LoRA", (LORA_UP,), (LORA_UP,), (LORA_DOWN,)),
    Algorithm("LoHa", ("hada_w1_a",), ("hada_w1_a",), ("hada_w1_b",)),
    Algorithm("LoKr", ("lokr_w1",), ("lokr_w1",), ("lokr_w2_b",)),
    Algorithm("LoKr", ("lokr_w1_a",), ("lokr_w1_a",), ("lokr_w1_b",)),
    Algorithm("full", ("diff",), ("diff",)),
    Algorithm("norm", ("w_norm",), ("w_norm",)),
    Algorithm("IA3", ("weight", "on_input"), ("weight",)),
    Algorithm("GLoRA", ("a2.weight", "b2.weight"), ("a2.weight", "b2.weight"), ("a2.weight",)),
    Algorithm("T-LoRA", ("lambda_layer",), (), reason="the factors it started from are not in it"),
    Algorithm("OFT", ("oft_blocks",), (), reason="a rotation cannot be multiplied"),
)
# Changes of their own that stand beside any algorithm's factors.
ADDED = ("diff", "diff_b", "w_norm", "b_norm")
UNKNOWN = Algorithm("unknown", (), (), reason="its tensors are of no kind known here")

# What the axes of each tensor mean; the last one takes all that are left. The change has
# o times p rows and i times j times k columns (a kernel is part of the columns), and a letter has
# one size in the whole module. "n" is as many as the outputs, "c" as the inputs, "m" as either.
AXES = {
    LORA_UP: "o r", LORA_DOWN: "r i",
    "hada_w1_a": "o r", "hada_w1_b": "r i", "hada_w2_a": "o s", "hada_w2_b": "s i",
    "lokr_w1": "p j", "lokr_w1_a": "p q", "lokr_w1_b": "q j",
    "lokr_w2": "o i", "lokr_w2_a": "o r", "lokr_w2_b": "r i",
    "b1.weight": "o r", "b2.weight": "r i k", "a1.weight": "i s", "a2.weight": "s i",
    "p_layer.weight": "o r", "q_layer.weight": "r c", "oft_blocks": "p o o",
    "diff": "o i", "w_norm": "o", "diff_b": "n", "b_norm": "n", "weight": "m", DORA: "m",
}  # fmt: skip
# The same with a tucker core: it has the kernel, and out and in only meet its two ranks.
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

    @property
    def layer(self) -> Layer:
        """The layer of SDXL that it changes."""
        return layers_by_module()[self.name]

    @property
    def algorithm(self) -> Algorithm:
        """The first whose markers are all there; UNKNOWN where there is none."""
        for algorithm in ALGORITHMS:
            if all(marker in self.tensors for marker in algorithm.markers):
                return algorithm
        return UNKNOWN

    @property
    def label(self) -> str:
        """The algorithm's name as people say it."""
        name = self.algorithm.name
        if name == "OFT" and len(self.tensors["oft_blocks"].shape) == 4:
            name = "BOFT"
        if DORA in self.tensors:
            name = "DoRA" if name == "LoRA" else f"{name} with DoRA"
        return name

    @property
    def rank(self) -> int | None:
        """None where the algorithm has none."""
        for suffix in self.algorithm.rank:
            if suffix in self.tensors and self.tensors[suffix].shape:
                return self.tensors[suffix].shape[0]
        return None

    @cached_property
    def alpha(self) -> float | None:
        """As stored; None where it is not, which means the rank."""
        alpha = self.tensors.get(ALPHA)
        if alpha is None or not math.prod(alpha.shape):
            return None
        data = alpha.read()
        return number(alpha.dtype, data[: len(data) // math.prod(alpha.shape)])

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied with: alpha / rank, or 1."""
        return (self.alpha or self.rank) / self.rank if self.rank else 1.0

    @cached_property
    def fits(self) -> bool:
        """Whether the factors fit each other and the layer's weight."""
        axes = dict(AXES)
        for core, with_core in TUCKER.items():
            axes |= with_core if core in self.tensors else {}
        outputs, *inputs = self.layer.shape
        sizes: dict[str, int] = {}
        for suffix in axes.keys() & self.tensors.keys():
            shape, letters = self.tensors[suffix].shape, axes[suffix].split()
            if suffix == "oft_blocks":  # BOFT has several layers of them
                shape = shape[-3:]
            # A factor of a matrix is a matrix; what changes a norm has one axis.
            if len(shape) < min(len(letters), 2 if inputs else 1):
                return False
            if not same_sizes(letters, shape, sizes):
                return False
        rows, columns = (math.prod(sizes.get(axis, 1) for axis in side) for side in ("op", "ijk"))
        return (
            ("o" not in sizes or rows == outputs)
            and ("i" not in sizes or columns == math.prod(inputs))
            and sizes.get("n", outputs) == outputs
            and ("c" not in sizes or sizes["c"] in inputs[:1])
            and sizes.get("m", outputs) in (outputs, *inputs[:1])
        )


def same_sizes(letters: list[str], shape: tuple[int, ...], sizes: dict[str, int]) -> bool:
    """Whether a shape agrees with the sizes known of its axes, to which it adds."""
    kept = len(letters) - 1
    axes = zip(letters, (*shape[:kept], math.prod(shape[kept:])), strict=False)
    return all(sizes.setdefault(letter, size) == size for letter, size in axes)


def with_alpha(module: Module, alpha: float) -> Module:
    """The module with this alpha, as fp32, whatever it had."""
    constant = Tensor("F32", (), struct.pack("<f", alpha))
    return replace(module, tensors=module.tensors | {ALPHA: constant})


# ---- Reading -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lora:
    """A LoRA file, its modules in kohya's names; `unplaced` are keys of no layer of SDXL."""

    path: Path
    modules: dict[str, Module]
    metadata: dict[str, str]
    unplaced: tuple[str, ...]


# How PEFT, diffusers and the original B-LoRA spell a suffix, behind a layer's name with dots.
SUFFIXES = {
    LORA_DOWN: r"(\.lora_A(\.\w+)?|(\.lora|_lora|\.lora_linear_layer)\.down|\.lora_down)\.weight\Z",
    LORA_UP: r"(\.lora_B(\.\w+)?|(\.lora|_lora|\.lora_linear_layer)\.up|\.lora_up)\.weight\Z",
    DORA: r"(\.lora_magnitude_vector(\.\w+)?(\.weight)?|\.dora_scale)\Z",
    ALPHA: r"(\.lora|_lora)?\.alpha\Z",
}
# PEFT's settings of each network in the metadata, as diffusers writes them.
PEFT_SETTINGS = {"unet.": "unet", "text_encoder.": "te1", "text_encoder_2.": "te2"}


def split_key(key: str) -> tuple[str, str] | None:
    """(layer, suffix) of a key of any naming, the suffix as kohya spells it."""
    if key.startswith("lora_"):
        layer, _, suffix = key.partition(".")
        return (layer, suffix) if suffix else None
    for suffix, pattern in SUFFIXES.items():
        if match := re.search(pattern, key):
            return key[: match.start()], suffix
    return None


def find_module(key: str) -> tuple[str, str, str] | None:
    """(module, suffix, layer) of a key: kohya's names, and the layer's name less its prefix.

    None where SDXL has no such layer.
    """
    parts = split_key(key)
    placed = find_layer(parts[0]) if parts else None
    return (placed[0].module, parts[1], placed[1]) if placed else None


def json_object(text: str | None) -> dict[str, Any]:
    """A metadata value that should be a JSON object; anything else is an empty one."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def peft_settings(metadata: dict[str, str], path: Path) -> dict[str, dict[str, Any]]:
    """PEFT's settings by network: diffusers reads each module's alpha from them."""
    try:
        settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        return {
            network: {
                key.removeprefix(prefix): value
                for key, value in settings.items()
                if key.startswith(prefix)
            }
            for prefix, network in PEFT_SETTINGS.items()
        }
    except (ValueError, AttributeError, RecursionError) as error:
        raise BloraError(f"cannot read lora_adapter_metadata of {path} ({error})") from error


def peft_alpha(settings: dict[str, Any], layer: str, rank: int) -> float:
    """A layer's alpha by PEFT's settings: that of the first pattern that ends its name.

    As get_pattern_key and rslora's scaling do (github.com/huggingface/peft, utils/other.py and
    tuners/lora/layer.py).
    """
    alpha, patterns = settings["lora_alpha"], settings.get("alpha_pattern")
    for pattern, other in (patterns if isinstance(patterns, dict) else {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            alpha = other
            break
    return float(alpha) * (math.sqrt(rank) if settings.get("use_rslora") else 1)


def with_peft_alpha(module: Module, layer: str, settings: dict[str, Any]) -> Module:
    """The module with the alpha that PEFT's settings give it, where its tensors have none."""
    if "lora_alpha" not in settings or not module.rank or module.alpha is not None:
        return module
    try:
        alpha = as_fp32(peft_alpha(settings, layer, module.rank))
    except (TypeError, ValueError, OverflowError, re.error):
        alpha = math.nan
    if not math.isfinite(alpha):
        raise BloraError(f"lora_adapter_metadata gives {module.name} an alpha that is no number")
    return module if alpha == module.rank else with_alpha(module, alpha)


def read_lora(path: Path) -> Lora:
    """A LoRA file of any naming, as modules with kohya's names; BloraError where it is none."""
    if not path.is_file():
        raise BloraError(f"no file at {path}: correct --loras")
    tensors, metadata = read_header(path)
    modules: dict[str, dict[str, Tensor]] = {}
    layers: dict[str, str] = {}  # modules by the names that PEFT's patterns are about
    unplaced = []
    for key, tensor in tensors.items():
        placed = find_module(key)
        if placed is None:
            unplaced.append(key)
            continue
        name, suffix, layers[name] = placed
        if suffix in modules.setdefault(name, {}):
            raise BloraError(
                f"{path} holds {name}.{printable(suffix)} twice, under two names: keep one"
            )
        if suffix == DORA and "magnitude" in key:  # PEFT's, of [out] or [1, out, 1, 1]: by row
            shape = (math.prod(tensor.shape), 1, *tensor.shape[2:])
            tensor = replace(tensor, shape=shape)
        modules[name][suffix] = tensor
    if not modules:
        holds = first_few(sorted(tensors)) or "no tensor at all"
        raise BloraError(f"{path} is no SDXL LoRA: it holds {holds}")
    settings = peft_settings(metadata, path)
    loaded = {}
    for name in sorted(modules):
        module = Module(name, modules[name])
        loaded[name] = with_peft_alpha(module, layers[name], settings[module.layer.network])
    return Lora(path, loaded, metadata, tuple(unplaced))


def file_tensors(modules: Iterable[Module]) -> dict[str, Tensor]:
    """All tensors of the modules, by the key they have in a file."""
    return {f"{m.name}.{suffix}": t for m in modules for suffix, t in m.tensors.items()}
