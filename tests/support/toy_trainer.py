"""Trainings with the stand-in, each in a process of its own that has torch and LyCORIS already.

What a launcher starts imports them anew, which takes longer than a toy's three steps.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path

# Imported once, in the process that each training is forked from.
IMPORTED = ["torch", "accelerate", "diffusers", "lycoris.kohya", "prodigyopt", "PIL.Image", "tqdm"]


def run_script(
    script: str, argv: list[str], folder: str, log: str, environ: dict[str, str]
) -> None:
    """Run a script as Python does, in a folder, with all that it prints in a file."""
    multiprocessing.set_start_method("fork", force=True)  # for the workers that read pictures
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.chdir(folder)
    os.environ.update(environ)
    sys.argv = [script, *argv]
    sys.path[:0] = [str(Path(script).parent), folder]
    runpy.run_path(script, run_name="__main__")


def train(script: Path, argv: list[str], folder: Path, environ: Mapping[str, str]) -> str:
    """Train in a folder; what it printed. A training that fails is a failed test."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    log = folder / "printed"
    target = (str(script), argv, str(folder), str(log), dict(environ))
    process = context.Process(target=run_script, args=target)
    process.start()
    process.join()
    printed = log.read_text()
    assert process.exitcode == 0, printed
    return printed
