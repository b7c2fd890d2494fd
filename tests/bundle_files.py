"""The files of the repository: what a user copies, and what git knows."""

from __future__ import annotations

import subprocess

from kohya_folder import ROOT

BUNDLE = [
    "blora_advice.py",
    "blora_checkpoint.py",
    "blora_cut.py",
    "blora_dataset.py",
    "blora_dataset.toml",
    "blora_gui_classic.json",
    "blora_gui_fast.json",
    "blora_inspect.py",
    "blora_look.py",
    "blora_lora.py",
    "blora_memory.py",
    "blora_names.py",
    "blora_network.py",
    "blora_options.py",
    "blora_pictures.py",
    "blora_plan.py",
    "blora_preflight.py",
    "blora_preview.py",
    "blora_prompts.txt",
    "blora_read.py",
    "blora_refusals.py",
    "blora_rehearsal.py",
    "blora_report.py",
    "blora_safetensors.py",
    "blora_sdxl.py",
    "blora_slicer.bat",
    "blora_slicer.py",
    "blora_strength.py",
    "blora_traits.json",
    "blora_words.py",
    "lycoris_presets",
    "sdxl_blora_classic.bat",
    "sdxl_blora_classic.sh",
    "sdxl_blora_fast.bat",
    "sdxl_blora_fast.sh",
]


def tracked(*pattern: str) -> list[str]:
    """Files that git knows, or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *pattern]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()
