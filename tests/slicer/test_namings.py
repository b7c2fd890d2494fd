"""LoRAs of every naming come in, and kohya's sgm names go out, with all their numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path

import pytest
import torch
from exact_strength import slice_all
from lora_algebra import Module, with_alpha
from lora_files import CONTENT, SDXL, lora_module, write
from lora_forms import FORMS, REFUSED, Form, make_module, write_modules
from safetensors.torch import save_file
from slicing import stored
from torch import Tensor

from blora.sdxl import layers_by_module
from blora.slicer.keys import read_key

# kohya's, LyCORIS' wrapper's, sd-scripts' OFT's, ComfyUI's, diffusers', PEFT's, SimpleTuner's, and
# OneTrainer's clip_l and clip_g.
PREFIXES = {
    "unet": (
        "lora_unet_", "lycoris_", "oft_unet_", "diffusion_model.", "unet.", "unet.unet.",
        "base_model.model.", "unet.base_model.model.", "",
    ),
    "te1": ("lora_te1_", "text_encoder.", "text_encoders.clip_l.transformer.", "clip_l."),
    "te2": ("lora_te2_", "text_encoder_2.", "text_encoders.clip_g.transformer.", "clip_g."),
}  # fmt: skip
NORMS = ["input_blocks.4.1.transformer_blocks.0.norm1", "output_blocks.3.1.norm"]


def kohya_name(network: str, layer: str) -> str:
    """kohya's name of the module of a layer, such as lora_unet_input_blocks_4_1_proj_in."""
    return f"lora_{network}_{layer.replace('.', '_')}"


@dataclass(frozen=True)
class Naming:
    """How the keys of a file begin, what they call a layer, and what stands before the suffix."""

    network: str
    prefix: str
    words: str  # sgm's or diffusers'; a text encoder has one name
    dot: str  # or an underscore, in the layer's name
    before: str  # a dot or an underscore, before the suffix

    def layer(self, layer: str) -> str:
        """A key without its suffix and what stands before that, of a layer in sgm's words."""
        if self.words == "diffusers":
            layer = layers_by_module()[kohya_name(self.network, layer)].diffusers
        return self.prefix + layer.replace(".", self.dot)

    def keys(self, modules: dict[str, Module]) -> dict[str, Tensor]:
        """The tensors of modules, given by their layers' names, by the keys of a file."""
        return {
            f"{self.layer(layer)}{self.before}{suffix}": tensor
            for layer, module in modules.items()
            for suffix, tensor in module.items()
        }

    def __str__(self) -> str:
        return f"{self.prefix}{self.words[:5]}{self.dot}layer{self.before}suffix"


NAMINGS = [
    Naming(network, prefix, words, dot, before)
    for network, prefixes in PREFIXES.items()
    for prefix, dot, before in product(prefixes, "._", "._")
    for words in (("sgm", "diffusers") if network == "unet" else ("its own",))
]


def spread(forms: Mapping[object, Form], network: str, alpha: float | None) -> dict[str, Module]:
    """Each form on a layer of its own, by its name: kinds in turn, of each the smallest layers."""
    of_kind = {"norm": NORMS if network == "unet" else []}
    for layer, (_, shape) in sorted(SDXL[network].items(), key=lambda item: prod(item[1][1])):
        kernel = {(3, 3): "3x3", (1, 1): "1x1"}.get(tuple(shape[2:]))
        kind = kernel or ("attention" if "attn" in layer else "linear")
        of_kind.setdefault(kind, []).append(layer)
    left = {kind: iter(layers) for kind, layers in of_kind.items() if layers}
    modules = {}
    for seed, form in enumerate(forms.values()):
        kinds = [kind for kind in form.kinds if kind in left]
        # BOFT's blocks of 10 do not go into the 768 of the first encoder.
        if kinds and not (network == "te1" and "x" in "".join(form.axes.values())):
            layer = next(left[kinds[seed % len(kinds)]])
            name = kohya_name(network, layer)
            modules[layer] = make_module(name, form, 2, alpha, torch.float16, seed)
    return modules


def in_kohyas_names(network: str, modules: dict[str, Module]) -> dict[str, Module]:
    """Modules, given by their layers' names, as a slice at 1.0 should hold them."""
    return {kohya_name(network, layer): with_alpha(m) for layer, m in modules.items()}


def assert_comes_out(folder: Path, tensors: dict[str, Tensor], wanted: dict[str, Module]) -> None:
    """A file of these tensors, cut at 1.0, holds the modules to the byte."""
    save_file(tensors, folder / "in.safetensors")
    kohyas = write_modules(folder / "wanted.safetensors", wanted)
    assert stored(slice_all(folder / "in.safetensors", 1.0)) == stored(kohyas)


@pytest.mark.parametrize("naming", NAMINGS, ids=str)
def test_every_algorithm_in_every_naming_comes_out_in_kohyas_names_to_the_byte(tmp_path, naming):
    for forms, alpha in ((FORMS, None), (FORMS, 0.3), (REFUSED, None)):
        modules = spread(forms, naming.network, alpha)
        wanted = in_kohyas_names(naming.network, modules)
        assert_comes_out(tmp_path, naming.keys(modules), wanted)


# ---- Every spelling of LoRA and DoRA -------------------------------------------------------------

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
    ".dora_scale",
)
# Those that differ in the layer's name alone: a suffix has what stands before it in itself.
LAYER_NAMINGS = [naming for naming in NAMINGS if naming.before == "."]


@pytest.mark.parametrize("naming", LAYER_NAMINGS, ids=str)
def test_every_spelling_of_a_loras_factors_comes_in_under_every_prefix(tmp_path, naming):
    layers = spread(dict.fromkeys(SPELLINGS, FORMS["LoRA"]), naming.network, None)
    tensors = {}
    for (layer, module), (up, down) in zip(layers.items(), SPELLINGS.values(), strict=True):
        tensors[naming.layer(layer) + up] = module["lora_up.weight"]
        tensors[naming.layer(layer) + down] = module["lora_down.weight"]
    assert_comes_out(tmp_path, tensors, in_kohyas_names(naming.network, layers))


@pytest.mark.parametrize("naming", LAYER_NAMINGS, ids=str)
def test_every_spelling_of_a_doras_magnitudes_comes_out_by_row_as_lycoris_has_them(
    tmp_path, naming
):
    # Each spelling on a convolution and on a matrix: `spread` takes the kinds of layers in turn.
    spellings = [*MAGNITUDES, *MAGNITUDES[2:], *MAGNITUDES[:2]]
    layers = spread(dict.fromkeys(range(10), REFUSED["DoRA"]), naming.network, 1.0)
    tensors = naming.keys(layers)
    for spelling, layer in zip(spellings, layers, strict=True):
        scale = tensors.pop(f"{naming.layer(layer)}.dora_scale")
        # One number a row: [out], and PEFT's [1, out, 1, 1] of a convolution.
        is_flat = scale.dim() == 2 or spelling == ".dora_scale"
        by_row = scale.flatten() if is_flat else scale.swapaxes(0, 1).contiguous()
        tensors[naming.layer(layer) + spelling] = by_row
    assert_comes_out(tmp_path, tensors, in_kohyas_names(naming.network, layers))


# ---- Keys ----------------------------------------------------------------------------------------

QUERY, OUT = CONTENT.format(0, 1, "q"), CONTENT.format(0, 1, "out_0")
TE2_K = "lora_te2_text_model_encoder_layers_0_self_attn_k_proj"
BLOCK = "up_blocks.0.attentions.0.transformer_blocks.0.attn1"
TE1_PREFIXES = ("text_encoder", "base_model.model.text_encoder", "text_encoder.base_model.model")
TE2_LAYER = "text_encoder_2.text_model.encoder.layers.0.self_attn"
KEYS = {
    # a module and a tensor of it: keys that mean it
    f"{QUERY}.lora_up.weight": [
        f"base_model.model.{BLOCK}.to_q.lora_B.my-style.weight",
        f"unet.{BLOCK}.processor.to_q_lora.up.weight",
    ],
    f"{QUERY}.lora_down.weight": [f"base_model.model.unet.{BLOCK}.to_q.lora_A.weight"],
    f"{QUERY}.lora_up.bias": [
        f"{QUERY}.lora_up.bias",
        f"unet.{BLOCK}.to_q.lora_B.bias",
        f"base_model.model.{BLOCK}.to_q.lora_B.default.bias",
    ],
    f"{QUERY}.alpha": [
        f"{QUERY}.alpha",
        f"unet.{BLOCK}.to_q.lora.alpha",
        f"unet.{BLOCK}.processor.to_q_lora.alpha",
    ],
    f"{QUERY}.hada_w1_a": [f"base_model.model.{BLOCK}.to_q.hada_w1_a.default"],
    f"{OUT}.lora_down.weight": [f"unet.{BLOCK}.processor.to_out_lora.down.weight"],
    # Of no kind known here, behind the longest name of a layer; or with something behind it.
    f"{OUT}.strange": [f"{OUT}.strange"],
    **{
        f"{QUERY}.lora_up.weight{end}": [f"{QUERY}.lora_up.weight{end}"] for end in ("\n", "x", " ")
    },
    f"{TE2_K}.lora_up.weight": [
        f"{TE2_LAYER}.to_k_lora.up.weight",
        f"{TE2_LAYER.replace('text_model.', '')}.k_proj.lora_B.weight",  # as in transformers 5
        f"base_model.model.{TE2_LAYER}.k_proj.lora_B.weight",
        f"{TE2_LAYER.replace('.', '.base_model.model.', 1)}.k_proj.lora.up.weight",
    ],
    "lora_te1_text_model_encoder_layers_11_mlp_fc1.lora_down.weight": [
        f"{prefix}.text_model.encoder.layers.11.mlp.fc1.lora_A.weight" for prefix in TE1_PREFIXES
    ],
    # Blocks of the U-Net as sgm and as diffusers call them.
    **{
        f"lora_unet_{sgm}.alpha": [f"lora_unet_{diffusers}.alpha"]
        for sgm, diffusers in {
            "input_blocks_1_0_emb_layers_1": "down_blocks_0_resnets_0_time_emb_proj",
            "input_blocks_3_0_op": "down_blocks_0_downsamplers_0_conv",
            "input_blocks_4_0_skip_connection": "down_blocks_1_resnets_0_conv_shortcut",
            "input_blocks_5_1_proj_in": "down_blocks_1_attentions_1_proj_in",
            "input_blocks_8_0_in_layers_2": "down_blocks_2_resnets_1_conv1",
            "input_blocks_8_1_proj_in": "down_blocks_2_attentions_1_proj_in",
            "middle_block_1_proj_in": "mid_block_attentions_0_proj_in",
            "middle_block_2_out_layers_3": "mid_block_resnets_1_conv2",
            "output_blocks_1_1_proj_in": "up_blocks_0_attentions_1_proj_in",
            "output_blocks_4_1_proj_in": "up_blocks_1_attentions_1_proj_in",
            "output_blocks_5_2_conv": "up_blocks_1_upsamplers_0_conv",
            "output_blocks_8_0_out_layers_3": "up_blocks_2_resnets_2_conv2",
            "label_emb_0_0": "add_embedding_linear_1",
            "out_2": "conv_out",
        }.items()
    },
}


@pytest.mark.parametrize(
    ("key", "wanted"), [(key, wanted) for wanted, keys in KEYS.items() for key in keys]
)
def test_a_key_of_any_naming_is_placed(key, wanted):
    found = read_key(key)
    assert f"{found.spelling.layers[0].module}.{found.suffix}" == wanted


def test_a_layer_has_sgms_name_with_and_without_the_number_of_an_output():
    for name in (QUERY, OUT, OUT.removesuffix("_0")):
        assert read_key(f"{name}.lora_up.weight").naming == "kohya, sgm names"


NOT_SDXLS = [
    "",
    "alpha",
    "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight",  # Flux
    "lora_unet_output_blocks_0_1_proj_in",
    "unet.text_encoder.up_blocks.0.attentions.0.proj_in.alpha",  # of two networks
    "unet.up_blocks.0.attentions.0.weight",
]


def test_what_is_not_sdxls_is_not_placed(slicer):
    strange = {key: torch.zeros(1) for key in NOT_SDXLS}
    lora = write(slicer.folder / "a.safetensors", strange | lora_module(QUERY))
    assert slicer(lora, "--inspect", "--json") == 0
    [facts] = json.loads(slicer.out)
    assert (facts["modules"], facts["unplaced"]) == (1, NOT_SDXLS)


def test_the_name_of_an_unknown_tensor_is_cut_short_where_it_is_long(slicer):
    tensors = lora_module(QUERY) | {f"{QUERY}.{'x' * 60_000}": torch.zeros(1)}
    assert slicer(write(slicer.folder / "a.safetensors", tensors)) == 1
    assert f" ({QUERY}.{'x' * (199 - len(QUERY))}...), " in slicer.err
