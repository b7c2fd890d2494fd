"""The README's install lines install the bundle, and its tables are those of the programs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from bundle_files import BUNDLE, tracked, unpack
from cmd_runner import calls, windows_path
from kohya_folder import BASH, ROOT, Bash, Bat, install
from preset_modules import EXPECTED, block_modules, lora_parameters, text_encoder_modules
from readme_commands import PAGES, blocks_of
from recipes import CLASSIC, FAST
from rehearsed_networks import network, options, prodigy_state, told_memory

import blora_slicer
from blora.launch import read_launcher
from blora.sdxl import layers_by_module, load_traits

README = PAGES["README"]
PACKAGES = ["install", "lycoris_lora", "prodigyopt"]
EDIT = "path/to/sd_xl_base_1.0.safetensors"
# The columns of the table of memory: what each recipe changes of fast's options.
AS_CLASSIC = options("--network_module=lycoris.kohya", "--no_half_vae", without="cache_latents")
MEMORY_OF = [options(), options(without="gradient_checkpointing"), AS_CLASSIC]


OWN = ["my_fast.sh", "my_blora_prompts.txt", "_in/lora/config.toml", "_out/lora/a.safetensors"]


def shell_block(start: str, page: str = "README") -> list[str]:
    [block] = [block for block in blocks_of(page, "") if block.startswith(start)]
    return block.splitlines()


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def make_installed(kohya: Path, own: list[str]) -> None:
    """The bundle and files of one's own in a folder, after a run that compiled the programs."""
    kohya.mkdir()
    install(kohya)
    (kohya / "blora/__pycache__").mkdir(exist_ok=True)
    for name in ("blora/__pycache__/text.pyc", *own):
        (kohya / name).parent.mkdir(parents=True, exist_ok=True)
        (kohya / name).touch()


def test_the_install_lines_for_linux_install_the_bundle_and_its_packages(tmp_path):
    kohya, log, unpacked = tmp_path / "my kohya", tmp_path / "log", unpack(tmp_path / "bundle")
    programs = Bash().make_venv(kohya / "venv")
    Bash().install_recorder(programs, "pip")
    lines = "\n".join(shell_block("source ")).replace("<kohya folder>", "../my kohya")
    env = {"PATH": os.defpath, "RECORDER_LOG": str(log)}
    subprocess.run([BASH, "-ec", lines], cwd=unpacked, env=env, check=True)
    [record] = log.iterdir()
    assert record.read_text().split("\0")[2:6] == [str(programs / "pip"), *PACKAGES]
    assert {path.name for path in kohya.iterdir()} == {*BUNDLE, "venv"}


def test_the_install_lines_for_cmd_install_the_bundle_and_its_packages(cmd, tmp_path):
    kohya, log, unpacked = tmp_path / "my kohya", tmp_path / "log", unpack(tmp_path / "bundle")
    log.mkdir()
    Bat(cmd).install_recorder(kohya / "venv/Scripts", "pip")
    # What venv puts into Scripts, as far as these lines need it.
    activate = b'@echo off\r\nset "PATH=%~dp0;%PATH%"\r\n'
    (kohya / "venv/Scripts/activate.bat").write_bytes(activate)
    lines = [line.replace("<kohya folder>", "..\\my kohya") for line in shell_block('"')]
    # What is typed needs no call; in a .bat the lines behind another .bat would never run.
    lines[0] = f"call {lines[0]}"
    (unpacked / "typed.bat").write_bytes("\r\n".join(["@echo off", *lines, ""]).encode())
    cmd.run(unpacked / "typed.bat", env={"RECORDER_LOG": windows_path(log)})
    [call] = calls(log)
    assert call.argv[1:] == PACKAGES
    # Windows matches names in any case, so the changelog comes along.
    copied = {path.name for path in kohya.iterdir()} - {"CHANGELOG_BLORA_KOHYA.md"}
    assert copied == {*BUNDLE, "venv"}
    files = {path.relative_to(unpacked) for path in unpacked.glob("[bl]*/**/*.*")}
    assert {path.relative_to(kohya) for path in kohya.glob("[bl]*/**/*.*")} == files


REMOVED_BESIDE = pytest.mark.parametrize("own", [OWN, [*OWN, "lycoris_presets/my_middle.toml"]])


@REMOVED_BESIDE
def test_the_lines_for_linux_remove_the_bundle_and_nothing_else(tmp_path, own):
    make_installed(tmp_path / "my kohya", own)
    lines = "\n".join(shell_block("for file in", "upkeep"))
    lines = lines.replace("<kohya folder>", "../my kohya")
    done = subprocess.run([BASH, "-c", lines], cwd=unpack(tmp_path / "bundle"), check=False)
    assert (done.returncode == 0) == (own == OWN)
    assert files(tmp_path / "my kohya") == set(own)
    assert (tmp_path / "my kohya/lycoris_presets").exists() == (own != OWN)


@REMOVED_BESIDE
def test_the_lines_for_cmd_remove_the_bundle_and_nothing_else(cmd, tmp_path, own):
    unpacked = unpack(tmp_path / "bundle")
    make_installed(tmp_path / "my kohya", own)
    lines = "\r\n".join(["@echo off", *shell_block("for %f in", "upkeep"), ""])
    # In a .bat the percent sign of a loop is doubled.
    lines = lines.replace("%", "%%").replace("<kohya folder>", "..\\my kohya")
    (unpacked / "typed.bat").write_bytes(lines.encode())
    cmd.run(unpacked / "typed.bat")
    assert files(tmp_path / "my kohya") == set(own)
    assert (tmp_path / "my kohya/lycoris_presets").exists() == (own != OWN)


def test_the_install_lines_for_powershell_are_those_of_cmd():
    """PowerShell is not run; this compares what they name."""
    activate = '& "<kohya folder>\\venv\\Scripts\\Activate.ps1"'
    copy = 'Copy-Item *blora*, lycoris_presets "<kohya folder>" -Recurse -Force'
    block, _ = blocks_of("README", "powershell")
    assert block.splitlines() == [activate, shell_block('"')[1], copy]


def check_prepared(kohya: Path, suffix: str) -> None:
    """A folder for the pictures, the sample dataset config, and a copy of a launcher."""
    project = kohya / "_in/lora/sdxl/my_project"
    assert {path.name for path in project.iterdir()} == {"images", "config.toml"}
    assert list((project / "images").iterdir()) == []
    assert (project / "config.toml").read_bytes() == (ROOT / "blora_dataset.toml").read_bytes()
    launcher, copy = (kohya / f"{name}.{suffix}" for name in ("sdxl_blora_fast", "my_fast"))
    assert copy.read_bytes() == launcher.read_bytes()
    assert os.access(copy, os.X_OK) == os.access(launcher, os.X_OK)


def test_the_lines_for_linux_prepare_a_training(tmp_path):
    make_installed(tmp_path / "my kohya", [])
    lines = "\n".join(shell_block("cd ")).replace("<kohya folder>", "my kohya")
    subprocess.run([BASH, "-ec", lines], cwd=tmp_path, check=True)
    check_prepared(tmp_path / "my kohya", "sh")


def test_the_lines_for_windows_prepare_a_training(cmd, tmp_path):
    make_installed(tmp_path / "my kohya", [])
    lines = "\r\n".join(["@echo off", *shell_block("pushd "), ""])
    (tmp_path / "typed.bat").write_bytes(lines.replace("<kohya folder>", "my kohya").encode())
    cmd.run(tmp_path / "typed.bat")
    check_prepared(tmp_path / "my kohya", "bat")


@pytest.mark.parametrize("suffix", ["sh", "bat"])
def test_the_edited_lines_it_shows_are_the_launchers(suffix):
    [block] = blocks_of("README", "sh")
    unedited = re.sub(r"(?<=[=-])[^=-]+sd_xl_base_1\.0\.safetensors", EDIT, block.strip())
    unedited = unedited.replace("BLORA_RANK=64", "BLORA_RANK=1024")
    assert "BLORA_RANK" in unedited
    for recipe in ("classic", "fast"):
        lines = (ROOT / f"sdxl_blora_{recipe}.{suffix}").read_text().splitlines()
        assert {*unedited.splitlines()} <= {*lines}


def test_it_has_the_first_hour_in_less_than_200_lines():
    assert len(README.splitlines()) < 200


def test_every_trait_and_preset_is_on_their_page():
    names = list(load_traits(ROOT / "blora_traits.json"))
    names += [path.stem for path in (ROOT / "lycoris_presets").iterdir()]
    told = re.findall(r"^\| `([a-z_2]+)` \|", PAGES["own_blocks"], re.MULTILINE)
    assert sorted(told) == sorted(names)


def test_every_option_of_the_slicer_is_on_its_page():
    parser = blora_slicer.build_parser()
    options = {option for option in parser._option_string_actions if option.startswith("--")}
    told = re.findall(r"^\| `(--\w+)` \|", PAGES["slicing"], re.MULTILINE)
    assert sorted(told) == sorted(options - {"--help"})


def test_every_setting_is_in_it_with_its_default():
    # fast has every setting of classic, and one more.
    for setting, (default, _) in read_launcher(ROOT / "sdxl_blora_fast.sh").settings.items():
        shown = {"": "empty", EDIT: "a path to edit"}.get(default, f"`{default}`")
        assert f"| `{setting}` | {shown} |" in README


def test_the_table_of_presets_has_the_parameters_that_the_layers_have():
    layers = layers_by_module()
    for preset, (blocks, encoders) in EXPECTED.items():
        unet = sum(lora_parameters(layers[m], 1) for block in blocks for m in block_modules(block))
        text = sum(lora_parameters(layers[m], 1) for m in text_encoder_modules(encoders))
        [row] = [
            line for line in PAGES["own_blocks"].splitlines() if line.startswith(f"| `{preset}` |")
        ]
        told = [int(number.replace(",", "")) for number in re.findall(r"\d{2,3},\d{3}", row)]
        assert told == ([unet, text] if "clip" in preset else [unet])


def test_the_options_page_is_what_the_programs_print(bundle):
    subprocess.run([sys.executable, "tools/write_options.py"], cwd=bundle, check=True)
    shown, printed = ((root / "docs/options.md").read_bytes() for root in (ROOT, bundle))
    assert shown == printed, "stale: run python tools/write_options.py"


def test_the_table_of_classic_against_fast_is_the_difference_between_them():
    table = PAGES["speed"].split("## Classic and fast")[1].split("##")[0]
    rows = "".join(row for row in table.splitlines() if row.startswith("| "))
    assert sorted(re.findall(r"`([^`]+)`", rows)) == sorted({*CLASSIC} ^ {*FAST})


def test_the_memory_that_the_pages_tell_is_what_preflight_computes():
    rows = re.findall(r"^\| (\d+)\b[^|]*\|(.*) GB \|$", PAGES["speed"], re.MULTILINE)
    assert len(rows) == 4
    of_fast = {rank: re.findall(r"[\d.]+", cells)[1] for rank, cells in rows}
    in_readme = re.findall(r"([\d.]+) GB (?:of the card's memory )?at rank (\d+)", README)
    assert {rank: memory for memory, rank in in_readme} == {r: of_fast[r] for r in ("64", "1024")}
    for rank, cells in rows:
        size, *memory = re.findall(r"[\d.]+", cells)
        found = network(int(rank))
        assert size == f"{found.parameters * 2 / 1e6:.0f}"
        told = [told_memory(args, found, prodigy_state()) for args in MEMORY_OF]
        assert memory == [f"{float(text.split()[0]):.1f}" for text in told]


def test_the_readme_of_the_tests_names_every_folder_and_benchmark():
    tests = ROOT / "tests"
    page = (tests / "README.md").read_text(encoding="utf-8")
    folders = {name.split("/")[1] for name in tracked("tests") if name.count("/") > 1}
    assert set(re.findall(r"^\| `(\w+)/` \|", page, re.MULTILINE)) == folders
    assert set(re.findall(r"`(bench_\w+\.py)`", page)) == {p.name for p in tests.glob("bench_*")}
