"""Tiny real LoRA files with kohya's SDXL names, written by safetensors itself."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

CONTENT = "lora_unet_output_blocks_0_1_transformer_blocks_{}_attn{}_to_{}"
STYLE = "lora_unet_output_blocks_1_1_transformer_blocks_{}_attn{}_to_{}"
LAYOUT = "lora_unet_input_blocks_8_1_transformer_blocks_{}_attn{}_to_{}"
TE2 = "lora_te2_text_model_encoder_layers_{}_self_attn_{}_proj"
IN, OUT = 6, 5

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


def lora_module(
    name: str, rank: int = 2, alpha: float | None = 1.0, dtype: torch.dtype = torch.float16
) -> dict[str, torch.Tensor]:
    """The tensors of one linear LoRA module; the same name gives the same numbers."""
    noise = torch.Generator().manual_seed(sum(name.encode()) * 31 + rank)
    tensors = {
        f"{name}.lora_down.weight": torch.randn(rank, IN, generator=noise).to(dtype),
        f"{name}.lora_up.weight": torch.randn(OUT, rank, generator=noise).to(dtype),
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
    """Save a LoRA file and hand its path back."""
    save_file(tensors, path, metadata)
    return path


def change(path: Path, module: str) -> torch.Tensor:
    """The weight change of a LoRA module, in float64: alpha / rank * lora_up @ lora_down."""
    tensors = {key: value.double() for key, value in load_file(path).items()}
    up, down = tensors[f"{module}.lora_up.weight"], tensors[f"{module}.lora_down.weight"]
    rank = down.shape[0]
    alpha = tensors.get(f"{module}.alpha", torch.tensor(float(rank)))
    return alpha / rank * torch.tensordot(up.flatten(1), down, dims=1)
