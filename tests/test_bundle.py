"""What a user copies: names, files as git delivers them, and how they import one another."""

from __future__ import annotations

import json
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest
from bundle_files import BUNDLE, git, tracked
from imports import imported, imported_modules
from kohya_folder import ROOT, install

TESTS = ROOT / "tests"
# The files of the bundle by their modules' names, and what each imports.
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in [*ROOT.glob("*.py"), *(ROOT / "blora").rglob("*.py")]
}
IMPORTS = {name: imported_modules(path) for name, path in FILES.items()}
GROUND_FLOOR = {"blora"} | {
    f"blora.{room}" for room in ("blocks", "preset", "sdxl", "sheet", "tensorfile", "text")
}


def test_the_readmes_copy_command_installs_the_bundle_and_nothing_else(tmp_path):
    install(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == BUNDLE
    assert len(list((tmp_path / "lycoris_presets").glob("*.toml"))) == 7


def test_nothing_that_is_copied_takes_a_name_of_a_kohya_folder():
    hosts = json.loads((ROOT / "tests/data/host_root_names.json").read_text())
    taken = {name.lower() for host in ("sd-scripts", "kohya_ss") for name in hosts[host]}
    assert not taken & {name.lower() for name in BUNDLE}
    assert all("blora" in name or name == "lycoris_presets" for name in BUNDLE)


def test_what_is_run_has_its_run_bit_and_what_is_imported_has_none():
    for line in git("ls-files", "--stage", "*.sh", ".ci/run", "blora_*.py"):
        mode, _, _, name = line.split()
        is_run = not name.endswith(".py") or (ROOT / name).read_text().startswith("#!")
        assert mode == ("100755" if is_run else "100644"), name


def test_git_delivers_bat_files_with_windows_line_ends_and_scripts_with_unix_ones():
    names = tracked("*.bat", "*.sh", "*.py", ".ci/run")
    for line in git("check-attr", "eol", "--", *names):
        name, _, end = line.split(": ")
        assert end == ("crlf" if name.endswith(".bat") else "lf"), name


def importing(modules: set[str]) -> dict[str, set[str]]:
    """The files of the bundle that import some of these modules, with those."""
    found = {name: imports & modules for name, imports in IMPORTS.items()}
    return {name: imports for name, imports in found.items() if imports}


def test_no_two_files_of_the_bundle_import_each_other():
    among_themselves = {name: imports & IMPORTS.keys() for name, imports in IMPORTS.items()}
    TopologicalSorter(among_themselves).prepare()  # a CycleError says who imports whom


def test_no_script_of_the_bundle_is_imported_by_another_file_of_it():
    scripts = {name for name, path in FILES.items() if "\ndef main(" in path.read_text("utf-8")}
    assert {"blora_blocks", "blora_compare", "blora_preflight", "blora_slicer"} <= scripts
    assert importing(scripts) == {}


def test_a_hall_is_known_to_its_own_programs_and_the_slicer_s_to_drawing():
    halls = {
        name: {module for module in IMPORTS if module.startswith(f"blora.{name}.")}
        for name in ("slicer", "preflight", "drawing")
    }
    assert all(halls.values())
    on_it = {
        "slicer": halls["drawing"] | {"blora_slicer", "blora_compare"},
        "preflight": {"blora_preflight"},
        "drawing": {"blora_blocks", "blora_compare"},
    }
    for name, hall in halls.items():
        assert importing(hall).keys() <= hall | on_it[name]


def test_the_ground_floor_stands_on_nothing_of_the_halls():
    for name in GROUND_FLOOR:
        assert {m for m in IMPORTS[name] if m.startswith("blora")} <= GROUND_FLOOR


def test_no_file_imports_a_test_file():
    tests = {path.stem for path in TESTS.rglob("test_*.py")}
    found = {path.name: imported(path) & tests for path in TESTS.rglob("*.py")}
    assert {name: imports for name, imports in found.items() if imports} == {}


@pytest.mark.parametrize("option", ["--only-importable", "-v"])
def test_a_test_file_that_lacks_a_package_is_left_out_on_request_alone_and_named(tmp_path, option):
    for package in ("numpy", "torch"):
        file = tmp_path / f"test_with_{package}.py"
        file.write_text(f"import {package}\n\ndef test_it():\n    pass\n")
    code = "import sys, pytest; sys.modules['torch'] = None; sys.exit(pytest.main(sys.argv[1:]))"
    ours = ["-c", TESTS / "pytest.ini", "-p", "conftest", "-p", "no:cacheprovider", "-v"]
    command = [sys.executable, "-c", code, *ours, option, tmp_path]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, check=False)
    if option == "--only-importable":
        assert done.returncode == 0
        assert "test_with_numpy.py::test_it PASSED" in done.stdout
        assert "left out test_with_torch.py: no torch\n" in done.stdout
    else:
        assert done.returncode == pytest.ExitCode.INTERRUPTED
        assert "ERROR collecting" in done.stdout
        assert "left out" not in done.stdout
