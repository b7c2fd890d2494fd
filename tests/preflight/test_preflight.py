"""blora_preflight.py as a program: its command line, what it prints, and in which order it asks.

The script of these tests reads sd-scripts' options and trains nothing, so nothing is rehearsed:
test_real_kohya.py and test_real_cases.py rehearse.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kohya_folder import ROOT
from sdxl_checkpoint import sdxl_shapes, write_checkpoint

import blora
import blora_preflight
from blora.preflight import images
from blora.preflight.checkpoint import NOT_SET
from blora.preflight.dataset import Epoch
from blora.preflight.rehearsal import Rehearsal
from blora.preflight.report import Report, attempt
from blora.sheet import thumbnail_limit
from blora_preflight import Training, main

SCRIPT = "sdxl_train_network.py"
PARSES = "from sdxl_train_network_options import build_parser as setup_parser\n"
PRINTS = "import sys\nprint('it')\nprint('it', file=sys.stderr)\n"
OPTIONS = {
    "pretrained_model_name_or_path": "sdxl.safetensors",
    "dataset_config": "config.toml",
    "output_dir": "_out",
    "output_name": "hero_1",
}
LINE = [f"--{name}={value}" for name, value in OPTIONS.items()]
BASE = "sdxl.safetensors (SDXL, 6.94 GB)"
ANNOUNCED = "Rehearsing the training with the trainer's own code; this takes a few seconds.\n"
NO_SCRIPT = 'no training script at "{}": run this in a kohya sd-scripts or kohya_ss folder'


@pytest.fixture(autouse=True)
def kohya(tmp_path, monkeypatch) -> Path:
    """A folder in which a training could begin; it is the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BLORA_REHEARSAL", "")
    monkeypatch.delenv("BLORA_PREVIEW", raising=False)
    for name in ("sdxl_train_network", "library", "library.train_util", "library.config_util"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    shutil.copytree(ROOT / "tests/standin/library", "library")
    shutil.copy(ROOT / "tests/standin/sdxl_train_network_options.py", ".")
    shutil.copy(ROOT / "tests/data/sdxl_train_network_options.json", ".")
    Path(SCRIPT).write_text(PARSES + PRINTS)
    write_checkpoint(Path("sdxl.safetensors"), sdxl_shapes())
    Path("images").mkdir()
    Path("page.html").write_text("mine")
    write_config("images")
    return tmp_path


def write_config(folder: str) -> None:
    text = f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = {json.dumps(folder)}\n"
    Path("config.toml").write_text(text, encoding="utf-8")


def not_rehearsed(folder: Path) -> str:
    """The note on a script that trains nothing."""
    return f'"{folder / SCRIPT}" does not train a LoRA of SDXL, so the training was not rehearsed'


def asked(capsys, *words: str) -> dict:
    """What a run says as JSON, alone; its exit code is 1 where it has an error."""
    code = main(["--json", *words])
    printed = capsys.readouterr()
    assert printed.err == ""
    report = json.loads(printed.out)
    assert printed.out == f"{json.dumps(report, indent=2)}\n"
    assert code == (1 if report["errors"] else 0)
    return report


def run(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *words, "--no_rehearsal", SCRIPT, *LINE]
    env = {**os.environ, **env}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


# ---- What it prints ------------------------------------------------------------------------------


def test_it_says_what_the_training_will_be_and_as_json_the_same(kohya, capsys):
    assert main([SCRIPT, *LINE]) == 0
    note = not_rehearsed(kohya)
    assert capsys.readouterr() == (f"This training:\n  base      {BASE}\nnote: {note}\n", ANNOUNCED)
    assert asked(capsys, SCRIPT, *LINE) == asdict(Report(notes=[note], plan={"base": BASE}))


def test_errors_come_first_and_alone_and_escaped(capsys):
    Path("_out").mkdir()
    Path("_out/hero_1.safetensors").touch()
    assert main(["--no_rehearsal", SCRIPT, *LINE, "--vae=gone\x1b[31m", "--resume=gone"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert [line.partition(": correct ")[0] for line in printed.err.splitlines()] == [
        r'error: no VAE at "gone\x1b[31m"',
        'error: no saved state in "gone"',
        f'warning: "{Path("_out/hero_1.safetensors")}" exists and will be overwritten: give another'
        " --output_name (BLORA_REVISION in the launcher), or move it away",
    ]


def test_a_warning_stops_nothing(capsys):
    assert main(["--no_rehearsal", SCRIPT, *LINE, "--output_name=CON"]) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith('warning: --output_name "CON"')
    assert printed.out == f"This training:\n  base      {BASE}\n"


def test_a_name_that_the_terminals_encoding_lacks_is_escaped():
    write_config("gone_ü")
    done = run(str(ROOT / "blora_preflight.py"), PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (1, "")
    assert r'"gone_\xfc"' in done.stderr


def test_an_output_that_is_no_text_stream_of_pythons_is_written_to_as_it_is(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["--json", SCRIPT, *LINE]) == 0
    assert json.loads(sys.stdout.getvalue())["errors"] == []


# ---- The command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        ["launch", "--num_processes=2"],
        ["accelerate", "launch", "--num_processes", "2", "--mixed_precision", "bf16"],
        ["/venv/bin/accelerate", "launch"],
        [],
    ],
)
def test_the_words_before_the_script_are_accelerates(monkeypatch, line):
    trainings = []
    monkeypatch.setattr(blora_preflight, "check", lambda it: trainings.append(it) or Report())
    assert main([*line, SCRIPT, *LINE]) == 0
    assert main(["--json", "--preview=a.html", *line, SCRIPT, *LINE]) == 0
    script = Path(SCRIPT)
    assert trainings == [
        Training(script, LINE, line, terminal=sys.stderr),
        Training(script, LINE, line, preview=Path("a.html")),  # no progress beside JSON
    ]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["launch", "--num_processes=2"], NO_SCRIPT.format("launch")),
        (["gone.py", *LINE], NO_SCRIPT.format("gone.py")),
        ([SCRIPT, "--pretrained_model_name_or_path=path/to/sd_xl_base_1.0.safetensors"], NOT_SET),
    ],
)
def test_what_needs_no_parser_is_said_before_the_trainer_is_imported(capsys, words, sentence):
    assert asked(capsys, *words)["errors"] == [sentence]
    assert "sdxl_train_network" not in sys.modules


@pytest.mark.parametrize(
    ("words", "errors"),
    [
        (["--config_file", "gui.toml"], ['no VAE at "gone": correct --vae']),
        (["--config_file=gui", "--vae="], []),
        (
            ["--config_file=gone"],
            [
                "--config_file gone.toml cannot be read: correct its path or its text (gone.toml "
                "not found.)"
            ],
        ),
        (
            ["--network_dim=many"],
            [
                "sd-scripts refuses the options: correct them (argument --network_dim: invalid int "
                "value: 'many')"
            ],
        ),
    ],
)
def test_the_trainer_reads_the_options_or_the_guis_config_file(capsys, words, errors):
    options = OPTIONS | {"vae": "gone", "train_data_dir": "", "save_last_n_epochs": ""}
    lines = [f"{name} = {json.dumps(value)}" for name, value in options.items()]
    Path("gui.toml").write_text("\n".join([*lines, "cache_latents = false"]), encoding="utf-8")
    assert asked(capsys, SCRIPT, *words)["errors"] == errors


def test_an_error_in_files_ends_before_the_rehearsal(capsys):
    assert main([SCRIPT, *LINE, "--vae=gone"]) == 1
    assert capsys.readouterr().err == 'error: no VAE at "gone": correct --vae\n'


OTHER_SCRIPTS = {
    "no library beside it": (PARSES, True, "is not part of sd-scripts"),
    "no options": ("", False, "is not a training script of sd-scripts"),
}


@pytest.mark.parametrize("which", OTHER_SCRIPTS)
def test_a_script_that_is_not_sd_scripts_own_is_not_asked(capsys, which):
    text, alone, why = OTHER_SCRIPTS[which]
    Path(SCRIPT).write_text(text)
    if alone:
        shutil.rmtree("library")
    notes = [f'"{SCRIPT}" {why}, so the training was not rehearsed']
    assert asked(capsys, SCRIPT, *LINE) == asdict(Report(notes=notes))


def test_a_package_that_the_trainer_lacks_is_an_error():
    Path(SCRIPT).write_text("import torch\n")
    done = run("-S", str(ROOT / "blora_preflight.py"), "--json")
    assert json.loads(done.stdout)["errors"] == [
        f"this Python ({sys.executable}) has no torch: install kohya's requirements, or activate "
        "the environment that has them"
    ]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "blora.preflight.images",
            f"blora_preflight.py {blora.VERSION} cannot use the blora folder beside it (lost): "
            "copy the whole bundle again",
        ),
        (
            "numpy",
            f"this Python ({sys.executable}) has no numpy: install kohya's requirements, or "
            "activate the environment that has them",
        ),
    ],
)
def test_what_only_the_pictures_need_is_missed_in_a_sentence(capsys, monkeypatch, name, sentence):
    def lack(*_args: object) -> None:
        raise ModuleNotFoundError("lost", name=name)

    monkeypatch.setattr(blora_preflight, "check_trainer", lack)
    assert asked(capsys, SCRIPT, *LINE)["errors"] == [sentence]


def test_what_is_not_rehearsed_on_request_gets_no_note(kohya, capsys, monkeypatch):
    assert asked(capsys, "--no_rehearsal", SCRIPT, *LINE)["notes"] == []
    for setting in ("0", "0 ", '"0"', "", "1"):
        monkeypatch.setenv("BLORA_REHEARSAL", setting)
        notes = [] if "0" in setting else [not_rehearsed(kohya)]
        assert asked(capsys, SCRIPT, *LINE)["notes"] == notes
        assert main([SCRIPT, *LINE]) == 0
        assert capsys.readouterr().err == (ANNOUNCED if notes else "")


def test_it_has_a_version(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--version"])
    assert capsys.readouterr().out == f"blora_preflight.py {blora.VERSION}\n"


def test_files_that_version_1_left_behind_are_a_note(kohya, monkeypatch, capsys):
    monkeypatch.setattr(blora, "ROOT", kohya)
    Path("blora_words.py").write_text("raise RuntimeError")
    assert asked(capsys, SCRIPT, *LINE)["notes"] == [blora.leftovers(), not_rehearsed(kohya)]


NAMES = [*OPTIONS, "network_args", "network_module", "config_file", "resume", "vae", "output_nam"]
NAMES += ["save_every_n_steps", "max_train_steps", "sample_prompts", "sample_at_first"]
VALUES = st.sampled_from(["", "0", "-1", "nan", "1e999", "config.toml", "images", "lycoris.kohya"])
VALUES |= st.text(max_size=20) | st.just("x" * 300)
WORDS = st.builds("--{}".format, st.sampled_from(NAMES))
WORDS |= st.builds("--{}={}".format, st.sampled_from(NAMES), VALUES) | VALUES


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(line=st.lists(WORDS, max_size=4))
def test_odd_command_lines_are_told_in_sentences(capsys, line):
    words = ["--json", "--no_rehearsal", SCRIPT, *LINE[1:], *line]
    assert main(words) in (0, 1)
    assert json.loads(capsys.readouterr().out).keys() == Report().__dict__.keys()


def test_who_stops_it_sees_no_traceback(capsys, monkeypatch):
    def stop(*_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(blora_preflight, "check_files", stop)
    assert main(["--json", SCRIPT, *LINE]) == 130
    assert capsys.readouterr().out == ""


# ---- The sheet -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "setting", "preview"),
    [
        ([], "", None),
        (["--preview", "sheet.html"], "", Path("sheet.html")),
        (["--preview=~/sheet.html"], "", Path.home() / "sheet.html"),
        ([], "other.html", Path("other.html")),
        (["--preview=sheet.html"], "other.html", Path("sheet.html")),
        ([], '"D:/my sheet.html" ', Path("D:/my sheet.html")),  # as cmd leaves it
        ([], '""', Path()),  # set, to a launcher: so it is refused
    ],
)
def test_a_preview_is_asked_for_by_option_or_setting(monkeypatch, words, setting, preview):
    monkeypatch.setenv("BLORA_PREVIEW", setting)
    assert blora_preflight.build_parser().parse_args([*words, SCRIPT]).preview == preview


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["--preview=sheet.jpg"],
            '--preview (BLORA_PREVIEW) writes a web page, not "sheet.jpg": end its name in .html',
        ),
        (
            ["--preview=page.html"],
            '"page.html" is not an earlier sheet: give --preview (BLORA_PREVIEW) another name',
        ),
        (
            ["--preview=sheet.html", "--no_rehearsal"],
            "--preview requires the rehearsal: remove --no_rehearsal (BLORA_REHEARSAL=0)",
        ),
    ],
)
def test_a_sheet_that_could_not_be_written_is_refused_before_anything_else(capsys, words, sentence):
    with pytest.raises(SystemExit, match=r"^2$"):
        main([*words, "no such script.py"])
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines()[-1] == f"blora_preflight.py: error: {sentence}"
    assert Path("page.html").read_text() == "mine"


def test_where_the_trainer_makes_no_dataset_there_is_no_sheet_and_that_is_an_error(kohya, capsys):
    """A launcher says that the sheet is drawn where pre-flight ends well."""
    assert asked(capsys, "--preview=sheet.html", SCRIPT, *LINE)["errors"] == [
        f"cannot draw the pictures ({not_rehearsed(kohya).partition(',')[0]}): remove --preview "
        "(BLORA_PREVIEW)"
    ]
    assert not Path("sheet.html").exists()


def test_thumbnails_are_drawn_for_a_preview_alone(monkeypatch):
    limits = []

    def check_dataset(_rehearsal, _terminal, limit_for, _report):
        limits.append(limit_for)
        return images.Dataset(epoch=Epoch(1, 1, 1, 1, 64))

    monkeypatch.setattr(images, "check_dataset", check_dataset)
    for preview in (None, Path("sheet.html")):
        assert not Path("sheet.html").exists()
        training = Training(Path(SCRIPT), [], [], preview=preview)
        assert blora_preflight.check_pictures(training, Rehearsal(), Report()) == 64
    assert limits == [None, thumbnail_limit]
    assert Path("sheet.html").exists()


# ---- The end of a rehearsal ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rehearsal", "report"),
    [
        (
            Rehearsal(missing='"it" is not there'),
            Report(notes=['"it" is not there, so the training was not rehearsed']),
        ),
        (
            Rehearsal(failure=RuntimeError("Cannot copy out of meta tensor")),
            Report(
                notes=[
                    "without weights the rehearsal goes no further than the network (Cannot copy "
                    "out of meta tensor)"
                ]
            ),
        ),
        (
            Rehearsal(failure=KeyError("it")),
            Report(["the training would stop: fix the cause given (KeyError: 'it')"]),
        ),
        (
            Rehearsal(args=Namespace()),
            Report(
                ["the trainer ends before its first step: remove the option that ends it early"]
            ),
        ),
        (Rehearsal(args=Namespace(), ready=True), Report()),
    ],
)
def test_how_a_rehearsal_ended_is_one_sentence(rehearsal, report):
    concluded = Report()
    blora_preflight.conclude(rehearsal, concluded)
    assert concluded == report


@pytest.mark.parametrize(
    ("deepspeed", "failure", "errors", "notes"),
    [
        (False, None, 0, 0),
        (False, ValueError("a"), 1, 0),  # of --optimizer_args
        (False, RuntimeError("a"), 0, 1),
        (True, RuntimeError("a"), 0, 0),  # which has its own optimizer
    ],
)
def test_what_an_optimizer_keeps_is_counted_where_it_can_be(
    monkeypatch, deepspeed, failure, errors, notes
):
    def count(_args: Namespace) -> float:
        if failure:
            raise failure
        return 2.0

    monkeypatch.setattr(blora_preflight, "state_per_byte", count)
    rehearsal, report = Rehearsal(args=Namespace(deepspeed=deepspeed)), Report()
    blora_preflight.count_state(rehearsal, report)
    assert rehearsal.optimizer_state == (None if failure else 2.0)
    assert (len(report.errors), len(report.notes)) == (errors, notes)


def test_what_cannot_be_asked_is_a_warning_with_the_place_and_without_a_culprit():
    report = Report()
    assert attempt(report, "work out the plan", int, "12") == 12
    assert attempt(report, "work out the plan", {}.__getitem__, "a") is None
    [warning] = report.warnings
    assert re.fullmatch(
        r"could not work out the plan \(KeyError: 'a', in report\.py line \d+\)", warning
    )
