"""One module under two names, LoRAs of other models, and what is no LoRA."""

from __future__ import annotations

import json

import pytest
import torch
from lora_files import CONTENT, LAYOUT, STYLE, TE2, blora_modules, lora_module, write
from safetensors.torch import load_file
from slicing import all_traits, everything, stored
from torch import Tensor

Tensors = dict[str, Tensor]
NAME, OTHER = CONTENT.format(0, 1, "q"), STYLE.format(0, 1, "q")

PEFT = "unet.up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
ALIAS = "lora_unet_up_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
ALIASES = {
    "kohya, diffusers names": ALIAS,
    "PEFT": PEFT,
    "ComfyUI": "diffusion_model.output_blocks.0.1.transformer_blocks.0.attn1.to_q",
}
ONE, SECOND = lora_module(NAME, alpha=2.0), lora_module(OTHER, alpha=2.0)


def renamed(tensors: Tensors, alias: str) -> Tensors:
    """Copies of a module's tensors under another of its names."""
    up, down = ("lora_B", "lora_A") if alias == PEFT else ("lora_up", "lora_down")
    return {
        key.replace(NAME, alias).replace("lora_up", up).replace("lora_down", down): tensor.clone()
        for key, tensor in tensors.items()
    }


@pytest.mark.parametrize("alias", ALIASES.values(), ids=ALIASES)
def test_equal_copies_of_a_module_under_two_names_count_once(slicer, alias):
    lora = write(slicer.folder / "twice.safetensors", ONE | SECOND | renamed(ONE, alias))
    once = write(slicer.folder / "once.safetensors", ONE | SECOND)
    for way in (everything(slicer.folder), ("--alphas", "0.5")):
        assert slicer(lora, *way) == 0
        found = stored(slicer.output)
        assert slicer(once, *way) == 0
        assert found == stored(slicer.output)
    assert slicer(lora, "--inspect", "--json") == 0
    [facts] = json.loads(slicer.out)
    assert facts["modules"] == 2


UP = f"{NAME}.lora_up.weight"
OTHER_UP = ONE[UP].clone()
OTHER_UP[0, 0] += 1
DIFFERENT = {
    "one number": ONE | {UP: OTHER_UP},
    "half of it": {UP: ONE[UP]},
    "another alpha": ONE | {f"{NAME}.alpha": torch.tensor(1.0)},
}
ROTATION = {f"{NAME}.oft_blocks": torch.ones(640, 2, 2), f"{NAME}.alpha": torch.tensor(0.0)}
TWICE = {
    f"{what}, {alias}": ONE | renamed(copy, ALIASES[alias])
    for what, copy in DIFFERENT.items()
    for alias in ALIASES
} | {
    "rotations of two alphas": ROTATION
    | renamed(ROTATION | {f"{NAME}.alpha": torch.tensor(1.0)}, ALIAS),
    # Programs keep one change of a layer, so one of the two would be lost.
    "two kinds of change": ONE | {f"{ALIAS}.diff": torch.ones(1280, 1280)},
}


@pytest.mark.parametrize("tensors", TWICE.values(), ids=TWICE)
def test_a_module_that_differs_under_two_names_is_refused_only_where_it_would_be_kept(
    slicer, tensors
):
    lora = write(slicer.folder / "twice.safetensors", tensors | SECOND)
    for strength in ("1", "0.5"):
        assert slicer(lora, "--alphas", strength) == 1
        assert slicer.sentence == (
            f"{lora} holds {NAME} twice, under two names and with different values: delete one of "
            "them, or exclude the module with a trait's blacklist"
        )
    assert slicer(lora, "--traits", "style") == 0
    assert stored(slicer.output) == stored(write(slicer.folder / "style.safetensors", SECOND))
    assert slicer(lora, "--inspect") == 0
    assert f"duplicate modules (1): {NAME}" in slicer.out
    assert slicer(lora, "--inspect", "--json") == 0
    [facts] = json.loads(slicer.out)
    assert facts["doubled"] == [NAME]


# ---- LoRAs of other models -----------------------------------------------------------------------

# Blocks of SD 1.5 with attention, in diffusers' words as kohya names modules, and their widths.
SD_15 = {"mid_block_attentions_0": 1280, "down_blocks_0_attentions_0": 320}


def lora_of(name: str, outputs: int, inputs: int) -> Tensors:
    up, down = torch.ones(outputs, 1).half(), torch.ones(1, inputs).half()
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}


def sd_15(attentions: tuple[int, ...] = (1, 2), text: bool = True) -> Tensors:
    """A LoRA of SD 1.5's attention, over a text of tokens 768 wide."""
    tensors: Tensors = {}
    for block, width in SD_15.items():
        for attention in attentions:
            for projection in ("to_q", "to_k", "to_v", "to_out_0"):
                layer = f"lora_unet_{block}_transformer_blocks_0_attn{attention}_{projection}"
                reads_text = attention == 2 and projection in ("to_k", "to_v")
                tensors |= lora_of(layer, width, 768 if reads_text else width)
    for layer in ((0, "q"), (11, "v")) if text else ():
        tensors |= lora_of(TE2.replace("te2", "te").format(*layer), 768, 768)
    return tensors


TEXT, ROW = lora_module(TE2.format(0, "q")), torch.ones(1, 8)
SDXL = blora_modules(CONTENT, STYLE, LAYOUT) | TEXT
MID_BLOCK = {key: tensor for key, tensor in sd_15(text=False).items() if "mid_block" in key}
VERSION, ARCHITECTURE = "ss_base_model_version", "modelspec.architecture"
TEXT_ENCODER = "it has lora_te_, the one text encoder of Stable Diffusion 1 and 2"
BLOCK = "it has down_blocks_0_attentions_0, a block that SDXL does not have"
NO_UNET = "it has {}, and nothing of SDXL's U-Net"
# Keys of which a LoRA of SDXL's text encoders is another model's, by that model.
OTHERS_KEYS = {
    "Stable Diffusion 3": "lora_unet_joint_blocks_0_x.lora_A.weight",
    "Flux": "lora_unet_double_blocks_0_img_attn_qkv.alpha",
    "diffusers' Flux": "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight",
    "Flux without a prefix": "double_blocks.0.img_attn.qkv.lora_A.weight",
    "LyCORIS' Flux": "lycoris_transformer_blocks_0_attn_to_q.lora_A.weight",
    "a third encoder": "lora_te3_encoder_block_0.lora_A.weight",
}
# What the metadata of LoRAs of other models say.
OTHERS_WORDS = {
    VERSION: "sd_v1 sd_v2_v sd3.5-large SD_V1 flux1 Wan2.1 hunyuan_video HiDream-I1",
    ARCHITECTURE: "flux-1-dev/lora",
}
# LoRAs of which a part, or all, would fit layers of SDXL: tensors, metadata, what gives them away.
STRANGERS: dict[str, tuple[Tensors, dict[str, str], str]] = {
    "SD 1.5": (sd_15(), {VERSION: "sd_v1"}, f'its {VERSION} is "sd_v1"'),
    "SD 1.5, no metadata": (sd_15(), {}, TEXT_ENCODER),
    "SD 1.5, no text encoder": (sd_15(text=False), {}, BLOCK),
    "SD 1.5, self-attention alone": (sd_15((1,), text=False), {}, BLOCK),
    "a block that both have": (MID_BLOCK, {}, "its attn2 has a text width of 768, not 2048"),
    "what fits both, but of stable-diffusion-v1": (
        ONE | SECOND,
        {ARCHITECTURE: "stable-diffusion-v1/lora"},
        f'its {ARCHITECTURE} is "stable-diffusion-v1/lora"',
    ),
    "Control-LoRA": (
        SDXL | {"lora_controlnet": torch.zeros(1)},
        {},
        "it has lora_controlnet, which makes it a ControlNet",
    ),
    **{
        f"{model}, of SDXL's text encoders": (TEXT | {key: ROW}, {}, NO_UNET.format(key))
        for model, key in OTHERS_KEYS.items()
    },
    "Flux": ({OTHERS_KEYS["Flux"]: ROW}, {}, NO_UNET.format(OTHERS_KEYS["Flux"])),
    **{
        f"what fits, but of {said}": (ONE | SECOND, {entry: said}, f'its {entry} is "{said}"')
        for entry, words in OTHERS_WORDS.items()
        for said in words.split()
    },
    "what fits all, but of Kolors": (SDXL, {VERSION: "Kolors"}, f'its {VERSION} is "Kolors"'),
}
# Layers of both models, of one shape in both.
SHARED = {
    "self_attention": "lora_unet_input_blocks_8_1_transformer_blocks_0_attn1",
    "middle": "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q",
    "content": "lora_unet_output_blocks_0_1_transformer_blocks_0_attn1",
    "nothing": "lora_unet_out_2",
}


@pytest.mark.parametrize(("tensors", "metadata", "sign"), STRANGERS.values(), ids=STRANGERS)
def test_a_lora_of_another_model_is_refused_as_that_whatever_the_trait(
    slicer, tensors, metadata, sign
):
    lora = write(slicer.folder / "stranger.safetensors", tensors, metadata)
    own = write(slicer.folder / "own.safetensors", SDXL, {})
    traits_file = all_traits(slicer.folder, **SHARED)
    runs = [*((lora, "--traits", trait) for trait in SHARED), (lora, "--alphas", "0.5")]
    for run in (*runs, (own, lora, "--traits", "content", "self_attention")):
        assert slicer(*run, "--traits_file", traits_file) == 1
        # It is about the file: not that this trait is not in it, nor that one module does not fit.
        assert slicer.sentence == f"{lora} is a LoRA for a different model, not SDXL: {sign}"


@pytest.mark.parametrize(
    ("entry", "word"), [(entry, w) for entry, words in OTHERS_WORDS.items() for w in words.split()]
)
def test_attention_to_a_text_of_sdxls_width_is_sdxls_whatever_the_metadata_say(slicer, entry, word):
    lora = write(slicer.folder / "a.safetensors", SDXL, {entry: word})
    assert slicer(lora) == 0
    assert slicer.err == (
        f'warning: its {entry} is "{word}", but the layers of a.safetensors are SDXL\'s\n'
    )
    assert set(load_file(slicer.output)) == set(blora_modules(CONTENT))


# What SDXL's own LoRAs say of their model, or what says nothing: version and architecture.
OWN = [
    (None, None),
    ("sdxl_base_v1-0", None),
    (None, "stable-diffusion-xl-v1-base/lora"),
    # which sd-scripts' merges write of any model
    ("sdxl_base_v1-0", "stable-diffusion-v1/lora"),
    (None, "stable-diffusion-v1/lora"),
    # a finetune's own name
    *((name, None) for name in ("Animagine 3.1", "wanderlust", "Sanami", "reflux_v2")),
    ("sd_v1", "stable-diffusion-xl-v1-base/lora"),
    ("SDXL 1.0, flux-like", None),
    (None, "stable-diffusion-XL-v1, flux-like"),
    ("", ""),
    ("None", None),
]


@pytest.mark.parametrize(("version", "architecture"), OWN)
def test_a_lora_that_does_not_name_another_model_is_cut(slicer, version, architecture):
    entries = {VERSION: version, ARCHITECTURE: architecture}
    metadata = {name: value for name, value in entries.items() if value is not None}
    assert slicer(write(slicer.folder / "own.safetensors", SDXL, metadata)) == 0
    assert slicer.err == ""
    assert set(load_file(slicer.output)) == set(blora_modules(CONTENT))


@pytest.mark.parametrize("layer", [TE2.format(0, "q"), *(CONTENT.format(0, 2, x) for x in "kv")])
def test_a_merge_that_is_said_to_be_of_sd_1_is_cut_where_it_has_what_sdxl_alone_has(slicer, layer):
    merged = {ARCHITECTURE: "stable-diffusion-v1/lora"}
    assert slicer(write(slicer.folder / "a.safetensors", ONE | lora_module(layer), merged)) == 0


WHOLE = {"unet.conv_in.weight": torch.zeros(320, 4, 3, 3), "unet.conv_in.bias": torch.zeros(320)}
OWN_WEIGHTS = "plain layer weights, not part of a LoRA"
BIASES = "trained biases, which are whole ones: only PEFT can load them"
# What a file holds, what the note says of it, and what the content of it is.
SKIPPED: dict[str, tuple[Tensors, str, Tensors]] = {
    # such as an embedding that a trainer bundles, or a layer that only a checkpoint has
    "tensors of another model": (
        SDXL | {f"bundle_emb.{letter}": torch.zeros(2) for letter in "abcde"},
        "tensors with unknown names (5): bundle_emb.a, bundle_emb.b, bundle_emb.c and 2 more",
        blora_modules(CONTENT),
    ),
    "weights of another layer": (
        SDXL | WHOLE,
        f"{OWN_WEIGHTS} (2): unet.conv_in.bias, unet.conv_in.weight",
        blora_modules(CONTENT),
    ),
    **{
        f"a layer's own {suffix}": (
            renamed(ONE, PEFT) | {f"{PEFT}.{suffix}": torch.zeros(shape)},
            f"{why} (1): {PEFT}.{suffix}",
            ONE,
        )
        for part, shape, why in (("weight", (1280, 1280), OWN_WEIGHTS), ("bias", (1280,), BIASES))
        for suffix in (part, f"base_layer.{part}")
    },
}


@pytest.mark.parametrize(("tensors", "note", "kept"), SKIPPED.values(), ids=SKIPPED)
def test_what_is_not_part_of_a_lora_is_skipped_and_named(slicer, tensors, note, kept):
    assert slicer(write(slicer.folder / "a.safetensors", tensors), "--alphas", "0.5") == 0
    level = "warning" if BIASES in note else "note"
    assert slicer.err == f"{level}: skipped in a.safetensors: {note}\n"
    assert set(load_file(slicer.output)) == set(kept)


def test_the_own_weights_of_layers_are_no_lora(slicer):
    lora = write(slicer.folder / "unet.safetensors", WHOLE, None)
    assert slicer(lora) == 1
    assert slicer.sentence == (
        f"{lora} is not a LoRA: it holds plain layer weights (unet.conv_in.bias, "
        "unet.conv_in.weight)"
    )
