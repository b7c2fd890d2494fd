"""The plan of a training, and warnings on options that the trainer would take without a word.

Networks, optimizers and accelerate are the real ones, on SDXL's names and shapes; the options have
sd-scripts' defaults. Only the graphics cards are not there.
"""

from __future__ import annotations

import io
import logging
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import prodigyopt
import pytest
import torch
import transformers
from accelerate import Accelerator
from diffusers_sdxl import sdxl_unet_without_weights
from lycoris_releases import LYCORIS
from preset_modules import CONTENT, STYLE, block_modules, text_encoder_modules
from rehearsed_networks import CONTENT_STYLE, made, network, options, told_memory
from reports import reported
from torch.utils.data import ConcatDataset, TensorDataset

from blora.preflight import option_warnings, plan
from blora.preflight.option_warnings import LYCORIS_TESTED, check_network
from blora.preflight.plan import Length, length, saves
from blora.preflight.processes import Started
from blora.preflight.rehearsal import Rehearsal
from blora.preflight.report import Report
from blora.text import file_size

PRODIGY = 4.0  # bytes that it keeps for each byte of a parameter
MEGAPIXEL = 1024 * 1024


def put_cards(monkeypatch: pytest.MonkeyPatch, *megabytes: int) -> None:
    """What torch says of cards with so much memory."""
    cards = [SimpleNamespace(total_memory=size * 2**20) for size in megabytes]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_properties", cards.__getitem__)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """An empty working directory, on a machine without a graphics card."""
    monkeypatch.chdir(tmp_path)
    put_cards(monkeypatch)
    return tmp_path


# ---- Its length ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "batches", "processes", "steps", "epochs"),
    [
        ("", 12, 1, 1600, 134),
        ("--max_train_steps=3000", 12, 1, 3000, 250),
        ("--max_train_steps=10", 12, 1, 10, 1),
        ("--max_train_epochs=2 --max_train_steps=5", 12, 1, 24, 2),
        ("--max_train_epochs=2 --gradient_accumulation_steps=5", 12, 1, 6, 2),
        ("--max_train_epochs=2", 13, 2, 14, 2),
        ("--max_train_epochs=2 --gradient_accumulation_steps=4", 13, 2, 4, 2),
        ("--max_train_epochs=2", 1, 2, 2, 2),
        ("--max_train_epochs=2", 0, 1, 2, 2),
    ],
)
def test_a_training_is_so_long(given, batches, processes, steps, epochs):
    assert length(options(*given.split()), batches, processes) == Length(steps, epochs)


TOLD_STEPS = {
    "batch 1/8, fp16 mixed precision": ([8, 1, 8], []),
    "batch 4 in each of 2 processes, fp16 mixed precision": ([4], [2]),
    "batch 1 in each of 4 processes on 2 machines, no mixed precision": ([1], [4, 2]),
}
TOLD_LENGTHS = {"24 steps, 2 epochs": Length(24, 2), "1 step, 1 epoch": Length(1, 1)}


@pytest.mark.parametrize("a_step", TOLD_STEPS)
@pytest.mark.parametrize("so_long", TOLD_LENGTHS)
def test_its_length_is_told_with_what_a_step_takes(so_long, a_step):
    batches, started = TOLD_STEPS[a_step]
    args = options(f"--mixed_precision={'no' if 'no mixed' in a_step else 'fp16'}")
    report = reported(plan.plan_length, TOLD_LENGTHS[so_long], batches, Started(*started), args)
    assert report == Report(plan={"training": f"{so_long}, {a_step}"})


@pytest.mark.parametrize("option", ["--max_train_steps=0", "--max_train_epochs=0"])
def test_a_training_of_no_step_is_an_error(option):
    args = options(option)
    report = reported(plan.plan_length, length(args, 12, 1), [1], Started(), args)
    assert report.errors == [f"{option} means zero steps: raise it"]


# ---- Its modules ---------------------------------------------------------------------------------


def test_the_modules_are_those_of_the_network_that_was_built():
    unet = block_modules(CONTENT) | block_modules(STYLE)
    with_text = network(trains_text=True)
    assert network().modules.keys() == unet
    assert with_text.modules.keys() == unet | text_encoder_modules("all")
    assert with_text.blocks == network().blocks == {"output_blocks.0.1", "output_blocks.1.1"}
    assert with_text.parameters == (440_320 + 401_408) * 64
    assert (network().trains_text, with_text.trains_text) == (False, True)


MODULES = {
    "160: 80 content (output_blocks.0.1), 80 style (output_blocks.1.1)": CONTENT_STYLE,
    "240: 80 layout (input_blocks.8.1), 80 content (output_blocks.0.1), "
    "80 style (output_blocks.1.1)": "blora_content_layout_style",
    "2: 1 in input_blocks.0.0, 1 in out": ("input_blocks.0.0$", "out.2$"),
    "71 in 12 blocks": (".*attn1.to_q$", "out.2$"),
}


@pytest.mark.parametrize("told", MODULES)
def test_modules_are_told_by_trait_and_block(told):
    modules = list(network(preset=MODULES[told]).modules)
    assert plan.count_by_trait(modules, plan.known_traits(Report())) == told


def test_a_broken_traits_file_is_a_warning_and_modules_are_told_without_it(monkeypatch, folder):
    monkeypatch.setattr(plan, "ROOT", folder)
    Path("blora_traits.json").write_text("{")
    report = Report()
    text = plan.count_by_trait(list(network().modules), plan.known_traits(report))
    assert text == "160: 80 in output_blocks.0.1, 80 in output_blocks.1.1"
    [warning] = report.warnings
    assert warning.startswith(f"{folder / 'blora_traits.json'} is not valid JSON (")


# ---- Its size ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "args", "told"),
    [
        ("", {}, "64, alpha 64: 28,180,480 parameters, 112.7 MB a file"),
        ("--network_alpha=1", {}, "64, alpha 1: 28,180,480 parameters, 112.7 MB a file"),
        ("--save_precision=fp16", {}, "28,180,480 parameters, 56.4 MB a file"),
        ("--save_precision=bf16", {}, "28,180,480 parameters, 56.4 MB a file"),
        ("--full_bf16", {}, "28,180,480 parameters, 56.4 MB a file"),
        ("--full_fp16", {}, "28,180,480 parameters, 56.4 MB a file"),
        ("--full_fp16 --save_precision=float", {}, "28,180,480 parameters, 112.7 MB a file"),
        ("", {"dora_wd": "True"}, "28,385,280 parameters, 113.5 MB a file"),  # 1280 a module more
        ("--dim_from_weights --network_weights=a.pt", {"rank": 8}, "as in a.pt: 3,522,560 param"),
    ],
)
def test_rank_parameters_and_a_files_size_are_told(given, args, told):
    assert told in reported(plan.plan_rank, network(**args), options(*given.split())).plan["rank"]


def test_from_a_gigabyte_on_a_size_is_told_in_gigabytes():
    assert [file_size(10**9 - 10**5), file_size(10**9)] == ["999.9 MB", "1.00 GB"]


def test_a_rank_that_is_left_to_the_network_is_told_so():
    args = options("--network_module=lycoris.kohya", without="network_dim")
    told = reported(plan.plan_rank, network(8), args).plan["rank"]
    assert told == "lycoris.kohya's default: 3,522,560 parameters, 14.1 MB a file"


@pytest.mark.parametrize(
    ("rank", "given", "at"),
    [(640, [], None), (641, [], "at rank 641 "), (641, ["--dim_from_weights"], "")],
)
def test_above_rank_640_it_notes_that_the_lora_outgrows_its_matrices(rank, given, at):
    sentence = f"{at}the LoRA is larger than the matrix it changes in 120 of 160 modules"
    args = options(f"--network_dim={rank}", *given)
    notes = reported(plan.plan_rank, network(rank), args).notes
    assert notes == [sentence] * (at is not None)


# ---- Its memory ----------------------------------------------------------------------------------


def test_the_unet_it_speaks_of_has_as_many_parameters_as_diffusers_own():
    assert sum(p.numel() for p in sdxl_unet_without_weights().parameters()) == plan.UNET


def test_the_cards_memory_is_a_sum_of_parts():
    assert told_memory(options(), network(), PRODIGY) == (
        "8.44 GB at least, computed: 5.13 GB U-Net in 16 bits, 1.64 GB text encoders, 112.7 MB "
        "LoRA, 112.7 MB gradients, 450.9 MB prodigy state, 993.0 MB activations "
        "(without --gradient_checkpointing, which is BLORA_SAVE_MEMORY=0: 2.80 GB more)"
    )


def in_bytes(told: str) -> float:
    number, unit = told.split()
    return float(number) * {"MB": 1e6, "GB": 1e9}[unit]


@pytest.mark.parametrize(
    ("without", "given", "args", "part"),
    [
        ("", "--network_module=lycoris.kohya", {}, "1.20 GB activations"),
        ("", "", {"trains_text": True}, "1.20 GB activations"),  # then it cannot stop early
        ("", "", {"preset": "blora_layout_style"}, "1.07 GB activations"),
        ("", "", {"preset": ("time_embed.0$",)}, "1.20 GB activations"),
        ("", "", {"preset": ("input_blocks.0.0$",)}, "1.20 GB activations"),
        ("", "", {"preset": ("input_blocks.4.1.proj_in$",)}, "1.15 GB activations"),
        ("", "", {"preset": ("out.2$",)}, " 0.0 MB activations"),
        ("", "--mixed_precision=no", {}, "10.27 GB U-Net in 32 bits, 3.27 GB text encoders, "),
        ("", "--mixed_precision=no", {}, "activations of unknown size"),
        ("", "--fp8_base_unet", {}, "2.57 GB U-Net in 8 bits, 1.64 GB text encoders, "),
        ("", "--fp8_base", {}, "2.57 GB U-Net in 8 bits, 817.7 MB text encoders, "),
        ("", "--cache_text_encoder_outputs", {}, "5.13 GB U-Net in 16 bits, 112.7 MB LoRA, "),
        ("", "--full_bf16", {}, "56.4 MB LoRA, 56.4 MB gradients, 225.4 MB prodigy state"),
        ("cache_latents", "", {}, "167.3 MB VAE, "),
        ("cache_latents", "--no_half_vae", {}, "334.6 MB VAE, "),
        ("gradient_checkpointing", "", {}, "3.79 GB activations"),
        ("gradient_checkpointing", "", {"rank": 1024}, "4.64 GB activations"),
        # the copies in 16 bits are the LoRA itself
        ("gradient_checkpointing", "--full_fp16", {}, "3.73 GB activations"),
    ],
)
def test_each_part_follows_the_options_and_the_network(without, given, args, part):
    told = told_memory(options(*given.split(), without=without), network(**args), PRODIGY)
    assert part in told
    total, parts = told.split(" at least, computed: ")
    sizes = [in_bytes(size) for size in re.findall(r"[\d.]+ [GM]B", parts.split(" (")[0])]
    assert abs(in_bytes(total) - sum(sizes)) < 0.03e9


def test_activations_grow_with_the_pixels_of_a_batch():
    # 0 are those of a dataset that does not tell its sizes
    sizes = {
        2 * MEGAPIXEL: "1.99 GB",
        MEGAPIXEL // 4: "248.2 MB",
        0: "state, activations of unknown",
    }
    told = {pixels: told_memory(options(), network(), PRODIGY, pixels) for pixels in sizes}
    assert [sizes[pixels] in told[pixels].partition("prodigy ")[2] for pixels in sizes] == [
        True
    ] * 3


def test_the_state_of_an_optimizer_that_was_not_counted_has_no_size():
    told = told_memory(options("--optimizer_type=Came"), network(), None)
    assert told.split(" gradients, ")[1].startswith("993.0 MB activations, Came state of unknown")
    assert " AdamW state" in told_memory(options(without="optimizer_type"), network(), 2.0)


# ---- Its saves -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "files", "states"),
    [
        ("", 0, 0),
        ("--save_every_n_steps=1000", 3, 3),  # the last step's is one of its own
        ("--save_every_n_steps=100 --save_last_n_steps=1000", 11, 11),
        ("--save_every_n_steps=1000 --save_last_n_steps=9000", 3, 3),
        ("--save_every_n_epochs=100", 2, 2),
        ("--save_every_n_epochs=125", 1, 1),  # not the last epoch
        ("--save_every_n_epochs=100 --save_last_n_epochs=9", 2, 2),
        ("--save_every_n_epochs=1 --save_last_n_epochs=2", 2, 2),
        ("--save_every_n_steps=1000 --save_every_n_epochs=100", 5, 5),
        ("--save_n_epoch_ratio=5", 4, 4),
        ("--save_n_epoch_ratio=999", 249, 249),
        ("--save_every_n_epochs=1 --save_last_n_epochs_state=3", 249, 3),
        ("--save_every_n_epochs=1 --save_last_n_epochs=2 --save_last_n_epochs_state=3", 2, 3),
        ("--save_every_n_steps=100 --save_last_n_steps_state=200", 30, 3),
    ],
)
def test_so_many_files_and_states_are_there_before_the_last(given, files, states):
    training, args = Length(3000, 250), options(*given.split())
    assert (saves(training, args), saves(training, args, "_state")) == (files, states)


def saving(*given: str) -> Report:
    """What is said of a training's saves of 56.4 MB."""
    args = options("--save_every_n_steps=1000", "--save_precision=fp16", *given)
    return reported(plan.plan_saves, Length(3000, 250), network(), PRODIGY, args)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("", "4 of 56.4 MB in _out"),
        # a state: the LoRA in 32 bits, and four times as much of the optimizer's
        ("--save_state", "4 of 56.4 MB and 4 states of 563.6 MB in _out"),
        ("--save_state_on_train_end", "4 of 56.4 MB and 1 states of 563.6 MB in _out"),
        ("--full_fp16 --save_state", "4 of 56.4 MB and 4 states of 281.8 MB in _out"),
        ("--output_dir=a/b", f"4 of 56.4 MB in {Path('a/b')}"),
    ],
)
def test_saves_are_told_with_the_free_space(given, told):
    pattern = rf"{re.escape(told)} \([\d.]+ [GM]B free\)"
    assert re.fullmatch(pattern, saving(*given.split()).plan["saves"])


@pytest.fixture
def little_room(monkeypatch) -> None:
    """A disk with 200 MB free."""
    free = shutil.disk_usage(".")._replace(free=200_000_000)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda folder: free)


@pytest.mark.usefixtures("little_room")
@pytest.mark.parametrize("name", ["hero_1", "cat[1]"])
def test_saves_that_do_not_fit_beside_those_they_replace_are_an_error(folder, name):
    option = f"--output_name={name}"
    sentence = (
        'do not fit into the 200.0 MB free at "{}": free some space, or raise --save_every_n_steps'
    )
    assert saving(option).errors == [f"4 of 56.4 MB {sentence.format(folder)}"]
    output = folder / "_out"
    output.mkdir()
    with (output / f"{name}-step00001000.safetensors").open("wb") as file:
        file.truncate(56_000_000)
    assert saving(option).errors == []
    assert saving(option, "--save_state").errors == [
        f"4 of 56.4 MB and 4 states of 563.6 MB {sentence.format(output)}"
    ]


# ---- All of the plan ----------------------------------------------------------------------------


def planned(*given: str, machine: int | None = None, without: str = "", **more: object) -> Report:
    """The plan of what a rehearsal hands on: options, datasets, a network and its optimizer."""
    group = ConcatDataset([TensorDataset(torch.zeros(batches)) for batches in (8, 4)])
    for dataset, batch_size in zip(group.datasets, (1, 2), strict=True):
        dataset.batch_size = batch_size
    args = options("--max_train_epochs=2", *given, without=without)
    rehearsal = Rehearsal(args=args, group=group, optimizer_state=PRODIGY, **more)
    started = Started() if machine is None else Started(2, 2, machine)
    return reported(plan.plan, rehearsal, started, MEGAPIXEL)


def test_a_plan_has_a_line_for_each():
    report = planned(network=made())
    assert list(report.plan) == ["training", "network", "modules", "rank", "memory", "saves"]
    assert report.plan["training"] == "24 steps, 2 epochs, batch 1/2, fp16 mixed precision"
    assert report.plan["network"] == "blora_network"
    assert report.plan["memory"] == told_memory(options(), network(), PRODIGY)
    assert len(report.modules) == 160
    assert report.errors == report.warnings == report.notes == []


def test_of_a_network_that_is_wrapped_the_length_is_told_alone():
    assert list(planned().plan) == ["training"]


@pytest.mark.parametrize(
    ("machine", "told", "errors"),
    [
        (0, "1 of 1.13 GB in _out ", 1),
        (1, "only on the first machine (--machine_rank=0)", 0),
    ],
)
@pytest.mark.usefixtures("little_room")
def test_the_first_of_several_machines_saves_and_the_others_need_no_room(machine, told, errors):
    report = planned(machine=machine, network=made(640))
    assert report.plan["training"].startswith("12 steps, 2 epochs, batch 1/2 in each of 2 ")
    assert report.plan["saves"].startswith(told)
    assert len(report.errors) == errors


CACHED = "--cache_text_encoder_outputs"
SAVE_MEMORY = (
    "set BLORA_SAVE_MEMORY to 1, or add --gradient_checkpointing, or lower batch_size or resolution"
)


@pytest.mark.parametrize(
    ("cards", "rank", "given", "without", "told"),
    [
        ([10240], 64, [], "", None),
        ([4096, 24576], 1024, [], "", None),  # the larger of two cards
        ([12288], 1024, [], "", ["12.88", "18.58", f"lower BLORA_RANK, or add {CACHED}"]),
        ([4096], 64, [CACHED], "", ["4.29", "6.80", "use a larger card"]),
        ([6144], 64, [CACHED], "gradient_checkpointing", ["6.44", "9.60", SAVE_MEMORY]),
    ],
)
def test_a_card_that_is_too_small_is_a_warning_that_says_what_to_change(
    monkeypatch, cards, rank, given, without, told
):
    put_cards(monkeypatch, *cards)
    report = planned(f"--network_dim={rank}", *given, without=without, network=made(rank))
    sentence = "the card has {} GB of memory, and this training takes at least {} GB (computed): {}"
    assert report.warnings == ([sentence.format(*told)] if told else [])


# ---- Warnings on the network --------------------------------------------------------------------

EVERYWHERE = ".*attn1.to_q$"  # in each of the 11 blocks with attention
TOO_STRONG = (
    "--network_alpha={} with --network_dim={} makes the change {} times as strong: give both the "
    "same, as BLORA_RANK does"
)
WARNINGS = {
    "--network_args have no preset, so LyCORIS trains all 160 modules that it can: "
    "add preset=lycoris_presets/blora_content_style.toml": [
        (CONTENT_STYLE, "--network_args"),
        (CONTENT_STYLE, "--network_args conv_dim=1 algo=lora"),
        (CONTENT_STYLE, "--network_module=lycoris.kohya --network_args"),
    ],
    'the preset "own.toml" trains 71 modules in 12 blocks of the U-Net: correct it, if two blocks '
    "are meant": [((EVERYWHERE, "out.2$"), "--network_args preset=own.toml")],
    "--network_module=networks.lora takes no preset and trains 160 modules: use lycoris.kohya or "
    "blora_network for a B-LoRA": [(CONTENT_STYLE, "--network_module=networks.lora")],
    TOO_STRONG.format(64, 8, 8): [(CONTENT_STYLE, "--network_dim=8")],
    TOO_STRONG.format(3, 2, 1.5): [(CONTENT_STYLE, "--network_dim=2 --network_alpha=3")],
    "": [
        (CONTENT_STYLE, ""),
        (CONTENT_STYLE, "--network_alpha=1"),
        (CONTENT_STYLE, "--network_alpha=0"),  # LyCORIS takes the rank for it
        (CONTENT_STYLE, "--dim_from_weights --network_args"),
        (CONTENT_STYLE, "--network_module=networks.lora --network_args"),
        ((EVERYWHERE,), "--network_args preset=own.toml"),
        ((EVERYWHERE, "out.2$"), "--network_args preset=full"),
    ],
}


@pytest.mark.parametrize(
    ("sentence", "preset", "given"), [(key, *case) for key in WARNINGS for case in WARNINGS[key]]
)
def test_a_network_that_is_not_a_b_lora_is_a_warning(sentence, preset, given):
    report = reported(check_network, network(preset=preset), options(*given.split()))
    assert report == Report(warnings=[sentence] if sentence else [])


@pytest.mark.parametrize(
    ("args", "warned"),
    [
        ({"dora_wd": "True", "bypass_mode": "True"}, True),
        ({"dora_wd": "True"}, False),
        ({"bypass_mode": "True"}, False),
        ({"bypass_mode": "True", "algo": "dylora"}, False),  # which knows no DoRA
    ],
)
def test_dora_that_lycoris_would_drop_is_a_warning(args, warned):
    sentence = (
        "with bypass_mode=True LyCORIS trains no DoRA, although dora_wd=True asks for it: remove "
        "one of the two from --network_args"
    )
    report = reported(option_warnings.check_dora, made(**args))
    assert report.warnings == [sentence] * warned


def test_the_tested_lycoris_releases_are_the_tested_ones():
    assert list(LYCORIS_TESTED) == LYCORIS


@pytest.mark.parametrize("version", ["1.0", "unknown"])
def test_a_lycoris_that_is_not_tested_is_a_note(monkeypatch, tmp_path, version):
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    if version != "unknown":
        info = tmp_path / f"lycoris_lora-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: lycoris_lora\nVersion: {version}\n")
    tested = ", ".join(LYCORIS_TESTED)
    sentence = f"LyCORIS {version} was not tested with this bundle; {tested} were"
    for module, notes in (("lycoris.kohya", [sentence]), ("networks.lora", [])):
        args = options(f"--network_module={module}", "--network_args")
        assert reported(check_network, network(), args).notes == notes


# ---- The text encoders ---------------------------------------------------------------------------

LEFT_OUT = (
    "{} modules of the text encoders are not trained because of --network_train_unet_only, as "
    "the recipes intend"
)
LYCORIS_PRINTS = "create LyCORIS for Text Encoder: 176 modules.\n"
# as networks/lora.py of sd-scripts 0.10.1 prints it
SD_SCRIPTS_PRINTS = (
    "create LoRA for Text Encoder 1:\ncreate LoRA for Text Encoder 2:\n"
    "create LoRA for Text Encoder 1: 72 modules.\n"
    "create LoRA for Text Encoder 2: 192 modules.\n"
)


def test_lycoris_prints_how_many_modules_it_makes():
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    logging.getLogger("LyCORIS").addHandler(handler)
    made.__wrapped__()  # which logs; the other tests share one
    logging.getLogger("LyCORIS").removeHandler(handler)
    assert LYCORIS_PRINTS in log.getvalue()


@pytest.mark.parametrize(
    ("printed", "trains_text", "without", "number"),
    [
        (LYCORIS_PRINTS, False, "", 176),
        (SD_SCRIPTS_PRINTS, False, "", 264),
        ("create LyCORIS for Text Encoder: 0 modules.\n", False, "", None),
        ("create LyCORIS for U-Net: 160 modules.\n", False, "", None),
        (LYCORIS_PRINTS, True, "", None),
        (LYCORIS_PRINTS, False, "network_train_unet_only", None),
    ],
)
def test_text_encoders_that_are_made_and_not_trained_are_a_note(
    printed, trains_text, without, number
):
    found, args = network(trains_text=trains_text), options(without=without)
    report = reported(option_warnings.check_text_encoders, printed, found, args)
    assert report == Report(notes=[LEFT_OUT.format(number)] if number else [])


# ---- The learning rate ---------------------------------------------------------------------------

OPTIMIZERS = {
    "Prodigy": prodigyopt.Prodigy,
    "AdamW": torch.optim.AdamW,
    "AdaFactor": transformers.Adafactor,
}
TOO_LOW = (
    "--optimizer_type=Prodigy finds its own learning rate, and {} times that is far too low: give "
    "--learning_rate=1"
)
TOO_HIGH = (
    "a learning rate of {} is far too high for --optimizer_type=AdamW: give --learning_rate=1e-4, "
    "for example"
)


def optimizer(name: str, rate: float | None) -> Any:
    """A real one, on one parameter."""
    return OPTIMIZERS[name]([torch.nn.Parameter(torch.zeros(2, 2))], lr=rate)


@pytest.mark.parametrize(
    ("name", "rate", "sentence"),
    [
        ("Prodigy", 0.11, None),
        ("Prodigy", 0.1, TOO_LOW.format("0.1")),
        ("Prodigy", 1e-4, TOO_LOW.format("0.0001")),
        ("AdamW", 0.09, None),
        ("AdamW", 0.1, TOO_HIGH.format("0.1")),
        ("AdamW", 1.0, TOO_HIGH.format("1")),
        ("AdaFactor", None, None),  # it finds its own
    ],
)
def test_a_learning_rate_for_another_kind_of_optimizer_is_a_warning(name, rate, sentence):
    groups, args = optimizer(name, rate).param_groups, options(f"--optimizer_type={name}")
    report = reported(option_warnings.check_rate, groups, args)
    assert report.warnings == ([sentence] if sentence else [])


def test_a_warm_up_that_begins_at_zero_does_not_hide_the_rate():
    adam = optimizer("AdamW", 1.0)
    transformers.get_constant_schedule_with_warmup(adam, 10)
    assert adam.param_groups[0]["lr"] == 0
    args = options(without="optimizer_type")
    report = reported(option_warnings.check_rate, adam.param_groups, args)
    assert report.warnings == [TOO_HIGH.format("1")]


# ---- All of it -----------------------------------------------------------------------------------


def checked(**more: object) -> Report:
    """What is said of a rehearsal with AdamW's rate at 1."""
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(optimizer("AdamW", 1.0))
    args = options("--optimizer_type=AdamW", "--network_alpha=128")
    rehearsal = Rehearsal(args=args, accelerator=accelerator, **more)
    return reported(option_warnings.check_options, rehearsal)


def test_the_network_the_log_and_the_optimizer_are_all_looked_at():
    dropped = made(dora_wd="True", bypass_mode="True")
    report = checked(network=dropped, printed=io.StringIO(LYCORIS_PRINTS))
    alpha, dora, rate = report.warnings
    assert alpha == TOO_STRONG.format(128, 64, 2)
    assert dora.startswith("with bypass_mode=True ")
    assert rate == TOO_HIGH.format("1")
    assert report.notes == [LEFT_OUT.format(176)]


def test_without_a_network_the_learning_rate_is_looked_at():
    assert checked().warnings == [TOO_HIGH.format("1")]
