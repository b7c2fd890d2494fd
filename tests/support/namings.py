"""Keys of a LoRA as the programs name them: prefix, layer and suffix, each in all its spellings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import torch
from lora_algebra import Module, rank_of
from lora_forms import Form, make_module
from torch import Tensor

# ---- Layers --------------------------------------------------------------------------------------

# sgm's words for layers of the U-Net, their blocks, and what is in a residual block; diffusers'.
WORDS = {
    "input_blocks.0.0": "conv_in",
    "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
    "out.2": "conv_out",
    "input_blocks.1.0": "down_blocks.0.resnets.0",
    "input_blocks.2.0": "down_blocks.0.resnets.1",
    "input_blocks.4.0": "down_blocks.1.resnets.0",
    "input_blocks.4.1": "down_blocks.1.attentions.0",
    "output_blocks.3.1": "up_blocks.1.attentions.0",
    "output_blocks.6.0": "up_blocks.2.resnets.0",
    "output_blocks.7.0": "up_blocks.2.resnets.1",
    "output_blocks.8.0": "up_blocks.2.resnets.2",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
# Small layers of each kind, by sgm's names: as many as there are forms to spread over them.
UNET = {
    "3x3": [
        "input_blocks.0.0", "out.2", "input_blocks.3.0.op", "input_blocks.1.0.in_layers.2",
        *(f"{block}.0.out_layers.3" for block in ("input_blocks.1", "input_blocks.2")),
        *(f"output_blocks.{n}.0.out_layers.3" for n in (6, 7, 8)), "input_blocks.2.0.in_layers.2",
    ],
    "1x1": [
        "input_blocks.4.0.skip_connection",
        *(f"output_blocks.{n}.0.skip_connection" for n in (6, 7, 8)),
    ],
    "linear": [
        *(f"input_blocks.{n}.0.emb_layers.1" for n in (1, 2)),
        *(f"output_blocks.{n}.0.emb_layers.1" for n in (6, 7, 8)),
    ],
    "attention": [
        f"{block}.transformer_blocks.{n}.attn1.{projection}"
        for block in ("input_blocks.4.1", "output_blocks.3.1")
        for n in (0, 1)
        for projection in ("to_q", "to_k", "to_v", "to_out.0")
    ],
    "norm": ["input_blocks.4.1.transformer_blocks.0.norm1", "output_blocks.3.1.norm"],
}  # fmt: skip
TEXT = {
    "attention": [
        f"text_model.encoder.layers.{n}.self_attn.{projection}"
        for n in (0, 1, 11)
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj")
    ],
    "linear": [f"text_model.encoder.layers.{part}" for part in ("0.mlp.fc1", "11.mlp.fc2")],
}


def in_diffusers_words(layer: str) -> str:
    """diffusers' name of a layer of the U-Net above, from sgm's."""
    for sgm, diffusers in WORDS.items():
        layer = layer.replace(sgm, diffusers)
    return layer


def spread(forms: Mapping[object, Form], network: str, alpha: float | None) -> dict[str, Module]:
    """Each form that the network's layers can have on a layer of its own, by the layer's name."""
    pools = {kind: iter(layers) for kind, layers in (UNET if network == "unet" else TEXT).items()}
    modules = {}
    for seed, form in enumerate(forms.values()):
        kinds = [kind for kind in form.kinds if kind in pools]
        # BOFT's blocks of 10 do not go into the 768 of the first encoder.
        if not kinds or (network == "te1" and "x" in "".join(form.axes.values())):
            continue
        # The kinds of layers in turn, while they have a layer left.
        turn = kinds[seed % len(kinds) :] + kinds[: seed % len(kinds)]
        layer = next(layer for kind in turn for layer in [next(pools[kind], None)] if layer)
        name = kohya_name(network, layer)
        modules[layer] = make_module(name, form, 2, alpha, torch.float16, seed)
    return modules


def kohya_name(network: str, layer: str) -> str:
    """kohya's name of the module of a layer, such as lora_unet_input_blocks_4_1_proj_in."""
    return f"lora_{network}_{layer.replace('.', '_')}"


def with_alpha(module: Module) -> Module:
    """The module as it comes out: one that has a rank and no alpha gets the rank as its alpha.

    A LoKr of two whole factors has no rank. It gets 1: LyCORIS loads none without an alpha.
    """
    rank = 1 if {"lokr_w1", "lokr_w2"} <= module.keys() else rank_of(module)
    if rank is None or "alpha" in module:
        return module
    return module | {"alpha": torch.tensor(float(rank))}


def in_kohyas_names(network: str, modules: dict[str, Module]) -> dict[str, Module]:
    """Modules, given by their layers' names, as a slice at 1.0 should hold them."""
    return {kohya_name(network, layer): with_alpha(m) for layer, m in modules.items()}


# ---- All namings ---------------------------------------------------------------------------------

# kohya's, LyCORIS' wrapper's, sd-scripts' OFT's, ComfyUI's, diffusers', PEFT's, SimpleTuner's.
UNET_PREFIXES = (
    "lora_unet_", "lycoris_", "oft_unet_", "diffusion_model.", "unet.", "unet.unet.",
    "base_model.model.", "unet.base_model.model.", "",
)  # fmt: skip
# Those of the first text encoder, and of the second. clip_l and clip_g are OneTrainer's.
TEXT_PREFIXES = {
    "te1": ("lora_te1_", "text_encoder.", "text_encoders.clip_l.transformer.", "clip_l."),
    "te2": ("lora_te2_", "text_encoder_2.", "text_encoders.clip_g.transformer.", "clip_g."),
}


@dataclass(frozen=True)
class Naming:
    """How the keys of a file begin, what they call a layer, and what stands before the suffix."""

    network: str
    prefix: str
    words: str = "sgm"  # or diffusers'; a text encoder has one name
    dot: str = "."  # or an underscore, in the layer's name
    before: str = "."  # or an underscore, before the suffix

    def layer(self, layer: str) -> str:
        """A key without its suffix and what stands before that, of a layer in sgm's words."""
        name = in_diffusers_words(layer) if self.words == "diffusers" else layer
        return self.prefix + name.replace(".", self.dot)

    def keys(self, modules: dict[str, Module]) -> dict[str, Tensor]:
        """The tensors of modules, given by their layers' names, by the keys of a file."""
        return {
            f"{self.layer(layer)}{self.before}{suffix}": tensor
            for layer, module in modules.items()
            for suffix, tensor in module.items()
        }

    def __str__(self) -> str:
        return f"{self.prefix}{self.words[:5]}{self.dot}layer{self.before}suffix"


UNET_NAMINGS = [Naming("unet", *parts) for parts in product(
    UNET_PREFIXES, ("sgm", "diffusers"), "._", "._")]  # fmt: skip
TEXT_NAMINGS = [
    Naming(network, prefix, "its own", dot, before)
    for network, prefixes in TEXT_PREFIXES.items()
    for prefix, dot, before in product(prefixes, "._", "._")
]
NAMINGS = UNET_NAMINGS + TEXT_NAMINGS
# Those that differ in the layer's name alone: a suffix has what stands before it in itself.
LAYER_NAMINGS = [naming for naming in NAMINGS if naming.before == "."]

# How programs spell the suffixes of a LoRA, with what stands before them: (up, down).
SPELLINGS = {
    "kohya": (".lora_up.weight", ".lora_down.weight"),
    "PEFT": (".lora_B.weight", ".lora_A.weight"),
    "PEFT, with the adapter": (".lora_B.default.weight", ".lora_A.default.weight"),
    "the original B-LoRA": (".lora.up.weight", ".lora.down.weight"),
    "old diffusers": (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
    "attention processors": ("_lora.up.weight", "_lora.down.weight"),
    "an underscore": ("_lora_up.weight", "_lora_down.weight"),
}
# One number for each row, without LyCORIS' further axes.
MAGNITUDES = (
    ".lora_magnitude_vector",
    ".lora_magnitude_vector.weight",
    ".lora_magnitude_vector.default.weight",
    ".magnitude",
)
