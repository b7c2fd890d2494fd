"""What a checkpoint is, by its name and header.

Whether sd-scripts loads a whole one is asked of its own loader, in test_real_cases.py.
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


CONV_IN = f"{UNET}input_blocks.0.0.weight"
NO_VAE = (
    '"base.safetensors" has no VAE, and sd-scripts loads no checkpoint without one, not even with '
    "--vae: give one that has it"
)
IS_NO_SDXL = '"base.safetensors" is {}: give a checkpoint of SDXL itself'
REFUSED: dict[str, tuple[Shapes, str]] = {
    "no VAE": (without(VAE), NO_VAE),
    "inpainting": (
        SDXL | {CONV_IN: (320, 9, 3, 3)},
        IS_NO_SDXL.format("an inpainting model, whose U-Net takes 9 channels, not SDXL's 4"),
    ),
    "instructed by pictures": (
        SDXL | {CONV_IN: (320, 8, 3, 3)},
        IS_NO_SDXL.format("a model of its own, whose U-Net takes 8 channels, not SDXL's 4"),
    ),
    "distilled": (
        {
            name: shape
            for name, shape in SDXL.items()
            if not re.search(r"\.transformer_blocks\.[4-9]\.|middle_block\.[12]\.", name)
        },
        IS_NO_SDXL.format(
            "a distilled model, as SSD-1B and Segmind Vega are: its U-Net has 30 of SDXL's 70 "
            "transformer blocks"
        ),
    ),
}


@pytest.mark.parametrize("which", REFUSED)
def test_a_model_of_sdxls_family_that_sd_scripts_cannot_train_is_named(which):
    shapes, sentence = REFUSED[which]
    report = of_shapes(shapes)
    assert report.errors == [sentence]
    assert report.plan == {"base": "base.safetensors"}


LEFT_TO_THE_LOADER = {
    "one tensor too few": without(f"{UNET}out.2.bias"),
    "one of another shape": SDXL | {f"{UNET}middle_block.1.proj_in.weight": (1280, 1280, 1, 1)},
    "more than SDXL has": SDXL | {f"{TEXT_2}attn_mask": (77, 77), "model_ema.decay": ()},
    "no first text encoder": without(TEXT_1),
    "half a VAE": without(f"{VAE}encoder"),
}


@pytest.mark.parametrize("which", LEFT_TO_THE_LOADER)
def test_what_is_missing_or_more_is_left_to_the_trainers_loader(which):
    assert of_shapes(LEFT_TO_THE_LOADER[which]).errors == []


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
    sentence = (
        '"base.safetensors" is a v-prediction model: add --v_parameterization --zero_terminal_snr'
    )
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
