"""What blora_preflight.py finds before a training begins, and what it says of it."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers_sdxl import sdxl_unet_without_weights
from kohya_folder import ROOT, install
from make_checkpoint import main as make_checkpoint
from make_dataset import main as make_dataset
from safetensors.torch import save_file
from test_blora_presets import LYCORIS, PRESETS, trained

import blora_memory
import blora_preflight
import blora_slicer

CARD = blora_memory.card
SDXL = json.loads((ROOT / "tests/data/sdxl_modules.json").read_text())
CONFIG = "_in/lora/sdxl/my_project/config.toml"
IMAGES = "_in/lora/sdxl/my_project/images"


@pytest.fixture
def kohya(tmp_path, monkeypatch) -> Path:
    """A folder in which a training could begin; it is the working directory."""
    install(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(blora_memory, "card", lambda: None)  # whatever card this machine has
    Path("sdxl_train_network.py").touch()
    make_checkpoint(["sdxl.safetensors"])
    make_dataset([str(Path(CONFIG).parent), "--images", "6", "--repeats", "2"])
    return tmp_path


OPTIONS = {
    "pretrained_model_name_or_path": "sdxl.safetensors",
    "dataset_config": CONFIG,
    "output_dir": "_out",
    "output_name": "my_project_1",
    "network_module": "lycoris.kohya",
    "network_args": ["preset=lycoris_presets/blora_content_style.toml"],
    "network_dim": "64",
    "network_alpha": "64",
    "network_train_unet_only": True,
    "resolution": "1024,1024",
    "caption_extension": ".txt",
    "max_train_steps": "3000",
    "save_every_n_steps": "1000",
    "mixed_precision": "fp16",
    "optimizer_type": "prodigy",
}


def words(**changes: object) -> list[str]:
    """A command line of OPTIONS; None leaves one out, True gives it without a value."""
    line = []
    for name, value in (OPTIONS | changes).items():
        if value is True:
            line.append(f"--{name}")
        elif isinstance(value, list):
            line += [f"--{name}", *value]
        elif value is not None:
            line.append(f"--{name}={value}")
    return line


def checked(capsys, **changes: object) -> dict:
    """The JSON of a check, whose exit code says whether there were errors."""
    code = blora_preflight.main(["--json", "sdxl_train_network.py", *words(**changes)])
    captured = capsys.readouterr()
    assert captured.err == ""
    report = json.loads(captured.out)
    assert code == (1 if report["errors"] else 0)
    return report


# ---- SDXL's own modules --------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["unet", "te1", "te2"])
def test_the_module_list_is_that_of_the_model(part):
    layers = blora_preflight.sdxl_layers()[part]
    leaves = {name: [x.kind, list(x.shape)] for name, x in layers.items() if x.is_leaf}
    assert leaves == SDXL[part]


def test_the_container_classes_are_those_of_the_model():
    layers = blora_preflight.unet_layers()
    ours = {name: layer.kind for name, layer in layers.items() if not layer.is_leaf}
    plain = ("ModuleList", "Sequential")
    theirs = {name: kind for name, kind in SDXL["containers"].items() if kind not in plain}
    assert {name: ours[name] for name in theirs} == theirs


def test_the_module_list_is_that_of_diffusers_own_sdxl():
    unet = sdxl_unet_without_weights()
    theirs = {
        blora_slicer.sgm_name(name.replace(".", "_")): (type(m).__name__, tuple(m.weight.shape))
        for name, m in unet.named_modules()
        if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))
    }
    ours = {
        name.replace(".", "_"): (layer.kind, layer.shape)
        for name, layer in blora_preflight.unet_layers().items()
        if layer.is_leaf
    }
    kinds = {"LoRACompatibleLinear": "Linear", "LoRACompatibleConv": "Conv2d"}
    assert {n: (kinds.get(kind, kind), shape) for n, (kind, shape) in theirs.items()} == ours


# ---- The preset ----------------------------------------------------------------------------------


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


def test_a_preset_of_ones_own_is_matched_as_lycoris_matches_it(kohya, capsys, custom_presets):
    modules = trained(LYCORIS[-1], *map(str, custom_presets))
    for path in custom_presets:
        given = [f"preset={path}"]
        report = checked(capsys, network_args=given, network_train_unet_only=None)
        lycoris = modules[path.stem]["unet"] + modules[path.stem]["text_encoders"]
        assert sorted(report["modules"]) == sorted(lycoris), path.stem


# ---- The plan ------------------------------------------------------------------------------------


def test_it_says_what_the_training_will_be(kohya, capsys):
    code = blora_preflight.main(["sdxl_train_network.py", *words()])
    captured = capsys.readouterr()
    assert code == 0
    lines = captured.out.splitlines()
    assert lines[:7] == [
        "This training:",
        "  base      sdxl.safetensors (SDXL, 0.0 MB)",
        "  images    6 with 6 captions, 12 an epoch with repeats",
        "  training  3000 steps, 250 epochs, batch 1, fp16 mixed precision",
        "  modules   160: 80 content (output_blocks.0.1), 80 style (output_blocks.1.1)",
        "  rank      64, alpha 64: 28,180,480 parameters, 112.7 MB a file",
        "  memory    7.70 GB at least, computed: 5.13 GB U-Net in 16 bits, 1.64 GB text encoders, "
        "167.3 MB VAE, 112.7 MB LoRA, 112.7 MB gradients, 450.9 MB prodigy state, 82.4 MB "
        "activations",
    ]
    [saves] = lines[7:]
    assert re.fullmatch(r"  saves     4 of 112\.7 MB in _out \([\d.]+ [GM]B free\)", saves)
    assert captured.err == (
        "warning: the preset's 176 text-encoder modules are left out, by "
        "--network_train_unet_only\n"
    )


@pytest.mark.parametrize(
    ("changes", "line", "text"),
    [
        ({"network_dim": "1024"}, "rank", "1024, alpha 64: 450,887,680 parameters, 1.80 GB a file"),
        ({"save_precision": "fp16"}, "rank", "64, alpha 64: 28,180,480 parameters, 56.4 MB a file"),
        ({"optimizer_type": "AdamW8bit"}, "memory", "56.4 MB AdamW8bit state"),
        ({"optimizer_type": "AdamW"}, "memory", "225.4 MB AdamW state"),
        ({"optimizer_type": "Came"}, "memory", "Came state of unknown size"),
        ({"max_train_epochs": "2"}, "training", "24 steps, 2 epochs"),
        ({"max_train_steps": "10"}, "training", "10 steps, 1 epochs"),
        ({"max_train_steps": None}, "training", "1600 steps, 134 epochs"),
        ({"save_every_n_steps": None}, "saves", "1 of 112.7 MB in _out"),
        ({"save_every_n_epochs": "100"}, "saves", "6 of 112.7 MB in _out"),
        ({"save_every_n_epochs": "1", "save_last_n_epochs": "2"}, "saves", "6 of 112.7 MB"),
        ({"network_train_unet_only": None}, "modules", "80 content (output_blocks.0.1)"),
    ],
)
def test_the_plan_follows_the_options(kohya, capsys, changes, line, text):
    assert text in checked(capsys, **changes)["plan"][line]


def test_an_override_is_judged_as_it_wins(kohya, capsys):
    line = [*words(), "--network_dim", "8", "--network_args", "preset=own.toml"]
    Path("own.toml").write_text('unet_target_name = ["out.2"]\nunet_target_module = []')
    blora_preflight.main(["--json", "sdxl_train_network.py", *line])
    report = json.loads(capsys.readouterr().out)
    assert report["modules"][-1] == "lora_unet_out_2"
    assert report["plan"]["rank"].startswith("8, alpha 64")


def test_above_rank_640_it_notes_that_the_lora_outgrows_its_matrices(kohya, capsys):
    assert not checked(capsys, network_dim="640")["notes"]
    assert checked(capsys, network_dim="641")["notes"] == [
        "at rank 641 the LoRA is larger than the matrix it changes in 120 of 160 modules"
    ]


def test_the_gui_passes_its_options_in_a_config_file(kohya, capsys):
    path = Path("gui.toml")
    lines = [
        f"{name} = {'true' if value is True else json.dumps(value)}"
        for name, value in OPTIONS.items()
    ]
    empty = ['train_data_dir = ""', 'save_last_n_epochs = ""', "cache_latents = false"]
    path.write_text("\n".join(lines + empty))
    line = ["--json", "sdxl_train_network.py", "--config_file", "gui.toml", "--network_dim=8"]
    assert blora_preflight.main(line) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["modules"]) == 160
    assert report["plan"]["rank"].startswith("8, alpha 64")


def test_folders_with_repeats_are_a_dataset_too(kohya, capsys):
    Path("train").mkdir()
    Path(IMAGES).rename("train/3_sks cat")
    report = checked(capsys, dataset_config=None, train_data_dir="train")
    assert report["plan"]["images"] == "6 with 6 captions, 18 an epoch with repeats"


# ---- Errors --------------------------------------------------------------------------------------


def edit_config(old: str, new: str) -> None:
    path = Path(CONFIG)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def line_of(text: str) -> int:
    lines = Path(CONFIG).read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


def sd15(path: str) -> None:
    save_file({"cond_stage_model.transformer.x": torch.zeros(1)}, path)


def cut_off(path: str) -> None:
    Path(path).write_bytes(Path("sdxl.safetensors").read_bytes()[:-2])


def broken(path: str) -> None:
    Path(path).write_bytes(struct.pack("<Q", 4) + b"nope")


CHECKPOINTS = {
    "missing": (
        lambda path: None,
        'no checkpoint at "base.safetensors": correct BLORA_CHECKPOINT at the top of the launcher',
    ),
    "SD 1.5": (
        sd15,
        '"base.safetensors" is an SD 1.x checkpoint, not an SDXL checkpoint: give the one to train '
        "on",
    ),
    "a LoRA": (
        lambda path: save_file({"lora_unet_out_2.alpha": torch.zeros(1)}, path),
        '"base.safetensors" is a LoRA, not an SDXL checkpoint: give the one to train on',
    ),
    "a refiner": (
        lambda path: save_file({"conditioner.embedders.0.model.ln": torch.zeros(1)}, path),
        '"base.safetensors" is an SDXL refiner, not an SDXL checkpoint: give the one to train on',
    ),
    "something else": (
        lambda path: save_file({"x": torch.zeros(1)}, path),
        '"base.safetensors" is something else, not an SDXL checkpoint: give the one to train on',
    ),
    "cut off": (
        cut_off,
        '"base.safetensors" is 2 bytes shorter than its header says: download it again',
    ),
    "cut off in the header": (
        lambda path: Path(path).write_bytes(struct.pack("<Q", 99) + b"{"),
        '"base.safetensors" is cut off or no safetensors file: download it again',
    ),
    "broken": (broken, '"base.safetensors" is no safetensors file: download it again'),
    "empty": (
        lambda path: Path(path).touch(),
        '"base.safetensors" is cut off or no safetensors file: download it again',
    ),
}


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_a_checkpoint_that_is_not_a_whole_sdxl_is_an_error(kohya, capsys, checkpoint):
    make, sentence = CHECKPOINTS[checkpoint]
    make("base.safetensors")
    report = checked(capsys, pretrained_model_name_or_path="base.safetensors")
    assert report["errors"] == [sentence]


def test_settings_that_are_not_edited_yet_are_an_error(kohya, capsys):
    given = "path/to/sd_xl_base_1.0.safetensors"
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


def no_config(_kohya):
    Path(CONFIG).unlink()


def no_toml(_kohya):
    Path(CONFIG).write_text("[general\n")


def no_images(_kohya):
    for path in Path(IMAGES).glob("*.png"):
        path.unlink()


DATASETS = {
    "no config": (no_config, f'no dataset config at "{CONFIG}": write one there, or correct'),
    "no TOML": (no_toml, f'the dataset config "{CONFIG}" is not valid TOML ('),
    "no tables": (
        lambda _: Path(CONFIG).write_text("datasets = 3"),
        f'the dataset config "{CONFIG}" is not of the form [[datasets]], [[datasets.subsets]]',
    ),
    "no subsets": (
        lambda _: Path(CONFIG).write_text("[[datasets]]\nresolution = 1024"),
        f'"{CONFIG}" names no folder of images: add one',
    ),
    "no folder": (
        lambda _: Path(IMAGES).rename("elsewhere"),
        f'no folder of images at "{IMAGES}": correct image_dir in "{CONFIG}"',
    ),
    "no images": (no_images, f'"{IMAGES}" holds no images: put some there, or correct image_dir'),
}


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_dataset_that_cannot_be_trained_on_is_an_error(kohya, capsys, dataset):
    spoil, sentence = DATASETS[dataset]
    spoil(kohya)
    [error] = checked(capsys)["errors"]
    assert error.startswith(sentence)


def test_missing_captions_are_counted_and_the_first_named(kohya, capsys):
    for path in sorted(Path(IMAGES).glob("*.txt"))[:5]:
        path.unlink()
    names = [path.name for path in sorted(Path(IMAGES).glob("*.png"))[:3]]
    warning = f'5 of 6 images in "{IMAGES}" have no .txt caption: {", ".join(names)} and 2 more'
    report = checked(capsys)
    assert warning in report["warnings"]
    assert report["errors"] == []


@pytest.mark.parametrize(
    ("cache", "setting"),
    [
        ("cache_latents", "random_crop = true"),
        ("cache_latents_to_disk", "color_aug = true"),
        ("cache_text_encoder_outputs", "shuffle_caption = true"),
        ("cache_text_encoder_outputs", "caption_dropout_rate = 0.1"),
    ],
)
def test_a_setting_that_contradicts_a_cache_is_an_error_with_its_line(
    kohya, capsys, cache, setting
):
    edit_config("num_repeats", f"{setting}\nnum_repeats")
    name = setting.split()[0]
    assert checked(capsys, **{cache: True})["errors"] == [
        f'--{cache} does not go with {name} in "{CONFIG}" line {line_of(setting)}: change that '
        "line, or leave the option out"
    ]
    assert checked(capsys)["errors"] == []


def test_options_that_contradict_each_other_are_an_error(kohya, capsys):
    report = checked(capsys, cache_latents=True, random_crop=True)
    assert report["errors"] == [
        "--cache_latents does not go with --random_crop: leave one of them out"
    ]
    report = checked(capsys, cache_text_encoder_outputs=True, network_train_unet_only=None)
    assert report["errors"] == [
        "--cache_text_encoder_outputs needs --network_train_unet_only: add it"
    ]


def test_what_the_config_says_goes_before_the_command_line(kohya, capsys):
    edit_config("num_repeats", "random_crop = false\nnum_repeats")
    assert checked(capsys, cache_latents=True, random_crop=True)["errors"] == []


@pytest.mark.parametrize("value", ["0", "0.0", "0.00"])
def test_a_dropout_of_0_contradicts_no_cache(kohya, capsys, value):
    given = {"cache_text_encoder_outputs": True, "caption_dropout_rate": value}
    assert checked(capsys, **given)["errors"] == []


def test_a_folder_among_others_may_be_missing_or_empty(kohya, capsys):
    Path("empty").mkdir()
    more = "".join(
        f'[[datasets.subsets]]\nimage_dir = "{folder}"\n' for folder in ("gone", "empty")
    )
    Path(CONFIG).write_text(Path(CONFIG).read_text() + more)
    report = checked(capsys)
    assert report["errors"] == []
    assert [w for w in report["warnings"] if "text-encoder" not in w] == [
        f'no folder of images at "gone": correct image_dir in "{CONFIG}"',
        '"empty" holds no images: put some there, or correct image_dir',
    ]
    assert report["plan"]["images"].startswith("6 with 6 captions")


def test_a_caption_extension_is_put_behind_the_name_as_it_is(kohya, capsys):
    for path in Path(IMAGES).glob("*.txt"):
        path.rename(f"{path.with_suffix('')}_a.txt")
    edit_config('caption_extension = ".txt"', 'caption_extension = "_a.txt"')
    assert checked(capsys)["plan"]["images"].startswith("6 with 6 captions")


def test_subsets_with_a_metadata_file_pass_with_a_note(kohya, capsys):
    edit_config("num_repeats", 'metadata_file = "meta.json"\nnum_repeats')
    report = checked(capsys)
    assert report["errors"] == []
    assert report["notes"] == ["subsets with a metadata_file were not looked into"]


def test_files_that_will_be_written_over_count_as_free(kohya, capsys, monkeypatch):
    Path("_out").mkdir()
    free = blora_preflight.shutil.disk_usage(".")._replace(free=400_000_000)
    monkeypatch.setattr(blora_preflight.shutil, "disk_usage", lambda folder: free)
    [error] = checked(capsys)["errors"]
    assert error.startswith("4 saves of 112.7 MB do not fit into the 400.0 MB free at ")
    with Path("_out/my_project_1-step00001000.safetensors").open("wb") as file:
        file.truncate(112_000_000)
    assert checked(capsys)["errors"] == []


def test_the_gui_prints_the_line_with_accelerate_before_the_script(kohya, capsys):
    line = ["accelerate", "launch", "--num_processes", "1", "sdxl_train_network.py", *words()]
    assert blora_preflight.main(["--json", *line]) == 0
    assert len(json.loads(capsys.readouterr().out)["modules"]) == 160


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


def test_a_name_that_is_too_long_is_an_error_and_no_traceback(kohya, capsys):
    [error] = checked(capsys, pretrained_model_name_or_path="x" * 300 + ".safetensors")["errors"]
    assert error.startswith("cannot look at everything (")


@pytest.mark.parametrize(
    ("changes", "line", "text"),
    [
        ({"full_bf16": True}, "rank", "56.4 MB a file"),
        ({"full_bf16": True}, "memory", "56.4 MB LoRA, 56.4 MB gradients, 225.4 MB prodigy"),
        ({"gradient_accumulation_steps": "4", "max_train_epochs": "2"}, "training", "6 steps"),
        (
            {"network_args": [*OPTIONS["network_args"], "dora_wd=True"]},
            "rank",
            f"{28_180_480 + 160 * 1280:,} parameters",
        ),
        (
            {"network_args": [*OPTIONS["network_args"], "dora_wd=True", "wd_on_output=False"]},
            "rank",
            f"{28_180_480 + 120 * 1280 + 40 * 2048:,} parameters",
        ),
    ],
)
def test_sizes_follow_precision_and_dora(kohya, capsys, changes, line, text):
    assert text in checked(capsys, **changes)["plan"][line]


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
}


@pytest.mark.parametrize("preset", PRESET_ERRORS)
def test_a_preset_that_lycoris_would_refuse_is_an_error(kohya, capsys, preset):
    text, sentence = PRESET_ERRORS[preset]
    if text is not None:
        Path("own.toml").write_text(text)
    assert checked(capsys, network_args=["preset=own.toml"])["errors"] == [sentence]


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


def test_a_package_that_is_missing_is_an_error(kohya, capsys):
    [error] = checked(capsys, optimizer_type="Lion")["errors"]
    assert error.startswith("this Python (")
    assert error.endswith(") has no lion_pytorch: pip install lion-pytorch")


def test_a_lycoris_that_is_not_tested_is_a_warning(kohya, capsys, monkeypatch):
    monkeypatch.setattr(blora_preflight, "LYCORIS_TESTED", ("1.0",))
    assert "LyCORIS 4.1.3 is not one of the tested ones, 1.0" in checked(capsys)["warnings"]


def test_the_tested_lycoris_releases_are_the_tested_ones():
    assert list(blora_preflight.LYCORIS_TESTED) == LYCORIS


def test_saves_that_do_not_fit_on_the_disk_are_an_error(kohya, capsys):
    [error] = checked(capsys, network_dim="100000000")["errors"]
    assert error.startswith("4 saves of 176128.00 GB do not fit into the ")
    assert error.endswith(f'free at "{kohya}": make room, or raise --save_every_n_steps')


# ---- blora_network and the card's memory ---------------------------------------------------------

OURS = {"network_module": "blora_network", "gradient_checkpointing": True, "cache_latents": True}
WITH_BYPASS = [*OPTIONS["network_args"], "bypass_mode=True"]


def test_blora_network_trains_the_same_modules(kohya, capsys):
    theirs, ours = checked(capsys), checked(capsys, **OURS, network_args=WITH_BYPASS)
    assert ours["errors"] == []
    assert ours["modules"] == theirs["modules"]
    assert ours["plan"]["rank"] == theirs["plan"]["rank"]


def test_blora_network_that_was_not_copied_is_an_error(kohya, capsys, monkeypatch):
    monkeypatch.setattr(blora_preflight, "HERE", kohya)
    Path("blora_network.py").unlink()
    assert checked(capsys, **OURS)["errors"] == [
        f'no blora_network.py in "{kohya}": copy it there, from this bundle'
    ]


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


def test_the_unet_it_speaks_of_has_as_many_parameters_as_diffusers_own():
    assert sum(p.numel() for p in sdxl_unet_without_weights().parameters()) == blora_memory.UNET


# The example dataset is of 64 x 64, which is 1/256 of the area that the figures are for.
FULL_SIZE = ("resolution = 64", "resolution = [1024, 1024]")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({}, "993.0 MB activations (BLORA_SAVE_MEMORY=0, which is without --gradient_checkp"),
        ({}, "ointing: 2.80 GB more)"),
        ({"gradient_checkpointing": None}, "3.79 GB activations"),
        ({"gradient_checkpointing": None, "network_dim": "1024"}, "4.64 GB activations"),
        ({"network_args": ["preset=lycoris_presets/blora_layout_style.toml"]}, "1.07 GB activ"),
        ({"network_module": "lycoris.kohya"}, "1.20 GB activations"),
        ({"network_train_unet_only": None}, "1.20 GB activations"),  # then it cannot stop early
        ({"mixed_precision": "no"}, "10.27 GB U-Net in 32 bits, 3.27 GB text encoders, "),
        ({"mixed_precision": "no"}, "activations of unknown size"),
        ({"fp8_base_unet": True}, "2.57 GB U-Net in 8 bits, 1.64 GB text encoders, "),
        ({"fp8_base": True}, "2.57 GB U-Net in 8 bits, 817.7 MB text encoders, "),
        ({"cache_latents": None, "no_half_vae": True}, "334.6 MB VAE, "),
        ({"cache_text_encoder_outputs": True}, "5.13 GB U-Net in 16 bits, 112.7 MB LoRA, "),
        ({"cache_text_encoder_outputs_to_disk": True}, "U-Net in 16 bits, 112.7 MB LoRA, "),
        ({"cache_latents": None, "cache_latents_to_disk": True}, "encoders, 112.7 MB LoRA, "),
        ({"full_fp16": True, "gradient_checkpointing": None}, "3.73 GB activations"),
        ({"network_args": ["preset=first.toml"]}, "1.20 GB activations"),
        ({"network_args": ["preset=last.toml"]}, " 0.0 MB activations"),
        # as the kohya_ss GUI writes them, where they change nothing
        ({"network_args": [*WITH_BYPASS, "conv_dim=1", "algo=locon"]}, "993.0 MB activations"),
    ],
)
def test_the_cards_memory_is_a_sum_of_parts(kohya, capsys, changes, part):
    edit_config(*FULL_SIZE)
    for name, layer in (("first", "input_blocks.0.0"), ("last", "out.2")):
        lists = "unet_target_module = []\ntext_encoder_target_module = []\n"
        Path(f"{name}.toml").write_text(f"{lists}unet_target_name = ['{layer}']\n")
    told = checked(capsys, **OURS | changes)["plan"]["memory"]
    assert part in told
    total, parts = told.split(" at least, computed: ")
    sizes = [in_bytes(size) for size in re.findall(r"[\d.]+ [GM]B", parts.split(" (")[0])]
    assert abs(in_bytes(total) - sum(sizes)) < 0.03e9


def in_bytes(told: str) -> float:
    number, unit = told.split()
    return float(number) * {"MB": 1e6, "GB": 1e9}[unit]


def test_activations_grow_with_pixels_and_batch(kohya, capsys):
    edit_config("resolution = 64\nbatch_size = 1", "resolution = 512\nbatch_size = 8")
    assert "1.99 GB activations" in checked(capsys, **OURS)["plan"]["memory"]


def test_a_dataset_without_a_resolution_is_told_once(kohya, capsys):
    edit_config("resolution = 64\n", "")
    report = checked(capsys, **OURS, resolution=None)
    assert report["errors"] == [f'"{Path(CONFIG)}" has a dataset without a resolution: add one']


def put_card(monkeypatch: pytest.MonkeyPatch, folder: Path, prints: str) -> None:
    """A program with the name of nvidia-smi, which prints as that one does."""
    folder.mkdir()
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{prints}'\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


@pytest.mark.skipif(sys.platform == "win32", reason="the program is a shell script")
@pytest.mark.parametrize(
    ("prints", "changes", "sentence"),
    [
        ("8192\\n", {}, None),
        ("4096\\n24576\\n", {"network_dim": "1024"}, None),  # the larger of two cards
        ("[N/A]\\n", {}, None),
        (
            "12288\\n",
            {"network_dim": "1024"},
            "the card has 12.88 GB of memory, and this training takes at least 18.58 GB "
            "(computed): lower BLORA_RANK, or add --cache_text_encoder_outputs",
        ),
        (
            "4096\\n",
            {"cache_text_encoder_outputs": True},
            "the card has 4.29 GB of memory, and this training takes at least 6.80 GB (computed): "
            "use a larger card",
        ),
        (
            "6144\\n",
            {"gradient_checkpointing": None, "cache_text_encoder_outputs": True},
            "the card has 6.44 GB of memory, and this training takes at least 9.60 GB (computed): "
            "set BLORA_SAVE_MEMORY to 1, or add --gradient_checkpointing, or lower batch_size or "
            "resolution",
        ),
    ],
)
def test_a_card_that_is_too_small_is_a_warning_that_says_what_to_change(
    kohya, capsys, monkeypatch, prints, changes, sentence
):
    edit_config(*FULL_SIZE)
    monkeypatch.setattr(blora_memory, "card", CARD)
    put_card(monkeypatch, kohya / "bin", prints)
    warnings = checked(capsys, **OURS | changes)["warnings"]
    assert [w for w in warnings if w.startswith("the card")] == ([sentence] if sentence else [])


def test_a_missing_training_script_is_an_error(kohya, capsys):
    blora_preflight.main(["--json", "gone.py", *words()])
    assert json.loads(capsys.readouterr().out)["errors"] == [
        'no training script at "gone.py": run this in a kohya sd-scripts or kohya_ss folder'
    ]


def test_an_option_that_is_no_number_is_an_error(kohya, capsys):
    errors = checked(capsys, network_dim="many")["errors"]
    assert errors == ["--network_dim=many is not a number: correct it"]


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
