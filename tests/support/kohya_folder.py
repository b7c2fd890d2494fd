"""Throw-away kohya folders, and the two shells that run the launchers in them.

A folder gets our files by the README's own copy command. In place of accelerate and of pre-flight
it can hold a recorder, which notes how it was called and exits with the code asked for.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cmd_runner import Call, Cmd, Finished, calls, native_path, windows_path

ROOT = Path(__file__).resolve().parents[2]
# Not found by name: on Windows that would be the one of System32, which starts WSL.
BASH = shutil.which("bash") or "bash"
CHECKPOINT = "models/sd_xl_base_1.0.safetensors"
SCRIPT = "sdxl_train_network.py"
CHECKPOINT_TABLE = "blora/preflight/sdxl_checkpoint.json"
# What tests/check.sh installs: the Python of python.org for Windows, which runs in Wine.
WINDOWS_PYTHON = ROOT / ".venv/windows-python"
# One record a call, with what tests/support/windows/recorder.c notes too.
RECORDER = """#!/usr/bin/env bash
mkdir -p "$RECORDER_LOG"
record="$RECORDER_LOG/$(ls "$RECORDER_LOG" | wc -l)"
printf '%s\\0' "$PWD" "$#" "$0" "$@" >"$record"
env -0 >>"$record"
program="${0##*/}"
code="RECORDER_EXIT_${program%%[0-9]*}"
exit "${!code:-${RECORDER_EXIT:-0}}"
"""
# The same of pre-flight, in any system.
PREFLIGHT = """\
import os, sys
from pathlib import Path
log = Path(os.environ["RECORDER_LOG"])
log.mkdir(exist_ok=True)
argv, entries = [sys.executable, *sys.argv], [f"{name}={os.environ[name]}" for name in os.environ]
texts = [os.getcwd(), str(len(argv) - 1), *argv, *entries, ""]
(log / "0000").write_bytes("\\0".join(texts).encode())
sys.exit(int(os.environ.get("RECORDER_EXIT_preflight", "0")))
"""


def copy_command() -> str:
    """The command by which the README installs the bundle."""
    [command] = re.findall(r"^cp -r .*blora.*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    return command


def install(kohya: Path) -> None:
    """Copy the bundle into the folder as the README says."""
    command = re.sub(r"<[^>]+>", "$KOHYA", copy_command())
    subprocess.run(
        [BASH, "-c", command], cwd=ROOT, env={**os.environ, "KOHYA": str(kohya)}, check=True
    )


def make_kohya(path: Path, *, gui: bool = False, name: str = "my_project") -> Path:
    """A folder with the bundle, a training script, a checkpoint and a dataset config.

    Pre-flight is a recorder.

    The script lies in the root as in sd-scripts, or with `gui` in sd-scripts/ as in kohya_ss.
    """
    path.mkdir(parents=True)
    install(path)
    files = [
        "sd-scripts/" + SCRIPT if gui else SCRIPT,
        CHECKPOINT,
        f"_in/lora/sdxl/{name}/config.toml",
    ]
    for file in files:
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        (path / file).touch()
    (path / "blora_preflight.py").write_text(PREFLIGHT)
    return path


def make_standin(path: Path, *, name: str, gui: bool = False) -> Path:
    """A folder with the bundle that trains: the stand-in, six drawings, and a checkpoint."""
    scripts = path / "sd-scripts" if gui else path
    scripts.mkdir(parents=True)
    install(path)
    shutil.copytree(ROOT / "tests/standin", scripts, dirs_exist_ok=True)
    for data in ("tests/data/sdxl_train_network_options.json", CHECKPOINT_TABLE):
        shutil.copy(ROOT / data, scripts)
    made = {"make_checkpoint.py": "toy.safetensors", "make_dataset.py": f"_in/lora/sdxl/{name}"}
    for script, argument in made.items():
        subprocess.run([sys.executable, scripts / script, argument], cwd=path, check=True)
    return path


def with_text_encoders(launcher: Path) -> Path:
    """A copy of a launcher without --network_train_unet_only, as the README describes it."""
    copied = launcher.with_name(f"my_{launcher.name}")
    shutil.copy(launcher, copied)
    lines = launcher.read_text().splitlines(keepends=True)
    left = [line for line in lines if "--network_train_unet_only" not in line]
    assert len(left) == len(lines) - 1
    copied.write_text("".join(left))
    return copied


# accelerate's own options for one process and for two on the CPU; port 0 is any free one.
ONE_PROCESS = "--cpu --num_processes=1 --num_machines=1 --mixed_precision=no --dynamo_backend=no"
TWO_PROCESSES = (
    "--multi_gpu --num_processes=2 --num_machines=1 --mixed_precision=no --dynamo_backend=no "
    "--main_process_port=0"
)


@dataclass(frozen=True)
class Bash:
    """Runs the .sh launchers: by themselves, or by a shell that is named before them."""

    shell: tuple[str, ...] = ()
    suffix = ".sh"
    path_separator = ":"
    accelerate = "bin/accelerate"
    python = "bin/python"

    def install_recorder(self, folder: Path, program: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / program).unlink(missing_ok=True)  # of a link the target would be written
        (folder / program).write_text(RECORDER)
        (folder / program).chmod(0o755)

    def make_venv(self, path: Path) -> Path:
        """A real venv with a recorder for accelerate; hands back the folder of its programs."""
        venv.EnvBuilder(symlinks=True).create(path)
        self.install_recorder(path / "bin", "accelerate")
        return path / "bin"

    def path_variable(self, folder: Path) -> dict[str, str]:
        """An environment in which the folder's programs are found, as in an active one."""
        return {"PATH": os.pathsep.join([str(folder), os.defpath])}

    def run(
        self, launcher: Path, args: Sequence[str], cwd: Path, log: Path, env: Mapping[str, str]
    ) -> tuple[Finished, list[Call]]:
        done = subprocess.run(
            [*self.shell, launcher, *args],
            cwd=cwd,
            env={"PATH": os.defpath, "RECORDER_LOG": str(log), **env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        finished = Finished(done.returncode, done.stdout, done.stderr)
        return finished, calls(log)

    def shown(self, path: Path) -> str:
        """The path as this shell and its programs write it."""
        return str(path)

    def program_folder(self, call: Call) -> Path:
        """Where the program lay that was called."""
        return Path(call.argv[0]).parent


@dataclass(frozen=True)
class Bat:
    """Runs the .bat files, with cmd.exe or Wine."""

    cmd: Cmd
    suffix = ".bat"
    path_separator = ";"
    accelerate = "Scripts/accelerate.exe"
    python = "Scripts/python.exe"

    def install_recorder(self, folder: Path, program: str) -> None:
        self.cmd.install_recorder(folder / f"{program}.exe")

    def make_venv(self, path: Path) -> Path:
        """A venv with a recorder for accelerate; hands back the folder of its programs."""
        self.install_python(path / "Scripts")
        self.install_recorder(path / "Scripts", "accelerate")
        return path / "Scripts"

    def install_python(self, folder: Path) -> None:
        """Put a Python for Windows into the folder; its ._pth would hide PYTHONPATH from it."""
        if sys.platform == "win32":
            venv.EnvBuilder().create(folder.parent)
            return
        folder.mkdir(parents=True, exist_ok=True)
        for file in set(WINDOWS_PYTHON.iterdir()) - set(WINDOWS_PYTHON.glob("*._pth")):
            (folder / file.name).symlink_to(file)

    def path_variable(self, folder: Path) -> dict[str, str]:
        return {"PATH": rf"{windows_path(folder)};C:\windows\system32;C:\windows"}

    def run(
        self, launcher: Path, args: Sequence[str], cwd: Path, log: Path, env: Mapping[str, str]
    ) -> tuple[Finished, list[Call]]:
        typed = subprocess.list2cmdline(args)
        done = self.cmd.run(launcher, typed, cwd, {"RECORDER_LOG": windows_path(log), **env})
        return done, calls(log)

    def shown(self, path: Path) -> str:
        """The path as this shell and its programs write it."""
        return windows_path(path)

    def double_click(self, bat: Path, dropped: Sequence[str], log: Path, env=None) -> Finished:
        """Run the .bat as Explorer does, with what is dropped on it, if anything."""
        # Explorer leaves a space after the name, whether or not anything follows.
        typed = " ".join(f'"{path}"' for path in dropped)
        comspec = r"C:\windows\system32\cmd.exe"
        env = {
            **(env or {}),
            "RECORDER_LOG": windows_path(log),
            "COMSPEC": comspec,
            "CMDCMDLINE": f'{comspec} /c ""{windows_path(bat)}" {typed}"',
        }
        return self.cmd.run(bat, typed, bat.parent, env)

    def program_folder(self, call: Call) -> Path:
        """Where the program lay that was called: the first folder of PATH has a recorder."""
        return native_path(call.env["PATH"].split(";")[0])


def remove_files(kohya: Path, *names: str) -> None:
    """Take away what a refusal is to be about."""
    for name in names:
        target = kohya / name
        shutil.rmtree(target) if target.is_dir() else target.unlink()
