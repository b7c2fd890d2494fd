"""sd-scripts' own functions, found by their names alone, since releases move them about.

A function's globals hold what its code calls; failing that, any module of sd-scripts that is loaded
does. Known to work with sd-scripts 0.9.1, 0.10.1, 0.10.6 and 0.11.1.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any


def own_modules() -> list[ModuleType]:
    """The modules of sd-scripts that are loaded; during a rehearsal sys.argv names its script."""
    root = Path(sys.argv[0]).resolve().parent
    modules = [(module, getattr(module, "__file__", None)) for module in list(sys.modules.values())]
    return [module for module, file in modules if file and root in Path(file).parents]


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
