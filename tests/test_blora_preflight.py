"""What blora_preflight.py finds before a training begins."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import lycoris.config
import lycoris.config_sdk
import pytest
import torch
from kohya_folder import ROOT
from lycoris_releases import LYCORIS, PRESETS, trained
from preflight_folder import (
    CONFIG,
    OPTIONS,
    OURS,
    WITH_BYPASS,
    checked,
    edit_config,
    make_trainable,
    words,
)
from safetensors.torch import save_file

import blora_preflight
import blora_preset

SDXL = json.loads((ROOT / "tests/data/sdxl_modules.json").read_text())


@pytest.fixture
def kohya(tmp_path, monkeypatch) -> Path:
    """A folder in which a training could begin; it is the working directory."""
    return make_trainable(tmp_path, monkeypatch)


# ---- The preset ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_it_announces_the_modules_that_lycoris_trains(kohya, capsys, preset):
    args = [f"preset=lycoris_presets/{preset}.toml"]
    report = checked(capsys, network_args=args, network_train_unet_only=None)
    modules = trained(LYCORIS[-1])[preset]
    assert sorted(report["modules"]) == sorted(modules["unet"] + modules["text_encoders"])


CUSTOM = {
    "by class": 'unet_target_module = ["CrossAttention"]\nunet_target_name = []',
    "feed-forward by class": 'unet_target_module = ["FeedForward"]\nunet_target_name = []',
    "with convolutions": "enable_conv = true",
    "without convolutions": "enable_conv = false",
    "by glob": "use_fnmatch = true\nunet_target_module = []\n"
    'unet_target_name = ["output_blocks.?.1*attn2.to_k"]',
    "with exceptions": 'unet_target_module = ["CrossAttention"]\nunet_target_name = []\n'
    "exclude_name = ['output_blocks.*', '.*attn1.*']",
    "text by class": 'unet_target_module = []\nunet_target_name = ["out.2"]\n'
    'text_encoder_target_module = ["CLIPMLP"]',
    "one by its name": 'unet_target_module = []\nunet_target_name = ["time_embed.0"]',
}


@pytest.fixture(scope="module")
def custom_presets(tmp_path_factory) -> list[Path]:
    """The presets above as files."""
    folder = tmp_path_factory.mktemp("presets")
    for name, text in CUSTOM.items():
        (folder / f"{name}.toml").write_text(text)
    return sorted(folder.iterdir())


@pytest.mark.slow
def test_a_preset_of_ones_own_is_matched_as_lycoris_matches_it(kohya, capsys, custom_presets):
    modules = trained(LYCORIS[-1], *map(str, custom_presets))
    for path in custom_presets:
        given = [f"preset={path}"]
        report = checked(capsys, network_args=given, network_train_unet_only=None)
        lycoris = modules[path.stem]["unet"] + modules[path.stem]["text_encoders"]
        assert sorted(report["modules"]) == sorted(lycoris), path.stem


PRESET_ERRORS = {
    "missing": (None, 'no preset at "own.toml": write one there, or correct the path'),
    "an unknown key": (
        "dora_wd = true",
        'the preset "own.toml" has keys that LyCORIS refuses (dora_wd): remove them; dora_wd and '
        "the like are given as --network_args",
    ),
    "no list": (
        'unet_target_name = "a"',
        'unet_target_name in the preset "own.toml" is not a list of texts: correct it',
    ),
    "nothing selected": (
        "unet_target_module = []\nunet_target_name = []\ntext_encoder_target_module = []",
        'the preset "own.toml" selects no module of SDXL: correct its names',
    ),
    "text alone": (
        "unet_target_module = []\nunet_target_name = []",
        'the preset "own.toml" selects no module of SDXL: correct its names',
    ),
    "no expression": (
        "unet_target_name = ['(']",
        "a pattern of the preset is no regular expression (missing ), unterminated subpattern at "
        "position 0)",
    ),
}


@pytest.mark.parametrize("preset", PRESET_ERRORS)
def test_a_preset_that_lycoris_would_refuse_is_an_error(kohya, capsys, preset):
    text, sentence = PRESET_ERRORS[preset]
    if text is not None:
        Path("own.toml").write_text(text)
    assert checked(capsys, network_args=["preset=own.toml"])["errors"] == [sentence]


def test_text_encoders_alone_are_trained_on_request(kohya, capsys):
    given = {"network_train_unet_only": None, "network_train_text_encoder_only": True}
    report = checked(capsys, **given)
    modules = trained(LYCORIS[-1])["blora_content_style"]
    assert sorted(report["modules"]) == sorted(modules["text_encoders"])
    assert report["plan"]["modules"].startswith("176: ")


@pytest.mark.parametrize("preset", lycoris.config.PRESET)
def test_a_preset_of_lycoris_itself_passes_with_a_note(kohya, capsys, preset):
    report = checked(capsys, network_args=[f"preset={preset}"])
    note = f'"{preset}" is a preset of LyCORIS itself and was not looked into'
    assert (report["errors"], report["notes"]) == ([], [note])


def test_without_a_preset_lycoris_takes_its_own_full(kohya, capsys):
    [note] = checked(capsys, network_args=None)["notes"]
    assert note.startswith('"full" is a preset of LyCORIS itself')


def test_the_keys_of_a_preset_are_those_that_lycoris_accepts():
    theirs = lycoris.config_sdk.VALID_PRESET_KEYS
    assert sorted(blora_preset.PRESET_KEYS) == sorted(theirs)


@pytest.mark.parametrize("module", ["networks.lora", None])
def test_a_network_other_than_lycoris_passes_with_a_note(kohya, capsys, module):
    report = checked(capsys, network_module=module)
    note = "no LyCORIS network, so there is no preset to look at"
    assert (report["errors"], report["notes"]) == ([], [note])


def test_blora_network_trains_the_same_modules(kohya, capsys):
    theirs, ours = checked(capsys), checked(capsys, **OURS, network_args=WITH_BYPASS)
    assert ours["errors"] == []
    assert ours["modules"] == theirs["modules"]
    assert ours["plan"]["rank"] == theirs["plan"]["rank"]


@pytest.mark.parametrize("module", ["lycoris.kohya", "blora_network"])
def test_dora_that_lycoris_would_drop_is_an_error(kohya, capsys, module):
    dora = [*OPTIONS["network_args"], "dora_wd=True"]
    given = {"network_module": module, "network_args": [*dora, "bypass_mode=True"]}
    assert checked(capsys, **given)["errors"] == [
        "with bypass_mode=True LyCORIS trains no DoRA, although dora_wd=True asks for it: remove "
        "one of the two from --network_args"
    ]
    for args in (dora, WITH_BYPASS, [*dora, "bypass_mode=False"]):
        assert checked(capsys, network_module=module, network_args=args)["errors"] == []


def test_a_broken_traits_file_is_a_warning_and_the_modules_are_told_without_it(
    kohya, capsys, monkeypatch
):
    monkeypatch.setattr(blora_preflight, "HERE", kohya)
    Path("blora_traits.json").write_text("{")
    report = checked(capsys)
    assert report["errors"] == []
    assert report["warnings"][-1].startswith(f"{kohya / 'blora_traits.json'} is not valid JSON (")
    told = "160: 80 in output_blocks.0.1, 80 in output_blocks.1.1"
    assert report["plan"]["modules"] == told


# ---- The checkpoint ------------------------------------------------------------------------------


def cut_off(path: str) -> None:
    Path(path).write_bytes(Path("sdxl.safetensors").read_bytes()[:-2])


def too_long(path: str) -> None:
    Path(path).write_bytes(Path("sdxl.safetensors").read_bytes() + b"more")


def broken(path: str) -> None:
    Path(path).write_bytes(struct.pack("<Q", 4) + b"nope")


NOT_WHOLE = (
    "base.safetensors is not a whole safetensors file ({}): download it again, or save it as "
    "safetensors"
)
CHECKPOINTS = {
    "missing": (
        lambda path: None,
        'no checkpoint at "base.safetensors": correct BLORA_CHECKPOINT at the top of the launcher',
    ),
    "cut off": (cut_off, NOT_WHOLE.format("it is 2 bytes shorter than its header says")),
    "too long": (too_long, NOT_WHOLE.format("it is 4 bytes longer than its header says")),
    "cut off in the header": (
        lambda path: Path(path).write_bytes(struct.pack("<Q", 99) + b"{"),
        NOT_WHOLE.format("it ends before its header does"),
    ),
    "broken": (broken, NOT_WHOLE.format("Expecting value: line 1 column 1 (char 0)")),
    "empty": (
        lambda path: Path(path).touch(),
        NOT_WHOLE.format("it ends before its header does"),
    ),
}


def test_a_file_that_is_missing_is_not_taken_for_a_model_of_the_hub(kohya, capsys):
    assert checked(capsys, pretrained_model_name_or_path="models/sdxl.safetensors")["errors"] == [
        'no checkpoint at "models/sdxl.safetensors": correct BLORA_CHECKPOINT at the top of the '
        "launcher"
    ]


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_a_checkpoint_that_is_not_a_whole_sdxl_is_an_error(kohya, capsys, checkpoint):
    make, sentence = CHECKPOINTS[checkpoint]
    make("base.safetensors")
    report = checked(capsys, pretrained_model_name_or_path="base.safetensors")
    assert report["errors"] == [sentence]


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
    # Half of SDXL: its U-Net, or its second text encoder.
    "model.diffusion_model.label_emb.0.0.weight": "something else",
    "conditioner.embedders.1.model.ln_final.weight": "something else",
}


@pytest.mark.parametrize("key", OTHER_MODELS)
def test_a_model_of_another_family_is_named_in_the_error(kohya, capsys, key):
    save_file({key: torch.zeros(1)}, "base.safetensors")
    assert checked(capsys, pretrained_model_name_or_path="base.safetensors")["errors"] == [
        f'"base.safetensors" is {OTHER_MODELS[key]}, not an SDXL checkpoint: give the one to '
        "train on"
    ]


def test_a_checkpoint_may_have_metadata(kohya, capsys):
    names = blora_preflight.SDXL_KEYS
    save_file({name: torch.zeros(1) for name in names}, "base.safetensors", {"format": "pt"})
    assert checked(capsys, pretrained_model_name_or_path="base.safetensors")["errors"] == []


@pytest.mark.parametrize("given", ["path/to/sd_xl_base_1.0.safetensors", ""])
def test_settings_that_are_not_edited_yet_are_an_error(kohya, capsys, given):
    assert given in Path("sdxl_blora_classic.sh").read_text()
    assert checked(capsys, pretrained_model_name_or_path=given)["errors"] == [
        "the settings are not edited yet: set BLORA_CHECKPOINT at the top of the launcher to your "
        "SDXL checkpoint"
    ]


@pytest.mark.parametrize(
    ("given", "note"),
    [
        ("model", '"model" is a folder, taken for a diffusers model and not looked into'),
        (
            "stabilityai/stable-diffusion-xl-base-1.0",
            '"stabilityai/stable-diffusion-xl-base-1.0" is no file here, taken for a model of the '
            "Hugging Face hub",
        ),
        ("old.ckpt", '"old.ckpt" is no .safetensors file and was not looked into'),
    ],
)
def test_what_cannot_be_looked_into_passes_with_a_note(kohya, capsys, given, note):
    Path("model").mkdir()
    Path("old.ckpt").touch()
    report = checked(capsys, pretrained_model_name_or_path=given)
    assert (report["errors"], report["notes"]) == ([], [note])


def test_a_v_prediction_model_without_its_options_is_a_warning(kohya, capsys):
    names = [*blora_preflight.SDXL_KEYS, "v_pred"]
    save_file({name: torch.zeros(1) for name in names}, "v.safetensors")
    given = {"pretrained_model_name_or_path": "v.safetensors"}
    sentence = '"v.safetensors" says it predicts v: add --v_parameterization --zero_terminal_snr'
    assert sentence in checked(capsys, **given)["warnings"]
    assert sentence not in checked(capsys, **given, v_parameterization=True)["warnings"]


# ---- Options and numbers -------------------------------------------------------------------------


ODD_LINES = {
    "--network_dim=0 is below 1: correct it": {"network_dim": "0"},
    "--network_dim=inf is not a number: correct it": {"network_dim": "inf"},
    "--max_train_steps=nan is not a number: correct it": {"max_train_steps": "nan"},
    "--gradient_accumulation_steps=0 is below 1: correct it": {"gradient_accumulation_steps": "0"},
    "batch_size=0 is below 1: correct it": {"train_batch_size": "0"},
    "--config_file names no file: add it": {"config_file": True},
}


@pytest.mark.parametrize("sentence", ODD_LINES)
def test_a_number_that_cannot_be_is_an_error(kohya, capsys, sentence):
    edit_config("batch_size = 1\n", "")
    assert checked(capsys, **ODD_LINES[sentence])["errors"] == [sentence]


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("batch_size = 1", "batch_size = [1]", "batch_size=[1] is not a number: correct it"),
        ("num_repeats = 2", 'num_repeats = "two"', "num_repeats=two is not a number: correct it"),
    ],
)
def test_a_number_of_the_config_that_is_none_is_an_error(kohya, capsys, old, new, sentence):
    edit_config(old, new)
    assert checked(capsys)["errors"] == [sentence]


def test_an_option_that_is_no_number_is_an_error(kohya, capsys):
    errors = checked(capsys, network_dim="many")["errors"]
    assert errors == ["--network_dim=many is not a number: correct it"]


def test_a_name_that_is_too_long_is_an_error_and_no_traceback(kohya, capsys):
    [error] = checked(capsys, pretrained_model_name_or_path="x" * 300 + ".safetensors")["errors"]
    assert error.startswith("cannot look at everything (")


def test_the_gui_prints_the_line_with_accelerate_before_the_script(kohya, capsys):
    line = ["accelerate", "launch", "--num_processes", "1", "sdxl_train_network.py", *words()]
    assert blora_preflight.main(["--json", *line]) == 0
    assert len(json.loads(capsys.readouterr().out)["modules"]) == 160


# ---- Scripts and packages ------------------------------------------------------------------------


def test_a_missing_training_script_is_an_error(kohya, capsys):
    blora_preflight.main(["--json", "gone.py", *words()])
    assert json.loads(capsys.readouterr().out)["errors"] == [
        'no training script at "gone.py": run this in a kohya sd-scripts or kohya_ss folder'
    ]


def test_blora_network_that_was_not_copied_is_an_error(kohya, capsys, monkeypatch):
    monkeypatch.setattr(blora_preflight, "HERE", kohya)
    Path("blora_network.py").unlink()
    assert checked(capsys, **OURS)["errors"] == [
        f'no blora_network.py in "{kohya}": copy it there, from this bundle'
    ]


def in_bare_python(env: dict[str, str] | None = None, **changes: object) -> dict:
    """The JSON of a check by a Python that has its standard library and no package."""
    line = [sys.executable, "-S", "blora_preflight.py", "--json", "sdxl_train_network.py"]
    done = subprocess.run(
        [*line, *words(**changes)], env={**os.environ, **(env or {})}, stdout=subprocess.PIPE
    )
    return json.loads(done.stdout)


OPTIMIZERS = {
    "prodigy": ["prodigyopt"],
    "DAdaptation": ["dadaptation"],
    "DAdaptAdam": ["dadaptation"],
    "Lion": ["lion-pytorch"],
    "AdamW8bit": ["bitsandbytes"],
    "PagedAdamW": ["bitsandbytes"],
    "AdamWScheduleFree": ["schedulefree"],
    "AdaFactor": ["transformers"],
    "some_package.of.ones_own.Optimizer": ["some_package"],
    "AdamW": [],
    None: [],
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_packages_of_a_training_are_looked_for(kohya, optimizer):
    errors = in_bare_python(optimizer_type=optimizer)["errors"]
    packages = ["torch", "accelerate", "lycoris", *OPTIMIZERS[optimizer]]
    installed = {"lycoris": "lycoris_lora"}
    assert [error for error in errors if "pip install" in error] == [
        f"this Python ({sys.executable}) has no {package.replace('-', '_')}: pip install "
        f"{installed.get(package, package)}"
        for package in packages
    ]


@pytest.mark.parametrize(
    ("module", "package"),
    [
        ("networks.lora", None),
        (None, None),
        ("blora_network", "lycoris_lora"),
        ("other.x", "other"),
    ],
)
def test_the_package_of_the_network_is_looked_for(kohya, module, package):
    errors = in_bare_python(network_module=module, optimizer_type=None)["errors"]
    installed = [error.split("pip install ")[1] for error in errors if "pip install" in error]
    assert installed == ["torch", "accelerate", *([package] if package else [])]


def test_without_toml_no_config_can_be_read(kohya):
    sentence = "no toml in this Python: install kohya's requirements"
    assert sentence in in_bare_python()["errors"]


def test_a_lycoris_without_a_version_is_a_warning(kohya):
    Path("checkout/lycoris").mkdir(parents=True)
    warnings = in_bare_python({"PYTHONPATH": "checkout"})["warnings"]
    tested = ", ".join(blora_preflight.LYCORIS_TESTED)
    assert f"LyCORIS unknown is not one of the tested ones, {tested}" in warnings


def test_a_lycoris_that_is_not_tested_is_a_warning(kohya, capsys, monkeypatch):
    monkeypatch.setattr(blora_preflight, "LYCORIS_TESTED", ("1.0",))
    assert "LyCORIS 4.1.3 is not one of the tested ones, 1.0" in checked(capsys)["warnings"]


def test_the_tested_lycoris_releases_are_the_tested_ones():
    assert list(blora_preflight.LYCORIS_TESTED) == LYCORIS


# ---- What it prints and loads --------------------------------------------------------------------


def test_errors_come_first_and_alone(kohya, capsys):
    Path(CONFIG).unlink()
    assert blora_preflight.main(["sdxl_train_network.py", *words()]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[0].startswith("error: no dataset config at")


def test_it_loads_neither_torch_nor_lycoris(kohya):
    code = (
        "import sys, blora_preflight\n"
        "assert blora_preflight.main(['sdxl_train_network.py', *sys.argv[1:]]) == 0\n"
        "sys.exit(bool({'torch', 'lycoris', 'numpy'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *words()], cwd=kohya, check=False)
    assert done.returncode == 0
