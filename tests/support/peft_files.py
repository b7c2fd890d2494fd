"""Adapters that PEFT itself saves of layers of SDXL, and the weights that it merges them into."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from lora_files import weight_shape
from lycoris_modules import make_tree
from torch import Tensor

# A matrix, a convolution of 1 x 1 and one of 3 x 3, as diffusers and as kohya call them.
LAYERS = {
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    ),
    "down_blocks.1.resnets.0.conv_shortcut": "lora_unet_input_blocks_4_0_skip_connection",
    "conv_in": "lora_unet_input_blocks_0_0",
}
LORA = {"r": 4, "lora_alpha": 6, "init_lora_weights": False}
OTHER = {"r": 4, "alpha": 6, "init_weights": False}
PATTERNS = {"rank_pattern": {"to_q": 3, "conv_in": 5}, "alpha_pattern": {"conv_shortcut": 1.5}}
# By PEFT's class of settings; what its product of factors is multiplied with differs from 1.
SETTINGS = {
    "LoRA": ("LoraConfig", LORA),
    "rank-stabilized LoRA": ("LoraConfig", LORA | {"use_rslora": True}),
    "LoRA, ranks and alphas by pattern": ("LoraConfig", LORA | PATTERNS),
    "rank-stabilized LoRA by pattern": ("LoraConfig", LORA | PATTERNS | {"use_rslora": True}),
    "LoHa": ("LoHaConfig", OTHER),
    "LoHa, tucker": ("LoHaConfig", OTHER | {"use_effective_conv2d": True}),
    "LoHa, ranks and alphas by pattern": ("LoHaConfig", OTHER | PATTERNS),
    "LoKr, w2 factored": ("LoKrConfig", OTHER),
    "LoKr, tucker": ("LoKrConfig", OTHER | {"use_effective_conv2d": True}),
    "LoKr, both factored": ("LoKrConfig", OTHER | {"decompose_both": True}),
    "LoKr, ranks and alphas by pattern": ("LoKrConfig", OTHER | PATTERNS),
    # PEFT multiplies by alpha / r even where no factor has a rank.
    "LoKr, both whole": ("LoKrConfig", OTHER | {"r": 64}),
    "LoKr, both whole, by pattern": ("LoKrConfig", OTHER | PATTERNS | {"rank_pattern": {".*": 96}}),
}
DORA = {
    "DoRA": ("LoraConfig", LORA | {"use_dora": True}),
    "rank-stabilized DoRA": ("LoraConfig", LORA | {"use_dora": True, "use_rslora": True}),
}


@dataclass(frozen=True)
class Merge:
    """A layer's weight before and after PEFT's merge, and what the factors are multiplied with."""

    base: Tensor
    merged: Tensor
    scaling: float

    @property
    def change(self) -> Tensor:
        return self.merged - self.base


def adapted(setting: tuple[str, dict[str, object]], layers: dict[str, str] = LAYERS):
    """PEFT's model of these layers after a training moved every parameter; always the same."""
    import peft

    torch.manual_seed(0)
    shapes = {layer: weight_shape(name) for layer, name in layers.items()}
    kinds = {n: ("Conv2d" if len(s) > 2 else "Linear", s) for n, s in shapes.items()}
    name, options = setting
    config = getattr(peft, name)(target_modules=list(layers), **options)
    model = peft.get_peft_model(make_tree(kinds), config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "magnitude" in key:
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
    return model


def merges(model, layers: dict[str, str] = LAYERS) -> dict[str, Merge]:
    """PEFT's own merge in float64, by kohya's name of the layer."""
    model.double()
    found = {}
    for layer, name in layers.items():
        module = model.base_model.model.get_submodule(layer)
        base = module.base_layer.weight.detach().clone()
        module.merge()
        merged = module.base_layer.weight.detach()
        found[name] = Merge(base, merged, module.scaling["default"])
    return found


def saved(folder: Path, setting: tuple[str, dict[str, object]]) -> tuple[Path, dict[str, Merge]]:
    """adapter_model.safetensors beside its adapter_config.json, and what PEFT makes of it."""
    model = adapted(setting)
    model.save_pretrained(folder)
    return folder / "adapter_model.safetensors", merges(model)
