"""What all tests share: the environment they run in, and fixtures of more than one file."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest
from cmd_runner import Cmd, MissingToolsError, cmd_session, find_tools
from imports import missing
from kohya_folder import ROOT, install

# The asserts of this helper tell what they saw, as a test's own do.
pytest.register_assert_rewrite("readme_commands")
if TYPE_CHECKING:
    from browser import Browser
    from slicing import Slicer

# No test has anything on the hub; diffusers and transformers read this when they are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
# The launchers look for python and accelerate as in an active environment: it is this Python's.
PROGRAMS = str(Path(sys.executable).parent)
os.environ["PATH"] = os.pathsep.join([PROGRAMS, os.environ.get("PATH", os.defpath)])
LEFT_OUT = pytest.StashKey[dict[str, set[str]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "leave out the test files that import a package which this Python does not have"
    parser.addoption("--only-importable", action="store_true", help=text)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave a file out, and keep in mind for want of what."""
    if not (config.option.only_importable and collection_path.match("test_*.py")):
        return None
    packages = missing(collection_path)
    if packages:
        config.stash.setdefault(LEFT_OUT, {})[collection_path.name] = packages
    return bool(packages) or None


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    """A test file that does not run is named: none is forgotten silently."""
    left_out = config.stash.get(LEFT_OUT, {})
    return [f"left out {name}: no {', '.join(sorted(p))}" for name, p in left_out.items()]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Where a slice goes."""
    return tmp_path / "slice.safetensors"


def give_up(why: str) -> NoReturn:
    """Skip a test that this machine cannot run; in CI fail it, or nobody would run it."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(why)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A browser without a window; where there is none its tests are skipped, save in CI."""
    from browser import open_browser  # here, as not every Python has selenium

    try:
        with open_browser() as opened:
            yield opened
    except FileNotFoundError as missing:
        give_up(str(missing))


@pytest.fixture(scope="session")
def cmd() -> Iterator[Cmd]:
    """A cmd.exe that runs .bat files; where there is none its tests are skipped, save in CI."""
    try:
        tools = find_tools()
    except MissingToolsError as missing:
        give_up(str(missing))
    with cmd_session(tools) as session:
        yield session


@pytest.fixture
def bundle(tmp_path) -> Path:
    """The bundle beside the tools and an empty docs folder, for the tools to write into."""
    install(tmp_path)
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    (tmp_path / "docs").mkdir()
    return tmp_path


@pytest.fixture
def slicer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Slicer:
    """The slicer, checked after each run for what must always hold."""
    from slicing import Slicer  # here, as this file is also loaded where there is no torch

    return Slicer(tmp_path, capsys)
