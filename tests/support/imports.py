"""What a Python file imports, read from its source: nothing is imported to find it out."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

from kohya_folder import ROOT

# Where a file of the repository is imported from, as in pytest.ini.
FOLDERS = (ROOT / "tests/support", ROOT, ROOT / "tests/standin", ROOT / "tools")


def imported_modules(path: Path) -> set[str]:
    """The modules that a file imports, anywhere in it, with their packages: "blora.slicer.cut"."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


def imported(path: Path) -> set[str]:
    """The modules that a file imports, anywhere in it; of a package its name alone."""
    return {name.split(".")[0] for name in imported_modules(path)}


def needed(path: Path, seen: frozenset[Path] = frozenset()) -> set[str]:
    """The packages that a file imports, itself or by the files of the repository it imports."""
    found = set()
    for name in imported_modules(path):
        files = [folder / f"{name.replace('.', '/')}.py" for folder in FOLDERS]
        file = next(filter(Path.is_file, files), None)
        if not file:
            found.add(name.split(".")[0])
        elif file not in seen:
            found |= needed(file, seen | {file})
    return found


def missing(path: Path) -> set[str]:
    """The packages that a file needs and this Python does not have; a bare folder is not one."""
    specs = {name: importlib.util.find_spec(name) for name in needed(path)}
    return {name for name, spec in specs.items() if not (spec and spec.origin)}
