"""One module under two names, and LoRAs of other models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lora_files import CONTENT, LAYOUT, STYLE, TE2, blora_modules, lora_module, write
from safetensors.torch import load_file
from slicing import all_traits, refusal, slice_lora, stored
from torch import Tensor

TRAITS = Path(__file__).parents[2] / "blora_traits.json"


# ---- One module under two names ------------------------------------------------------------------

NAME = "lora_unet_output_blocks_0_1_transformer_blocks_0_attn1_to_q"
OTHER = "lora_unet_output_blocks_1_1_transformer_blocks_0_attn1_to_q"
ALIASES = {
    "kohya, diffusers names": (
        "lora_unet_up_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.{}",
        "lora_up.weight",
        "lora_down.weight",
    ),
    "PEFT": (
        "unet.up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.{}",
        "lora_B.weight",
        "lora_A.weight",
    ),
    "ComfyUI": (
        "diffusion_model.output_blocks.0.1.transformer_blocks.0.attn1.to_q.{}",
        "lora_up.weight",
        "lora_down.weight",
    ),
}


def under_two_names(path: Path, alias: str, other: Tensor | None = None) -> Path:
    """A LoRA of two modules, the first of which is there under another name too.

    `other` is its lora_up there, where it is not the same.
    """
    template, up, down = ALIASES[alias]
    tensors = lora_module(NAME, alpha=2.0) | lora_module(OTHER, alpha=2.0)
    second = tensors[f"{NAME}.lora_up.weight"] if other is None else other
    copy = {
        template.format(up): second.clone(),
        template.format(down): tensors[f"{NAME}.lora_down.weight"].clone(),
        template.format("alpha"): tensors[f"{NAME}.alpha"].clone(),
    }
    return write(path, tensors | copy)


def different() -> Tensor:
    """A lora_up of the same shape, of which one number is another."""
    tensor = lora_module(NAME)[f"{NAME}.lora_up.weight"].clone()
    tensor[0, 0] += 1
    return tensor


@pytest.mark.parametrize("alias", ALIASES)
def test_equal_copies_of_a_module_under_two_names_count_once(tmp_path, alias):
    lora = under_two_names(tmp_path / "twice.safetensors", alias)
    output = tmp_path / "out.safetensors"
    args = ("--traits", "all", "--traits_file", all_traits(tmp_path))
    assert slice_lora("--loras", lora, *args, "--output_path", output) == 0
    once = lora_module(NAME, alpha=2.0) | lora_module(OTHER, alpha=2.0)
    assert stored(output) == stored(write(tmp_path / "once.safetensors", once))


@pytest.mark.parametrize("alias", ALIASES)
def test_equal_copies_are_cut_at_a_strength_once(tmp_path, alias):
    lora = under_two_names(tmp_path / "twice.safetensors", alias)
    output = tmp_path / "out.safetensors"
    assert slice_lora("--loras", lora, "--alphas", "0.5", "--output_path", output) == 0
    once = write(tmp_path / "once.safetensors", lora_module(NAME, alpha=2.0))
    expected = tmp_path / "expected.safetensors"
    assert slice_lora("--loras", once, "--alphas", "0.5", "--output_path", expected) == 0
    assert stored(output) == stored(expected)


@pytest.mark.parametrize("alias", ALIASES)
def test_equal_copies_are_shown_once(tmp_path, capsys, alias):
    lora = under_two_names(tmp_path / "twice.safetensors", alias)
    assert slice_lora("--loras", lora, "--inspect", "--json") == 0
    [facts] = json.loads(capsys.readouterr().out)
    assert facts["modules"] == 2


@pytest.mark.parametrize("alias", ALIASES)
@pytest.mark.parametrize("way", [["--inspect"], ["--inspect", "--json"]], ids=" ".join)
def test_a_module_that_differs_under_two_names_can_be_looked_at(tmp_path, capsys, alias, way):
    lora = under_two_names(tmp_path / "twice.safetensors", alias, different())
    assert slice_lora("--loras", lora, *way) == 0
    assert NAME in capsys.readouterr().out.split("duplicate modules")[-1].split("doubled")[-1]


@pytest.mark.parametrize("alias", ALIASES)
def test_a_module_that_differs_under_two_names_stops_no_cut_of_others(tmp_path, alias):
    lora = under_two_names(tmp_path / "twice.safetensors", alias, different())
    output = tmp_path / "out.safetensors"
    assert slice_lora("--loras", lora, "--traits", "style", "--output_path", output) == 0
    alone = write(tmp_path / "alone.safetensors", lora_module(OTHER, alpha=2.0))
    assert stored(output) == stored(alone)


@pytest.mark.parametrize("alias", ALIASES)
@pytest.mark.parametrize("strength", ["1", "0.5"])
def test_a_module_that_differs_under_two_names_is_refused_where_it_would_be_kept(
    tmp_path, capsys, alias, strength
):
    lora = under_two_names(tmp_path / "twice.safetensors", alias, different())
    output = tmp_path / "out.safetensors"
    args = ("--alphas", strength, "--output_path", output)
    assert refusal(capsys, "--loras", lora, *args) == (
        f"{lora} holds {NAME} twice, under two names and with different values: delete one of "
        "them, or exclude the module with a trait's blacklist"
    )
    assert not output.exists()


@pytest.mark.parametrize("alias", ALIASES)
def test_half_a_module_under_another_name_is_a_difference(tmp_path, capsys, alias):
    template, up, _ = ALIASES[alias]
    tensors = lora_module(NAME, alpha=2.0)
    tensors[template.format(up)] = tensors[f"{NAME}.lora_up.weight"].clone()
    lora = write(tmp_path / "twice.safetensors", tensors)
    sentence = refusal(capsys, "--loras", lora, "--output_path", tmp_path / "out.safetensors")
    assert sentence.startswith(f"{lora} holds {NAME} twice, under two names")


@pytest.mark.parametrize("alias", ALIASES)
def test_equal_factors_of_two_alphas_are_a_difference(tmp_path, capsys, alias):
    lora = under_two_names(tmp_path / "twice.safetensors", alias)
    other = ALIASES[alias][0].format("alpha")
    write(lora, load_file(lora) | {other: torch.tensor(1.0)})
    sentence = refusal(capsys, "--loras", lora, "--output_path", tmp_path / "out.safetensors")
    assert sentence.startswith(f"{lora} holds {NAME} twice, under two names")


def test_rotations_of_two_alphas_under_two_names_are_a_difference(tmp_path, capsys):
    aliases = (NAME, ALIASES["kohya, diffusers names"][0].removesuffix(".{}"))
    tensors: dict[str, Tensor] = {}
    for alpha, name in enumerate(aliases):
        tensors |= {f"{name}.oft_blocks": torch.ones(640, 2, 2)}
        tensors |= {f"{name}.alpha": torch.tensor(float(alpha))}
    lora = write(tmp_path / "twice.safetensors", tensors)
    sentence = refusal(capsys, "--loras", lora, "--output_path", tmp_path / "out.safetensors")
    assert sentence.startswith(f"{lora} holds {NAME} twice, under two names")


def test_two_changes_of_one_layer_under_two_names_are_none(tmp_path, capsys):
    """Programs keep one change of a layer, so one of the two would be lost."""
    full = {"lora_unet_up_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.diff": torch.ones(
        1280, 1280
    )}  # fmt: skip
    lora = write(tmp_path / "two.safetensors", lora_module(NAME) | full)
    sentence = refusal(capsys, "--loras", lora, "--output_path", tmp_path / "out.safetensors")
    assert sentence.startswith(f"{lora} holds {NAME} twice, under two names")


# ---- LoRAs of other models -----------------------------------------------------------------------

# SD 1.5 in diffusers' words, as kohya names its modules: block, width, and where attention is.
SD_15 = {
    "down_blocks_0_attentions_0": 320,
    "down_blocks_0_attentions_1": 320,
    "down_blocks_1_attentions_0": 640,
    "down_blocks_1_attentions_1": 640,
    "down_blocks_2_attentions_0": 1280,
    "down_blocks_2_attentions_1": 1280,
    "mid_block_attentions_0": 1280,
    "up_blocks_1_attentions_0": 1280,
    "up_blocks_1_attentions_1": 1280,
    "up_blocks_2_attentions_0": 640,
    "up_blocks_3_attentions_2": 320,
}
TEXT_768 = "lora_te_text_model_encoder_layers_{}_self_attn_{}_proj"


def lora_of(name: str, outputs: int, inputs: int) -> dict[str, Tensor]:
    """A LoRA module of any model."""
    noise = torch.Generator().manual_seed(sum(name.encode()))
    return {
        f"{name}.lora_down.weight": torch.randn(1, inputs, generator=noise).half(),
        f"{name}.lora_up.weight": torch.randn(outputs, 1, generator=noise).half(),
        f"{name}.alpha": torch.tensor(1.0).half(),
    }


def sd_15(attentions: tuple[int, ...] = (1, 2), text: bool = True) -> dict[str, Tensor]:
    """A LoRA of SD 1.5's attention, over a text of tokens 768 wide."""
    tensors: dict[str, Tensor] = {}
    for block, width in SD_15.items():
        for attention in attentions:
            for projection in ("to_q", "to_k", "to_v", "to_out_0"):
                layer = f"lora_unet_{block}_transformer_blocks_0_attn{attention}_{projection}"
                text_side = attention == 2 and projection in ("to_k", "to_v")
                tensors |= lora_of(layer, width, 768 if text_side else width)
    if text:
        for index in (0, 11):
            for projection in "qkv":
                tensors |= lora_of(TEXT_768.format(index, projection), 768, 768)
    return tensors


SDXL = blora_modules(CONTENT, STYLE, LAYOUT)
SDXL |= lora_module("lora_te2_text_model_encoder_layers_0_self_attn_q_proj")
SD_V1 = {"ss_base_model_version": "sd_v1"}
FLUX = {"modelspec.architecture": "flux-1-dev/lora"}
TEXT_ENCODER = "it has lora_te_, the one text encoder of Stable Diffusion 1 and 2"
BLOCK = "it has down_blocks_0_attentions_0, a block that SDXL does not have"
WIDTH = "its attn2 has a text width of 768, not 2048"
# LoRAs of which a part, or all, would fit layers of SDXL: tensors, metadata, what gives them away.
STRANGERS: dict[str, tuple[dict[str, Tensor], dict[str, str] | None, str]] = {
    "SD 1.5": (sd_15(), SD_V1, 'its ss_base_model_version is "sd_v1"'),
    "SD 1.5, no metadata": (sd_15(), None, TEXT_ENCODER),
    "SD 1.5, no text encoder": (sd_15(text=False), None, BLOCK),
    "SD 1.5, self-attention alone": (sd_15((1,), text=False), None, BLOCK),
    "SD 1.5, self-attention and text": (sd_15((1,)), None, TEXT_ENCODER),
    "SD 1.5, a block that both have": (
        {key: t for key, t in sd_15(text=False).items() if "mid_block" in key}, None, WIDTH,
    ),
    "what fits, but of sd_v1": (SDXL, SD_V1, 'its ss_base_model_version is "sd_v1"'),
    "what fits, but of sd_v2_v": (
        SDXL, {"ss_base_model_version": "sd_v2_v"}, 'its ss_base_model_version is "sd_v2_v"',
    ),
    "what fits both, but of stable-diffusion-v1": (
        lora_module(NAME) | lora_module(OTHER),
        {"modelspec.architecture": "stable-diffusion-v1/lora"},
        'its modelspec.architecture is "stable-diffusion-v1/lora"',
    ),
    "Flux": (
        {"lora_unet_double_blocks_0_img_attn_qkv.alpha": torch.ones(1)},
        None,
        "it has lora_unet_double_blocks_0_img_attn_qkv.alpha, and nothing of SDXL's U-Net",
    ),
    "Control-LoRA": (
        SDXL | {"lora_controlnet": torch.zeros(1)},
        None,
        "it has lora_controlnet, which makes it a ControlNet",
    ),
    **{
        f"{model}, of SDXL's text encoders": (
            lora_module(TE2.format(0, "q")) | {f"{layer}.lora_A.weight": torch.ones(1, 8)},
            None,
            f"it has {layer}.lora_A.weight, and nothing of SDXL's U-Net",
        )
        for model, layer in {
            "Stable Diffusion 3": "lora_unet_joint_blocks_0_x",
            "diffusers' Flux": "transformer.single_transformer_blocks.0.attn.to_q",
            "Flux without a prefix": "double_blocks.0.img_attn.qkv",
            "LyCORIS' Flux": "lycoris_transformer_blocks_0_attn_to_q",
            "a third encoder": "lora_te3_encoder_block_0",
        }.items()
    },
    **{
        f"what fits, but of {said}": (
            SDXL, {"ss_base_model_version": said}, f'its ss_base_model_version is "{said}"',
        )
        for said in ("sd3.5-large", "flux1", "SD_V1", "Wan2.1", "hunyuan_video", "HiDream-I1")
    },
    "what fits, but of flux-1-dev": (
        SDXL, FLUX, 'its modelspec.architecture is "flux-1-dev/lora"',
    ),
}  # fmt: skip
# Layers of both models, of one shape in both.
SHARED = {
    "self_attention": "lora_unet_input_blocks_8_1_transformer_blocks_0_attn1",
    "middle": "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q",
    "content": "lora_unet_output_blocks_0_1_transformer_blocks_0_attn1",
}


@pytest.fixture
def traits_file(tmp_path: Path) -> Path:
    """The bundle's traits, and those of layers that would fit."""
    shared = {name: {"whitelist": [start]} for name, start in SHARED.items()}
    path = tmp_path / "traits.json"
    path.write_text(json.dumps(json.loads(TRAITS.read_text()) | shared))
    return path


@pytest.mark.parametrize("strength", ["1", "0.5"])
@pytest.mark.parametrize(("tensors", "metadata", "sign"), STRANGERS.values(), ids=STRANGERS)
def test_a_lora_of_another_model_is_refused_as_that_whatever_the_trait(
    tmp_path, capsys, traits_file, tensors, metadata, sign, strength
):
    lora = write(tmp_path / "stranger.safetensors", tensors, metadata)
    output = tmp_path / "out.safetensors"
    args = ("--traits_file", traits_file, "--alphas", strength, "--output_path", output)
    sentences = {
        refusal(capsys, "--loras", lora, "--traits", trait, *args)
        for trait in json.loads(traits_file.read_text())
    }
    # It is about the file: not that this trait is not in it, nor that one module does not fit.
    assert sentences == {f"{lora} is a LoRA for a different model, not SDXL: {sign}"}
    assert not output.exists()


@pytest.mark.parametrize(("tensors", "metadata", "sign"), STRANGERS.values(), ids=STRANGERS)
def test_a_lora_of_another_model_is_refused_as_the_second_of_a_join(
    tmp_path, capsys, traits_file, tensors, metadata, sign
):
    own = write(tmp_path / "own.safetensors", SDXL, None)
    lora = write(tmp_path / "stranger.safetensors", tensors, metadata)
    output = tmp_path / "out.safetensors"
    args = ("--traits", "style", "self_attention", "--traits_file", traits_file)
    sentence = refusal(capsys, "--loras", own, lora, *args, "--output_path", output)
    assert sentence == f"{lora} is a LoRA for a different model, not SDXL: {sign}"
    assert not output.exists()


# What SDXL's own LoRAs say of their model, or what says nothing.
OWN = {
    "nothing": None,
    "sd-scripts": {"ss_base_model_version": "sdxl_base_v1-0"},
    "sd-scripts of 0.9": {"ss_base_model_version": "sdxl_base_v0-9"},
    "SAI's standard": {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"},
    "SAI's standard, LyCORIS": {"modelspec.architecture": "stable-diffusion-xl-v1-base/lycoris"},
    "no LoRA's architecture": {"modelspec.architecture": "stable-diffusion-xl-v1-base"},
    # which sd-scripts' merges write of any model
    "a merge": {
        "ss_base_model_version": "sdxl_base_v1-0",
        "modelspec.architecture": "stable-diffusion-v1/lora",
    },
    "a merge of sources without metadata": {"modelspec.architecture": "stable-diffusion-v1/lora"},
    **{
        f"a finetune's name: {said}": {"ss_base_model_version": said}
        for said in ("Animagine 3.1", "wanderlust", "Sanami", "reflux_v2")
    },
    "the one entry says SDXL": {
        "ss_base_model_version": "sd_v1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
    },
    "SDXL in capitals": {"ss_base_model_version": "SDXL 1.0, flux-like"},
    "SDXL Turbo": {"modelspec.architecture": "stable-diffusion-XL-turbo"},
    "an empty entry": {"ss_base_model_version": "", "modelspec.architecture": ""},
    "None": {"ss_base_model_version": "None"},
}


@pytest.mark.parametrize("metadata", OWN.values(), ids=OWN)
def test_a_lora_that_does_not_name_another_model_is_cut(tmp_path, capsys, metadata):
    lora = write(tmp_path / "own.safetensors", SDXL, metadata)
    output = tmp_path / "out.safetensors"
    assert slice_lora("--loras", lora, "--output_path", output) == 0
    assert capsys.readouterr().err == ""
    assert set(load_file(output)) == set(blora_modules(CONTENT))


ALONE_SDXLS = {
    "the second text encoder": lora_module(TE2.format(0, "q")) | lora_module(NAME),
    "text of 2048": lora_module(CONTENT.format(0, 2, "v")) | lora_module(NAME),
}


@pytest.mark.parametrize("tensors", ALONE_SDXLS.values(), ids=ALONE_SDXLS)
def test_a_merge_that_is_said_to_be_of_sd_1_is_cut_where_it_has_what_sdxl_alone_has(
    tmp_path, tensors
):
    merged = {"modelspec.architecture": "stable-diffusion-v1/lora"}
    lora, output = write(tmp_path / "a.safetensors", tensors, merged), tmp_path / "out.safetensors"
    assert slice_lora("--loras", lora, "--output_path", output) == 0


def test_a_tensor_of_another_model_beside_a_whole_lora_of_sdxl_stops_no_cut(tmp_path, capsys):
    """Such as an embedding that a trainer bundles, or a layer that only a checkpoint has."""
    strange = {
        "bundle_emb.sks.clip_l": torch.zeros(2, 768),
        "lora_unet_strange.alpha": torch.ones(1),
    }
    lora = write(tmp_path / "own.safetensors", SDXL | strange)
    output = tmp_path / "out.safetensors"
    assert slice_lora("--loras", lora, "--output_path", output) == 0
    assert capsys.readouterr().err.startswith("note: skipped tensors of own.safetensors that SDXL ")
    assert set(load_file(output)) == set(blora_modules(CONTENT))


# ---- What is no LoRA -----------------------------------------------------------------------------

WHOLE = {
    "unet.conv_in.weight": torch.zeros(320, 4, 3, 3),
    "unet.conv_in.bias": torch.zeros(320),
}


def test_the_own_weights_of_layers_are_no_lora(tmp_path, capsys):
    lora = write(tmp_path / "unet.safetensors", WHOLE, None)
    args = ("--traits", "all", "--traits_file", all_traits(tmp_path))
    sentence = refusal(
        capsys, "--loras", lora, *args, "--output_path", tmp_path / "out.safetensors"
    )
    assert sentence == (
        f"{lora} is not an SDXL LoRA: it holds unet.conv_in.bias, unet.conv_in.weight"
    )


@pytest.mark.parametrize("suffix", ["weight", "bias", "base_layer.bias"])
def test_the_own_weight_of_a_layer_beside_its_factors_stops_no_cut(tmp_path, capsys, suffix):
    shape = (1280, 1280) if suffix == "weight" else (1280,)
    layer = "base_model.model.up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    factors = lora_module(NAME, alpha=2.0)
    tensors = {
        f"{layer}.lora_A.weight": factors[f"{NAME}.lora_down.weight"],
        f"{layer}.lora_B.weight": factors[f"{NAME}.lora_up.weight"],
        f"{layer}.alpha": factors[f"{NAME}.alpha"],
    }
    own = {f"{layer}.{suffix}": torch.zeros(shape)}
    lora, output = write(tmp_path / "a.safetensors", tensors | own), tmp_path / "out.safetensors"
    assert slice_lora("--loras", lora, "--alphas", "0.5", "--output_path", output) == 0
    assert set(load_file(output)) == set(factors)
    assert capsys.readouterr().err == (
        "note: skipped plain layer weights in a.safetensors, not part of a LoRA (1): "
        f"{layer}.{suffix}\n"
    )


def test_the_own_weights_of_layers_beside_a_lora_are_skipped_and_named(tmp_path, capsys):
    lora = write(tmp_path / "own.safetensors", SDXL | WHOLE, None)
    output = tmp_path / "out.safetensors"
    assert slice_lora("--loras", lora, "--output_path", output) == 0
    assert set(load_file(output)) == set(blora_modules(CONTENT))
    assert capsys.readouterr().err == (
        "note: skipped plain layer weights in own.safetensors, not part of a LoRA (2): "
        "unet.conv_in.bias, unet.conv_in.weight\n"
    )
