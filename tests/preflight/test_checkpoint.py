"""What a checkpoint is, by its name and header.

Whether sd-scripts loads a whole one is asked of its own loader, in test_real_cases.py.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest
from sdxl_checkpoint import Shapes, sdxl_shapes, write_checkpoint

from blora.preflight.checkpoint import check_checkpoint
from blora.preflight.report import Report
from blora.text import BloraError

UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXT_1, TEXT_2 = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
SDXL = sdxl_shapes()
IS_SDXL = {"base": "base.safetensors (SDXL, 6.94 GB)"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def checked(name: str = "base.safetensors", predicts_v: bool = False) -> Report:
    """The report on a checkpoint, with the error that ended the check."""
    report = Report()
    try:
        check_checkpoint(name, predicts_v, report)
    except BloraError as error:
        report.errors.append(str(error))
    return report


def of_shapes(shapes: Shapes, metadata: dict[str, str] | None = None) -> Report:
    write_checkpoint(Path("base.safetensors"), shapes, metadata)
    return checked()


def without(*starts: str) -> Shapes:
    return {name: shape for name, shape in SDXL.items() if not name.startswith(starts)}


# ---- SDXL ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_what_sd_scripts_saves_is_sdxl(metadata):
    assert of_shapes(SDXL, metadata) == Report(plan=IS_SDXL)


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


CONV_IN = f"{UNET}input_blocks.0.0.weight"
DISTILLED = r"\.transformer_blocks\.[4-9]\.|middle_block\.[12]\."
NO_VAE = (
    '"{}" has no VAE, and sd-scripts loads no checkpoint without one, not even with --vae: give '
    "one that has it"
)
IS_NO_SDXL = '"base.safetensors" is {}: give a checkpoint of SDXL itself'
REFUSED: dict[str, tuple[Shapes, str]] = {
    "no VAE": (without(VAE), NO_VAE.format("base.safetensors")),
    "inpainting": (
        SDXL | {CONV_IN: (320, 9, 3, 3)},
        IS_NO_SDXL.format("an inpainting model, whose U-Net takes 9 channels, not SDXL's 4"),
    ),
    "instructed by pictures": (
        SDXL | {CONV_IN: (320, 8, 3, 3)},
        IS_NO_SDXL.format("a model of its own, whose U-Net takes 8 channels, not SDXL's 4"),
    ),
    "distilled": (
        {name: shape for name, shape in SDXL.items() if not re.search(DISTILLED, name)},
        IS_NO_SDXL.format(
            "a distilled model, as SSD-1B and Segmind Vega are: its U-Net has 30 of SDXL's 70 "
            "transformer blocks"
        ),
    ),
    **{
        f"{kind}, by {key}": (
            {key: (1,)},
            f'"base.safetensors" is {kind}, not an SDXL checkpoint: give the one to train on',
        )
        for key, kind in {
            "lora_unet_out_2.alpha": "a LoRA",
            "unet.conv_in.lora_A.weight": "a LoRA",
            "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": "a LoRA",
            "base_model.model.conv_in.lora_A.weight": "a LoRA",
            "conditioner.embedders.0.model.ln_final.weight": "an SDXL refiner",
            "cond_stage_model.transformer.text_model.embeddings.a": "an SD 1.x checkpoint",
            "cond_stage_model.model.ln_final.weight": "an SD 2.x checkpoint",
            "double_blocks.0.img_attn.qkv.weight": "a Flux checkpoint",
            f"{UNET}double_blocks.0.img_attn.qkv.weight": "a Flux checkpoint",
            "joint_blocks.0.x_block.attn.qkv.weight": "an SD3 checkpoint",
            f"{UNET}joint_blocks.0.x_block.attn.qkv.weight": "an SD3 checkpoint",
            "down_blocks.0.resnets.0.conv1.weight": "a diffusers U-Net",
            "decoder.conv_in.weight": "a VAE",
            "encoder.conv_in.weight": "a VAE",
            "anything": "something else",
        }.items()
    },
}


@pytest.mark.parametrize("which", REFUSED)
def test_a_model_that_sd_scripts_cannot_train_is_named_in_the_error(which):
    shapes, sentence = REFUSED[which]
    assert of_shapes(shapes) == Report(errors=[sentence], plan={"base": "base.safetensors"})


def test_a_v_prediction_model_without_its_option_is_a_warning():
    sentence = (
        '"base.safetensors" is a v-prediction model: add --v_parameterization --zero_terminal_snr'
    )
    assert of_shapes(SDXL | {"v_pred": ()}) == Report(warnings=[sentence], plan=IS_SDXL)
    assert checked(predicts_v=True) == Report(plan=IS_SDXL)


# ---- The file ------------------------------------------------------------------------------------

MISSING = (
    'no checkpoint at "{}": correct --pretrained_model_name_or_path (BLORA_CHECKPOINT in the '
    "launcher)"
)
NOT_WHOLE = (
    "base.safetensors is not a whole safetensors file ({}): download it again, or save it as "
    "safetensors"
)
ON_THE_HUB = '"{}" is not a file here, so it is taken for a model of the Hugging Face hub'
NO_CHECKPOINT = (
    '"old.ckpt" is neither a safetensors file nor a torch file: download it again, or give another'
)
NOT_CHECKED = '"old.ckpt" is not a .safetensors file, so it was not checked'
BY_ITS_NAME = (
    '"{}" is a safetensors file, which sd-scripts recognizes by its name alone: give one whose '
    "name ends in .safetensors"
)
NO_INDEX = (
    '"model" is a folder without a model_index.json, so it is not a diffusers model: give the '
    ".safetensors file itself"
)
IS_DIFFUSERS = '"model" is a folder, taken for a diffusers model and not checked'


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (struct.pack("<Q", 99) + b"{", "it ends before its header does"),
        (struct.pack("<Q", 4) + b"nope", "Expecting value: line 1 column 1 (char 0)"),
        (b"", "it ends before its header does"),
        (struct.pack("<Q", 2) + b"{}more", "it is 4 bytes longer than its header says"),
    ],
)
def test_a_file_that_is_not_whole_is_an_error(content, sentence):
    Path("base.safetensors").write_bytes(content)
    assert checked().errors == [NOT_WHOLE.format(sentence)]


@pytest.mark.parametrize(
    ("name", "files", "kind", "sentence"),
    [
        ("base.safetensors", {}, "errors", MISSING),
        ("models/sdxl.safetensors", {}, "errors", MISSING),
        ("a/b/c", {}, "errors", MISSING),
        ("stabilityai/stable-diffusion-xl-base-1.0", {}, "notes", ON_THE_HUB),
        ("me/model", {}, "notes", ON_THE_HUB),
        ("model", {"model/a": b""}, "errors", NO_INDEX),
        ("model", {"model/model_index.json": b""}, "notes", IS_DIFFUSERS),
        ("old.ckpt", {"old.ckpt": b"PK\3\4 and so on"}, "notes", NOT_CHECKED),
        ("old.ckpt", {"old.ckpt": b"\x80\2}q\0."}, "notes", NOT_CHECKED),
        ("old.ckpt", {"old.ckpt": b""}, "errors", NO_CHECKPOINT),
        ("old.ckpt", {"old.ckpt": b"<html></html>"}, "errors", NO_CHECKPOINT),
        ("base.ckpt", {"base.ckpt": struct.pack("<Q", 2) + b"{}"}, "errors", BY_ITS_NAME),
    ],
)
def test_a_name_that_is_no_safetensors_file_is_told_by_what_is_there(name, files, kind, sentence):
    for path, content in files.items():
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_bytes(content)
    assert checked(name) == Report(**{kind: [sentence.format(name)]}, plan={"base": name})


@pytest.mark.parametrize("name", ["", "path/to/sd_xl_base_1.0.safetensors"])
def test_settings_that_are_not_edited_yet_are_an_error(name):
    assert checked(name).errors == [
        "no checkpoint is set yet: give your SDXL checkpoint as --pretrained_model_name_or_path "
        "(BLORA_CHECKPOINT in the launcher)"
    ]


def test_an_ending_in_capitals_is_the_same_ending():
    write_checkpoint(Path("BASE.SAFETENSORS"), SDXL)
    assert checked("BASE.SAFETENSORS").plan == {"base": "BASE.SAFETENSORS (SDXL, 6.94 GB)"}


# ---- Links: sd-scripts opens what os.readlink says -----------------------------------------------


@pytest.mark.parametrize(
    ("link", "target", "sentence"),
    [
        ("models/x.safetensors", "{}/base.safetensors", None),
        ("x.safetensors", "base.safetensors", None),
        ("x.safetensors", "gone.safetensors", MISSING.format("x.safetensors")),
        # As the hub's cache has its files: under a hash.
        ("models/x.safetensors", "{}/31e35c80fc4829d1", BY_ITS_NAME.format("{}/31e35c80fc4829d1")),
        # A relative one is looked for in the working folder.
        (
            "models/x.safetensors",
            "real.safetensors",
            '"models/x.safetensors" is a link to "real.safetensors", which sd-scripts looks for in '
            'the working folder: give "{}/models/real.safetensors" itself',
        ),
        ("models/x.safetensors", "novae.safetensors", NO_VAE.format("novae.safetensors")),
    ],
)
def test_a_link_is_followed_as_sd_scripts_follows_it(folder, link, target, sentence):
    Path("models").mkdir()
    for name in ("base.safetensors", "31e35c80fc4829d1", "models/real.safetensors"):
        write_checkpoint(Path(name), SDXL)
    Path("models/novae.safetensors").touch()
    write_checkpoint(Path("novae.safetensors"), without(VAE))
    Path(link).symlink_to(target.format(folder))
    errors = [sentence.format(folder)] if sentence else []
    base = link if sentence else f"{link} (SDXL, 6.94 GB)"
    assert checked(link) == Report(errors, plan={"base": base})
