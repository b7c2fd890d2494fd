"""What a single check of pre-flight has to say."""

from __future__ import annotations

from collections.abc import Callable

from blora.preflight.report import Report


def reported(check: Callable[..., object], *args: object) -> Report:
    """The report of a check, which takes it as its last argument."""
    report = Report()
    check(*args, report)
    return report
