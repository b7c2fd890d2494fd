"""Several machines train one LoRA: two launchers of one computer, which meet at 127.0.0.1.

Their lines are those of docs/several_gpus.md. Each has a kohya folder of its own, as each
machine has, with the stand-in for sd-scripts and real accelerate.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from kohya_folder import ROOT, TWO_PROCESSES, make_standin
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="the .sh launchers are for Linux"),
]

PAGE = (ROOT / "docs/several_gpus.md").read_text(encoding="utf-8")
LINES = re.findall(r"^BLORA_ACCELERATE_ARGS=.*--machine_rank=.*$", PAGE, re.MULTILINE)
SHORT = ["--mixed_precision=no", "--max_train_steps=2", "--lr_warmup_steps=0"]
SETTINGS = {"BLORA_NAME": "toy", "BLORA_RANK": "2", "BLORA_CHECKPOINT": "toy.safetensors"}
LORA = "_out/lora/sdxl/toy_1/toy_1.safetensors"
TIME_LIMIT = 300  # seconds; two that wait for nobody take 17


@pytest.fixture(scope="module")
def kohya(tmp_path_factory) -> Path:
    kohya = make_standin(tmp_path_factory.mktemp("kohya") / "kohya", name="toy")
    shutil.copy(kohya / "sdxl_blora_fast.sh", kohya / "my_fast.sh")
    return kohya


@pytest.fixture
def machines(kohya, tmp_path) -> list[Path]:
    """Two kohya folders with the same in them."""
    # By links: the checkpoint is a hole of 7 GB, which a copy would fill.
    names = ("first", "second")
    return [shutil.copytree(kohya, tmp_path / name, copy_function=os.link) for name in names]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@dataclass(frozen=True)
class Machine:
    """A launcher that runs in its folder, and leads a group of all that it starts."""

    process: subprocess.Popen
    log: Path

    def end(self) -> None:
        """Ask accelerate to end its own; then nothing of the group is left."""
        for sent in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(self.process.pid, sent)
                self.process.wait(timeout=20)


def start(folder: Path, accelerate: str, launcher: str = "./my_fast.sh") -> Machine:
    log = folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [launcher, *SHORT],
            cwd=folder,
            env=os.environ | SETTINGS | {"BLORA_ACCELERATE_ARGS": accelerate},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Machine(process, log)


def finish(*machines: Machine) -> list[str]:
    """What each printed; all have ended well, and in time."""
    try:
        codes = [machine.process.wait(timeout=TIME_LIMIT) for machine in machines]
    finally:
        for machine in machines:
            machine.end()
    printed = [machine.log.read_text(encoding="utf-8") for machine in machines]
    assert codes == [0] * len(machines), "\n".join(printed)
    return printed


def at_home(line: str, port: int) -> tuple[str, str]:
    """A line's options for accelerate, for two machines in one computer; and its launcher."""
    setting, launcher = shlex.split(line)
    options = setting.removeprefix("BLORA_ACCELERATE_ARGS=")
    return options.replace("10.0.0.1", "127.0.0.1").replace("29500", str(port)), launcher


def test_two_machines_train_what_two_processes_of_one_machine_train(machines):
    port = free_port()
    one, two = [at_home(line, port) for line in LINES]
    first, second = finish(start(machines[0], *one), start(machines[1], *two))
    assert "processes: 2" in first
    assert first.count("saving checkpoint: ") == 1
    assert "saving checkpoint: " not in second
    assert not (machines[1] / "_out").exists()
    for printed in (first, second):
        assert "warning: " not in printed

    found = load_file(machines[0] / LORA)
    finish(start(machines[1], TWO_PROCESSES))
    expected = load_file(machines[1] / LORA)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
