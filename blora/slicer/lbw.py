"""The list of LBW (see blora/blocks.py) that does what a slice does."""

from __future__ import annotations

from collections.abc import Mapping

from blora.blocks import LBW_12, LBW_20, slot
from blora.sdxl import Layer
from blora.slicer.keys import DORA, PREFIX
from blora.slicer.modules import ADDED, Lora, Module
from blora.text import number_text, shortened

# What LBW does was read and run in scripts/lora_block_weight.py of b403cb7 (2025-06-19). In Forge
# it keeps patches of the first algorithms alone; the others have no further part in A1111 at 0.
WEIGHTED, TAKEN_OUT = ("LoRA", "LoHa", "LoKr"), ("full", "IA3")


def lbw_list(lora: Lora, strengths: Mapping[str, float]) -> tuple[str, str]:
    """LBW's list under which the whole file acts as a slice of it, and why there is none.

    `strengths` has those of the slice's modules, by their names. One of the two texts is empty.
    """
    if others := [naming for naming in lora.namings if not naming.startswith("kohya")]:
        return "", f"A1111 reads kohya's names alone, not those of {others[0]}"
    by_place: dict[str, tuple[str, float]] = {}
    for name, module in lora.modules.items():
        strength = strengths.get(name, 0.0)
        place = lbw_place(module.layer)
        if place:
            other, same = by_place.setdefault(place, (name, strength))
            if strength != same:
                pair = " and ".join(at_strength(*m) for m in ((other, same), (name, strength)))
                return "", f"in {place} {pair}"
        elif strength != 1:
            return "", f"{at_strength(name, strength)}, and LBW has no weight for it"
        if reason := "is there twice" if name in lora.copies else not_weighted(module, strength):
            return "", f"{name} {reason}"
        if wrapped := [key for key in module.keys.values() if not is_kohyas(key, module)]:
            return "", f"A1111 reads kohya's names alone, not {shortened(wrapped[0])}"
    kept = {place for place, (_, strength) in by_place.items() if strength}
    places = LBW_12 if kept <= {*LBW_12} else LBW_20
    return ",".join(number_text(by_place.get(place, ("", 0.0))[1]) for place in places), ""


def is_kohyas(key: str, module: Module) -> bool:
    """Whether a key has kohya's prefix and no other, and names one layer."""
    prefix = PREFIX.match(key.replace(".", "_"))
    is_alone = prefix and prefix[0] == f"lora_{module.layer.network}_"
    return bool(is_alone and not module.fused)


def lbw_text(lora: Lora, strengths: Mapping[str, float]) -> str:
    """The list, or why there is none, for a line of text."""
    weights, reason = lbw_list(lora, strengths)
    return weights or f"none, because {reason}"


def lbw_place(layer: Layer) -> str | None:
    """The place of its weight in the list; None where LBW has no weight for it, and takes 1.

    It knows a text encoder's layers by the word "encoder", and so not the embeddings, the last norm
    and the projection.
    """
    return slot(layer) if layer.network == "unet" or ".encoder." in layer.name else None


def at_strength(name: str, strength: float) -> str:
    """A module and what becomes of it."""
    return f"{name} is at {number_text(strength)}" if strength else f"{name} is left out"


def not_weighted(module: Module, strength: float) -> str:
    """Why LBW does not make of the module what the slice has; empty where it does."""
    kind = module.algorithm
    if module.is_incomplete:
        return "is incomplete"
    if module.unknown:
        return f"has a tensor that is not known ({shortened(module.unknown[0])})"
    added = [suffix for suffix in ADDED if suffix in {*module.tensors} - {*kind.markers}]
    if strength and kind.name not in WEIGHTED:
        return f"is {module.label}, which LBW drops in Forge"
    if strength and added:
        return f"has {added[0]}, which LBW drops in Forge"
    if kind.name not in WEIGHTED and (added or kind.name not in TAKEN_OUT):
        return f"is {module.label}, which LBW may not take out at 0 in A1111"
    if DORA in module.tensors and strength != 1:
        return f"is {module.label}, whose {DORA} LBW applies at any weight in A1111"
    if kind.name == "LoKr" and "lokr_w1" not in module.tensors:
        return "is a LoKr without a whole lokr_w1, at which LBW fails in A1111"
    return ""
