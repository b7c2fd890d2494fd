"""LyCORIS' network for sd-scripts, less the part of the backward pass that a B-LoRA never needs.

  --network_module=blora_network --network_args preset=lycoris_presets/blora_content_style.toml

Presets, arguments, files and metadata are those of lycoris.kohya, and so is every gradient, bit for
bit. sd-scripts lets the noisy latents require gradients, and with --gradient_checkpointing the text
conditioning too, so autograd goes back through the whole U-Net, although the first layer that a
B-LoRA trains lies in its second half. This network ends the backward pass there.

sdxl_blora_fast trains with it. It must lie where Python finds it: beside sd-scripts'
sdxl_train_network.py, or in a folder on PYTHONPATH, as in kohya_ss.
"""

from __future__ import annotations

from typing import Any

import lycoris.kohya
import torch
from lycoris.logging import logger
from torch import nn


class NetworkError(SystemExit):
    """What the user can fix: one sentence and exit code 1, because sd-scripts catches nothing."""


class BLoraNetwork(lycoris.kohya.LycorisNetworkKohya):
    """LyCORIS' network, which stops the backward pass before the first layer that it trains."""

    def prepare_grad_etc(self, text_encoder: Any, unet: nn.Module) -> None:
        """The last call before training, in sd-scripts after checkpointing was switched on."""
        super().prepare_grad_etc(text_encoder, unet)
        logger.info(stop_early(self, getattr(unet, "_orig_mod", unet)))  # torch.compile wraps it

    def save_weights(self, file: str, dtype: torch.dtype | None, metadata: dict[str, str]) -> None:
        """Programs tell from ss_network_module how to read the tensors, which are LyCORIS' own."""
        if metadata and "ss_network_module" in metadata:
            metadata["ss_network_module"] = lycoris.kohya.__name__
        super().save_weights(file, dtype, metadata)


def create_network(*args: Any, **kwargs: Any) -> BLoraNetwork:
    """lycoris.kohya's network with the stop; sd-scripts calls it with all of --network_args."""
    return with_stop(lycoris.kohya.create_network(*args, **kwargs))


def create_network_from_weights(*args: Any, **kwargs: Any) -> tuple[BLoraNetwork, dict[str, Any]]:
    """The same for --dim_from_weights and --base_weights, where LyCORIS reads the file alone."""
    network, weights = lycoris.kohya.create_network_from_weights(*args, **kwargs)
    return with_stop(network), weights


def with_stop(network: lycoris.kohya.LycorisNetworkKohya) -> BLoraNetwork:
    """The same network; refused where LyCORIS would drop DoRA without a word."""
    loras = [*network.unet_loras, *network.text_encoder_loras]
    if any(lora.bypass_mode and getattr(lora, "wd", False) for lora in loras):
        raise NetworkError(
            "error: with bypass_mode=True LyCORIS trains no DoRA, although dora_wd=True asks for "
            "it: remove one of the two from --network_args"
        )
    stopping: BLoraNetwork = network
    stopping.__class__ = BLoraNetwork
    return stopping


def layers_in_order(unet: Any) -> dict[str, nn.Module]:
    """The layers of sd-scripts' SDXL U-Net by name, in the order in which its forward runs them.

    Those before the blocks, time_embed and label_emb, are not among them. Raises AttributeError or
    TypeError for a U-Net that is built in another way.
    """
    names = {module: name for name, module in unet.named_modules()}
    blocks = (*unet.input_blocks, unet.middle_block, *unet.output_blocks, unet.out)
    return {names[layer]: layer for block in blocks for layer in block}


def stop_early(network: BLoraNetwork, unet: nn.Module) -> str:
    """End the backward pass of the U-Net where it may end, and say in one line where that is."""
    if network.text_encoder_loras:
        return (
            "no early stop: text encoders are trained, and their gradients pass through the whole "
            "U-Net"
        )
    try:
        layers = layers_in_order(unet)
    except (AttributeError, TypeError):
        return f"no early stop: {type(unet).__name__} is not built as sd-scripts' SDXL U-Net"
    targets = {lora.org_module[0] for lora in network.unet_loras}
    trained = [name for name, layer in layers.items() if targets & set(layer.modules())]
    if not targets <= {module for name in trained for module in layers[name].modules()}:
        return "no early stop: a layer is trained that lies outside the blocks of the U-Net"
    if not trained:
        return "no early stop: no layer of the U-Net is trained"
    first = list(layers).index(trained[0])
    if not first:
        return "no early stop: the first layer of the U-Net is trained"

    for layer in list(layers.values())[:first]:
        stop_checkpointing(layer)
    unet.register_forward_pre_hook(detach_inputs, with_kwargs=True)
    for layer in filter(checkpointing, (layers[name] for name in trained)):
        layer.register_forward_pre_hook(require_gradient)
    kept = sum(map(count_layers, list(layers.values())[first:]))
    total = count_layers(unet)
    return (
        f"early stop: the backward pass ends at {trained[0]} and spares {total - kept} of the "
        f"U-Net's {total} layers"
    )


def count_layers(module: nn.Module) -> int:
    """How many Linear and Conv2d it holds; SDXL's U-Net has 794."""
    return sum(isinstance(inner, (nn.Linear, nn.Conv2d)) for inner in module.modules())


def checkpointing(layer: nn.Module) -> list[Any]:
    """Those of its modules that are computed twice in place of being kept."""
    return [m for m in layer.modules() if getattr(m, "gradient_checkpointing", False)]


def stop_checkpointing(layer: nn.Module) -> None:
    """Where no gradient passes nothing is kept, and so there is nothing to compute twice."""
    for module in checkpointing(layer):
        module.gradient_checkpointing = False


def detach_inputs(
    _unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Take the latents and the conditioning without the graph that sd-scripts hangs on them."""
    return tuple(map(detached, args)), {name: detached(value) for name, value in kwargs.items()}


def detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


def require_gradient(_layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Let the hidden state require a gradient where nothing that came before made it.

    sd-scripts checkpoints with use_reentrant=True, which gives no gradient to a block none of whose
    inputs requires one.
    """
    hidden, *others = args
    if hidden.requires_grad or not torch.is_grad_enabled():
        return None
    return hidden.detach().requires_grad_(), *others
