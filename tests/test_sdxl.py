"""The table of SDXL is that of the real models, and a name means one layer or none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers_sdxl import sdxl_unet_without_weights
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from blora import sdxl
from blora.slicer import keys

SDXL = json.loads(Path(__file__).with_name("data").joinpath("sdxl_modules.json").read_text())
Shapes = dict[str, tuple[int, ...]]


# ---- The layers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["unet", "te1", "te2"])
def test_matrices_and_convolutions_are_those_that_sd_scripts_builds(network):
    layers = sdxl.sdxl_layers()[network]
    embeddings = {name for name in layers if name.endswith("_embedding")}
    ours = {name: list(layer.shape) for name, layer in layers.items() if layer.shape[1:]}
    theirs = {name: shape for name, (_, shape) in SDXL[network].items()}
    assert {name: ours[name] for name in ours.keys() - embeddings} == theirs


def weights(model: torch.nn.Module) -> Shapes:
    """The weight of every layer of a model, norms and embeddings included."""
    return {
        name.removesuffix(".weight"): tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if name.endswith(".weight")
    }


def test_diffusers_names_and_all_shapes_norms_included_are_those_of_its_own_unet():
    layers = sdxl.sdxl_layers()["unet"].values()
    assert {x.diffusers: x.shape for x in layers} == weights(sdxl_unet_without_weights())


TEXT_ENCODERS = {
    "te1": (CLIPTextModel, {"hidden_size": 768, "num_hidden_layers": 12}),
    "te2": (
        CLIPTextModelWithProjection,
        {"hidden_size": 1280, "num_hidden_layers": 32, "projection_dim": 1280},
    ),
}


@pytest.mark.parametrize("network", TEXT_ENCODERS)
def test_all_layers_of_a_text_encoder_are_those_of_transformers_norms_included(network):
    model, sizes = TEXT_ENCODERS[network]
    with torch.device("meta"):
        theirs = weights(model(CLIPTextConfig(intermediate_size=4 * sizes["hidden_size"], **sizes)))
    found = {}
    for name, shape in theirs.items():
        prefix = {"te1": "text_encoder.", "te2": "text_encoder_2."}[network]
        found[keys.find_layer(prefix + name).layer.name] = shape
    layers = sdxl.sdxl_layers()[network].values()
    assert found == {layer.name: layer.shape for layer in layers}


# ---- Names ---------------------------------------------------------------------------------------


def test_no_name_means_two_layers():
    for layers in sdxl.sdxl_layers().values():
        owners: dict[str, str] = {}
        for layer in layers.values():
            for spelling in sdxl.spellings(layer):
                assert owners.setdefault(spelling, layer.name) == layer.name


def test_every_layer_is_found_under_kohyas_name_in_both_namings():
    for module, layer in sdxl.layers_by_module().items():
        assert keys.find_layer(module).layer is layer
        if layer.diffusers:
            other = f"lora_unet_{layer.diffusers.replace('.', '_')}"
            assert keys.find_layer(other).layer is layer


@pytest.mark.parametrize("prefix", ["", "unet.", "unet.unet.", "base_model.model."])
def test_every_layer_of_the_unet_is_found_under_its_dotted_names(prefix):
    for layer in sdxl.layers_by_module().values():
        if layer.network == "unet":
            for name in (layer.name, layer.diffusers):
                found = keys.find_layer(prefix + name)
                assert (found.layer, found.name) == (layer, name)


Q = "transformer_blocks_0_attn1_to_q"
NO_LAYER = {
    "a third transformer block of two": "lora_unet_input_blocks_4_1_transformer_blocks_2_ff_net_2",
    "an eleventh of ten": "lora_unet_output_blocks_0_1_transformer_blocks_10_ff_net_2",
    "a text encoder's layer too many": "lora_te2_text_model_encoder_layers_99_mlp_fc1",
    "layer 12 of the first text encoder": "lora_te1_text_model_encoder_layers_12_mlp_fc1",
    "a text encoder that is none": "lora_te1_text_model_foo",
    "a letter too many": f"lora_unet_output_blocks_0_1_{Q}x",
    "an escape": f"lora_unet_output_blocks_0_1_{Q}\x1b",
    "a line break": f"lora_unet_output_blocks_0_1_{Q}\n",
    "a container": "lora_unet_output_blocks_0_1",
    "an attention as a whole": "lora_unet_output_blocks_0_1_transformer_blocks_0_attn1",
    "Stable Diffusion 1's text encoder": "lora_te_text_model_encoder_layers_0_mlp_fc1",
    "Stable Diffusion 1's block": "lora_unet_down_blocks_0_attentions_0_proj_in",
    "Flux": "lora_unet_double_blocks_0_img_attn_qkv",
    "the VAE": "first_stage_model.decoder.conv_in",
    "nothing": "",
    "a prefix alone": "lora_unet_",
}  # fmt: skip


@pytest.mark.parametrize("name", NO_LAYER.values(), ids=NO_LAYER)
def test_a_name_that_sdxl_does_not_have_is_none(name):
    assert keys.find_layer(name) is None


BLOCKS = {
    "lora_unet_output_blocks_0_1_proj_in": "output_blocks.0.1",
    "lora_unet_output_blocks_2_2_conv": "output_blocks.2.2",
    "lora_unet_input_blocks_0_0": "input_blocks.0.0",
    "lora_unet_input_blocks_3_0_op": "input_blocks.3.0",
    "lora_unet_middle_block_1_norm": "middle_block.1",
    "lora_unet_time_embed_2": "time_embed",
    "lora_unet_label_emb_0_0": "label_emb",
    "lora_unet_out_2": "out",
    "lora_te1_text_model_final_layer_norm": "te1",
    "lora_te2_text_projection": "te2",
}


@pytest.mark.parametrize("module", BLOCKS)
def test_a_module_lies_in_its_block(module):
    assert sdxl.block_of(module) == BLOCKS[module]
