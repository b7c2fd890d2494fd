"""The metadata of a slice: what is true of it, from what its sources' metadata say."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

from blora.slicer.cut import Slice, describe
from blora.slicer.modules import Lora
from blora.tensorfile import HASHES, json_object

KEPT = ("ss_", "modelspec.")
# Of the source's own bytes: A1111 and Forge trust the hash they find, and would take the slice
# for its parent.
STALE = "modelspec.hash_sha256"


def build_metadata(slices: list[Slice], alpha: float | None, output: Path) -> dict[str, str]:
    """The metadata of a file to write, with room for its hashes.

    `alpha` is the one that all LoRA modules get; None where each keeps its own.
    """
    loras = list({piece.lora.path: piece.lora for piece in slices}.values())
    metadata = join_metadata(loras)
    cuts = ", ".join(f"{describe(piece.cut)} at {piece.cut.strength:g}" for piece in slices)
    comment = metadata.get("ss_training_comment", "None")  # sd-scripts' word for none
    titles = [lora.metadata.get("modelspec.title") or lora.path.stem for lora in loras]
    return {
        "ss_base_model_version": "sdxl_base_v1-0",  # without it A1111 takes it for SD1
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",  # SwarmUI sorts by it
        **metadata,
        **network_size(slices, alpha, metadata),
        "ss_output_name": output.stem,
        "ss_training_comment": cuts if comment in ("", "None") else f"{cuts}; {comment}",
        "modelspec.title": output.stem,
        "modelspec.date": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "modelspec.merged_from": ", ".join(titles),
        **{key: "0" * digits for key, digits in HASHES.items()},
    }


def join_metadata(loras: list[Lora]) -> dict[str, str]:
    """Entries that are the same in all sources; the rest is listed by source in ss_blora_sources.

    Tag frequencies are joined, their folders named after their LoRA: A1111 shows them all.
    """
    sources = [
        {key: text for key, text in lora.metadata.items() if key.startswith(KEPT) and key != STALE}
        for lora in loras
    ]
    first, *others = sources
    agreed = {key: text for key, text in first.items() if all(o.get(key) == text for o in others)}
    if not others:
        return agreed
    differing = [
        {"file": lora.path.name} | {key: source[key] for key in source if key not in agreed}
        for lora, source in zip(loras, sources, strict=True)
    ]
    tags = {
        f"{name}/{folder}": counts
        for name, source in zip(distinct_names(loras), sources, strict=True)
        for folder, counts in json_object(source.get("ss_tag_frequency")).items()
    }
    if tags and "ss_tag_frequency" not in agreed:
        agreed["ss_tag_frequency"] = json.dumps(tags)
        for source in differing:
            source.pop("ss_tag_frequency", None)
    return agreed | {"ss_blora_sources": json.dumps(differing)}


def distinct_names(loras: list[Lora]) -> list[str]:
    """The files' names without their endings, numbered where several have the same."""
    stems = [lora.path.stem for lora in loras]
    return [
        stem if stems.count(stem) == 1 else f"{stem} {stems[: index + 1].count(stem)}"
        for index, stem in enumerate(stems)
    ]


def network_size(slices: list[Slice], alpha: float | None, old: dict[str, str]) -> dict[str, str]:
    """Rank and alpha of the modules as sd-scripts writes them, where they are known."""
    ranked = [module for piece in slices for module in piece.modules if module.rank]
    alphas = {
        module.effective_alpha if alpha is None or not module.is_ranked_lora else alpha
        for module in ranked
    }
    sizes = {
        "ss_network_dim": {float(module.rank or 0) for module in ranked},
        "ss_network_alpha": set(filter(math.isfinite, alphas)),
    }
    texts = {key: number_text(numbers, old.get(key)) for key, numbers in sizes.items()}
    return {key: text for key, text in texts.items() if text}


def number_text(numbers: set[float], before: str | None) -> str | None:
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
