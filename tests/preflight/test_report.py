"""How pre-flight prints what it has to say."""

from __future__ import annotations

import pytest

from blora.preflight.report import Report, print_report

COUNTED = [(0, "  steps     10"), (1, "1 warning: see above"), (2, "2 warnings: see above")]


@pytest.mark.parametrize(("number", "last"), COUNTED)
def test_the_last_line_before_the_training_counts_the_warnings(capsys, number, last):
    print_report(Report(warnings=["it is odd"] * number, plan={"steps": "10"}))
    printed = capsys.readouterr()
    assert printed.out.splitlines() == ["This training:", "  steps     10", *[last] * bool(number)]
    assert printed.err.splitlines() == ["warning: it is odd"] * number


def test_where_nothing_is_trained_nothing_is_counted(capsys):
    print_report(Report(errors=["no disk"], warnings=["it is odd"]))
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "error: no disk\nwarning: it is odd\n")
