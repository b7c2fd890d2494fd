"""The map in CONTRIBUTING.md is that of the files."""

from __future__ import annotations

import re

import pytest
from imports import imported_modules
from kohya_folder import ROOT

PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
ROWS = {
    name: set(re.findall(r"`([\w/]+)`", imports))
    for name, imports in re.findall(r"^\| `([\w/]+\.py)` \|.*\| ?(.*) \|$", PAGE, re.MULTILINE)
}
# Those that hold no more than a docstring, a version and a path.
HALLS = ("", "slicer/", "preflight/", "drawing/")
EMPTY = {f"blora/{hall}__init__.py" for hall in HALLS}
ROOMS = [*ROOT.glob("*.py"), *(ROOT / "blora").rglob("*.py")]


def imports_of(name: str) -> set[str]:
    """What a room imports of the others, as the map has it: as much of each name as tells it."""
    modules = {m for m in imported_modules(ROOT / name) if m.startswith("blora.")}
    if "/" in name:
        stems = [path.stem for path in ROOMS]
        parts = [module.split(".") for module in modules]
        return {"/".join(p[-1:] if stems.count(p[-1]) == 1 else p[-2:]) for p in parts}
    halls = {module.split(".")[1] for module in modules if module.count(".") == 2}
    return {f"{hall}/" for hall in halls}


def test_every_room_is_on_the_map():
    assert {path.relative_to(ROOT).as_posix() for path in ROOMS} == ROWS.keys() | EMPTY


@pytest.mark.parametrize("name", ROWS)
def test_a_room_imports_what_the_map_says(name):
    assert ROWS[name] == imports_of(name)


def test_the_files_and_functions_it_names_exist():
    everything = "\n".join(path.read_text(encoding="utf-8") for path in ROOMS)
    for name in re.findall(r"`([A-Z]{4,})`", PAGE):
        assert re.search(rf"^{name} = ", everything, re.MULTILINE), name
    for name in re.findall(r"`((?:tests|docs|tools|\.github)/[\w/.]+)", PAGE):
        assert (ROOT / name).exists(), name
