"""Warnings on options that the trainer would take without a word.

Networks, optimizers and accelerate are the real ones; only the graphics cards are not there.
"""

from __future__ import annotations

import io
import logging
from argparse import Namespace
from importlib import metadata
from typing import Any

import prodigyopt
import pytest
import torch
import transformers
from accelerate import Accelerator
from lycoris_releases import LYCORIS
from rehearsed_networks import made, network, options

from blora.preflight import option_warnings
from blora.preflight.option_warnings import LYCORIS_TESTED, check_network
from blora.preflight.rehearsal import Rehearsal
from blora.preflight.report import Report


def advised(found: Any, args: Namespace) -> list[str]:
    report = Report()
    check_network(found, args, report)
    assert report.errors == report.notes == []
    return report.warnings


# ---- The network ---------------------------------------------------------------------------------


def test_a_launchers_network_passes_without_a_word():
    assert advised(network(), options()) == []


@pytest.mark.parametrize("module", ["lycoris.kohya", "blora_network"])
@pytest.mark.parametrize("given", [[], ["--network_args", "conv_dim=1", "algo=lora"]])
def test_a_network_without_a_preset_is_a_warning(module, given):
    args = options(f"--network_module={module}", "--network_args", *given[1:])
    assert advised(network(), args) == [
        "--network_args have no preset, so LyCORIS trains all 160 modules that it can: "
        "add preset=lycoris_presets/blora_content_style.toml"
    ]


def test_a_preset_of_ones_own_that_trains_all_layers_is_a_warning(tmp_path):
    preset = tmp_path / "all.toml"
    classes = '["Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"]'
    # LyCORIS keeps what an earlier preset said and this one does not.
    preset.write_text(
        f"enable_conv = true\nunet_target_module = {classes}\nunet_target_name = []\n"
    )
    everything = network(preset=str(preset))
    args = options("--network_args", f"preset={preset}")
    modules, blocks = len(everything.modules), len(everything.blocks)
    assert blocks > 30
    assert advised(everything, args) == [
        f'the preset "{preset}" trains {modules} modules in {blocks} blocks of the U-Net: correct '
        "it, if two blocks are meant"
    ]
    assert advised(everything, options("--network_args", "preset=full")) == []


def test_a_preset_of_all_attention_blocks_passes(tmp_path):
    preset = tmp_path / "attention.toml"
    preset.write_text(
        'enable_conv = false\nunet_target_module = ["CrossAttention"]\nunet_target_name = []\n'
    )
    attention = network(preset=str(preset))
    assert len(attention.blocks) == 11
    assert advised(attention, options("--network_args", f"preset={preset}")) == []


def test_a_preset_that_the_network_does_not_know_is_a_warning():
    args = options("--network_module=networks.lora", "--network_args", "preset=a.toml")
    assert advised(network(), args) == [
        "--network_module=networks.lora takes no preset and trains 160 modules: use "
        "lycoris.kohya or blora_network for a B-LoRA"
    ]


@pytest.mark.parametrize("given", [["--network_module=networks.lora"], ["--dim_from_weights"]])
def test_a_network_that_needs_no_preset_passes(given):
    assert advised(network(), options(*given, "--network_args")) == []


@pytest.mark.parametrize(
    ("given", "times"),
    [
        (["--network_dim=8", "--network_alpha=64"], "8 times"),
        (["--network_dim=2", "--network_alpha=3"], "1.5 times"),
        (["--network_dim=64", "--network_alpha=64"], None),
        (["--network_dim=64", "--network_alpha=1"], None),
        (["--network_dim=64", "--network_alpha=0"], None),  # LyCORIS takes the rank for it
    ],
)
def test_an_alpha_above_the_rank_is_a_warning(given, times):
    told = advised(network(), options(*given))
    rank, alpha = (word.split("=")[1] for word in given)
    assert told == (
        [
            f"--network_alpha={alpha} with --network_dim={rank} makes the change {times} as "
            "strong: give both the same, as BLORA_RANK does"
        ]
        if times
        else []
    )


@pytest.mark.parametrize(
    ("args", "warned"),
    [
        ({"dora_wd": "True", "bypass_mode": "True"}, True),
        ({"dora_wd": "True", "bypass_mode": "False"}, False),
        ({"dora_wd": "True"}, False),
        ({"bypass_mode": "True"}, False),
        ({"bypass_mode": "True", "algo": "dylora"}, False),  # which knows no DoRA
    ],
)
def test_dora_that_lycoris_would_drop_is_a_warning(args, warned):
    report = Report()
    option_warnings.check_dora(made(**args), report)
    sentence = (
        "with bypass_mode=True LyCORIS trains no DoRA, although dora_wd=True asks for it: remove "
        "one of the two from --network_args"
    )
    assert report.warnings == ([sentence] if warned else [])


def test_the_tested_lycoris_releases_are_the_tested_ones():
    assert list(LYCORIS_TESTED) == LYCORIS


@pytest.mark.parametrize("version", ["1.0", None])
def test_a_lycoris_that_is_not_tested_is_a_note(monkeypatch, tmp_path, version):
    # The first of the name that Python finds counts.
    info = tmp_path / "lycoris_lora-1.0.dist-info"
    if version:
        info.mkdir()
        (info / "METADATA").write_text(f"Name: lycoris_lora\nVersion: {version}\n")
        monkeypatch.syspath_prepend(tmp_path)
    else:
        monkeypatch.setattr("sys.path", [str(tmp_path)])
        with pytest.raises(metadata.PackageNotFoundError):
            metadata.version("lycoris_lora")
    tested = ", ".join(LYCORIS_TESTED)
    sentence = f"LyCORIS {version or 'unknown'} was not tested with this bundle; {tested} were"
    for module, notes in (("lycoris.kohya", [sentence]), ("networks.lora", [])):
        report = Report()
        check_network(network(), options(f"--network_module={module}", "--network_args"), report)
        assert report.notes == notes


# ---- The text encoders ---------------------------------------------------------------------------

LEFT_OUT = (
    "{} modules of the text encoders are not trained because of --network_train_unet_only, as "
    "the recipes intend"
)


def left_out(printed: str, *, trains_text: bool = False, without: str = "") -> str:
    found = network(trains_text=trains_text)
    report = Report()
    args = options(without=without)
    option_warnings.check_text_encoders(printed, found, args, report)
    return "".join(report.notes)


def test_the_text_encoders_modules_that_lycoris_made_in_vain_are_a_note():
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    logging.getLogger("LyCORIS").addHandler(handler)
    made.__wrapped__()  # which logs; the other tests share one
    logging.getLogger("LyCORIS").removeHandler(handler)
    assert left_out(log.getvalue()) == LEFT_OUT.format(176)


@pytest.mark.parametrize(
    ("printed", "number"),
    [
        # as networks/lora.py of sd-scripts 0.10.1 prints it
        (
            "create LoRA for Text Encoder 1:\ncreate LoRA for Text Encoder 2:\n"
            "create LoRA for Text Encoder 1: 72 modules.\n"
            "create LoRA for Text Encoder 2: 192 modules.\n",
            264,
        ),
        ("create LyCORIS for Text Encoder: 0 modules.\n", 0),
        ("create LyCORIS for U-Net: 160 modules.\n", 0),
    ],
)
def test_they_are_counted_as_sd_scripts_prints_them(printed, number):
    assert left_out(printed) == (LEFT_OUT.format(number) if number else "")


def test_text_encoders_that_are_trained_are_not_left_out():
    printed = "create LyCORIS for Text Encoder: 176 modules.\n"
    assert left_out(printed, trains_text=True) == ""
    assert left_out(printed, without="network_train_unet_only") == ""


# ---- The learning rate ---------------------------------------------------------------------------


def optimizer(name: str, rate: float | None) -> Any:
    """A real one, on one parameter."""
    parameters = [torch.nn.Parameter(torch.zeros(2, 2))]
    if name == "Prodigy":
        return prodigyopt.Prodigy(parameters, lr=rate)
    if name == "AdaFactor":
        own = {"relative_step": False, "scale_parameter": False} if rate else {}
        return transformers.Adafactor(parameters, lr=rate, **own)
    return torch.optim.AdamW(parameters, lr=rate)


TOO_LOW = (
    "--optimizer_type={} finds its own learning rate, and {} times that is far too low: give "
    "--learning_rate=1"
)
TOO_HIGH = (
    "a learning rate of {} is far too high for --optimizer_type={}: give --learning_rate=1e-4, for "
    "example"
)


@pytest.mark.parametrize(
    ("name", "rate", "sentence"),
    [
        ("Prodigy", 1.0, None),
        ("Prodigy", 0.5, None),
        ("Prodigy", 0.1, TOO_LOW.format("Prodigy", "0.1")),
        ("Prodigy", 1e-4, TOO_LOW.format("Prodigy", "0.0001")),
        ("AdamW", 1e-4, None),
        ("AdamW", 0.09, None),
        ("AdamW", 1.0, TOO_HIGH.format("1", "AdamW")),
        ("AdaFactor", 1e-4, None),
        ("AdaFactor", 1.0, TOO_HIGH.format("1", "AdaFactor")),
        ("AdaFactor", None, None),  # it finds its own
    ],
)
def test_a_learning_rate_for_another_kind_of_optimizer_is_a_warning(name, rate, sentence):
    report = Report()
    groups = optimizer(name, rate).param_groups
    option_warnings.check_rate(groups, options(f"--optimizer_type={name}"), report)
    assert report.warnings == ([sentence] if sentence else [])


def test_a_warm_up_that_begins_at_zero_does_not_hide_the_rate():
    adam = optimizer("AdamW", 1.0)
    transformers.get_constant_schedule_with_warmup(adam, 10)
    assert adam.param_groups[0]["lr"] == 0
    report = Report()
    option_warnings.check_rate(adam.param_groups, options(without="optimizer_type"), report)
    assert report.warnings == [TOO_HIGH.format("1", "AdamW")]


# ---- All of it -----------------------------------------------------------------------------------


def rehearsed(rate: float, **more: object) -> Rehearsal:
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(optimizer("AdamW", rate))
    args = options("--optimizer_type=AdamW", "--network_alpha=128")
    return Rehearsal(args=args, accelerator=accelerator, **more)


def test_the_network_the_log_and_the_optimizer_are_all_looked_at():
    printed = io.StringIO("create LyCORIS for Text Encoder: 176 modules.\n")
    report = Report()
    dropped = made(dora_wd="True", bypass_mode="True")
    option_warnings.check_options(rehearsed(1.0, network=dropped, printed=printed), report)
    starts = ["--network_alpha=128 ", "with bypass_mode=True ", "a learning rate of 1 "]
    told = zip(report.warnings, starts, strict=True)
    assert all(warning.startswith(start) for warning, start in told)
    assert report.notes == [LEFT_OUT.format(176)]


def test_without_a_network_the_learning_rate_is_looked_at():
    report = Report()
    option_warnings.check_options(rehearsed(1.0), report)
    assert report.warnings == [TOO_HIGH.format("1", "AdamW")]
