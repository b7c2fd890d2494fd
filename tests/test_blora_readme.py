"""The README tells the truth: its commands work, and nothing that exists is missing from it."""

from __future__ import annotations

import re
import shlex
import shutil

import pytest
import toml
from kohya_folder import ROOT, copy_command
from sdxl_train_network import build_parser as sd_scripts_parser
from test_blora_bundle import BUNDLE, tracked
from test_blora_launchers import FAST_CHANGES, outline

import blora_preflight
import blora_slicer

README = (ROOT / "README.md").read_text(encoding="utf-8")
PLAN = ("base  ", "images  ", "training  ", "modules  ", "rank  ", "memory  ", "saves  ")
BLOCKS = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", README, re.MULTILINE | re.DOTALL)
# What programs print, among what people type.
SHOWN = ("content of ", "-> ", "error: ", "This training:", *PLAN)
COMMANDS = [
    line.strip()
    for language, block in BLOCKS
    for line in block.splitlines()
    if not language and not line.strip().startswith(SHOWN)
]
SETTINGS = [line for line in outline(ROOT / "sdxl_blora_classic.sh") if line.startswith("BLORA_")]


def check_launcher(command: list[str]) -> None:
    """Known settings, a launcher that is there, and options that sd-scripts takes."""
    settings = [word for word in command if re.match(r"BLORA_\w+=", word)]
    launcher, *options = command[len(settings) :]
    assert {word.split("=")[0] for word in settings} <= {line.split(" = ")[0] for line in SETTINGS}
    assert (ROOT / launcher).is_file()
    sd_scripts_parser().parse_args(options)
    for preset in re.findall(r"lycoris_presets/\w+\.toml", " ".join(command)):
        assert (ROOT / preset).is_file()


def check_cmd(words: list[str]) -> None:
    """A line for cmd.exe: a launcher, or a known setting."""
    if words[0] == "set":
        assert words[1].split("=")[0] in {line.split(" = ")[0] for line in SETTINGS}
    else:
        check_launcher(words)


def check_slicer(command: list[str]) -> None:
    """Options that the slicer takes, and traits that it has."""
    args = blora_slicer.build_parser().parse_args(command[2:])
    known = blora_slicer.load_traits(args.traits_file)
    assert blora_slicer.plan_cuts(args.loras, args.traits, args.alphas, known)


def check_preflight(command: list[str]) -> None:
    """A command line that pre-flight takes."""
    assert blora_preflight.build_parser().parse_args(command[2:]).options


def check_pip(command: list[str]) -> None:
    """Packages that the test environment has as well."""
    pinned = (ROOT / "tests/requirements.txt").read_text()
    assert all(re.search(rf"^{package}==", pinned, re.MULTILINE) for package in command[2:])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_one_that_works(command):
    if command.startswith(("copy ", "xcopy ")):
        return  # run below, in cmd.exe
    words = shlex.split(command)
    if words[-1].startswith("tests/"):
        assert words == ["bash", words[1]]
        assert words[1] in ("tests/demo.sh", "tests/check.sh")
    elif any(word.startswith("./sdxl_") for word in words):
        check_launcher(words)
    elif words[0].startswith("sdxl_") or words[0] == "set":
        check_cmd(words)
    elif words[:2] == ["python", "blora_preflight.py"]:
        check_preflight(words)
    elif words[:2] == ["python", "blora_slicer.py"]:
        check_slicer(words)
    elif words[:2] == ["pip", "install"]:
        check_pip(words)
    else:
        assert command == copy_command()


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


def test_the_dataset_config_is_valid_toml_with_an_image_folder():
    [config] = [toml.loads(block) for language, block in BLOCKS if language == "toml"]
    assert config["datasets"][0]["subsets"][0]["image_dir"].startswith("_in/lora/sdxl/my_project/")


def test_every_option_trait_preset_and_setting_is_in_it():
    parser = blora_slicer.build_parser()
    options = [o for action in parser._actions for o in action.option_strings if o != "--help"]
    names = [option for option in options if option.startswith("--")]
    names += blora_slicer.load_traits(ROOT / "blora_traits.json")
    names += [path.stem for path in (ROOT / "lycoris_presets").iterdir()]
    missing = [name for name in names if f"| `{name}` |" not in README]
    assert not missing


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_is_in_it_with_its_default(setting):
    name, default = setting.split(" = ")
    shown = {"": "empty", "path/to/sd_xl_base_1.0.safetensors": "a path to edit"}
    assert f"| `{name}` | {shown.get(default, f'`{default}`')} |" in README


def test_its_table_of_classic_against_fast_is_the_difference_between_them():
    table = README.split("### Classic and fast")[1].split("###")[0]
    rows = [re.findall(r"`([^`]+)`", row) for row in table.splitlines() if row.startswith("| ")]
    told = {tuple(row) for row in rows if row}
    assert told == {tuple(filter(None, change)) for change in FAST_CHANGES}


def test_its_links_within_the_repository_lead_somewhere():
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", README):
        assert (ROOT / target).exists()


def test_the_size_it_shows_is_that_of_the_file():
    """Content has half of the two blocks' parameters, in fp32; the header is below 0.1 MB."""
    layers = blora_preflight.trained_layers(
        blora_preflight.load_preset(ROOT / "lycoris_presets/blora_content_style.toml")
    )
    content = [layer for name, layer in layers.items() if "_output_blocks_0_1_" in name]
    size = 4 * sum(layer.parameters(1024) for layer in content)
    assert (
        f"-> model.safetensors: 80 modules, 240 tensors, rank 1024, {size / 1e6:.1f} MB" in README
    )
