"""A cut: which trait of which LoRA goes to which file, and the modules that it keeps.

No value changes here, and only alphas are read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

from blora.sdxl import Trait, block_of, named_trait
from blora.slicer.blocks import Blocks
from blora.slicer.keys import ALPHA, LORA_MID
from blora.slicer.lbw import lbw_text
from blora.slicer.modules import Lora, Module, peft_tuner, with_rank_as_alpha
from blora.slicer.peft import PEFT_CONFIG
from blora.tensorfile import as_fp32
from blora.text import BloraError, first_few, listed, printable, shortened, span

DEFAULT_TRAIT = "content"
DEFAULT_STRENGTH = 1.0
EVERYTHING = Trait("", ("",), ())


@dataclass(frozen=True)
class Cut:
    """One slice to make: which trait of which LoRA, at which strength, in which blocks."""

    lora: Path
    trait: Trait
    strength: float
    blocks: Blocks | None = None

    def keeps(self, module: str) -> bool:
        """Whether the module, by kohya's name, is of the trait and in a block."""
        return self.trait.keeps(module) and (not self.blocks or module in self.blocks.modules)

    def strength_of(self, module: str) -> float:
        """What the change of a module that it keeps is multiplied with."""
        return self.strength * (self.blocks.modules[module] if self.blocks else 1.0)

    @property
    def kept(self) -> str:
        """What it keeps, in words: "style", "OUT00=1 OUT01=0.3", "style in OUT01=0.3"."""
        return " in ".join(filter(None, (self.trait.name, str(self.blocks or ""))))

    @property
    def file_part(self) -> str:
        """What it keeps, for the name of a file: "style", "OUT00_OUT01", "style_OUT01"."""
        parts = [self.trait.name, *(self.blocks.weights if self.blocks else ())]
        return re.sub(r"[^\w.-]+", "_", "_".join(filter(None, parts)))


@dataclass(frozen=True)
class Slice:
    """The modules that a cut keeps, before the strength, and the file they are from."""

    cut: Cut
    lora: Lora
    modules: tuple[Module, ...]
    remarks: list[str]  # notes and warnings for the user


def describe(cut: Cut) -> str:
    """A cut in words: "content of a.safetensors"."""
    return f"{printable(cut.kept)} of {printable(cut.lora.name)}"


def summarize(modules: Iterable[Module]) -> str:
    """What a slice holds: "80 modules, 240 tensors, rank 1024"."""
    modules = list(modules)
    parts = [f"{len(modules)} modules", f"{sum(len(m.tensors) for m in modules)} tensors"]
    ranks = [module.rank for module in modules]
    return ", ".join(parts + ([f"rank {span(ranks)}"] if any(ranks) else []))


def plan_cuts(
    loras: list[Path],
    traits: list[str],
    alphas: list[float],
    known: dict[str, Trait],
    blocks: Blocks | None = None,
) -> list[Cut]:
    """Pair LoRAs, traits and strengths by position, with defaults for what is left out.

    Blocks are those of all cuts. Without a trait they are kept whole.
    """
    if blocks and not traits:
        known, traits = {"": EVERYTHING}, [""] * len(loras)
    cuts = []
    for index in range(max(len(loras), len(traits))):
        name = traits[index] if index < len(traits) else DEFAULT_TRAIT
        strength = alphas[index] if index < len(alphas) else DEFAULT_STRENGTH
        cuts.append(
            Cut(loras[min(index, len(loras) - 1)], named_trait(name, known), strength, blocks)
        )
    return cuts


def plan_outputs(cuts: list[Cut], output: Path, combined: bool) -> dict[Path, list[Cut]]:
    """Which file each cut goes to: one for all when combined, otherwise one a cut.

    The latter are named after what they keep, and their LoRAs where several keep the same.
    """
    if combined:
        return {output: cuts}
    plan: dict[Path, list[Cut]] = {}
    names = [cut.trait.name for cut in cuts]
    for cut in cuts:
        parts = [output.stem, cut.file_part]
        if names.count(cut.trait.name) > 1:
            parts.append(cut.lora.stem)
        path = output.with_name("_".join(parts) + output.suffix)
        if path in plan:
            raise BloraError(f"two slices would both be written to {path}: cut them one by one")
        plan[path] = [cut]
    return plan


def take_slice(lora: Lora, cut: Cut) -> Slice:
    """The modules of the LoRA that the cut keeps, each with an alpha where it has a rank.

    BloraError where there are none, or one does not fit its layer, or is there twice.
    """
    kept = [module for name, module in lora.modules.items() if cut.keeps(name)]
    if not kept:
        wanted = shortened(cut.kept) if cut.blocks else f'the trait "{shortened(cut.kept)}"'
        blocks = ", ".join(dict.fromkeys(block_of(name) for name in lora.modules))
        raise BloraError(f"{cut.lora} has no modules for {wanted}: its blocks are {blocks}")
    whole = [module for module in kept if not (module.is_incomplete or module.is_unknown)]
    if not whole:
        raise BloraError(nothing_whole(kept, f'"{shortened(cut.kept)}" module in {cut.lora}'))
    for module in whole:
        check_known(module, cut.lora)
        check_fit(module, cut.lora)
        check_copies(module, lora)
    return Slice(cut, lora, tuple(map(with_rank_as_alpha, whole)), remarks(kept, whole, lora))


def nothing_whole(kept: list[Module], which: str) -> str:
    """Why none of the modules that a trait keeps can be cut: `which` says whose they are."""
    if keys := [key for module in kept if module.is_unknown for key in module.unknown]:
        what = f"the kind of every {which} is unknown ({first_few(keys)})"
        return f"{what}: {peft_advice(kept) or USE_WHOLE}"
    names = first_few(module.name for module in kept)
    return f"every {which} is incomplete ({names}): save it again with the program that trained it"


USE_WHOLE = "use the LoRA whole, in the program that trained it"


def peft_advice(modules: Iterable[Module]) -> str:
    """What to do with tensors of an algorithm that only PEFT has; "" where there are none."""
    tuners = (peft_tuner(suffix) for module in modules for suffix in module.tensors)
    tuner = next(filter(None, tuners), None)
    return (
        f"PEFT's {tuner} has such, which kohya's names cannot express; use it with PEFT"
        if tuner
        else ""
    )


def check_known(module: Module, lora: Path) -> None:
    """Refuse a module with a tensor that is not of its algorithm: the slice might act otherwise."""
    if module.unknown:
        advice = peft_advice([module]) or "exclude the module with a trait's blacklist"
        raise BloraError(
            f"{lora} holds unknown tensors beside those of {module.label} "
            f"({first_few(module.unknown)}), so what a slice would do is not known: {advice}"
        )


def check_fit(module: Module, lora: Path) -> None:
    """Refuse a module whose factors do not fit its layer: it would break where it is loaded."""
    if module.fits:
        return
    if module.fused:
        raise BloraError(
            f"{shortened(module.fused)} in {lora} holds fused projections as {module.label}, which "
            "cannot be split into those of SDXL: unfuse them in the program that trained it"
        )
    if module.misfit:
        raise BloraError(
            f"the factors of {module.name} in {lora} are {module.misfit}: convert them in that "
            "program, or use the LoRA there"
        )
    shapes = ", ".join(
        f"{shortened(suffix)} {list(tensor.shape)}"
        for suffix, tensor in module.tensors.items()
        if tensor.shape
    )
    raise BloraError(
        f"{module.name} in {lora} does not fit SDXL, where the layer's weight is "
        f"{list(module.layer.shape)}: it has {shapes}; use a LoRA that was trained on SDXL, or "
        "exclude the module with a trait's blacklist"
    )


def check_copies(module: Module, lora: Lora) -> None:
    """Refuse a module that the file holds under two names with different changes."""

    def change(m: Module) -> tuple[object, ...]:
        """Its factors, byte for byte, and what multiplies them."""
        factors = {s: (t.dtype, t.shape, t.read()) for s, t in m.tensors.items() if s != ALPHA}
        return factors, m.scale, None if m.rank else m.alpha

    if any(change(module) != change(other) for other in lora.copies.get(module.name, ())):
        raise BloraError(
            f"{lora.path} holds {module.name} twice, under two names and with different values: "
            "delete one of them, or exclude the module with a trait's blacklist"
        )


RESIZED = "dimension is resized from"  # what sd-scripts' resize_lora.py writes into the comment


def remarks(kept: list[Module], whole: list[Module], lora: Lora) -> list[str]:
    """What is left out of the slice, may be wrong with it, or is guessed."""
    name = printable(lora.path.name)
    is_resized = RESIZED in lora.metadata.get("ss_training_comment", "")
    about = {
        f"note: left out incomplete modules of {name}": [m.name for m in kept if m.is_incomplete],
        f"note: left out modules of an unknown kind in {name}": [
            key for module in kept if module.is_unknown for key in module.unknown
        ],
        f"note: split fused projections of {name}": [
            *dict.fromkeys(module.fused for module in whole if module.fused)
        ],
        f"warning: {name} is an OFT as PEFT and OneTrainer store it, which ComfyUI does not read": [
            module.name for module in whole if "oft_R.weight" in module.tensors
        ],
        f"warning: alpha is 0 in modules of {name}, which only trainers read as the rank: to every "
        "program that draws it is no change": [m.name for m in whole if m.rank and m.alpha == 0],
        f"warning: {name} was resized, and sd-scripts' tool does not resize tucker cores, so these "
        "modules are wrong": [m.name for m in whole if is_resized and LORA_MID in m.tensors],
        f"warning: alpha is NaN or inf in modules of {name}": [
            m.name for m in whole if m.alpha_is_read and not math.isfinite(m.alpha or 0)
        ],
    }
    sentences = [f"{sentence} {listed(names)}" for sentence, names in about.items() if names]
    if any(module.is_guess for module in whole):
        sentences.append(
            f"warning: no alpha is stored for {name}, whose names are PEFT's: alpha = rank is "
            f"assumed; if it was trained with another alpha, put its {PEFT_CONFIG} beside it and "
            "cut it again"
        )
    return sentences


def lbw_lines(slices: list[Slice]) -> Iterator[str]:
    """For each LoRA of a file, the list of LBW under which it acts as its slices together."""
    loras = {piece.lora.path: piece.lora for piece in slices}
    for path, lora in loras.items():
        strengths = {
            module.name: piece.cut.strength_of(module.name)
            for piece in slices
            if piece.lora is lora
            for module in piece.modules
        }
        owner = f" for {path.name}" if len(loras) > 1 else ""
        yield f"LBW{owner}: {lbw_text(lora, strengths)}"


def check_doubles(slices: list[Slice]) -> None:
    """Refuse modules that two slices of one file hold."""
    for one, two in combinations(slices, 2):
        names = {module.name for module in one.modules}
        both = [module.name for module in two.modules if module.name in names]
        if both and replace(one.cut, strength=two.cut.strength) == two.cut:
            raise BloraError(f"{describe(one.cut)} is asked for twice: leave one out")
        if both:
            raise BloraError(
                f"{describe(one.cut)} and {describe(two.cut)} both hold {first_few(both)}: leave "
                "one out, or write separate files with --not_combined"
            )


def common_alpha(slices: list[Slice]) -> float | None:
    """The alpha that all LoRA modules of a file get, where slices of different alphas are joined.

    diffusers scales all U-Net modules by the alpha it meets most, over each one's own rank. The
    smallest becomes the common one: then each lora_up takes a ratio above 1, where a smaller one
    would push fp16 into its subnormal numbers. An alpha of 0 stays: it is no change, or to trainers
    the rank. None where nothing changes.
    """
    loras = [m for piece in slices for m in piece.modules if m.is_ranked_lora and m.alpha != 0]
    if len(slices) == 1 or len({module.alpha for module in loras}) < 2:
        return None
    return as_fp32(min((module.effective_alpha for module in loras), key=abs))
