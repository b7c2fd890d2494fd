"""Toy SDXL models: the real shape and the real module names, a few channels wide.

The U-Net has SDXL's 794 Linear and Conv2d layers and the text encoders have their 72 and 193,
each under its real name and inside containers of the class that LyCORIS looks for, so that what a
preset selects here is what it selects in SDXL. Only the widths differ: 8, 16 and 32 channels where
SDXL has 320, 640 and 1280. The weights are random; they follow `torch.manual_seed`. Gradient
checkpointing has sd-scripts' rules: the same modules, only in training, use_reentrant=True.

With TOY_REAL_ATTENTION=1 in the environment the attention of the two B-LoRA blocks has SDXL's own
widths, so that what is trained is a LoRA for SDXL, which the slicer cuts. A step takes a second
then, in place of a hundredth. The loss starts well above 1, as a random network gives some answer
where it should name the noise, and falls towards 1.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterable
from copy import copy
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# U-Net: (channels, transformer blocks in each Transformer2DModel) of its three levels
LEVELS = ((8, 0), (16, 2), (32, 10))
LATENT_CHANNELS = 4
TIME_WIDTH = 32
SIZE_WIDTH = 8  # sinusoid of each of the six size-conditioning numbers
NORM_GROUPS = 4
HEAD_WIDTH = 8
# Text encoders: width and layers of each; the second one also has a text_projection.
ENCODER_SHAPES = ((8, 12), (16, 32))
CONTEXT_WIDTH = sum(width for width, _ in ENCODER_SHAPES)
POOLED_WIDTH = ENCODER_SHAPES[1][0]
# Of SDXL's output_blocks.0.1 and 1.1: attention, and the text that it looks at.
REAL_WIDTH, REAL_CONTEXT = 1280, 2048
TOKENS = 16  # CLIP has 77
VOCABULARY = 1024
START, END = VOCABULARY, VOCABULARY + 1


def make_unet() -> nn.Module:
    unet = with_full_signal(ToyUNet())
    if os.environ.get("TOY_REAL_ATTENTION") == "1":
        for _, transformer, *_ in unet.output_blocks[:2]:
            for block in transformer.transformer_blocks:
                block.attn1, block.attn2 = RealAttention(REAL_WIDTH), RealAttention(REAL_CONTEXT)
    return unet


def make_text_encoders() -> list[nn.Module]:
    first, second = (CLIPTextModel(width, layers) for width, layers in ENCODER_SHAPES)
    second.text_projection = nn.Linear(POOLED_WIDTH, POOLED_WIDTH, bias=False)
    return [with_full_signal(first), with_full_signal(second)]


def with_full_signal(model: nn.Module) -> nn.Module:
    """Weights that keep a signal's strength: torch's own weaken it at every layer, and hardly
    anything that an attention layer does would reach the end."""
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
    return model


def tokenize(caption: str) -> list[int]:
    """Each word hashed to a token; crc32, because Python's hash() differs from run to run."""
    words = caption.replace(",", " , ").split()[: TOKENS - 2]
    ids = [START, *(zlib.crc32(word.encode()) % VOCABULARY for word in words)]
    return ids + [END] * (TOKENS - len(ids))


def sinusoid(values: Tensor, width: int) -> Tensor:
    rates = torch.exp(-math.log(10000) * torch.arange(width // 2, device=values.device) * 2 / width)
    angles = values.float()[..., None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    q, k, v = (x.unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2) for x in (q, k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return mixed.transpose(1, 2).flatten(2)


class Checkpointed(nn.Module):
    """A module that can compute its activations a second time in place of keeping them."""

    gradient_checkpointing = False

    def forward(self, *inputs: Tensor) -> Tensor:
        if self.training and self.gradient_checkpointing:
            return checkpoint(self.forward_body, *inputs, use_reentrant=True)
        return self.forward_body(*inputs)


def norm_and_convolution(inputs: int, outputs: int, *between: nn.Module) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1)
    return nn.Sequential(nn.GroupNorm(NORM_GROUPS, inputs), nn.SiLU(), *between, convolution)


class ResnetBlock2D(Checkpointed):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.in_layers = norm_and_convolution(inputs, outputs)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(TIME_WIDTH, outputs))
        # SDXL has a dropout here; it keeps the convolution at index 3
        self.out_layers = norm_and_convolution(outputs, outputs, nn.Identity())
        same = inputs == outputs
        self.skip_connection = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1)

    def forward_body(self, x: Tensor, emb: Tensor) -> Tensor:
        hidden = self.in_layers(x) + self.emb_layers(emb)[..., None, None]
        return self.skip_connection(x) + self.out_layers(hidden)


class CrossAttention(nn.Module):
    def __init__(self, width: int, context_width: int):
        super().__init__()
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = (nn.Linear(context_width, width, bias=False) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.to_out[0](attend(self.to_q(x), self.to_k(context), self.to_v(context)))


@cache
def real_layer(inputs: int, bias: bool) -> nn.Linear:
    """A layer of SDXL's widths, one for all modules that have them: it is never trained."""
    return with_full_signal(nn.Linear(inputs, REAL_WIDTH, bias=bias))


class RealAttention(CrossAttention):
    """Attention of SDXL's widths, for what is a few channels wide: it is repeated before, and the
    first channels are kept after it."""

    def __init__(self, context_width: int):
        nn.Module.__init__(self)
        self.to_q = copy(real_layer(REAL_WIDTH, False))
        self.to_k, self.to_v = (copy(real_layer(context_width, False)) for _ in range(2))
        self.to_out = nn.ModuleList([copy(real_layer(REAL_WIDTH, True))])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        widths = self.to_q.in_features, self.to_k.in_features
        given = zip((x, context), widths, strict=True)
        wide = (t.repeat(1, 1, math.ceil(w / t.shape[-1]))[..., :w] for t, w in given)
        return super().forward(*wide)[..., : x.shape[-1]]


class GEGLU(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.proj = nn.Linear(inputs, 2 * outputs)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        geglu, last = GEGLU(width, 4 * width), nn.Linear(4 * width, width)
        self.net = nn.Sequential(geglu, nn.Identity(), last)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class BasicTransformerBlock(Checkpointed):
    def __init__(self, width: int):
        super().__init__()
        self.attn1 = CrossAttention(width, width)
        self.ff = FeedForward(width)
        self.attn2 = CrossAttention(width, CONTEXT_WIDTH)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward_body(self, x: Tensor, context: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed)
        x = x + self.attn2(self.norm2(x), context=context)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nn.Module):
    def __init__(self, width: int, depth: int):
        super().__init__()
        self.norm = nn.GroupNorm(NORM_GROUPS, width)
        self.proj_in = nn.Linear(width, width)
        self.transformer_blocks = nn.ModuleList(BasicTransformerBlock(width) for _ in range(depth))
        self.proj_out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        tokens = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + self.proj_out(tokens).transpose(1, 2).unflatten(2, x.shape[2:])


class Downsample2D(Checkpointed):
    def __init__(self, width: int):
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward_body(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample2D(Checkpointed):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward_body(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def residual_stage(inputs: int, width: int, depth: int) -> nn.ModuleList:
    block = ResnetBlock2D(inputs, width)
    return nn.ModuleList([block, Transformer2DModel(width, depth)] if depth else [block])


def embedding_mlp(inputs: int) -> nn.Sequential:
    first = nn.Linear(inputs, TIME_WIDTH)
    return nn.Sequential(first, nn.SiLU(), nn.Linear(TIME_WIDTH, TIME_WIDTH))


def run_block(block: Iterable[nn.Module], x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
    conditions = {ResnetBlock2D: (emb,), Transformer2DModel: (context,)}
    for layer in block:
        x = layer(x, *conditions.get(type(layer), ()))
    return x


class ToyUNet(nn.Module):
    def __init__(self):
        super().__init__()
        width = LEVELS[0][0]
        self.time_embed = embedding_mlp(width)
        self.label_emb = nn.Sequential(embedding_mlp(POOLED_WIDTH + 6 * SIZE_WIDTH))
        first = nn.Sequential(nn.Conv2d(LATENT_CHANNELS, width, 3, padding=1))
        self.input_blocks, skips = nn.ModuleList([first]), [width]
        for level, (wide, depth) in enumerate(LEVELS):
            if level:
                self.input_blocks.append(nn.Sequential(Downsample2D(width)))
                skips.append(width)
            for _ in range(2):
                self.input_blocks.append(residual_stage(width, wide, depth))
                width = wide
                skips.append(width)
        self.middle_block = residual_stage(width, width, LEVELS[-1][1])
        self.middle_block.append(ResnetBlock2D(width, width))
        self.output_blocks = nn.ModuleList()
        for wide, depth in reversed(LEVELS):
            for _ in range(3):
                self.output_blocks.append(residual_stage(width + skips.pop(), wide, depth))
                width = wide
            if skips:
                self.output_blocks[-1].append(Upsample2D(width))
        self.out = norm_and_convolution(width, LATENT_CHANNELS)

    def enable_gradient_checkpointing(self) -> None:
        for module in self.modules():
            if isinstance(module, Checkpointed):
                module.gradient_checkpointing = True

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, pooled: Tensor, sizes: Tensor):
        """The noise in the latents x. sizes: [batch, 6], as SDXL's size conditioning."""
        label = torch.cat([pooled, sinusoid(sizes, SIZE_WIDTH).flatten(1)], dim=1)
        emb = self.time_embed(sinusoid(timesteps, LEVELS[0][0])) + self.label_emb(label)
        skips = []
        for block in self.input_blocks:
            x = run_block(block, x, emb, context)
            skips.append(x)
        x = run_block(self.middle_block, x, emb, context)
        for block in self.output_blocks:
            x = run_block(block, torch.cat([x, skips.pop()], dim=1), emb, context)
        return run_block(self.out, x, emb, context)


class CLIPAttention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            self.add_module(name, nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), causal=True))


class CLIPMLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class CLIPEncoderLayer(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.self_attn, self.mlp = CLIPAttention(width), CLIPMLP(width)
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPTextModel(nn.Module):
    def __init__(self, width: int, layers: int):
        super().__init__()
        tokens, places = nn.Embedding(VOCABULARY + 2, width), nn.Embedding(TOKENS, width)
        embeddings = {"token_embedding": tokens, "position_embedding": places}
        stack = nn.ModuleList(CLIPEncoderLayer(width) for _ in range(layers))
        text = {"embeddings": nn.ModuleDict(embeddings)}
        text |= {"encoder": nn.ModuleDict({"layers": stack})}
        self.text_model = nn.ModuleDict(text | {"final_layer_norm": nn.LayerNorm(width)})
        self.text_projection = nn.Identity()

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The last state but one, which is the U-Net's context in SDXL, and the pooled text."""
        embeddings, encoder, norm = self.text_model.values()
        x = embeddings.token_embedding(tokens) + embeddings.position_embedding.weight
        for layer in encoder.layers[:-1]:
            x = layer(x)
        last = encoder.layers[-1](x)
        first_end = tokens.eq(END).int().argmax(dim=1)
        pooled = norm(last[torch.arange(len(last), device=last.device), first_end])
        return x, self.text_projection(pooled)
