"""What pre-flight has to say of a training: sentences, the plan, and how they are printed.

files.py, rehearsal.py and their siblings write into it, blora_preflight.py prints it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from blora.text import BloraError, printable, say


@dataclass
class Report:
    """Sentences in the order they were found, the plan line by line, the modules by name."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    plan: dict[str, str] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)


def attempt(report: Report, otherwise: str, step: Callable[..., Any], *args: Any) -> Any:
    """What a step hands back that asks the trainer; None, with a note, where its release differs.

    The trainer judges a training by itself, so what we cannot ask it stops nothing.
    """
    try:
        return step(*args)
    except BloraError:
        raise
    except Exception as error:
        report.notes.append(f"{otherwise} ({error!r})")
        return None


def print_report(report: Report) -> None:
    """What is wrong on stderr; on stdout the plan, unless the training cannot begin."""
    for kind, sentences in (("error", report.errors), ("warning", report.warnings)):
        for sentence in sentences:
            say(f"{kind}: {sentence}")
    sys.stderr.flush()
    if not report.errors:
        print("This training:")
        for name, text in report.plan.items():
            print(f"  {name:<9} {printable(text)}")
        for sentence in report.notes:
            print(f"note: {printable(sentence)}")
