"""The lines for Windows in a Markdown page: blocks for cmd, and what is typed in PowerShell."""

from __future__ import annotations

import re
from dataclasses import dataclass

from kohya_folder import ROOT

FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
FOR_CMD = re.compile(r'set "|sdxl_\w+\.bat\b|x?copy |mkdir _in\\')
PAGES = {
    path.name: path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}


@dataclass(frozen=True)
class Block:
    """A block for cmd, line by line as it is typed."""

    page: str
    lines: tuple[str, ...]

    @property
    def settings(self) -> dict[str, str]:
        """What its set "NAME=value" lines say."""
        found = (re.fullmatch(r'set "(\w+)=([^"]*)"', line) for line in self.lines)
        return {match[1]: match[2] for match in found if match}

    def __str__(self) -> str:
        return f"{self.page}: {' & '.join(self.lines)}"


def blocks(page: str) -> list[Block]:
    """The page's blocks of which every line is one for cmd."""
    found = []
    for _, text in FENCED.findall(PAGES[page]):
        lines = tuple(line.strip() for line in text.splitlines() if line.strip())
        if lines and all(FOR_CMD.match(line) for line in lines):
            found.append(Block(page, lines))
    return found


def powershell(page: str) -> tuple[dict[str, str], set[str]]:
    """Settings and launchers of all PowerShell lines of a page, in blocks and in sentences."""
    settings = dict(re.findall(r'\$env:(\w+) *= *"([^"]*)"', PAGES[page]))
    # Whatever else begins so is no PowerShell that anybody could type.
    assert PAGES[page].count("$env:") == len(re.findall(r'\$env:\w+ *= *"[^"]*"', PAGES[page]))
    return settings, set(re.findall(r"\.\\(\w+\.bat)", PAGES[page]))
