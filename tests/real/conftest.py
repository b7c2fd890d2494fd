"""What the tests on a real sd-scripts share: tokenizers, and the rows of docs/tested_with.md.

After them the rows are printed as they are in the page: what was not run says so.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from kohya_folder import ROOT

from blora.preflight.trainer import fingerprint

HERE = Path(__file__).parent
PAGE = ROOT / "docs/tested_with.md"
# Tests by their names, the first that fits, and words of the row that says what they try.
ROWS = {
    "test_real_gui": "gives sd-scripts what the launchers give",
    "test_real_pictures": "on the datasets that sd-scripts makes",
    "test_real_cases": "trainings, [see below]",
    "kohya.*test_sd_scripts_reads": "parser reads every option",
    "kohya.*test_(lycoris_builds|the_models_have)": "builds each of the presets",
    "kohya.*test_the_gradients": "the gradients of sd-scripts' own U-Net",
    "kohya.*(same_file|nearly_the_same|early_stop|and_no_others)": "trains the same file",
    "test_real_blocks": "gives one block after another the text of another prompt",
    "test_real_compare": "the model and its slices as it draws them",
    "kohya.*merged_content": "style is trained on a merged content",
    "test_real_kohya": "the launchers train two steps",
    "tools.*refused_for_a_dora": "from a DoRA file alone",
    "tools.*(dim_from|then_saved|both_blocks|half_the_alpha|another_rank)": "loads a slice into",
    "tools.*(but_for_the_rounding|name_of_its_own)": "the recipe's two commands",
    "tools.*tokenizers_where": "saves its tokenizers",
    "test_real_tools": "resizes LoRA, DoRA, LoHa",
}
PINNED = "accelerate transformers diffusers safetensors huggingface-hub einops toml".split()
OTHERS = "numpy opencv-python-headless bitsandbytes xformers".split()
ASKED = "test_preflight_stops_what"
PRINT_VERSIONS = """
from importlib.metadata import distributions
for found in distributions():
    print(found.name.lower().replace("_", "-"), found.version)
"""
OUTCOMES: dict[str, str] = {}  # of each test
TRAININGS: list[tuple[bool, bool]] = []  # whether it trained, and whether pre-flight stopped it


@pytest.fixture(scope="session")
def cached_tokenizers(tmp_path_factory) -> str:
    """The option that names SDXL's tokenizers, which are otherwise downloaded."""
    from real_kohya import random_sdxl  # here, as it skips what imports it where there is none

    made = random_sdxl(tmp_path_factory.mktemp("tokenizers"), "--no_checkpoint")
    return f"--tokenizer_cache_dir={made / 'tokenizers'}"


@pytest.hookimpl(tryfirst=True)  # before -k leaves any out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    OUTCOMES.update({item.nodeid: "not run" for item in items if HERE in item.path.parents})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.nodeid in OUTCOMES and (report.failed or (report.when == "call" and report.passed)):
        OUTCOMES[report.nodeid] = report.outcome
        if told := dict(report.user_properties):
            TRAININGS.append((told["trained"], told["stopped"]))


def result(outcomes: Counter[str], as_told: str) -> str:
    """What the page says where all tests passed, else how many of them did what."""
    left, ran = outcomes["not run"], outcomes["passed"] + outcomes["failed"]
    if not ran:
        return "not run"
    said = f"fails: {outcomes['failed']} of {ran} tests" if outcomes["failed"] else as_told
    return f"only {ran} of {left + ran} tests run: {said}" if left else said


def rows_of_tests(release: str, lycoris: str) -> Iterator[str]:
    """A row for each of ROWS."""
    table = [line.strip("| ").split(" | ") for line in PAGE.read_text("utf-8").splitlines()]
    counted: dict[str, Counter[str]] = {words: Counter() for words in ROWS.values()}
    for test, outcome in OUTCOMES.items():
        counted[next(w for pattern, w in ROWS.items() if re.search(pattern, test))][outcome] += 1
    for words, outcomes in counted.items():
        found = (row for row in table if len(row) == 4 and words in row[0])
        what, _, with_lycoris, told = next(found, (words, "", "", "passes"))
        needed = "none" if with_lycoris == "none" else lycoris
        yield f"| {what} | {release} | {needed} | {result(outcomes, told)} |"


def row_of_trainings(release: str) -> str:
    if not TRAININGS:
        return f"| {release} |{' not run |' * 4}"
    left = sum(ASKED in test for test in OUTCOMES) - len(TRAININGS)
    trains = sum(trained for trained, _ in TRAININGS)
    misses, false_alarms = TRAININGS.count((False, False)), TRAININGS.count((True, True))
    counts = f"{trains} | {len(TRAININGS) - trains} | {misses} | {false_alarms}"
    return f"| {release}{f' ({left} trainings not run)' if left else ''} | {counts} |"


def rows_of_versions(release: str, commit: str, found: dict[str, str]) -> Iterator[str]:
    def told(*names: str) -> str:
        return ", ".join(f"{n} {found[n]}" if n in found else f"no {n}" for n in names)

    yield f"| sd-scripts | {release} ({commit}) |"
    yield f"| LyCORIS (`lycoris_lora`) | {found.get('lycoris-lora', 'none')} |"
    yield f"| Prodigy (`prodigyopt`) | {found.get('prodigyopt', 'none')} |"
    yield f"| torch | {found.get('torch')}, {told('torchvision')} |"
    yield f"| as sd-scripts 0.10.1 pins them | {told(*PINNED)} |"
    yield f"| others | {told(*OTHERS)} |"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The rows, where any test has run on a real sd-scripts."""
    if set(OUTCOMES.values()) <= {"not run"}:
        return
    git = ["git", "-C", os.environ["KOHYA_ROOT"]]
    told = [["describe", "--tags", "--always", "--dirty"], ["rev-parse", "--short=7", "HEAD"]]
    release, commit = (subprocess.check_output([*git, *ask], text=True).strip() for ask in told)
    release = release.removeprefix("v")
    versions = [os.environ["KOHYA_PYTHON"], "-c", PRINT_VERSIONS]
    printed = subprocess.check_output(versions, text=True)
    found = dict(line.split() for line in printed.splitlines())
    terminalreporter.section("rows of docs/tested_with.md")
    tests = rows_of_tests(release, found.get("lycoris-lora", "none"))
    for rows in (rows_of_versions(release, commit, found), tests, [row_of_trainings(release)]):
        terminalreporter.write("\n".join([*rows, "", ""]))
    code = fingerprint(Path(os.environ["KOHYA_ROOT"]))
    terminalreporter.write(f'RELEASES in blora/preflight/trainer.py: "{code}": "{release}",\n')
