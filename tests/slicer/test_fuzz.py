"""Files made by chance are cut right or refused; tests/fuzz_blora_slicer.py runs more of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fuzz_blora_slicer import judge_all

from blora.slicer import cut, reader, strength

FILES = range(300)


def wrong() -> Iterator[str]:
    """What is wrong with what becomes of the files."""
    for number, file, problems, _ in judge_all(FILES):
        for problem in problems:
            yield f"file {number} ({' + '.join(file.twists) or 'sound'}): {problem}"


def test_a_file_by_chance_is_cut_right_or_refused_in_a_sentence_and_at_once():
    assert not (found := [*wrong()]), "\n".join(found[:9])


FAULTS = {
    "a strength that goes nowhere": (strength, "multiply", lambda module, *_: module),
    "settings of an alpha that are not read": (
        reader,
        "with_peft_alpha",
        lambda module, *_: module,
    ),
    "a module twice, of which one is taken": (cut, "check_copies", lambda *_: None),
}


@pytest.mark.parametrize(("room", "name", "fault"), FAULTS.values(), ids=FAULTS)
def test_a_fault_of_the_slicer_is_seen(monkeypatch, room, name, fault):
    monkeypatch.setattr(room, name, fault)
    assert any(wrong())
