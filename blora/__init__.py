"""What blora_slicer.py and blora_preflight.py are made of: a ground floor and two halls.

text, sdxl, tensorfile and sheet are the ground floor. slicer/ is the slicer's hall, preflight/ is
pre-flight's, and neither imports the other.
"""

from pathlib import Path

VERSION = "2.0.0"
ROOT = Path(__file__).resolve().parent.parent  # the programs, blora_traits.json, blora_network.py

# What 1.x kept beside the programs, and nothing imports since 2.0.
FLAT_FILES = tuple(
    f"blora_{name}.py"
    for name in (
        "advice checkpoint cut dataset inspect look lora memory names options pictures plan preset "
        "preview read refusals rehearsal report safetensors sdxl strength words"
    ).split()
)


def leftovers() -> str:
    """A sentence on the files of 1.x that still lie beside the programs; empty where none does."""
    left = [name for name in FLAT_FILES if (ROOT / name).exists()]
    return f"left over from version 1 and no longer used: {', '.join(left)}: delete" if left else ""
