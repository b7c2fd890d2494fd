"""Print as JSON what one LyCORIS release trains under each preset, on SDXL's own module names.

  PYTHONPATH=<a LyCORIS release> python lycoris_modules.py PRESET...

The models are trees on torch's meta device: the names, classes and shapes of SDXL, no weights.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from pathlib import Path

import torch
from torch import nn

SDXL = json.loads(Path(__file__).parents[1].joinpath("data/sdxl_modules.json").read_text())
RANK = 1
# Classes of the containers that the data does not list, by the end of their names.
CONTAINERS = {
    r"attn[12]": "CrossAttention",
    r"ff": "FeedForward",
    r"ff\.net\.0": "GEGLU",
    r"self_attn": "CLIPAttention",
    r"mlp": "CLIPMLP",
    r"layers\.\d+": "CLIPEncoderLayer",
}


def container_class(name: str) -> str:
    """The class that sd-scripts gives a module which only holds others."""
    found = [kind for end, kind in CONTAINERS.items() if re.search(rf"(^|\.){end}$", name)]
    return SDXL["containers"].get(name) or "".join(found) or "ModuleList"


def make_tree(modules: dict[str, tuple[str, list[int]]]) -> nn.Module:
    """A module tree in which every name of `modules` is a layer of its kind and shape."""
    root = nn.Module()
    for name, (kind, shape) in modules.items():
        parent, parts = root, name.split(".")
        for depth, part in enumerate(parts[:-1], start=1):
            if part not in dict(parent.named_children()):
                of_class = type(container_class(".".join(parts[:depth])), (nn.Module,), {})
                parent.add_module(part, of_class())
            parent = getattr(parent, part)
        outputs, inputs, *kernel = shape
        leaf = (
            nn.Linear(inputs, outputs) if kind == "Linear" else nn.Conv2d(inputs, outputs, kernel)
        )
        parent.add_module(parts[-1], leaf)
    return root


def trained_modules(preset: str) -> dict[str, list[str] | int]:
    """Build LyCORIS' network under the preset: its module names, and its parameters per rank."""
    # The state of one preset must not leak into the next, as it does not between trainings.
    for name in [name for name in sys.modules if name.split(".")[0] == "lycoris"]:
        del sys.modules[name]
    from lycoris.kohya import create_network

    with torch.device("meta"):
        unet, te1, te2 = (make_tree(SDXL[part]) for part in ("unet", "te1", "te2"))
        network = create_network(1.0, RANK, RANK, None, [te1, te2], unet, preset=preset)

    def count(loras: list[nn.Module]) -> int:
        return sum(p.numel() for lora in loras for p in lora.parameters())

    return {
        "unet": [lora.lora_name for lora in network.unet_loras],
        "text_encoders": [lora.lora_name for lora in network.text_encoder_loras],
        "unet_parameters": count(network.unet_loras),
        "text_encoder_parameters": count(network.text_encoder_loras),
    }


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):  # LyCORIS' own log
        trained = {preset: trained_modules(preset) for preset in sys.argv[1:]}
    print(json.dumps(trained))
