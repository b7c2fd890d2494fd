"""Signs that a LoRA was trained on a model other than SDXL.

reader.py refuses such a LoRA: some of its layers may have the same size as SDXL's, and a slice of
those would load but be useless.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from blora.sdxl import blocks_by_spelling
from blora.slicer.keys import PLAIN_PREFIXES, plain_name
from blora.slicer.modules import Module
from blora.text import BloraError, shortened

TEXT_WIDTH = 2048  # of the text that SDXL's attn2 reads; 768 in Stable Diffusion 1, 1024 in 2
# Names of other models in metadata; those of SDXL and its finetunes have "xl" in them.
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
    for prefix in PLAIN_PREFIXES:
        if plain.startswith(prefix) and (match := re.match(BLOCK, plain[len(prefix) :])):
            return None if match[1] in blocks_by_spelling() else match[1]
    return None


def declared_model(metadata: dict[str, str], modules: Iterable[Module]) -> str | None:
    """The metadata entry that names a different model, where none points to SDXL."""
    entries = {name: metadata.get(name, "") for name in MODEL_METADATA}
    if any("xl" in value.lower() for value in entries.values()):
        return None
    # Stable Diffusion 1 and 2 lack these layers, or have them less wide.
    is_sdxls_alone = any(
        m.layer.network == "te2" or (reads_text(m) and m.columns == TEXT_WIDTH) for m in modules
    )
    for name, value in entries.items():
        if value.startswith(DOUBTFUL) and is_sdxls_alone:
            continue
        if re.search(OTHER_MODELS, value.lower()):
            return f'its {name} is "{shortened(value)}"'
    return None


def reads_text(module: Module) -> bool:
    """Whether it changes a layer of the U-Net that reads the text."""
    return module.name.endswith(("attn2_to_k", "attn2_to_v"))


# How layers of any image model begin, and of the third text encoder that some have.
ANY_MODEL = (
    r"lora_unet_|lora_transformer_|lora_te3_|diffusion_model_|(lycoris_)?transformer_|"
    r"\w*(single|double|joint)_(transformer_)?blocks_"
)


def keys_of_other_model(keys: Iterable[str], modules: dict[str, Module]) -> str | None:
    """A key of a layer that a different model has and SDXL lacks.

    Stable Diffusion 3 and Flux have SDXL's text encoders, so these alone do not make it SDXL's.
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
            return f"it has {shortened(key)}, and nothing of SDXL's U-Net"
    return None


def check_model(
    path: Path, modules: dict[str, Module], unplaced: list[str], metadata: dict[str, str]
) -> None:
    """Refuse a LoRA with signs that it was trained on a different model."""
    reason = declared_model(metadata, modules.values()) or keys_of_other_model(unplaced, modules)
    for module in modules.values():
        if reads_text(module) and module.columns not in (None, TEXT_WIDTH):
            reason = reason or f"its attn2 has a text width of {module.columns}, not {TEXT_WIDTH}"
    if reason:
        raise BloraError(f"{path} is a LoRA for a different model, not SDXL: {reason}")
