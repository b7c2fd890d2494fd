"""The code blocks of README and docs/, and what makes a command in them one that works."""

from __future__ import annotations

import re
import shlex
from itertools import takewhile

from kohya_folder import ROOT
from sdxl_train_network_options import build_parser

from blora import launch
from blora.preflight.processes import processes

PAGES = {
    path.stem: path.read_text(encoding="utf-8").replace("\r\n", "\n")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}


def blocks(page: str) -> list[tuple[str, str]]:
    """A page's code blocks without their indent: the language, and the text."""
    found = re.findall(r"^( *)```(\w*)\n(.*?)^\1```$", PAGES[page], re.MULTILINE | re.DOTALL)
    return [(of, re.sub(f"^{indent}", "", text, flags=re.M)) for indent, of, text in found]


def blocks_of(page: str, language: str) -> list[str]:
    """Those of a language; "" has what is typed and what is printed."""
    return [text for of, text in blocks(page) if of == language]


def check_setting(word: str) -> None:
    """A setting that the launchers, torch or transformers know; accelerate takes its options."""
    name, _, value = word.partition("=")
    assert name in {*launch.SETTINGS, "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE"}
    if name == "BLORA_ACCELERATE_ARGS":
        assert processes(value.split(), "script.py").lacks_multi_gpu is False


def check_launcher(line: str) -> None:
    settings = list(takewhile(re.compile(r"[A-Z_]+=").match, shlex.split(line)))
    launcher, *options = shlex.split(line)[len(settings) :]
    for setting in settings:
        check_setting(setting)
    assert (ROOT / launcher.replace("my_", "sdxl_blora_")).is_file()  # a copy of that
    build_parser().parse_args(options)
    presets = re.findall(r"lycoris_presets/(?!my_)\w+\.toml", line)  # my_ are the reader's own
    assert all((ROOT / preset).is_file() for preset in presets)
