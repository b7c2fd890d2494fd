"""Write docs/blora_options.md: the help of each program, as it prints it.

python tools/write_options.py            writes it
python tools/write_options.py --check    exits 1 where the file is not what would be written
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/blora_options.md"
INTRO = """# Every option

What `--help` of each program prints. The launchers have the settings at their top, and hand every
option on to sd-scripts' `sdxl_train_network.py`.
"""


def page() -> str:
    """The page's text, at the width of a terminal of 80 columns."""
    sys.path.insert(0, str(ROOT))
    import blora_preflight
    import blora_slicer

    os.environ["COLUMNS"] = "80"
    parts = [INTRO]
    for module in (blora_preflight, blora_slicer):
        name = f"{module.__name__}.py"
        help_text = module.build_parser().format_help().rstrip()
        parts.append(f"## {name}\n\n```\n$ python {name} --help\n{help_text}\n```\n")
    return "\n".join(parts)


def main(argv: list[str]) -> int:
    """Write the page, or compare it."""
    if argv == ["--check"]:
        if PAGE.read_text(encoding="utf-8") != page():
            print("docs/blora_options.md is stale: python tools/write_options.py", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(page(), encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
