"""What blora_preflight.py says a training will be: steps, saves, sizes and the card's memory."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
from diffusers_sdxl import sdxl_unet_without_weights
from preflight_folder import (
    IMAGES,
    OPTIONS,
    OURS,
    WITH_BYPASS,
    add_to_config,
    checked,
    edit_config,
    make_trainable,
    words,
)

import blora_memory
import blora_preflight

CARD = blora_memory.card


@pytest.fixture
def kohya(tmp_path, monkeypatch) -> Path:
    """A folder in which a training could begin; it is the working directory."""
    return make_trainable(tmp_path, monkeypatch)


# ---- All of it -----------------------------------------------------------------------------------


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
        # either side of a GB
        ({"network_dim": "567"}, "rank", "567, alpha 64: 249,661,440 parameters, 998.6 MB a file"),
        ({"network_dim": "568"}, "rank", "568, alpha 64: 250,101,760 parameters, 1.00 GB a file"),
        ({"network_dim": None, "network_alpha": None}, "rank", "4, alpha 1: 1,761,280 parameters"),
        ({"max_train_epochs": "2"}, "training", "24 steps, 2 epochs"),
        ({"max_train_steps": "10"}, "training", "10 steps, 1 epochs"),
        ({"max_train_steps": None}, "training", "1600 steps, 134 epochs"),
        ({"save_every_n_steps": None}, "saves", "1 of 112.7 MB in _out"),
        ({"save_every_n_steps": "0"}, "saves", "1 of 112.7 MB in _out"),
        ({"save_every_n_steps": "100", "save_last_n_steps": "1000"}, "saves", "12 of 112.7 MB"),
        ({"save_last_n_steps": "9000"}, "saves", "4 of 112.7 MB"),
        ({"save_every_n_epochs": "100"}, "saves", "6 of 112.7 MB in _out"),
        ({"save_every_n_epochs": "125"}, "saves", "5 of 112.7 MB in _out"),  # not the last epoch
        ({"save_every_n_epochs": "100", "save_last_n_epochs": "9"}, "saves", "6 of 112.7 MB"),
        ({"save_every_n_epochs": "1", "save_last_n_epochs": "2"}, "saves", "6 of 112.7 MB"),
        ({"network_train_unet_only": None}, "modules", "80 content (output_blocks.0.1)"),
    ],
)
def test_the_plan_follows_the_options(kohya, capsys, changes, line, text):
    assert text in checked(capsys, **changes)["plan"][line]


@pytest.mark.parametrize(
    ("batch", "steps", "training"),
    [
        (1, None, "24 steps, 2 epochs, batch 1"),
        (4, None, "6 steps, 2 epochs, batch 4"),
        (5, None, "6 steps, 2 epochs, batch 5"),  # the last of three is not full
        (4, "4", "4 steps, 2 epochs, batch 4"),
    ],
)
@pytest.mark.parametrize("place", ["config", "command line"])
def test_an_epoch_has_as_many_steps_as_batches(kohya, capsys, place, batch, steps, training):
    edit_config("batch_size = 1\n", f"batch_size = {batch}\n" if place == "config" else "")
    given = {"max_train_steps": steps} if steps else {"max_train_epochs": "2"}
    if place == "command line":
        given["train_batch_size"] = str(batch)
    assert checked(capsys, **given)["plan"]["training"].startswith(f"{training}, ")


def test_batches_of_several_sizes_are_told(kohya, capsys):
    add_to_config("[[datasets]]\nresolution = 64\nbatch_size = 8\n")
    add_to_config(f'[[datasets.subsets]]\nimage_dir = "{IMAGES}"\n')
    training = checked(capsys, max_train_epochs="1")["plan"]["training"]
    assert training.startswith("13 steps, 1 epochs, batch 1/8, ")


def test_an_override_is_judged_as_it_wins(kohya, capsys):
    line = [*words(), "--network_dim", "8", "--network_args", "preset=own.toml"]
    Path("own.toml").write_text('unet_target_name = ["out.2"]\nunet_target_module = []')
    blora_preflight.main(["--json", "sdxl_train_network.py", *line])
    report = json.loads(capsys.readouterr().out)
    assert report["modules"][-1] == "lora_unet_out_2"
    assert report["plan"]["rank"].startswith("8, alpha 64")


@pytest.mark.parametrize("name", ["gui.toml", "gui"])
def test_the_gui_passes_its_options_in_a_config_file(kohya, capsys, name):
    lines = [
        f"{option} = {'true' if value is True else json.dumps(value)}"
        for option, value in OPTIONS.items()
    ]
    # What is not set is empty or false, and sections mean nothing.
    empty = ['train_data_dir = ""', 'save_last_n_epochs = ""', "cache_latents = false"]
    Path("gui.toml").write_text("\n".join([*lines[:8], "[section]", *lines[8:], *empty]))
    line = ["--json", "sdxl_train_network.py", "--config_file", name, "--network_dim=8"]
    assert blora_preflight.main(line) == 0
    report = json.loads(capsys.readouterr().out)
    same = checked(capsys, network_dim="8")
    for told in (report, same):
        told["plan"].pop("saves")  # with the free space, which other programs change
    assert report == same


# ---- Images, steps and saves ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "name"), [("my_project_1", "my_project_1"), ("cat[1]", "cat[1]"), (None, "last")]
)
def test_files_that_will_be_written_over_count_as_free(kohya, capsys, monkeypatch, given, name):
    Path("_out").mkdir()
    free = blora_preflight.shutil.disk_usage(".")._replace(free=400_000_000)
    monkeypatch.setattr(blora_preflight.shutil, "disk_usage", lambda folder: free)
    [error] = checked(capsys, output_name=given)["errors"]
    assert error.startswith("4 saves of 112.7 MB do not fit into the 400.0 MB free at ")
    with Path(f"_out/{name}-step00001000.safetensors").open("wb") as file:
        file.truncate(112_000_000)
    assert checked(capsys, output_name=given)["errors"] == []


def test_saves_that_do_not_fit_on_the_disk_are_an_error(kohya, capsys):
    [error] = checked(capsys, network_dim="100000000")["errors"]
    assert error.startswith("4 saves of 176128.00 GB do not fit into the ")
    assert error.endswith(f'free at "{kohya}": make room, or raise --save_every_n_steps')


# ---- The size of the LoRA ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "line", "text"),
    [
        ({"full_bf16": True}, "rank", "56.4 MB a file"),
        ({"full_bf16": True}, "memory", "56.4 MB LoRA, 56.4 MB gradients, 225.4 MB prodigy"),
        ({"gradient_accumulation_steps": "4", "max_train_epochs": "2"}, "training", "6 steps"),
        ({"gradient_accumulation_steps": "5", "max_train_epochs": "2"}, "training", "6 steps"),
        ({"full_fp16": True}, "rank", "56.4 MB a file"),
        ({"full_fp16": True, "save_precision": "float"}, "rank", "112.7 MB a file"),
        ({"save_precision": "bf16"}, "rank", "56.4 MB a file"),
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


def test_above_rank_640_it_notes_that_the_lora_outgrows_its_matrices(kohya, capsys):
    assert not checked(capsys, network_dim="640")["notes"]
    assert checked(capsys, network_dim="641")["notes"] == [
        "at rank 641 the LoRA is larger than the matrix it changes in 120 of 160 modules"
    ]


CONVOLUTION = "unet_target_module = []\nunet_target_name = ['out.2', '.*to_q']"


@pytest.mark.parametrize(
    ("preset", "args", "told"),
    [
        ("", ["algo=locon"], True),
        ("", ["algo=LoRA"], True),
        ("", ["algo=dylora"], True),
        ("", ["algo=loha"], False),
        ("", ["algo=lokr"], False),
        # conv_dim is the rank of kernels alone
        ("", ["conv_dim=1"], True),
        (CONVOLUTION, [], True),
        (CONVOLUTION, ["conv_dim=64"], False),
        (f"{CONVOLUTION}\nenable_conv = false", ["conv_dim=1"], True),
    ],
)
def test_a_size_is_told_of_loras_of_one_rank(kohya, capsys, preset, args, told):
    shipped = Path("lycoris_presets/blora_content_style.toml").read_text()
    Path("own.toml").write_text(preset or shipped)
    plan = checked(capsys, network_args=["preset=own.toml", *args])["plan"]
    assert plan["rank"].startswith("64, alpha 64: ") if told else plan["rank"] == "64, alpha 64"
    assert [line in plan for line in ("memory", "saves")] == [told, told]


@pytest.mark.parametrize("setting", ["module_algo_map", "name_algo_map"])
def test_modules_with_settings_of_their_own_have_no_size_that_is_told(kohya, capsys, setting):
    shipped = Path("lycoris_presets/blora_content_style.toml").read_text()
    Path("own.toml").write_text(f'{shipped}\n[{setting}.CrossAttention]\nalgo = "loha"\n')
    report = checked(capsys, network_args=["preset=own.toml"])
    assert report["notes"] == ["the preset gives modules settings of their own: size unknown"]
    assert len(report["modules"]) == 160
    assert not {"rank", "memory", "saves"} & report["plan"].keys()


# ---- The card's memory ---------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("optimizer", "state"),
    [
        ("prodigy", "450.9 MB"),
        ("AdamW", "225.4 MB"),
        ("PagedAdamW", "225.4 MB"),
        ("PagedAdamW32bit", "225.4 MB"),
        ("AdamWScheduleFree", "225.4 MB"),
        ("DAdaptAdam", "225.4 MB"),
        ("DAdaptAdamPreprint", "225.4 MB"),
        ("Lion", "112.7 MB"),
        ("SGDNesterov", "112.7 MB"),
        ("AdamW8bit", "56.4 MB"),
        ("PagedAdamW8bit", "56.4 MB"),
        ("Lion8bit", "28.2 MB"),
        ("PagedLion8bit", "28.2 MB"),
        ("SGDNesterov8bit", "28.2 MB"),
    ],
)
def test_an_optimizer_keeps_so_much_of_a_lora_of_112_7_mb(kohya, capsys, optimizer, state):
    told = checked(capsys, optimizer_type=optimizer)["plan"]["memory"]
    assert f" gradients, {state} {optimizer} state, " in told


def test_the_state_of_an_optimizer_that_is_not_known_has_no_size(kohya, capsys):
    told = checked(capsys, optimizer_type="Came")["plan"]["memory"]
    assert told.endswith(" gradients, 82.4 MB activations, Came state of unknown size")
    assert " AdamW state" in checked(capsys, optimizer_type=None)["plan"]["memory"]


@pytest.mark.parametrize(
    "settings",
    [
        "resolution = 512\nbatch_size = 8",
        "resolution = [1024, 512]\nbatch_size = 4",
        'resolution = "512,1024"\nbatch_size = 4',
        "batch_size = 2",  # the resolution is the command line's 1024,1024
    ],
)
def test_activations_grow_with_pixels_and_batch(kohya, capsys, settings):
    edit_config("resolution = 64\nbatch_size = 1", settings)
    assert "1.99 GB activations" in checked(capsys, **OURS)["plan"]["memory"]


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
