"""The code of the programs: slicer/, preflight/, and drawing/ of blora_compare.py.

All use text, sdxl, tensorfile and sheet. drawing/ stands on slicer/; slicer/ and preflight/ do not
import from each other.
"""

from pathlib import Path

VERSION = "2.5.0"
ROOT = Path(__file__).resolve().parent.parent  # the programs, blora_traits.json, blora_network.py

# Version 1 had these beside the programs. Nothing imports them any more.
FLAT_FILES = tuple(
    f"blora_{name}.py"
    for name in (
        "advice checkpoint cut dataset inspect look lora memory names options pictures plan preset "
        "preview read refusals rehearsal report safetensors sdxl strength words"
    ).split()
)


def leftovers() -> str:
    """A sentence on files of version 1 that still lie beside the programs; empty if none do."""
    names = ", ".join(name for name in FLAT_FILES if (ROOT / name).exists())
    if not names:
        return ""
    return (
        "version 1 left files beside blora_slicer.py that nothing uses any more: "
        f"{names}: delete them"
    )
