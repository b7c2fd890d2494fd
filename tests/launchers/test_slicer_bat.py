"""What blora_slicer.bat does with its setting, its options and the files dropped on it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cmd_runner import Cmd
from kohya_folder import Bat, make_kohya, remove_files

pytestmark = pytest.mark.shell

ODD = "Zoe & co (1) it's! 50^"


@pytest.fixture
def bat(cmd: Cmd) -> Bat:
    return Bat(cmd)


def make_venv(bat: Bat, path: Path) -> Path:
    """A venv whose python records its calls; hands back the folder of its programs."""
    programs = bat.make_venv(path)
    bat.install_recorder(programs, "python")
    return programs


@pytest.fixture
def kohya(bat: Bat, tmp_path: Path) -> Path:
    """A kohya folder with an odd name, whose venv has a python that records its call."""
    path = make_kohya(tmp_path / ODD / "kohya")
    make_venv(bat, path / "venv")
    return path


@pytest.fixture
def loras(kohya: Path, bat: Bat) -> list[str]:
    """Two LoRA files, as a .bat is given them."""
    paths = [kohya / f"{name} {ODD}.safetensors" for name in "ab"]
    for path in paths:
        path.touch()
    return [bat.shown(path) for path in paths]


def slicer_call(bat: Bat, kohya: Path, *args: str, env=None) -> list[str]:
    """The arguments blora_slicer.py was called with, from a folder elsewhere."""
    log = kohya.parent / "log"
    done, calls = bat.run(kohya / "blora_slicer.bat", args, kohya.parent, log, env or {})
    assert (done.returncode, done.output) == (0, "")
    [call] = calls
    script, *rest = call.argv[1:]
    assert script == bat.shown(kohya / "blora_slicer.py")
    return rest


def test_it_slices_the_lora_of_the_setting(bat, kohya):
    default = bat.shown(kohya) + "\\_out/lora/sdxl/my_project_1/my_project_1.safetensors"
    assert slicer_call(bat, kohya) == ["--loras", default]


def test_the_setting_can_be_edited_or_set_in_the_environment(bat, kohya, loras):
    assert slicer_call(bat, kohya, env={"BLORA_LORA": loras[0]}) == ["--loras", loras[0]]


def test_options_are_handed_on_behind_the_lora_of_the_setting(bat, kohya):
    options = ["--traits", "style", "--alphas", "-0.5", "--output_path", f"D:/{ODD}.safetensors"]
    assert slicer_call(bat, kohya, *options)[2:] == options


def test_a_dropped_lora_is_sliced_instead(bat, kohya, loras):
    assert slicer_call(bat, kohya, loras[0]) == ["--loras", loras[0]]


def test_several_dropped_loras_give_one_slice_each(bat, kohya, loras):
    assert slicer_call(bat, kohya, *loras) == ["--not_combined", "--loras", *loras]


def test_files_with_options_are_the_command_line_of_the_slicer(bat, kohya, loras):
    args = [*loras, "--traits", "content", "style"]
    assert slicer_call(bat, kohya, *args) == ["--loras", *args]


def test_a_file_that_is_not_there_is_handed_on_for_the_slicer_to_say_so(bat, kohya):
    assert slicer_call(bat, kohya, "gone.safetensors") == ["--loras", "gone.safetensors"]


def test_a_path_pasted_from_explorer_arrives_without_its_quote_marks(bat, kohya, loras):
    assert slicer_call(bat, kohya, env={"BLORA_LORA": f'"{loras[0]}"'}) == ["--loras", loras[0]]


def test_without_a_python_it_says_so_in_one_sentence(bat, tmp_path):
    path = make_kohya(tmp_path / "kohya")
    done, calls = bat.run(path / "blora_slicer.bat", [], path, tmp_path / "log", {})
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "No python in venv, .venv or the active environment: install kohya's requirements, or "
        "activate the environment that has them."
    ]
    assert (done.returncode, calls) == (1, [])


@pytest.mark.parametrize("code", [0, 1, 2])
def test_the_exit_code_of_the_slicer_is_its_own(bat, kohya, code):
    env = {"RECORDER_EXIT": str(code)}
    done, _ = bat.run(kohya / "blora_slicer.bat", [], kohya, kohya.parent / "log", env)
    assert done.returncode == code


@pytest.mark.parametrize("venv", [".venv", "venv"])
def test_it_uses_the_venv_of_its_folder(bat, tmp_path, venv):
    path = make_kohya(tmp_path / "kohya")
    programs = make_venv(bat, path / venv)
    _, [call] = bat.run(path / "blora_slicer.bat", [], tmp_path, tmp_path / "log", {})
    assert bat.program_folder(call) == programs
    assert call.env["VIRTUAL_ENV"] == bat.shown(path / venv)


def test_a_venv_without_accelerate_is_not_kohyas(bat, tmp_path):
    path = make_kohya(tmp_path / "kohya")
    programs = {venv: make_venv(bat, path / venv) for venv in ("venv", ".venv")}
    remove_files(path, f"venv/{bat.accelerate}")
    _, [call] = bat.run(path / "blora_slicer.bat", [], tmp_path, tmp_path / "log", {})
    assert bat.program_folder(call) == programs[".venv"]


def test_it_does_the_same_where_a_caller_expands_exclamation_marks(bat, tmp_path):
    path = make_kohya(tmp_path / "kohya")
    make_venv(bat, path / "venv")
    lines = f'@setlocal EnableDelayedExpansion\n@"{bat.shown(path / "blora_slicer.bat")}"\n'
    (path / "caller.bat").write_text(lines, newline="\r\n")
    env = {"BLORA_LORA": f"D:/{ODD}.safetensors"}
    done, [call] = bat.run(path / "caller.bat", [], path, tmp_path / "log", env)
    assert (done.returncode, done.output) == (0, "")
    assert call.argv[2:] == ["--loras", f"D:/{ODD}.safetensors"]


@pytest.mark.parametrize("dropped", [0, 1, 2])
def test_it_holds_its_window_open_after_a_double_click_or_a_drop(bat, kohya, loras, dropped):
    done = bat.double_click(kohya / "blora_slicer.bat", loras[:dropped], kohya.parent / "log")
    assert "Press any key" in done.output


def test_it_does_not_wait_for_a_key_when_called_with_options(bat, kohya):
    slicer_call(bat, kohya, subprocess.list2cmdline(["--debug"]))
