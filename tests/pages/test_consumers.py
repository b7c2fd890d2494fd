"""The page's table of what programs make of slices is one that tests/consumers.py prints.

Of the programs those run here that come as packages; the others are run by hand.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from consumer_readers import INSTALLED, READERS
from consumer_rows import ROWS, write_slices
from consumers import build_parser, cell, chosen, read_slices, table
from kohya_folder import ROOT

PAGE = (ROOT / "docs/what_loads_where.md").read_text(encoding="utf-8")
PRINTED = PAGE.split("<!-- printed by tests/consumers.py -->\n")[1].split("\n<!-- end of what ")[0]
VERSIONS, _, TABLE = PRINTED.partition("\n\n")
HEADER, _, *LINES = [line.strip("| ").split(" | ") for line in TABLE.splitlines()]
# Rows that differ from one another in some program that is installed here.
ROWS_RUN = ["LoRA", "LoRA without alpha in its source", "LoCon with tucker", "full", "IA3"]
ROWS_RUN += ["LoRA of the text encoders", "OFT, at 1", "BOFT, at 1"]
ROWS_RUN += ["DoRA `[1, in]`, at 0.5", "DoRA `[out, 1]`, at 0.5"]


def test_a_cell_says_the_worst_of_all_strengths():
    assert cell([2e-7, 5e-7, 9e-5]) == "exact"
    assert cell([2e-7, 0.0587, 0.0744]) == "0.074"
    assert cell([1.0]) == "1"
    assert cell(["nothing", "nothing"]) == cell([2e-7, "nothing"]) == "nothing"
    assert cell([0.47, "KeyError: alpha"]) == cell(["nothing", "KeyError: alpha"]) == "error"


def test_the_table_has_a_line_for_each_row_and_a_column_for_each_program():
    outcomes = {"comfyui": [2e-7], "lycoris": [0.074, 1e-7]}
    printed = table({name: dict.fromkeys(ROWS, of) for name, of in outcomes.items()})
    head, rule, first, *rest = printed.splitlines()
    assert (head, rule) == ("| a slice of | ComfyUI | LyCORIS |", "| --- | --- | --- |")
    assert first == "| LoRA | exact | 0.074 |"
    assert len(rest) == len(ROWS) - 1


def test_the_page_has_every_row_and_every_program_with_its_version():
    assert ["a slice of", *(reader.title for reader in READERS.values())] == HEADER
    assert [row for row, *_ in LINES] == list(ROWS)
    assert all(re.fullmatch(r"exact|nothing|error|[\d.]+", c) for _, *cells in LINES for c in cells)
    versions = VERSIONS.removesuffix(".").split("; ")
    assert len(versions) == 1 + len(READERS)
    for told, reader in zip(versions[1:], READERS.values(), strict=True):
        assert re.fullmatch(rf"{reader.title} \S.*\d.*", told)


def test_only_what_is_given_or_installed_is_run():
    args = build_parser().parse_args(["--forge", "a"])
    assert chosen(args) == {"forge": Path("a"), "lycoris": None, "diffusers": None}


@pytest.mark.slow
@pytest.mark.parametrize("name", INSTALLED)
def test_an_installed_program_does_what_the_page_says(tmp_path, name):
    write_slices(tmp_path, ROWS_RUN)
    column = HEADER.index(READERS[name].title)
    told = {line[0]: line[column] for line in LINES if line[0] in ROWS_RUN}
    found = read_slices(name, None, tmp_path, ROWS_RUN)
    assert {row: cell(outcomes) for row, outcomes in found.items()} == told
