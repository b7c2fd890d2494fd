"""How the files import one another, and what runs where a package is missing."""

from __future__ import annotations

import importlib
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from imports import imported, imported_modules, missing
from kohya_folder import ROOT

TESTS = ROOT / "tests"
# The files of the bundle by their modules' names, and what each imports.
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in [*ROOT.glob("*.py"), *(ROOT / "blora").rglob("*.py")]
}
BUNDLE = {name: imported_modules(path) for name, path in FILES.items()}
GROUND_FLOOR = {"blora", "blora.text", "blora.sdxl", "blora.tensorfile", "blora.sheet"}


def importing(modules: set[str]) -> dict[str, set[str]]:
    """The files of the bundle that import some of these modules, with those."""
    found = {name: imports & modules for name, imports in BUNDLE.items()}
    return {name: imports for name, imports in found.items() if imports}


def hall(name: str) -> set[str]:
    return {module for module in BUNDLE if module.startswith(f"blora.{name}.")}


def test_no_two_files_of_the_bundle_import_each_other():
    among_themselves = {name: imports & BUNDLE.keys() for name, imports in BUNDLE.items()}
    TopologicalSorter(among_themselves).prepare()  # a CycleError says who imports whom


def test_no_script_of_the_bundle_is_imported_by_another_file_of_it():
    scripts = {name for name, path in FILES.items() if "\ndef main(" in path.read_text("utf-8")}
    assert {"blora_preflight", "blora_slicer"} <= scripts
    assert importing(scripts) == {}


@pytest.mark.parametrize(
    ("name", "script"), [("slicer", "blora_slicer"), ("preflight", "blora_preflight")]
)
def test_a_hall_is_known_to_its_own_program_alone(name, script):
    assert hall(name)
    assert importing(hall(name)).keys() <= hall(name) | {script}


def test_the_ground_floor_stands_on_nothing_of_the_halls():
    for name in GROUND_FLOOR:
        assert {m for m in BUNDLE[name] if m.startswith("blora")} <= GROUND_FLOOR


def test_no_file_imports_a_test_file():
    tests = {path.stem for path in TESTS.rglob("test_*.py")}
    found = {path.name: imported(path) & tests for path in TESTS.rglob("*.py")}
    assert {name: imports for name, imports in found.items() if imports} == {}


@pytest.mark.parametrize(
    ("source", "packages"),
    [
        ("import no_such_package.of_any_kind", {"no_such_package"}),
        ("from no_such_package.of_any_kind import it", {"no_such_package"}),
        ("def late():\n    import no_such_package", {"no_such_package"}),
        ("import json, numpy\nfrom os import path", set()),
        ("import helper", {"no_such_package"}),
        ("from middle import it", {"no_such_package"}),
    ],
)
def test_what_a_file_needs_is_read_from_its_source(tmp_path, monkeypatch, source, packages):
    monkeypatch.setattr("imports.FOLDERS", [tmp_path])
    (tmp_path / "helper.py").write_text("import middle, no_such_package")
    (tmp_path / "middle.py").write_text("import helper")
    file = tmp_path / "test_it.py"
    file.write_text(source)
    assert missing(file) == packages


def test_a_bare_folder_is_no_package(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "no_such_package").mkdir()
    file = tmp_path / "test_it.py"
    file.write_text("import no_such_package")
    assert missing(file) == {"no_such_package"}
    (tmp_path / "no_such_package/__init__.py").touch()
    importlib.invalidate_caches()
    assert missing(file) == set()


def run_without_torch(folder: Path, *options: str) -> tuple[int, str]:
    """Run a test file with numpy alone and one with torch, where torch is not installed."""
    for package in ("numpy", "torch"):
        file = folder / f"test_with_{package}.py"
        file.write_text(f"import {package}\n\ndef test_it():\n    pass\n")
    code = "import sys, pytest; sys.modules['torch'] = None; sys.exit(pytest.main(sys.argv[1:]))"
    ours = ["-c", TESTS / "pytest.ini", "-p", "conftest", "-p", "no:cacheprovider", "-v"]
    command = [sys.executable, "-c", code, *ours, *options, folder]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


def test_a_test_file_runs_where_its_packages_are_and_is_named_where_they_are_not(tmp_path):
    code, printed = run_without_torch(tmp_path, "--only-importable")
    assert code == 0
    assert "test_with_numpy.py::test_it PASSED" in printed
    assert "left out test_with_torch.py: no torch\n" in printed


def test_unless_asked_for_no_test_file_is_left_out(tmp_path):
    code, printed = run_without_torch(tmp_path)
    assert code == pytest.ExitCode.INTERRUPTED
    assert "ERROR collecting" in printed
    assert "left out" not in printed
