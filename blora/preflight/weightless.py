"""SDXL without weights: torch's meta tensors, which have a shape and no numbers, and models that
compute nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# A name for a checkpoint that is not read, since it is no .safetensors file: SDXL's own tensors.
BLANK = "blank.safetensors"
TABLE = Path(__file__).with_name("sdxl_checkpoint.json")


# ---- Tensors ------------------------------------------------------------------------------------


def leaves(tree: dict[str, Any], start: str = "") -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a tree by the dots of its names."""
    for name, inside in tree.items():
        if isinstance(inside, list):
            yield start + name, tuple(inside)
        else:
            yield from leaves(inside, f"{start}{name}.")


def header_tensors(path: str | os.PathLike[str], *_args: Any, **_options: Any) -> dict[str, Any]:
    """A .safetensors file's tensors on the meta device, in place of safetensors' load_file.

    A single number, such as an alpha, is read: LyCORIS uses its value.
    """
    import torch
    from safetensors import safe_open

    if Path(path).name == BLANK:
        shapes = leaves(json.loads(TABLE.read_text(encoding="utf-8")))
        return {name: torch.empty(s, dtype=torch.half, device="meta") for name, s in shapes}
    tensors = {}
    # In on_meta(), a tensor that is read would become a meta tensor.
    with safe_open(path, framework="pt") as file, torch.device("cpu"):
        for name in file.keys():  # noqa: SIM118
            part = file.get_slice(name)
            shape = part.get_shape()
            if all(side == 1 for side in shape):
                tensors[name] = file.get_tensor(name)
            else:
                tensors[name] = torch.empty(shape, dtype=part[:0].dtype, device="meta")
    return tensors


def kept_apart(is_built: bool = True) -> contextlib.AbstractContextManager[Any]:
    """Meta tensors stay so when they are moved to another device.

    Once everything `is_built`, the others do not become meta tensors either, as when captions are
    moved to a text encoder's device.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    def is_device(value: Any) -> bool:
        return isinstance(value, (str, torch.device)) or type(value) is int

    def is_meta(value: Any) -> bool:
        return isinstance(value, (str, torch.device)) and torch.device(value).type == "meta"

    class KeptApart(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            kwargs = kwargs or {}
            # Of a number: an alpha, whose value LyCORIS reads.
            if func is torch.tensor:
                kwargs.setdefault("device", "cpu")
            if func in (torch.Tensor.cpu, torch.Tensor.cuda) and args[0].is_meta:
                return args[0]
            if func is torch.Tensor.to and (args[0].is_meta or is_built):
                elsewhere, here = is_device if args[0].is_meta else is_meta, args[0].device
                args = (args[0], *(here if elsewhere(value) else value for value in args[1:]))
                kwargs = {n: here if elsewhere(value) else value for n, value in kwargs.items()}
            return func(*args, **kwargs)

    return KeptApart()


def on_meta() -> contextlib.ExitStack:
    """New tensors are meta tensors, and stay so."""
    import torch

    stack = contextlib.ExitStack()
    stack.enter_context(torch.device("meta"))
    stack.enter_context(kept_apart(is_built=False))
    return stack


# ---- Models --------------------------------------------------------------------------------------


def silence_unet(unet: Any, answer: Callable[[], Any]) -> None:
    """Let a U-Net answer every batch x 9 or 4 x height x width with batch x 4 of 1 + `answer`()."""
    import torch

    channels = next(p.shape[1] for p in unet.parameters() if p.ndim == 4)  # its first convolution

    def forward(noisy: Any, *_args: Any, **_options: Any) -> Any:
        if noisy.shape[1] != channels:  # an inpainting model without masks
            raise ValueError(f"the U-Net takes {channels} channels and gets {noisy.shape[1]}")
        return torch.ones_like(noisy[:, :4], dtype=torch.float) + answer()

    unet.forward = forward


def silence_encoder(encoder: Any) -> None:
    """Let a text encoder of transformers answer with zeros, as CPU tensors or on the card."""
    import torch
    from transformers.modeling_outputs import BaseModelOutput

    def forward(input_ids: Any, **_options: Any) -> Any:
        size = (*input_ids.shape, encoder.config.hidden_size)
        hidden = torch.zeros(size, device=input_ids.device)
        return BaseModelOutput(hidden, (hidden,) * (encoder.config.num_hidden_layers + 1))

    def project(hidden: Any) -> Any:
        return hidden.new_zeros(*hidden.shape[:-1], encoder.config.projection_dim)

    encoder.forward = forward
    if hasattr(encoder, "text_projection"):  # the second one's
        encoder.text_projection.forward = project


def silence_vae(vae: Any) -> None:
    """Let a VAE encode batch x 3 x height x width as latents of zeros."""

    def encode(images: Any) -> Any:
        count, _, height, width = images.shape
        latents = images.new_zeros(count, 4, height // 8, width // 8)
        return SimpleNamespace(latent_dist=SimpleNamespace(sample=lambda: latents))

    vae.encode = encode


def blank_latents(group: Any, *_args: Any, **_options: Any) -> None:
    """What --cache_latents would leave of each picture of a DatasetGroup, in place of it."""
    import torch

    zero = torch.zeros((), device="cpu")
    for info in (info for each in group.datasets for info in each.image_data.values()):
        width, height = info.bucket_reso
        info.latents = info.latents_flipped = zero.expand(4, height // 8, width // 8)
        info.latents_original_size, info.latents_crop_ltrb = info.image_size, (0, 0, 0, 0)
