"""The table of SDXL is that of the real models, and a name means one layer or none."""

from __future__ import annotations

import pytest
import torch
from diffusers_sdxl import sdxl_unet_without_weights
from lycoris_modules import SDXL
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from blora import sdxl
from blora.slicer import keys


def test_matrices_and_convolutions_are_those_that_sd_scripts_builds():
    for network, layers in sdxl.sdxl_layers().items():
        shapes = {name: list(layer.shape) for name, layer in layers.items()}
        ours = {n: x for n, x in shapes.items() if x[1:] and not n.endswith("_embedding")}
        assert ours == {name: shape for name, (_, shape) in SDXL[network].items()}


def weights(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """The weight of every layer of a model, norms and embeddings included."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return {n.removesuffix(".weight"): x for n, x in shapes.items() if n.endswith(".weight")}


def test_diffusers_names_and_all_shapes_norms_included_are_those_of_its_own_unet():
    layers = sdxl.sdxl_layers()["unet"].values()
    assert {x.diffusers: x.shape for x in layers} == weights(sdxl_unet_without_weights())


@pytest.mark.parametrize(("network", "width", "depth"), [("te1", 768, 12), ("te2", 1280, 32)])
def test_a_text_encoders_layers_are_those_of_transformers(network, width, depth):
    model = CLIPTextModel if network == "te1" else CLIPTextModelWithProjection
    prefix = "text_encoder" if network == "te1" else "text_encoder_2"
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width}
    with torch.device("meta"):
        theirs = weights(model(CLIPTextConfig(num_hidden_layers=depth, **sizes)))
    layers = {keys.find_layer(f"{prefix}.{name}").layers[0]: theirs[name] for name in theirs}
    assert {x.name: shape for x, shape in layers.items()} == {
        x.name: x.shape for x in sdxl.sdxl_layers()[network].values()
    }


def test_no_name_means_two_layers():
    for layers in sdxl.sdxl_layers().values():
        owners: dict[str, str] = {}
        for layer in layers.values():
            for spelling in sdxl.spellings(layer):
                assert owners.setdefault(spelling, layer.name) == layer.name


def test_every_layer_is_found_under_kohyas_names_and_those_with_dots():
    for module, layer in sdxl.layers_by_module().items():
        assert keys.find_layer(module).layers[0] is layer
        if layer.network == "unet":
            other = f"lora_unet_{layer.diffusers.replace('.', '_')}"
            assert keys.find_layer(other).layers[0] is layer
            for prefix in ("", "unet.", "unet.unet.", "base_model.model."):
                for name in (layer.name, layer.diffusers):
                    found = keys.find_layer(prefix + name)
                    assert (found.layers, found.name) == ((layer,), name)


Q = "transformer_blocks_0_attn1_to_q"


def test_a_name_that_sdxl_does_not_have_is_none():
    expected = {
        "a third block of two": "lora_unet_input_blocks_4_1_transformer_blocks_2_ff_net_2",
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
    }
    found = {why: keys.find_layer(name) for why, name in expected.items()}
    assert found == dict.fromkeys(expected)


def test_a_module_lies_in_its_block():
    expected = {
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
    assert {module: sdxl.block_of(module) for module in expected} == expected
