"""How a launcher's text is read: settings, recipe, and what is said of a wrong line.

test_launchers.py starts launchers in bash and cmd.exe.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from kohya_folder import ROOT
from recipes import CLASSIC, FAST
from sdxl_train_network_options import build_parser

from blora import launch

RECIPES = {"sdxl_blora_classic": CLASSIC, "sdxl_blora_fast": FAST}
TEXT = (ROOT / "sdxl_blora_fast.sh").read_text()
RECIPE = TEXT[TEXT.index("--") :]


@pytest.fixture(autouse=True)
def kohya(tmp_path, monkeypatch) -> Path:
    """The folder that launchers lie in, and an environment in which nothing is set."""
    for name in launch.SETTINGS:
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("HOME", "/home/zoe")
    monkeypatch.setenv("USERPROFILE", "/home/zoe")
    monkeypatch.setattr(launch, "ROOT", tmp_path)
    return tmp_path


def options(kohya: Path, text: str | bytes, *given: str, name: str = "my_fast.sh") -> list[str]:
    """The words behind the script that a launcher of this text hands to accelerate."""
    (kohya / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    launcher = launch.read_launcher(kohya / name)
    environ = os.environ | launch.chosen_settings(launcher, os.environ)
    return launch.accelerate_line(launcher, environ, list(given))[3:]


def refusal(kohya: Path, capsys, text: str) -> str:
    """What a launcher of this text ends with."""
    (kohya / "my_fast.bat").write_text(text)
    assert launch.main(["my_fast.bat"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


def edited(old: str, new: str) -> str:
    assert old in TEXT
    return TEXT.replace(old, new, 1)


@pytest.mark.parametrize("name", RECIPES)
def test_every_option_exists_in_sd_scripts_with_that_value_allowed(kohya, name):
    text = (ROOT / f"{name}.bat").read_bytes()
    parsed = build_parser().parse_args(options(kohya, text))
    preset, *others = parsed.network_args
    assert preset == "preset=lycoris_presets/blora_content_style.toml"
    assert others == (["bypass_mode=True"] if name == "sdxl_blora_fast" else [])
    assert parsed.optimizer_args[-1] == "beta3=None"


# ---- Settings ------------------------------------------------------------------------------------

RANK_64 = "--network_dim=64"
# Lines in place of BLORA_RANK=1024: as somebody writes them, or had them in a copy of version 1.
RANKS = [
    "BLORA_RANK=64",
    "BLORA_RANK = 64",
    '  BLORA_RANK="64"  ',
    "export BLORA_RANK=64",
    'set "BLORA_RANK=64"',
    'if not defined BLORA_RANK set "BLORA_RANK=64"',
    'BLORA_RANK="${BLORA_RANK:-64}"',
    "BLORA_RANK=8\nBLORA_RANK=64",
    "#BLORA_RANK=8\nrem BLORA_RANK=8\nREM\nBLORA_RANK=64",
]


@pytest.mark.parametrize("line", RANKS)
def test_a_setting_may_be_written_in_many_ways(kohya, line):
    assert RANK_64 in options(kohya, edited("BLORA_RANK=1024", line))


def test_a_setting_of_the_recipes_part_counts_too(kohya):
    assert RANK_64 in options(kohya, f"{TEXT}BLORA_RANK=64\n")


# A path as typed in a .sh and in a .bat, and what arrives.
PATHS = [
    ("~/my models/sdxl", "/home/zoe/my models/sdxl", "/home/zoe/my models/sdxl"),
    ('"~/sdxl~/"', "/home/zoe/sdxl~/", "/home/zoe/sdxl~/"),
    ("~\\sdxl", "/home/zoe\\sdxl", "/home/zoe/sdxl"),
    ("~sdxl/~", "~sdxl/~", "~sdxl/~"),
    ("D:\\models\\sdxl\\", "D:\\models\\sdxl\\", "D:/models/sdxl/"),
    ("\\\\nas\\it's\\50%", "\\\\nas\\it's\\50%", "//nas/it's/50%"),
    ("$HOME/sdxl", "/home/zoe/sdxl", "/home/zoe/sdxl"),
    ("%HOME%/sdxl", "%HOME%/sdxl", "/home/zoe/sdxl"),
    ("a%%b", "a%%b", "a%b"),  # as a .bat of version 1 needed it
    ("/x/zoe'", "/x/zoe'", "/x/zoe'"),
    ("'/x/zoe'", "/x/zoe", "/x/zoe"),
    ("\u2018/x\u2019", "/x", "/x"),
    ('"', "", ""),
    ("", "", ""),
]
OPTION_OF = {"BLORA_CHECKPOINT": "--pretrained_model_name_or_path", "BLORA_PRESET": "preset"}


@pytest.mark.parametrize(("typed", "in_sh", "in_bat"), PATHS)
def test_a_path_is_what_was_meant_in_each_shell(kohya, typed, in_sh, in_bat):
    for setting, option in OPTION_OF.items():
        lines = [line for line in TEXT.splitlines() if not line.startswith(setting)]
        text = "\n".join([*lines, f"{setting}={typed}"])
        for suffix, path in ((".sh", in_sh), (".bat", in_bat)):
            assert f"{option}={path}" in options(kohya, text, name=f"x{suffix}")


def test_a_path_of_the_environment_is_cleaned_and_no_variable_in_it_is_filled_in(
    kohya, monkeypatch
):
    monkeypatch.setenv("BLORA_CHECKPOINT", ' "~/$HOME/a" ')
    assert "--pretrained_model_name_or_path=/home/zoe/$HOME/a" in options(kohya, TEXT)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252"])
def test_letters_arrive_whatever_the_encoding(kohya, monkeypatch, encoding):
    monkeypatch.setattr("locale.getpreferredencoding", lambda _: "cp1252")
    text = edited("my_project", "caf\u00e9").encode(encoding)
    assert "--output_name=caf\u00e9_1" in options(kohya, text)


def test_bytes_that_are_no_letters_arrive_as_they_are(kohya):
    text = edited("my_project", "caf?").encode().replace(b"caf?", b"caf\xe9")
    assert "--output_name=caf\udce9_1" in options(kohya, text)


ALLOWED = f"the settings are {', '.join(launch.SETTINGS)}"
# A line, another in its place, and what is said of it.
WRONG = [
    ("RANK=1024", "RANK=64.0", 'BLORA_RANK is "64.0" in {}: give a whole number, such as 64'),
    ("RANK=1024", "RANK=", 'BLORA_RANK is "" in {}: give a whole number, such as 64'),
    ("RANK=1024", "RANK=0", 'BLORA_RANK is "0" in {}: give a whole number, such as 64'),
    ("RANK=1024", "RANK=64 # x", 'BLORA_RANK is "64 # x" in {}: give a whole number, such as 64'),
    ("NAME=my_project", "NAME=", 'BLORA_NAME is "" in {}: give your project a name'),
    ("REVISION=1", "REVISION=", 'BLORA_REVISION is "" in {}: give the attempt a number'),
    *(
        (
            "SAVE_MEMORY=1",
            f"SAVE_MEMORY={value}",
            f'BLORA_SAVE_MEMORY is "{value}" in {{}}: give 1 to save memory, or 0 to be faster',
        )
        for value in ("yes", "10", "0 & 1)", "")
    ),
    (
        "RANK=1024",
        f"RANK={'x' * 201}",
        f'BLORA_RANK is "{"x" * 200}..." in {{}}: give a whole number, such as 64',
    ),
    (
        "CHECK_ONLY=0",
        "CHECK_ONLY=\x1b[2Jyes",
        'BLORA_CHECK_ONLY is "\\x1b[2Jyes" in {}: give 1 to check and stop, or 0 to train',
    ),
    (
        "RANK=1024",
        "RNAK=64",
        f'{{}} is "BLORA_RNAK" in my_fast.bat: {ALLOWED}',
    ),
]


@pytest.mark.parametrize(("old", "new", "sentence"), WRONG)
def test_a_wrong_setting_is_named_with_its_line(kohya, capsys, old, new, sentence):
    text = edited(f"BLORA_{old}", f"BLORA_{new}")
    [line] = [n for n, row in enumerate(text.splitlines(), 1) if row == f"BLORA_{new}"]
    place = f"line {line} of my_fast.bat" if sentence.startswith("BLORA_") else f"line {line}"
    assert refusal(kohya, capsys, text) == f"error: {sentence.format(place)}\n"


def test_a_wrong_setting_of_the_environment_is_named_as_such(kohya, capsys, monkeypatch):
    monkeypatch.setenv("BLORA_RANK", "x")
    assert refusal(kohya, capsys, TEXT) == (
        'error: BLORA_RANK is "x" in the environment: give a whole number, such as 64\n'
    )


def test_a_missing_setting_is_named(kohya, capsys):
    text = edited("BLORA_PRESET=lycoris_presets/blora_content_style.toml\n", "")
    assert refusal(kohya, capsys, text) == (
        "error: my_fast.bat has no BLORA_PRESET: add a line BLORA_PRESET=VALUE\n"
    )


def test_a_command_among_the_settings_is_refused(kohya, capsys):
    assert refusal(kohya, capsys, edited("BLORA_RANK=1024", "conda activate kohya")) == (
        'error: line 19 is "conda activate kohya" in my_fast.bat: write a setting as NAME=VALUE, '
        "and put commands above the line that starts blora\n"
    )


def test_a_launcher_that_is_not_there_is_one_sentence(capsys):
    assert launch.main(["gone.sh"]) == 1
    assert capsys.readouterr().err.startswith("error: [Errno 2] No such file")


def test_without_a_launcher_it_says_what_it_is_for(capsys):
    assert launch.main([]) == 2
    assert capsys.readouterr().out == f"{launch.__doc__}\n"


# ---- The recipe ----------------------------------------------------------------------------------

ADDED = [
    ("--sample_every_n_steps 250", ["--sample_every_n_steps", "250"]),
    ('--sample_prompts="my prompts.txt" --seed=1', ["--sample_prompts=my prompts.txt", "--seed=1"]),
    ("--sample_prompts='D:\\my prompts\\p.txt'", ["--sample_prompts=D:\\my prompts\\p.txt"]),
    ('"--vae=a b#c" ^', ["--vae=a b#c"]),
    ("--a=x=y  # no comment", ["--a=x=y", "#", "no", "comment"]),
    ('  "" ', [""]),
    ("# --seed=1", []),
    ("rem --seed=1", []),
    ("", []),
    ("--logging_dir=$BLORA_NAME/$NOT_SET", ["--logging_dir=my_project/$NOT_SET"]),
]


@pytest.mark.parametrize(("line", "words"), ADDED)
def test_a_line_may_hold_options_as_a_shell_takes_them(kohya, line, words):
    assert options(kohya, f"{TEXT}{line}\n")[len(FAST) :] == words


def test_a_quote_mark_that_is_never_closed_is_named_with_its_line(kohya, capsys):
    line = len(TEXT.splitlines()) + 1
    assert refusal(kohya, capsys, f'{TEXT}--vae="a b\n') == (
        f'error: line {line} is "--vae="a b" in my_fast.bat: close its quote mark\n'
    )


def test_the_same_in_accelerates_options(kohya, capsys):
    text = edited("BLORA_ACCELERATE_ARGS=", "BLORA_ACCELERATE_ARGS=--config_file 'a b")
    assert refusal(kohya, capsys, text) == (
        'error: BLORA_ACCELERATE_ARGS is "--config_file \'a b": close its quote mark\n'
    )


def test_accelerates_options_come_before_the_script(kohya):
    text = edited("BLORA_ACCELERATE_ARGS=", 'BLORA_ACCELERATE_ARGS=--config_file "a b" --cpu')
    words = options(kohya, text)
    # options() leaves out what comes before the script: here three words more.
    assert words[:3] == ["a b", "--cpu", "sdxl_train_network.py"]


WITHOUT_WORKERS = [
    ["--max_data_loader_n_workers=0"],
    ["--max_data_loader_n_workers", "0", "--seed=1"],
]
WITH_WORKERS = [
    ["--max_data_loader_n_workers=04"],
    ["--max_data_loader_n_workers", "8", "--seed", "0"],
    ["--training_comment", "--max_data_loader_n_workers", "--lr_warmup_steps=0"],
]


@pytest.mark.parametrize("given", [*WITHOUT_WORKERS, *WITH_WORKERS], ids=" ".join)
def test_workers_persist_unless_there_are_none(kohya, given):
    has_none = given in WITHOUT_WORKERS
    expected = [w for w in FAST if not (has_none and w == "--persistent_data_loader_workers")]
    assert options(kohya, TEXT, *given)[1:] == [*expected[1:], *given]


@pytest.mark.parametrize("name", RECIPES)
def test_only_fast_can_do_without_saving_memory(kohya, monkeypatch, name):
    monkeypatch.setenv("BLORA_SAVE_MEMORY", "0")
    saves = name == "sdxl_blora_classic"
    words = options(kohya, (ROOT / f"{name}.sh").read_text())
    assert ("--gradient_checkpointing" in words) == saves
    assert len(words) == len(RECIPES[name]) - (not saves)


@pytest.mark.parametrize("script", launch.SCRIPTS)
def test_the_script_is_that_of_sd_scripts_or_of_kohya_ss(kohya, script):
    (kohya / "sd-scripts").mkdir()
    (kohya / script).touch()
    text = edited("BLORA_ACCELERATE_ARGS=", "BLORA_ACCELERATE_ARGS=-x")
    assert options(kohya, text)[0] == script
