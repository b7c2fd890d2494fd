"""The options of a training as files.py reads them, by name, without knowing them all.

A command line, with the options of --config_file under it, which is how the kohya_ss GUI passes
all. The rehearsal reads them by the trainer's own parser.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blora.text import BloraError, printable


@dataclass(frozen=True)
class Options:
    """The command line of the training, as argparse would read it: the last value wins."""

    values: dict[str, list[str]]

    def has(self, name: str) -> bool:
        """Whether it is given; the GUI writes what is not as an empty text."""
        return self.values.get(name, [""]) != [""]

    def text(self, name: str, default: str = "") -> str:
        """The last value of an option; the default where it has none."""
        return (self.values.get(name) or [""])[-1] or default


def pairs(items: list[str] | None) -> dict[str, str]:
    """NAME=VALUE items, split at the first "=" as sd-scripts splits them."""
    return dict(item.partition("=")[::2] for item in items or [])


def parse_options(words: list[str]) -> Options:
    """`--name=value`, `--name value ...` and `--name` alone, without knowing them all."""
    values: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if re.match(r"--\w", word):
            name, equals, value = word[2:].partition("=")
            values[name] = [value] if equals else []
        elif name:
            values[name].append(word)
    return Options(values)


def with_config_file(options: Options) -> Options:
    """The options with those of --config_file under them, which is how the GUI passes all."""
    if not options.has("config_file"):
        return options
    if not options.text("config_file"):
        raise BloraError("--config_file names no file: add it")
    path = Path(options.text("config_file"))
    if path.suffix != ".toml":
        path = path.with_name(path.name + ".toml")
    values: dict[str, list[str]] = {}
    for name, value in flattened(load_toml(path, "--config_file")).items():
        if value is True:
            values[name] = []
        elif value is not False:
            values[name] = [str(item) for item in (value if isinstance(value, list) else [value])]
    return Options(values | options.values)


def flattened(table: dict[str, Any]) -> dict[str, Any]:
    """A config file's options without its sections, which sd-scripts ignores."""
    flat = {}
    for key, value in table.items():
        flat |= value if isinstance(value, dict) else {key: value}
    return flat


def load_toml(path: Path, what: str) -> dict[str, Any]:
    """A TOML file, read as sd-scripts and LyCORIS read it."""
    try:
        import toml
    except ImportError as error:
        raise BloraError("no toml in this Python: install kohya's requirements") from error
    try:
        return toml.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BloraError(f'no {what} at "{path}": write one there, or correct the path') from error
    except (OSError, UnicodeDecodeError) as error:
        raise BloraError(f'cannot read the {what} "{path}" ({error})') from error
    except (toml.TomlDecodeError, IndexError, ValueError, TypeError) as error:
        text = printable(str(error))
        raise BloraError(f'the {what} "{path}" is not valid TOML ({text}): correct it') from error
