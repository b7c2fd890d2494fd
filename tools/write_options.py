"""Write docs/options.md, which shows what each program prints for --help.

Run it as: python tools/write_options.py
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import blora_blocks
import blora_compare
import blora_preflight
import blora_slicer

PAGE = Path(__file__).resolve().parent.parent / "docs/options.md"
INTRO = """# Every option

What each program prints for `--help`. A launcher's settings are at its top, and every option given
to it is passed on to sd-scripts' `sdxl_train_network.py`.
"""


def main() -> None:
    os.environ["COLUMNS"] = "80"  # argparse wraps at the width of the terminal
    parts = [INTRO]
    for program in (blora_preflight, blora_slicer, blora_compare, blora_blocks):
        name = f"{program.__name__}.py"
        help_text = program.build_parser().format_help().rstrip()
        parts.append(f"## {name}\n\n```\n$ python {name} --help\n{help_text}\n```\n")
    PAGE.write_text("\n".join(parts), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
