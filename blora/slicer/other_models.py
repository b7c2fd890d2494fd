"""What a file is that is no SDXL LoRA: a checkpoint, another model's LoRA, names of no program.

reader.py refuses a LoRA of another model: some of its layers may have the same size as SDXL's, and
a slice of those would load but be useless. What is not known is said as that.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from blora.sdxl import blocks_by_spelling
from blora.slicer.keys import PREFIX, find_layer, prefix_meaning
from blora.slicer.modules import BLOCK_DIAGONAL, Module, peft_tuner
from blora.text import BloraError, first_few, shortened

TEXT_WIDTH = 2048  # of the text that SDXL's attn2 reads
OTHER_WIDTHS = (768, 1024)  # in Stable Diffusion 1 and 2
# Names of other models in metadata; those of SDXL and its finetunes have "xl" in them.
OTHER_MODELS = (
    r"(?<![a-z])(sd[ _.-]?v?[123]|stable-diffusion-v?[123]|flux|chroma|lumina|hunyuan|qwen|aura|"
    r"pixart|cascade|kandinsky|z-?image|cosmos|ltx|mochi|hidream|krea|kolors|"
    r"(wan|sana|anima)(?![a-z]))"
)
# sd-scripts' merge_lora.py and svd_merge_lora.py write it of a merge of SDXL LoRAs too.
DOUBTFUL = "stable-diffusion-v1"
SAME_UNET = "kolors"  # has SDXL's U-Net and another text encoder, so that its layers tell nothing
MODEL_METADATA = ("ss_base_model_version", "modelspec.architecture")
BLOCK = r"((?:in|out)put_blocks_\d+_\d+|(?:down|up)_blocks_\d+_[a-z]+_\d+)_"
# Layers, behind the prefix, of models that have one of SDXL's text encoders, or both.
OTHER_LAYERS = (
    r"(single|double|joint)_(transformer_)?blocks_|transformer_blocks_\d+_attn_|te3_|3_|t5xxl_"
)


def without_prefix(key: str) -> tuple[str, str]:
    """(network, rest) of a key with underscores."""
    plain = key.replace(".", "_")
    match = PREFIX.match(plain)
    start = match.end() if match else 0
    return prefix_meaning(plain[:start])[0], plain[start:]


def declared_model(metadata: dict[str, str], is_doubtful: bool) -> str | None:
    """The metadata entry that names a different model, where none points to SDXL.

    `is_doubtful` where there are layers that what is DOUBTFUL does not have.
    """
    entries = {name: metadata.get(name, "") for name in MODEL_METADATA}
    if any("xl" in value.lower() for value in entries.values()):
        return None
    for name, value in entries.items():
        if value.startswith(DOUBTFUL) and is_doubtful:
            continue
        if re.search(OTHER_MODELS, value.lower()):
            return f'its {name} is "{shortened(value)}"'
    return None


def reads_text(module: Module) -> bool:
    """Whether it changes a layer of the U-Net that reads the text."""
    return module.name.endswith(("attn2_to_k", "attn2_to_v"))


def foreign_block(keys: Iterable[str]) -> str | None:
    """A block of a U-Net that a key names and that SDXL does not have."""
    for key in keys:
        network, rest = without_prefix(key)
        match = re.match(BLOCK, rest) if network in ("unet", "") else None
        if match and match[1] not in blocks_by_spelling():
            return f"it has {match[1]}, a block that SDXL does not have"
    return None


def other_layers(keys: Iterable[str], has_unet: bool) -> str | None:
    """A key of a layer that a different model has and SDXL lacks."""
    for key in keys:
        network, rest = without_prefix(key)
        if network == "te":
            return "it has lora_te_, the one text encoder of Stable Diffusion 1 and 2"
        if not has_unet and re.match(OTHER_LAYERS, rest):
            return f"it has {shortened(key)}, and nothing of SDXL's U-Net"
    return None


def text_width(modules: Iterable[Module]) -> str | None:
    """The width of the text that its attn2 reads, where that is a different model's.

    Half of SDXL's may also be a block-diagonal factor: then layers that read no text have one too.
    """
    modules = list(modules)
    if any(module.misfit == BLOCK_DIAGONAL for module in modules if not reads_text(module)):
        return None
    widths = (module.columns for module in modules if reads_text(module))
    other = next((width for width in widths if width in OTHER_WIDTHS), 0)
    return f"its attn2 has a text width of {other}, not {TEXT_WIDTH}" if other else None


def unknown_unet(keys: Iterable[str]) -> str | None:
    """A key of a U-Net's layer that SDXL does not have."""
    return next((key for key in keys if without_prefix(key)[0] == "unet"), None)


def check_model(
    path: Path, modules: dict[str, Module], unplaced: list[str], metadata: dict[str, str]
) -> list[str]:
    """Refuse a LoRA with signs that it was trained on a different model; or warn of a doubt.

    attn2 of a text as wide as SDXL's is SDXL's, whatever the metadata say. Stable Diffusion 3 and
    Flux have SDXL's text encoders, so that these alone do not make it SDXL's.
    """
    own = modules.values()
    is_sdxl = any(reads_text(module) and module.columns == TEXT_WIDTH for module in own)
    has_unet = any(module.layer.network == "unet" for module in own)
    has_te2 = any(module.layer.network == "te2" for module in own)
    reason = declared = declared_model(metadata, is_doubtful=is_sdxl or has_te2)
    if is_sdxl and SAME_UNET not in (declared or "").lower():
        reason = None
    elif not is_sdxl:
        reason = reason or other_layers(unplaced, has_unet) or foreign_block(unplaced)
        reason = reason or text_width(own)
    if "lora_controlnet" in unplaced:
        reason = "it has lora_controlnet, which makes it a ControlNet"
    if reason:
        raise BloraError(f"{path} is a LoRA for a different model, not SDXL: {reason}")
    if own and not has_unet and (key := unknown_unet(unplaced)):
        raise BloraError(
            f"{path} may not be for SDXL: beside SDXL's text encoders it has {shortened(key)}, of "
            "no layer of SDXL's U-Net; ask where you got it"
        )
    doubt = f"warning: {declared}, but the layers of {path.name} are SDXL's"
    return [doubt] if declared else []


# ---- What is no LoRA -----------------------------------------------------------------------------

CHECKPOINT = ("model.diffusion_model.", "first_stage_model.", "conditioner.", "cond_stage_model.")
INNER_NAME = r"(input|output|middle|down|mid|up)_blocks?[._]|text_model[._]"


def check_lora(path: Path, keys: Iterable[str], own: list[str]) -> None:
    """Refuse a file of which no module could be made, where it is known what it is.

    `own` are the keys of plain weights.
    """
    keys = sorted(keys)
    if any(key.startswith(CHECKPOINT) and key.endswith((".weight", "bias")) for key in keys):
        raise BloraError(
            f"{path} is a checkpoint, not a LoRA: name a LoRA in --loras, and the checkpoint that "
            "a DoRA needs in --base_model"
        )
    if own:
        raise BloraError(
            f"{path} is not a LoRA: it holds plain layer weights ({first_few(sorted(own))})"
        )
    for key in keys:
        if ".___." in key:
            raise BloraError(
                f"{path} has HCP-Diffusion's names ({shortened(key)}), which are not read here: "
                "convert it to the WebUI format with HCP-Diffusion"
            )
        if key.startswith("base_model.") and (tuner := peft_tuner(without_prefix(key)[1])):
            raise BloraError(
                f"{path} is PEFT's {tuner}, which kohya's names cannot express: use it with PEFT"
            )
        if (match := re.search(INNER_NAME, key)) and find_layer(key[match.start() :]):
            raise BloraError(
                f'{path} has layers of SDXL behind a prefix that is not known ("'
                f"{shortened(key[: match.start()])}\"): rename its keys to kohya's"
            )
