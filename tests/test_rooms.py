"""The programs are made of files beside them, and load no more than they need."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kohya_folder import ROOT
from lora_files import CONTENT, blora_modules, write
from safetensors import deserialize

import blora

ROOMS = [path.relative_to(ROOT) for path in sorted((ROOT / "blora").rglob("[!_]*.py"))]
HALLS = {"blora_slicer.py": "blora/slicer", "blora_preflight.py": "blora/preflight"}
# What a program loads only where it is asked for it.
LATE = {
    "blora_slicer.py": {"sheet", "launch", "inspection", "strength"},
    "blora_preflight.py": {"launch", "captions", "dataset", "folders", "images", "preview"},
}
STRENGTH = ["--alphas", "0.5"]
NO_TEXT = "cannot import name 'BloraError' from 'blora.text' ({}/blora/text.py)"
# What numpy raises where its binary does not fit the Python: a page of advice, and no name.
BROKEN = 'raise ImportError("\\n\\nIMPORTANT: PLEASE READ THIS\\n" + "We have reasons. " * 99)\n'
FLAT = [  # every file that 1.5.0 had beside the programs
    f"blora_{name}.py"
    for name in (
        "advice checkpoint cut dataset inspect look lora memory names options pictures plan "
        "preview read refusals rehearsal report safetensors sdxl strength words"
    ).split()
]


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
    return (
        f"error: {program} {blora.VERSION} cannot use the blora folder beside it ({why}): copy the "
        "whole bundle again\n"
    )


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return write(tmp_path / "lora.safetensors", blora_modules(CONTENT))


@pytest.mark.parametrize(
    ("program", "path", "text", "why"),
    [
        *(
            (program, room, None, f"No module named '{'.'.join(room.with_suffix('').parts)}'")
            for program, hall in HALLS.items()
            for room in ROOMS
            if room.parent.as_posix() in ("blora", hall) and room.stem not in LATE[program]
        ),
        *(
            (program, *misfit)
            for program in HALLS
            for misfit in (
                ("blora", None, "No module named 'blora'"),
                ("blora/__init__.py", 'VERSION = "2.2.0"\n', "it is version 2.2.0"),
                ("blora/__init__.py", "", "it is version unknown"),
                ("blora/text.py", "# nothing of what the others ask for\n", NO_TEXT),
            )
        ),
    ],
    ids=str,
)
def test_a_blora_folder_that_does_not_fit_is_to_be_copied(bundle, program, path, text, why):
    if text is not None:
        (bundle / path).write_text(text)
    else:
        (shutil.rmtree if path == "blora" else os.remove)(bundle / path)
    assert refused(bundle / program, "--help") == unusable(program, why.format(bundle))


@pytest.mark.parametrize(
    ("room", "options"),
    [
        ("strength", STRENGTH),
        ("strength", ["--save_precision", "float"]),
        ("inspection", ["--inspect"]),
    ],
)
def test_what_only_some_cuts_need_is_missed_by_those_alone(bundle, lora, room, options):
    (bundle / f"blora/slicer/{room}.py").unlink()
    assert run(bundle / "blora_slicer.py", "--loras", lora).returncode == 0
    said = refused(bundle / "blora_slicer.py", "--loras", lora, *options)
    assert said == unusable("blora_slicer.py", f"No module named 'blora.slicer.{room}'")


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


def test_a_strength_without_numpy_is_told_in_one_sentence(bundle, lora):
    assert refused("-S", bundle / "blora_slicer.py", "--loras", lora, *STRENGTH) == (
        f"error: no numpy in this Python ({sys.executable}): activate kohya's venv\n"
    )


@pytest.mark.parametrize("options", [STRENGTH, ["--inspect"]], ids=" ".join)
def test_a_broken_numpy_is_named_in_one_short_sentence(bundle, lora, options):
    (bundle / "packages").mkdir()
    (bundle / "packages/numpy.py").write_text(BROKEN)
    env = {**os.environ, "PYTHONPATH": str(bundle / "packages")}
    said = refused(bundle / "blora_slicer.py", "--loras", lora, *options, env=env)
    start = f"error: a package of this Python ({sys.executable}) cannot be imported: reinstall it "
    assert said.startswith(f"{start}(IMPORTANT: PLEASE READ THIS We have reasons")
    assert said.count("\n") == 1
    assert len(said) < len(start) + 220


@pytest.mark.parametrize(
    ("options", "left"),
    [([], FLAT), (STRENGTH, FLAT), (["--inspect"], FLAT), ([], ["blora_cut.py"])],
)
def test_files_that_version_1_left_are_named_and_break_nothing(bundle, lora, options, left):
    def cut() -> tuple[str, str, list[object]]:
        done = run(bundle / "blora_slicer.py", "--loras", lora, *options)
        written = [path.read_bytes() for path in bundle.glob("model.safetensors")]
        return done.stderr, done.stdout, [dict(deserialize(file)) for file in written]

    said, *wanted = cut()
    assert said == ""
    for name in [*left, "blora_my_own.py"]:
        (bundle / name).write_text("raise SystemExit('an old file was imported')\n")
    assert cut() == (
        "note: version 1 left files beside blora_slicer.py that nothing uses any more: "
        f"{', '.join(left)}: delete them\n",
        *wanted,
    )
