"""Warnings on options that the trainer would take without a word.

Networks, optimizers and accelerate are the real ones; only the graphics cards are not there.
"""

from __future__ import annotations

import io
import logging
from typing import Any

import prodigyopt
import pytest
import torch
import transformers
from accelerate import Accelerator
from lycoris_releases import LYCORIS
from rehearsed_networks import CONTENT_STYLE, made, network, options
from reports import reported

from blora.preflight import option_warnings
from blora.preflight.option_warnings import LYCORIS_TESTED, check_network
from blora.preflight.rehearsal import Rehearsal
from blora.preflight.report import Report

# ---- The network ---------------------------------------------------------------------------------

EVERYWHERE = ".*attn1.to_q$"  # in each of the 11 blocks with attention
NO_PRESET = (
    "--network_args have no preset, so LyCORIS trains all 160 modules that it can: "
    "add preset=lycoris_presets/blora_content_style.toml"
)
TOO_MANY = (
    'the preset "own.toml" trains 71 modules in 12 blocks of the U-Net: correct it, if two blocks '
    "are meant"
)
NOT_ITS_OWN = (
    "--network_module=networks.lora takes no preset and trains 160 modules: use lycoris.kohya or "
    "blora_network for a B-LoRA"
)
TOO_STRONG = (
    "--network_alpha={} with --network_dim={} makes the change {} times as strong: give both the "
    "same, as BLORA_RANK does"
)


@pytest.mark.parametrize(
    ("given", "preset", "sentence"),
    [
        ("", CONTENT_STYLE, None),
        ("--network_args", CONTENT_STYLE, NO_PRESET),
        ("--network_args conv_dim=1 algo=lora", CONTENT_STYLE, NO_PRESET),
        ("--network_module=lycoris.kohya --network_args", CONTENT_STYLE, NO_PRESET),
        ("--dim_from_weights --network_args", CONTENT_STYLE, None),
        ("--network_args preset=own.toml", (EVERYWHERE,), None),
        ("--network_args preset=own.toml", (EVERYWHERE, "out.2$"), TOO_MANY),
        ("--network_args preset=full", (EVERYWHERE, "out.2$"), None),
        ("--network_module=networks.lora --network_args", CONTENT_STYLE, None),
        ("--network_module=networks.lora", CONTENT_STYLE, NOT_ITS_OWN),
        ("--network_dim=8 --network_alpha=64", CONTENT_STYLE, TOO_STRONG.format(64, 8, 8)),
        ("--network_dim=2 --network_alpha=3", CONTENT_STYLE, TOO_STRONG.format(3, 2, 1.5)),
        ("--network_alpha=1", CONTENT_STYLE, None),
        ("--network_alpha=0", CONTENT_STYLE, None),  # LyCORIS takes the rank for it
    ],
)
def test_a_network_that_is_not_a_b_lora_is_a_warning(given, preset, sentence):
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
