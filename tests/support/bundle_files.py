"""The files of the repository: what a user copies, and what git knows."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from kohya_folder import ROOT

BUNDLE = """
    blora blora_blocks.py blora_compare.py blora_dataset.toml blora_gui_classic.json
    blora_gui_fast.json blora_network.py blora_preflight.py blora_prompts.txt blora_slicer.bat
    blora_slicer.py blora_traits.json lycoris_presets sdxl_blora_classic.bat sdxl_blora_classic.sh
    sdxl_blora_fast.bat sdxl_blora_fast.sh
""".split()


def unpack(folder: Path) -> Path:
    """The repository's files, as they come out of an archive."""
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def git(*words: str) -> list[str]:
    """The lines that git prints."""
    command = ["git", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def tracked(*pattern: str) -> list[str]:
    """Files that git knows, or would add."""
    return git("ls-files", "--cached", "--others", "--exclude-standard", *pattern)
