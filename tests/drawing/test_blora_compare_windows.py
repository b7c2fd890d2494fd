"""blora_compare.py's command line as cmd passes it on, with the Python for Windows."""

from __future__ import annotations

import pytest
from comparing import CHECKPOINT, make_folder, save
from kohya_folder import Bat
from lora_files import CONTENT

pytestmark = pytest.mark.shell


def test_a_pattern_which_cmd_leaves_as_it_is_names_the_saves(cmd, tmp_path):
    folder, bat = make_folder(tmp_path / "kohya folder"), Bat(cmd)
    bat.install_python(folder / "venv/Scripts")
    save(folder / "_out/my project/a-1.safetensors", 100)
    save(folder / "_out/my project/slice.safetensors", 100, CONTENT)
    checkpoint = CHECKPOINT.replace("/", "\\")
    lines = [
        rf'venv\Scripts\python blora_compare.py --checkpoint {checkpoint} --loras "_out\{loras}"'
        for loras in (r"my project\*.safetensors", "my project", r"*\no*.safetensors")
    ]
    (folder / "page.bat").write_bytes("\r\n".join(["@echo off", *lines, ""]).encode())
    done, _ = bat.run(folder / "page.bat", [], folder, tmp_path / "log", {})
    left_out = "note: left out slice.safetensors, which has nothing of style"
    *first, nothing = done.stderr.splitlines()
    assert first[::2] == [left_out] * 2
    # Here there is no torch: all that comes before it is right.
    assert all(line.startswith("error: no torch in this Python (") for line in first[1::2])
    assert nothing == r'error: no LoRA to compare in "_out\*\no*.safetensors": correct --loras'
