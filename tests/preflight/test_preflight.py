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
from blora.preflight.dataset import Epoch
from blora.preflight.rehearsal import Rehearsal
from blora.preflight.report import Report, attempt
from blora.sheet import thumbnail_limit
from blora_preflight import Training

PROGRAM = ROOT / "blora_preflight.py"
SCRIPT = "sdxl_train_network.py"
PARSES = "from sdxl_train_network_options import build_parser as setup_parser\n"
ANNOUNCED = f"{blora_preflight.ANNOUNCEMENT}\n"
OPTIONS = {
    "pretrained_model_name_or_path": "sdxl.safetensors",
    "dataset_config": "config.toml",
    "output_dir": "_out",
    "output_name": "hero_1",
}
LINE = [f"--{name}={value}" for name, value in OPTIONS.items()]


@pytest.fixture(autouse=True)
def kohya(tmp_path, monkeypatch) -> Path:
    """A folder in which a training could begin; it is the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BLORA_REHEARSAL", "")
    for name in ("sdxl_train_network", "library", "library.train_util", "library.config_util"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    shutil.copytree(ROOT / "tests/standin/library", "library")
    shutil.copy(ROOT / "tests/standin/sdxl_train_network_options.py", ".")
    shutil.copy(ROOT / "tests/data/sdxl_train_network_options.json", ".")
    Path(SCRIPT).write_text(PARSES)
    write_checkpoint(Path("sdxl.safetensors"), sdxl_shapes())
    Path("images").mkdir()
    write_config("images")
    return tmp_path


def write_config(folder: str) -> None:
    text = f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = {json.dumps(folder)}\n"
    Path("config.toml").write_text(text, encoding="utf-8")


def not_rehearsed(folder: Path) -> str:
    """The note on a script that trains nothing."""
    return f'"{folder / SCRIPT}" does not train a LoRA of SDXL, so the training was not rehearsed'


def asked(capsys, *words: str) -> dict:
    """What a run says as JSON; its exit code is 1 where it has an error."""
    code = blora_preflight.main(["--json", *words])
    printed = capsys.readouterr()
    assert printed.err == ""
    report = json.loads(printed.out)
    assert printed.out == f"{json.dumps(report, indent=2)}\n"
    assert code == (1 if report["errors"] else 0)
    return report


def run(*words: object, **more: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **more)


# ---- What it prints ------------------------------------------------------------------------------


def test_it_says_what_the_training_will_be(kohya, capsys):
    assert blora_preflight.main([SCRIPT, *LINE]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        "This training:",
        "  base      sdxl.safetensors (SDXL, 6.94 GB)",
        f"note: {not_rehearsed(kohya)}",
    ]
    assert printed.err == ANNOUNCED


def test_json_is_the_same_and_nothing_else(kohya, capsys):
    assert asked(capsys, SCRIPT, *LINE) == {
        "errors": [],
        "warnings": [],
        "notes": [not_rehearsed(kohya)],
        "plan": {"base": "sdxl.safetensors (SDXL, 6.94 GB)"},
        "modules": [],
    }


def test_errors_come_first_and_alone(capsys):
    Path("config.toml").unlink()
    Path("_out").mkdir()
    Path("_out/hero_1.safetensors").touch()
    assert blora_preflight.main(["--no_rehearsal", SCRIPT, *LINE, "--vae=gone"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    starts = ['error: no VAE at "gone"', "error: no dataset config at ", 'warning: "_out/hero_1.']
    lines = printed.err.replace("\\", "/").splitlines()
    assert [line.startswith(start) for line, start in zip(lines, starts, strict=True)] == [True] * 3


def test_a_warning_stops_nothing(capsys):
    Path("_out").mkdir()
    Path("_out/hero_1.safetensors").touch()
    assert blora_preflight.main(["--no_rehearsal", SCRIPT, *LINE]) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("warning: ")
    assert printed.out.startswith("This training:\n  base ")


def test_text_of_files_reaches_the_terminal_escaped(capsys):
    write_config("gone\x1b[31m")
    assert blora_preflight.main(["--no_rehearsal", SCRIPT, *LINE]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(r'error: no folder of images at "gone\x1b[31m": ')


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
    assert blora_preflight.main([*line, SCRIPT, *LINE]) == 0
    assert blora_preflight.main(["--json", "--preview=a.html", *line, SCRIPT, *LINE]) == 0
    script = Path(SCRIPT)
    assert trainings == [
        Training(script, LINE, line, terminal=sys.stderr),
        Training(script, LINE, line, preview=Path("a.html")),  # no progress beside JSON
    ]


def test_without_a_script_the_first_word_is_taken_for_one(capsys):
    assert asked(capsys, "launch", "--num_processes=2")["errors"] == [
        'no training script at "launch": run this in a kohya sd-scripts or kohya_ss folder'
    ]


def printed_by(*words: str) -> dict:
    """The same of a program of its own, whose sys.argv the trainer reads."""
    return json.loads(run(PROGRAM, "--json", *words).stdout)


def test_the_gui_gives_the_options_in_a_config_file():
    options = OPTIONS | {"vae": "gone", "train_data_dir": "", "save_last_n_epochs": ""}
    lines = [f"{name} = {json.dumps(value)}" for name, value in options.items()]
    Path("gui.toml").write_text("\n".join([*lines, "cache_latents = false"]), encoding="utf-8")
    line = ["--config_file", "gui.toml"]
    assert printed_by(SCRIPT, *line)["errors"] == ['no VAE at "gone": correct --vae']
    assert printed_by(SCRIPT, "--config_file=gui", "--vae=")["errors"] == []
    assert printed_by(SCRIPT, "--config_file=gone")["errors"] == [
        "--config_file gone.toml cannot be read: correct its path or its text (gone.toml not "
        "found.)"
    ]


def test_what_is_not_rehearsed_on_request_gets_no_note(kohya, capsys, monkeypatch):
    assert asked(capsys, "--no_rehearsal", SCRIPT, *LINE)["notes"] == []
    monkeypatch.setenv("BLORA_REHEARSAL", "0")
    assert asked(capsys, SCRIPT, *LINE)["notes"] == []
    assert blora_preflight.main([SCRIPT, *LINE]) == 0
    assert capsys.readouterr().err == ""
    for other in ("", "1"):
        monkeypatch.setenv("BLORA_REHEARSAL", other)
        assert asked(capsys, SCRIPT, *LINE)["notes"] == [not_rehearsed(kohya)]


def test_it_has_a_version(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        blora_preflight.main(["--version"])
    assert capsys.readouterr().out == f"blora_preflight.py {blora.VERSION}\n"


def test_files_that_version_1_left_behind_are_a_note(kohya, monkeypatch, capsys):
    monkeypatch.setattr(blora, "ROOT", kohya)
    for name in ("blora_words.py", "blora_look.py"):
        Path(name).write_text("raise RuntimeError")
    [note, _] = asked(capsys, SCRIPT, *LINE)["notes"]
    assert note == blora.leftovers()
    assert "blora_look.py, blora_words.py" in note


def test_a_preview_is_asked_for_by_option_or_setting(monkeypatch):
    def preview(*words: str) -> Path | None:
        return blora_preflight.build_parser().parse_args([*words, SCRIPT]).preview

    monkeypatch.delenv("BLORA_PREVIEW", raising=False)
    assert preview() is None
    assert preview("--preview", "sheet.html") == Path("sheet.html")
    monkeypatch.setenv("BLORA_PREVIEW", "other.html")
    assert preview() == Path("other.html")
    assert preview("--preview=sheet.html") == Path("sheet.html")
    assert preview("--preview=~/sheet.html") == Path.home() / "sheet.html"
    monkeypatch.setenv("BLORA_PREVIEW", "")
    assert preview() is None
    monkeypatch.setenv("BLORA_PREVIEW", '""')  # set, to a launcher: so it is refused
    assert preview() == Path()


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
    assert blora_preflight.main(words) in (0, 1)
    assert json.loads(capsys.readouterr().out).keys() == Report().__dict__.keys()


def test_cmd_leaves_quote_marks_and_blanks_in_a_setting(monkeypatch):
    monkeypatch.setenv("BLORA_PREVIEW", '"D:/my sheet.html" ')
    monkeypatch.setenv("BLORA_REHEARSAL", "0 ")
    args = blora_preflight.build_parser().parse_args([SCRIPT])
    assert (args.preview, args.no_rehearsal) == (Path("D:/my sheet.html"), True)


REFUSED_SHEETS = {
    "another ending": (
        ["--preview=sheet.jpg"],
        '--preview (BLORA_PREVIEW) writes a web page, not "sheet.jpg": end its name in .html',
    ),
    "another page": (
        ["--preview=page.html"],
        '"page.html" is not an earlier sheet: give --preview (BLORA_PREVIEW) another name',
    ),
    "no rehearsal": (
        ["--preview=sheet.html", "--no_rehearsal"],
        "--preview requires the rehearsal: remove --no_rehearsal (BLORA_REHEARSAL=0)",
    ),
}


@pytest.mark.parametrize("case", REFUSED_SHEETS)
def test_a_sheet_that_could_not_be_written_is_refused_before_anything_else(capsys, case):
    Path("page.html").write_text("mine")
    words, sentence = REFUSED_SHEETS[case]
    with pytest.raises(SystemExit) as refusal:
        blora_preflight.main([*words, "no such script.py"])
    assert refusal.value.code == 2
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


def test_who_stops_it_sees_no_traceback(capsys, monkeypatch):
    def stop(*_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(blora_preflight, "check_files", stop)
    assert blora_preflight.main(["--json", SCRIPT, *LINE]) == 130
    assert capsys.readouterr().out == ""


def test_what_cannot_be_asked_is_a_warning_with_the_place_and_without_a_culprit():
    report = Report()
    assert attempt(report, "work out the plan", int, "12") == 12
    assert attempt(report, "work out the plan", {}.__getitem__, "a") is None
    [warning] = report.warnings
    assert re.fullmatch(
        r"could not work out the plan \(KeyError: 'a', in report\.py line \d+\)", warning
    )


def test_an_output_that_is_no_text_stream_of_pythons_is_written_to_as_it_is(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", None)
    assert blora_preflight.main(["--json", SCRIPT, *LINE]) == 0
    assert json.loads(sys.stdout.getvalue())["errors"] == []


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "blora.preflight.images",
            "blora_preflight.py 2.0.0 cannot use the blora folder beside it",
        ),
        ("numpy", f"this Python ({sys.executable}) has no numpy: install kohya's requirements"),
    ],
)
def test_what_only_the_pictures_need_is_missed_in_a_sentence(capsys, monkeypatch, name, sentence):
    def lack(*_args: object) -> None:
        raise ModuleNotFoundError(f"No module named '{name}'", name=name)

    monkeypatch.setattr(blora_preflight, "check_trainer", lack)
    [error] = asked(capsys, SCRIPT, *LINE)["errors"]
    assert error.startswith(sentence)


# ---- The order of things -------------------------------------------------------------------------


WITH_A_MARK = f"{PARSES}from pathlib import Path\nPath('asked').touch()\n"
TOO_EARLY = {
    "no script": (["gone.py", *LINE], 'no training script at "gone.py": '),
    "no checkpoint": (
        [SCRIPT, "--pretrained_model_name_or_path=path/to/sd_xl_base_1.0.safetensors"],
        "no checkpoint is set yet: ",
    ),
}


@pytest.mark.parametrize("which", TOO_EARLY)
def test_what_needs_no_parser_is_said_before_the_trainer_is_imported(which):
    Path(SCRIPT).write_text(WITH_A_MARK)
    words, sentence = TOO_EARLY[which]
    [error] = printed_by(*words)["errors"]
    assert error.startswith(sentence)
    assert not Path("asked").exists()


def test_the_trainer_reads_the_options_and_an_error_in_files_ends_before_the_rehearsal():
    Path(SCRIPT).write_text(WITH_A_MARK)
    done = run(PROGRAM, SCRIPT, *LINE, "--vae=gone")
    assert (done.returncode, ANNOUNCED in done.stderr) == (1, False)
    assert Path("asked").exists()
    done = run(PROGRAM, SCRIPT, *LINE)
    assert (done.returncode, done.stderr) == (0, ANNOUNCED)


def test_options_that_the_trainer_refuses_are_told_in_its_words():
    assert printed_by(SCRIPT, "--network_dim=many")["errors"] == [
        "sd-scripts refuses the options: correct them (argument --network_dim: invalid int value: "
        "'many')"
    ]


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
    assert printed_by(SCRIPT, *LINE) == asdict(Report(notes=notes))


def test_what_the_trainer_prints_stays_out_of_the_json():
    Path(SCRIPT).write_text(f"{PARSES}import sys\nprint('it')\nprint('it', file=sys.stderr)\n")
    done = run(PROGRAM, "--json", SCRIPT, *LINE)
    assert done.stderr == ""
    assert json.loads(done.stdout)["errors"] == []


def test_a_package_that_the_trainer_lacks_is_an_error():
    Path(SCRIPT).write_text("import torch\n")
    done = run("-S", PROGRAM, "--json", SCRIPT, *LINE)
    assert json.loads(done.stdout)["errors"] == [
        f"this Python ({sys.executable}) has no torch: install kohya's requirements, or activate "
        "the environment that has them"
    ]


ENDS = {
    "the trainer is another": (
        Rehearsal(missing='"it" is not there'),
        "notes",
        '"it" is not there, so the training was not rehearsed',
    ),
    "a tensor without numbers was asked for one": (
        Rehearsal(failure=RuntimeError("Cannot copy out of meta tensor")),
        "notes",
        "without weights the rehearsal goes no further than the network (Cannot copy out of meta "
        "tensor)",
    ),
    "the trainer raised": (
        Rehearsal(failure=KeyError("it")),
        "errors",
        "the training would stop: fix the cause given (KeyError: 'it')",
    ),
    "the trainer came back": (
        Rehearsal(args=Namespace()),
        "errors",
        "the trainer ends before its first step: remove the option that ends it early",
    ),
}


@pytest.mark.parametrize("end", ENDS)
def test_how_a_rehearsal_ended_is_one_sentence(end):
    rehearsal, kind, sentence = ENDS[end]
    report = Report()
    blora_preflight.conclude(rehearsal, report)
    assert report == Report(**{kind: [sentence]})


def test_of_a_rehearsal_that_came_to_its_end_nothing_is_said():
    report = Report()
    blora_preflight.conclude(Rehearsal(ready=True), report)
    assert report == Report()


def test_a_name_that_the_terminals_encoding_lacks_is_escaped():
    write_config("gone_ü")
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = run(PROGRAM, "--no_rehearsal", SCRIPT, *LINE, env=env)
    assert r'"gone_\xfc"' in done.stderr
