"""The programs are made of files beside them, and load no more than they need."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kohya_folder import ROOT
from lora_files import CONTENT, blora_modules, write

ROOMS = {
    "blora_slicer.py": [
        "blora_words", "blora_sdxl", "blora_safetensors", "blora_names", "blora_lora", "blora_read",
        "blora_cut",
    ],
    "blora_preflight.py": [
        "blora_words", "blora_sdxl", "blora_safetensors", "blora_options", "blora_report",
        "blora_checkpoint", "blora_look", "blora_rehearsal", "blora_refusals", "blora_memory",
        "blora_plan", "blora_advice",
    ],
}  # fmt: skip
NOT_THERE = "is missing, or of another version"
COPY_ALL = "copy all files of the bundle that have blora in their names into this folder\n"


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, check=False
    )


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return write(tmp_path / "lora.safetensors", blora_modules(CONTENT))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """The root's Python files and the traits, in a folder of their own."""
    folder = tmp_path / "kohya"
    folder.mkdir()
    for file in (*ROOT.glob("blora_*.py"), ROOT / "blora_traits.json"):
        shutil.copy(file, folder)
    return folder


@pytest.mark.parametrize(
    ("program", "room"), [(program, room) for program, rooms in ROOMS.items() for room in rooms]
)
def test_a_program_without_one_of_its_files_says_what_to_copy(bundle, program, room):
    (bundle / f"{room}.py").unlink()
    done = run(bundle / program, "--help")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {room}.py beside {program} {NOT_THERE}: {COPY_ALL}"


def test_a_file_of_another_version_is_named_too(bundle):
    (bundle / "blora_words.py").write_text("# nothing of what the others ask for\n")
    for program in ROOMS:
        done = run(bundle / program, "--help")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == f"error: blora_words.py beside {program} {NOT_THERE}: {COPY_ALL}"


@pytest.mark.parametrize(
    ("room", "options"),
    [
        ("blora_strength", ["--alphas", "0.5"]),
        ("blora_strength", ["--save_precision", "float"]),
        ("blora_inspect", ["--inspect"]),
    ],
)
def test_what_only_some_cuts_need_is_missed_by_those_alone(bundle, lora, room, options):
    (bundle / f"{room}.py").unlink()
    assert run(bundle / "blora_slicer.py", "--loras", lora).returncode == 0
    done = run(bundle / "blora_slicer.py", "--loras", lora, *options)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {room}.py beside blora_slicer.py {NOT_THERE}: {COPY_ALL}"


def test_a_cut_at_1_needs_no_package_at_all(bundle, lora):
    done = run("-S", bundle / "blora_slicer.py", "--loras", lora)
    assert (done.returncode, done.stderr) == (0, "")
    assert (bundle / "model.safetensors").is_file()


def test_a_large_cut_without_tqdm_is_written_without_a_bar(bundle, lora):
    reader = bundle / "blora_safetensors.py"
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
