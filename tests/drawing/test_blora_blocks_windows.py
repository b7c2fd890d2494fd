"""blora_blocks.py's command line as cmd passes it on, with the Python for Windows."""

from __future__ import annotations

import pytest
from comparing import CHECKPOINT, make_folder
from kohya_folder import Bat

pytestmark = pytest.mark.shell


def test_prompts_with_brackets_and_signs_and_groups_of_blocks_arrive_as_they_are(cmd, tmp_path):
    folder, bat = make_folder(tmp_path / "kohya folder"), Bat(cmd)
    bat.install_python(folder / "venv/Scripts")
    checkpoint = CHECKPOINT.replace("/", "\\")
    other = r"1girl, watercolor \(medium\) & (ink:1.2), 50%% red --l 5"
    lines = [
        rf'--checkpoint {checkpoint} --prompt "a fox" --other "{other}" --blocks OUT00+OUT01',
        rf"--checkpoint {checkpoint} --pairs anime --blocks OUT00+OUT01 POOLED",
        "--write my --content OUT00 --style OUT01+OUT02",
    ]
    commands = [rf"venv\Scripts\python blora_blocks.py {line}" for line in lines]
    (folder / "blocks.bat").write_bytes("\r\n".join(["@echo off", *commands, ""]).encode())
    done, _ = bat.run(folder / "blocks.bat", [], folder, tmp_path / "log", {})
    prompt, pair, write = done.stderr.splitlines()
    assert prompt == (
        f'error: "{other.replace("%%", "%")}" has options, and those behind --prompt hold for '
        "both: leave them out of --other"
    )
    # Here there is no torch: all that comes before it is right.
    assert pair.startswith("error: no torch in this Python (")
    assert write == "note: no torch in this Python, so nobody checked what the preset trains"
    assert (folder / "lycoris_presets/my_content_style.toml").is_file()
    assert (folder / "my_traits.json").is_file()
