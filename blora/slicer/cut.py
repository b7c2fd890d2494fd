"""A cut: which trait of which LoRA at which strength, what it keeps, and what its metadata say.

blora_slicer.py, the command line, plans, cuts and joins with it. Values are left to
strength.py, which is loaded where they change.
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

from blora.sdxl import Trait, block_of
from blora.slicer.keys import ALPHA, LORA_MID
from blora.slicer.modules import INCOMPLETE, Lora, Module, with_own_alpha
from blora.slicer.reader import PEFT_CONFIG
from blora.tensorfile import HASHES, json_object
from blora.text import BloraError, first_few, printable, span

if TYPE_CHECKING:
    from blora.slicer.strength import BaseModel

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
    remarks: tuple[str, ...]  # what the user should know of it, each beginning with its kind


def describe(cut: Cut) -> str:
    """A cut in words: "content of a.safetensors"."""
    return f"{printable(cut.trait.name)} of {printable(cut.lora.name)}"


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


def kept_modules(lora: Lora, cut: Cut) -> list[Module]:
    """The modules the trait keeps; refused where there are none."""
    kept = [module for name, module in lora.modules.items() if cut.trait.keeps(name)]
    if not kept:
        blocks = ", ".join(dict.fromkeys(block_of(name) for name in lora.modules))
        raise BloraError(
            f'{cut.lora} holds nothing of the trait "{printable(cut.trait.name)}": '
            f"its blocks are {blocks}"
        )
    return kept


def whole_modules(kept: list[Module], cut: Cut) -> list[Module]:
    """Those that lack no factor, which no program could load; refused where none is left."""
    whole = [module for module in kept if not module.is_incomplete]
    if not whole:
        raise BloraError(
            f'all that {cut.lora} holds of the trait "{printable(cut.trait.name)}" lacks a factor, '
            f"or has a tucker core that does not fit ({first_few(m.name for m in kept)}): save it "
            "again with the program that trained it"
        )
    return whole


def check_copies(module: Module, lora: Lora) -> None:
    """Refuse a module that the file holds under two names with different changes."""
    for other in lora.copies.get(module.name, ()):
        if not same_change(module, other):
            raise BloraError(
                f"{lora.path} holds {module.name} twice, under two names and with different "
                "values: delete one of the two from it, or leave the module out by a trait's "
                "blacklist"
            )


def same_change(module: Module, other: Module) -> bool:
    """Whether two modules have the same factors, byte for byte, and multiply them alike."""

    def change(m: Module) -> tuple[object, ...]:
        factors = {s: (t.dtype, t.shape, t.read()) for s, t in m.tensors.items() if s != ALPHA}
        return factors, m.scale, None if m.rank else m.alpha

    return change(module) == change(other)


RESIZED = "dimension is resized from"  # what sd-scripts' resize_lora.py writes into the comment


def notes(kept: list[Module], whole: list[Module], name: str) -> list[str]:
    """What of the file called `name` is left out, or copied without knowing what it does."""
    said = []
    if half := [module.name for module in kept if module.is_incomplete]:
        said.append(
            f"note: modules of {name} that {INCOMPLETE}, were left out ({len(half)}): "
            f"{first_few(half)}"
        )
    if unknown := [f"{module.name}.{suffix}" for module in whole for suffix in module.unknown]:
        said.append(
            f"note: tensors of {name} of an unknown kind were copied as they are "
            f"({len(unknown)}): {first_few(unknown)}"
        )
    return said


def warnings(whole: list[Module], lora: Lora, name: str) -> list[str]:
    """What of the file called `name` may be wrong, or is guessed."""
    said = []
    if any(module.is_guess for module in whole):
        said.append(
            f"warning: nothing says the alpha of {name}, whose names are PEFT's: it is taken as "
            f"the rank; if it was trained with another, put its {PEFT_CONFIG} beside it and cut it "
            "again"
        )
    is_resized = RESIZED in lora.metadata.get("ss_training_comment", "")
    if cores := [module.name for module in whole if is_resized and LORA_MID in module.tensors]:
        said.append(
            f"warning: {name} was resized, and sd-scripts' tool leaves tucker cores as they were, "
            f"so these modules are wrong ({len(cores)}): {first_few(cores)}"
        )
    if broken := [m.name for m in whole if m.alpha_is_read and not math.isfinite(m.alpha or 0)]:
        said.append(
            f"warning: modules of {name} have an alpha that is NaN or inf ({len(broken)}): "
            f"{first_few(broken)}"
        )
    return said


def cut_slice(lora: Lora, cut: Cut, base: BaseModel | None, dtype: str | None = None) -> Slice:
    """The modules the trait keeps, at the cut's strength.

    `dtype` is the precision that the slice will get: 8-bit floats get it before their strength.
    BloraError where there are none, or one does not fit, is there twice, or cannot be scaled.
    """
    kept = kept_modules(lora, cut)
    whole = whole_modules(kept, cut)
    for module in whole:
        check_fit(module, cut.lora)
        check_copies(module, lora)
    made = [with_own_alpha(module) for module in whole]
    if dtype:
        from blora.slicer.strength import from_float8

        made = [from_float8(module, dtype) for module in made]
    if any(cut.strength * module.factor != 1 for module in made):
        from blora.slicer.strength import at_strength

        made = [at_strength(module, cut.strength, cut.lora, base) for module in made]
    name = printable(cut.lora.name)
    said = (*notes(kept, whole, name), *warnings(whole, lora, name))
    return Slice(cut, tuple(made), lora, said)


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
        from blora.slicer.strength import with_common_alpha

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


def metadata_number(numbers: set[float], before: str | None) -> str | None:
    """A number for the metadata: "Dynamic" where modules differ, as kohya's resize says it."""
    if len(numbers) > 1:
        return "Dynamic"
    if not numbers:
        return before
    [number] = numbers
    try:
        return before if before and float(before) == number else f"{number:g}"
    except ValueError:
        return f"{number:g}"


def names_apart(loras: list[Lora]) -> list[str]:
    """The files' names without their endings, with a number where several have the same."""
    stems = [lora.path.stem for lora in loras]
    return [
        stem if stems.count(stem) == 1 else f"{stem} {stems[: index + 1].count(stem)}"
        for index, stem in enumerate(stems)
    ]


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
        f"{name}/{folder}": counts
        for name, lora in zip(names_apart(loras), loras, strict=True)
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
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",  # SwarmUI sorts by it
        **metadata,
        "ss_output_name": output.stem,
        "ss_training_comment": cuts if comment in ("", "None") else f"{cuts}; {comment}",
        "modelspec.title": output.stem,
        "modelspec.date": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "modelspec.merged_from": ", ".join(titles),
        **{key: "0" * digits for key, digits in HASHES.items()},
    }
