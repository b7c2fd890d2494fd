"""The modules that each preset is to train, in kohya's names: written out, read from no preset."""

from __future__ import annotations

import math

from blora.sdxl import Layer

CONTENT, STYLE, LAYOUT = "output_blocks_0_1", "output_blocks_1_1", "input_blocks_8_1"
EXPECTED = {
    # preset: U-Net blocks, text-encoder layers (all: attention alone, else every Linear)
    "blora_content_style": ([CONTENT, STYLE], "all"),
    "blora_content": ([CONTENT], "all"),
    "blora_style": ([STYLE], "all"),
    "blora_content_layout_style": ([CONTENT, LAYOUT, STYLE], "all"),
    "blora_layout_style": ([LAYOUT, STYLE], "all"),
    "blora_content_style_clip": ([CONTENT, STYLE], [0, 1]),
    "bdora_content_style_clip": ([CONTENT, STYLE], [0, 1]),
}


def block_modules(block: str) -> set[str]:
    """The 80 attention projections of one block with ten transformer blocks."""
    return {
        f"lora_unet_{block}_transformer_blocks_{depth}_attn{attention}_to_{projection}"
        for depth in range(10)
        for attention in (1, 2)
        for projection in ("q", "k", "v", "out_0")
    }


def text_encoder_modules(layers: str | list[int]) -> set[str]:
    """The attention of every layer of both text encoders, or all six Linear of some layers."""
    attention = [f"self_attn_{p}_proj" for p in ("q", "k", "v", "out")]
    return {
        f"lora_{encoder}_text_model_encoder_layers_{layer}_{linear}"
        for encoder, depth in (("te1", 12), ("te2", 32))
        for layer in (range(depth) if layers == "all" else layers)
        for linear in (attention if layers == "all" else [*attention, "mlp_fc1", "mlp_fc2"])
    }


def lora_parameters(layer: Layer, rank: int) -> int:
    """Numbers of a LoRA of this rank: lora_down with the kernel, and lora_up."""
    outputs, inputs, *kernel = layer.shape
    return rank * (inputs * math.prod(kernel) + outputs)
