"""A cut: which trait of which LoRA at which strength, what it keeps, and what its metadata say.

blora_slicer.py, the command line, plans, cuts and joins with it. Values are left to
blora_strength.py, which is loaded where they change.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from blora_lora import Lora, Module, json_object
from blora_safetensors import HASHES
from blora_sdxl import Trait, block_of
from blora_words import BloraError, printable, span

if TYPE_CHECKING:
    from blora_strength import BaseModel

DEFAULT_TRAIT = "content"
DEFAULT_STRENGTH = 1.0


@dataclass(frozen=True)
class Cut:
    """One slice to make: which trait of which LoRA, at which strength."""

    lora: Path
    trait: Trait
    strength: float


@dataclass(frozen=True)
class Slice:
    """What a cut kept, at its strength, and the file it is from."""

    cut: Cut
    modules: tuple[Module, ...]
    lora: Lora


def describe(cut: Cut) -> str:
    """A cut in words: "content of a.safetensors"."""
    return f"{printable(cut.trait.name)} of {cut.lora.name}"


def summarize(modules: Iterable[Module]) -> str:
    """Counts of what a slice holds: "80 modules, 240 tensors, rank 1024"."""
    modules = list(modules)
    parts = [f"{len(modules)} modules", f"{sum(len(m.tensors) for m in modules)} tensors"]
    ranks = [module.rank for module in modules]
    return ", ".join(parts + ([f"rank {span(ranks)}"] if any(ranks) else []))


# ---- Pairing -------------------------------------------------------------------------------------


def plan_cuts(
    loras: list[Path], traits: list[str], alphas: list[float], known: dict[str, Trait]
) -> list[Cut]:
    """Pair LoRAs, traits and strengths by their order, filling up what was left out."""
    cuts = []
    for index in range(max(len(loras), len(traits))):
        name = traits[index] if index < len(traits) else DEFAULT_TRAIT
        if name not in known:
            names = ", ".join(printable(trait) for trait in known)
            raise BloraError(f'unknown trait "{printable(name)}": the traits are {names}')
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
            raise BloraError(f"two slices would both be written to {path}: cut them one by one")
        plan[path] = [cut]
    return plan


# ---- Cutting and joining -------------------------------------------------------------------------


def check_fit(module: Module, lora: Path) -> None:
    """Refuse a module whose factors do not fit its layer: it would break where it is loaded."""
    if not module.fits:
        shapes = ", ".join(
            f"{printable(suffix)} {list(tensor.shape)}"
            for suffix, tensor in module.tensors.items()
            if tensor.shape
        )
        raise BloraError(
            f"{module.name} in {lora} does not fit SDXL, where the layer's weight is "
            f"{list(module.layer.shape)}: it has {shapes}; use a LoRA that was trained on SDXL"
        )


def cut_slice(lora: Lora, cut: Cut, base: BaseModel | None) -> Slice:
    """The modules the trait keeps, at the cut's strength; refused where there are none."""
    kept = [module for name, module in lora.modules.items() if cut.trait.keeps(name)]
    if not kept:
        blocks = ", ".join(dict.fromkeys(block_of(name) for name in lora.modules))
        raise BloraError(
            f'{cut.lora} holds nothing of the trait "{printable(cut.trait.name)}": '
            f"its blocks are {blocks}"
        )
    for module in kept:
        check_fit(module, cut.lora)
    if cut.strength != 1:
        from blora_strength import at_strength

        kept = [at_strength(module, cut.strength, cut.lora, base) for module in kept]
    return Slice(cut, tuple(kept), lora)


def join_slices(slices: list[Slice]) -> list[Module]:
    """The modules of all slices, by name; a module that two of them hold is refused."""
    owners: dict[str, Cut] = {}
    for piece in slices:
        for module in piece.modules:
            if module.name in owners:
                raise BloraError(
                    f"{module.name} would come from both {describe(owners[module.name])} and "
                    f"{describe(piece.cut)}: leave one out, or write them apart with --not_combined"
                )
            owners[module.name] = piece.cut
    modules = [module for piece in slices for module in piece.modules]
    alphas = {m.alpha for m in modules if m.algorithm.name == "LoRA" and m.rank}
    if len(slices) > 1 and len(alphas) > 1:
        from blora_strength import with_common_alpha

        return with_common_alpha(modules)
    return modules


# ---- Metadata ------------------------------------------------------------------------------------

KEPT_METADATA = ("ss_", "modelspec.")
# Of the source's own bytes: A1111 and Forge trust the hash they find, and would take the slice
# for its parent.
STALE_METADATA = "modelspec.hash_sha256"


def kept_metadata(lora: Lora) -> dict[str, str]:
    """What is still true of a slice of the LoRA."""
    return {
        key: value
        for key, value in lora.metadata.items()
        if key.startswith(KEPT_METADATA) and key != STALE_METADATA
    }


def metadata_number(numbers: set[float | None], before: str | None) -> str | None:
    """A number for the metadata: "Dynamic" where modules differ, as kohya's resize says it."""
    if len(numbers) > 1:
        return "Dynamic"
    [number] = numbers or {None}
    if number is None:
        return before
    try:
        return before if before and float(before) == number else f"{number:g}"
    except ValueError:
        return f"{number:g}"


def join_metadata(loras: list[Lora]) -> dict[str, str]:
    """Entries that are the same in all sources; the rest is listed by source in ss_blora_sources.

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
    ranked = [module for module in modules if module.rank]
    sizes = {
        "ss_network_dim": {float(module.rank) for module in ranked},
        "ss_network_alpha": {
            alpha for module in ranked if math.isfinite(alpha := module.alpha or float(module.rank))
        },
    }
    for key, numbers in sizes.items():
        value = metadata_number(numbers, metadata.get(key))
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
