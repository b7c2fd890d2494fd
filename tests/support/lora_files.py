"""Small real LoRA files with kohya's names and the widths of SDXL's layers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

CONTENT = "lora_unet_output_blocks_0_1_transformer_blocks_{}_attn{}_to_{}"
STYLE = "lora_unet_output_blocks_1_1_transformer_blocks_{}_attn{}_to_{}"
LAYOUT = "lora_unet_input_blocks_8_1_transformer_blocks_{}_attn{}_to_{}"
TE2 = "lora_te2_text_model_encoder_layers_{}_self_attn_{}_proj"

SDXL = json.loads(Path(__file__).parents[1].joinpath("data/sdxl_modules.json").read_text())
SHAPES = {
    f"lora_{part}_{layer.replace('.', '_')}": shape
    for part in ("unet", "te1", "te2")
    for layer, (_, shape) in SDXL[part].items()
}
# The norms of a transformer, which the data leaves out: they are as wide as its proj_in.
TRANSFORMER_NORM = re.compile(r"(lora_unet_.+_1)_(norm|transformer_blocks_\d_norm[123])")

METADATA = {
    "ss_output_name": "parent",
    "ss_base_model_version": "sdxl_base_v1-0",
    "ss_network_dim": "2",
    "ss_tag_frequency": '{"images": {"sks": 3}}',
    "modelspec.title": "parent",
    "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
    "sshs_model_hash": "0x0123",
    "sshs_legacy_hash": "89ab",
    "modelspec.hash_sha256": "0xcdef",
}


def weight_shape(name: str) -> list[int]:
    """The shape of the weight that a module changes: [out, in], [out, in, kh, kw], a norm's [out].

    `name` is kohya's sgm name, such as lora_unet_output_blocks_0_1_proj_in; KeyError where SDXL
    has no such layer.
    """
    if norm := TRANSFORMER_NORM.fullmatch(name):
        return SHAPES[f"{norm[1]}_proj_in"][:1]
    return SHAPES[name]


def lora_module(
    name: str,
    rank: int = 2,
    alpha: float | None = 1.0,
    dtype: torch.dtype = torch.float16,
    layer: str | None = None,
) -> dict[str, torch.Tensor]:
    """The tensors of one LoRA module of the layer's shape; the same name gives the same numbers.

    `layer` is the layer's sgm name, where `name` is of another naming.
    """
    outputs, inputs, *kernel = weight_shape(layer or name)
    noise = torch.Generator().manual_seed(sum(name.encode()) * 31 + rank)
    down = torch.randn(rank, inputs, *kernel, generator=noise)
    up = torch.randn(outputs, rank, *(1 for _ in kernel), generator=noise)
    tensors = {
        f"{name}.lora_down.weight": down.to(dtype),
        f"{name}.lora_up.weight": up.to(dtype),
    }
    if alpha is not None:
        tensors[f"{name}.alpha"] = torch.tensor(alpha, dtype=dtype)
    return tensors


def blora_modules(*templates: str, **options) -> dict[str, torch.Tensor]:
    """All eight attention modules of transformer block 0 in each of the blocks."""
    tensors: dict[str, torch.Tensor] = {}
    for template in templates:
        for attention in (1, 2):
            for projection in ("q", "k", "v", "out_0"):
                tensors |= lora_module(template.format(0, attention, projection), **options)
    return tensors


def write(path: Path, tensors: dict[str, torch.Tensor], metadata=METADATA) -> Path:
    save_file(tensors, path, metadata)
    return path


def change(path: Path, module: str) -> torch.Tensor:
    """The weight change of a LoRA module, in float64: alpha / rank * lora_up @ lora_down."""
    with safe_open(path, "pt") as file:
        keys = set(file.keys())
        up = file.get_tensor(f"{module}.lora_up.weight").double()
        down = file.get_tensor(f"{module}.lora_down.weight").double()
        rank = down.shape[0]
        alpha = file.get_tensor(f"{module}.alpha").double() if f"{module}.alpha" in keys else rank
    return alpha / rank * torch.tensordot(up.flatten(1), down, dims=1)
