"""diffusers' own U-Net in the shape of SDXL, whole or tiny."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel


def sdxl_unet(
    widths: tuple[int, int, int] = (320, 640, 1280),
    heads: tuple[int, int, int] = (5, 10, 20),
    context: int = 2048,
    time_ids: int = 256,
    embedding: int = 2816,
    sample_size: int = 128,
) -> UNet2DConditionModel:
    """A U-Net with SDXL's blocks and depths; its defaults are SDXL's own widths."""
    return UNet2DConditionModel(
        sample_size=sample_size,
        block_out_channels=widths,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=heads,
        cross_attention_dim=context,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=time_ids,
        projection_class_embeddings_input_dim=embedding,
    )


def sdxl_unet_without_weights() -> UNet2DConditionModel:
    """The whole U-Net on the meta device: names, classes and shapes."""
    with torch.device("meta"):
        return sdxl_unet()
