"""sd-scripts' own functions, found by their names alone, since releases move them about.

A function's globals hold what its code calls; failing that, any module of sd-scripts that is loaded
does. And which release it is, which sd-scripts itself does not say.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from blora.preflight.report import Report

# Releases that were tried, by fingerprint(); bash tests/real.sh prints that of any other.
RELEASES = {
    "bf8f22d8fccd1d6f": "0.9.1",
    "e32766ce3d1fc2a6": "0.10.1",
    "1c209bd1d7381324": "0.10.1",  # its last commit before the tag
    "b4760b6b859e5129": "0.10.6",
    "f60602392beb064f": "0.11.1",
    "b86b6ff3b084086f": "c162e90 of June 2026",
}


def own_modules() -> list[ModuleType]:
    """The modules of sd-scripts that are loaded; during a rehearsal sys.argv names its script."""
    root = os.path.join(Path(sys.argv[0]).resolve().parent, "")  # noqa: PTH118
    modules = list(sys.modules.values())  # thousands, so their paths are compared as texts
    return [m for m in modules if str(getattr(m, "__file__", None)).startswith(root)]


def namespaces(owner: ModuleType | FunctionType | type) -> Iterator[dict[str, Any]]:
    """What the code of a module, a function or a class' methods sees."""
    if isinstance(owner, ModuleType):
        yield vars(owner)
    elif isinstance(owner, FunctionType):
        yield owner.__globals__
    else:
        for method in (item for each in owner.__mro__ for item in vars(each).values()):
            if isinstance(method, FunctionType):
                yield method.__globals__


def own(name: str, owner: ModuleType | FunctionType | type | None = None) -> Any:
    """What a name of sd-scripts means to `owner`, or to any of its modules.

    AttributeError where this release has no such name.
    """
    seen = namespaces(owner) if owner else ()
    for names in (*seen, *map(vars, own_modules())):
        if name in names:
            return names[name]
    raise AttributeError(f"this sd-scripts has no {name}")


def fingerprint(folder: Path) -> str:
    """16 hex digits of the code that trains a LoRA, whatever its line endings."""
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*train_network.py"), *folder.glob("library/*.py")]):
        text = file.read_bytes().replace(b"\r\n", b"\n")
        digest.update(file.name.encode() + b"\n" + text)
    return digest.hexdigest()[:16]


def check_release(script: Path, report: Report) -> None:
    """A note on a release that nobody has tried with this bundle, or one that was changed."""
    if fingerprint(script.parent) not in RELEASES:
        tried = ", ".join(dict.fromkeys(RELEASES.values()))
        report.notes.append(
            f"this sd-scripts was not tested with this bundle, or has changed files; {tried} were"
        )
