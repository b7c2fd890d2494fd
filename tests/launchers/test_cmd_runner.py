"""What the harness for .bat files promises: nothing between a .bat and its test is lost."""

from __future__ import annotations

from pathlib import Path

import cmd_runner
import pytest
from cmd_runner import Call, Cmd, Finished, calls, windows_path

pytestmark = pytest.mark.shell

AWKWARD = "a b & c (1)! ^d gr\u00fcn \u65e5\u672c"


def write_bat(path: Path, *lines: str) -> Path:
    """A .bat as Windows wants it: each line ended by CRLF."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(f"{line}\r\n" for line in lines).encode("ascii"))
    return path


@pytest.fixture
def bat(cmd: Cmd, tmp_path: Path) -> Path:
    """In a folder with a name that needs quotes, a .bat that calls a recorder beside it."""
    lines = ["@echo off", "program.exe %*", "exit /b %ERRORLEVEL%"]
    bat = write_bat(tmp_path / AWKWARD / "call program.bat", *lines)
    cmd.install_recorder(bat.with_name("program.exe"))
    return bat


def record(cmd: Cmd, bat: Path, args: str = "", **env: str) -> Call:
    """The one call that the .bat makes when it is given these arguments."""
    log = bat.with_name(f"log {AWKWARD}")
    assert calls(log) == []
    cmd.run(bat, args, env={"RECORDER_LOG": windows_path(log), **env})
    [call] = calls(log)
    return call


@pytest.mark.parametrize(
    ("typed", "arguments"),
    [
        ("", []),
        ('"two words" "a & b" "wow! two!"', ["two words", "a & b", "wow! two!"]),
        ('(a) "(a) b)" "a^b ^& c" "<a> | b"', ["(a)", "(a) b)", "a^b ^& c", "<a> | b"]),
        (
            '--name="x, y; z" "gr\u00fcn \u65e5\u672c" "" b',
            ["--name=x, y; z", "gr\u00fcn \u65e5\u672c", "", "b"],
        ),
        (r'"a\\" a\\b\ "a\" b" a\\\"b', ["a\\", "a\\\\b\\", 'a" b', 'a\\"b']),
    ],
)
def test_arguments_arrive_exactly(cmd: Cmd, bat: Path, typed: str, arguments: list[str]) -> None:
    call = record(cmd, bat, typed)
    assert call.argv[1:] == arguments
    assert call.cwd == bat.parent


@pytest.mark.parametrize("value", ["plain", AWKWARD, "100% me", 'say "x"', "a=b"])
def test_the_environment_reaches_the_program_and_nothing_of_ours(
    cmd: Cmd, bat: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("RANK", "ours")
    env = record(cmd, bat, blora_name=value).env
    assert (env["BLORA_NAME"], env.get("RANK")) == (value, None)


@pytest.mark.parametrize("code", [0, 7, 256, 9009])
def test_the_exit_code_is_the_whole_one(cmd: Cmd, bat: Path, code: int) -> None:
    env = {"RECORDER_LOG": windows_path(bat.with_name("log")), "RECORDER_EXIT": str(code)}
    assert cmd.run(bat, env=env).returncode == code


def test_a_recorder_that_cannot_record_and_a_program_that_is_not_there_say_so(
    cmd: Cmd, bat: Path
) -> None:
    finished = cmd.run(bat)
    assert (finished.returncode, "RECORDER_LOG" in finished.stderr) == (125, True)
    bat.with_name("program.exe").unlink()
    finished = cmd.run(bat)
    assert (finished.returncode, "program.exe" in finished.output) == (9009, True)


def test_a_bat_runs_where_it_is_told_reads_what_is_typed_and_prints_apart(
    cmd: Cmd, tmp_path: Path
) -> None:
    lines = ["@set /p ANSWER=", "@echo [%ANSWER%]", ">&2 @cd", "@echo %CMDCMDLINE%", "@pause"]
    bat = write_bat(tmp_path / "ask.bat", *lines, "@exit /b 3")
    elsewhere = tmp_path / AWKWARD
    elsewhere.mkdir()
    finished = cmd.run(bat, '"x y"', elsewhere, stdin=b"yes\r\n")
    assert "[yes]" in finished.stdout
    assert f'cmd /d /c ""{windows_path(bat)}" "x y""' in finished.stdout
    assert windows_path(tmp_path / AWKWARD[:14]) in finished.stderr
    assert finished.returncode == 3
    assert finished.output == finished.stdout + finished.stderr


def test_a_bat_that_never_ends_is_stopped(
    cmd: Cmd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cmd_runner, "TIME_LIMIT", 2)
    bat = write_bat(tmp_path / "endless.bat", "@echo off", ":again", "goto again")
    with pytest.raises(TimeoutError, match="after 2 s"):
        cmd.run(bat)


GOOD = Finished(0, "fine")
NOT_THERE = Finished(9009, "Can't recognize 'program.exe' as an internal or external command")
# A failure of the .bat itself is no reason to run it again.
FAILED = Finished(1, "no such folder")


@pytest.mark.parametrize(
    ("attempts", "believed"),
    [
        ([GOOD], GOOD),
        ([None, GOOD], GOOD),
        ([NOT_THERE, GOOD], GOOD),
        ([NOT_THERE, NOT_THERE, NOT_THERE], NOT_THERE),
        ([Finished(9009, "", NOT_THERE.stdout), GOOD], GOOD),
        ([FAILED], FAILED),
    ],
)
def test_only_what_looks_like_a_failed_start_is_tried_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    attempts: list[Finished | None],
    believed: Finished,
) -> None:
    log, upcoming = tmp_path / "log", iter(attempts)
    log.mkdir()

    def launch(self: Cmd, stdin: bytes) -> Finished | None:
        (log / f"000{len(list(log.iterdir()))}").touch()
        return next(upcoming)

    monkeypatch.setattr(Cmd, "_launch", launch)
    env = {"RECORDER_LOG": windows_path(log)}
    assert Cmd(["wine64"], {}, tmp_path).run(tmp_path / "x.bat", env=env) == believed
    assert next(upcoming, "none left") == "none left"
    assert [record.name for record in log.iterdir()] == ["0000"]
