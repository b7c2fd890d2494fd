"""Which layers of SDXL a LyCORIS preset trains, by LyCORIS' own rules (lycoris/kohya.py, 4.1).

blora_preflight.py plans a training with it.
"""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path
from typing import Any

from blora_options import load_toml
from blora_sdxl import Layer, sdxl_layers
from blora_words import BloraError, first_few

# What LyCORIS 3.4 and later accept (VALID_PRESET_KEYS); before that unknown keys did nothing.
PRESET_KEYS = (
    "enable_conv", "target_module", "target_name", "module_algo_map", "name_algo_map",
    "lora_prefix", "use_fnmatch", "unet_target_module", "unet_target_name",
    "text_encoder_target_module", "text_encoder_target_name", "exclude_name",
)  # fmt: skip
BUILT_IN_PRESETS = (
    "full", "full-lin", "attn-mlp", "attn-only", "unet-only", "unet-transformer-only",
    "unet-convblock-only", "ia3",
)  # fmt: skip
# What LyCORIS targets in SDXL where a preset does not say: classes of the U-Net, then of text.
DEFAULT_TARGETS = {
    "unet_target_module": ["Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"],
    "unet_target_name": [
        "conv_in",
        "conv_out",
        "time_embedding.linear_1",
        "time_embedding.linear_2",
    ],
    "text_encoder_target_module": ["CLIPAttention", "CLIPSdpaAttention", "CLIPMLP"],
    "text_encoder_target_name": [],
}


def load_preset(path: Path) -> dict[str, Any]:
    """A preset with the defaults of what it leaves out; refused with keys LyCORIS refuses."""
    preset = load_toml(path, "preset")
    unknown = [key for key in preset if key not in PRESET_KEYS]
    if unknown:
        raise BloraError(
            f'the preset "{path}" has keys that LyCORIS refuses ({first_few(unknown)}): '
            "remove them; dora_wd and the like are given as --network_args"
        )
    for key in (*DEFAULT_TARGETS, "exclude_name"):
        value = preset.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise BloraError(f'{key} in the preset "{path}" is not a list of texts: correct it')
    return {**DEFAULT_TARGETS, "enable_conv": True, **preset}


def matches(patterns: list[str], name: str, preset: dict[str, Any]) -> bool:
    """Whether LyCORIS takes the name for one of these: itself, or a match from its start."""
    if name in patterns:
        return True
    if preset.get("use_fnmatch"):
        return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    try:
        return any(re.match(pattern, name) for pattern in patterns)
    except re.error as error:
        raise BloraError(f"a pattern of the preset is no regular expression ({error})") from error


def selected(layers: dict[str, Layer], part: str, preset: dict[str, Any]) -> dict[str, Layer]:
    """The layers of one network that LyCORIS trains under the preset, by their own names."""
    classes, names = preset[f"{part}_target_module"], preset[f"{part}_target_name"]
    excluded = preset.get("exclude_name", [])
    chosen: dict[str, Layer] = {}
    for name, layer in layers.items():
        if matches(excluded, name, preset):
            continue
        by_name = matches(names, name, preset)
        if layer.kind in classes and not by_name:
            inside = {n: inner for n, inner in layers.items() if n.startswith(f"{name}.")}
            chosen |= {n: i for n, i in inside.items() if not matches(excluded, n, preset)}
        elif by_name:
            chosen[name] = layer
    return {
        name: layer
        for name, layer in chosen.items()
        if layer.is_leaf and (preset["enable_conv"] or not layer.is_kernel)
    }


def trained_layers(preset: dict[str, Any]) -> dict[str, Layer]:
    """All layers of SDXL that the preset selects, by kohya's module names."""
    return {
        layer.module: layer
        for network, layers in sdxl_layers().items()
        for layer in selected(
            layers, "unet" if network == "unet" else "text_encoder", preset
        ).values()
    }
