"""blora_preflight.py as a program: its command line, what it prints, and in which order it asks.

The script reads sd-scripts' options and trains nothing; test_real_*.py rehearse.
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
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kohya_folder import ROOT
from reports import reported
from sdxl_checkpoint import sdxl_shapes, write_checkpoint

import blora
import blora_preflight
from blora.preflight import images
from blora.preflight.checkpoint import NOT_SET
from blora.preflight.dataset import Epoch
from blora.preflight.rehearsal import Rehearsal
from blora.preflight.report import Report, attempt, print_report
from blora.sheet import thumbnail_limit
from blora_preflight import Training, main

SCRIPT = "sdxl_train_network.py"
PARSES = (
    "import sys\nfrom library import config_util, train_util\n"
    "from sdxl_train_network_options import build_parser as setup_parser\n"
    "print('it')\nprint('it', file=sys.stderr)\n"
)
OPTIONS = {
    "pretrained_model_name_or_path": "sdxl.safetensors",
    "dataset_config": "config.toml",
    "output_dir": "_out",
    "output_name": "hero_1",
}
LINE = [f"--{name}={value}" for name, value in OPTIONS.items()]
NO_SAMPLES = ["--sample_at_first", "--sample_prompts=gone"]
BASE = "sdxl.safetensors (SDXL, 6.94 GB)"
PROGRAM = str(ROOT / "blora_preflight.py")
ANNOUNCED = "Rehearsing the training with the trainer's own code; this takes a few seconds.\n"


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
    Path(SCRIPT).write_text(PARSES)
    write_checkpoint(Path("sdxl.safetensors"), sdxl_shapes())
    Path("images").mkdir()
    Path("page.html").write_text("mine")
    Path("config.toml").write_text('[[datasets]]\n[[datasets.subsets]]\nimage_dir = "images"\n')
    return tmp_path


def not_rehearsed(folder: Path) -> str:
    return f'"{folder / SCRIPT}" does not train a LoRA of SDXL, so the training was not rehearsed'


def asked(capsys, *words: str) -> dict:
    """What a run says as JSON, alone; its exit code is 1 where it has an error."""
    code = main(["--json", *words])
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert (printed.out, printed.err) == (f"{json.dumps(report, indent=2)}\n", "")
    assert code == (1 if report["errors"] else 0)
    return report


def run(*command: str, **more: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *command]
    return subprocess.run(command, capture_output=True, text=True, check=False, **more)


def test_it_says_what_the_training_will_be_and_as_json_the_same(kohya, capsys):
    assert main([SCRIPT, *LINE]) == 0
    note = not_rehearsed(kohya)
    assert capsys.readouterr() == (f"This training:\n  base      {BASE}\nnote: {note}\n", ANNOUNCED)
    assert asked(capsys, SCRIPT, *LINE) == asdict(Report(notes=[note], plan={"base": BASE}))


def test_errors_come_first_and_alone_and_escaped_before_any_rehearsal(capsys):
    assert main([SCRIPT, *LINE, *NO_SAMPLES, "--vae=gone\x1b[31m", "--base_weights", "b"]) == 1
    assert capsys.readouterr() == (
        "",
        'error: no network weights at "b": correct --base_weights\n'
        'error: no VAE at "gone\\x1b[31m": correct --vae\n'
        'warning: no prompts at "gone", so no samples will be drawn: correct --sample_prompts\n',
    )


def test_a_long_line_of_the_plan_is_wrapped_and_in_json_whole(capsys):
    text = ", ".join(["112.7 MB LoRA"] * 8)
    print_report(Report(plan={"memory": text, "saves": "/" + "a" * 120}))
    first, second, *others = capsys.readouterr().out.splitlines()[1:]
    assert first.startswith("  memory    112.7 MB LoRA, ")
    assert len(first) <= 100
    assert f"{first[12:]} {second.removeprefix(' ' * 12)}" == text
    assert others[-1].strip() == "/" + "a" * 120


def test_a_warning_stops_nothing_and_is_counted_at_the_end(capsys):
    assert main(["--no_rehearsal", SCRIPT, *LINE, *NO_SAMPLES]) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("warning: no prompts at ")
    assert printed.out == f"This training:\n  base      {BASE}\n1 warning: see above\n"
    print_report(Report(warnings=["it is odd"] * 2))
    assert capsys.readouterr().out == "This training:\n2 warnings: see above\n"


def test_any_output_is_written_to_as_far_as_it_can(monkeypatch):
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = run(PROGRAM, SCRIPT, *LINE, "--vae=gone_ü", env=env)
    assert (done.returncode, done.stdout) == (1, "")
    assert r'"gone_\xfc"' in done.stderr
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # no text stream of Python's
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["--json", SCRIPT, *LINE]) == 0
    assert json.loads(sys.stdout.getvalue())["errors"] == []


NAMES = [*OPTIONS, "network_args", "network_module", "config_file", "resume", "vae", "output_nam"]
NAMES += ["save_every_n_steps", "max_train_steps", "sample_prompts", "sample_at_first"]
VALUES = st.sampled_from(["", "0", "-1", "nan", "1e999", "config.toml", "images", "lycoris.kohya"])
VALUES |= st.text(max_size=20) | st.just("x" * 300)
WORDS = st.builds("--{}".format, st.sampled_from(NAMES))
WORDS |= st.builds("--{}={}".format, st.sampled_from(NAMES), VALUES) | VALUES


def test_the_words_before_the_script_are_accelerates(monkeypatch):
    trainings = []
    monkeypatch.setattr(blora_preflight, "check", lambda it: trainings.append(it) or Report())
    for words in ("", "launch --num_processes=2", "/venv/bin/accelerate launch --num_processes 2"):
        line = words.split()
        assert main([*line, SCRIPT, *LINE]) == 0
        assert main(["--json", "--preview=a.html", *line, SCRIPT, *LINE]) == 0
        assert trainings[-2:] == [
            Training(Path(SCRIPT), LINE, line, terminal=sys.stderr),
            Training(Path(SCRIPT), LINE, line, preview=Path("a.html")),  # no progress beside JSON
        ]


# The line of the GUI, and what is in it, but for the options of accelerate and sd-scripts.
OF_GUI = {
    "/k/.venv/bin/accelerate": ("/k/sd-scripts/sdxl_train_network.py", "/out/a.toml"),
    "/my kohya/bin/accelerate": ("/my kohya/sd-scripts/sdxl_train_network.py", "/my out/a b.toml"),
    r"D:\my kohya\accelerate.EXE": (r"D:\my kohya/sd-scripts/sdxl_train_network.py", "o/a.toml"),
    "accelerate": ("sd-scripts/sdxl_train_network.py", "_out/a.toml"),
}
OF_ACCELERATE = ["--dynamo_backend no --gpu_ids 0,1 --num_cpu_threads_per_process 2", "--multi_gpu"]


@pytest.mark.parametrize("accelerate", OF_GUI)
@pytest.mark.parametrize("options", OF_ACCELERATE)
def test_a_file_with_what_the_gui_printed_stands_for_its_last_command(
    monkeypatch, accelerate, options
):
    trainings = []
    monkeypatch.setattr(blora_preflight, "check", lambda it: trainings.append(it) or Report())
    script, config = OF_GUI[accelerate]
    line = f"{accelerate} launch {options} {script} --config_file {config} --seed=0 --a=b"
    Path("print_command.txt").write_text(f"an older one\n{line}\n\n")
    assert main(["print_command.txt", "--more"]) == 0
    [training] = trainings
    assert training.accelerate == [accelerate, "launch", *options.split()]
    assert training.script == Path(script)
    assert training.words == ["--config_file", config, "--seed=0", "--a=b", "--more"]


def test_a_file_without_a_command_of_the_gui_is_refused(capsys):
    Path("a.txt").write_text("A [v]\n")
    for name, reason in {
        "a.txt": 'the last line of "a.txt" is no training command of the kohya_ss GUI: press Print '
        "training command there, and give its logs/print_command.txt\n",
        "gone.txt": 'cannot read "gone.txt" (No such file or directory): correct its path\n',
    }.items():
        with pytest.raises(SystemExit, match="2"):
            main([name])
        assert capsys.readouterr().err.endswith(f"error: {reason}")


def test_what_needs_no_parser_is_said_before_the_trainer_is_imported(capsys):
    placeholder = "--pretrained_model_name_or_path=path/to/sd_xl_base_1.0.safetensors"
    assert asked(capsys, SCRIPT, placeholder)["errors"] == [NOT_SET]
    for words in (["launch", "--num_processes=2"], ["gone.py", *LINE]):
        assert asked(capsys, *words)["errors"] == [
            f'no training script at "{words[0]}": run this in a kohya sd-scripts or kohya_ss folder'
        ]
    assert "sdxl_train_network" not in sys.modules


def test_the_trainer_itself_reads_the_options(capsys):
    options = OPTIONS | {"vae": "gone", "train_data_dir": "", "save_last_n_epochs": ""}
    lines = [f"{name} = {json.dumps(value)}" for name, value in options.items()]
    Path("gui.toml").write_text("\n".join([*lines, "cache_latents = false"]), encoding="utf-8")
    for line, sentence in {
        "--config_file gui.toml": 'no VAE at "gone": correct --vae',
        "--config_file=gui --vae=": None,
        "--config_file=a": "--config_file a.toml cannot be read: correct its path or its text "
        "(a.toml not found.)",
        "--seed=x": "sd-scripts refuses the options: correct them (argument --seed: invalid int "
        "value: 'x')",
    }.items():
        assert asked(capsys, SCRIPT, *line.split())["errors"] == [sentence] * bool(sentence)
    assert "sdxl_train_network" in sys.modules


def test_a_script_that_is_not_sd_scripts_own_is_not_asked(capsys):
    Path("elsewhere").mkdir()
    for script, what in (("plain.py", "a training script"), ("elsewhere/plain.py", "part")):
        Path(script).touch()
        note = f'"{Path(script)}" is not {what} of sd-scripts, so the training was not rehearsed'
        assert asked(capsys, script, *LINE) == asdict(Report(notes=[note]))


def test_what_cannot_be_imported_is_an_error(capsys, monkeypatch):
    lacks = (
        f"this Python ({sys.executable}) has no {{}}: install kohya's requirements, or activate "
        "the environment that has them"
    )
    does_not_fit = (
        f"blora_preflight.py {blora.VERSION} cannot use the blora folder beside it (lost): copy "
        "the whole bundle again"
    )
    # What only the pictures need is missed late.
    for name, sentence in {"blora.sheet": does_not_fit, "numpy": lacks.format("numpy")}.items():
        lack = mock.Mock(side_effect=ModuleNotFoundError("lost", name=name))
        monkeypatch.setattr(blora_preflight, "check_trainer", lack)
        assert asked(capsys, SCRIPT, *LINE)["errors"] == [sentence]
    Path(SCRIPT).write_text("import torch\n")
    done = run("-S", PROGRAM, "--json", SCRIPT, *LINE)
    assert json.loads(done.stdout)["errors"] == [lacks.format("torch")]


def test_what_is_not_rehearsed_on_request_gets_no_note(kohya, capsys, monkeypatch):
    assert asked(capsys, "--no_rehearsal", SCRIPT, *LINE)["notes"] == []
    for setting in ("0", "0 ", '"0"', "", "1"):
        monkeypatch.setenv("BLORA_REHEARSAL", setting)
        notes = [] if "0" in setting else [not_rehearsed(kohya)]
        assert asked(capsys, SCRIPT, *LINE)["notes"] == notes
        assert main([SCRIPT, *LINE]) == 0
        assert capsys.readouterr().err == (ANNOUNCED if notes else "")


def test_files_that_version_1_left_behind_are_a_note(kohya, monkeypatch, capsys):
    monkeypatch.setattr(blora, "ROOT", kohya)
    Path("blora_words.py").write_text("raise RuntimeError")
    assert asked(capsys, SCRIPT, *LINE)["notes"] == [blora.leftovers(), not_rehearsed(kohya)]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(line=st.lists(WORDS, max_size=4))
def test_odd_command_lines_are_told_in_sentences(capsys, line):
    words = ["--json", "--no_rehearsal", SCRIPT, *LINE[1:], *line]
    assert main(words) in (0, 1)
    assert json.loads(capsys.readouterr().out).keys() == Report().__dict__.keys()


def test_it_has_a_version_and_who_stops_it_sees_no_traceback(capsys, monkeypatch):
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--version"])
    assert capsys.readouterr().out == f"blora_preflight.py {blora.VERSION}\n"
    monkeypatch.setattr(blora_preflight, "check_files", mock.Mock(side_effect=KeyboardInterrupt))
    assert main(["--json", SCRIPT, *LINE]) == 130
    assert capsys.readouterr().out == ""


def test_a_preview_is_asked_for_by_option_or_setting(monkeypatch):
    for words, setting, preview in (
        ([], "", None),
        (["--preview", "sheet.html"], "", Path("sheet.html")),
        (["--preview=~/sheet.html"], "", Path.home() / "sheet.html"),
        ([], "other.html", Path("other.html")),
        (["--preview=sheet.html"], "other.html", Path("sheet.html")),
        ([], '"D:/my sheet.html" ', Path("D:/my sheet.html")),  # as cmd leaves it
        ([], '""', Path()),  # set, to a launcher: so it is refused
    ):
        monkeypatch.setenv("BLORA_PREVIEW", setting)
        assert blora_preflight.build_parser().parse_args([*words, SCRIPT]).preview == preview


def test_a_sheet_that_could_not_be_written_is_refused_before_anything_else(capsys):
    for words, sentence in {
        "--preview=a.jpg": '{} writes a web page, not "a.jpg": end its name in .html',
        "--preview=page.html": '"page.html" is not an earlier sheet: give {} another name',
        "--preview=a.html --no_rehearsal": "--preview requires the rehearsal: remove "
        "--no_rehearsal (BLORA_REHEARSAL=0)",
    }.items():
        with pytest.raises(SystemExit, match=r"^2$"):
            main([*words.split(), "no such script.py"])
        printed = capsys.readouterr()
        refusal = sentence.format("--preview (BLORA_PREVIEW)")
        assert printed.out == ""
        assert printed.err.splitlines()[-1] == f"blora_preflight.py: error: {refusal}"
    assert Path("page.html").read_text() == "mine"


def test_where_the_trainer_makes_no_dataset_there_is_no_sheet_and_that_is_an_error(kohya, capsys):
    """A launcher says that the sheet is drawn where pre-flight ends well."""
    assert asked(capsys, "--preview=sheet.html", SCRIPT, *LINE)["errors"] == [
        f"cannot draw the pictures ({not_rehearsed(kohya).partition(',')[0]}): remove --preview "
        "(BLORA_PREVIEW)"
    ]
    assert not Path("sheet.html").exists()


def test_thumbnails_are_drawn_for_a_preview_alone(monkeypatch):
    check_dataset = mock.Mock(return_value=images.Dataset(epoch=Epoch(1, 1, 1, 1, 64)))
    monkeypatch.setattr(images, "check_dataset", check_dataset)
    rehearsal, report = Rehearsal(), Report()
    for preview, limit in ((None, None), (Path("sheet.html"), thumbnail_limit)):
        training = Training(Path(SCRIPT), [], [], preview=preview)
        assert blora_preflight.check_pictures(training, rehearsal, report) == 64
        check_dataset.assert_called_with(rehearsal, None, limit, report)
        assert Path("sheet.html").exists() == bool(preview)


def raised(failure: Exception) -> Exception:
    """The exception with the place where it was raised."""
    with pytest.raises(type(failure)) as caught:
        raise failure
    return caught.value


def test_how_a_rehearsal_ended_is_one_sentence():
    concluded = partial(reported, blora_preflight.conclude)
    meta = RuntimeError("Cannot copy out of meta tensor")
    assert concluded(Rehearsal(missing="it")).notes == ["it, so the training was not rehearsed"]
    [note] = concluded(Rehearsal(failure=raised(meta))).notes
    assert note.startswith(
        f"without weights the rehearsal goes no further than the network (RuntimeError: {meta}, in "
    )
    [warning] = concluded(Rehearsal(failure=raised(AttributeError("it")), ready=True)).warnings
    assert warning.startswith(
        "the rehearsal could not go through the first steps, so the optimizer, the saves and "
        "--resume were not tried (AttributeError: it, in test_preflight.py line "
    )
    assert concluded(Rehearsal(failure=raised(KeyError("it")))).errors == [
        "the training would stop: fix the cause given (KeyError: 'it')"
    ]
    assert concluded(Rehearsal(args=Namespace())).errors == [
        "the trainer ends before its first step: remove the option that ends it early"
    ]
    assert concluded(Rehearsal(args=Namespace(), ready=True)) == Report()


def test_what_cannot_be_asked_is_a_warning_with_the_place_and_without_a_culprit():
    report = Report()
    assert attempt(report, "do it", int, "12") == 12
    assert attempt(report, "do it", {}.__getitem__, "a") is None
    [warning] = report.warnings
    assert re.fullmatch(r"could not do it \(KeyError: 'a', in report\.py line \d+\)", warning)
