"""A LoRA file of any program, read as modules in kohya's names, and the base model of a DoRA."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from operator import attrgetter
from pathlib import Path

from blora.sdxl import checkpoint_weight, layers_by_module
from blora.slicer.keys import ALPHA, BY_ROW, DORA, Key, Spelling, find_layer, read_key
from blora.slicer.modules import UNKNOWN, UNREAD, Lora, Module, split_by_rows
from blora.slicer.other_models import check_lora, check_model
from blora.slicer.peft import METADATA, Settings, check_settings, peft_settings, with_peft_alpha
from blora.tensorfile import Stored, read_header
from blora.text import BloraError, first_few, shortened

# ---- Modules -------------------------------------------------------------------------------------

# A layer's plain parameters, as a model has them, and as PEFT's bias="lora_only" saves them.
LAYER_WEIGHTS = {"weight", "base_layer.weight"}
LAYER_BIASES = {"bias", "base_layer.bias"}


@dataclass
class Part:
    """The tensors of a module that a file holds under one spelling of its layer."""

    spelling: Spelling
    tensors: dict[str, Stored] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)  # as they are in the file, by suffix
    is_peft: bool = False
    fused: str = ""

    def add(self, key: Key, tensor: Stored) -> None:
        """Add a tensor; magnitudes, one a row, become a dora_scale of [out, 1, ...]."""
        axes, numbers = len(tensor.shape), math.prod(tensor.shape)
        weight = self.spelling.layers[0].shape
        # diffusers' conversion to kohya calls PEFT's [1, out, 1, 1] a dora_scale, without a prefix.
        is_pefts = BY_ROW in key.spelt or (not self.spelling.prefix and numbers == weight[0])
        if key.suffix == DORA and (axes == 1 or (axes != 2 and is_pefts)):
            ones = [1] * (max(2, len(weight)) - 1)
            tensor = replace(tensor, shape=(numbers, *ones))
        self.tensors[key.suffix] = tensor
        self.keys[key.suffix] = key.text
        self.is_peft |= key.is_peft

    def drop(self, suffixes: Iterable[str]) -> list[str]:
        """Leave out these tensors; their keys."""
        dropped = [suffix for suffix in suffixes if self.tensors.pop(suffix, None)]
        return [self.keys[suffix] for suffix in dropped]

    def split(self) -> list[Part]:
        """A part for each projection of a fused layer.

        Where its algorithm has no rows to split, each has all tensors, which fit none of them.
        """
        layers = self.spelling.layers
        if len(layers) == 1:
            return [self]
        rows = split_by_rows(self.tensors, len(layers)) or [self.tensors] * len(layers)
        return [
            replace(
                self,
                spelling=replace(self.spelling, layers=(layer,)),
                tensors=dict(tensors),
                fused=self.spelling.name,
            )
            for layer, tensors in zip(layers, rows, strict=True)
        ]

    def completes(self, other: Part) -> bool:
        """Whether the two have no tensor in common, and are not a change each."""
        changes = [Module("", {**part.tensors}).algorithm is not UNKNOWN for part in (self, other)]
        return not (self.tensors.keys() & other.tensors.keys() or all(changes))


MOST_COPIES = 8  # of a module; each is compared with the others


def add_part(part: Part, copies: list[Part], path: Path) -> None:
    """Append a part to those of its module; BloraError where these are too many."""
    copies.append(part)
    if len(copies) > MOST_COPIES:
        name = part.spelling.layers[0].module
        raise BloraError(f"{path} holds {name} more than {MOST_COPIES} times: delete all but one")


def split_by_spelling(
    path: Path, tensors: Mapping[str, Stored], encoder: str
) -> tuple[list[Part], list[str], list[str]]:
    """A file's tensors by layer and spelling; the keys of no layer; the programs' namings."""
    parts: dict[str, list[Part]] = {}
    unplaced: list[str] = []
    namings: dict[str, None] = {}
    for text, tensor in tensors.items():
        key = read_key(text, encoder)
        if key is None:
            unplaced.append(text)
            continue
        same = parts.setdefault(key.spelling.plain, [])
        free = next((part for part in same if key.suffix not in part.tensors), None)
        if free is None:  # the first, or one tensor under two suffixes
            free = Part(key.spelling)
            add_part(free, same, path)
        free.add(key, tensor)
        if key.suffix != ALPHA:  # which is spelt alike everywhere
            namings[key.naming] = None
    return [*chain(*parts.values())], unplaced, [*namings]


def leave_out(parts: Iterable[Part]) -> dict[str, list[str]]:
    """Drop what is not a LoRA's; the keys of that, by the keys of SKIPPED.

    A bias beside a weight is a model's own; one alone was trained, with PEFT's bias="all".
    """
    skipped: dict[str, list[str]] = {"own": [], "biases": [], "unread": []}
    for part in parts:
        weights = part.drop(LAYER_WEIGHTS - ({"weight"} if "on_input" in part.tensors else set()))
        skipped["own" if weights else "biases"] += part.drop(LAYER_BIASES)
        skipped["own"] += weights
        skipped["unread"] += part.drop([s for s in part.tensors if s.startswith(UNREAD)])
    return skipped


def gather_modules(path: Path, parts: Iterable[Part]) -> dict[str, list[Part]]:
    """The parts by module, each with its copies.

    A module can be split over two spellings: diffusers' conversion of a DoRA to kohya's names
    leaves the magnitudes under a different one than the factors.
    """
    modules: dict[str, list[Part]] = {}
    for part in filter(attrgetter("tensors"), parts):
        copies = modules.setdefault(part.spelling.layers[0].module, [])
        whole = next((copy for copy in copies if part.completes(copy)), None)
        if whole is None:
            add_part(part, copies, path)
        else:
            whole.tensors |= part.tensors
            whole.keys |= part.keys
            whole.is_peft |= part.is_peft
    return modules


def build_modules(name: str, copies: list[Part], peft: dict[str, Settings]) -> list[Module]:
    """A module's copies, whole ones first, with the alpha of PEFT's settings."""
    modules = []
    for part in copies:
        module = Module(name, {**part.tensors}, keys=part.keys, fused=part.fused)
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
    """The path, or the LoRA in it, or one below, where it is a folder that PEFT or diffusers saved.

    BloraError where it is a folder of none or of several.
    """
    try:
        if not path.is_dir():
            return path
        for folders in ([path], sorted(inside for inside in path.iterdir() if inside.is_dir())):
            files = [folder / name for folder in folders for name in SAVED_IN_FOLDERS]
            loras = [file for file in files if file.is_file()]
            if len(loras) == 1:
                return loras[0]
            if loras:
                several = first_few(str(file.relative_to(path)) for file in loras)
                raise BloraError(f"{path} holds several LoRAs ({several}): name one of them")
        names = [file.name for file in sorted(path.iterdir())]
    except OSError as error:
        raise BloraError(f"cannot read {path} ({error})") from error
    raise BloraError(about_folder(path, names))


def about_folder(path: Path, names: list[str]) -> str:
    """What a folder without a LoRA of PEFT's or diffusers' holds, and what to do."""
    if loras := [name for name in names if name.endswith(".safetensors")]:
        return f"{path} is a folder: name the LoRA in it ({first_few(loras)})"
    if pickles := [name for name in names if name.endswith((".bin", ".pt", ".ckpt"))]:
        file = shortened(pickles[0])
        return f"{path} is a folder with {file}, a PyTorch file: save the LoRA again as safetensors"
    holds = first_few(names) or "empty"
    return f"{path} is a folder without a .safetensors file ({holds}): correct --loras"


TEXT_WIDTHS = {768: "te1", 3072: "te1", 1280: "te2", 5120: "te2"}  # of CLIP's layers


def bare_encoder(tensors: Mapping[str, Stored]) -> str | None:
    """Which text encoder a file is of that names none, by the width of its layers.

    None where it has no layer of a text encoder without a network's name.
    """
    encoders = {
        TEXT_WIDTHS[length]
        for key, tensor in tensors.items()
        if key.partition(".")[0] not in layers_by_module()  # kohya's names, of which most files are
        for length in TEXT_WIDTHS.keys() & {*tensor.shape}
        if (spelling := find_layer(key)) and spelling.is_bare
    }
    return max(encoders, default=None)


def read_lora(path: Path) -> Lora:
    """A LoRA file of any naming, as modules with kohya's names; BloraError where it is not one."""
    if not path.is_file():
        raise BloraError(f"no file at {path}: correct --loras")
    tensors, metadata = read_header(path)
    encoder = bare_encoder(tensors)
    parts, unplaced, namings = split_by_spelling(path, tensors, encoder or "te2")
    skipped = leave_out(parts) | {"unplaced": unplaced}
    by_module = gather_modules(path, chain.from_iterable(part.split() for part in parts))
    peft = peft_settings(metadata, path, any(part.is_peft for part in parts))
    copies = {name: build_modules(name, by_module[name], peft) for name in sorted(by_module)}
    modules = {name: first for name, (first, *_) in copies.items()}
    for network in {module.layer.network for module in modules.values()}:
        check_settings(peft[network], path)
    if not modules:
        check_lora(path, tensors, skipped["own"])
    remarks = check_model(path, modules, unplaced, metadata)
    if not modules:
        holds = first_few(sorted(tensors)) or "no tensor at all"
        raise BloraError(f"{path} is not an SDXL LoRA: it holds {holds}")
    for network, settings in peft.items():
        own = [module for module in modules.values() if module.layer.network == network]
        if settings.values.get("use_dora") and own and not any(DORA in m.tensors for m in own):
            remarks.append(
                f"warning: {path.name} was trained with use_dora, and holds no lengths of a DoRA: "
                "the slice acts as a plain LoRA"
            )
    if encoder:
        remarks.append(
            f"note: {path.name} names no text encoder, so its width decides: it is {encoder}"
        )
    doubled = {name: others for name, (_, *others) in copies.items() if others}
    return Lora(path, modules, metadata, skipped, namings, doubled, remarks)


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
        # A DoRA that does not fit the third is refused later.
        return tensor if third is None else tensor.rows(third, 3)


def read_base_model(path: Path) -> BaseModel:
    """The checkpoint by its header; BloraError where it cannot be read."""
    if not path.is_file():
        raise BloraError(f"no file at {path}: correct --base_model")
    return BaseModel(path, read_header(path)[0])
