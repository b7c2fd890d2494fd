"""A LoRA file of any program, read as modules in kohya's names.

keys.py says what a key means. This file brings together the tensors of a module and the
alpha that PEFT writes into settings, and looks for signs of a LoRA for another model.
blora_slicer.py reads with it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any

from blora.sdxl import blocks_by_spelling
from blora.slicer.keys import (
    ALPHA,
    BY_ROW,
    DORA,
    Key,
    Spelling,
    plain_name,
    plain_prefixes,
    read_key,
)
from blora.slicer.modules import UNKNOWN, Lora, Module, with_alpha
from blora.tensorfile import Tensor, as_fp32, read_header
from blora.text import BloraError, first_few, printable

# ---- PEFT's settings -----------------------------------------------------------------------------

# Where they stand: in the metadata as diffusers writes them, each network's behind its prefix, or
# in a file beside the LoRA as PEFT does.
METADATA, PEFT_CONFIG = "lora_adapter_metadata", "adapter_config.json"
PEFT_NETWORKS = {"unet.": "unet", "text_encoder.": "te1", "text_encoder_2.": "te2"}


@dataclass(frozen=True)
class Settings:
    """PEFT's settings of one network, and where they stand."""

    where: str
    values: dict[str, Any]

    @property
    def say_alpha(self) -> bool:
        """Whether an alpha is among them."""
        return not {"alpha", "lora_alpha"}.isdisjoint(self.values)


def peft_settings(metadata: dict[str, str], path: Path, is_peft: bool) -> dict[str, Settings]:
    """By network: from the metadata, else for PEFT's own names from the file beside.

    BloraError where they cannot be read.
    """
    where = f"{METADATA} of {path}"
    try:
        found = json.loads(metadata.get(METADATA, "{}"))
        settings = {
            network: Settings(METADATA, {
                key.removeprefix(prefix): value
                for key, value in found.items()
                if key.startswith(prefix)
            })
            for prefix, network in PEFT_NETWORKS.items()
        }  # fmt: skip
        config = path.with_name(PEFT_CONFIG)
        if is_peft and config.is_file():
            where = str(config)
            beside = Settings(PEFT_CONFIG, dict(json.loads(config.read_text("utf-8")).items()))
            settings = {n: said if said.say_alpha else beside for n, said in settings.items()}
        return settings
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise BloraError(
            f"cannot read {where} ({printable(str(error))}): save the LoRA again with its program"
        ) from error


def peft_number(settings: Settings, layer: str, patterns: str, *names: str) -> float:
    """A setting of a layer: that of the first pattern that ends its name, or the one for all.

    As get_pattern_key reads patterns (github.com/huggingface/peft, utils/other.py). TypeError or
    ValueError where it is no number.
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
    if not settings.say_alpha or not module.algorithm.rank or module.alpha is not None:
        return module
    try:
        alpha = peft_number(settings, layer, "alpha_pattern", "alpha", "lora_alpha")
        if settings.where == PEFT_CONFIG or module.rank is None:
            rank = peft_number(settings, layer, "rank_pattern", "r")
            if module.rank is None:
                return replace(module, factor=alpha / rank)
            if rank != module.rank:  # they are of another LoRA in the same folder
                return module
        alpha = as_fp32(
            alpha * (math.sqrt(module.rank) if settings.values.get("use_rslora") else 1)
        )
    except (TypeError, ValueError, OverflowError, ZeroDivisionError, StopIteration, re.error):
        alpha = math.nan
    if not math.isfinite(alpha):
        raise BloraError(f"{settings.where} gives {module.name} an alpha that is not a number")
    return with_alpha(module, alpha)


# Ways to begin a training that take something out of the base model and put it into the factors
# (tuners/lora/layer.py), so that these are no change of that model.
TAKEN_FROM_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# What of PEFT's algorithms other programs have too.
COMMON_TYPES = ("LORA", "LOHA", "LOKR", "OFT")


def check_settings(settings: Settings, path: Path) -> None:
    """Refuse what only PEFT can load, and factors that hold a part of the base model."""
    kind = str(settings.values.get("peft_type", "LORA"))
    if kind not in COMMON_TYPES:
        raise BloraError(
            f"{path} is PEFT's {printable(kind)}, which kohya's names cannot express: use it "
            "with PEFT"
        )
    start = str(settings.values.get("init_lora_weights", ""))
    if start.lower().startswith(TAKEN_FROM_BASE):
        raise BloraError(
            f"{path} was trained with init_lora_weights={printable(start)}, so its factors hold a "
            "part of the base model: save it with PEFT's path_initial_model_for_weight_conversion"
        )


# ---- Other models --------------------------------------------------------------------------------

TEXT_WIDTH = 2048  # of the text that SDXL's attn2 reads; 768 in Stable Diffusion 1, 1024 in 2
# What metadata call the models of others; SDXL and its finetunes have "xl" in it.
OTHER_MODELS = (
    r"(?<![a-z])(sd[ _.-]?v?[123]|stable-diffusion-v?[123]|flux|chroma|lumina|hunyuan|qwen|aura|"
    r"pixart|cascade|kandinsky|z-?image|cosmos|ltx|mochi|hidream|krea|kolors|"
    r"(wan|sana|anima)(?![a-z]))"
)
# sd-scripts' merge_lora.py and svd_merge_lora.py write it of a merge of SDXL LoRAs too.
DOUBTFUL = "stable-diffusion-v1"
MODEL_METADATA = ("ss_base_model_version", "modelspec.architecture")
BLOCK = r"((?:in|out)put_blocks_\d+_\d+|(?:down|up)_blocks_\d+_[a-z]+_\d+)_"


def foreign_block(key: str) -> str | None:
    """The block of a U-Net that a key names and that SDXL does not have."""
    plain = plain_name(key)
    for prefix in plain_prefixes():
        if plain.startswith(prefix) and (match := re.match(BLOCK, plain[len(prefix) :])):
            return None if match[1] in blocks_by_spelling() else match[1]
    return None


def said_model(metadata: dict[str, str], modules: Iterable[Module]) -> str | None:
    """What the metadata say, where that is another model and nothing speaks for SDXL."""
    entries = {name: metadata.get(name, "") for name in MODEL_METADATA}
    if any("xl" in said.lower() for said in entries.values()):
        return None
    for name, said in entries.items():
        if said.startswith(DOUBTFUL) and any(map(is_sdxls_alone, modules)):
            continue
        if re.search(OTHER_MODELS, said.lower()):
            return f'its {name} is "{printable(said)}"'
    return None


def is_sdxls_alone(module: Module) -> bool:
    """Whether a module is of a layer that Stable Diffusion 1 and 2 have not, or not so wide."""
    return module.layer.network == "te2" or (reads_text(module) and module.columns == TEXT_WIDTH)


def reads_text(module: Module) -> bool:
    """Whether it changes one of the U-Net's layers that read the text."""
    return module.name.endswith(("attn2_to_k", "attn2_to_v"))


# How the layers of models that draw begin, and the third text encoder of some.
ANY_MODEL = (
    r"lora_unet_|lora_transformer_|lora_te3_|diffusion_model_|(lycoris_)?transformer_|"
    r"\w*(single|double|joint)_(transformer_)?blocks_"
)


def keys_of_other_model(keys: Iterable[str], modules: dict[str, Module]) -> str | None:
    """What of the keys that are of no layer of SDXL is of another model's.

    Stable Diffusion 3 and Flux have SDXL's text encoders, so these alone make no LoRA for SDXL.
    """
    has_unet = any(module.layer.network == "unet" for module in modules.values())
    for key in keys:
        if key == "lora_controlnet":
            return "it has lora_controlnet, which makes it a ControlNet"
        if key.startswith("lora_te_"):
            return "it has lora_te_, the one text encoder of Stable Diffusion 1 and 2"
        if block := foreign_block(key):
            return f"it has {block}, a block that SDXL does not have"
        if not has_unet and re.match(ANY_MODEL, plain_name(key)):
            return f"it has {first_few([key])}, and nothing of SDXL's U-Net"
    return None


def text_of_other_model(modules: Iterable[Module]) -> str | None:
    """How wide a text its cross-attention reads, where that is not SDXL's."""
    for module in modules:
        if reads_text(module) and module.columns not in (None, TEXT_WIDTH):
            return f"its attn2 reads text of {module.columns} numbers, SDXL's of {TEXT_WIDTH}"
    return None


def check_model(
    path: Path, modules: dict[str, Module], unplaced: list[str], metadata: dict[str, str]
) -> None:
    """Refuse a LoRA that shows that it was trained on another model."""
    reason = (
        said_model(metadata, modules.values())
        or keys_of_other_model(unplaced, modules)
        or text_of_other_model(modules.values())
    )
    if reason:
        raise BloraError(f"{path} is a LoRA for another model than SDXL: {reason}")


# ---- Reading -------------------------------------------------------------------------------------


@dataclass
class Found:
    """What a file holds of a module, under one spelling of its layer."""

    spelling: Spelling
    tensors: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)  # as they are in the file, by suffix
    is_peft: bool = False

    def add(self, key: str, meaning: Key, tensor: Tensor) -> None:
        """Take in a tensor; magnitudes, one a row, become a dora_scale of [out, 1, ...]."""
        if meaning.suffix == DORA and BY_ROW in meaning.spelt and len(tensor.shape) != 2:
            axes = max(2, len(self.spelling.layer.shape))
            tensor = replace(tensor, shape=(math.prod(tensor.shape), *[1] * (axes - 1)))
        self.tensors[meaning.suffix] = tensor
        self.keys[meaning.suffix] = key
        self.is_peft |= meaning.is_peft

    def drop_own(self) -> list[str]:
        """Leave out the layer's own parameters, which are no LoRA's; their keys."""
        own = OWN if "on_input" not in self.tensors else OWN - {"weight"}  # IA3 has a "weight"
        dropped = [suffix for suffix in self.tensors if suffix in own]
        for suffix in dropped:
            del self.tensors[suffix]
        return [self.keys[suffix] for suffix in dropped]


# A layer's own parameters, as a model has them, and as PEFT's bias="lora_only" saves them.
OWN = {"weight", "bias", "base_layer.weight", "base_layer.bias"}


def is_rest(part: Found, of: Found) -> bool:
    """Whether two spellings have no tensor in common, and not both of them a change."""
    changes = [Module("", found.tensors).algorithm is not UNKNOWN for found in (part, of)]
    return not (part.tensors.keys() & of.tensors.keys() or all(changes))


def find_tensors(tensors: dict[str, Tensor]) -> tuple[list[Found], list[str], list[str]]:
    """What a file holds under each spelling of a layer; the other keys; the programs' namings."""
    found: dict[str, list[Found]] = {}
    unplaced: list[str] = []
    namings: dict[str, None] = {}
    for key, tensor in tensors.items():
        meaning = read_key(key)
        if meaning is None:
            unplaced.append(key)
            continue
        same = found.setdefault(meaning.spelling.plain, [])
        free = next((f for f in same if meaning.suffix not in f.tensors), None)
        if free is None:  # the first, or one tensor under two suffixes
            free = Found(meaning.spelling)
            same.append(free)
        free.add(key, meaning, tensor)
        if meaning.suffix != ALPHA:  # which is spelt alike everywhere
            namings[meaning.naming] = None
    return [*chain(*found.values())], unplaced, [*namings]


def find_modules(found: list[Found]) -> tuple[dict[str, list[Found]], list[str]]:
    """The same by module, each with its copies; and the keys of layers' own parameters.

    A module can be under two spellings in parts: diffusers' conversion of a DoRA to kohya's names
    leaves the magnitudes under another one than the factors.
    """
    modules: dict[str, list[Found]] = {}
    own: list[str] = []
    for part in found:
        own += part.drop_own()
        if not part.tensors:
            continue
        copies = modules.setdefault(part.spelling.layer.module, [])
        whole = next((copy for copy in copies if is_rest(part, copy)), None)
        if whole is None:
            copies.append(part)
        else:
            whole.tensors |= part.tensors
            whole.is_peft |= part.is_peft
    return modules, own


def make_modules(name: str, copies: list[Found], peft: dict[str, Settings]) -> list[Module]:
    """A module's copies, whole ones first, with the alpha of PEFT's settings."""
    made = []
    for found in copies:
        module = Module(name, found.tensors)
        settings = peft[module.layer.network]
        if found.is_peft or settings.where == METADATA:
            module = with_peft_alpha(module, found.spelling.name, settings)
        if found.is_peft and lacks_alpha(module, settings):
            module = replace(module, is_guess=True)
        made.append(module)
    return sorted(made, key=attrgetter("is_incomplete")) if made[1:] else made


def lacks_alpha(module: Module, settings: Settings) -> bool:
    """Whether a module of PEFT needs an alpha that nothing says."""
    if not module.algorithm.rank or module.alpha is not None:
        return False
    return module.rank is not None or not settings.say_alpha


SAVED_IN_FOLDERS = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")


def lora_file(path: Path) -> Path:
    """The path, or the LoRA in it where it is a folder that PEFT or diffusers saved one in."""
    inside = [path / name for name in SAVED_IN_FOLDERS]
    with suppress(OSError):  # read_lora says what may not be read
        return next((file for file in inside if file.is_file()), path)
    return path


def read_lora(path: Path) -> Lora:
    """A LoRA file of any naming, as modules with kohya's names; BloraError where it is none."""
    if not path.is_file():
        raise BloraError(f"no file at {path}: correct --loras")
    tensors, metadata = read_header(path)
    parts, unplaced, namings = find_tensors(tensors)
    found, own = find_modules(parts)
    peft = peft_settings(metadata, path, any(part.is_peft for part in parts))
    for settings in peft.values():
        check_settings(settings, path)
    loaded = {name: make_modules(name, found[name], peft) for name in sorted(found)}
    modules = {name: first for name, (first, *_) in loaded.items()}
    check_model(path, modules, unplaced, metadata)
    if not modules:
        holds = first_few(sorted(tensors)) or "no tensor at all"
        raise BloraError(f"{path} is not an SDXL LoRA: it holds {holds}")
    return Lora(
        path,
        modules,
        metadata,
        unplaced=tuple(unplaced),
        own=tuple(own),
        namings=tuple(namings),
        copies={name: tuple(others) for name, (_, *others) in loaded.items() if others},
    )
