"""The programs are made of files beside them, and load no more than they need."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kohya_folder import ROOT, install
from lora_files import CONTENT, blora_modules, write

import blora

PROGRAMS = ("blora_slicer.py", "blora_preflight.py")
ROOMS = [path.relative_to(ROOT) for path in sorted((ROOT / "blora").rglob("*.py"))]
# What a program loads only where it is asked for it.
LATE = {
    "blora_slicer.py": {
        "blora/sheet.py", "blora/slicer/inspection.py", "blora/slicer/strength.py",
        "blora/slicer/values.py",
    },
    "blora_preflight.py": {
        f"blora/preflight/{name}.py"
        for name in (
            "captions", "dataset", "dataset_checks", "folders",
            "images", "preview",
        )
    },
}  # fmt: skip


def needs(program: str, room: Path) -> bool:
    """Whether a program loads a room of the blora folder at its start."""
    hall = "blora/slicer" if "slicer" in program else "blora/preflight"
    is_its_own = len(room.parts) == 2 or room.parent == Path(hall)
    return is_its_own and room.as_posix() not in LATE[program]


def unusable(program: str, why: str) -> str:
    """What a program says of a blora folder that it cannot use."""
    return (
        f"error: {program} {blora.VERSION} cannot use the blora folder beside it ({why}): copy the "
        "whole bundle again\n"
    )


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, check=False
    )


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return write(tmp_path / "lora.safetensors", blora_modules(CONTENT))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """The bundle in a folder of its own."""
    folder = tmp_path / "kohya"
    folder.mkdir()
    install(folder)
    return folder


CASES = [
    (program, room)
    for program in PROGRAMS
    for room in ROOMS
    if room.name != "__init__.py" and needs(program, room)
]


@pytest.mark.parametrize(("program", "room"), CASES, ids=str)
def test_a_program_without_a_file_of_the_blora_folder_says_what_to_copy(bundle, program, room):
    (bundle / room).unlink()
    done = run(bundle / program, "--help")
    module = ".".join(room.with_suffix("").parts)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == unusable(program, f"No module named '{module}'")


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_without_the_blora_folder_says_what_to_copy(bundle, program):
    shutil.rmtree(bundle / "blora")
    done = run(bundle / program, "--help")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == unusable(program, "No module named 'blora'")


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    ("text", "why"), [('VERSION = "2.1.0"\n', "it is version 2.1.0"), ("", "it is version unknown")]
)
def test_a_blora_folder_of_a_different_version_is_named_with_both(bundle, program, text, why):
    (bundle / "blora/__init__.py").write_text(text)
    done = run(bundle / program, "--help")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == unusable(program, why)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_file_that_lacks_what_is_asked_of_it_is_named(bundle, program):
    (bundle / "blora/text.py").write_text("# nothing of what the others ask for\n")
    done = run(bundle / program, "--help")
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        "cannot use the blora folder beside it (cannot import name 'BloraError' from 'blora."
        in (done.stderr)
    )


@pytest.mark.parametrize(
    ("room", "options"),
    [
        ("strength", ["--alphas", "0.5"]),
        ("strength", ["--save_precision", "float"]),
        ("inspection", ["--inspect"]),
    ],
)
def test_what_only_some_cuts_need_is_missed_by_those_alone(bundle, lora, room, options):
    (bundle / f"blora/slicer/{room}.py").unlink()
    assert run(bundle / "blora_slicer.py", "--loras", lora).returncode == 0
    done = run(bundle / "blora_slicer.py", "--loras", lora, *options)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == unusable("blora_slicer.py", f"No module named 'blora.slicer.{room}'")


@pytest.mark.parametrize("program", PROGRAMS)
def test_both_programs_are_of_the_version_of_the_blora_folder(program):
    assert f'\nVERSION = "{blora.VERSION}"\n' in (ROOT / program).read_text(encoding="utf-8")


def test_a_cut_at_1_needs_no_package_at_all(bundle, lora):
    done = run("-S", bundle / "blora_slicer.py", "--loras", lora)
    assert (done.returncode, done.stderr) == (0, "")
    assert (bundle / "model.safetensors").is_file()


def test_a_large_cut_without_tqdm_is_written_without_a_bar(bundle, lora):
    reader = bundle / "blora/tensorfile.py"
    shown = re.sub("(?m)^SHOW_PROGRESS = .*$", "SHOW_PROGRESS = 0", reader.read_text("utf-8"))
    reader.write_text(shown, "utf-8")
    done = run("-S", bundle / "blora_slicer.py", "--loras", lora)
    assert (done.returncode, done.stderr) == (0, "")
    assert (bundle / "model.safetensors").is_file()


def test_a_strength_without_numpy_is_told_in_one_sentence(bundle, lora):
    done = run("-S", bundle / "blora_slicer.py", "--loras", lora, "--alphas", "0.5")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"error: no numpy in this Python ({sys.executable}): activate kohya's venv\n"
    )


@pytest.mark.parametrize("options", [[], ["--no_metadata"], ["--not_combined"]])
def test_a_cut_at_1_loads_neither_numpy_nor_torch_nor_safetensors(lora, tmp_path, options):
    words = ["--loras", str(lora), "--output_path", str(tmp_path / "out.safetensors"), *options]
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import blora_slicer\n"
        f"blora_slicer.main({words})\n"
        "sys.exit(', '.join(sys.modules.keys() & {'numpy', 'torch', 'safetensors', 'tqdm'}))\n"
    )
    done = run("-c", code)
    assert done.stderr in ("", "\n"), done.stderr
