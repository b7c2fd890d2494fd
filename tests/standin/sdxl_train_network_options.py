"""The options of sd-scripts' sdxl_train_network.py, read without what it trains with.

Needs sdxl_train_network_options.json beside this file, or in ../data where the tests keep it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
OPTIONS_FILE = "sdxl_train_network_options.json"


def int_or_float(text: str) -> int | float:
    """A number of steps (500), or a share of them (0.1 or 10%)."""
    if text.endswith("%"):
        return float(text[:-1]) / 100
    return int(text) if float(text) >= 1 else float(text)


def build_parser(description: str = "") -> argparse.ArgumentParser:
    """Every option of sd-scripts; abbreviations work, as they do there."""
    path = next((p for p in (HERE, HERE.parent / "data") if (p / OPTIONS_FILE).is_file()), HERE)
    options = json.loads((path / OPTIONS_FILE).read_text(encoding="utf-8"))["options"]
    types = {"str": str, "int": int, "float": float, "Path": Path, "int_or_float": int_or_float}
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=layout)
    for name, option in options.items():
        if option["kind"] == "storetrue":
            parser.add_argument(name, action="store_true")
        elif option["kind"] == "store":
            more = {key: option[key] for key in ("nargs", "choices", "default")}
            parser.add_argument(name, type=types[option["type"]], **more)
    return parser
