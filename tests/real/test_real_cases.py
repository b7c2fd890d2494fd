"""Pre-flight and sd-scripts' own train() are asked about the same trainings, and have to agree.

The cases are in trainer_cases.py; -k chooses among them by name, and only those are run. All of
them took nine minutes on two cores. What the models compute is a toy (toy_training.py).

KOHYA_PYTHON must have no bitsandbytes, xformers, wandb or dadaptation, whose absence is a case. It
forks: not on Windows.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from kohya_folder import SCRIPT, install
from lycoris_releases import RELEASES
from real_kohya import SUPPORT, has_option, kohya_python, make_copy
from sdxl_checkpoint import sdxl_shapes, write_checkpoint
from trainer_cases import CASES, CLASSIC, FAST, Case, make_folder
from write_gui_recipes import launcher_options

from blora.preflight.checkpoint import PLACEHOLDER

pytestmark = pytest.mark.slow

ALL = list(CASES)
# What makes a training of the recipe one of seconds on a CPU. sd-scripts 0.9 refuses buckets in
# steps of 32, which the recipes ask for.
SMALL = (
    "--resolution=64,64 --min_bucket_reso=64 --bucket_reso_steps=64 --network_dim=4 "
    "--network_alpha=4 --max_train_steps=2 --mixed_precision=no --max_data_loader_n_workers=1"
).split()
Answer = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """Where the trainings are tried."""

    root: Path
    kohya: Path
    recipes: dict[str, list[str]]  # the words that a launcher passes to the trainer

    def folder(self, case: Case, who: str) -> Path:
        return self.root / who / f"{ALL.index(case.name):03d}"

    def make_folder(self, case: Case, who: str) -> Path:
        """The case's folder, one each for the trainer and for pre-flight."""
        path = make_folder(self.folder(case, who))
        if case.after:
            before = self.folder(CASES[case.after], "trainer") / "_out/lora/sdxl/demo_1"
            shutil.copytree(before, path / "before")
        for change in case.change:
            change(path)
        return path

    def ask(self, cases: list[Case], who: str) -> dict[str, Answer]:
        """The answers of toy_training.py by the trainings' names."""
        asked = []
        for case in cases:
            given = self.recipes[case.recipe]
            words = [word for word in given if word.split("=")[0] != f"--{case.less}"]
            path = str(RELEASES / case.lycoris) if case.lycoris else ""
            training = {"name": case.name, "folder": str(self.folder(case, who)), "path": path}
            asked.append(training | {"words": [*words, *case.words]})
        program = [SUPPORT / "toy_training.py", self.kohya / SCRIPT, who]
        told = kohya_python(*program, cwd=self.root, path=self.kohya, question=asked)
        return {answer["name"]: answer for answer in map(json.loads, told.splitlines())}


@pytest.fixture(scope="module")
def bench(tmp_path_factory, cached_tokenizers) -> Bench:
    tmp = tmp_path_factory.mktemp("cases")
    kohya, checkpoint = tmp / "sd-scripts", tmp / "sdxl.safetensors"
    make_copy(kohya)
    install(kohya)
    write_checkpoint(checkpoint, sdxl_shapes())
    recipes = {}
    for name in (FAST, CLASSIC):
        words = "\0".join(launcher_options(name)).replace("my_project", "demo")
        words = words.replace(PLACEHOLDER, str(checkpoint)).split("\0")
        recipes[name] = [*words, *SMALL, cached_tokenizers]
    return Bench(tmp, kohya, recipes)


def files(path: Path) -> set[tuple[Path, int, int]]:
    """Everything in a folder, with size and time."""
    found = ((file, file.lstat()) for file in path.rglob("*"))
    return {(file, stat.st_size, stat.st_mtime_ns) for file, stat in found}


def ask_preflight(bench: Bench, cases: list[Case]) -> dict[str, Answer]:
    """Its report on each, with the exit code and what it changed in the folder."""
    folders = {case.name: bench.make_folder(case, "preflight") for case in cases}
    before = {name: files(folder) for name, folder in folders.items()}
    reports = {}
    for name, answer in bench.ask(cases, "preflight").items():
        out, err = (Path(f"{folders[name]}.{end}").read_text("utf-8") for end in ("out", "err"))
        try:
            report = json.loads(out)
        except json.JSONDecodeError:
            report = {"crashed": out + err}
        reports[name] = report | answer | {"written": files(folders[name]) ^ before[name]}
    return reports


@pytest.fixture(scope="module")
def answers(bench, request) -> dict[str, dict[str, Answer]]:
    """Both, about all cases that were chosen and those whose output they need."""
    items = [item for item in request.session.items if item.path == request.path]
    given = [getattr(item, "callspec", None) for item in items]
    chosen = {spec.params["name"] for spec in given if spec and "name" in spec.params}
    first = {CASES[name].after for name in chosen} - {""}
    first |= {f"the {recipe} recipe" for recipe in (FAST, CLASSIC)}
    trainer: dict[str, Answer] = {}
    for names in (first, chosen - first):
        cases = [CASES[name] for name in ALL if name in names]
        for case in cases:
            bench.make_folder(case, "trainer")
        trainer |= bench.ask(cases, "trainer")
    preflight = ask_preflight(bench, [CASES[name] for name in trainer])
    return {name: {"trainer": trainer[name], "preflight": preflight[name]} for name in trainer}


# ---- The brakes ----------------------------------------------------------------------------------

TRACKERS = {"accelerator.init_trackers(": "(lambda *_, **__: None)("}
LOADER = "skipped_dataloader or train_dataloader"
FOR_EVER = {LOADER: f"__import__('itertools').cycle(list({LOADER}))"}
CHANGED = "this sd-scripts was not tested with this bundle, or has changed files"


def said(report: Answer) -> Answer:
    """What is said, but the plan, which names folders, and that the release was changed."""
    notes = [note for note in report["notes"] if not note.startswith(CHANGED)]
    return report | {"plan": None, "notes": notes}


@pytest.mark.parametrize("changes", [TRACKERS, FOR_EVER], ids=["the trackers", "the DataLoader"])
def test_a_release_that_drops_a_brake_is_stopped_by_the_next(bench, answers, tmp_path, changes):
    kohya = tmp_path / "sd-scripts"
    shutil.copytree(bench.kohya, kohya)
    for path in (kohya / "train_network.py", *kohya.glob("library/*.py")):
        text = path.read_text(encoding="utf-8")
        for old, new in changes.items():
            text = text.replace(old, new)
        path.write_text(text, encoding="utf-8")
    case = CASES["the fast recipe"]
    report = ask_preflight(replace(bench, root=tmp_path, kohya=kohya), [case])[case.name]
    expected = answers[case.name]["preflight"]
    assert report["plan"].keys() == expected["plan"].keys()
    assert any(note.startswith(CHANGED) for note in report["notes"])
    assert said(report) == said(expected)


# ---- Functions that moved ------------------------------------------------------------------------

# What pre-flight asks for, and what the trainer's own answers come from.
MOVED = """
  BaseDataset DreamBoothDataset FineTuningDataset DatasetGroup LossRecorder calculate_sha256
  get_optimizer glob_images is_disk_cached_latents_is_expected line_to_prompt_dict load_image
  load_models_from_sdxl_checkpoint load_target_model load_user_config read_config_from_file
  trim_and_resize_if_required verify_command_line_training_args verify_training_args
""".split()
ASKED = [
    "the fast recipe",
    "the classic recipe",
    "an unknown key",
    "the same folder twice",
    "folders as the GUI names them",
    "a picture of the ending .gif",
    "a photo stored sideways",
    "a picture that is cut off",
    "a cache that an older picture left",
    "a caption of 80 words",
    "a folder that is no diffusers model",
    "resuming from nothing",
    "an optimizer of no name",
    "AdamW with Prodigy's arguments",
    "a prompt with --w abc",
    "settings in a file",
]


def move_functions(kohya: Path) -> None:
    """Each of MOVED into a module of its own, which knows what its code names and no more.

    The module that had it imports it from there, as releases do that move one.
    """
    for path in list(kohya.glob("library/*.py")):
        text = path.read_text(encoding="utf-8-sig")
        lines, home = text.splitlines(), f"vars(sys.modules['library.{path.stem}'])"
        for node in reversed(ast.parse(text).body):
            if getattr(node, "name", "") in MOVED:
                first = min(part.lineno for part in (node, *node.decorator_list))
                names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
                take = f"update({{n: v for n, v in {home}.items() if n in {names}}})"
                module = f"{path.stem}_{node.name}"
                moved = [f"import sys\nglobals().{take}", *lines[first - 1 : node.end_lineno]]
                path.with_name(f"{module}.py").write_text("\n".join(moved), encoding="utf-8")
                lines[first - 1 : node.end_lineno] = [f"from library.{module} import {node.name}"]
                lines += [f"import sys\nvars(sys.modules['library.{module}']).{take}"]
        path.write_text("\n".join(lines), encoding="utf-8")


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # in sd-scripts
def test_a_release_that_moves_its_functions_changes_nothing_that_is_said(bench, tmp_path):
    kohya, cases = tmp_path / "sd-scripts", [CASES[name] for name in ASKED]
    shutil.copytree(bench.kohya, kohya)
    move_functions(kohya)
    as_it_is = ask_preflight(replace(bench, root=tmp_path / "as it is"), cases)
    moved = ask_preflight(replace(bench, root=tmp_path / "moved", kohya=kohya), cases)
    for name in ASKED:
        assert said(moved[name]) == said(as_it_is[name])
        assert (moved[name]["plan"] or {}).keys() == (as_it_is[name]["plan"] or {}).keys()


# ---- What they say -------------------------------------------------------------------------------


def expected(case: Case) -> tuple[str, str]:
    """error, warning or nothing, with this release of sd-scripts, and the pattern in it."""
    for option, error in {"validation_split": case.before_0_10, **case.without}.items():
        if error and not has_option(option):
            return "error", error
    return case.says, case.sentence


@pytest.mark.parametrize("name", ALL)
def test_the_case_is_right_about_the_trainer(answers, name):
    trainer, case = answers[name]["trainer"], CASES[name]
    assert (trainer["outcome"] == "failed") == (expected(case)[0] == "error"), trainer["error"]
    assert {key: trainer[key] for key in case.truth} == case.truth


@pytest.mark.parametrize("name", ALL)
def test_preflight_stops_what_the_trainer_fails_at_and_announces_the_modules_of_the_rest(
    answers, name, record_property
):
    trainer, preflight = answers[name].values()
    record_property("trained", trainer["outcome"] == "trained")
    record_property("stopped", bool(preflight.get("errors")))
    assert "crashed" not in preflight, preflight["crashed"]
    is_right = bool(preflight["errors"]) == (trainer["outcome"] == "failed")
    assert is_right, (trainer["error"], preflight["errors"])
    assert preflight["code"] == (1 if preflight["errors"] else 0)
    if not preflight["errors"]:
        assert len(preflight["modules"]) == trainer["modules"]


@pytest.mark.parametrize("name", ALL)
def test_preflight_says_what_it_is_about(answers, name):
    preflight, (says, sentence) = answers[name]["preflight"], expected(CASES[name])
    usual = answers[f"the {CASES[name].recipe} recipe"]["preflight"]["warnings"]
    new = [warning for warning in preflight["warnings"] if warning not in usual]
    if says == "nothing":
        assert (preflight["errors"], new) == ([], [])
    else:
        said = preflight["errors"] if says == "error" else new
        assert any(re.search(sentence, text, re.IGNORECASE) for text in said), said


@pytest.mark.parametrize("name", ALL)
def test_preflight_writes_nothing(answers, name):
    assert answers[name]["preflight"]["written"] == set()
