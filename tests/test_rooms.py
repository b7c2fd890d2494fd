"""The programs are made of files beside them, and load no more than they need."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kohya_folder import ROOT, install
from lora_files import CONTENT, blora_modules, write
from safetensors.torch import load_file

import blora

PROGRAMS = ("blora_slicer.py", "blora_preflight.py")
ROOMS = [path.relative_to(ROOT) for path in sorted((ROOT / "blora").rglob("*.py"))]
# What a program loads only where it is asked for it.
LATE = {
    "blora_slicer.py": {
        "blora/sheet.py", "blora/slicer/inspection.py", "blora/slicer/strength.py",
    },
    "blora_preflight.py": {
        f"blora/preflight/{name}.py"
        for name in (
            "captions", "dataset", "folders",
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


# What numpy raises where its binary does not fit the Python: a page of advice, and no name.
BROKEN = 'raise ImportError("\\n\\nIMPORTANT: PLEASE READ THIS\\n" + "We have reasons. " * 99)\n'


@pytest.mark.parametrize("options", [["--alphas", "0.5"], ["--inspect"]], ids=" ".join)
def test_a_broken_numpy_is_named_in_one_short_sentence(bundle, lora, options):
    package = bundle.parent / "packages/numpy"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(BROKEN)
    command = [sys.executable, bundle / "blora_slicer.py", "--loras", lora, *options]
    env = {**os.environ, "PYTHONPATH": str(package.parent)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert (done.returncode, done.stdout) == (1, "")
    start = f"error: a package of this Python ({sys.executable}) cannot be imported: reinstall it "
    assert done.stderr.startswith(f"{start}(IMPORTANT: PLEASE READ THIS We have reasons")
    assert done.stderr.count("\n") == 1
    assert len(done.stderr) < len(start) + 220


# ---- Files of version 1 --------------------------------------------------------------------------

FLAT = [  # every file that 1.5.0 had beside the programs
    f"blora_{name}.py"
    for name in (
        "advice checkpoint cut dataset inspect look lora memory names options pictures plan "
        "preview read refusals rehearsal report safetensors sdxl strength words"
    ).split()
]
# blora_words.py of 1.5.0, shortened: what the others imported.
OLD_WORDS = '''"""What all programs of the bundle do alike."""

NAMED = 3


class BloraError(Exception):
    """A mistake the user can fix."""
'''


@pytest.mark.parametrize("options", [[], ["--alphas", "0.5"], ["--inspect"]], ids=" ".join)
def test_files_that_version_1_left_are_named_and_break_nothing(bundle, lora, options):
    wanted = run(bundle / "blora_slicer.py", "--loras", lora, *options)
    output = bundle / "model.safetensors"
    tensors = load_file(output) if output.exists() else {}
    output.unlink(missing_ok=True)
    for name in FLAT:
        (bundle / name).write_text("raise SystemExit('an old file was imported')\n")
    (bundle / "blora_words.py").write_text(OLD_WORDS)
    done = run(bundle / "blora_slicer.py", "--loras", lora, *options)
    assert (done.returncode, done.stdout) == (0, wanted.stdout)
    assert done.stderr == (
        "note: version 1 left files beside blora_slicer.py that nothing uses any more: "
        f"{', '.join(FLAT)}: delete them\n"
    )
    written = load_file(output) if output.exists() else {}
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[key], tensors[key]) for key in tensors)


def test_one_file_that_version_1_left_is_named_alone(bundle, lora):
    (bundle / "blora_cut.py").touch()
    (bundle / "blora_my_own.py").touch()
    assert run(bundle / "blora_slicer.py", "--loras", lora).stderr == (
        "note: version 1 left files beside blora_slicer.py that nothing uses any more: "
        "blora_cut.py: delete them\n"
    )


# ---- Packages ------------------------------------------------------------------------------------


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
