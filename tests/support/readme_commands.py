"""What makes a command in the README or on a page of docs/ one that works."""

from __future__ import annotations

import argparse
import re
from itertools import takewhile

from kohya_folder import ROOT
from sdxl_train_network_options import build_parser as sd_scripts_parser

import blora_preflight
import blora_slicer
from blora.preflight.processes import processes
from blora.sdxl import load_traits

# Those of sd-scripts' networks/resize_lora.py that the recipe speaks of; test_real_tools.py
# runs its command on the real one.
RESIZE = ("--model", "--save_to", "--new_rank", "--save_precision")
RESIZE += ("--dynamic_method", "--device", "--verbose")
# fast has every setting of classic, and one more; pre-flight reads two by itself.
SETTINGS = {
    *re.findall(r"^(BLORA_\w+)=", (ROOT / "sdxl_blora_fast.sh").read_text(), re.MULTILINE),
    *re.findall(r'setting\("(BLORA_\w+)"', (ROOT / "blora_preflight.py").read_text()),
}


def check_setting(word: str) -> None:
    """A setting that the launchers or torch know; accelerate takes its options."""
    name, _, value = word.partition("=")
    assert name in {*SETTINGS, "CUDA_VISIBLE_DEVICES"}
    if name == "BLORA_ACCELERATE_ARGS":
        assert processes(value.split(), "script.py").lacks_multi_gpu is False


def check_launcher(command: list[str]) -> None:
    """Known settings, a launcher that is there, and options that sd-scripts takes."""
    settings = list(takewhile(re.compile(r"[A-Z_]+=").match, command))
    launcher, *options = command[len(settings) :]
    for setting in settings:
        check_setting(setting)
    assert (ROOT / launcher).is_file()
    sd_scripts_parser().parse_args(options)
    for preset in re.findall(r"lycoris_presets/\w+\.toml", " ".join(command)):
        assert (ROOT / preset).is_file()


def check_cmd(words: list[str]) -> None:
    """A line for cmd.exe: a launcher, or a known setting."""
    if words[0] == "set":
        check_setting(words[1])
    else:
        check_launcher(words)


def check_slicer(command: list[str]) -> None:
    """Options that the slicer takes, and traits that it has."""
    args = blora_slicer.build_parser().parse_args(command[2:])
    known = load_traits(args.traits_file)
    assert blora_slicer.plan_cuts(args.loras, args.traits, args.alphas, known)


def resize_parser() -> argparse.ArgumentParser:
    """The command line of the resize tool."""
    parser = argparse.ArgumentParser()
    for option in RESIZE:
        parser.add_argument(option, **({"action": "store_true"} if option == "--verbose" else {}))
    return parser


def check_resize(command: list[str]) -> None:
    """Options that the resize tool takes."""
    assert resize_parser().parse_args(command[2:]).save_precision == "fp16"


def check_preflight(command: list[str]) -> None:
    """A command line that pre-flight takes."""
    assert blora_preflight.build_parser().parse_args(command[2:]).options
