"""How the stand-in reads its options: from the command line, over those of --config_file."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

import toml


def verify_command_line_training_args(args: Namespace) -> None:
    """sd-scripts warns of secrets here."""


def read_config_from_file(args: Namespace, parser: ArgumentParser) -> Namespace:
    """The options of the command line, with those of the file under them, section or not."""
    if not args.config_file:
        return args
    config_path = Path(args.config_file.removesuffix(".toml") + ".toml")
    if not config_path.is_file():
        print(f"{config_path} not found.")
        sys.exit(1)
    options: dict[str, object] = {}
    for name, value in toml.loads(config_path.read_text(encoding="utf-8")).items():
        options |= value if isinstance(value, dict) else {name: value}
    return parser.parse_args(namespace=Namespace(**options))
