"""What the harness for .bat files promises: nothing between a .bat and its test is lost."""

from __future__ import annotations

from pathlib import Path

import cmd_runner
import pytest
from cmd_runner import Call, Cmd, Finished, calls, native_path, split_command_line, windows_path

pytestmark = pytest.mark.shell

AWKWARD = "a b & c (1)! ^d"
CALLS_PROGRAM = ["@echo off", "program.exe %*", "exit /b %ERRORLEVEL%"]


def write_bat(path: Path, lines: list[str]) -> Path:
    """A .bat as Windows wants it: each line ended by CRLF."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(f"{line}\r\n" for line in lines).encode("ascii"))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a name that needs quotes, with a program.exe and a .bat that calls it."""
    return write_bat(tmp_path / AWKWARD / "call program.bat", CALLS_PROGRAM).parent


def record(cmd: Cmd, folder: Path, args: str = "", **env: str) -> Call:
    """The one call that 'call program.bat' makes when it is given these arguments."""
    cmd.install_recorder(folder / "program.exe")
    log = folder / "log"
    cmd.run(folder / "call program.bat", args, env={"RECORDER_LOG": windows_path(log), **env})
    [call] = calls(log)
    return call


@pytest.mark.parametrize(
    ("line", "argv"),
    [
        ('"C:\\a b\\x.exe" y', ["C:\\a b\\x.exe", "y"]),
        # The program's name has no escapes: this backslash does not hide the quote.
        ('"C:\\a b\\" y', ["C:\\a b\\", "y"]),
        ("x", ["x"]),
        ("x  a \t b ", ["x", "a", "b"]),
        ('x "" b', ["x", "", "b"]),
        ('x --a="b c"d', ["x", "--a=b cd"]),
        # Backslashes mean something only before a quote.
        ("x a\\\\b\\", ["x", "a\\\\b\\"]),
        (r'x "a\\" b', ["x", "a\\", "b"]),
        (r'x "a\" b"', ["x", 'a" b']),
        (r"x a\\\"b", ["x", r"a\"b"]),
        # A doubled quote within quotes is one quote and does not end them.
        ('x "a""b c" d', ["x", 'a"b c', "d"]),
        (r'x "a\\"" b" c', ["x", 'a\\" b', "c"]),
        ('x """a b"""', ["x", '"a b"']),
        # Never closed: up to the end.
        ('x "a b', ["x", "a b"]),
    ],
)
def test_a_command_line_is_split_as_the_c_runtime_does(line: str, argv: list[str]) -> None:
    assert split_command_line(line) == argv


def test_a_path_survives_the_way_to_windows_and_back(tmp_path: Path) -> None:
    path = tmp_path / AWKWARD / "file.bat"
    assert native_path(windows_path(path)) == path


@pytest.mark.parametrize(
    ("typed", "argument"),
    [
        ('"two words"', "two words"),
        ('"a & b"', "a & b"),
        ('"wow! two!"', "wow! two!"),
        ("(a)", "(a)"),
        ('"(a) b)"', "(a) b)"),
        ('"a^b ^& c"', "a^b ^& c"),
        ('"<a> | b"', "<a> | b"),
        ('--name="x, y; z"', "--name=x, y; z"),
        ('"gr\u00fcn \u65e5\u672c"', "gr\u00fcn \u65e5\u672c"),
        ('""', ""),
    ],
)
def test_an_argument_arrives_exactly(cmd: Cmd, folder: Path, typed: str, argument: str) -> None:
    assert record(cmd, folder, f"first {typed} last").argv[1:] == ["first", argument, "last"]


def test_no_arguments_arrive_as_none(cmd: Cmd, folder: Path) -> None:
    assert record(cmd, folder).argv[1:] == []


def test_the_folder_of_the_bat_is_where_it_runs(cmd: Cmd, folder: Path) -> None:
    assert record(cmd, folder).cwd == folder


def test_it_runs_in_another_folder_on_request(cmd: Cmd, tmp_path: Path) -> None:
    bat = write_bat(tmp_path / "where.bat", ["@cd"])
    elsewhere = tmp_path / AWKWARD
    elsewhere.mkdir()
    assert cmd.run(bat, cwd=elsewhere).output == f"{windows_path(elsewhere)}\n"


def test_the_log_may_have_any_name(cmd: Cmd, tmp_path: Path) -> None:
    bat = write_bat(tmp_path / "one.bat", CALLS_PROGRAM)
    cmd.install_recorder(tmp_path / "program.exe")
    log = tmp_path / f"gr\u00fcn \u65e5\u672c {AWKWARD}"
    cmd.run(bat, env={"RECORDER_LOG": windows_path(log)})
    assert len(calls(log)) == 1


def test_each_call_is_recorded_in_order(cmd: Cmd, tmp_path: Path) -> None:
    bat = write_bat(tmp_path / "three.bat", [f"@program.exe {n}" for n in (1, 2, 3)])
    cmd.install_recorder(tmp_path / "program.exe")
    log = tmp_path / "log"
    assert calls(log) == []
    cmd.run(bat, env={"RECORDER_LOG": windows_path(log)})
    assert [call.argv[1] for call in calls(log)] == ["1", "2", "3"]


@pytest.mark.parametrize("value", ["plain", AWKWARD, "100% me", "gr\u00fcn", 'say "x"', "a=b"])
def test_the_environment_reaches_the_program(cmd: Cmd, folder: Path, value: str) -> None:
    assert record(cmd, folder, blora_name=value).env["BLORA_NAME"] == value


def test_nothing_of_our_own_environment_gets_in(
    cmd: Cmd, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"BLORA_NAME", "RANK", "NAME"}
    for name in names:
        monkeypatch.setenv(name, "ours")
    assert not names & record(cmd, folder).env.keys()


def test_the_bat_can_read_how_cmd_was_started(cmd: Cmd, tmp_path: Path) -> None:
    bat = write_bat(tmp_path / "how.bat", ["@echo %CMDCMDLINE%"])
    assert cmd.run(bat, '"x y"').output.strip() == f'cmd /d /c ""{windows_path(bat)}" "x y""'


@pytest.mark.parametrize("code", [0, 1, 7, 256, 9009])
def test_the_exit_code_is_the_whole_one(cmd: Cmd, folder: Path, code: int) -> None:
    cmd.install_recorder(folder / "program.exe")
    env = {"RECORDER_LOG": windows_path(folder / "log"), "RECORDER_EXIT": str(code)}
    assert cmd.run(folder / "call program.bat", env=env).returncode == code


def test_a_program_that_is_not_there_is_9009(cmd: Cmd, folder: Path) -> None:
    finished = cmd.run(folder / "call program.bat")
    assert finished.returncode == 9009
    assert "program.exe" in finished.output


def test_a_recorder_that_cannot_record_says_so(cmd: Cmd, folder: Path) -> None:
    cmd.install_recorder(folder / "program.exe")
    finished = cmd.run(folder / "call program.bat")
    assert finished.returncode == 125
    assert "RECORDER_LOG" in finished.output


def test_both_outputs_are_captured_apart(cmd: Cmd, tmp_path: Path) -> None:
    bat = write_bat(tmp_path / "talk.bat", ["@echo off", "echo one", ">&2 echo two", "echo three"])
    finished = cmd.run(bat)
    assert (finished.stdout, finished.stderr) == ("one\nthree\n", "two\n")
    assert finished.output == "one\nthree\ntwo\n"


def test_what_is_typed_is_read(cmd: Cmd, tmp_path: Path) -> None:
    bat = write_bat(tmp_path / "ask.bat", ["@set /p ANSWER=", "@echo [%ANSWER%]"])
    assert "[yes]" in cmd.run(bat, stdin=b"yes\r\n").output


def test_a_pause_does_not_wait_for_ever(cmd: Cmd, tmp_path: Path) -> None:
    bat = write_bat(tmp_path / "wait.bat", ["@pause", "@exit /b 3"])
    assert cmd.run(bat).returncode == 3


def test_a_bat_that_never_ends_is_stopped(
    cmd: Cmd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cmd_runner, "TIME_LIMIT", 2)
    bat = write_bat(tmp_path / "endless.bat", ["@echo off", ":again", "goto again"])
    with pytest.raises(TimeoutError, match="after 2 s"):
        cmd.run(bat)


GOOD = Finished(0, "fine")
NOT_THERE = Finished(9009, "Can't recognize 'program.exe' as an internal or external command")


@pytest.mark.parametrize(
    ("attempts", "believed"),
    [
        ([GOOD], GOOD),
        ([None, GOOD], GOOD),
        ([NOT_THERE, GOOD], GOOD),
        ([NOT_THERE, NOT_THERE, NOT_THERE], NOT_THERE),
        ([Finished(9009, "", NOT_THERE.stdout), GOOD], GOOD),
        # A failure of the .bat itself is no reason to run it again.
        ([Finished(1, "no such folder")], Finished(1, "no such folder")),
        ([Finished(7, "")], Finished(7, "")),
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
