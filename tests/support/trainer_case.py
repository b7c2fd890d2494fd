"""A case of trainer_cases.py, and the three ways in which one is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FAST, CLASSIC = "fast", "classic"
CONTENT_STYLE, EVERY_LAYER = 160, 788  # modules of the recipes' preset, and of none
OLD_LYCORIS = "3.2.0.post2"  # what kohya_ss asks for


@dataclass(frozen=True)
class Case:
    """A training, and what pre-flight says of it."""

    name: str
    says: str  # error, warning or nothing
    sentence: str = ""  # a pattern in it
    words: tuple[str, ...] = ()
    change: tuple[Callable[[Path], None], ...] = ()
    less: tuple[str, ...] = ()  # options of the recipe that are left out
    recipe: str = FAST
    truth: dict[str, Any] = field(default_factory=dict)
    before_0_10: str = ""  # a pattern in the error, where sd-scripts 0.9 fails and 0.10 trains
    lycoris: str = ""  # another release than the newest
    after: str = ""  # the case whose output is copied into the folder as "before"


def case(says: str, name: str, sentence: str, words: tuple[str, ...], more: dict[str, Any]) -> Case:
    change = more.pop("change", ())
    change = change if isinstance(change, tuple) else (change,)
    return Case(name, says, sentence, words, change, **more)


def fails(name: str, sentence: str, *words: str, **more: Any) -> Case:
    return case("error", name, sentence, words, more)


def warns(name: str, sentence: str, *words: str, **more: Any) -> Case:
    return case("warning", name, sentence, words, more)


def trains(name: str, *words: str, **more: Any) -> Case:
    return case("nothing", name, "", words, more)
