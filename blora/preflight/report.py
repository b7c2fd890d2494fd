"""What pre-flight has to say of a training: sentences, the plan, and how they are printed."""

from __future__ import annotations

import textwrap
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blora.text import BloraError, counted, printable, say

LONGEST = 400  # letters of somebody else's words
WIDTH, INDENT = 100, 12 * " "  # of the plan, whose lines begin with a name


@dataclass
class Report:
    """Sentences in the order of the checks, the plan line by line, the modules by name."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    plan: dict[str, str] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)


def one_line(text: str) -> str:
    """A text on one line, cut to a readable length."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}..."


def cause(error: BaseException) -> str:
    """An exception in words, with the place where it was raised: it may be anybody's fault."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(frame.filename).name} line {frame.lineno}"
    return f"{type(error).__name__}: {one_line(str(error))}, in {place}"


def attempt(report: Report, what: str, step: Callable[..., Any], *args: Any) -> Any:
    """Run a step that queries the trainer; None, with a warning, where it cannot be done.

    The trainer judges a training by itself, so what cannot be asked of it stops nothing.
    """
    try:
        return step(*args)
    except BloraError:
        raise
    except Exception as error:
        report.warnings.append(f"could not {what} ({cause(error)})")
        return None


def wrapped(line: str) -> str:
    """A line of the plan in as many as a terminal needs."""
    return textwrap.fill(
        line, WIDTH, subsequent_indent=INDENT, break_long_words=False, break_on_hyphens=False
    )


def print_report(report: Report) -> None:
    """What is wrong on stderr; on stdout the plan, unless the training cannot begin."""
    for kind, sentences in (("error", report.errors), ("warning", report.warnings)):
        for sentence in sentences:
            say(f"{kind}: {sentence}")
    if not report.errors:
        print("This training:")
        for name, text in report.plan.items():
            print(wrapped(f"  {name:<9} {printable(text)}"))
        for sentence in report.notes:
            print(f"note: {printable(sentence)}")
        if report.warnings:  # they scroll away under what the trainer prints from here on
            print(f"{counted(len(report.warnings), 'warning')}: see above")
