"""Pre-flight and sd-scripts' own train() are asked about the same trainings, and have to agree.

  KOHYA_ROOT=<sd-scripts> KOHYA_PYTHON=<its python> \\
    .venv/bin/python -m pytest tests/real/test_real_cases.py

The cases are in trainer_cases.py and trainer_option_cases.py; -k chooses among them by name, and
only those are run. All of them took nine minutes on two cores. No graphics card is needed: what the
models compute is a toy (toy_training.py). The checkout is only read: the bundle goes into a copy of
its tracked files.

KOHYA_PYTHON needs kohya's requirements, lycoris_lora and prodigyopt, and no bitsandbytes, xformers,
wandb or dadaptation, whose absence is a case. The tokenizers of SDXL come from BLORA_RANDOM_SDXL, a
folder that tests/support/make_random_sdxl.py filled; without it that script makes them, for which
open_clip_torch is needed. It forks: not on Windows.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from kohya_folder import PROGRAMS, ROOT, SCRIPT, Bash, install, make_kohya
from lycoris_releases import RELEASES
from real_kohya import BEFORE_0_10, KOHYA_PYTHON, make_copy, tokenizers
from safetensors import safe_open
from trainer_case import Case
from trainer_cases import OF_DATA
from trainer_folder import make_folder
from trainer_option_cases import OF_OPTIONS

pytestmark = pytest.mark.slow

TESTS = ROOT / "tests"
CASES = {case.name: case for case in [*OF_DATA, *OF_OPTIONS]}
ALL = list(CASES)
# What makes a training of the recipe one of seconds on a CPU. sd-scripts 0.9 refuses buckets in
# steps of 32, which the recipes ask for.
SMALL = [
    "--resolution=64,64",
    "--min_bucket_reso=64",
    "--bucket_reso_steps=64",
    "--network_dim=4",
    "--network_alpha=4",
    "--max_train_steps=2",
    "--mixed_precision=no",
    "--max_data_loader_n_workers=1",
]
RECIPES = {"fast": "sdxl_blora_fast.sh", "classic": "sdxl_blora_classic.sh"}


@dataclass(frozen=True)
class Bench:
    """Where the trainings are tried."""

    root: Path
    kohya: Path
    shapes: str  # of the checkpoint's tensors, as JSON
    recipes: dict[str, list[str]]  # the words that a launcher passes to the trainer

    def folder(self, case: Case, who: str) -> Path:
        return self.root / who / f"{ALL.index(case.name):03d}"

    def make_folder(self, case: Case, who: str) -> Path:
        """The case's folder, one each for the trainer and for pre-flight."""
        path = make_folder(self.folder(case, who))
        (path / "shapes.json").write_text(self.shapes)
        if case.after:
            before = self.folder(CASES[case.after], "trainer") / "_out/lora/sdxl/demo_1"
            shutil.copytree(before, path / "before")
        for change in case.change:
            change(path)
        return path

    def words(self, case: Case) -> list[str]:
        kept = [
            word
            for word in self.recipes[case.recipe]
            if word.removeprefix("--").split("=")[0] not in case.less
        ]
        return [*kept, *case.words]


def lycoris(case: Case) -> str:
    return str(RELEASES / case.lycoris) if case.lycoris else ""


def environment(*first: str | Path) -> dict[str, str]:
    path = os.pathsep.join(str(item) for item in first if str(item))
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def launched(tmp: Path, checkpoint: Path) -> dict[str, list[str]]:
    """What each launcher passes to the trainer."""
    kohya = make_kohya(tmp / "launched", name="demo")
    for program in PROGRAMS:
        Bash().install_recorder(tmp / "bin", program)
    settings = {"BLORA_NAME": "demo", "BLORA_CHECKPOINT": str(checkpoint)}
    env = Bash().path_variable(tmp / "bin") | settings
    words = {}
    for recipe, launcher in RECIPES.items():
        done, calls = Bash().run(kohya / launcher, [], kohya, tmp / f"log_{recipe}", env)
        assert done.returncode == 0, done.output
        line = calls[-1].argv
        start = next(i for i, word in enumerate(line) if word.endswith(SCRIPT))
        words[recipe] = line[start + 1 :]
    return words


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    tmp = tmp_path_factory.mktemp("cases")
    kohya, checkpoint = tmp / "sd-scripts", tmp / "sdxl.safetensors"
    make_copy(kohya)
    install(kohya)
    make = [TESTS / "support/toy_training.py", "--checkpoint", kohya, checkpoint]
    subprocess.run([KOHYA_PYTHON, *make], check=True)
    with safe_open(checkpoint, "np") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    cached = f"--tokenizer_cache_dir={tokenizers(tmp, kohya)}"
    recipes = {
        recipe: [*words, *SMALL, cached] for recipe, words in launched(tmp, checkpoint).items()
    }
    return Bench(tmp, kohya, json.dumps(shapes), recipes)


# ---- The two who are asked -----------------------------------------------------------------------


def ask(bench: Bench, cases: list[Case], who: str, *program: str | Path) -> list[dict[str, Any]]:
    """The program's answer to each case, in its own folder."""
    asked = [
        {
            "name": case.name,
            "folder": str(bench.folder(case, who)),
            "words": bench.words(case),
            "path": lycoris(case),
        }
        for case in cases
    ]
    done = subprocess.run(
        [KOHYA_PYTHON, *program, bench.kohya / SCRIPT],
        input=json.dumps(asked),
        env=environment(bench.kohya),
        stdout=subprocess.PIPE,
        encoding="utf-8",
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def ask_trainer(bench: Bench, cases: list[Case]) -> dict[str, dict[str, Any]]:
    """What sd-scripts makes of them: see toy_training.py."""
    for case in cases:
        bench.make_folder(case, "trainer")
    answers = ask(bench, cases, "trainer", TESTS / "support/toy_training.py", "--many")
    return {answer["name"]: answer for answer in answers}


def files(path: Path) -> dict[str, tuple[int, int]]:
    """Everything in a folder, with size and time."""
    found = {file: file.lstat() for file in path.rglob("*")}
    return {str(file): (stat.st_size, stat.st_mtime_ns) for file, stat in found.items()}


def ask_preflight(bench: Bench, cases: list[Case]) -> dict[str, dict[str, Any]]:
    """Its report on each, with the exit code and what it changed in the folder."""
    folders = {case.name: bench.make_folder(case, "preflight") for case in cases}
    before = {name: files(folder) for name, folder in folders.items()}
    reports = {}
    for answer in ask(bench, cases, "preflight", TESTS / "support/preflight_many.py"):
        try:
            report = json.loads(answer["out"])
        except json.JSONDecodeError:
            report = {"crashed": answer["out"] + answer["err"]}
        name = answer["name"]
        written = sorted(files(folders[name]).items() ^ before[name].items())
        reports[name] = report | {"code": answer["code"], "written": written}
    return reports


@dataclass(frozen=True)
class Answers:
    trainer: dict[str, dict[str, Any]]
    preflight: dict[str, dict[str, Any]]

    def usual(self, case: Case) -> list[str]:
        """The warnings that the recipe has by itself."""
        return self.preflight[f"the {case.recipe} recipe"]["warnings"]


@pytest.fixture(scope="module")
def answers(bench, request) -> Answers:
    """Both, about all cases that were chosen and those whose output they need."""
    items = [item for item in request.session.items if item.path == request.path]
    given = [getattr(item, "callspec", None) for item in items]
    chosen = {spec.params["name"] for spec in given if spec and "name" in spec.params}
    first = {CASES[name].after for name in chosen} - {""}
    first |= {f"the {recipe} recipe" for recipe in RECIPES}
    cases = [[CASES[n] for n in ALL if n in first], [CASES[n] for n in ALL if n in chosen - first]]
    trainer = {name: told for part in cases for name, told in ask_trainer(bench, part).items()}
    return Answers(trainer, ask_preflight(bench, [case for part in cases for case in part]))


# ---- The brakes ----------------------------------------------------------------------------------

HOOK, TRACKERS = "accelerator.register_load_state_pre_hook(", "accelerator.init_trackers("


@pytest.mark.parametrize("dropped", [(HOOK,), (HOOK, TRACKERS)], ids=["the hook", "both"])
def test_a_release_that_drops_a_brake_is_stopped_by_the_next(bench, answers, tmp_path, dropped):
    kohya = tmp_path / "sd-scripts"
    shutil.copytree(bench.kohya, kohya)
    for name in ("train_network.py", "library/train_util.py"):
        text = (kohya / name).read_text(encoding="utf-8")
        for call in dropped:
            text = text.replace(call, "(lambda *_, **__: None)(")
        (kohya / name).write_text(text, encoding="utf-8")
    case = CASES["the fast recipe"]
    report = ask_preflight(replace(bench, root=tmp_path, kohya=kohya), [case])[case.name]
    expected = answers.preflight[case.name]
    assert report["plan"].keys() == expected["plan"].keys()
    assert {**report, "plan": None} == {**expected, "plan": None}


# ---- What they say -------------------------------------------------------------------------------


def expected(case: Case) -> str:
    """error, warning or nothing, with this release of sd-scripts."""
    return "error" if BEFORE_0_10 and case.before_0_10 else case.says


def sentence(case: Case) -> str:
    return case.before_0_10 if BEFORE_0_10 and case.before_0_10 else case.sentence


@pytest.mark.parametrize("name", ALL)
def test_the_case_is_right_about_the_trainer(answers, name):
    trainer, case = answers.trainer[name], CASES[name]
    assert (trainer["outcome"] == "failed") == (expected(case) == "error"), trainer["error"]
    assert {key: trainer[key] for key in case.truth} == case.truth


@pytest.mark.parametrize("name", ALL)
def test_preflight_stops_what_the_trainer_fails_at_and_nothing_else(answers, name):
    trainer, preflight = answers.trainer[name], answers.preflight[name]
    assert "crashed" not in preflight, preflight["crashed"]
    assert bool(preflight["errors"]) == (trainer["outcome"] == "failed"), (
        trainer["when"],
        trainer["error"],
        preflight["errors"],
    )
    assert preflight["code"] == (1 if preflight["errors"] else 0)


@pytest.mark.parametrize("name", ALL)
def test_preflight_says_what_it_is_about(answers, name):
    case, preflight = CASES[name], answers.preflight[name]
    new = [warning for warning in preflight["warnings"] if warning not in answers.usual(case)]
    said = {"error": preflight["errors"], "warning": new, "nothing": []}[expected(case)]
    if expected(case) == "nothing":
        assert (preflight["errors"], new) == ([], [])
    else:
        assert any(re.search(sentence(case), text, re.IGNORECASE) for text in said), said


@pytest.mark.parametrize("name", [name for name in ALL if CASES[name].says != "error"])
def test_preflight_announces_the_modules_that_are_trained(answers, name):
    trainer = answers.trainer[name]
    if trainer["outcome"] == "trained":
        assert len(answers.preflight[name]["modules"]) == trainer["modules"]


@pytest.mark.parametrize("name", ALL)
def test_preflight_writes_nothing(answers, name):
    assert answers.preflight[name]["written"] == []
