"""The README tells the truth: its commands work, and nothing that exists is missing from it."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys

import pytest
from bundle_files import BUNDLE, tracked
from kohya_folder import ROOT, copy_command
from launcher_text import FAST_CHANGES, outline
from preset_modules import CONTENT, EXPECTED, block_modules, text_encoder_modules
from readme_commands import check_cmd, check_launcher, check_preflight, check_slicer

import blora_slicer
from blora_sdxl import layers_by_module, load_traits

README = (ROOT / "README.md").read_text(encoding="utf-8")
PLAN = ("base  ", "images  ", "epoch  ", "training  ", "modules  ", "rank  ", "memory  ", "saves  ")
BLOCKS = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", README, re.MULTILINE | re.DOTALL)
# What programs print, among what people type.
SHOWN = ("early stop: ", "content of ", "-> ", "error: ", "note: ", "Rehearsing ", "This training:")
SHOWN += PLAN
COMMANDS = [
    line.strip()
    for language, block in BLOCKS
    for line in block.splitlines()
    if not language and not line.strip().startswith(SHOWN)
]
# fast has every setting of classic, and one more.
SETTINGS = [
    line for line in outline(ROOT / "sdxl_blora_fast.sh") if re.match(r"BLORA_\w+ = ", line)
]


def check_pip(command: list[str]) -> None:
    """Packages that the test environment has as well."""
    pinned = (ROOT / "tests/requirements.txt").read_text()
    assert all(re.search(rf"^{package}==", pinned, re.MULTILINE) for package in command[2:])


def check_copied(command: list[str]) -> None:
    """The install command, which every test of a launcher runs."""
    assert shlex.join(command) == shlex.join(shlex.split(copy_command()))


def check_script(command: list[str]) -> None:
    """A script of ours; both are run, one by the other's tests and one by you right now."""
    assert command in (["bash", "tests/demo.sh"], ["bash", "tests/check.sh"])


CHECKS = {
    r"x?copy ": None,  # run below, in cmd.exe
    r"cp blora_dataset\.toml ": None,  # tests/test_blora_docs.py loads that file
    r"cp -r ": check_copied,
    r"bash ": check_script,
    r"(BLORA_.*)?\./sdxl_": check_launcher,
    r"sdxl_|set ": check_cmd,
    r"python blora_preflight\.py ": check_preflight,
    r"python blora_slicer\.py ": check_slicer,
    r"pip install ": check_pip,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_one_that_works(command):
    [check] = [check for start, check in CHECKS.items() if re.match(start, command)]
    if check:
        check(shlex.split(command))


def test_the_windows_copy_commands_install_the_bundle(cmd, tmp_path):
    commands = [command for command in COMMANDS if command.startswith(("copy", "xcopy"))]
    assert len(commands) == 2
    source, kohya = tmp_path / "bundle", tmp_path / "kohya"
    kohya.mkdir()
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    bat = source / "install.bat"
    lines = ["@echo off", *(line.replace("<kohya folder>", "..\\kohya") for line in commands)]
    bat.write_bytes("".join(f"{line}\r\n" for line in lines).encode())
    cmd.run(bat)
    # Windows matches names in any case, so the changelog comes along.
    copied = {path.name for path in kohya.iterdir()} - {"CHANGELOG_BLORA_KOHYA.md"}
    assert copied == set(BUNDLE)
    assert len(list((kohya / "lycoris_presets").iterdir())) == 5


def test_every_option_trait_preset_and_setting_is_in_it():
    parser = blora_slicer.build_parser()
    options = [o for action in parser._actions for o in action.option_strings if o != "--help"]
    names = [option for option in options if option.startswith("--")]
    names += load_traits(ROOT / "blora_traits.json")
    names += [path.stem for path in (ROOT / "lycoris_presets").iterdir()]
    missing = [name for name in names if f"| `{name}` |" not in README]
    assert not missing


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_is_in_it_with_its_default(setting):
    name, default = setting.split(" = ")
    shown = {"": "empty", "path/to/sd_xl_base_1.0.safetensors": "a path to edit"}
    assert f"| `{name}` | {shown.get(default, f'`{default}`')} |" in README


def test_its_table_of_presets_has_the_parameters_that_the_layers_have():
    layers = layers_by_module()
    for preset, (blocks, encoders) in EXPECTED.items():
        unet = sum(layers[m].parameters(1) for block in blocks for m in block_modules(block))
        text = sum(layers[m].parameters(1) for m in text_encoder_modules(encoders))
        [row] = [line for line in README.splitlines() if line.startswith(f"| `{preset}` |")]
        told = [int(number.replace(",", "")) for number in re.findall(r"\d{2,3},\d{3}", row)]
        assert told == ([unet, text] if "clip" in preset else [unet])


def test_the_options_page_is_what_the_programs_print(bundle):
    subprocess.run([sys.executable, "tools/write_options.py"], cwd=bundle, check=True)
    page = "docs/blora_options.md"
    hint = "stale: run python tools/write_options.py"
    assert (ROOT / page).read_bytes() == (bundle / page).read_bytes(), hint


def test_its_table_of_classic_against_fast_is_the_difference_between_them():
    table = README.split("### Classic and fast")[1].split("###")[0]
    rows = [re.findall(r"`([^`]+)`", row) for row in table.splitlines() if row.startswith("| ")]
    told = {tuple(row) for row in rows if row}
    assert told == {tuple(filter(None, change)) for change in FAST_CHANGES}


def test_its_links_within_the_repository_lead_somewhere():
    targets = re.findall(r"\]\((?!https?://)([^)#]+)", README)
    for target in targets + re.findall(r'src="([^"]+)"', README):
        assert (ROOT / target).exists()


def test_the_size_it_shows_is_that_of_the_file():
    """Content has half of the two blocks' parameters, in fp32; the header is below 0.1 MB."""
    layers = layers_by_module()
    size = 4 * sum(layers[module].parameters(1024) for module in block_modules(CONTENT))
    assert (
        f"-> my_content.safetensors: 80 modules, 240 tensors, rank 1024, {size / 1e6:.1f} MB"
        in README
    )


def test_the_readme_of_the_tests_names_every_test_file_and_benchmark():
    folder = ROOT / "tests"
    rows = re.findall(r"^\| (`.*?) \|", (folder / "README.md").read_text(), re.MULTILINE)
    named = re.findall(r"`(\w+\.py)`", "".join(rows))
    there = [path.name for kind in ("test", "bench") for path in folder.glob(f"{kind}_*.py")]
    assert sorted(named) == sorted(there)
