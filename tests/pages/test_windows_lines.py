"""What README and docs/ say to type on Windows does there what its twin does in bash."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from typing import NamedTuple

import pytest
from kohya_folder import ROOT, Bash, Bat, make_kohya
from readme_commands import PAGES, blocks, blocks_of, check_setting

pytestmark = pytest.mark.shell
FOR_CMD = r'set "|my_\w+\.bat\b|x?copy |mkdir _in\\'


class Block(NamedTuple):
    """A block for cmd, line by line as it is typed."""

    page: str
    lines: list[str]

    @property
    def settings(self) -> dict[str, str]:
        """What its set "NAME=value" lines say; one that is emptied is none."""
        said = re.findall(r'^set "(\w+)=([^"]*)"$', "\n".join(self.lines), re.MULTILINE)
        return {name: value for name, value in dict(said).items() if value}

    def __str__(self) -> str:
        return f"{self.page}: {' & '.join(self.lines)}"


# Every line of them is one for cmd. Those that name the kohya folder are run by test_readme.py.
IN_KOHYA = [
    Block(page, [line.strip() for line in text.splitlines() if line.strip()])
    for page in PAGES
    for _, text in blocks(page)
    if re.fullmatch(rf"(\s*({FOR_CMD}).*\n)+\s*", text) and "<kohya folder>" not in text
]
# A launcher's line with the settings above it.
LAUNCHING = [
    Block(block.page, [*filter(re.compile("set ").match, block.lines[:number]), line])
    for block in IN_KOHYA
    for number, line in enumerate(block.lines)
    if line.startswith("my_")
]
# Those that launch are run beside their twins, which Windows does not have.
ALONE = [b for b in IN_KOHYA if "my_" not in b.lines[-1][:3] or sys.platform == "win32"]


def typed(block: Block) -> bytes:
    """A .bat with the block's lines, which ends with the first that fails."""
    lines = ["@echo off"]
    for line in block.lines:
        lines += [f"call {line}" if line.startswith("my_") else line, "if errorlevel 1 exit /b 1"]
    return "".join(f"{line}\r\n" for line in lines).encode()


@pytest.mark.parametrize("block", ALONE, ids=str)
def test_a_block_for_cmd_runs_to_its_end_in_a_kohya_folder(cmd, tmp_path, block):
    kohya, bat = make_kohya(tmp_path / "kohya"), Bat(cmd)
    (kohya / "presets/lora/user_presets").mkdir(parents=True)  # as a kohya_ss folder has it
    bat.make_venv(kohya / "venv")
    (kohya / "page.bat").write_bytes(typed(block))
    done, _ = bat.run(kohya / "page.bat", [], kohya, tmp_path / "log", {})
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(sys.platform == "win32", reason="the .sh launchers are for Linux")
@pytest.mark.parametrize("block", LAUNCHING, ids=str)
def test_a_launcher_gets_in_cmd_what_its_twin_gets_in_bash(cmd, tmp_path, block):
    launcher, *options = shlex.split(block.lines[-1])
    told = []
    for shell in (Bat(cmd), Bash()):
        kohya = make_kohya(tmp_path / f"kohya{shell.suffix}")
        shell.make_venv(kohya / "venv")
        copy = (kohya / launcher).with_suffix(shell.suffix)
        shutil.copy(kohya / copy.name.replace("my_", "sdxl_blora_"), copy)
        given = copy, options, block.settings
        if shell.suffix == ".bat":
            given = kohya / "page.bat", [], {}
            given[0].write_bytes(typed(block))
        program, args, env = given
        done, calls = shell.run(program, args, kohya, tmp_path / f"log{shell.suffix}", env)
        assert (done.returncode, done.stderr) == (0, "")
        given = [{name: call.env.get(name) for name in block.settings} for call in calls]
        told.append((done.stdout, [call.argv[1:] for call in calls], given))
    assert told[0] == told[1]
    printed, [preflight, *training], given = told[0]
    assert given == [block.settings] * (1 + len(training))
    assert preflight[0] == "blora_preflight.py"
    assert preflight[len(preflight) - len(options) :] == options
    # A preview is drawn in place of the training, and a check is nothing but that.
    stops = bool({"BLORA_PREVIEW", "BLORA_CHECK_ONLY"} & block.settings.keys())
    assert (len(training), bool(printed)) == (0 if stops else 1, stops)
    assert all(argv == preflight[1:] for argv in training)


@pytest.mark.parametrize("block", LAUNCHING, ids=str)
def test_a_block_sets_what_launchers_know(block):
    for line in block.lines[:-1]:
        [setting] = re.findall(r'^set "(\w+=[^"]*)"$', line)
        check_setting(setting)


@pytest.mark.parametrize("page", PAGES)
def test_powershell_sets_known_settings_and_starts_launchers_that_are_there(page):
    """Read only: PowerShell is not run."""
    settings = re.findall(r'\$env:(\w+) *= *"([^"]*)"', PAGES[page])
    # Whatever else begins so is no PowerShell that anybody could type.
    assert PAGES[page].count("$env:") == len(settings)
    for name, value in settings:
        check_setting(f"{name}={value}")
    assert page != "recipes" or settings == [("BLORA_RANK", "64")]
    started = re.findall(r"\.\\(\w+\.bat)", PAGES[page])
    assert all((ROOT / name.replace("my_", "sdxl_blora_")).is_file() for name in started)


@pytest.mark.parametrize("page", ["README", "upkeep"])
def test_powershell_is_told_what_cmd_is_told(page):
    [powershell] = [text for text in blocks_of(page, "powershell") if "$env:" in text]
    said = re.sub(r'^\$env:(\w+) = "(.*)"$', r'set "\1=\2"', powershell, flags=re.MULTILINE)
    assert said.replace(".\\my_", "my_").splitlines() in [block.lines for block in IN_KOHYA]


def test_the_pages_have_blocks_that_launch():
    assert {block.page for block in LAUNCHING} >= {"README", "recipes", "upkeep"}


def test_the_readme_checks_previews_tests_and_trains_in_either_shell():
    of_cmd = [
        (block.settings, block.lines[-1].split()[1:])
        for block in LAUNCHING
        if block.page == "README"
    ]
    [bash] = [text for text in blocks_of("README", "") if text.startswith("BLORA_CHECK_ONLY")]
    of_bash = []
    for line in bash.splitlines():
        settings, _, options = line.rpartition("./my_fast.sh")
        given = dict(setting.split("=") for setting in settings.split())
        of_bash.append((given, options.split()))
    assert of_cmd == of_bash
    assert of_bash == [
        ({"BLORA_CHECK_ONLY": "1"}, []),
        ({"BLORA_PREVIEW": "sheet.html"}, []),
        ({}, ["--max_train_steps=10"]),
        ({}, []),
    ]
