"""What sd-scripts and LyCORIS log is passed on once, unless pre-flight says it itself."""

from __future__ import annotations

import logging
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from reports import reported

from blora.preflight.trainer_warnings import listening, pass_on

SNR = "zero_terminal_snr is enabled. training will be unexpected"
NOT_FOUND = "UNet: No modules matched the following target names/patterns: ['a.b']"
OWN_WORDS = "neither caption file nor class tokens are found. use empty caption for a.png"


@pytest.fixture(autouse=True)
def script(monkeypatch) -> None:
    """This file is a part of the trainer."""
    monkeypatch.setattr(sys, "argv", [str(Path(__file__).with_name("train.py"))])


def passed_on(*texts: str, name: str = "library.x", args: str = "") -> list[str]:
    with listening() as heard:
        for text in texts:
            logging.getLogger(name).warning(text)
    report = reported(pass_on, heard, Namespace(network_args=args.split(), network_dropout=None))
    return [f"warning: {text}" for text in report.warnings] + [f"note: {t}" for t in report.notes]


def test_it_is_said_once_in_english():
    both = f"{SNR} / zero_terminal_snrが有効ですが"
    assert passed_on(both, both) == [f"warning: sd-scripts warns: {SNR}"]
    advice = "constant_with_warmup will be good"
    assert passed_on(f"{advice} / スケジューラは") == [f"note: sd-scripts warns: {advice}"]


def test_handlers_that_are_removed_and_levels_below_change_nothing():
    with listening() as heard:
        logging.root.handlers, before = [], logging.root.handlers
        logging.getLogger("library.x").info("it")
        logging.getLogger("library.x").warning(SNR)
        logging.root.handlers = before
    assert [record.getMessage() for record in heard] == [SNR]
    logging.getLogger("library.x").warning("later")
    assert len(heard) == 1


def test_what_preflight_says_itself_is_not_passed_on():
    def load_dreambooth_dir() -> None:
        logging.getLogger("library.x").warning(OWN_WORDS)

    said = (
        "no regularization images / 正則化画像が",
        "recommend option: lr=1.0",
        "長すぎます。",
    )
    assert passed_on(*said) == []
    with listening() as heard:
        load_dreambooth_dir()
        logging.getLogger("library.x").error("No data found")  # what is raised says it
    assert reported(pass_on, heard, Namespace()).notes == []


def test_other_packages_are_not_heard(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "train.py")])
    assert passed_on(SNR, name="accelerate.state") == []
    assert passed_on("it", name="LyCORIS") == ["note: LyCORIS warns: it"]


def test_a_name_that_fits_nothing_counts_where_it_is_the_presets(tmp_path):
    preset = tmp_path / "my.toml"
    preset.write_text('unet_target_name = ["a.b"]')
    told = [f"warning: LyCORIS warns: {NOT_FOUND}"]
    assert passed_on(NOT_FOUND, name="LyCORIS", args=f"algo=lora preset={preset}") == told
    assert passed_on(NOT_FOUND, name="LyCORIS", args="preset=full") == []
    preset.write_text("enable_conv = true")
    assert passed_on(NOT_FOUND, name="LyCORIS", args=f"preset={preset}") == []


def test_dropout_that_dora_ignores_counts_where_it_was_asked_for():
    text = "Using weight_decompose=True with LoRA (DoRA) will ignore network_dropout."
    assert passed_on(text, name="LyCORIS", args="dora_wd=True") == []
    asked = passed_on(text, name="LyCORIS", args="dora_wd=True dropout=0.1")
    assert asked == [f"warning: LyCORIS warns: {text}"]
