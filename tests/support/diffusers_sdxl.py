"""diffusers' own U-Net in the shape of SDXL, without the gigabytes of its weights."""

from __future__ import annotations

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection


def sdxl_unet_without_weights(depths: tuple[int, int, int] = (1, 2, 10)) -> UNet2DConditionModel:
    """The U-Net on the meta device: names, classes and shapes; the depths are SDXL's own."""
    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=2,
            transformer_layers_per_block=depths,
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )


def sdxl_pipeline(depths: tuple[int, int, int]) -> StableDiffusionXLPipeline:
    """SDXL's pipeline with few layers, each where SDXL has it and as wide.

    Each weight of the U-Net is one zero seen in the weight's shape.
    """
    unet = sdxl_unet_without_weights(depths)
    for name, weight in list(unet.named_parameters()):
        layer, _, own = name.rpartition(".")
        zeros = nn.Parameter(torch.zeros(()).expand(weight.shape))
        setattr(unet.get_submodule(layer), own, zeros)
    configs = [
        CLIPTextConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=1,
            num_attention_heads=width // 64,
            projection_dim=width,
            vocab_size=99,
            bos_token_id=0,
            eos_token_id=1,
        )
        for width in (768, 1280)
    ]
    return StableDiffusionXLPipeline(
        vae=None,
        text_encoder=CLIPTextModel(configs[0]),
        text_encoder_2=CLIPTextModelWithProjection(configs[1]),
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=EulerDiscreteScheduler(),
    )
