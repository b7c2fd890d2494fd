"""Run a .bat file as cmd.exe does, and see exactly how it called other programs.

Real cmd.exe on Windows; elsewhere Wine's. A recorder put in place of accelerate.exe or
python.exe writes down each call:

    with cmd_session(find_tools()) as cmd:
        cmd.install_recorder(folder / "accelerate.exe")
        done = cmd.run(bat, '--name "a & b"', folder, {"RECORDER_LOG": windows_path(log)})
        [call] = calls(log)
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

SOURCES = Path(__file__).with_name("windows")
ON_WINDOWS = sys.platform == "win32"
TIME_LIMIT = 60  # seconds; a .bat that only calls a recorder takes 0.2
SYSTEM_PATH = os.environ.get("SYSTEMROOT", r"C:\windows") + r"\system32"
# Wine's cmd prints in this code page when its output is not a console.
OUTPUT_ENCODING = "oem" if ON_WINDOWS else "cp1252"

# Under Wine about one start in a thousand fails for no reason: that of cmd, with nothing
# printed, or that of a program in the .bat, with these words. A program that really is not
# there gets the same words, each time.
START_FAILURE = re.compile("Internal error|Can't recogni[sz]e")
ATTEMPTS = 3


class MissingToolsError(Exception):
    """This machine cannot run .bat files; the message says what to install."""


@dataclass(frozen=True)
class Tools:
    """The programs the harness needs; on Windows there is no Wine to start or to stop."""

    compiler: str
    wine: str = ""
    wineserver: str = ""


@dataclass(frozen=True)
class Call:
    """One call of the recorder. The names in env are upper case, as Windows ignores case."""

    argv: list[str]
    cwd: Path
    env: dict[str, str]


@dataclass(frozen=True)
class Finished:
    """How a .bat ended: the full 32-bit exit code, and what it printed."""

    returncode: int
    stdout: str
    stderr: str = ""

    @property
    def output(self) -> str:
        """All that was printed, stdout first."""
        return self.stdout + self.stderr


# ---- Paths --------------------------------------------------------------------------------


def windows_path(path: Path) -> str:
    """The name a Windows program knows the path by; Wine's drive Z: is the root of Unix."""
    absolute = str(path.absolute())
    return absolute if ON_WINDOWS else "Z:" + absolute.replace("/", "\\")


def native_path(text: str) -> Path:
    """The way back: the path on this system that a Windows program calls by this name."""
    if ON_WINDOWS:
        return Path(text)
    windows = PureWindowsPath(text)
    if windows.drive.upper() != "Z:" or not windows.root:
        raise ValueError(f"{text!r} is not an absolute path on drive Z:")
    return Path("/", *windows.parts[1:])


# ---- Records ------------------------------------------------------------------------------


def calls(log: Path) -> list[Call]:
    """The calls recorded in the folder so far, first one first; none if it does not exist."""
    return [_read_call(record) for record in sorted(log.glob("*"))]


def _read_call(record: Path) -> Call:
    cwd, count, *texts = record.read_bytes().decode("utf-8").split("\0")[:-1]
    argv, entries = texts[: int(count) + 1], texts[int(count) + 1 :]
    # cmd keeps the folder of each drive in hidden variables, "=C:=C:\\"; partition at the
    # first "=" gives those an empty name.
    pairs = (entry.partition("=") for entry in entries)
    env = {name.upper() if ":" in cwd else name: value for name, _, value in pairs if name}
    return Call(argv, native_path(cwd) if ":" in cwd[:2] else Path(cwd), env)


# ---- Tools --------------------------------------------------------------------------------


def find_tools() -> Tools:
    """What this machine offers, or MissingToolsError with a message that says what to install."""
    if ON_WINDOWS:
        compiler = shutil.which("gcc")
        if compiler is None:
            raise MissingToolsError("tests of .bat files need gcc on PATH: install mingw-w64")
        return Tools(compiler)
    # Debian and Ubuntu keep wine64 and wineserver off PATH, in this folder.
    search = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/lib/wine"])
    names = ["x86_64-w64-mingw32-gcc", "wine64", "wineserver"]
    compiler, wine, wineserver = (shutil.which(name, path=search) for name in names)
    if compiler is None or wine is None or wineserver is None:
        raise MissingToolsError(
            "tests of .bat files need Wine and mingw: apt-get install --no-install-recommends "
            "wine64 gcc-mingw-w64-x86-64-win32"
        )
    return Tools(compiler, wine, wineserver)


def _compile(compiler: str, name: str, folder: Path) -> None:
    source, program = SOURCES / f"{name}.c", folder / f"{name}.exe"
    unicode = ["-municode"] if "wmain" in source.read_text() else []
    command = [compiler, "-std=c11", "-Wall", "-Wextra", *unicode, "-s", "-o", program, source]
    subprocess.run(command, check=True)


# ---- Running ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cmd:
    """A cmd.exe ready to run .bat files; cmd_session makes one."""

    wine: list[str]  # goes before an .exe to start it; empty on Windows
    environ: dict[str, str]  # what launch.exe starts with; nothing of this process is in it
    folder: Path  # the two compiled programs, and the files of the call in progress

    def install_recorder(self, path: Path) -> None:
        """Put a recorder at the path, such as venv/Scripts/accelerate.exe."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # of a link the target would be written
        shutil.copyfile(self.folder / "recorder.exe", path)
        path.chmod(0o755)

    def run(
        self,
        bat: Path,
        args: str = "",
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        stdin: bytes = b"",
    ) -> Finished:
        """Run the .bat in cwd (by default its own folder) and wait for its end.

        args is what a user types after its name, quotes included. env comes on top of a
        small environment; its RECORDER_LOG is the folder that calls() reads. A .bat that
        still runs after TIME_LIMIT is ended, with all it started, and TimeoutError raised.
        """
        # cmd takes the outermost quotes off; what is between them is as typed at its prompt.
        command_line = f'cmd /d /c ""{windows_path(bat)}"{" " if args else ""}{args}"'
        variables = {"PATH": SYSTEM_PATH, **(env or {})}
        if self.wine:
            # Windows' own cmd computes this one, Wine's lacks it.
            variables.setdefault("CMDCMDLINE", command_line)
        entries = [f"{name}={value}" for name, value in variables.items()]
        texts = [command_line, windows_path(cwd or bat.parent), *entries]
        (self.folder / "request").write_bytes("".join(f"{t}\0" for t in texts).encode())
        return self._run_request(stdin, variables.get("RECORDER_LOG"))

    def _run_request(self, stdin: bytes, log: str | None) -> Finished:
        """Launch until it does not look like Wine's failure to start a program.

        One that looks like it each time, such as a program that really is not there, is
        what the .bat does. The calls of an attempt that is not believed are taken back.
        """
        earlier = _records(log)
        finished = None
        for _ in range(ATTEMPTS):
            for record in _records(log) - earlier:
                record.unlink()
            finished = self._launch(stdin)
            if finished is not None and not (self.wine and START_FAILURE.search(finished.output)):
                return finished
        if finished is None:
            raise RuntimeError("launch.exe did not start: " + self._printed())
        return finished

    def _launch(self, stdin: bytes) -> Finished | None:
        """Run launch.exe once on the request; None if it could not start what was asked."""
        request, result = self.folder / "request", self.folder / "result"
        result.unlink(missing_ok=True)
        # Files: a pipe would stay open for as long as anything else holds it.
        streams = [self.folder / name for name in ("stdin", "stdout", "stderr")]
        streams[0].write_bytes(stdin)
        command = [*self.wine, self.folder / "launch.exe", request, result, *streams]
        try:
            _silently(command, self.environ, check=False, timeout=TIME_LIMIT)
        except subprocess.TimeoutExpired:
            message = f"the .bat still ran after {TIME_LIMIT} s, it printed: {self._printed()}"
            raise TimeoutError(message) from None
        if not result.exists():
            return None
        return Finished(int(result.read_text()), *map(_text, streams[1:]))

    def _printed(self) -> str:
        return "".join(_text(self.folder / name) for name in ("stdout", "stderr"))


def _text(file: Path) -> str:
    """What was printed, with line ends as in Python."""
    return file.read_bytes().decode(OUTPUT_ENCODING, errors="replace").replace("\r\n", "\n")


def _records(log: str | None) -> set[Path]:
    return set(native_path(log).glob("*")) if log else set()


# ---- Sessions -----------------------------------------------------------------------------


@contextmanager
def cmd_session(tools: Tools) -> Iterator[Cmd]:
    """A Cmd for many runs: compiles the two programs and, outside Windows, starts Wine."""
    # Not in pytest's tmp_path, which keeps the last three: a Wine prefix is 700 MB.
    folder = Path(tempfile.mkdtemp(prefix="cmd_runner_"))
    try:
        for name in ("recorder", "launch"):
            _compile(tools.compiler, name, folder)
        if ON_WINDOWS:
            yield Cmd([], _windows_environ(), folder)
        else:
            with _wine_environ(tools, folder) as environ:
                yield Cmd([tools.wine], environ, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _windows_environ() -> dict[str, str]:
    """The variables that Windows programs expect of Windows itself."""
    names = ["COMSPEC", "OS", "PATHEXT", "SYSTEMDRIVE", "SYSTEMROOT", "TEMP", "TMP", "WINDIR"]
    return {name: os.environ[name] for name in names if name in os.environ}


@contextmanager
def _wine_environ(tools: Tools, folder: Path) -> Iterator[dict[str, str]]:
    """Make a Wine prefix, with its server running, in the folder; stop the server at the end."""
    (folder / "home").mkdir()
    environ = {
        "HOME": str(folder / "home"),  # Wine links Documents and Desktop to what is there
        "LANG": "C.UTF-8",  # so that paths with any character get through
        "WINEARCH": "win64",
        "WINEDEBUG": "-all",
        # No offer to download Mono and Gecko, no menu entries on the desktop.
        "WINEDLLOVERRIDES": "mscoree,mshtml=;winemenubuilder.exe=d",
        "WINEPREFIX": str(folder / "prefix"),
    }
    (folder / "prefix").mkdir()
    try:
        _silently([tools.wineserver, "-p"], environ)
        # Wine's services keep the stdout and stderr of the first program ever run.
        _silently([tools.wine, "cmd", "/d", "/c", "exit 0"], environ)
        yield environ
    finally:
        _silently([tools.wineserver, "-k"], environ, check=False)


def _silently(command: list[str | Path], environ: dict[str, str], **options: Any) -> None:
    nothing = dict.fromkeys(["stdin", "stdout", "stderr"], subprocess.DEVNULL)
    subprocess.run(command, env=environ, **{"check": True, **nothing, **options})
