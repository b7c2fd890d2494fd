"""What SDXL is: every layer with its class and weight shape, every name it goes by, and traits.

Layers are built from SDXL's architecture (arXiv 2307.01952); a test checks them against diffusers'
and transformers' own models.

A layer of the U-Net has two names, sgm's (input_blocks.4.1.proj_in), which checkpoints and kohya
use, and diffusers' (down_blocks.1.attentions.0.proj_in). A layer of a text encoder has its name in
transformers. kohya's name of a module is lora_unet_, lora_te1_ or lora_te2_ and the layer's name
with underscores.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from blora.text import BloraError

# ---- Layers --------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """A module of SDXL: a layer with a weight, or a container such as "ResnetBlock2D" without.

    A tuple, as every cut makes 2,300: that takes 1.5 ms, and 2.3 as a frozen dataclass.
    """

    network: str  # "unet", "te1" or "te2", as in kohya's module names
    name: str  # with dots; the U-Net's are sgm's
    kind: str  # the class that sd-scripts gives it
    shape: tuple[int, ...] = ()  # of the weight: [out, in], [out, in, height, width], or [width]
    diffusers: str = ""  # the U-Net's other name

    @property
    def module(self) -> str:
        """kohya's name of a LoRA module for this layer."""
        return f"lora_{self.network}_{self.name.replace('.', '_')}"

    @property
    def is_leaf(self) -> bool:
        """Whether LyCORIS' presets reach it: a matrix or a convolution."""
        return self.kind in ("Linear", "Conv2d")

    @property
    def block(self) -> str:
        """The block it lies in: "output_blocks.0.1", "middle_block.1", "time_embed", "te2"."""
        if self.network != "unet":
            return self.network
        first, *rest = self.name.split(".")
        depth = {"input_blocks": 2, "output_blocks": 2, "middle_block": 1}.get(first, 0)
        return ".".join([first, *rest[:depth]])

    def parameters(self, rank: int) -> int:
        """Numbers of a LoRA of this rank: lora_down with the kernel, and lora_up."""
        outputs, inputs, *kernel = self.shape
        return rank * (inputs * math.prod(kernel) + outputs)


def resnet(name: str, diffusers: str, inputs: int, outputs: int) -> Iterator[Layer]:
    """A residual block with its time embedding of 1280."""
    yield Layer("unet", name, "ResnetBlock2D", (), diffusers)
    parts = [
        ("in_layers.0", "norm1", "GroupNorm", (inputs,)),
        ("in_layers.2", "conv1", "Conv2d", (outputs, inputs, 3, 3)),
        ("emb_layers.1", "time_emb_proj", "Linear", (outputs, 1280)),
        ("out_layers.0", "norm2", "GroupNorm", (outputs,)),
        ("out_layers.3", "conv2", "Conv2d", (outputs, outputs, 3, 3)),
    ]
    if inputs != outputs:
        parts.append(("skip_connection", "conv_shortcut", "Conv2d", (outputs, inputs, 1, 1)))
    for part, other, kind, shape in parts:
        yield Layer("unet", f"{name}.{part}", kind, shape, f"{diffusers}.{other}")


def transformer_block(width: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name, class, shape) of what is in one, over a text of 2048 wide tokens."""
    yield "", "BasicTransformerBlock", ()
    for number, source in ((1, width), (2, 2048)):
        yield f".norm{number}", "LayerNorm", (width,)
        yield f".attn{number}", "CrossAttention", ()
        yield f".attn{number}.to_q", "Linear", (width, width)
        yield f".attn{number}.to_k", "Linear", (width, source)
        yield f".attn{number}.to_v", "Linear", (width, source)
        yield f".attn{number}.to_out.0", "Linear", (width, width)
    yield ".norm3", "LayerNorm", (width,)
    yield ".ff", "FeedForward", ()
    yield ".ff.net.0", "GEGLU", ()
    yield ".ff.net.0.proj", "Linear", (8 * width, width)
    yield ".ff.net.2", "Linear", (width, 4 * width)


def transformer(name: str, diffusers: str, width: int, depth: int) -> Iterator[Layer]:
    """Transformer blocks between two projections; both namings agree on what is inside."""
    parts = [("", "Transformer2DModel", ()), (".norm", "GroupNorm", (width,))]
    parts.append((".proj_in", "Linear", (width, width)))
    for index in range(depth):
        block = f".transformer_blocks.{index}"
        parts += [(block + part, kind, shape) for part, kind, shape in transformer_block(width)]
    parts.append((".proj_out", "Linear", (width, width)))
    for part, kind, shape in parts:
        yield Layer("unet", name + part, kind, shape, diffusers + part)


LEVELS = ((320, 0), (640, 2), (1280, 10))  # of the U-Net: width, and depth of its transformers


def unet_down() -> Iterator[Layer]:
    """Three levels of two blocks, with a downsampler between them."""
    number, inputs = 1, 320
    for level, (width, depth) in enumerate(LEVELS):
        for index in range(2):
            sgm, diffusers = f"input_blocks.{number}", f"down_blocks.{level}"
            yield from resnet(f"{sgm}.0", f"{diffusers}.resnets.{index}", inputs, width)
            if depth:
                yield from transformer(f"{sgm}.1", f"{diffusers}.attentions.{index}", width, depth)
            number, inputs = number + 1, width
        if level < 2:
            name, other = f"input_blocks.{number}.0", f"down_blocks.{level}.downsamplers.0"
            yield Layer("unet", name, "Downsample2D", (), other)
            shape = (width, width, 3, 3)
            yield Layer("unet", f"{name}.op", "Conv2d", shape, f"{other}.conv")
            number += 1


def unet_up() -> Iterator[Layer]:
    """Three levels of three blocks, each with a skip connection from a block on the way down."""
    skips = (320, 320, 320, 320, 640, 640, 640, 1280, 1280)  # the last one is taken first
    inputs = 1280
    for number, skip in enumerate(reversed(skips)):
        level, index = divmod(number, 3)
        width, depth = LEVELS[2 - level]
        sgm, diffusers = f"output_blocks.{number}", f"up_blocks.{level}"
        yield from resnet(f"{sgm}.0", f"{diffusers}.resnets.{index}", inputs + skip, width)
        if depth:
            yield from transformer(f"{sgm}.1", f"{diffusers}.attentions.{index}", width, depth)
        if index == 2 and level < 2:
            name, other = f"{sgm}.2", f"{diffusers}.upsamplers.0"
            yield Layer("unet", name, "Upsample2D", (), other)
            shape = (width, width, 3, 3)
            yield Layer("unet", f"{name}.conv", "Conv2d", shape, f"{other}.conv")
        inputs = width


def unet_layers() -> Iterator[Layer]:
    """The whole U-Net, in the order of its forward pass."""
    for name, other, shape in (
        ("time_embed.0", "time_embedding.linear_1", (1280, 320)),
        ("time_embed.2", "time_embedding.linear_2", (1280, 1280)),
        ("label_emb.0.0", "add_embedding.linear_1", (1280, 2816)),
        ("label_emb.0.2", "add_embedding.linear_2", (1280, 1280)),
    ):
        yield Layer("unet", name, "Linear", shape, other)
    yield Layer("unet", "input_blocks.0.0", "Conv2d", (320, 4, 3, 3), "conv_in")
    yield from unet_down()
    yield from resnet("middle_block.0", "mid_block.resnets.0", 1280, 1280)
    yield from transformer("middle_block.1", "mid_block.attentions.0", 1280, 10)
    yield from resnet("middle_block.2", "mid_block.resnets.1", 1280, 1280)
    yield from unet_up()
    yield Layer("unet", "out.0", "GroupNorm", (320,), "conv_norm_out")
    yield Layer("unet", "out.2", "Conv2d", (4, 320, 3, 3), "conv_out")


def text_encoder_layers(network: str, depth: int, width: int) -> Iterator[Layer]:
    """A CLIP text encoder: 12 layers of 768 in the first of SDXL, 32 of 1280 in the second."""
    start = "text_model.embeddings"
    yield Layer(network, f"{start}.token_embedding", "Embedding", (49408, width))
    yield Layer(network, f"{start}.position_embedding", "Embedding", (77, width))
    for index in range(depth):
        layer = f"text_model.encoder.layers.{index}"
        yield Layer(network, layer, "CLIPEncoderLayer")
        yield Layer(network, f"{layer}.self_attn", "CLIPAttention")
        for projection in ("k", "v", "q", "out"):
            name = f"{layer}.self_attn.{projection}_proj"
            yield Layer(network, name, "Linear", (width, width))
        yield Layer(network, f"{layer}.layer_norm1", "LayerNorm", (width,))
        yield Layer(network, f"{layer}.mlp", "CLIPMLP")
        yield Layer(network, f"{layer}.mlp.fc1", "Linear", (4 * width, width))
        yield Layer(network, f"{layer}.mlp.fc2", "Linear", (width, 4 * width))
        yield Layer(network, f"{layer}.layer_norm2", "LayerNorm", (width,))
    yield Layer(network, "text_model.final_layer_norm", "LayerNorm", (width,))


@cache
def sdxl_layers() -> dict[str, dict[str, Layer]]:
    """All three networks, containers included, as {network: {name with dots: layer}}."""
    projection = Layer("te2", "text_projection", "Linear", (1280, 1280))
    networks = {
        "te1": [*text_encoder_layers("te1", 12, 768)],
        "te2": [*text_encoder_layers("te2", 32, 1280), projection],
        "unet": [*unet_layers()],
    }
    return {
        network: {layer.name: layer for layer in layers} for network, layers in networks.items()
    }


# ---- Names ---------------------------------------------------------------------------------------


def spellings(layer: Layer) -> Iterator[str]:
    """Every name of a layer, with underscores."""
    for name in filter(None, (layer.name, layer.diffusers)):
        plain = name.replace(".", "_")
        yield plain
        # diffusers' old attention processors have no list of outputs, and name a text encoder's
        # projections as the U-Net's; transformers 5 has no text_model around the encoder.
        if plain.endswith("_to_out_0"):
            yield plain.removesuffix("_0")
        if layer.network != "unet":
            yield from other_text_names(plain)


def other_text_names(name: str) -> Iterator[str]:
    """Further names of a text encoder's layer, with underscores."""
    stem, separator, projection = name.rpartition("_self_attn_")
    if separator:
        yield f"{stem}_self_attn_to_{projection.removesuffix('_proj')}"
    if name.startswith("text_model_"):
        yield name.removeprefix("text_model_")


@cache
def layers_by_spelling() -> dict[str, dict[str, Layer]]:
    """The layers that have a weight, as {network: {any name with underscores: layer}}."""
    return {
        network: {name: layer for layer in layers.values() if layer.shape
                  for name in spellings(layer)}
        for network, layers in sdxl_layers().items()
    }  # fmt: skip


@cache
def layers_by_module() -> dict[str, Layer]:
    """The layers that have a weight, by kohya's module name."""
    return {
        layer.module: layer
        for layers in sdxl_layers().values()
        for layer in layers.values()
        if layer.shape
    }


@cache
def blocks_by_spelling() -> set[str]:
    """The parts of a block of the U-Net by both names, with underscores: "input_blocks_4_1"."""
    layers = sdxl_layers()["unet"].values()
    parts = [layer for layer in layers if layer.name == layer.block]
    return {n.replace(".", "_") for layer in parts for n in (layer.name, layer.diffusers)}


def block_of(module: str) -> str:
    """The block of a module, by kohya's name of it: "output_blocks.0.1", "te2"."""
    return layers_by_module()[module].block


# open_clip's names of the second text encoder's layers, in a checkpoint.
OPEN_CLIP = {
    "self_attn.q_proj": "attn.in_proj_", "self_attn.k_proj": "attn.in_proj_",
    "self_attn.v_proj": "attn.in_proj_", "self_attn.out_proj": "attn.out_proj.",
    "mlp.fc1": "mlp.c_fc.", "mlp.fc2": "mlp.c_proj.",
}  # fmt: skip


def checkpoint_weight(layer: Layer) -> tuple[str, int | None] | None:
    """(key, third) of a layer's weight in an SDXL checkpoint; None where it has no such weight.

    The second text encoder has the weights of q, k and v stacked along the rows of one tensor:
    `third` is 0, 1 or 2 for those, and None where the tensor is the whole weight.
    """
    if layer.network == "unet":
        return f"model.diffusion_model.{layer.name}.weight", None
    if layer.network == "te1":
        return f"conditioner.embedders.0.transformer.{layer.name}.weight", None
    inside = layer.name.removeprefix("text_model.encoder.layers.")
    number, _, name = inside.partition(".")
    if name not in OPEN_CLIP:
        return None
    key = f"conditioner.embedders.1.model.transformer.resblocks.{number}.{OPEN_CLIP[name]}weight"
    third = "qkv".index(name[len("self_attn.")]) if "in_proj" in key else None
    return key, third


# ---- Traits --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trait:
    """A set of modules, selected by parts of their names: an entry of blora_traits.json."""

    name: str
    whitelist: tuple[str, ...]
    blacklist: tuple[str, ...]

    def keeps(self, module: str) -> bool:
        """Whether `module` (a kohya name, without tensor suffix) belongs to the trait."""
        return any(part in module for part in self.whitelist) and not any(
            part in module for part in self.blacklist
        )


def parse_trait(name: str, entry: object, source: Path) -> Trait:
    """The trait `name` from its JSON object; a missing blacklist excludes nothing."""
    lists = entry if isinstance(entry, dict) else {}
    parts = [lists.get("whitelist"), lists.get("blacklist", [])]
    for part in parts:
        if not isinstance(part, list) or not all(isinstance(item, str) for item in part):
            raise BloraError(
                f'trait "{name}" in {source} is not of the form '
                '{"whitelist": ["..."], "blacklist": ["..."]}: correct it there'
            )
    return Trait(name, *map(tuple, parts))


def load_traits(path: Path) -> dict[str, Trait]:
    """All traits of a traits file, by name; BloraError where it cannot be read as such.

    Notepad's byte order mark is accepted.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise BloraError(f"no traits file at {path}: copy blora_traits.json there") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BloraError(f"cannot read the traits file {path} ({error})") from error
    except (ValueError, RecursionError) as error:
        raise BloraError(f"{path} is not valid JSON ({error}): correct it there") from error
    if not isinstance(entries, dict):
        raise BloraError(f"{path} holds no traits: its JSON must be an object of traits by name")
    return {name: parse_trait(name, entry, path) for name, entry in entries.items()}
