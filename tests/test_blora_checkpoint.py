"""Which checkpoints sd-scripts can load, told by their headers.

Each verdict here is that of load_models_from_sdxl_checkpoint of sd-scripts 0.9.1 and 0.10.1, given
tensors of these names and shapes on torch's meta device.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest
from sdxl_checkpoint import Shapes, sdxl_shapes, write_checkpoint

from blora.preflight import checkpoint
from blora.preflight.report import Report
from blora.text import BloraError

UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXT_1, TEXT_2 = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
SDXL = sdxl_shapes()
BASE = Path("base.safetensors")
CORRECT = "correct --pretrained_model_name_or_path (BLORA_CHECKPOINT in the launcher)"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def checked(name: object = BASE, predicts_v: bool = False) -> Report:
    """The report on a checkpoint, with the error that ended the check."""
    report = Report()
    try:
        checkpoint.check_checkpoint(str(name), predicts_v, report)
    except BloraError as error:
        report.errors.append(str(error))
    return report


def of_shapes(shapes: Shapes, metadata: dict[str, str] | None = None) -> Report:
    """The report on a file of these tensors, which is gone afterwards."""
    write_checkpoint(BASE, shapes, metadata)
    report = checked()
    BASE.unlink()
    return report


def without(*starts: str) -> Shapes:
    return {name: shape for name, shape in SDXL.items() if not name.startswith(starts)}


# ---- SDXL ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_what_sd_scripts_saves_is_sdxl(metadata):
    report = of_shapes(SDXL, metadata)
    assert (report.errors, report.warnings, report.notes) == ([], [], [])
    assert report.plan == {"base": "base.safetensors (SDXL, 6.94 GB)"}


def test_every_tensor_that_sd_scripts_saves_is_asked_for_but_the_logit_scale():
    asked = {}
    for part in checkpoint.sdxl_parts():
        asked |= part.tensors
    assert asked == without(f"{TEXT_2}logit_scale")


ATTENTION = [name for name in SDXL if re.search(r"mid\.attn_1\.(q|k|v|proj_out)\.weight", name)]
LOADED = {
    "no logit_scale": without(f"{TEXT_2}logit_scale"),
    "positions in the first text encoder": SDXL
    | {f"{TEXT_1}text_model.embeddings.position_ids": (1, 77)},
    "positions in the second text encoder": SDXL
    | {f"{TEXT_2}transformer.text_model.embeddings.position_ids": (1, 77)},
    "Playground's projection": without(f"{TEXT_2}text_projection")
    | {f"{TEXT_2}text_projection.weight": (1280, 1280)},
    "matrices in the VAE": SDXL | dict.fromkeys(ATTENTION, (512, 512)),
    "the VAE's own training": SDXL | {f"{VAE}loss.logvar": (), f"{VAE}model_ema.decay": ()},
    "tensors of no part": SDXL | {"model_ema.decay": (), "denoiser.sigmas": (1000,), "ztsnr": ()},
    "a third text encoder": SDXL | {"conditioner.embedders.2.weight": (1,)},
}


@pytest.mark.parametrize("checkpoint", LOADED)
def test_what_the_loader_passes_over_is_no_error(checkpoint):
    assert of_shapes(LOADED[checkpoint]).errors == []


CONV_IN = f"{UNET}input_blocks.0.0.weight"
NOT_AS_NEEDED = 'the {} of "base.safetensors" is not as sd-scripts needs it, it {}: download it '
NOT_AS_NEEDED += "again, or give the checkpoint that it was made from"
ALL_PARTS = ": give a checkpoint with all parts of SDXL"
NO_VAE = (
    '"base.safetensors" has no VAE, and sd-scripts loads no checkpoint without one, not even with '
    "--vae: give one that has it"
)
ITSELF = ": give a checkpoint of SDXL itself"
DISTILLED = (
    '"base.safetensors" is a distilled model, as SSD-1B and Segmind Vega are: its U-Net has {} of '
    "SDXL's 70 transformer blocks" + ITSELF
)
EXTRA = "has 1 that SDXL does not have ({})"
MIDDLE = f"{UNET}middle_block.1.proj_in.weight"
REFUSED: dict[str, tuple[Shapes, list[str]]] = {
    "no VAE": (without(VAE), [NO_VAE]),
    "no first text encoder": (
        without(TEXT_1),
        [f'"base.safetensors" has no first text encoder{ALL_PARTS}'],
    ),
    "no second text encoder": (
        without(TEXT_2),
        [f'"base.safetensors" has no second text encoder{ALL_PARTS}'],
    ),
    "no U-Net": (without(UNET), [f'"base.safetensors" has no U-Net{ALL_PARTS}']),
    "a U-Net alone": (
        without(TEXT_1, TEXT_2, VAE),
        [
            '"base.safetensors" has no first text encoder, no second text encoder and no '
            f"VAE{ALL_PARTS}"
        ],
    ),
    "half a VAE": (
        without(f"{VAE}encoder"),
        [
            NOT_AS_NEEDED.format(
                "VAE",
                f"lacks 106 of its 248 tensors ({VAE}encoder.conv_in.weight, "
                f"{VAE}encoder.conv_in.bias, {VAE}encoder.mid.block_1.norm1.weight and 103 more)",
            )
        ],
    ),
    "inpainting": (
        SDXL | {CONV_IN: (320, 9, 3, 3)},
        [
            '"base.safetensors" is an inpainting model, whose U-Net takes 9 channels, not '
            f"SDXL's 4{ITSELF}"
        ],
    ),
    "instructed by pictures": (
        SDXL | {CONV_IN: (320, 8, 3, 3)},
        [
            '"base.safetensors" is a model of its own, whose U-Net takes 8 channels, not '
            f"SDXL's 4{ITSELF}"
        ],
    ),
    "distilled": (
        {
            name: shape
            for name, shape in SDXL.items()
            if not re.search(r"\.transformer_blocks\.[4-9]\.|middle_block\.[12]\.", name)
        },
        [DISTILLED.format(4 * 5 + 2 * 5)],
    ),
    "one tensor too few": (
        without(f"{UNET}out.2.bias"),
        [NOT_AS_NEEDED.format("U-Net", f"lacks 1 of its 1,680 tensors ({UNET}out.2.bias)")],
    ),
    "scales of fp8": (
        SDXL | {f"{UNET}scaled_fp8": (0,)},
        [NOT_AS_NEEDED.format("U-Net", EXTRA.format(f"{UNET}scaled_fp8"))],
    ),
    "kernels for matrices": (
        SDXL | {MIDDLE: (1280, 1280, 1, 1)},
        [
            NOT_AS_NEEDED.format(
                "U-Net",
                f"has 1 of another shape ({MIDDLE} is [1280, 1280, 1, 1], not [1280, 1280])",
            )
        ],
    ),
    "a projection in the first text encoder": (
        SDXL | {f"{TEXT_1}text_projection.weight": (768, 768)},
        [
            NOT_AS_NEEDED.format(
                "first text encoder", EXTRA.format(f"{TEXT_1}text_projection.weight")
            )
        ],
    ),
    "no projection in the second": (
        without(f"{TEXT_2}text_projection"),
        [
            NOT_AS_NEEDED.format(
                "second text encoder", f"lacks 1 of its 389 tensors ({TEXT_2}text_projection)"
            )
        ],
    ),
    "a mask in the second": (
        SDXL | {f"{TEXT_2}attn_mask": (77, 77)},
        [NOT_AS_NEEDED.format("second text encoder", EXTRA.format(f"{TEXT_2}attn_mask"))],
    ),
    "a scale in a block of the second": (
        SDXL | {f"{TEXT_2}transformer.resblocks.0.logit_scale": ()},
        [
            NOT_AS_NEEDED.format(
                "second text encoder", EXTRA.format(f"{TEXT_2}transformer.resblocks.0.logit_scale")
            )
        ],
    ),
    "a deeper VAE": (
        SDXL | {f"{VAE}decoder.up.4.block.0.conv1.weight": (512, 512, 3, 3)},
        [NOT_AS_NEEDED.format("VAE", EXTRA.format(f"{VAE}decoder.up.4.block.0.conv1.weight"))],
    ),
    "a wider VAE": (
        SDXL | {ATTENTION[0]: (512, 256, 1, 1)},
        [
            NOT_AS_NEEDED.format(
                "VAE",
                f"has 1 of another shape ({ATTENTION[0]} is [512, 256, 1, 1], not [512, 512, 1, "
                "1])",
            )
        ],
    ),
    "two parts": (
        without(VAE, f"{UNET}out.2") | {f"{TEXT_2}attn_mask": (77, 77), "x": ()},
        [
            NO_VAE,
            NOT_AS_NEEDED.format(
                "U-Net", f"lacks 2 of its 1,680 tensors ({UNET}out.2.weight, {UNET}out.2.bias)"
            ),
            NOT_AS_NEEDED.format("second text encoder", EXTRA.format(f"{TEXT_2}attn_mask")),
        ],
    ),
    "lacking and more": (
        without(f"{UNET}out.2.bias") | {f"{UNET}v_pred": ()},
        [
            NOT_AS_NEEDED.format(
                "U-Net",
                f"lacks 1 of its 1,680 tensors ({UNET}out.2.bias) and "
                + EXTRA.format(f"{UNET}v_pred"),
            )
        ],
    ),
}


@pytest.mark.parametrize("checkpoint", REFUSED)
def test_what_the_loader_refuses_is_an_error_of_its_part(checkpoint):
    shapes, sentences = REFUSED[checkpoint]
    report = of_shapes(shapes)
    assert report.errors == sentences
    assert report.plan == {"base": "base.safetensors"}


OTHER_MODELS = {
    "lora_unet_out_2.alpha": "a LoRA",
    "unet.conv_in.lora_A.weight": "a LoRA",
    "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": "a LoRA",
    "base_model.model.conv_in.lora_A.weight": "a LoRA",
    "conditioner.embedders.0.model.ln_final.weight": "an SDXL refiner",
    "cond_stage_model.transformer.text_model.final_layer_norm.weight": "an SD 1.x checkpoint",
    "cond_stage_model.model.ln_final.weight": "an SD 2.x checkpoint",
    "double_blocks.0.img_attn.qkv.weight": "a Flux checkpoint",
    "model.diffusion_model.double_blocks.0.img_attn.qkv.weight": "a Flux checkpoint",
    "joint_blocks.0.x_block.attn.qkv.weight": "an SD3 checkpoint",
    "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": "an SD3 checkpoint",
    "down_blocks.0.resnets.0.conv1.weight": "a diffusers U-Net",
    "decoder.conv_in.weight": "a VAE",
    "anything": "something else",
}


@pytest.mark.parametrize("key", OTHER_MODELS)
def test_a_model_of_another_family_is_named_in_the_error(key):
    assert of_shapes({key: (1,)}).errors == [
        f'"base.safetensors" is {OTHER_MODELS[key]}, not an SDXL checkpoint: give the one to '
        "train on"
    ]


def test_a_v_prediction_model_without_its_option_is_a_warning():
    sentence = '"base.safetensors" says it predicts v: add --v_parameterization --zero_terminal_snr'
    write_checkpoint(BASE, SDXL | {"v_pred": ()})
    assert checked().warnings == [sentence]
    assert checked(predicts_v=True).warnings == []


# ---- The file ------------------------------------------------------------------------------------


NOT_WHOLE = (
    "base.safetensors is not a whole safetensors file ({}): download it again, or save it as "
    "safetensors"
)
BROKEN = {
    "cut off in the header": (struct.pack("<Q", 99) + b"{", "it ends before its header does"),
    "no JSON": (struct.pack("<Q", 4) + b"nope", "Expecting value: line 1 column 1 (char 0)"),
    "empty": (b"", "it ends before its header does"),
    "too long": (struct.pack("<Q", 2) + b"{}more", "it is 4 bytes longer than its header says"),
}


@pytest.mark.parametrize("file", BROKEN)
def test_a_file_that_is_not_whole_is_an_error(file):
    content, why = BROKEN[file]
    BASE.write_bytes(content)
    assert checked().errors == [NOT_WHOLE.format(why)]


@pytest.mark.parametrize("name", ["base.safetensors", "models/sdxl.safetensors", "a/b/c"])
def test_a_file_that_is_missing_is_an_error(name):
    assert checked(name).errors == [f'no checkpoint at "{name}": {CORRECT}']


@pytest.mark.parametrize("name", ["", "path/to/sd_xl_base_1.0.safetensors"])
def test_settings_that_are_not_edited_yet_are_an_error(name):
    assert checked(name).errors == [
        "no checkpoint is set yet: give your SDXL checkpoint as --pretrained_model_name_or_path "
        "(BLORA_CHECKPOINT in the launcher)"
    ]


def test_a_folder_is_a_model_of_diffusers_if_it_has_its_index():
    Path("model").mkdir()
    assert checked("model").errors == [
        '"model" is a folder without a model_index.json, so it is not a diffusers model: give the '
        ".safetensors file itself"
    ]
    Path("model/model_index.json").touch()
    report = checked("model")
    assert report.errors == []
    assert report.notes == ['"model" is a folder, taken for a diffusers model and not checked']


@pytest.mark.parametrize("name", ["stabilityai/stable-diffusion-xl-base-1.0", "me/model"])
def test_a_name_of_the_hub_passes_with_a_note(name):
    report = checked(name)
    note = f'"{name}" is not a file here, so it is taken for a model of the Hugging Face hub'
    assert (report.errors, report.notes) == ([], [note])


@pytest.mark.parametrize("content", [b"PK\3\4 and so on", b"\x80\2}q\0."])
def test_a_file_of_torch_passes_with_a_note(content):
    Path("old.ckpt").write_bytes(content)
    report = checked("old.ckpt")
    note = '"old.ckpt" is not a .safetensors file, so it was not checked'
    assert (report.errors, report.notes) == ([], [note])


@pytest.mark.parametrize("content", [b"", b"<html></html>"])
def test_a_file_that_is_no_checkpoint_at_all_is_an_error(content):
    Path("old.ckpt").write_bytes(content)
    assert checked("old.ckpt").errors == [
        '"old.ckpt" is neither a safetensors file nor a torch file: download it again, or give '
        "another"
    ]


def test_safetensors_by_another_name_is_an_error():
    write_checkpoint(Path("base.ckpt"), SDXL)
    assert checked("base.ckpt").errors == [
        '"base.ckpt" is a safetensors file, which sd-scripts recognizes by its name alone: '
        "give one whose name ends in .safetensors"
    ]


def test_an_ending_in_capitals_is_the_same_ending():
    write_checkpoint(Path("BASE.SAFETENSORS"), SDXL)
    report = checked("BASE.SAFETENSORS")
    assert report.errors == []
    assert "SDXL" in report.plan["base"]


# ---- Links: sd-scripts opens what os.readlink says -----------------------------------------------


def link(path: str, target: object) -> None:
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).symlink_to(str(target))


def test_a_link_with_an_absolute_target_is_fine(folder):
    write_checkpoint(BASE, SDXL)
    link("models/x.safetensors", folder / BASE)
    report = checked("models/x.safetensors")
    assert report.errors == []
    assert report.plan["base"] == "models/x.safetensors (SDXL, 6.94 GB)"


def test_a_relative_link_is_looked_for_in_the_working_folder(folder):
    link("models/x.safetensors", "real.safetensors")
    write_checkpoint(Path("models/real.safetensors"), SDXL)
    assert checked("models/x.safetensors").errors == [
        '"models/x.safetensors" is a link to "real.safetensors", which sd-scripts looks for in the '
        f'working folder: give "{folder}/models/real.safetensors" itself'
    ]
    write_checkpoint(Path("real.safetensors"), without(VAE))
    [error] = checked("models/x.safetensors").errors
    assert error == NO_VAE.replace("base.safetensors", "real.safetensors")


def test_a_link_beside_its_target_is_fine():
    write_checkpoint(BASE, SDXL)
    link("x.safetensors", BASE)
    assert checked("x.safetensors").errors == []


def test_a_link_to_nothing_is_a_missing_checkpoint():
    link("x.safetensors", "gone.safetensors")
    assert checked("x.safetensors").errors == [f'no checkpoint at "x.safetensors": {CORRECT}']


def test_a_link_to_a_file_by_another_name_is_loaded_by_that_name(folder):
    """As the hub's cache has its files: under a hash."""
    write_checkpoint(Path("31e35c80fc4829d1"), SDXL)
    link("models/x.safetensors", folder / "31e35c80fc4829d1")
    [error] = checked("models/x.safetensors").errors
    assert error.startswith(f'"{folder}/31e35c80fc4829d1" is a safetensors file, which sd-scripts ')
