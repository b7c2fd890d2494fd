"""blora_preflight.py as a program: its command line, what it prints, and in which order it asks.

What it finds is in test_blora_look.py, test_blora_plan.py, test_blora_advice.py and their siblings.
The script of these tests is not sd-scripts' own, so nothing is rehearsed: test_blora_real_kohya.py
rehearses.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kohya_folder import ROOT
from sdxl_checkpoint import sdxl_shapes, write_checkpoint

import blora_preflight
from blora.preflight.rehearsal import Rehearsal
from blora.preflight.report import Report, attempt

PROGRAM = ROOT / "blora_preflight.py"
SCRIPT = "sdxl_train_network.py"
NOT_REHEARSED = f'"{SCRIPT}" is not sd-scripts\' own, so the training was not rehearsed'
ANNOUNCED = "Rehearsing the training on the trainer's own code; this takes some seconds.\n"
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
    Path(SCRIPT).touch()
    write_checkpoint(Path("sdxl.safetensors"), sdxl_shapes())
    Path("images").mkdir()
    write_config("images")
    return tmp_path


def write_config(folder: str) -> None:
    text = f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = {json.dumps(folder)}\n"
    Path("config.toml").write_text(text, encoding="utf-8")


def asked(capsys, *words: str) -> dict:
    """What a run says as JSON; its exit code is 1 where it has an error."""
    code = blora_preflight.main(["--json", *words])
    printed = capsys.readouterr()
    assert printed.err == ""
    report = json.loads(printed.out)
    assert code == (1 if report["errors"] else 0)
    return report


def run(*words: object, **more: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **more)


# ---- What it prints ------------------------------------------------------------------------------


def test_it_says_what_the_training_will_be(capsys):
    assert blora_preflight.main([SCRIPT, *LINE]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        "This training:",
        "  base      sdxl.safetensors (SDXL, 6.94 GB)",
        f"note: {NOT_REHEARSED}",
    ]
    assert printed.err == ANNOUNCED


def test_json_is_the_same_and_nothing_else(capsys):
    assert asked(capsys, SCRIPT, *LINE) == {
        "errors": [],
        "warnings": [],
        "notes": [NOT_REHEARSED],
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
    seen = []
    monkeypatch.setattr(blora_preflight, "check", lambda *args: seen.append(args) or Report())
    assert blora_preflight.main([*line, SCRIPT, *LINE]) == 0
    assert blora_preflight.main(["--json", "--preview=a.jpg", *line, SCRIPT, *LINE]) == 0
    assert seen == [
        (Path(SCRIPT), LINE, line, True, None, sys.stderr),
        (Path(SCRIPT), LINE, line, True, Path("a.jpg"), None),  # no bar beside JSON
    ]


def test_without_a_script_the_first_word_is_taken_for_one(capsys):
    sentence = 'no training script at "launch": run this in a kohya sd-scripts or kohya_ss folder'
    assert sentence in asked(capsys, "launch", "--num_processes=2")["errors"]


def test_the_gui_gives_the_options_in_a_config_file(capsys):
    options = OPTIONS | {"vae": "gone", "train_data_dir": "", "save_last_n_epochs": ""}
    lines = [f"{name} = {json.dumps(value)}" for name, value in options.items()]
    Path("gui.toml").write_text("\n".join([*lines, "cache_latents = false"]), encoding="utf-8")
    found = asked(capsys, SCRIPT, "--config_file", "gui.toml")
    assert found["errors"] == ['no VAE at "gone": correct --vae']
    assert asked(capsys, SCRIPT, "--config_file=gui", "--vae=")["errors"] == []


def test_what_is_not_rehearsed_on_request_gets_no_note(capsys, monkeypatch):
    assert asked(capsys, "--no_rehearsal", SCRIPT, *LINE)["notes"] == []
    monkeypatch.setenv("BLORA_REHEARSAL", "0")
    assert asked(capsys, SCRIPT, *LINE)["notes"] == []
    assert blora_preflight.main([SCRIPT, *LINE]) == 0
    assert capsys.readouterr().err == ""
    for other in ("", "1"):
        monkeypatch.setenv("BLORA_REHEARSAL", other)
        assert asked(capsys, SCRIPT, *LINE)["notes"] == [NOT_REHEARSED]


def test_a_preview_is_asked_for_by_option_or_setting(monkeypatch):
    def preview(*words: str) -> Path | None:
        return blora_preflight.build_parser().parse_args([*words, SCRIPT]).preview

    monkeypatch.delenv("BLORA_PREVIEW", raising=False)
    assert preview() is None
    assert preview("--preview", "sheet.jpg") == Path("sheet.jpg")
    monkeypatch.setenv("BLORA_PREVIEW", "other.jpg")
    assert preview() == Path("other.jpg")
    assert preview("--preview=sheet.jpg") == Path("sheet.jpg")
    monkeypatch.setenv("BLORA_PREVIEW", "")
    assert preview() is None


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
    monkeypatch.setenv("BLORA_PREVIEW", '"D:/my sheet.jpg" ')
    monkeypatch.setenv("BLORA_REHEARSAL", "0 ")
    args = blora_preflight.build_parser().parse_args([SCRIPT])
    assert (args.preview, args.no_rehearsal) == (Path("D:/my sheet.jpg"), True)


def test_there_is_no_preview_without_the_rehearsal(capsys):
    report = asked(capsys, "--no_rehearsal", "--preview=sheet.jpg", SCRIPT, *LINE)
    assert report["notes"] == ["there is no preview without the rehearsal"]


def test_who_stops_it_sees_no_traceback(capsys, monkeypatch):
    def stop(*_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(blora_preflight, "look", stop)
    assert blora_preflight.main(["--json", SCRIPT, *LINE]) == 130
    assert capsys.readouterr().out == ""


def test_what_a_release_does_not_let_know_is_a_note():
    report = Report()
    assert attempt(report, blora_preflight.NOT_TOLD, int, "12") == 12
    assert attempt(report, blora_preflight.NOT_TOLD, {}.__getitem__, "a") is None
    assert report.notes == [
        "this release of sd-scripts does not let us tell the whole plan (KeyError('a'))"
    ]


# ---- The order of things -------------------------------------------------------------------------


def make_own_script(text: str) -> None:
    """A script that pre-flight takes for sd-scripts' own."""
    Path("library").mkdir()
    Path("library/train_util.py").touch()
    Path(SCRIPT).write_text(text, encoding="utf-8")


def test_what_fails_at_the_look_ends_before_the_trainer_is_asked():
    make_own_script("from pathlib import Path\nPath('asked').touch()\n")
    done = run(PROGRAM, SCRIPT, *LINE, "--vae=gone")
    assert (done.returncode, ANNOUNCED in done.stderr) == (1, False)
    assert not Path("asked").exists()
    done = run(PROGRAM, SCRIPT, *LINE)
    assert (done.returncode, done.stderr) == (0, ANNOUNCED)
    assert Path("asked").exists()
    told = f'note: "{SCRIPT}" does not train a LoRA of SDXL, so the training was not rehearsed'
    assert done.stdout.splitlines()[-1] == told


def test_what_the_trainer_prints_stays_out_of_the_json():
    make_own_script("import sys\nprint('printed')\nprint('logged', file=sys.stderr)\n")
    done = run(PROGRAM, "--json", SCRIPT, *LINE)
    assert done.stderr == ""
    assert json.loads(done.stdout)["errors"] == []


def test_a_package_that_the_trainer_lacks_is_an_error():
    make_own_script("import torch\n")
    done = run("-S", PROGRAM, "--json", SCRIPT, *LINE)
    report = json.loads(done.stdout)
    assert report["notes"] == ["no toml in this Python, so the configs were not checked"]
    [error] = report["errors"]
    assert error.startswith(f"this Python ({sys.executable}) has no torch: ")


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
        "the training would stop: correct what the trainer names (KeyError: 'it')",
    ),
    "the trainer came back": (
        Rehearsal(),
        "errors",
        "the trainer ends before its first step: leave out the option that asks for that",
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


# ---- What it loads -------------------------------------------------------------------------------


def test_the_look_loads_no_package_but_toml(kohya):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import blora_preflight\n"
        "code = blora_preflight.main(['--no_rehearsal', *sys.argv[1:]])\n"
        "heavy = {'torch', 'numpy', 'PIL', 'lycoris', 'accelerate', 'safetensors', 'tqdm'}\n"
        "sys.exit(code or ', '.join(heavy & sys.modules.keys()) or None)\n"
    )
    done = run("-c", code, SCRIPT, *LINE)
    assert (done.returncode, done.stderr) == (0, "")


def test_it_runs_in_a_python_without_any_package():
    done = run("-S", PROGRAM, "--no_rehearsal", SCRIPT, *LINE)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].startswith("note: no toml in this Python")


def test_a_name_that_the_terminals_encoding_lacks_is_escaped():
    write_config("gone_ü")
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = run(PROGRAM, "--no_rehearsal", SCRIPT, *LINE, env=env)
    assert r'"gone_\xfc"' in done.stderr
