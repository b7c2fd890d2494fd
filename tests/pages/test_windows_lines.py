"""What README and docs/ say to type on Windows does there what its twin does in bash."""

from __future__ import annotations

import shlex
import sys

import pytest
from kohya_folder import ROOT, Bash, Bat, make_kohya
from readme_commands import check_setting
from windows_lines import PAGES, Block, blocks, powershell

pytestmark = pytest.mark.shell
BLOCKS = [block for page in PAGES for block in blocks(page)]
# Those that install the bundle are run by test_readme.py.
IN_KOHYA = [block for block in BLOCKS if "<kohya folder>" not in "".join(block.lines)]
LAUNCHING = [block for block in IN_KOHYA if block.lines[-1].startswith("sdxl_")]
# Those that launch are run beside their twins, which Windows does not have.
ALONE = [block for block in IN_KOHYA if block not in LAUNCHING or sys.platform == "win32"]


@pytest.fixture
def bat(cmd) -> Bat:
    return Bat(cmd)


def typed(block: Block) -> str:
    """A .bat with the block's lines, which ends with the first that fails."""
    lines = ["@echo off"]
    for line in block.lines:
        lines += [f"call {line}" if line.startswith("sdxl_") else line, "if errorlevel 1 exit /b 1"]
    return "".join(f"{line}\r\n" for line in lines)


@pytest.mark.parametrize("block", ALONE, ids=str)
def test_a_block_for_cmd_runs_to_its_end_in_a_kohya_folder(bat, tmp_path, block):
    kohya = make_kohya(tmp_path / "kohya")
    (kohya / "presets/lora/user_presets").mkdir(parents=True)  # as a kohya_ss folder has it
    bat.make_venv(kohya / "venv")
    page = kohya / "page.bat"
    page.write_bytes(typed(block).encode())
    done, _ = bat.run(page, [], kohya, tmp_path / "log", {})
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("block", LAUNCHING, ids=str)
def test_a_launcher_gets_in_cmd_what_its_twin_gets_in_bash(bat, tmp_path, block):
    if sys.platform == "win32":
        pytest.skip("the .sh launchers are for Linux")
    launcher, *options = shlex.split(block.lines[-1])
    told = {}
    for shell in (bat, Bash()):
        kohya = make_kohya(tmp_path / f"kohya{shell.suffix}")
        shell.make_venv(kohya / "venv")
        program, env, args = kohya / "page.bat", {}, []
        if shell is bat:
            program.write_bytes(typed(block).encode())
        else:
            program, env, args = kohya / launcher.replace(".bat", ".sh"), block.settings, options
        log = tmp_path / f"log{shell.suffix}"
        done, calls = shell.run(program, args, kohya, log, env)
        assert (done.returncode, done.stderr) == (0, "")
        given = [{name: call.env.get(name) for name in block.settings} for call in calls]
        told[shell.suffix] = done.stdout, [call.argv[1:] for call in calls], given
    assert told[".bat"] == told[".sh"]
    printed, [preflight, *training], given = told[".bat"]
    assert given == [block.settings] * (1 + len(training))
    assert preflight[0] == "blora_preflight.py"
    assert preflight[len(preflight) - len(options) :] == options
    # A preview is drawn in place of the training.
    draws = "BLORA_PREVIEW" in block.settings
    assert (len(training), bool(printed)) == (0 if draws else 1, draws)
    assert all(argv == preflight[1:] for argv in training)


@pytest.mark.parametrize("block", LAUNCHING, ids=str)
def test_a_block_sets_what_launchers_know(block):
    assert list(block.settings) == [line.split('"')[1].split("=")[0] for line in block.lines[:-1]]
    for name, value in block.settings.items():
        check_setting(f"{name}={value}")


@pytest.mark.parametrize("page", PAGES)
def test_powershell_sets_known_settings_and_starts_launchers_that_are_there(page):
    """Read only: PowerShell is not run."""
    settings, launchers = powershell(page)
    for name, value in settings.items():
        check_setting(f"{name}={value}")
    assert all((ROOT / name).is_file() for name in launchers)


def test_the_pages_have_such_lines():
    assert {block.page for block in LAUNCHING} >= {"README.md", "recipes.md"}
    assert powershell("recipes.md")[0] == {"BLORA_RANK": "64"}
