"""LoRAs of every naming come in, kohya's names go out."""

from __future__ import annotations

import json
import re

import pytest
import torch
from lora_files import CONTENT, SHAPES, blora_modules, lora_module, write
from safetensors import safe_open
from safetensors.torch import load_file
from slicing import slice_lora

from blora.slicer.keys import read_key

BLOCK = "transformer_blocks.0.attn1"
QUERY = "lora_unet_output_blocks_0_1_transformer_blocks_0_attn1_to_q"
OUT = "lora_unet_output_blocks_0_1_transformer_blocks_0_attn1_to_out_0"
TE2_K = "lora_te2_text_model_encoder_layers_0_self_attn_k_proj"

KEYS = [
    # a key, the module and the tensor it is
    (f"{QUERY}.lora_up.weight", QUERY, "lora_up.weight"),
    (f"{QUERY}.alpha", QUERY, "alpha"),
    (QUERY.replace("output_blocks_0_1", "up_blocks_0_attentions_0") + ".alpha", QUERY, "alpha"),
    (f"unet.up_blocks.0.attentions.0.{BLOCK}.to_q.lora_A.weight", QUERY, "lora_down.weight"),
    (f"unet.up_blocks.0.attentions.0.{BLOCK}.to_q.lora_B.weight", QUERY, "lora_up.weight"),
    (f"unet.up_blocks.0.attentions.0.{BLOCK}.to_q.lora_B.default.weight", QUERY, "lora_up.weight"),
    (f"unet.up_blocks.0.attentions.0.{BLOCK}.to_q.alpha", QUERY, "alpha"),
    (f"unet.up_blocks.0.attentions.0.{BLOCK}.to_out.0.lora_A.weight", OUT, "lora_down.weight"),
    (
        f"base_model.model.unet.up_blocks.0.attentions.0.{BLOCK}.to_q.lora_A.weight",
        QUERY,
        "lora_down.weight",
    ),
    (
        f"base_model.model.up_blocks.0.attentions.0.{BLOCK}.to_q.lora_B.weight",
        QUERY,
        "lora_up.weight",
    ),
    (
        f"unet.up_blocks.0.attentions.0.{BLOCK}.to_q.lora_magnitude_vector",
        QUERY,
        "dora_scale",
    ),
    (f"unet.up_blocks.0.attentions.0.{BLOCK}.to_q.lora.down.weight", QUERY, "lora_down.weight"),
    (f"unet.unet.up_blocks.0.attentions.0.{BLOCK}.to_q.lora.up.weight", QUERY, "lora_up.weight"),
    (
        f"unet.up_blocks.0.attentions.0.{BLOCK}.processor.to_q_lora.up.weight",
        QUERY,
        "lora_up.weight",
    ),
    (
        f"unet.up_blocks.0.attentions.0.{BLOCK}.processor.to_out_lora.down.weight",
        OUT,
        "lora_down.weight",
    ),
    (
        f"base_model.model.up_blocks.0.attentions.0.{BLOCK}.to_q.hada_w1_a.default",
        QUERY,
        "hada_w1_a",
    ),
    (
        f"base_model.model.up_blocks.0.attentions.0.{BLOCK}.to_q.lora_B.my-style.weight",
        QUERY,
        "lora_up.weight",
    ),
    # of no kind known here, behind the longest name of a layer
    (f"{OUT}.strange", OUT, "strange"),
    (f"{TE2_K}.lora_up.weight", TE2_K, "lora_up.weight"),
    (
        "text_encoder_2.text_model.encoder.layers.0.self_attn.k_proj.lora_B.weight",
        TE2_K,
        "lora_up.weight",
    ),
    (
        "text_encoder_2.text_model.encoder.layers.0.self_attn.k_proj.lora_linear_layer.up.weight",
        TE2_K,
        "lora_up.weight",
    ),
    (
        "text_encoder_2.text_model.encoder.layers.0.self_attn.to_k_lora.down.weight",
        TE2_K,
        "lora_down.weight",
    ),
    (
        "text_encoder.text_model.encoder.layers.11.mlp.fc1.lora_A.weight",
        "lora_te1_text_model_encoder_layers_11_mlp_fc1",
        "lora_down.weight",
    ),
    (
        "lora_unet_down_blocks_2_resnets_1_conv1.lora_up.weight",
        "lora_unet_input_blocks_8_0_in_layers_2",
        "lora_up.weight",
    ),
    ("lora_unet_mid_block_resnets_1_conv2.alpha", "lora_unet_middle_block_2_out_layers_3", "alpha"),
    ("lora_unet_down_blocks_0_downsamplers_0_conv.alpha", "lora_unet_input_blocks_3_0_op", "alpha"),
    (
        "lora_unet_up_blocks_1_upsamplers_0_conv.alpha",
        "lora_unet_output_blocks_5_2_conv",
        "alpha",
    ),
    ("lora_unet_add_embedding_linear_1.alpha", "lora_unet_label_emb_0_0", "alpha"),
]


@pytest.mark.parametrize(("key", "module", "suffix"), KEYS, ids=[key for key, _, _ in KEYS])
def test_a_key_of_any_naming_is_placed(key, module, suffix):
    found = read_key(key)
    assert (found.spelling.layer.module, found.suffix) == (module, suffix)


@pytest.mark.parametrize(
    "key",
    [
        "model.diffusion_model.out.2.weight",  # a checkpoint's
        "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight",  # Flux
        "unet.up_blocks.0.attentions.0.weight",
        "lora_unet_output_blocks_0_1_proj_in",
        "alpha",
        "",
    ],
)
def test_what_is_not_sdxls_is_not_placed(slicer, key):
    lora = write(slicer.folder / "a.safetensors", {key: torch.zeros(1)} | lora_module(QUERY))
    assert slicer(lora, "--inspect", "--json") == 0
    [facts] = json.loads(slicer.out)
    assert (facts["modules"], facts["unplaced"]) == (1, [key])


@pytest.mark.parametrize("layer", [QUERY, OUT, OUT.removesuffix("_0")])
def test_sgms_words_are_known_with_and_without_the_number_of_an_output(layer):
    assert read_key(f"{layer}.lora_up.weight").naming == "kohya, sgm names"


def test_every_layer_of_sdxl_is_placed_under_its_own_name():
    assert len(SHAPES) == 794 + 72 + 193
    assert {read_key(f"{module}.alpha").spelling.layer.module for module in SHAPES} == set(SHAPES)


def as_peft(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The factors of content modules under PEFT's names."""
    renamed = {}
    for key, tensor in tensors.items():
        module, suffix = key.split(".", 1)
        layer = module.removeprefix("lora_unet_output_blocks_0_1_")
        layer = re.sub(r"_(\d)_(attn\d)_(to_\w+?)(_0)?$", r".\1.\2.\3\4", layer)
        layer = layer.replace("to_out_0", "to_out.0")
        factor = "A" if "down" in suffix else "B"
        renamed[f"unet.up_blocks.0.attentions.0.{layer}.lora_{factor}.weight"] = tensor.clone()
    return renamed


def test_a_peft_file_comes_out_whole_in_kohyas_names(tmp_path):
    tensors = blora_modules(CONTENT, alpha=None)
    lora = write(tmp_path / "peft.safetensors", as_peft(tensors))
    output = tmp_path / "slice.safetensors"
    assert slice_lora("--loras", lora, "--output_path", output) == 0
    kept = load_file(output)
    alphas = {f"{key.split('.')[0]}.alpha": torch.tensor(2.0) for key in tensors}
    assert set(kept) == set(tensors | alphas)
    assert all(torch.equal(kept[key], tensor) for key, tensor in (tensors | alphas).items())


@pytest.mark.parametrize(
    ("settings", "alpha"),
    [
        ({"unet.r": 2, "unet.lora_alpha": 1}, 1.0),
        ({"unet.r": 2, "unet.lora_alpha": 2}, 2.0),
        ({"unet.lora_alpha": 2, "unet.use_rslora": True}, 2 * 2**0.5),
        ({"unet.lora_alpha": 2, "unet.alpha_pattern": {"attn1.to_q": 6}}, 6.0),
        ({"text_encoder.lora_alpha": 1}, 2.0),  # of another network, so that it is the rank
    ],
)
def test_the_alpha_of_pefts_settings_becomes_the_modules(tmp_path, settings, alpha):
    tensors = as_peft(lora_module(QUERY, alpha=None))
    metadata = {"lora_adapter_metadata": json.dumps(settings)}
    lora = write(tmp_path / "peft.safetensors", tensors, metadata)
    output = tmp_path / "slice.safetensors"
    assert slice_lora("--loras", lora, "--output_path", output) == 0
    assert load_file(output)[f"{QUERY}.alpha"].item() == pytest.approx(alpha)
    with safe_open(output, "pt") as file:
        assert "lora_adapter_metadata" not in file.metadata()


def test_an_alpha_that_is_stored_wins_over_pefts_settings(tmp_path):
    tensors = as_peft(lora_module(QUERY, alpha=None))
    stored_alpha = f"unet.up_blocks.0.attentions.0.{BLOCK}.to_q.alpha"
    metadata = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 1})}
    for alpha in (3.0, 0.0):
        tensors[stored_alpha] = torch.tensor(alpha)
        lora = write(tmp_path / "peft.safetensors", tensors, metadata)
        output = tmp_path / "slice.safetensors"
        assert slice_lora("--loras", lora, "--output_path", output) == 0
        assert load_file(output)[f"{QUERY}.alpha"].item() == alpha


def test_keys_that_cannot_be_placed_are_counted_and_the_first_named(tmp_path, capsys):
    strange = {f"strange.{letter}": torch.zeros(1) for letter in "abcde"}
    lora = write(tmp_path / "a.safetensors", blora_modules(CONTENT) | strange)
    output = tmp_path / "slice.safetensors"
    assert slice_lora("--loras", lora, "--output_path", output) == 0
    assert capsys.readouterr().err == (
        "note: skipped tensors of a.safetensors that SDXL has no layers for (5): "
        "strange.a, strange.b, strange.c and 2 more\n"
    )
    assert set(load_file(output)) == set(blora_modules(CONTENT))


def test_an_unknown_suffix_is_named_without_its_escapes(tmp_path, capsys):
    strange = {f"{QUERY}.\x1b[2J": torch.zeros(1)}
    lora = write(tmp_path / "strange.safetensors", lora_module(QUERY) | strange)
    assert slice_lora("--loras", lora, "--output_path", tmp_path / "out.safetensors") == 0
    assert capsys.readouterr().err == (
        f"note: copied unknown tensors of strange.safetensors (1): {QUERY}.\\x1b[2J\n"
    )


@pytest.mark.parametrize("end", ["\n", "x", " "])
def test_a_suffix_with_something_behind_it_is_another_one(end):
    assert read_key(f"{QUERY}.lora_up.weight{end}").suffix == f"lora_up.weight{end}"


def test_a_long_name_is_cut_short_where_it_is_named(tmp_path, capsys):
    strange = {f"{QUERY}.{'x' * 60_000}": torch.zeros(1)}
    lora = write(tmp_path / "strange.safetensors", lora_module(QUERY) | strange)
    assert slice_lora("--loras", lora, "--output_path", tmp_path / "out.safetensors") == 0
    err = capsys.readouterr().err
    assert err.endswith("xxx...\n")
    assert len(err) < 400
