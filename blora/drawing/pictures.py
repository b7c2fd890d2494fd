"""What is to be drawn: prompts as sd-scripts' generator reads them, pictures with their settings.

A picture's file is named after everything that decides how it looks. So one that is there need not
be drawn again, and one of other settings does not take its place.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from blora.text import BloraError, shortened

DEFAULT_SEED = 1
# As gen_img.py reads it: the first in a line counts, so none may stay before the one given here.
SEEDS = re.compile(r" --d ([\d+,]+)", re.IGNORECASE)
ENUMERATION = re.compile(r"\{e\$\$", re.IGNORECASE)  # of which gen_img.py draws every variant
ENDS = 1 << 16  # bytes
HASH = 10  # hex digits in a file's name
LONGEST_NAME = 120  # bytes of it beside the hash: Linux has 255, Windows 260 for the whole path


def digest(data: bytes) -> str:
    """A name for these bytes."""
    return hashlib.sha256(data).hexdigest()[:HASH]


def stamp(path: Path) -> dict[str, Any]:
    """Which file it is, as far as a program can say that does not read gigabytes.

    Its ends tell two saves apart that a system dates alike: clocks of file systems are coarse.
    """
    try:
        stat = path.stat()
        ends = read_ends(path, stat.st_size) if path.is_file() else names_inside(path)
    except OSError as error:
        raise BloraError(f"cannot read {path} ({error})") from error
    size, modified = stat.st_size, stat.st_mtime_ns
    return {"file": path.name, "bytes": size, "modified": modified, "ends": digest(ends)}


def names_inside(folder: Path) -> bytes:
    """What lies in a folder, as of diffusers: names, sizes and dates."""
    files = [(str(p.relative_to(folder)), p.stat()) for p in sorted(folder.rglob("*"))]
    return repr([(name, s.st_size, s.st_mtime_ns) for name, s in files]).encode(errors="replace")


def read_ends(path: Path, size: int) -> bytes:
    """The first and the last bytes of a file."""
    with path.open("rb") as file:
        first = file.read(ENDS)
        file.seek(max(size - ENDS, 0))
        return first + file.read(ENDS)


@dataclass(frozen=True)
class Prompt:
    """A line of a prompt file: the words, sd-scripts' options behind them, and the seeds."""

    text: str
    options: str  # " --w 1024 --l 7", or ""
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Drawing:
    """A picture: the look, prompt and seed that gen_img.py gets, and what decides how it looks."""

    look: int  # the number that its network module knows it by
    prompt: Prompt
    seed: int
    name: str  # how its file's name begins
    settings: dict[str, Any] = field(hash=False)

    @cached_property
    def file(self) -> str:
        """The name of its file."""
        whole = re.sub(r"[^\w.-]+", "_", self.name).encode()
        name = whole[:LONGEST_NAME].decode(errors="ignore")
        return f"{name}_{digest(json.dumps(self.settings, sort_keys=True).encode())}.png"

    @property
    def line(self) -> str:
        """The prompt for gen_img.py, where the last of an option counts."""
        options = f"{self.prompt.options} --d {self.seed} --am {self.look} --f {self.file}"
        return f"{self.prompt.text}{options}"


def parse_prompt(line: str, seeds: list[int], more: str) -> Prompt:
    """A line of a prompt file; `seeds` take the place of its own, `more` is put behind it."""
    own = SEEDS.search(line)
    text, dash, options = SEEDS.sub("", line).strip().partition(" --")
    if own and not seeds:
        seeds = [int(seed) for seed in re.findall(r"\d+", own[1])]
    return Prompt(text, f"{dash}{options}{more}", tuple(dict.fromkeys(seeds or [DEFAULT_SEED])))


def read_prompts(path: Path, seeds: list[int], more: str) -> list[Prompt]:
    """The prompts of a file, one a line; BloraError where there are none."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise BloraError(f"{path} is not in UTF-8: save it so ({error.reason})") from error
    except OSError as error:
        raise BloraError(f"cannot read {path} ({error}): correct --prompts") from error
    if path.suffix.lower() in (".json", ".toml"):
        raise BloraError(f"{path} is no text file: write the prompts one a line for --prompts")
    written = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    prompts = list(dict.fromkeys(parse_prompt(line, seeds, more) for line in written))
    if not prompts:
        raise BloraError(f"no prompt in {path}: write one a line, or correct --prompts")
    for prompt in prompts:
        check_prompt(prompt, str(path))
    return prompts


def check_prompt(prompt: Prompt, place: str) -> None:
    """Refuse, as a BloraError, what gen_img.py would not draw as one picture of these words."""
    if not prompt.text or prompt.text.startswith("--"):
        raise BloraError(f"a prompt in {place} has no words: write them before the options")
    if prompt.text.startswith("#"):
        raise BloraError(
            f'"{shortened(prompt.text)}" in {place} is a comment to sd-scripts: begin it with words'
        )
    if " AND " in prompt.text:
        raise BloraError(
            f'"{shortened(prompt.text)}" in {place} has AND, at which sd-scripts parts a prompt '
            "for several regions: write it small"
        )
    if ENUMERATION.search(prompt.text + prompt.options):
        raise BloraError(
            f'"{shortened(prompt.text)}" in {place} draws several pictures: write each variant as '
            "a prompt of its own"
        )
