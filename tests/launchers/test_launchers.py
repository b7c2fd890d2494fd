"""What the launchers promise, in bash and in cmd.exe alike.

Every case runs both twins in a throw-away kohya folder whose accelerate records how it is called.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cmd_runner import Finished
from kohya_folder import BASH, CHECKPOINT, ROOT, Bash, Bat, make_kohya, remove_files
from launcher_text import FAST_CHANGES, outline
from sdxl_train_network import build_parser

pytestmark = pytest.mark.shell
NAMES = ["sdxl_blora_classic", "sdxl_blora_fast"]
# A name that every shell would like to split, expand or end early.
ODD = "Zoe & co (1) it's! 50^"
SETTINGS = {"BLORA_CHECKPOINT": CHECKPOINT}

CLASSIC = f"""
--pretrained_model_name_or_path={CHECKPOINT}
--dataset_config=./_in/lora/sdxl/my_project/config.toml
--output_dir=./_out/lora/sdxl/my_project_1
--output_name=my_project_1
--network_module=lycoris.kohya
--network_args
preset=lycoris_presets/blora_content_style.toml
--network_dim=1024
--network_alpha=1024
--network_train_unet_only
--resolution=1024,1024
--enable_bucket
--min_bucket_reso=512
--bucket_reso_steps=32
--random_crop
--caption_extension=.txt
--persistent_data_loader_workers
--max_train_steps=3000
--save_every_n_steps=1000
--save_model_as=safetensors
--mixed_precision=fp16
--no_half_vae
--gradient_checkpointing
--mem_eff_attn
--prior_loss_weight=0
--max_grad_norm=1.0
--seed=0
--lr_scheduler=cosine
--lr_warmup_steps=500
--learning_rate=1.0
--optimizer_type=prodigy
--optimizer_args
weight_decay=1e-04
betas=(0.9,0.999)
eps=1e-08
decouple=True
use_bias_correction=True
safeguard_warmup=True
beta3=None
""".split()

GONE = [old for old, *_ in FAST_CHANGES if old]
NEW = [argument for _, *new in FAST_CHANGES for argument in new]
# The one setting that only fast has, beside its comment.
SAVE_MEMORY = {
    ".sh": """\
BLORA_SAVE_MEMORY="${BLORA_SAVE_MEMORY:-1}"
CHECKPOINTING=()
if [[ "$BLORA_SAVE_MEMORY" == 1 ]]; then CHECKPOINTING=(--gradient_checkpointing); fi
if [[ "$BLORA_SAVE_MEMORY" != [01] ]]; then
  fail "BLORA_SAVE_MEMORY is \\"$BLORA_SAVE_MEMORY\\": give 1 to save memory, or 0 to be faster."
fi

  "${CHECKPOINTING[@]}"
""",
    ".bat": """\
if not defined BLORA_SAVE_MEMORY set "BLORA_SAVE_MEMORY=1"
set "CHECKPOINTING="
if "%BLORA_SAVE_MEMORY%"=="1" set "CHECKPOINTING=--gradient_checkpointing"
if not "%BLORA_SAVE_MEMORY%"=="1" if not "%BLORA_SAVE_MEMORY%"=="0" (
  echo BLORA_SAVE_MEMORY is "%BLORA_SAVE_MEMORY%": give 1 to save memory, or 0 to be faster.>&2
  goto finish
)

  %CHECKPOINTING% ^
""",
}


# How env and bash complain of Windows line ends.
MESSAGES_OF_CRLF = ["'bash\\r': No such file", "syntax error near unexpected token `$'{\\r''"]


@pytest.fixture
def bash() -> Bash:
    if sys.platform == "win32":
        pytest.skip("the .sh launchers are for Linux")
    return Bash()


@pytest.fixture
def bat(cmd) -> Bat:
    return Bat(cmd)


@pytest.fixture(params=["bash", "bat"])
def shell(request) -> Bash | Bat:
    return request.getfixturevalue(request.param)


@dataclass
class Kohya:
    """A kohya folder and the shell that runs launchers in it."""

    shell: Bash | Bat
    path: Path
    log: Path
    env: dict[str, str] = field(default_factory=lambda: dict(SETTINGS))

    def launch(self, name: str, *args: str, cwd: Path | None = None):
        """Run a launcher; hand back how it ended and the calls of accelerate."""
        launcher = self.path / f"{name}{self.shell.suffix}"
        return self.shell.run(launcher, args, cwd or self.path, self.log, self.env)

    def argv(self, name: str, *args: str, cwd: Path | None = None) -> list[str]:
        """What a launcher called accelerate with, after pre-flight was given the same words."""
        done, calls = self.launch(name, *args, cwd=cwd)
        assert (done.returncode, done.output) == (0, "")
        preflight, training = calls
        assert preflight.cwd == training.cwd == self.path
        assert preflight.argv[1:] == ["blora_preflight.py", *training.argv[1:]]
        return training.argv[1:]


@pytest.fixture
def kohya(shell, tmp_path) -> Kohya:
    """An sd-scripts folder with accelerate in its venv, and the checkpoint set."""
    path = make_kohya(tmp_path / "kohya")
    shell.make_venv(path / "venv")
    return Kohya(shell, path, tmp_path / "log")


# ---- The recipes ---------------------------------------------------------------------------------


def test_classic_passes_exactly_the_original_bundles_recipe(kohya):
    assert kohya.argv("sdxl_blora_classic") == [
        "launch",
        "--num_cpu_threads_per_process=8",
        "sdxl_train_network.py",
        *CLASSIC,
    ]


def test_fast_changes_only_these_settings(kohya):
    classic = kohya.argv("sdxl_blora_classic")
    remove_files(kohya.log.parent, kohya.log.name)
    fast = kohya.argv("sdxl_blora_fast")
    assert sorted(fast) == sorted([arg for arg in classic if arg not in GONE] + NEW)
    assert [arg for arg in fast if arg not in NEW] == [arg for arg in classic if arg not in GONE]


@pytest.mark.parametrize("name", NAMES)
def test_every_option_exists_in_sd_scripts_with_that_value_allowed(kohya, name):
    _, _, script, *options = kohya.argv(name)
    assert script == "sdxl_train_network.py"
    parsed = vars(build_parser().parse_args(options))
    preset, *others = parsed["network_args"]
    assert preset == "preset=lycoris_presets/blora_content_style.toml"
    assert others == (["bypass_mode=True"] if name == "sdxl_blora_fast" else [])
    assert parsed["optimizer_args"][-1] == "beta3=None"


# ---- Settings ------------------------------------------------------------------------------------


def test_every_setting_can_come_from_the_environment(kohya):
    kohya.env |= {
        "BLORA_NAME": "cat",
        "BLORA_REVISION": "7",
        "BLORA_RANK": "64",
        "BLORA_PRESET": "lycoris_presets/blora_layout_style.toml",
        "BLORA_ACCELERATE_ARGS": "--multi_gpu --num_processes=2",
    }
    (kohya.path / "_in/lora/sdxl/my_project").rename(kohya.path / "_in/lora/sdxl/cat")
    argv = kohya.argv("sdxl_blora_classic")
    changed = [
        ("my_project/config", "cat/config"),
        ("my_project_1", "cat_7"),
        ("=1024", "=64"),
        ("resolution=64,1024", "resolution=1024,1024"),
        ("blora_content_style", "blora_layout_style"),
    ]
    expected = "\n".join(CLASSIC)
    for old, new in changed:
        expected = expected.replace(old, new)
    assert argv[:4] == [
        "launch",
        "--num_cpu_threads_per_process=8",
        "--multi_gpu",
        "--num_processes=2",
    ]
    assert argv[5:] == expected.split("\n")


def test_a_setting_edited_in_the_file_is_used(kohya):
    del kohya.env["BLORA_CHECKPOINT"]
    file = kohya.path / f"sdxl_blora_fast{kohya.shell.suffix}"
    text = file.read_bytes().decode()
    file.write_bytes(text.replace("path/to/sd_xl_base_1.0.safetensors", CHECKPOINT, 1).encode())
    assert f"--pretrained_model_name_or_path={CHECKPOINT}" in kohya.argv("sdxl_blora_fast")


def test_a_setting_emptied_in_the_file_stays_empty(kohya):
    del kohya.env["BLORA_CHECKPOINT"]
    file = kohya.path / f"sdxl_blora_fast{kohya.shell.suffix}"
    text = file.read_bytes().decode()
    file.write_bytes(text.replace("path/to/sd_xl_base_1.0.safetensors", "", 1).encode())
    argv = kohya.argv("sdxl_blora_fast")
    assert "--pretrained_model_name_or_path=" in argv
    assert "--seed=0" in argv


@pytest.mark.parametrize(("save", "given"), [("1", ["--gradient_checkpointing"]), ("0", [])])
def test_memory_is_saved_unless_that_is_switched_off(kohya, save, given):
    kohya.env["BLORA_SAVE_MEMORY"] = save
    argv = kohya.argv("sdxl_blora_fast")
    assert [argument for argument in argv if "checkpointing" in argument] == given
    expected = options_after_names("sdxl_blora_fast")
    assert argv[7:] == [x for x in expected if given or x != "--gradient_checkpointing"]


@pytest.mark.parametrize("save", ["yes", "10", "0 & 1)"])
def test_another_value_than_1_or_0_is_refused(kohya, save):
    kohya.env["BLORA_SAVE_MEMORY"] = save
    done, calls = kohya.launch("sdxl_blora_fast")
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        f'BLORA_SAVE_MEMORY is "{save}": give 1 to save memory, or 0 to be faster.'
    ]
    assert (done.returncode, calls) == (1, [])


def test_the_names_wsl_and_torch_set_for_themselves_change_nothing(kohya):
    kohya.env |= {"NAME": "DESKTOP-1", "RANK": "0", "REVISION": "r", "PROJECT": "p", "SCRIPT": "s"}
    assert kohya.argv("sdxl_blora_classic")[3:] == CLASSIC


@pytest.mark.parametrize("name", NAMES)
def test_any_folder_name_project_name_and_checkpoint_arrives_whole(shell, tmp_path, name):
    path = make_kohya(tmp_path / ODD / "kohya", name=ODD)
    shell.make_venv(path / "venv")
    checkpoint = tmp_path / f"{ODD}.safetensors"
    checkpoint.touch()
    env = {"BLORA_NAME": ODD, "BLORA_CHECKPOINT": shell.shown(checkpoint)}
    argv = Kohya(shell, path, tmp_path / "log", env).argv(name, cwd=tmp_path)
    shown = shell.shown(checkpoint).replace("\\", "/")
    assert argv[3:7] == [
        f"--pretrained_model_name_or_path={shown}",
        f"--dataset_config=./_in/lora/sdxl/{ODD}/config.toml",
        f"--output_dir=./_out/lora/sdxl/{ODD}_1",
        f"--output_name={ODD}_1",
    ]
    assert argv[7:] == options_after_names(name)


def options_after_names(name: str) -> list[str]:
    """A recipe's arguments after the four that hold the user's own names."""
    if name == "sdxl_blora_classic":
        return CLASSIC[4:]
    swapped = {old: new for old, new, *_ in FAST_CHANGES if old}
    rest = [swapped.get(arg, arg) for arg in CLASSIC[4:]]
    rest.insert(rest.index("--network_args") + 2, "bypass_mode=True")
    rest.insert(rest.index("--save_model_as=safetensors") + 1, "--save_precision=fp16")
    return rest


PATHS = {"BLORA_CHECKPOINT": "--pretrained_model_name_or_path=", "BLORA_PRESET": "preset="}
PASTED = {
    ".bat": [
        ('"D:\\my models\\sdxl & co (1)!"', "D:/my models/sdxl & co (1)!"),
        ("D:\\models\\sdxl\\", "D:/models/sdxl/"),
    ],
    ".sh": [
        ('"/my models/sdxl & co (1)!"', "/my models/sdxl & co (1)!"),
        ("'/my models/it's sdxl'", "/my models/it's sdxl"),
        ("~/my models/sdxl", "/home/zoe & co/my models/sdxl"),
        ('"~/sdxl~/"', "/home/zoe & co/sdxl~/"),
        ("~sdxl/~", "~sdxl/~"),
    ],
}


@pytest.mark.parametrize("setting", PATHS)
@pytest.mark.parametrize("name", NAMES)
def test_a_path_arrives_whole_however_it_was_pasted(kohya, name, setting):
    kohya.env["HOME"] = "/home/zoe & co"
    for pasted, given in PASTED[kohya.shell.suffix]:
        kohya.env[setting] = pasted
        argv = kohya.argv(name)
        assert [arg for arg in argv if arg.startswith(PATHS[setting])] == [PATHS[setting] + given]
        remove_files(kohya.log.parent, kohya.log.name)


@pytest.mark.parametrize("name", NAMES)
def test_whether_preflight_rehearses_reaches_it_from_the_environment(kohya, name):
    kohya.env["BLORA_REHEARSAL"] = ODD
    _, [preflight, _] = kohya.launch(name)
    assert preflight.argv[1] == "blora_preflight.py"
    assert preflight.env["BLORA_REHEARSAL"] == ODD


SHEET_IS_READY = "The sheet is ready. To train, run this again without BLORA_PREVIEW.\n"


@pytest.mark.parametrize(("code", "printed"), [(0, SHEET_IS_READY), (1, ""), (2, "")])
@pytest.mark.parametrize("name", NAMES)
def test_with_a_preview_preflight_runs_and_nothing_is_trained(kohya, name, code, printed):
    kohya.env |= {"BLORA_PREVIEW": f"{ODD}.html", "RECORDER_EXIT_python": str(code)}
    done, [preflight] = kohya.launch(name)
    assert preflight.argv[1] == "blora_preflight.py"
    assert preflight.env["BLORA_PREVIEW"] == f"{ODD}.html"
    assert (done.returncode, done.stdout, done.stderr) == (code, printed, "")


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_preview_is_none_to_a_sh(bash, tmp_path, name):
    """In cmd, set "BLORA_PREVIEW=" takes it away."""
    path = make_kohya(tmp_path / "kohya")
    bash.make_venv(path / "venv")
    assert Kohya(bash, path, tmp_path / "log", SETTINGS | {"BLORA_PREVIEW": ""}).argv(name)


# ---- Where things are ----------------------------------------------------------------------------


def test_the_training_script_of_a_kohya_ss_folder_is_found(shell, tmp_path):
    path = make_kohya(tmp_path / "kohya_ss", gui=True)
    shell.make_venv(path / "venv")
    argv = Kohya(shell, path, tmp_path / "log").argv("sdxl_blora_classic", cwd=tmp_path)
    assert argv[2] == "sd-scripts/sdxl_train_network.py"
    assert argv[3:] == CLASSIC


@pytest.mark.parametrize(
    ("present", "used"),
    [(["venv", ".venv", "active"], "venv"), ([".venv", "active"], ".venv"), (["active"], "active")],
)
def test_venv_is_used_then_dot_venv_then_the_active_environment(shell, tmp_path, present, used):
    path = make_kohya(tmp_path / "kohya")
    programs = {name: shell.make_venv(path / name) for name in present}
    kohya = Kohya(shell, path, tmp_path / "log")
    kohya.env |= shell.path_variable(programs["active"])
    kohya.env["VIRTUAL_ENV"] = shell.shown(path / "active")
    _, calls = kohya.launch("sdxl_blora_classic")
    assert [shell.program_folder(call) for call in calls] == [programs[used]] * 2
    assert [call.env["VIRTUAL_ENV"] for call in calls] == [shell.shown(path / used)] * 2


@pytest.mark.parametrize(
    ("without", "used"), [(["venv"], ".venv"), (["venv", ".venv"], "active")], ids=["one", "both"]
)
@pytest.mark.parametrize("name", NAMES)
def test_a_venv_without_accelerate_does_not_count(shell, tmp_path, name, without, used):
    path = make_kohya(tmp_path / "kohya")
    programs = {folder: shell.make_venv(path / folder) for folder in ["venv", ".venv", "active"]}
    remove_files(path, *(f"{folder}/{shell.accelerate}" for folder in without))
    kohya = Kohya(shell, path, tmp_path / "log")
    kohya.env |= shell.path_variable(programs["active"])
    kohya.env["VIRTUAL_ENV"] = shell.shown(path / "active")
    done, calls = kohya.launch(name)
    assert (done.returncode, done.output) == (0, "")
    assert [shell.program_folder(call) for call in calls] == [programs[used]] * 2
    assert [call.env["VIRTUAL_ENV"] for call in calls] == [shell.shown(path / used)] * 2


# Where accelerate lies, its first lines, and the Python that they start.
ACCELERATES = {
    "by pip": ("other", "#!{python}\n", "usr/python3"),
    "by pip of a version": ("other", "#!{python}\n", "usr/python3.11"),
    "by Debian": ("other", "#!{python} -sP\n", "usr/python3"),
    "by hand": ("other", "#!/usr/bin/env python3\n", "usr/python3"),
    "by pip, with a space": ("my env", '#!/bin/sh\nexec \'{python}\' "$0" "$@"\n', "my env/python"),
    "by pyenv": ("usr", '#!/usr/bin/env bash\nexec \'{python}\' "$0" "$@"\n', "usr/python"),
}


@pytest.mark.parametrize("made", ACCELERATES)
@pytest.mark.parametrize("name", NAMES)
def test_a_sh_runs_preflight_by_the_python_of_accelerate(bash, tmp_path, name, made):
    """Not by the `python` that comes first on PATH."""
    folder, lines, program = ACCELERATES[made]
    path, python = make_kohya(tmp_path / "kohya"), tmp_path / program
    bash.install_recorder(tmp_path / "other", "python")
    bash.install_recorder(python.parent, python.name)
    accelerate = tmp_path / folder / "accelerate"
    accelerate.write_text(lines.format(python=python))
    accelerate.chmod(0o755)
    env = SETTINGS | {"PATH": f"{tmp_path}/other:{python.parent}:{os.defpath}"}
    done, calls = bash.run(path / f"{name}.sh", [], path, tmp_path / "log", env)
    assert (done.returncode, done.output) == (0, "")
    preflight, training = ([Path(word).name for word in call.argv] for call in calls)
    assert [call.argv[0] for call in calls] == [str(python)] * 2
    assert preflight[1:3] == ["blora_preflight.py", "launch"]
    assert "accelerate" in training[1:4]


@pytest.mark.parametrize("name", NAMES)
def test_a_sh_needs_no_python_beside_python3(bash, tmp_path, name):
    path, folder = make_kohya(tmp_path / "kohya"), tmp_path / "bin"
    bash.install_recorder(folder, "python3")
    for tool in ("bash", "env", "dirname", "basename", "mkdir", "ls", "wc"):
        (folder / tool).symlink_to(shutil.which(tool))
    (folder / "accelerate").write_text(f"#!{folder}/python3\n")
    (folder / "accelerate").chmod(0o755)
    env = SETTINGS | {"PATH": str(folder)}
    done, calls = bash.run(path / f"{name}.sh", [], path, tmp_path / "log", env)
    assert (done.returncode, done.output) == (0, "")
    assert [call.argv[0] for call in calls] == [f"{folder}/python3"] * 2


@pytest.mark.parametrize("place", ["beside", "one folder up", "elsewhere on PATH"])
@pytest.mark.parametrize("name", NAMES)
def test_a_bat_runs_preflight_by_the_python_of_accelerate(bat, tmp_path, name, place):
    """In a venv it lies beside, in conda one folder up, and pip --user leaves it where it was."""
    path, env, other = make_kohya(tmp_path / "kohya"), tmp_path / ODD, tmp_path / "other"
    bat.install_recorder(env / "Scripts", "accelerate")
    bat.install_recorder(other, "python")
    folders = {"beside": env / "Scripts", "one folder up": env, "elsewhere on PATH": other}
    bat.install_recorder(folders[place], "python")
    variables = bat.path_variable(env / "Scripts")
    variables["PATH"] = f"{bat.shown(other)};{variables['PATH']}"
    kohya = Kohya(bat, path, tmp_path / "log", SETTINGS | variables)
    done, [preflight, training] = kohya.launch(name)
    assert (done.returncode, done.output) == (0, "")
    assert preflight.argv[0] == bat.shown(folders[place] / "python.exe")
    assert training.argv[0] == bat.shown(env / bat.accelerate)


@pytest.mark.parametrize("name", NAMES)
def test_a_sh_goes_on_in_bash_when_it_is_started_by_sh(bash, tmp_path, name):
    path = make_kohya(tmp_path / ODD)
    bash.make_venv(path / "venv")
    kohya = Kohya(Bash(("sh",)), path, tmp_path / "log")
    assert kohya.argv(name, "--training_comment", ODD)[-2:] == ["--training_comment", ODD]


@pytest.mark.parametrize("started", [[], ["bash"]], ids=["by itself", "by bash"])
@pytest.mark.parametrize("name", NAMES)
def test_windows_line_ends_in_a_sh_give_the_message_of_the_page_and_its_command_removes_them(
    bash, tmp_path, name, started
):
    path = make_kohya(tmp_path / "kohya")
    bash.make_venv(path / "venv")
    launcher = path / f"{name}.sh"
    launcher.write_bytes(launcher.read_bytes().replace(b"\n", b"\r\n"))
    shell = Bash(tuple(started))
    done, calls = shell.run(launcher, [], path, tmp_path / "log", SETTINGS | {"LC_ALL": "C"})
    assert calls == []
    page = (ROOT / "docs/when_something_fails.md").read_text()
    message = MESSAGES_OF_CRLF[len(started)]
    assert message in page
    assert message in done.stderr
    [command] = re.findall(r"`(sed -i .*?)`", page)
    subprocess.run([BASH, "-c", command], cwd=path, check=True)
    assert Kohya(shell, path, tmp_path / "log").argv(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_sh_runs_in_its_own_folder_whatever_cdpath_says(bash, tmp_path, name):
    path = make_kohya(tmp_path / "kohya")
    for folder in (path, make_kohya(tmp_path / "elsewhere/kohya")):
        bash.make_venv(folder / "venv")
    env = SETTINGS | {"CDPATH": str(tmp_path / "elsewhere")}
    relative = Path("kohya") / f"{name}.sh"
    done, calls = bash.run(relative, [], tmp_path, tmp_path / "log", env)
    assert done == Finished(0, "")
    assert [call.cwd for call in calls] == [path] * 2


CALLERS = {
    "from another drive": "cd /d %SYSTEMROOT%",  # which under Wine is on C:, and all else on Z:
    "with delayed expansion": "setlocal EnableDelayedExpansion",
    "without extensions": "setlocal DisableExtensions",  # Wine has them all the same
}


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("name", NAMES)
def test_a_bat_does_the_same_whatever_calls_it(bat, tmp_path, name, caller):
    path = make_kohya(tmp_path / "kohya", name=ODD)
    bat.make_venv(path / "venv")
    lines = f'@{CALLERS[caller]}\n@"{bat.shown(path / name)}.bat"\n'
    (path / "caller.bat").write_text(lines, newline="\r\n")
    argv = Kohya(bat, path, tmp_path / "log", SETTINGS | {"BLORA_NAME": ODD}).argv("caller")
    assert argv[6] == f"--output_name={ODD}_1"
    assert argv[7:] == options_after_names(name)


@pytest.mark.parametrize("earlier", ["", "elsewhere"])
@pytest.mark.parametrize("name", NAMES)
def test_python_finds_a_network_module_of_the_folder_before_any_other(kohya, name, earlier):
    kohya.env |= {"PYTHONPATH": earlier} if earlier else {}
    _, calls = kohya.launch(name)
    shown = kohya.shell.shown(kohya.path)
    expected = f"{shown}{kohya.shell.path_separator}{earlier}" if earlier else shown
    assert [call.env["PYTHONPATH"] for call in calls] == [expected] * 2


# ---- Handing on ----------------------------------------------------------------------------------

OVERRIDES = [
    ["--max_train_steps=10"],
    [
        "--network_args",
        "preset=lycoris_presets/bdora_content_style_clip.toml",
        "dora_wd=True",
        "wd_on_output=False",
    ],
    ["--training_comment", ODD, "--seed=1"],
]


@pytest.mark.parametrize("override", OVERRIDES, ids=["steps", "dora", "odd text"])
@pytest.mark.parametrize("name", NAMES)
def test_what_the_launcher_is_given_is_handed_on_last(kohya, name, override):
    argv = kohya.argv(name, *override)
    assert argv[-len(override) - 1 :] == ["beta3=None", *override]


def test_an_override_wins(kohya):
    _, _, _, *options = kohya.argv("sdxl_blora_fast", *OVERRIDES[0], *OVERRIDES[1])
    parsed: argparse.Namespace = build_parser().parse_args(options)
    assert parsed.max_train_steps == 10
    assert parsed.network_args == OVERRIDES[1][1:]


WITHOUT_WORKERS = [
    ["--max_data_loader_n_workers=0"],
    ["--max_data_loader_n_workers", "0", "--seed=1"],
    ["--optimizer_args", "betas=(0.9,0.999)", "--max_data_loader_n_workers=0"],
    ["--training_comment", ODD, "--output_config", "", "--max_data_loader_n_workers=0"],
]
WITH_WORKERS = [
    ["--max_data_loader_n_workers=04"],
    ["--max_data_loader_n_workers", "8", "--seed", "0"],
    ["--seed=0", "--training_comment", "--max_data_loader_n_workers", "--lr_warmup_steps=0"],
]


@pytest.mark.parametrize("override", [*WITHOUT_WORKERS, *WITH_WORKERS], ids=" ".join)
@pytest.mark.parametrize("name", NAMES)
def test_workers_persist_unless_there_are_none(kohya, name, override):
    argv = kohya.argv(name, *override)
    expected = options_after_names(name)
    if override in WITHOUT_WORKERS:
        expected.remove("--persistent_data_loader_workers")
    assert argv[7:] == [*expected, *override]


@pytest.mark.parametrize("name", NAMES)
def test_a_bat_sees_that_there_are_no_workers_inside_quote_marks_too(bat, tmp_path, name):
    path = make_kohya(tmp_path / "kohya")
    bat.make_venv(path / "venv")
    line = f'@"{bat.shown(path / name)}.bat" "--max_data_loader_n_workers=0"\n'
    (path / "caller.bat").write_text(line, newline="\r\n")
    argv = Kohya(bat, path, tmp_path / "log").argv("caller")
    assert argv[-1] == "--max_data_loader_n_workers=0"
    assert "--persistent_data_loader_workers" not in argv


@pytest.mark.parametrize("code", [0, 1, 7])
@pytest.mark.parametrize("name", NAMES)
def test_the_exit_code_of_the_training_is_the_launchers(kohya, name, code):
    kohya.env["RECORDER_EXIT_accelerate"] = str(code)
    done, calls = kohya.launch(name)
    assert (done.returncode, len(calls)) == (code, 2)


@pytest.mark.parametrize("code", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_trained_where_preflight_refuses(kohya, name, code):
    kohya.env["RECORDER_EXIT_python"] = str(code)
    done, calls = kohya.launch(name)
    assert done.returncode == code
    assert [call.argv[1] for call in calls] == ["blora_preflight.py"]


# ---- Refusals ------------------------------------------------------------------------------------

REFUSALS = {
    "no training script": (
        ["sdxl_train_network.py"],
        'No sdxl_train_network.py in "{folder}" or its sd-scripts folder: copy the B-LoRA files '
        "into a kohya sd-scripts or kohya_ss folder.",
    ),
    "no accelerate": (
        ["venv"],
        "No accelerate in venv, .venv or the active environment: install kohya's requirements, "
        "or activate the environment that has them.",
    ),
}


NO_PYTHON = (
    'No Python found that runs "{}": make its environment again, with kohya\'s requirements.'
)


@pytest.mark.parametrize("refusal", REFUSALS)
@pytest.mark.parametrize("name", NAMES)
def test_a_refusal_is_one_sentence_and_exit_1_before_anything_starts(kohya, name, refusal):
    missing, sentence = REFUSALS[refusal]
    remove_files(kohya.path, *missing)
    done, calls = kohya.launch(name)
    expected = sentence.format(folder=kohya.shell.shown(kohya.path))
    assert (done.stdout, done.stderr.splitlines()) == ("", [expected])
    assert (done.returncode, calls) == (1, [])


@pytest.mark.parametrize("name", NAMES)
def test_without_the_python_of_accelerate_it_says_so_in_one_sentence(kohya, name):
    remove_files(kohya.path, f"venv/{kohya.shell.python}")
    done, calls = kohya.launch(name)
    accelerate = kohya.shell.shown(kohya.path / "venv" / kohya.shell.accelerate)
    assert (done.stdout, done.stderr.splitlines()) == ("", [NO_PYTHON.format(accelerate)])
    assert (done.returncode, calls) == (1, [])


@pytest.mark.parametrize("name", NAMES)
def test_a_sh_says_so_too_where_the_python_that_accelerate_names_is_gone(bash, tmp_path, name):
    path = make_kohya(tmp_path / "kohya")
    accelerate = bash.make_venv(path / "venv") / "accelerate"
    accelerate.write_text(f"#!{tmp_path}/moved/bin/python3\n")
    done, calls = bash.run(path / f"{name}.sh", [], path, tmp_path / "log", SETTINGS)
    assert (done.stdout, done.stderr) == ("", NO_PYTHON.format(accelerate) + "\n")
    assert (done.returncode, calls) == (1, [])


@pytest.mark.parametrize("code", [0, 7])
@pytest.mark.parametrize("name", NAMES)
def test_a_bat_waits_for_a_key_only_when_it_was_double_clicked(bat, tmp_path, name, code):
    path = make_kohya(tmp_path / ODD)
    bat.make_venv(path / "venv")
    env = SETTINGS | {"RECORDER_EXIT_accelerate": str(code)}
    clicked = bat.double_click(path / f"{name}.bat", [], tmp_path / "log", env)
    assert "Press any key" in clicked.stdout
    assert clicked.returncode == code
    typed, _ = bat.run(path / f"{name}.bat", [], path, tmp_path / "log", env)
    assert (typed.returncode, typed.output) == (code, "")


# ---- The twins -----------------------------------------------------------------------------------


# What only one of the twins has to say.
ONE_TWIN = {
    ".sh": """\
sh cannot read the rest: started as "sh NAME.sh", it goes on in bash.
Change only what is between :- and }, and put no spaces around the =. For example:
  BLORA_CHECKPOINT="${BLORA_CHECKPOINT:-~/my models/sdxl.safetensors}"
A path may have been pasted with quote marks around it, or start at the home folder.
The first line of accelerate names it. If that is a shell, because the path is long or has a
space, Python is beside it.
""".splitlines(),
    ".bat": """\
Change only what is between = and ", and put no spaces around the =. For example:
  if not defined BLORA_CHECKPOINT set "BLORA_CHECKPOINT=D:\\my models\\sdxl.safetensors"
Delete the quote marks around a path that you paste: with an & in it, they break the line.
A path copied from Explorer has quote marks, and a \\ at its end would swallow the next one. Of an
empty setting cmd would make the text "=.
It is beside accelerate in a venv, and one folder up in conda. pip --user puts accelerate into
a folder without one.
cmd splits an option at its =, unless there are quote marks around it. One empty text is no end.
A double-click opens a window of its own that closes with the last line: hold it open.
""".splitlines(),
}


@pytest.mark.parametrize("name", NAMES)
def test_the_twins_read_as_the_same_file(name):
    both = {suffix: outline(ROOT / f"{name}{suffix}") for suffix in ONE_TWIN}
    for suffix, lines in both.items():
        own = [line.replace("NAME", name) for line in ONE_TWIN[suffix]]
        assert set(own) <= set(lines)
        both[suffix] = [line for line in lines if line not in own]
    assert both[".sh"] == both[".bat"]
    assert len(both[".sh"]) > 50


@pytest.mark.parametrize("suffix", [".sh", ".bat"])
def test_fast_is_classic_but_for_its_recipe_and_its_comments(suffix):
    classic, fast = (
        (ROOT / f"{name}{suffix}").read_text().replace(name, "NAME").splitlines() for name in NAMES
    )
    changed = [
        f"{line[0]} {line[2:].strip(' ^')}"
        for line in difflib.ndiff(classic, fast)
        if line.startswith(("- ", "+ ")) and not line[2:].startswith(("# ", "rem "))
    ]
    for line in SAVE_MEMORY[suffix].splitlines():
        changed.remove(f"+ {line.strip(' ^')}")
    recipe = [f"- {old}" for old in [*GONE, "--gradient_checkpointing"]] + [f"+ {n}" for n in NEW]
    assert sorted(line.replace('"', "") for line in changed) == sorted(recipe)


@pytest.mark.parametrize("file", sorted(path.name for path in ROOT.glob("*.bat")))
def test_a_bat_is_ascii_with_windows_line_ends_and_no_bom(file):
    content = (ROOT / file).read_bytes()
    assert content.isascii()
    assert content.endswith(b"\r\n")
    assert content.count(b"\n") == content.count(b"\r\n") == content.count(b"\r")
