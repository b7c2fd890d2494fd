"""The programs are made of files beside them, and load no more than they need."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from kohya_folder import ROOT
from lora_files import CONTENT, blora_modules, write
from safetensors import deserialize

import blora

ROOMS = [path.relative_to(ROOT) for path in sorted((ROOT / "blora").rglob("[!_]*.py"))]
HALLS = {
    "blora_slicer.py": {"blora", "blora/slicer"},
    "blora_preflight.py": {"blora", "blora/preflight"},
    "blora_compare.py": {"blora", "blora/slicer", "blora/drawing"},
    "blora_blocks.py": {"blora", "blora/slicer", "blora/drawing"},
}
# What a program loads only where it is asked for it.
LATE = {
    "blora_slicer.py": {"sheet", "launch", "preset", "inspection", "strength"},
    "blora_compare.py": {
        "launch",
        "preset",
        "inspection",
        "strength",
        "injection",
        "measures",
        "network",
        "slices",
        "survey",
    },
    "blora_blocks.py": {
        "launch",
        "blocks",
        "cut",
        "inspection",
        "lbw",
        "metadata",
        "output",
        "strength",
        "comparison",
        "injection",
        "measures",
        "network",
        "slices",
    },
    "blora_preflight.py": {
        "blocks",
        "launch",
        "captions",
        "dataset",
        "folders",
        "images",
        "opening",
        "preset",
        "preview",
    },
}
STRENGTH = ["--alphas", "0.5"]
NO_TEXT = "cannot import name 'BloraError' from 'blora.text' ({}/blora/text.py)"
MISFITS = (
    ("blora", "", "No module named 'blora'"),
    ("blora/__init__.py", 'VERSION = "9.9.9"\n', "it is version 9.9.9"),
    ("blora/__init__.py", "# 1.5.0 had none\n", "it is version unknown"),
    ("blora/text.py", "# nothing of what the others ask for\n", NO_TEXT),
)
# What numpy raises where its binary does not fit the Python: a page of advice, and no name.
BROKEN = 'raise ImportError("\\n\\nIMPORTANT: PLEASE READ THIS\\n" + "We have reasons. " * 99)\n'
LEFT = (  # every file that 1.5.0 had beside the programs
    "advice checkpoint cut dataset inspect look lora memory names options pictures plan preview "
    "read refusals rehearsal report safetensors sdxl strength words"
).split()


def run(*command: object, **more: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **more)


def refused(*command: object, **more: object) -> str:
    """What a program says that ends with exit code 1 and prints nothing else."""
    done = run(*command, **more)
    assert (done.returncode, done.stdout) == (1, "")
    return done.stderr


def unusable(program: str, why: str) -> str:
    """What a program says of a blora folder that it cannot use."""
    start = f"error: {program} {blora.VERSION} cannot use the blora folder beside it "
    return f"{start}({why}): copy the whole bundle again\n"


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return write(tmp_path / "lora.safetensors", blora_modules(CONTENT))


@pytest.mark.parametrize("program", HALLS)
def test_a_blora_folder_that_does_not_fit_is_to_be_copied(bundle, program):
    missing = [
        (room, "", f"No module named '{'.'.join(room.with_suffix('').parts)}'")
        for room in ROOMS
        if room.parent.as_posix() in HALLS[program] and room.stem not in LATE[program]
    ]
    assert len(missing) > 8
    for path, text, why in (*missing, *MISFITS):
        (bundle / path).rename(bundle / "taken away")
        if text:
            (bundle / path).write_text(text)
        assert refused(bundle / program, "--help") == unusable(program, why.format(bundle))
        (bundle / "taken away").replace(bundle / path)


def test_what_only_some_cuts_need_is_missed_by_those_alone(bundle, lora):
    for room, options in (
        ("strength", STRENGTH),
        ("strength", ["--save_precision", "float"]),
        ("inspection", ["--inspect"]),
    ):
        (bundle / f"blora/slicer/{room}.py").unlink(missing_ok=True)
        said = refused(bundle / "blora_slicer.py", "--loras", lora, *options)
        assert said == unusable("blora_slicer.py", f"No module named 'blora.slicer.{room}'")
    assert run(bundle / "blora_slicer.py", "--loras", lora).returncode == 0


def test_a_cut_at_1_needs_no_package_at_all_and_a_large_one_without_tqdm_has_no_bar(bundle, lora):
    reader, output = bundle / "blora/tensorfile.py", bundle / "model.safetensors"
    text = reader.read_text("utf-8")
    for version in (text, re.sub("(?m)^SHOW_PROGRESS = .*$", "SHOW_PROGRESS = 0", text)):
        reader.write_text(version, "utf-8")
        done = run("-S", bundle / "blora_slicer.py", "--loras", lora)
        assert (done.returncode, done.stderr) == (0, "")
        output.unlink()


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


def test_a_look_needs_numpy_and_nothing_else(bundle, lora):
    (bundle / "packages").mkdir()
    for folder in Path(numpy.__file__).parents[1].glob("numpy*"):
        (bundle / "packages" / folder.name).symlink_to(folder)
    env = {**os.environ, "PYTHONPATH": str(bundle / "packages")}
    assert "No module named 'tqdm'" in run("-S", "-c", "import tqdm", env=env).stderr
    for options in (["--inspect"], ["--inspect", *STRENGTH]):
        command = ["-S", bundle / "blora_slicer.py", "--loras", lora, *options]
        done = run(*command, env=env)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == run(*command[1:]).stdout  # where there is everything


def test_a_strength_without_numpy_is_told_in_one_sentence(bundle, lora):
    assert refused("-S", bundle / "blora_slicer.py", "--loras", lora, *STRENGTH) == (
        f"error: no numpy in this Python ({sys.executable}): activate kohya's venv\n"
    )


def test_a_broken_numpy_is_named_in_one_short_sentence(bundle, lora):
    (bundle / "packages").mkdir()
    (bundle / "packages/numpy.py").write_text(BROKEN)
    env = {**os.environ, "PYTHONPATH": str(bundle / "packages")}
    start = f"error: a package of this Python ({sys.executable}) cannot be imported: reinstall it "
    for options in (STRENGTH, ["--inspect"]):
        said = refused(bundle / "blora_slicer.py", "--loras", lora, *options, env=env)
        assert said.startswith(f"{start}(IMPORTANT: PLEASE READ THIS We have reasons")
        assert said.count("\n") == 1
        assert len(said) < len(start) + 220


@pytest.mark.parametrize(
    ("options", "left"), [([], LEFT), (STRENGTH, LEFT), (["--inspect"], LEFT), ([], ["cut"])]
)
def test_files_that_version_1_left_are_named_and_break_nothing(bundle, lora, options, left):
    def cut() -> tuple[str, str, list[object]]:
        done = run(bundle / "blora_slicer.py", "--loras", lora, *options)
        written = [*bundle.glob("model.safetensors")]
        tensors = [dict(deserialize(path.read_bytes())) for path in written]
        for path in written:
            path.unlink()
        return done.stderr, done.stdout, tensors

    said, *wanted = cut()
    assert said == ""
    files = [f"blora_{name}.py" for name in left]
    for name in [*files, "blora_my_own.py"]:
        (bundle / name).write_text("raise SystemExit('an old file was imported')\n")
    assert cut() == (
        "note: version 1 left files beside blora_slicer.py that nothing uses any more: "
        f"{', '.join(files)}: delete them\n",
        *wanted,
    )
