"""The code blocks of README and docs/, and what makes a command in them one that works."""

from __future__ import annotations

import argparse
import re
import shlex
from itertools import takewhile

from accelerate.commands.launch import launch_command_parser
from kohya_folder import ROOT
from sdxl_train_network_options import build_parser as sd_scripts_parser

import blora_preflight
import blora_slicer
from blora import launch
from blora.preflight.processes import processes
from blora.sdxl import load_traits

PAGES = {
    path.stem: path.read_text(encoding="utf-8").replace("\r\n", "\n")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
# Those of sd-scripts' networks/resize_lora.py that the recipe speaks of; test_real_tools.py
# runs its command on the real one.
RESIZE = argparse.ArgumentParser()
for option in "model save_to new_rank save_precision dynamic_method device".split():
    RESIZE.add_argument(f"--{option}")
RESIZE.add_argument("--verbose", action="store_true")


def blocks(page: str) -> list[tuple[str, str]]:
    """A page's code blocks without their indent: the language, and the text."""
    found = re.findall(r"^( *)```(\w*)\n(.*?)^\1```$", PAGES[page], re.MULTILINE | re.DOTALL)
    return [(of, re.sub(f"^{indent}", "", text, flags=re.M)) for indent, of, text in found]


def blocks_of(page: str, language: str) -> list[str]:
    """Those of a language; "" has what is typed and what is printed."""
    return [text for of, text in blocks(page) if of == language]


def check_setting(word: str) -> None:
    """A setting that the launchers or torch know; accelerate takes its options."""
    name, _, value = word.partition("=")
    assert name in {*launch.SETTINGS, "CUDA_VISIBLE_DEVICES"}
    if name == "BLORA_ACCELERATE_ARGS":
        assert processes(value.split(), "script.py").lacks_multi_gpu is False


def check_launcher(line: str) -> None:
    """Known settings, a launcher that is there, and options that sd-scripts takes."""
    command = shlex.split(line)
    settings = list(takewhile(re.compile(r"[A-Z_]+=").match, command))
    launcher, *options = command[len(settings) :]
    for setting in settings:
        check_setting(setting)
    assert (ROOT / launcher.replace("my_", "sdxl_blora_")).is_file()  # a copy of that
    sd_scripts_parser().parse_args(options)
    for preset in re.findall(r"lycoris_presets/\w+\.toml", line):
        assert (ROOT / preset).is_file()


def check_slicer(line: str) -> None:
    """Options that the slicer takes, and traits that it has."""
    args = blora_slicer.build_parser().parse_args(shlex.split(line)[2:])
    known = load_traits(args.traits_file)
    assert blora_slicer.plan_cuts(args.loras, args.traits, args.alphas, known)


def check_resize(line: str) -> None:
    """Options that the resize tool takes."""
    assert RESIZE.parse_args(shlex.split(line)[2:]).save_precision == "fp16"


def check_preflight(line: str) -> None:
    """A command line that pre-flight, accelerate if it is named, and sd-scripts take."""
    command = shlex.split(line)
    assert blora_preflight.build_parser().parse_args(command[2:]).options
    script = next(i for i, word in enumerate(command) if word.endswith("sdxl_train_network.py"))
    sd_scripts_parser().parse_args(command[script + 1 :])
    if command[2:4] == ["accelerate", "launch"]:
        launch_command_parser().parse_args(command[4:])
