#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy", "safetensors", "tqdm"]
# ///
"""Slice the content or the style out of a B-LoRA, as a smaller LoRA of its own.

  blora_slicer.py --loras my_project_1.safetensors
      keeps the content in model.safetensors, beside this script
  blora_slicer.py --loras my_project_1.safetensors --traits style --alphas 0.8 \\
      --output_path my_style.safetensors
      keeps the style, at 0.8 of its strength
  blora_slicer.py --loras a.safetensors b.safetensors --traits content style
      joins the content of a with the style of b
  blora_slicer.py --loras a.safetensors --traits content style --not_combined
      writes model_content.safetensors and model_style.safetensors
  blora_slicer.py --loras a.safetensors --inspect
      writes nothing, and shows what the file holds, block by block

--loras, --traits and --alphas go together by their order. Where there are fewer LoRAs than
traits the last LoRA is used again; a trait left out is content, a strength left out is 1.0.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import math
import os
import re
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import numpy as np

HERE = Path(__file__).resolve().parent
DEFAULT_TRAIT = "content"
DEFAULT_STRENGTH = 1.0
CHUNK = 1 << 20  # bytes read, hashed and written at a time
SHOW_PROGRESS = 200_000_000  # bytes; less is written within a second
NAMED = 3  # how many of many keys a message names

# safetensors' own order of tensors in a file: wide types first, so that each is aligned.
DTYPES = (
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16",
    "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "F6_E3M2", "F6_E2M3", "F4", "BOOL",
)  # fmt: skip
FLOATS = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}  # those whose values can be changed: bytes
PRECISIONS = {"float": "F32", "fp16": "F16", "bf16": "BF16"}
NUMPY = {
    "F16": "<f2", "F32": "<f4", "F64": "<f8", "BOOL": "?", "U8": "u1", "I8": "i1",
    "I16": "<i2", "U16": "<u2", "I32": "<i4", "U32": "<u4", "I64": "<i8", "U64": "<u8",
}  # fmt: skip

LORA_UP, LORA_DOWN, LORA_MID = "lora_up.weight", "lora_down.weight", "lora_mid.weight"
ALPHA, DORA = "alpha", "dora_scale"


class SliceError(Exception):
    """A mistake the user can mend; the message is one sentence that says how."""


@dataclass(frozen=True)
class Algorithm:
    """A way to store a change: how to know it, and which tensors a strength multiplies.

    Each of `scaled` is a factor of a part of the change of its own, so that multiplying all of
    them multiplies the change once. `reason` says why there are none.
    """

    name: str
    markers: tuple[str, ...]
    scaled: tuple[str, ...]
    rank: tuple[str, ...] = ()  # the first of these that is there has the rank as its length
    reason: str = ""


# As LyCORIS 4.1 writes them (lycoris/modules); the strength's place was measured in six programs.
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


@dataclass(frozen=True)
class Trait:
    """A set of modules, chosen by parts of their names, as blora_traits.json states it."""

    name: str
    whitelist: tuple[str, ...]
    blacklist: tuple[str, ...]

    def keeps(self, module: str) -> bool:
        """Whether `module` (a kohya name, without tensor suffix) belongs to the trait."""
        return any(part in module for part in self.whitelist) and not any(
            part in module for part in self.blacklist
        )


@dataclass(frozen=True)
class Cut:
    """One slice to make: which trait of which LoRA, at which strength."""

    lora: Path
    trait: Trait
    strength: float


@dataclass(frozen=True)
class Entry:
    """A tensor as a file stores it: its type, its shape, and where its bytes are."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Tensor:
    """A tensor to write: the bytes of an entry, or values made when they are needed.

    Where `factor` is 1 and `dtype` is the entry's own, the bytes are copied as they are.
    """

    dtype: str
    shape: tuple[int, ...]
    entry: Entry | None = None
    make: Callable[[], np.ndarray] | None = None
    factor: float = 1.0

    @property
    def is_copy(self) -> bool:
        return self.entry is not None and self.factor == 1 and self.dtype == self.entry.dtype

    @property
    def size(self) -> int:
        """Bytes in the file to write."""
        if self.is_copy:
            return self.entry.stop - self.entry.start
        return math.prod(self.shape) * FLOATS[self.dtype]


@dataclass(frozen=True)
class Module:
    """What a LoRA changes in one layer: the tensors by suffix, such as "lora_up.weight"."""

    name: str
    tensors: dict[str, Tensor]

    @property
    def algorithm(self) -> Algorithm:
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

    @property
    def alpha(self) -> float | None:
        """As stored; None where it is not, which means the rank."""
        alpha = self.tensors.get(ALPHA)
        return scalar(alpha) if alpha and math.prod(alpha.shape) else None

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied with: alpha / rank, or 1."""
        return (self.alpha or self.rank) / self.rank if self.rank else 1.0


@dataclass(frozen=True)
class Lora:
    """A LoRA file, its modules in kohya's names; `unplaced` are keys that are none of SDXL's."""

    path: Path
    modules: dict[str, Module]
    metadata: dict[str, str]
    unplaced: tuple[str, ...]


@dataclass(frozen=True)
class Slice:
    """What a cut kept, at its strength, and the file it is from."""

    cut: Cut
    modules: tuple[Module, ...]
    lora: Lora


# ---- Words ---------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """`text` with everything that could move a terminal's cursor written as an escape."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def first_few(keys: Iterable[str]) -> str:
    """Some of many keys: "a, b, c and 7 more"."""
    keys = [printable(key) for key in keys]
    more = len(keys) - NAMED
    return ", ".join(keys[:NAMED]) + (f" and {more} more" if more > 0 else "")


def describe(cut: Cut) -> str:
    """A cut in words: "content of a.safetensors"."""
    return f"{printable(cut.trait.name)} of {cut.lora.name}"


def span(values: Iterable[float | None]) -> str:
    """Numbers in words: "4", or "4 to 8" where they differ, "-" where there are none."""
    known = sorted({value for value in values if value is not None})
    return " to ".join(f"{value:g}" for value in dict.fromkeys(known[:1] + known[-1:])) or "-"


def summarize(modules: Iterable[Module]) -> str:
    """Counts of what a slice holds: "80 modules, 240 tensors, rank 1024"."""
    modules = list(modules)
    parts = [f"{len(modules)} modules", f"{sum(len(m.tensors) for m in modules)} tensors"]
    ranks = [module.rank for module in modules]
    return ", ".join(parts + ([f"rank {span(ranks)}"] if any(ranks) else []))


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def note(text: str) -> None:
    """What is said besides the results goes to stderr."""
    print(text, file=sys.stderr)


# ---- Names ---------------------------------------------------------------------------------------

# Layers of the SDXL U-Net as kohya names them, norms included: sgm names with underscores.
RESNET = "(in_layers_[02]|emb_layers_1|out_layers_[03]|skip_connection)"
SDXL_LAYER = re.compile(
    r"lora_unet_("
    r"(input_blocks_[4578]|middle_block|output_blocks_[0-5])_1_"
    r"(norm|proj_in|proj_out|transformer_blocks_\d_(attn[12]|ff|norm[123])(_.+)?)"
    rf"|(input_blocks_[124578]_0|middle_block_[02]|output_blocks_[0-8]_0)_{RESNET}"
    r"|input_blocks_[36]_0_op|output_blocks_[25]_2_conv"
    r"|input_blocks_0_0|time_embed_[02]|label_emb_0_[02]|out_[02])"
    r"|lora_te[12]_text_model_.+|lora_te2_text_projection"
)
# What diffusers calls by other names. Its levels have up to three layers, so that layer j of level
# i is block 3i + j on the way up, and one more on the way down, where block 0 is conv_in.
DIFFUSERS_LEVEL = re.compile(
    r"(down|up)_blocks_(\d)_(resnets|attentions|downsamplers|upsamplers)_(\d)"
)
DIFFUSERS_NAMES = {
    "conv_in": "input_blocks_0_0", "conv_norm_out": "out_0", "conv_out": "out_2",
    "time_embedding_linear_1": "time_embed_0", "time_embedding_linear_2": "time_embed_2",
    "add_embedding_linear_1": "label_emb_0_0", "add_embedding_linear_2": "label_emb_0_2",
    "mid_block_resnets_0": "middle_block_0", "mid_block_attentions_0": "middle_block_1",
    "mid_block_resnets_1": "middle_block_2",
}  # fmt: skip
DIFFUSERS_RESNET = {
    "norm1": "in_layers_0", "conv1": "in_layers_2", "time_emb_proj": "emb_layers_1",
    "norm2": "out_layers_0", "conv2": "out_layers_3", "conv_shortcut": "skip_connection",
}  # fmt: skip

# Keys with dots in the layer's name, as PEFT, diffusers and the original B-LoRA write them.
COMPONENTS = {
    "unet.unet.": "unet", "unet.": "unet", "text_encoder.": "te1", "text_encoder_2.": "te2",
    "down_blocks.": "unet", "mid_block.": "unet", "up_blocks.": "unet", "conv_in.": "unet",
    "conv_out.": "unet", "time_embedding.": "unet", "add_embedding.": "unet",
}  # fmt: skip
DOTTED_SUFFIXES = {
    LORA_DOWN: re.compile(
        r"(\.lora_A(\.\w+)?|(\.lora|_lora|\.lora_linear_layer)\.down|\.lora_down)\.weight$"
    ),
    LORA_UP: re.compile(
        r"(\.lora_B(\.\w+)?|(\.lora|_lora|\.lora_linear_layer)\.up|\.lora_up)\.weight$"
    ),
    DORA: re.compile(r"(\.lora_magnitude_vector(\.\w+)?(\.weight)?|\.dora_scale)$"),
    ALPHA: re.compile(r"(\.lora|_lora)?\.alpha$"),
}
# diffusers' old attention processors name a text encoder's projections as the U-Net's.
OLD_PROJECTION = re.compile(r"self_attn_to_(q|k|v|out)$")


def sgm_name(name: str) -> str:
    """A U-Net layer in sgm names, with underscores; sgm names stay as they are."""
    if level := DIFFUSERS_LEVEL.match(name):
        way, index, kind, layer = level[1], int(level[2]), level[3], int(level[4])
        block = 3 * index + layer
        start = {
            "downsamplers": f"input_blocks_{3 * index + 3}_0",
            "upsamplers": f"output_blocks_{3 * index + 2}_2",
        }.get(kind, f"input_blocks_{block + 1}" if way == "down" else f"output_blocks_{block}")
        rest = name[level.end() + 1 :]
        if kind == "resnets":
            return f"{start}_0_{DIFFUSERS_RESNET.get(rest, rest)}"
        if kind == "attentions":
            return f"{start}_1_{rest}"
        return f"{start}_{'op' if kind == 'downsamplers' else rest}"
    for other, sgm in DIFFUSERS_NAMES.items():
        if name == other:
            return sgm
        if name.startswith(f"{other}_"):
            rest = name[len(other) + 1 :]
            return f"{sgm}_{DIFFUSERS_RESNET.get(rest, rest)}"
    return name


def dotted_parts(key: str) -> tuple[str, str, str] | None:
    """(component, layer, suffix) of a key with dots in the layer's name, the layer as it is."""
    key = key.removeprefix("base_model.model.")
    for prefix, component in COMPONENTS.items():
        if not key.startswith(prefix):
            continue
        for suffix, pattern in DOTTED_SUFFIXES.items():
            if found := pattern.search(key):
                start = len(prefix) if prefix.startswith(("unet.", "text_")) else 0
                return component, key[start : found.start()], suffix
    return None


def split_dotted(key: str) -> tuple[str, str] | None:
    """(module, suffix) of a key with dots in the layer's name, the module with underscores."""
    parts = dotted_parts(key)
    if parts is None:
        return None
    component, layer, suffix = parts
    layer = layer.replace(".processor.", ".").replace(".", "_")
    if component == "unet":
        layer = re.sub("_to_out$", "_to_out_0", layer)
    else:
        layer = OLD_PROJECTION.sub(r"self_attn_\1_proj", layer)
        # transformers 5 has no text_model between the encoder and its layers.
        layer = re.sub("^(?=encoder_layers_|final_layer_norm)", "text_model_", layer)
    return f"lora_{component}_{layer}", suffix


def place(key: str) -> tuple[str, str] | None:
    """(module, suffix) of a key of any naming, in kohya's sgm names; None if it is not SDXL's."""
    if key.startswith(("lora_unet_", "lora_te")):
        module, _, suffix = key.partition(".")
        found = (module, suffix) if suffix else None
    else:
        found = split_dotted(key)
    if found is None:
        return None
    module, suffix = found
    if module.startswith("lora_unet_"):
        module = "lora_unet_" + sgm_name(module.removeprefix("lora_unet_"))
    return (module, suffix) if SDXL_LAYER.fullmatch(module) else None


def block_of(module: str) -> str:
    """The block a module lies in, in words: "output_blocks.0.1", "te2"."""
    if encoder := re.match(r"lora_(te[12])_", module):
        return encoder[1]
    name = module.removeprefix("lora_unet_")
    if block := re.match(r"((?:input|output)_blocks)_(\d)_(\d)|(middle_block)_(\d)", name):
        return ".".join(part for part in block.groups() if part)
    return re.sub(r"(_\d)+$", "", name)


# ---- Traits and pairing --------------------------------------------------------------------------


def parse_trait(name: str, entry: object, source: Path) -> Trait:
    """The trait `name` from its JSON object; a missing blacklist excludes nothing."""
    lists = entry if isinstance(entry, dict) else {}
    whitelist, blacklist = lists.get("whitelist"), lists.get("blacklist", [])
    for part in (whitelist, blacklist):
        if not isinstance(part, list) or not all(isinstance(item, str) for item in part):
            raise SliceError(
                f'trait "{printable(name)}" in {source} is not of the form '
                '{"whitelist": ["..."], "blacklist": ["..."]}: correct it there'
            )
    return Trait(name, tuple(whitelist), tuple(blacklist))


def parse_traits(text: str, source: Path) -> dict[str, Trait]:
    """All traits of a traits file, by name."""
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SliceError(f"{source} is not valid JSON ({error}): correct it there") from error
    if not isinstance(entries, dict):
        raise SliceError(f"{source} holds no traits: its JSON must be one object of traits by name")
    return {name: parse_trait(name, entry, source) for name, entry in entries.items()}


def plan_cuts(
    loras: list[Path], traits: list[str], alphas: list[float], known: dict[str, Trait]
) -> list[Cut]:
    """Pair LoRAs, traits and strengths by their order, filling up what was left out."""
    cuts = []
    for index in range(max(len(loras), len(traits))):
        name = traits[index] if index < len(traits) else DEFAULT_TRAIT
        if name not in known:
            names = ", ".join(printable(trait) for trait in known)
            raise SliceError(f'unknown trait "{printable(name)}": the traits are {names}')
        strength = alphas[index] if index < len(alphas) else DEFAULT_STRENGTH
        cuts.append(Cut(loras[min(index, len(loras) - 1)], known[name], strength))
    return cuts


def plan_outputs(cuts: list[Cut], output: Path, combined: bool) -> dict[Path, list[Cut]]:
    """Which file each cut goes to.

    One for all when combined. Otherwise one a cut, named after the output and the trait, and
    after the LoRA as well where several LoRAs give the same trait.
    """
    if combined:
        return {output: cuts}
    plan: dict[Path, list[Cut]] = {}
    names = [cut.trait.name for cut in cuts]
    for cut in cuts:
        parts = [output.stem, re.sub(r"[^\w.-]+", "_", cut.trait.name)]
        if names.count(cut.trait.name) > 1:
            parts.append(cut.lora.stem)
        path = output.with_name("_".join(parts) + output.suffix)
        if path in plan:
            raise SliceError(f"two slices would both be written to {path}: cut them one by one")
        plan[path] = [cut]
    return plan


# ---- Reading -------------------------------------------------------------------------------------


def load_traits(path: Path) -> dict[str, Trait]:
    """Read a traits file. Notepad's byte order mark is accepted."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise SliceError(f"no traits file at {path}: copy blora_traits.json there") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SliceError(f"cannot read the traits file {path} ({error})") from error
    return parse_traits(text, path)


@contextmanager
def no_numpy_yet() -> Iterator[None]:
    """Keep the safetensors library from loading numpy, which takes longer than a small cut.

    It imports it to open a file, but uses it only for tensors. Should it be used later after all,
    the module that it was given hands everything on to the real one.
    """
    if "numpy" in sys.modules:
        yield
        return
    later = ModuleType("numpy")
    later.__getattr__ = lambda name: getattr(importlib.import_module("numpy"), name)
    sys.modules["numpy"] = later
    try:
        yield
    finally:
        del sys.modules["numpy"]


def read_header(path: Path, option: str) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a safetensors file and its metadata, not the tensors' bytes.

    The safetensors library checks the file first: lengths, overlaps, shapes, types.
    """
    from safetensors import SafetensorError, safe_open

    try:
        if not path.is_file():
            raise SliceError(f"no file at {path}: correct {option}")
        with no_numpy_yet(), safe_open(path, framework="np"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except SafetensorError as error:
        raise SliceError(
            f"{path} is not a whole safetensors file ({printable(str(error))}): "
            "download it again, or train and save it as safetensors"
        ) from error
    except (OSError, ValueError) as error:
        raise SliceError(f"cannot read {path} ({printable(str(error))})") from error
    metadata = header.pop("__metadata__", None) or {}
    data = 8 + length
    # The library also takes a tensor that is written as a list.
    fields = ("dtype", "shape", "data_offsets")
    header = {
        key: value if isinstance(value, dict) else dict(zip(fields, value, strict=True))
        for key, value in header.items()
    }
    entries = {
        key: Entry(
            path, value["dtype"], tuple(value["shape"]), *(data + o for o in value["data_offsets"])
        )
        for key, value in header.items()
    }
    return entries, metadata


def peft_alphas(metadata: dict[str, str], path: Path) -> dict[str, dict[str, Any]]:
    """PEFT's settings by component: diffusers reads each module's alpha from them."""
    try:
        settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        return {
            component: {
                key.removeprefix(prefix): value
                for key, value in settings.items()
                if key.startswith(prefix)
            }
            for prefix, component in list(COMPONENTS.items())[1:4]
        }
    except (ValueError, AttributeError, RecursionError) as error:
        raise SliceError(f"cannot read lora_adapter_metadata of {path} ({error})") from error


def peft_alpha(own: dict[str, Any], layer: str, rank: int) -> float:
    """A layer's alpha by PEFT's settings: the first pattern that is the end of its name."""
    alpha, patterns = own["lora_alpha"], own.get("alpha_pattern")
    for pattern, other in (patterns if isinstance(patterns, dict) else {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            alpha = other
            break
    return float(alpha) * (math.sqrt(rank) if own.get("use_rslora") else 1)


def with_peft_alpha(module: Module, layer: str, settings: dict[str, dict[str, Any]]) -> Module:
    """The module with the alpha that PEFT's settings give it, where its tensors have none."""
    own = settings.get(module.name.split("_")[1], {})
    if "lora_alpha" not in own or not module.rank or module.alpha is not None:
        return module
    try:
        alpha = as_fp32(peft_alpha(own, layer, module.rank))
    except (TypeError, ValueError, OverflowError, re.error):
        alpha = math.nan
    if not math.isfinite(alpha):
        raise SliceError(f"lora_adapter_metadata gives {module.name} an alpha that is no number")
    return module if alpha == module.rank else with_alpha(module, alpha)


def with_alpha(module: Module, alpha: float) -> Module:
    """The module with this alpha, whatever it had."""
    constant = Tensor("F32", (), make=lambda: numpy().array(alpha, dtype="f4"))
    return replace(module, tensors=module.tensors | {ALPHA: constant})


def read_lora(path: Path) -> Lora:
    """A LoRA file of any naming, as modules with kohya's names."""
    entries, metadata = read_header(path, "--loras")
    modules: dict[str, dict[str, Tensor]] = {}
    layers: dict[str, str] = {}  # modules by the names that PEFT's patterns are about
    unplaced = []
    for key, entry in entries.items():
        placed = place(key)
        if placed is None:
            unplaced.append(key)
            continue
        name, suffix = placed
        if parts := dotted_parts(key):
            layers[name] = parts[1]
        tensors = modules.setdefault(name, {})
        if suffix in tensors:
            raise SliceError(f"{path} holds {name}.{suffix} twice, under two names: keep one")
        shape = entry.shape
        if suffix == DORA and "magnitude" in key:  # PEFT's, of [out] or [1, out, 1, 1]: by row
            shape = (math.prod(shape), 1, *shape[2:])
        tensors[suffix] = Tensor(entry.dtype, shape, entry)
    if not modules:
        holds = first_few(sorted(entries)) or "no tensor at all"
        raise SliceError(f"{path} is no SDXL LoRA: it holds {holds}")
    settings = peft_alphas(metadata, path)
    loaded = {
        name: with_peft_alpha(Module(name, modules[name]), layers.get(name, ""), settings)
        for name in sorted(modules)
    }
    return Lora(path, loaded, metadata, tuple(unplaced))


# ---- Values --------------------------------------------------------------------------------------


def numpy():
    """numpy, loaded when values are needed: copying alone does without."""
    import numpy

    return numpy


def decode(data: bytes, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Stored bytes as fp32, or as fp64 where they are that."""
    np = numpy()
    if dtype == "BF16":
        wide = np.frombuffer(data, dtype="<u2").astype("<u4") << 16
        return wide.view("<f4").reshape(shape)
    if dtype == "F8_E5M2":  # the upper half of fp16
        wide = (np.frombuffer(data, "u1").astype("<u2") << 8).view("<f2")
        return wide.astype("f4").reshape(shape)
    if dtype == "F8_E4M3":
        bits = np.frombuffer(data, "u1").astype("<u4")
        # As fp16 with the exponent's bias 8 lower; all bits set is NaN, and there is no inf.
        half = ((bits & 0x80) << 8 | (bits & 0x7F) << 7).astype("<u2").view("<f2")
        wide = half.astype("f4") * 256
        return np.where(bits & 0x7F == 0x7F, np.float32("nan"), wide).reshape(shape)
    if dtype not in NUMPY:
        raise SliceError(f"values of type {dtype} can be copied, but not changed: cut at 1.0")
    stored = np.frombuffer(data, dtype=NUMPY[dtype]).reshape(shape)
    return stored.astype("f8" if stored.dtype.itemsize == 8 else "f4")


def encode(values: np.ndarray, dtype: str) -> bytes:
    """Values as stored bytes, each rounded once to the nearest."""
    np = numpy()
    if dtype != "BF16":
        with np.errstate(over="ignore"):
            return values.astype(NUMPY[dtype]).tobytes()
    # bf16 is the upper half of fp32; half of the last bit kept, with ties to even, rounds it.
    wide = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    rounded = wide + 0x7FFF + ((wide >> 16) & 1)
    kept = np.where(np.isnan(values), wide | 0x400000, rounded) >> 16
    return kept.astype("<u2").tobytes()


def read_bytes(entry: Entry) -> bytes:
    # Unbuffered: an alpha is 2 bytes, and a buffer reads thousands.
    with entry.path.open("rb", buffering=0) as file:
        file.seek(entry.start)
        return file.read(entry.stop - entry.start)


def stored_values(entry: Entry) -> np.ndarray:
    """An entry's values, in fp32 or better."""
    return decode(read_bytes(entry), entry.dtype, entry.shape)


def values(tensor: Tensor) -> np.ndarray:
    """A tensor's values as they will be written, before they are rounded to its type."""
    made = tensor.make() if tensor.make else stored_values(tensor.entry).reshape(tensor.shape)
    return made if tensor.factor == 1 else made * made.dtype.type(tensor.factor)


def scalar(tensor: Tensor) -> float:
    """The one number of an alpha, without numpy where it is stored as a float."""
    formats = {"F16": "<e", "F32": "<f", "F64": "<d"}
    if tensor.is_copy and tensor.dtype in formats and tensor.size == FLOATS[tensor.dtype]:
        return struct.unpack(formats[tensor.dtype], read_bytes(tensor.entry))[0]
    if tensor.dtype == "C64":
        return math.nan
    return float(values(tensor).reshape(-1)[0])


# ---- Strength ------------------------------------------------------------------------------------


def as_fp32(number: float) -> float:
    """The nearest number that fp32 holds; inf where it is too large."""
    try:
        return struct.unpack("<f", struct.pack("<f", number))[0]
    except OverflowError:
        return math.inf


def fp32_holds(number: float) -> bool:
    """Whether a number is finite, as fp32 too."""
    return math.isfinite(as_fp32(number))


def multiply(module: Module, factor: float, suffixes: Iterable[str]) -> Module:
    """The module with these tensors multiplied, computed when they are written."""
    changed = {}
    if not fp32_holds(factor):
        raise SliceError(f"{module.name} would be multiplied by {factor:g}, which is no number "
                         "that fp32 can hold: correct --alphas, or the LoRA's alpha")  # fmt: skip
    for suffix in suffixes:
        if suffix in module.tensors:
            tensor = module.tensors[suffix]
            if tensor.dtype not in FLOATS:
                raise SliceError(
                    f"{module.name} is stored as {tensor.dtype}, which can be copied but not "
                    "changed: cut it at 1.0 and set the strength where the LoRA is used"
                )
            changed[suffix] = replace(tensor, factor=tensor.factor * factor)
    return replace(module, tensors=module.tensors | changed)


def at_strength(module: Module, cut: Cut, base: Callable[[str], Entry] | None) -> Module:
    """The module with its change multiplied by the cut's strength.

    The strength goes into one factor alone: the change is a product of factors, so each further
    one would bring it in once more. alpha stays: 0 is not nothing to all programs.
    """
    if cut.strength == 1:
        return module
    if DORA not in module.tensors and module.algorithm.scaled:
        return multiply(module, cut.strength, {*module.algorithm.scaled, *ADDED})
    if module.label == "DoRA" and base:
        baked = bake_dora(module, cut.strength, base(module.name))
        return multiply(baked, cut.strength, ADDED)
    reason = module.algorithm.reason
    advice = "cut it at 1.0 and set the strength where the LoRA is used"
    if DORA in module.tensors:
        reason = "it needs the weights it was trained on"
        if module.label == "DoRA":
            advice = f"give the checkpoint as --base_model, or {advice}"
    raise SliceError(
        f"the strength of {module.name} in {cut.lora} cannot go into the file, because it is "
        f"{module.label} and {reason}: {advice}"
    )


def lora_change(module: Module, shape: tuple[int, ...]) -> np.ndarray:
    """alpha / rank * up @ mid @ down, in the shape of the weight it changes."""
    np = numpy()
    up, down = (values(module.tensors[suffix]) for suffix in (LORA_UP, LORA_DOWN))
    if LORA_MID in module.tensors:
        mid = values(module.tensors[LORA_MID])
        down = np.einsum("rs...,si->ri...", mid, down.reshape(down.shape[:2]))
    change = up.reshape(up.shape[0], -1) @ down.reshape(down.shape[0], -1)
    return (change * up.dtype.type(module.scale)).reshape(shape)


def bake_dora(module: Module, strength: float, weight: Entry) -> Module:
    """A DoRA module whose final weight is (1 - s) W + s W', W' being the one that was trained.

    With V = W + change, m = dora_scale, and norms and products by row for m of [out, 1], by
    column for [1, in]: c = m / |V|, k = (1 - s) + s c; then the factor is multiplied by s c / k,
    and the new m is |(1 - s) W + s c V|, with the sign of k, which V's direction has turned by.
    """
    np = numpy()
    scale = module.tensors[DORA]
    misfit = SliceError(
        f"{module.name} does not fit its weight in {weight.path}: give the checkpoint that the "
        "LoRA was trained on, or cut it at 1.0"
    )
    if scale.dtype not in FLOATS or not scale.shape or LORA_DOWN not in module.tensors:
        raise misfit
    axis = 0 if scale.shape[0] != 1 else 1
    factor = LORA_UP if axis == 0 else LORA_DOWN

    def norm(matrix: np.ndarray) -> np.ndarray:
        others = tuple(index for index in range(matrix.ndim) if index != axis)
        return np.sqrt(np.square(matrix).sum(axis=others, keepdims=True))

    def solve() -> tuple[np.ndarray, np.ndarray]:
        try:
            base = stored_values(weight)
            trained = base + lora_change(module, base.shape)
            length = norm(trained)
            c = values(scale).reshape(length.shape) / length
        except (IndexError, ValueError, TypeError) as error:
            raise misfit from error
        k = (1 - strength) + strength * c
        wanted = (1 - strength) * base + strength * c * trained
        if not (np.isfinite(c).all() and np.isfinite(norm(wanted)).all() and k.all()):
            raise SliceError(f"{module.name} is a DoRA that cannot be cut at {strength:g}: use 1.0")
        return strength * c / k, norm(wanted) * np.sign(k)

    def new_factor() -> np.ndarray:
        old = values(module.tensors[factor])
        along = [-1 if index == axis else 1 for index in range(old.ndim)]
        by = solve()[0].reshape(along)
        if by.size != old.shape[axis]:
            raise misfit
        return old * by

    changed = {
        factor: replace(module.tensors[factor], make=new_factor, entry=None),
        DORA: replace(scale, make=lambda: solve()[1].reshape(scale.shape), entry=None),
    }
    return replace(module, tensors=module.tensors | changed)


# Names of SDXL checkpoints: the U-Net's and the first text encoder's layers are called as
# kohya's are, the second's as open_clip calls them.
CHECKPOINT_PREFIXES = {
    "model.diffusion_model.": "lora_unet_",
    "conditioner.embedders.0.transformer.": "lora_te1_",
}
OPEN_CLIP = re.compile(r"conditioner\.embedders\.1\.model\.transformer\.resblocks\.(\d+)\.(.+)")
OPEN_CLIP_LAYERS = {
    "attn.out_proj.weight": "self_attn_out_proj",
    "mlp.c_fc.weight": "mlp_fc1",
    "mlp.c_proj.weight": "mlp_fc2",
}


def open_clip_weights(key: str, entry: Entry) -> dict[str, Entry]:
    """The second text encoder's layers that a checkpoint's key holds, by kohya's module name."""
    found = OPEN_CLIP.fullmatch(key)
    if not found:
        return {}
    start = f"lora_te2_text_model_encoder_layers_{found[1]}_"
    if found[2] in OPEN_CLIP_LAYERS:
        return {start + OPEN_CLIP_LAYERS[found[2]]: entry}
    if found[2] != "attn.in_proj_weight" or not entry.shape:
        return {}
    # q, k and v, one upon the other
    third = (entry.stop - entry.start) // 3
    rows = (entry.shape[0] // 3, *entry.shape[1:])
    return {
        f"{start}self_attn_{projection}_proj": replace(
            entry, shape=rows, start=entry.start + i * third, stop=entry.start + (i + 1) * third
        )
        for i, projection in enumerate("qkv")
    }


def checkpoint_weights(path: Path) -> dict[str, Entry]:
    """Where an SDXL checkpoint holds the weight of each layer, by kohya's module name."""
    weights = {}
    for key, entry in read_header(path, "--base_model")[0].items():
        for prefix, ours in CHECKPOINT_PREFIXES.items():
            if key.startswith(prefix) and key.endswith(".weight"):
                layer = key[len(prefix) : -len(".weight")]
                weights[ours + layer.replace(".", "_")] = entry
        weights |= open_clip_weights(key, entry)
    return weights


def base_model(path: Path) -> Callable[[str], Entry]:
    """A look-up of weights in a checkpoint, by kohya's module name."""
    weights = checkpoint_weights(path)

    def weight(module: str) -> Entry:
        if module not in weights:
            raise SliceError(
                f"{path} holds no weight for {module}: give the SDXL checkpoint, as one "
                ".safetensors file, that the LoRA was trained on"
            )
        return weights[module]

    return weight


# ---- Cutting and joining -------------------------------------------------------------------------


def cut_slice(lora: Lora, cut: Cut, base: Callable[[str], Entry] | None) -> Slice:
    """The modules the trait keeps, at the cut's strength; refused where there are none."""
    kept = [module for name, module in lora.modules.items() if cut.trait.keeps(name)]
    if not kept:
        blocks = ", ".join(dict.fromkeys(block_of(name) for name in lora.modules))
        raise SliceError(
            f'{cut.lora} holds nothing of the trait "{printable(cut.trait.name)}": '
            f"its blocks are {blocks}"
        )
    return Slice(cut, tuple(at_strength(module, cut, base) for module in kept), lora)


def with_common_alpha(modules: list[Module]) -> list[Module]:
    """The same changes under one alpha, where the LoRA modules have several, or some have none.

    diffusers scales all U-Net modules by the alpha it meets most, over each one's own rank. The
    smallest becomes the common one: then each lora_up takes a ratio above 1, where a smaller one
    would push fp16 into its subnormal numbers. Modules that have it already stay as they are.
    """
    loras = [module for module in modules if module.algorithm.name == "LoRA" and module.rank]
    if len({module.alpha for module in loras}) < 2:
        return modules
    smallest = min((module.alpha or float(module.rank) for module in loras), key=abs)
    common = as_fp32(smallest)  # it is stored as that

    def unified(module: Module) -> Module:
        if module.algorithm.name != "LoRA" or not module.rank or module.alpha == common:
            return module
        if not fp32_holds(common) or not fp32_holds(module.alpha or 0):
            raise SliceError(f"{module.name} has an alpha that is no number that fp32 can hold")
        ratio = (module.alpha or module.rank) / common
        return with_alpha(multiply(module, ratio, [LORA_UP]), common)

    return [unified(module) for module in modules]


def join_slices(slices: list[Slice]) -> list[Module]:
    """The modules of all slices, by name; a module that two of them hold is refused."""
    owners: dict[str, Cut] = {}
    for piece in slices:
        for module in piece.modules:
            if module.name in owners:
                raise SliceError(
                    f"{module.name} would come from both {describe(owners[module.name])} and "
                    f"{describe(piece.cut)}: leave one out, or write them apart with --not_combined"
                )
            owners[module.name] = piece.cut
    modules = [module for piece in slices for module in piece.modules]
    return with_common_alpha(modules) if len(slices) > 1 else modules


def at_precision(module: Module, dtype: str | None) -> Module:
    """The module with all its floats stored as `dtype`, as kohya's tools do; None leaves them."""
    if dtype is None:
        return module
    tensors = {
        suffix: replace(tensor, dtype=dtype) if tensor.dtype in FLOATS else tensor
        for suffix, tensor in module.tensors.items()
    }
    return replace(module, tensors=tensors)


# ---- Metadata ------------------------------------------------------------------------------------

HASHES = {"sshs_model_hash": 64, "sshs_legacy_hash": 8}  # hex digits
KEPT_METADATA = ("ss_", "modelspec.")
# Of the source's own bytes: A1111 and Forge trust the hash they find, and would take the slice
# for its parent.
STALE_METADATA = "modelspec.hash_sha256"
# ComfyUI shows no header that is longer.
LONGEST_HEADER = 1 << 20


def kept_metadata(lora: Lora) -> dict[str, str]:
    """What is still true of a slice of the LoRA."""
    return {
        key: value
        for key, value in lora.metadata.items()
        if key.startswith(KEPT_METADATA) and key != STALE_METADATA
    }


def stated(found: set[float | None], before: str | None) -> str | None:
    """A number for the metadata: "Dynamic" where modules differ, as kohya's resize says it."""
    if len(found) > 1:
        return "Dynamic"
    [number] = found or {None}
    if number is None:
        return before
    try:
        return before if before and float(before) == number else f"{number:g}"
    except ValueError:
        return f"{number:g}"


def json_object(text: str | None) -> dict[str, Any]:
    """A metadata value that should be a JSON object; anything else is an empty one."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def join_metadata(loras: list[Lora]) -> dict[str, str]:
    """What all sources say alike; what differs is told for each under ss_blora_sources.

    Tag frequencies are joined, their folders named after their LoRA: A1111 shows them all.
    """
    first, *others = [kept_metadata(lora) for lora in loras]
    agreed = {
        key: value for key, value in first.items() if all(o.get(key) == value for o in others)
    }
    if not others:
        return agreed
    differing = [
        {"file": lora.path.name}
        | {key: value for key, value in kept_metadata(lora).items() if key not in agreed}
        for lora in loras
    ]
    tags = {
        f"{lora.path.stem}/{folder}": counts
        for lora in loras
        for folder, counts in json_object(lora.metadata.get("ss_tag_frequency")).items()
    }
    if tags and "ss_tag_frequency" not in agreed:
        agreed["ss_tag_frequency"] = json.dumps(tags)
        for source in differing:
            source.pop("ss_tag_frequency", None)
    return agreed | {"ss_blora_sources": json.dumps(differing)}


def build_metadata(slices: list[Slice], modules: list[Module], output: Path) -> dict[str, str]:
    """The metadata of a file to write, with room for its hashes."""
    loras = list({piece.lora.path: piece.lora for piece in slices}.values())
    metadata = join_metadata(loras)
    cuts = ", ".join(f"{describe(piece.cut)} at {piece.cut.strength:g}" for piece in slices)
    comment = metadata.get("ss_training_comment", "None")  # sd-scripts' word for none
    loras_only = [module for module in modules if module.rank]
    numbers = {
        "ss_network_dim": {float(module.rank) for module in loras_only},
        "ss_network_alpha": {module.alpha or float(module.rank) for module in loras_only},
    }
    for key, found in numbers.items():
        value = stated(found, metadata.get(key))
        metadata |= {key: value} if value else {}
    titles = [lora.metadata.get("modelspec.title") or lora.path.stem for lora in loras]
    return {
        "ss_base_model_version": "sdxl_base_v1-0",  # without it A1111 takes it for SD1
        **metadata,
        "ss_output_name": output.stem,
        "ss_training_comment": cuts if comment in ("", "None") else f"{cuts}; {comment}",
        "modelspec.title": output.stem,
        "modelspec.date": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "modelspec.merged_from": ", ".join(titles),
        **{key: "0" * digits for key, digits in HASHES.items()},
    }


def fitting(tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, str]:
    """The metadata less its longest entries, until the header is one that programs read."""
    sizes = {key: len(header_bytes({}, {key: value})) for key, value in metadata.items()}
    over = len(header_bytes(tensors, metadata)) - LONGEST_HEADER
    dropped = []
    for key in sorted(sizes, key=lambda key: -sizes[key]):
        if over < 0:
            break
        dropped.append(key)
        over -= sizes[key] - len(header_bytes({}, {"": ""}))
    if dropped:
        note(f"note: left out, as the header would be too long: {first_few(dropped)}")
    left_out = set(dropped)
    return {key: value for key, value in metadata.items() if key not in left_out}


# ---- Writing -------------------------------------------------------------------------------------

LEGACY_HASH = (0x100000, 0x110000)  # the bytes of a file that kohya's older hash is of
# The smallest numbers that round to inf.
OVERFLOW = {"F16": 65520.0, "BF16": (2 - 2**-8) * 2.0**127, "F32": (2 - 2**-24) * 2.0**127}


def file_tensors(modules: Iterable[Module]) -> dict[str, Tensor]:
    """All tensors by key, in the order in which safetensors puts them into a file."""
    tensors = {f"{m.name}.{suffix}": t for m in modules for suffix, t in m.tensors.items()}
    place_of = {dtype: index for index, dtype in enumerate(DTYPES)}
    return dict(sorted(tensors.items(), key=lambda item: (place_of[item[1].dtype], item[0])))


def header_bytes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A file's start: the header's length, and the header padded to a multiple of 8."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for key, tensor in tensors.items():
        offsets = [offset, offset + tensor.size]
        header[key] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
        offset += tensor.size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode(errors="replace")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def rounded(key: str, tensor: Tensor) -> bytes:
    """The bytes of a tensor whose values change; one that becomes inf on the way is refused."""
    np = numpy()
    with np.errstate(all="ignore"):  # what becomes inf is told below; the rest is the LoRA's own
        exact = values(tensor)
        data = encode(exact, tensor.dtype)
        largest = float(np.fmax.reduce(np.abs(exact), axis=None, initial=0))
    if largest >= OVERFLOW.get(tensor.dtype, math.inf):
        before = np.float32(0) if tensor.make else stored_values(tensor.entry).reshape(exact.shape)
        became = np.isinf(decode(data, tensor.dtype, exact.shape)) & np.isfinite(before)
        if became.any():
            raise SliceError(
                f"{key} has values that {tensor.dtype} cannot hold: lower --alphas, or use "
                "--save_precision float"
            )
    return data


def file_chunks(tensors: dict[str, Tensor]) -> Iterator[memoryview | bytes]:
    """The bytes of all tensors, in pieces that are gone when the next one is asked for."""
    buffer = memoryview(bytearray(CHUNK))
    files: dict[Path, BinaryIO] = {}
    try:
        for key, tensor in tensors.items():
            if not tensor.is_copy:
                yield rounded(key, tensor)
                continue
            path, left = tensor.entry.path, tensor.size
            if path not in files:
                files[path] = path.open("rb", buffering=0)
            files[path].seek(tensor.entry.start)
            while left:
                count = files[path].readinto(buffer[: min(left, CHUNK)])
                if not count:
                    raise SliceError(f"{path} became shorter while it was read: try again")
                left -= count
                yield buffer[:count]
    finally:
        for file in files.values():
            file.close()


def with_progress(chunks: Iterator[memoryview | bytes], total: int) -> Iterator[memoryview | bytes]:
    """The chunks, behind a bar on stderr once that takes more than a second."""
    if total < SHOW_PROGRESS:
        yield from chunks
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, delay=1, leave=False) as bar:
        for chunk in chunks:
            yield chunk
            bar.update(len(chunk))


def write_tensors(file: BinaryIO, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a whole file, hashing on the way; the hashes go into the room the metadata has.

    As kohya's precalculate_safetensors_hashes: the model hash is of all bytes after the header,
    the legacy hash of 64 KiB of a file that carries the ss_ metadata alone.
    """
    file.write(header_bytes(tensors, metadata))
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    shift = len(header_bytes(tensors, training))
    start, stop = (at - shift for at in LEGACY_HASH)
    model, legacy, position = hashlib.sha256(), hashlib.sha256(), 0
    total = sum(tensor.size for tensor in tensors.values())
    for chunk in with_progress(file_chunks(tensors), total):
        file.write(chunk)
        model.update(chunk)
        legacy.update(chunk[max(0, start - position) : max(0, stop - position)])
        position += len(chunk)
    if metadata:
        digests = zip(HASHES, (model.hexdigest(), legacy.hexdigest()), strict=True)
        hashes = {key: digest[: HASHES[key]] for key, digest in digests}
        file.seek(0)
        file.write(header_bytes(tensors, metadata | hashes))


def write_lora(modules: list[Module], metadata: dict[str, str], output: Path) -> None:
    """Write a LoRA beside its final name, then move it there: no half file under that name."""
    tensors = file_tensors(modules)
    part = output.with_name(f".{output.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            write_tensors(file, tensors, fitting(tensors, metadata))
        part.replace(output)
    except OSError as error:
        raise SliceError(f"cannot write {output} ({error})") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def check_output(output: Path, inputs: Iterable[Path]) -> None:
    """Refuse an output that cannot be written, or that is one of the inputs."""
    try:
        if output.suffix != ".safetensors":
            raise SliceError(f"the output {output} must end in .safetensors: change --output_path")
        if not output.parent.is_dir():
            raise SliceError(
                f"no folder {output.parent} to write to: make it or change --output_path"
            )
        if output.is_dir():
            raise SliceError(f"the output {output} is a folder: name a file in --output_path")
        same = output.exists() and any(is_same(output, path) for path in inputs)
    except OSError as error:
        raise SliceError(f"cannot write {output} ({error}): change --output_path") from error
    if same:
        raise SliceError(f"the output {output} is one of the inputs: change --output_path")


def is_same(output: Path, path: Path) -> bool:
    """Whether both are one file; an input that cannot be looked at is told of when it is read."""
    with suppress(OSError):
        return path.exists() and output.samefile(path)
    return False


# ---- Inspecting ----------------------------------------------------------------------------------

BAR = 20  # characters for the whole change
COLUMNS = ("block", "trait", "modules", "algorithm", "rank", "alpha", "dtype", "size", "change")
TRIGGER_WORDS = 10
ROWS_AT_A_TIME = 64


@dataclass(frozen=True)
class Row:
    """One line of the table: the modules of a block that the same traits keep."""

    block: str
    trait: str
    modules: int
    algorithm: str
    ranks: list[int]
    alphas: list[float]
    dtype: str
    bytes: int
    change: float | None  # Frobenius norm of the weight change
    share: float | None  # of the file's squared change


def gram_norm(left: np.ndarray, right: np.ndarray) -> float:
    """The Frobenius norm of left @ right, from products as small as the rank."""
    np = numpy()
    left, right = left.reshape(left.shape[0], -1), right.reshape(right.shape[0], -1)
    square = np.sum((left.T @ left) * (right @ right.T), dtype="f8")
    return math.sqrt(max(0.0, float(square)))


def lora_norm(t: dict[str, np.ndarray]) -> float:
    """Of up @ down, or up @ mid @ down for a LoCon with a kernel of its own."""
    down = t[LORA_DOWN]
    if LORA_MID in t:
        down = numpy().einsum("rs...,si->ri...", t[LORA_MID], down.reshape(down.shape[:2]))
    return gram_norm(t[LORA_UP], down)


def loha_norm(t: dict[str, np.ndarray]) -> float:
    """Of (w1_a @ w1_b) * (w2_a @ w2_b), some rows at a time."""
    np = numpy()
    square = 0.0
    # With a tucker core, a is [rank, out] and the core takes b's place.
    a1, a2 = (t[f"hada_w{i}_a"].T if "hada_t1" in t else t[f"hada_w{i}_a"] for i in (1, 2))
    b1, b2 = t["hada_w1_b"], t["hada_w2_b"]
    if "hada_t1" in t:
        b1, b2 = (np.einsum("ij...,jr->ir...", t[f"hada_t{i}"], t[f"hada_w{i}_b"]) for i in (1, 2))
    b1, b2 = b1.reshape(b1.shape[0], -1), b2.reshape(b2.shape[0], -1)
    for start in range(0, a1.shape[0], ROWS_AT_A_TIME):
        rows = slice(start, start + ROWS_AT_A_TIME)
        square += float(np.sum(np.square((a1[rows] @ b1) * (a2[rows] @ b2)), dtype="f8"))
    return math.sqrt(square)


def lokr_norm(t: dict[str, np.ndarray]) -> float:
    """Of kron(w1, w2): the product of their norms."""
    np = numpy()
    norms = []
    for i in (1, 2):
        if f"lokr_w{i}" in t:
            norms.append(float(np.linalg.norm(t[f"lokr_w{i}"].astype("f8"))))
            continue
        a, b = t[f"lokr_w{i}_a"], t[f"lokr_w{i}_b"]
        if f"lokr_t{i}" in t:
            a, b = a.T, np.einsum("ij...,jr->ir...", t[f"lokr_t{i}"], b)
        norms.append(gram_norm(a, b))
    return norms[0] * norms[1]


def diff_norm(t: dict[str, np.ndarray]) -> float:
    """Of a change that is stored as it is."""
    np = numpy()
    parts = (t[key] for key in ("diff", "diff_b", "w_norm", "b_norm") if key in t)
    return math.sqrt(sum(float(np.sum(np.square(part), dtype="f8")) for part in parts))


# The others change a weight in proportion to itself, so their size is not in the file.
NORMS = {
    "LoRA": lora_norm, "LoHa": loha_norm, "LoKr": lokr_norm, "full": diff_norm, "norm": diff_norm,
}  # fmt: skip


def measure(module: Module) -> tuple[float | None, list[str]]:
    """The Frobenius norm of a module's change, and its keys that hold NaN or inf.

    The change of a DoRA is that of its factors: what its scale adds depends on the base model.
    """
    np = numpy()
    known = {
        suffix: values(tensor)
        for suffix, tensor in module.tensors.items()
        if tensor.dtype in FLOATS or (suffix == ALPHA and tensor.dtype != "C64")
    }
    broken = [f"{module.name}.{s}" for s, v in known.items() if not np.isfinite(v).all()]
    complete = len(known) == len(module.tensors) and module.algorithm.name in NORMS
    if broken or not complete:
        return None, broken
    try:
        with np.errstate(all="ignore"):
            norm = NORMS[module.algorithm.name](known) * abs(module.scale)
    except (KeyError, ValueError, IndexError):  # a factor is missing, or they do not fit
        return None, broken
    return norm if math.isfinite(norm) else None, broken


def table_row(
    key: tuple[str, str], modules: list[Module], norms: dict[str, float | None], total: float
) -> Row:
    """The line for these modules of one block."""
    tensors = [tensor for module in modules for tensor in module.tensors.values()]
    found = [norms[module.name] for module in modules]
    change = None if None in found else math.hypot(*found)
    change = None if change is None or math.isinf(change) else change
    wide = [tensor.dtype for tensor in tensors if tensor.shape] or [t.dtype for t in tensors]
    return Row(
        block=key[0],
        trait=key[1],
        modules=len(modules),
        algorithm=", ".join(dict.fromkeys(module.label for module in modules)),
        ranks=sorted({module.rank for module in modules} - {None}),
        alphas=sorted({a for m in modules if (a := m.alpha) is not None and math.isfinite(a)}),
        dtype=", ".join(dict.fromkeys(wide)),
        bytes=sum(tensor.size for tensor in tensors),
        change=change,
        share=None if change is None or not total else (change / total) ** 2,
    )


def training_facts(metadata: dict[str, str]) -> dict[str, Any]:
    """What a file says of its training, as far as it does."""
    words: Counter[str] = Counter()
    for counts in json_object(metadata.get("ss_tag_frequency")).values():
        if isinstance(counts, dict):
            words.update({str(w): n for w, n in counts.items() if isinstance(n, int)})
    facts = {
        "base": metadata.get("ss_base_model_version"),
        "checkpoint": metadata.get("ss_sd_model_name"),
        "steps": metadata.get("ss_steps"),
        "images": metadata.get("ss_num_train_images"),
        "comment": metadata.get("ss_training_comment"),
        "trigger_words": dict(words.most_common(TRIGGER_WORDS)),
    }
    return {key: value for key, value in facts.items() if value and value != "None"}


def inspect_lora(lora: Lora, known: dict[str, Trait]) -> dict[str, Any]:
    """All that --inspect tells of a file."""
    from tqdm import tqdm

    groups: dict[tuple[str, str], list[Module]] = {}
    norms, broken = {}, []
    for name, module in tqdm(lora.modules.items(), desc=lora.path.name, delay=1, leave=False):
        traits = [trait.name for trait in known.values() if trait.keeps(name)]
        groups.setdefault((block_of(name), ", ".join(traits) or "-"), []).append(module)
        norms[name], not_finite = measure(module)
        broken += not_finite
    total = math.hypot(*(norm for norm in norms.values() if norm))
    rows = [table_row(key, modules, norms, total) for key, modules in groups.items()]
    return {
        "file": str(lora.path),
        "bytes": lora.path.stat().st_size,
        "modules": len(lora.modules),
        "blocks": [vars(row) for row in rows],
        "training": training_facts(lora.metadata),
        "not_finite": broken,
        "unplaced": list(lora.unplaced),
    }


def table(rows: list[list[str]]) -> list[str]:
    """Rows as aligned lines; numbers, from the third column on, to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column < 2 or column == len(widths) - 1 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def report(facts: dict[str, Any]) -> str:
    """The facts of one file as text."""
    rows = [[*COLUMNS, "share", ""]]
    for row in facts["blocks"]:
        share = row["share"]
        rows.append(
            [
                *(printable(str(row[key])) for key in ("block", "trait", "modules", "algorithm")),
                *(span(row[key]) for key in ("ranks", "alphas")),
                row["dtype"],
                megabytes(row["bytes"]),
                "-" if row["change"] is None else f"{row['change']:.4g}",
                "-" if share is None else f"{share:.1%}",
                "#" * round(BAR * (share or 0)),
            ]
        )
    training = dict(facts["training"])
    words = training.pop("trigger_words", {})
    lines = [
        f"{facts['file']}: {facts['modules']} modules, {megabytes(facts['bytes'])}",
        *table(rows),
    ]
    lines += [f"{key}: {printable(value)}" for key, value in training.items()]
    if words:
        lines.append(
            "trigger words: " + ", ".join(f"{printable(w)} ({n})" for w, n in words.items())
        )
    if facts["not_finite"]:
        lines.append(
            f"NaN or inf in {len(facts['not_finite'])} tensors: {first_few(facts['not_finite'])}"
        )
    if facts["unplaced"]:
        lines.append(
            f"not SDXL's: {len(facts['unplaced'])} tensors: {first_few(facts['unplaced'])}"
        )
    return "\n".join(lines)


# ---- Command line --------------------------------------------------------------------------------


def strength(text: str) -> float:
    """A strength from the command line: a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not fp32_holds(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def build_parser() -> argparse.ArgumentParser:
    """The options, the original's first."""
    parser = argparse.ArgumentParser(
        prog="blora_slicer.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--loras", type=Path, nargs="+", required=True, help="the LoRA files to cut from")
    add("--traits", nargs="+", default=[DEFAULT_TRAIT], help="what to keep of each (content)")
    add(
        "--alphas",
        type=strength,
        nargs="+",
        default=[DEFAULT_STRENGTH],
        help="the strength of each: 0.5 is half, -1 the opposite (1.0)",
    )
    add(
        "--output_path",
        type=Path,
        default=HERE / "model.safetensors",
        help="the file to write (model.safetensors beside this script)",
    )
    add("--debug", action="store_true", help="name every module that is kept")
    add("--not_combined", action="store_true", help="write one file for each LoRA and trait")
    add(
        "--traits_file",
        type=Path,
        default=HERE / "blora_traits.json",
        help="the traits to choose from (blora_traits.json beside this script)",
    )
    add("--save_precision", choices=PRECISIONS, help="store as this (as the LoRA does)")
    add("--base_model", type=Path, help="the SDXL checkpoint, to cut a DoRA at another strength")
    add("--no_metadata", action="store_true", help="write no metadata at all")
    add("--inspect", action="store_true", help="write nothing, show what the LoRAs hold")
    add("--json", action="store_true", help="with --inspect: show it as JSON")
    return parser


def check_usage(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse options that do not go together."""
    slices = max(len(args.loras), len(args.traits))
    if len(args.alphas) > slices:
        parser.error(f"--alphas: {len(args.alphas)} values for {slices} slice(s), leave some out")
    if args.json and not args.inspect:
        parser.error("--json: only --inspect has something to show as JSON, add it")
    looking = {"loras", "inspect", "json", "traits_file", "help"}
    for name, value in vars(args).items():
        if args.inspect and name not in looking and value != parser.get_default(name):
            parser.error(f"--inspect writes nothing: leave out --{name}")


def read_once(paths: Iterable[Path]) -> dict[Path, Lora]:
    """Each LoRA by its path, with a note on what of it cannot be placed."""
    loras = {path: read_lora(path) for path in dict.fromkeys(paths)}
    for path, lora in loras.items():
        if lora.unplaced:
            note(f"note: {len(lora.unplaced)} tensors of {path.name} are none of SDXL's and are "
                 f"left out: {first_few(lora.unplaced)}")  # fmt: skip
    return loras


def run_inspect(args: argparse.Namespace) -> None:
    """Show what each LoRA holds."""
    known = load_traits(args.traits_file)
    facts = [inspect_lora(read_lora(path), known) for path in dict.fromkeys(args.loras)]
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        print("\n\n".join(report(fact) for fact in facts))


def run_cut(args: argparse.Namespace) -> None:
    """Plan, check, cut, and only then write."""
    cuts = plan_cuts(args.loras, args.traits, args.alphas, load_traits(args.traits_file))
    plan = plan_outputs(cuts, args.output_path, combined=not args.not_combined)
    inputs = [*args.loras, *([args.base_model] if args.base_model else [])]
    for output in plan:
        check_output(output, inputs)
    loras = read_once(args.loras)
    base = base_model(args.base_model) if args.base_model else None
    finished = []
    for output, own in plan.items():
        slices = [cut_slice(loras[cut.lora], cut, base) for cut in own]
        modules = join_slices(slices)
        metadata = {} if args.no_metadata else build_metadata(slices, modules, output)
        modules = [at_precision(m, PRECISIONS.get(args.save_precision)) for m in modules]
        finished.append((output, slices, modules, metadata))
    for output, slices, modules, metadata in finished:
        write_lora(modules, metadata, output)
        for piece in slices:
            if args.debug:
                note("\n".join(f"{describe(piece.cut)}: {m.name}" for m in piece.modules))
            print(f"{describe(piece.cut)} at {piece.cut.strength:g}: {summarize(piece.modules)}")
        print(f"-> {output}: {summarize(modules)}, {megabytes(output.stat().st_size)}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0 when done, 1 with one sentence on stderr when it cannot be."""
    # A console that lacks a letter of a path would otherwise end a finished cut in a traceback.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    parser = build_parser()
    args = parser.parse_args(argv)
    check_usage(parser, args)
    try:
        run_inspect(args) if args.inspect else run_cut(args)
        sys.stdout.flush()
    except SliceError as error:
        note(f"error: {error}")
        return 1
    except ModuleNotFoundError as error:
        note(f"error: no {error.name} in this Python ({sys.executable}): activate kohya's venv")
        return 1
    except OSError as error:  # the disk or the program behind stdout takes no more
        # Python would try to write what is left when it ends, and complain once more.
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        note(f"error: cannot go on ({error})")
        return 1
    except KeyboardInterrupt:
        note("error: stopped before it was done")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
