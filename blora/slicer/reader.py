"""A LoRA file of any program, read as modules in kohya's names, and the base model of a DoRA."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any

from blora.sdxl import checkpoint_weight
from blora.slicer.keys import ALPHA, BY_ROW, DORA, Key, Spelling, read_key
from blora.slicer.modules import UNKNOWN, Lora, Module, with_alpha
from blora.slicer.other_models import check_model
from blora.tensorfile import Stored, Tensor, as_fp32, read_header
from blora.text import BloraError, first_few, shortened

# ---- PEFT's settings -----------------------------------------------------------------------------

# Where they are: in the metadata, as diffusers writes them, with a prefix for each network, or in a
# file beside the LoRA, as PEFT does.
METADATA, PEFT_CONFIG = "lora_adapter_metadata", "adapter_config.json"
PEFT_NETWORKS = {"unet.": "unet", "text_encoder.": "te1", "text_encoder_2.": "te2"}


@dataclass(frozen=True)
class Settings:
    """PEFT's settings of one network, and where they were read."""

    where: str
    values: dict[str, Any]

    @property
    def has_alpha(self) -> bool:
        """Whether an alpha is among them."""
        return not {"alpha", "lora_alpha"}.isdisjoint(self.values)


def peft_settings(metadata: dict[str, str], path: Path, is_peft: bool) -> dict[str, Settings]:
    """By network: from the metadata, or, for PEFT's names, from the file beside the LoRA.

    BloraError where they cannot be read.
    """
    where = f"{METADATA} of {path}"
    try:
        entries = json.loads(metadata.get(METADATA, "{}"))
        settings = {}
        for prefix, network in PEFT_NETWORKS.items():
            values = {k.removeprefix(prefix): v for k, v in entries.items() if k.startswith(prefix)}
            settings[network] = Settings(METADATA, values)
        config = path.with_name(PEFT_CONFIG)
        if is_peft and config.is_file():
            where = str(config)
            beside = Settings(PEFT_CONFIG, dict(json.loads(config.read_text("utf-8")).items()))
            settings = {name: s if s.has_alpha else beside for name, s in settings.items()}
        return settings
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise BloraError(
            f"cannot read {where} ({error}): save the LoRA again with its program"
        ) from error


def peft_number(settings: Settings, layer: str, patterns: str, *names: str) -> float:
    """A setting of a layer: that of the first pattern that matches its end, or the one for all.

    As get_pattern_key reads patterns (github.com/huggingface/peft, utils/other.py). TypeError or
    ValueError where it is not a number.
    """
    by_pattern = settings.values.get(patterns)
    for pattern, value in (by_pattern if isinstance(by_pattern, dict) else {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return float(value)
    return float(next(settings.values[name] for name in names if name in settings.values))


def with_peft_alpha(module: Module, layer: str, settings: Settings) -> Module:
    """The module with the alpha that PEFT's settings give it, where its tensors have none.

    PEFT multiplies a LoKr of two whole factors by alpha / r too, which no other program does
    (tuners/lokr/layer.py): that becomes the module's `factor`.
    """
    if not settings.has_alpha or not module.algorithm.rank or module.alpha is not None:
        return module
    try:
        alpha = peft_number(settings, layer, "alpha_pattern", "alpha", "lora_alpha")
        if settings.where == PEFT_CONFIG or module.rank is None:
            rank = peft_number(settings, layer, "rank_pattern", "r")
            if module.rank is None:
                return replace(module, factor=alpha / rank)
            if rank != module.rank:  # the settings of a different LoRA in the same folder
                return module
        root = math.sqrt(module.rank) if settings.values.get("use_rslora") else 1
        alpha = as_fp32(alpha * root)
    except (TypeError, ValueError, OverflowError, ZeroDivisionError, StopIteration, re.error):
        alpha = math.nan
    if not math.isfinite(alpha):
        raise BloraError(f"{settings.where} gives {module.name} an alpha that is not a number")
    return with_alpha(module, alpha)


# Initializations that move a part of the base model into the factors (tuners/lora/layer.py), so
# that these are not a change of that model.
TAKEN_FROM_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# PEFT's algorithms that other programs have too.
COMMON_TYPES = ("LORA", "LOHA", "LOKR", "OFT")


def check_settings(settings: Settings, path: Path) -> None:
    """Refuse what only PEFT can load, and factors that hold a part of the base model."""
    kind = str(settings.values.get("peft_type", "LORA"))
    if kind not in COMMON_TYPES:
        raise BloraError(
            f"{path} is PEFT's {shortened(kind)}, which kohya's names cannot express: use it "
            "with PEFT"
        )
    start = str(settings.values.get("init_lora_weights", ""))
    if start.lower().startswith(TAKEN_FROM_BASE):
        raise BloraError(
            f"{path} was trained with init_lora_weights={shortened(start)}, so its factors hold a "
            "part of the base model: save it with PEFT's path_initial_model_for_weight_conversion"
        )


# ---- Modules -------------------------------------------------------------------------------------

# A layer's plain parameters, as a model has them, and as PEFT's bias="lora_only" saves them.
LAYER_WEIGHTS = {"weight", "bias", "base_layer.weight", "base_layer.bias"}


@dataclass
class Part:
    """The tensors of a module that a file holds under one spelling of its layer."""

    spelling: Spelling
    tensors: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)  # as they are in the file, by suffix
    is_peft: bool = False

    def add(self, key: str, meaning: Key, tensor: Tensor) -> None:
        """Add a tensor; magnitudes, one a row, become a dora_scale of [out, 1, ...]."""
        if meaning.suffix == DORA and BY_ROW in meaning.spelt and len(tensor.shape) != 2:
            axes = max(2, len(self.spelling.layer.shape))
            tensor = replace(tensor, shape=(math.prod(tensor.shape), *[1] * (axes - 1)))
        self.tensors[meaning.suffix] = tensor
        self.keys[meaning.suffix] = key
        self.is_peft |= meaning.is_peft

    def drop_layer_weights(self) -> list[str]:
        """Leave out plain layer weights, which are not part of a LoRA; their keys."""
        names = LAYER_WEIGHTS
        if "on_input" in self.tensors:  # IA3 has a "weight"
            names = names - {"weight"}
        dropped = [suffix for suffix in self.tensors if suffix in names]
        for suffix in dropped:
            del self.tensors[suffix]
        return [self.keys[suffix] for suffix in dropped]

    def completes(self, other: Part) -> bool:
        """Whether the two have no tensor in common, and are not a change each."""
        changes = [Module("", part.tensors).algorithm is not UNKNOWN for part in (self, other)]
        return not (self.tensors.keys() & other.tensors.keys() or all(changes))


def split_by_spelling(tensors: Mapping[str, Tensor]) -> tuple[list[Part], list[str], list[str]]:
    """A file's tensors by layer and spelling; the keys of no layer; the programs' namings."""
    parts: dict[str, list[Part]] = {}
    unplaced: list[str] = []
    namings: dict[str, None] = {}
    for key, tensor in tensors.items():
        meaning = read_key(key)
        if meaning is None:
            unplaced.append(key)
            continue
        same = parts.setdefault(meaning.spelling.plain, [])
        free = next((part for part in same if meaning.suffix not in part.tensors), None)
        if free is None:  # the first, or one tensor under two suffixes
            free = Part(meaning.spelling)
            same.append(free)
        free.add(key, meaning, tensor)
        if meaning.suffix != ALPHA:  # which is spelt alike everywhere
            namings[meaning.naming] = None
    return [*chain(*parts.values())], unplaced, [*namings]


def gather_modules(parts: list[Part]) -> tuple[dict[str, list[Part]], list[str]]:
    """The parts by module, each with its copies; and the keys of plain layer weights.

    A module can be split over two spellings: diffusers' conversion of a DoRA to kohya's names
    leaves the magnitudes under a different one than the factors.
    """
    modules: dict[str, list[Part]] = {}
    layer_weights: list[str] = []
    for part in parts:
        layer_weights += part.drop_layer_weights()
        if not part.tensors:
            continue
        copies = modules.setdefault(part.spelling.layer.module, [])
        whole = next((copy for copy in copies if part.completes(copy)), None)
        if whole is None:
            copies.append(part)
        else:
            whole.tensors |= part.tensors
            whole.is_peft |= part.is_peft
    return modules, layer_weights


def build_modules(name: str, copies: list[Part], peft: dict[str, Settings]) -> list[Module]:
    """A module's copies, whole ones first, with the alpha of PEFT's settings."""
    modules = []
    for part in copies:
        module = Module(name, part.tensors)
        settings = peft[module.layer.network]
        if part.is_peft or settings.where == METADATA:
            module = with_peft_alpha(module, part.spelling.name, settings)
        if part.is_peft and module.algorithm.rank and module.alpha is None:
            module = replace(module, is_guess=module.rank is not None or not settings.has_alpha)
        modules.append(module)
    return sorted(modules, key=attrgetter("is_incomplete")) if modules[1:] else modules


# ---- Files ---------------------------------------------------------------------------------------

SAVED_IN_FOLDERS = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")


def lora_file(path: Path) -> Path:
    """The path, or the LoRA in it where it is a folder that PEFT or diffusers saved one in."""
    inside = [path / name for name in SAVED_IN_FOLDERS]
    with suppress(OSError):  # read_lora reports what may not be read
        return next((file for file in inside if file.is_file()), path)
    return path


def read_lora(path: Path) -> Lora:
    """A LoRA file of any naming, as modules with kohya's names; BloraError where it is not one."""
    if not path.is_file():
        raise BloraError(f"no file at {path}: correct --loras")
    tensors, metadata = read_header(path)
    parts, unplaced, namings = split_by_spelling(tensors)
    by_module, layer_weights = gather_modules(parts)
    peft = peft_settings(metadata, path, any(part.is_peft for part in parts))
    for settings in peft.values():
        check_settings(settings, path)
    copies = {name: build_modules(name, by_module[name], peft) for name in sorted(by_module)}
    modules = {name: first for name, (first, *_) in copies.items()}
    check_model(path, modules, unplaced, metadata)
    if not modules:
        holds = first_few(sorted(tensors)) or "no tensor at all"
        raise BloraError(f"{path} is not an SDXL LoRA: it holds {holds}")
    doubled = {name: others for name, (_, *others) in copies.items() if others}
    return Lora(path, modules, metadata, unplaced, layer_weights, namings, doubled)


@dataclass(frozen=True)
class BaseModel:
    """An SDXL checkpoint, of which a DoRA needs the weights that it was trained on."""

    path: Path
    tensors: dict[str, Stored]

    def weight(self, module: Module) -> Stored:
        """The weight of the module's layer; BloraError where the checkpoint has none."""
        key, third = checkpoint_weight(module.layer) or ("", None)
        if key not in self.tensors:
            raise BloraError(
                f"{self.path} holds no weight for {module.name}: give the SDXL checkpoint, as one "
                ".safetensors file, that the LoRA was trained on"
            )
        tensor = self.tensors[key]
        if third is None:
            return tensor
        size = tensor.size // 3  # a DoRA that does not fit the third is refused later
        start = tensor.start + third * size
        shape = tuple(length // 3 for length in tensor.shape[:1]) + tensor.shape[1:]
        return replace(tensor, shape=shape, start=start, stop=start + size)


def read_base_model(path: Path) -> BaseModel:
    """The checkpoint by its header; BloraError where it cannot be read."""
    if not path.is_file():
        raise BloraError(f"no file at {path}: correct --base_model")
    return BaseModel(path, read_header(path)[0])
