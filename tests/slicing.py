"""The slicer's command line as tests run it, and what a LoRA file holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import deserialize

import blora_slicer

Stored = dict[str, tuple[str, list[int], bytes]]


def slice_lora(*args: object) -> int:
    """Run the slicer with these arguments; its exit code."""
    return blora_slicer.main([str(arg) for arg in args])


def refusal(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The one sentence with which the slicer refuses, and nothing else is said."""
    assert slice_lora(*args) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("error: ").rstrip("\n")


def stored(path: Path) -> Stored:
    """Type, shape and bytes of each tensor, as safetensors' own reader hands them out."""
    return {
        key: (entry["dtype"], entry["shape"], bytes(entry["data"]))
        for key, entry in deserialize(path.read_bytes())
    }


def modules(path: Path) -> set[str]:
    """The names of the modules in a file, such as lora_unet_output_blocks_0_1_proj_in."""
    return {key.split(".")[0] for key in stored(path)}


def all_traits(folder: Path, **traits: str) -> Path:
    """A traits file in which each trait is what starts with a word; "all" is everything."""
    path = folder / "traits.json"
    words = {"all": "lora_"} | traits
    path.write_text(json.dumps({name: {"whitelist": [word]} for name, word in words.items()}))
    return path
