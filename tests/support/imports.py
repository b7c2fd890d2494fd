"""What a Python file imports, read from its source: nothing is imported to find it out."""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path

from kohya_folder import ROOT

# Where a file of the repository is imported from, as in pytest.ini.
FOLDERS = tuple(ROOT / name for name in ("tests/support", "", "tests", "tests/standin", "tools"))


@cache
def imported_modules(path: Path, late: bool = True) -> set[str]:
    """The modules that a file imports, with their packages: "blora.slicer.cut"; anywhere in it,
    or without those that only some of its functions or a type checker load.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree) if late else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


def imported(path: Path) -> set[str]:
    """The modules that a file imports, anywhere in it; of a package its name alone."""
    return {name.split(".")[0] for name in imported_modules(path)}


def needed(path: Path) -> set[str]:
    """The packages that a file imports, itself or by the files of the repository it imports."""
    found, files = set(), [path]
    for file in files:
        # The product loads some packages only where it needs them; a test, to use them.
        is_product = file.parent == ROOT or ROOT / "blora" in file.parents
        for name in imported_modules(file, late=not is_product):
            places = [folder / f"{name.replace('.', '/')}.py" for folder in FOLDERS]
            ours = next(filter(Path.is_file, places), None)
            if not ours:
                found.add(name.split(".")[0])
            elif ours not in files:
                files.append(ours)
    return found


def missing(path: Path) -> set[str]:
    """The packages that a file needs and this Python does not have; a bare folder is not one."""
    specs = {name: importlib.util.find_spec(name) for name in needed(path)}
    return {name for name, spec in specs.items() if not (spec and spec.origin)}
