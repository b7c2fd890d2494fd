"""The sd-scripts checkout and its Python that tests run on, where the environment names them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from kohya_folder import ROOT, SCRIPT

KOHYA_ROOT, KOHYA_PYTHON = os.environ.get("KOHYA_ROOT"), os.environ.get("KOHYA_PYTHON")
if not (KOHYA_ROOT and KOHYA_PYTHON):
    pytest.skip(
        "NOT RUN on a real sd-scripts: bash tests/real.sh <sd-scripts>", allow_module_level=True
    )
# Commands run in other folders. A venv's python must stay the link that it is.
KOHYA_ROOT, KOHYA_PYTHON = str(Path(KOHYA_ROOT).absolute()), str(Path(KOHYA_PYTHON).absolute())
SUPPORT = ROOT / "tests/support"


def has_option(name: str) -> bool:
    """Whether this release has an option, by its code."""
    sources = [*Path(KOHYA_ROOT).glob("*.py"), *Path(KOHYA_ROOT, "library").glob("*.py")]
    return any(f'"--{name}"' in source.read_text("utf-8") for source in sources)


BEFORE_0_10 = not has_option("validation_split")


def kohya_python(
    *command: str | Path, cwd: str | Path, path: str | Path = KOHYA_ROOT, question: Any = None
) -> str:
    """What kohya's Python prints in a folder; it finds sd-scripts' library in `path`."""
    found = os.pathsep.join([str(path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [KOHYA_PYTHON, *command],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": found, "PYTHONDONTWRITEBYTECODE": "1"},
        input=json.dumps(question),
        stdout=subprocess.PIPE,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def options_of(line: list[str]) -> list[str]:
    """Of a command line that starts a training, what sd-scripts gets."""
    return line[next(i for i, word in enumerate(line) if word.endswith(SCRIPT)) + 1 :]


def make_copy(path: Path, root: str = KOHYA_ROOT) -> None:
    """The tracked files of a checkout, as far as they are there."""
    listed = subprocess.check_output(["git", "-C", root, "ls-files", "-z"], text=True)
    for name in listed.split("\0")[:-1]:
        if (source := Path(root, name)).is_file():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, path / name)


def random_sdxl(tmp: Path, *options: str) -> Path:
    """The folder of make_random_sdxl.py, filled where it is not yet: with tokenizers at least."""
    folder = Path(os.environ.get("BLORA_RANDOM_SDXL") or tmp).absolute()
    if not (folder / ("tokenizers" if options else "random_sdxl.safetensors")).exists():
        kohya_python(SUPPORT / "make_random_sdxl.py", KOHYA_ROOT, folder, *options, cwd=tmp)
    return folder
