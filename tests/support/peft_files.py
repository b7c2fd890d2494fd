"""Layers of SDXL that PEFT trained, and what its own merge makes of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from lora_algebra import Module, weight_change
from lora_files import weight_shape
from lycoris_modules import make_tree
from torch import Tensor, nn

# A matrix, a convolution of 1 x 1 and one of 3 x 3, as diffusers and as kohya call them.
LAYERS = {
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    ),
    "down_blocks.1.resnets.0.conv_shortcut": "lora_unet_input_blocks_4_0_skip_connection",
    "conv_in": "lora_unet_input_blocks_0_0",
}
Setting = tuple[str, dict[str, object]]  # PEFT's class of settings, and its options


class Merge(NamedTuple):
    """A layer's weight before and after PEFT's merge, what the factors are multiplied with, and
    what the merge adds to the bias.
    """

    base: Tensor
    merged: Tensor
    scaling: float
    bias_change: Tensor | None

    @property
    def change(self) -> Tensor:
        return self.merged - self.base


def tree_of(layers: dict[str, str]) -> nn.Module:
    """A model of these layers, of the widths that they have in SDXL; always the same numbers."""
    torch.manual_seed(0)
    shapes = {layer: weight_shape(name) for layer, name in layers.items()}
    return make_tree({n: ("Conv2d" if len(s) > 2 else "Linear", s) for n, s in shapes.items()})


def adapted(
    setting: Setting, layers: dict[str, str], adapter: str = "default", trained: bool = False
) -> nn.Module:
    """PEFT's model of these layers, after a training moved its magnitudes, or all that it trains.

    Without the latter it should start from factors that change something.
    """
    import peft  # here, as it takes seconds

    name, options = setting
    config = getattr(peft, name)(**({"target_modules": list(layers)} | options))
    model = peft.get_peft_model(tree_of(layers), config, adapter_name=adapter)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "magnitude" in key:
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
            elif trained and parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def merges(model: nn.Module, layers: dict[str, str]) -> dict[str, Merge]:
    """PEFT's own merge in float64, by kohya's name of the layer."""
    found = {}
    for layer, name in layers.items():
        module = model.get_submodule(layer).double()
        own = module.base_layer
        before = {key: tensor.clone() for key, tensor in own.state_dict().items()}
        module.merge()
        [scaling] = module.scaling.values()
        moved = None if own.bias is None else own.bias.detach() - before["bias"]
        found[name] = Merge(before["weight"], own.weight.detach(), scaling, moved)
    return found


def assert_near(found: Tensor, wanted: Tensor, unit: float = 1e-5) -> None:
    """Equal within `unit` of the whole."""
    assert wanted.norm() > 0
    assert (found.reshape(wanted.shape) - wanted).norm() < unit * wanted.norm()


def assert_merged(modules: dict[str, Module], wanted: dict[str, Merge], strength: float) -> None:
    """The modules change each layer by the strength times what PEFT's merge does."""
    assert set(modules) == set(wanted)
    for name, merge in wanted.items():
        assert_near(weight_change(modules[name]), strength * merge.change)
