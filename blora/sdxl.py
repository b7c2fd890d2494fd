"""What SDXL is: every layer with its weight's shape, every name it goes by, and traits.

Layers are built from SDXL's architecture (arXiv 2307.01952); a test checks them against diffusers'
and transformers' own models.

A layer of the U-Net has two names, sgm's (input_blocks.4.1.proj_in), which checkpoints and kohya
use, and diffusers' (down_blocks.1.attentions.0.proj_in). A layer of a text encoder has its name in
transformers. kohya's name of a module is lora_unet_, lora_te1_ or lora_te2_ and the layer's name
with underscores.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from blora.text import BloraError, shortened

# ---- Layers --------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """A layer of SDXL with a weight: a matrix, a convolution, a norm or an embedding.

    A tuple, as every cut makes 1,900: a frozen dataclass takes half as long again.
    """

    network: str  # "unet", "te1" or "te2", as in kohya's module names
    name: str  # with dots; the U-Net's are sgm's
    shape: tuple[int, ...]  # of the weight: [out, in], [out, in, height, width], or [width]
    diffusers: str = ""  # the U-Net's other name

    @property
    def module(self) -> str:
        """kohya's name of a LoRA module for this layer."""
        return f"lora_{self.network}_{self.name.replace('.', '_')}"

    @property
    def block(self) -> str:
        """The block it lies in: "output_blocks.0.1", "middle_block.1", "time_embed", "te2"."""
        if self.network != "unet":
            return self.network
        first, *rest = self.name.split(".")
        depth = {"input_blocks": 2, "output_blocks": 2, "middle_block": 1}.get(first, 0)
        return ".".join([first, *rest[:depth]])


def resnet(name: str, diffusers: str, inputs: int, outputs: int) -> Iterator[Layer]:
    """A residual block with its time embedding of 1280."""
    parts: list[tuple[str, str, tuple[int, ...]]] = [
        ("in_layers.0", "norm1", (inputs,)),
        ("in_layers.2", "conv1", (outputs, inputs, 3, 3)),
        ("emb_layers.1", "time_emb_proj", (outputs, 1280)),
        ("out_layers.0", "norm2", (outputs,)),
        ("out_layers.3", "conv2", (outputs, outputs, 3, 3)),
    ]
    if inputs != outputs:
        parts.append(("skip_connection", "conv_shortcut", (outputs, inputs, 1, 1)))
    for part, other, shape in parts:
        yield Layer("unet", f"{name}.{part}", shape, f"{diffusers}.{other}")


def transformer_block(width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of what is in one, over a text of 2048 wide tokens."""
    for number, source in ((1, width), (2, 2048)):
        yield f"norm{number}", (width,)
        yield f"attn{number}.to_q", (width, width)
        yield f"attn{number}.to_k", (width, source)
        yield f"attn{number}.to_v", (width, source)
        yield f"attn{number}.to_out.0", (width, width)
    yield "norm3", (width,)
    yield "ff.net.0.proj", (8 * width, width)
    yield "ff.net.2", (width, 4 * width)


def transformer(name: str, diffusers: str, width: int, depth: int) -> Iterator[Layer]:
    """Transformer blocks between two projections; both namings agree on what is inside."""
    parts = [("norm", (width,)), ("proj_in", (width, width))]
    for index in range(depth):
        inside = transformer_block(width)
        parts += [(f"transformer_blocks.{index}.{part}", shape) for part, shape in inside]
    for part, shape in (*parts, ("proj_out", (width, width))):
        yield Layer("unet", f"{name}.{part}", shape, f"{diffusers}.{part}")


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
            name, other = f"input_blocks.{number}.0.op", f"down_blocks.{level}.downsamplers.0.conv"
            yield Layer("unet", name, (width, width, 3, 3), other)
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
            shape = (width, width, 3, 3)
            yield Layer("unet", f"{sgm}.2.conv", shape, f"{diffusers}.upsamplers.0.conv")
        inputs = width


def unet_layers() -> Iterator[Layer]:
    """The whole U-Net, in the order of its forward pass."""
    yield Layer("unet", "time_embed.0", (1280, 320), "time_embedding.linear_1")
    yield Layer("unet", "time_embed.2", (1280, 1280), "time_embedding.linear_2")
    yield Layer("unet", "label_emb.0.0", (1280, 2816), "add_embedding.linear_1")
    yield Layer("unet", "label_emb.0.2", (1280, 1280), "add_embedding.linear_2")
    yield Layer("unet", "input_blocks.0.0", (320, 4, 3, 3), "conv_in")
    yield from unet_down()
    yield from resnet("middle_block.0", "mid_block.resnets.0", 1280, 1280)
    yield from transformer("middle_block.1", "mid_block.attentions.0", 1280, 10)
    yield from resnet("middle_block.2", "mid_block.resnets.1", 1280, 1280)
    yield from unet_up()
    yield Layer("unet", "out.0", (320,), "conv_norm_out")
    yield Layer("unet", "out.2", (4, 320, 3, 3), "conv_out")


def text_encoder_layers(network: str, depth: int, width: int) -> Iterator[Layer]:
    """A CLIP text encoder: 12 layers of 768 in the first of SDXL, 32 of 1280 in the second."""
    yield Layer(network, "text_model.embeddings.token_embedding", (49408, width))
    yield Layer(network, "text_model.embeddings.position_embedding", (77, width))
    for index in range(depth):
        layer = f"text_model.encoder.layers.{index}"
        for projection in ("k", "v", "q", "out"):
            yield Layer(network, f"{layer}.self_attn.{projection}_proj", (width, width))
        yield Layer(network, f"{layer}.layer_norm1", (width,))
        yield Layer(network, f"{layer}.mlp.fc1", (4 * width, width))
        yield Layer(network, f"{layer}.mlp.fc2", (width, 4 * width))
        yield Layer(network, f"{layer}.layer_norm2", (width,))
    yield Layer(network, "text_model.final_layer_norm", (width,))


@cache
def sdxl_layers() -> dict[str, dict[str, Layer]]:
    """All three networks, as {network: {name with dots: layer}}."""
    projection = Layer("te2", "text_projection", (1280, 1280))
    networks = {
        "te1": text_encoder_layers("te1", 12, 768),
        "te2": (*text_encoder_layers("te2", 32, 1280), projection),
        "unet": unet_layers(),
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
        # projections as the U-Net's; IP-Adapter's LoRA names the U-Net's as a text encoder's.
        if plain.endswith("_to_out_0"):
            yield plain.removesuffix("_0")
        if layer.network != "unet":
            yield from other_text_names(plain)
            yield open_clip_name(name).replace(".", "_")
        elif "_attn" in plain:
            stem, _, projection = plain.removesuffix("_0").rpartition("_to_")
            yield f"{stem}_{projection}_proj"


# open_clip's words for the parts of the second text encoder, as a checkpoint has them.
OPEN_CLIP = {
    "text_model.encoder.layers": "resblocks", "self_attn": "attn", "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj", "layer_norm": "ln_",
}  # fmt: skip


def open_clip_name(name: str) -> str:
    """A text encoder's layer as open_clip calls it: "resblocks.0.attn.q_proj"."""
    for word, open_clips in OPEN_CLIP.items():
        name = name.replace(word, open_clips)
    return name


def other_text_names(name: str) -> Iterator[str]:
    """Further names of a text encoder's layer, with underscores."""
    stem, separator, projection = name.rpartition("_self_attn_")
    if separator:
        yield f"{stem}_self_attn_to_{projection.removesuffix('_proj')}"
    if name.startswith("text_model_"):  # which transformers 5 does not have around the encoder
        yield name.removeprefix("text_model_")


# Projections that were fused into one layer, whose rows are theirs one after the other.
FUSED = {"qkv": ("qkv", "to_qkv", "qkv_proj", "in_proj"), "kv": ("kv", "to_kv", "kv_proj")}


def fused_spellings(layers: dict[str, Layer]) -> Iterator[tuple[str, tuple[Layer, ...]]]:
    """(name, the projections in it) of those that read the same input, from layers by any name."""
    for name in layers:
        stem, separator, _ = name.rpartition("_q_proj")
        for letters, words in FUSED.items() if separator else ():
            parts = tuple(layers[f"{stem}_{letter}_proj"] for letter in letters)
            if len({part.shape[1] for part in parts}) == 1:
                yield from ((f"{stem}_{word}", parts) for word in words)


@cache
def layers_by_spelling() -> dict[str, dict[str, tuple[Layer, ...]]]:
    """{network: {any name with underscores: its layer, or those of fused projections}}."""
    names = {}
    for network, layers in sdxl_layers().items():
        single = {name: layer for layer in layers.values() for name in spellings(layer)}
        names[network] = dict(fused_spellings(single))
        names[network] |= {name: (layer,) for name, layer in single.items()}
    return names


@cache
def layers_by_module() -> dict[str, Layer]:
    """All layers by kohya's module name."""
    return {layer.module: layer for layers in sdxl_layers().values() for layer in layers.values()}


@cache
def blocks_by_spelling() -> set[str]:
    """The parts of a block by both names: "input_blocks_4_1", "down_blocks_1_attentions_0"."""
    names = ((x.name.split("."), x.diffusers.split(".")) for x in sdxl_layers()["unet"].values())
    return {"_".join(part) for sgm, other in names for part in (sgm[:3], other[:4])}


def block_of(module: str) -> str:
    """The block of a module, by kohya's name of it: "output_blocks.0.1", "te2"."""
    return layers_by_module()[module].block


def checkpoint_weight(layer: Layer) -> tuple[str, int | None] | None:
    """(key, third) of a layer's weight in an SDXL checkpoint; None where it has no such weight.

    The second text encoder has the weights of q, k and v stacked along the rows of one tensor:
    `third` is 0, 1 or 2 for those, and None where the tensor is the whole weight.
    """
    if layer.network == "unet":
        return f"model.diffusion_model.{layer.name}.weight", None
    if layer.network == "te1":
        return f"conditioner.embedders.0.transformer.{layer.name}.weight", None
    name = open_clip_name(layer.name)
    if not name.startswith("resblocks."):
        return None
    stem, _, projection = name.rpartition(".attn.")
    third = "qkv".index(projection[0]) if projection in ("q_proj", "k_proj", "v_proj") else None
    weight = f"{name}.weight" if third is None else f"{stem}.attn.in_proj_weight"
    return f"conditioner.embedders.1.model.transformer.{weight}", third


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


def named_trait(name: str, known: dict[str, Trait]) -> Trait:
    """The trait of this name; BloraError, with the names there are, where there is none."""
    if name not in known:
        names = ", ".join(map(shortened, known))
        raise BloraError(f'unknown trait "{shortened(name)}": choose one of {names}')
    return known[name]
