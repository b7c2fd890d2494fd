"""What the launchers promise, in bash and in cmd.exe alike.

A case runs both twins in a throw-away kohya folder whose pre-flight and accelerate record how they
are called. test_launch.py reads launchers without a shell.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cmd_runner import Finished
from kohya_folder import CHECKPOINT, ROOT, Bash, Bat, make_kohya, remove_files
from recipes import CLASSIC, FAST

pytestmark = pytest.mark.shell
NAMES = ["sdxl_blora_classic", "sdxl_blora_fast"]
# A name that every shell would like to split, expand or end early.
ODD = "Zoe & co (1) it's! 50^"
SETTINGS = {"BLORA_CHECKPOINT": CHECKPOINT}
START = ["launch", "--num_cpu_threads_per_process=8"]


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

    def launcher(self, name: str) -> Path:
        return self.path / f"{name}{self.shell.suffix}"

    def launch(self, name: str, *args: str, cwd: Path | None = None):
        """Run a launcher; hand back how it ended, and the calls of pre-flight and accelerate."""
        return self.shell.run(self.launcher(name), args, cwd or self.path, self.log, self.env)

    def argv(self, name: str, *args: str, cwd: Path | None = None) -> list[str]:
        """What a launcher called accelerate with, after pre-flight was given the same words."""
        done, calls = self.launch(name, *args, cwd=cwd)
        assert (done.returncode, done.output) == (0, "")
        preflight, training = calls
        assert preflight.cwd == training.cwd == self.path
        assert preflight.argv[1:] == ["blora_preflight.py", *training.argv[1:]]
        return training.argv[1:]

    def with_line(
        self, old: str, new: str, copy: str = "my copy", name: str = "sdxl_blora_fast"
    ) -> str:
        """A copy of a launcher with another line in place of the one that is `old`; its name."""
        lines = self.launcher(name).read_bytes().splitlines()
        changed = [new.encode() if line == old.encode() else line for line in lines]
        assert lines != changed
        self.launcher(copy).write_bytes(b"\r\n".join([*changed, b""]))
        if self.shell.suffix == ".sh":
            self.launcher(copy).chmod(0o755)
        return copy


@pytest.fixture
def kohya(shell, tmp_path) -> Kohya:
    """An sd-scripts folder with accelerate in its venv, and the checkpoint set."""
    path = make_kohya(tmp_path / "kohya")
    shell.make_venv(path / "venv")
    return Kohya(shell, path, tmp_path / "log")


# ---- The recipes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "recipe"), [(NAMES[0], CLASSIC), (NAMES[1], FAST)])
def test_a_launcher_passes_exactly_its_recipe(kohya, name, recipe):
    assert kohya.argv(name) == [*START, "sdxl_train_network.py", *recipe]


def test_a_launcher_of_version_1_still_passes_its_recipe(kohya):
    shutil.copy(ROOT / f"tests/data/version_1/sdxl_blora_fast{kohya.shell.suffix}", kohya.path)
    assert kohya.argv("sdxl_blora_fast") == [*START, "sdxl_train_network.py", *FAST]


def test_any_folder_name_project_name_and_checkpoint_arrives_whole(shell, tmp_path):
    path = make_kohya(tmp_path / ODD / "kohya", name=ODD)
    shell.make_venv(path / "venv")
    checkpoint = tmp_path / f"{ODD}.safetensors"
    checkpoint.touch()
    env = {"BLORA_NAME": ODD, "BLORA_CHECKPOINT": shell.shown(checkpoint)}
    argv = Kohya(shell, path, tmp_path / "log", env).argv("sdxl_blora_fast", cwd=tmp_path)
    shown = shell.shown(checkpoint).replace("\\", "/")
    assert argv[3:7] == [
        f"--pretrained_model_name_or_path={shown}",
        f"--dataset_config=./_in/lora/sdxl/{ODD}/config.toml",
        f"--output_dir=./_out/lora/sdxl/{ODD}_1",
        f"--output_name={ODD}_1",
    ]
    assert argv[7:] == FAST[4:]


# ---- Settings ------------------------------------------------------------------------------------


def test_a_setting_of_the_environment_wins_for_one_run(kohya):
    kohya.env |= {
        "BLORA_NAME": "cat",
        "BLORA_REVISION": "7",
        "BLORA_RANK": "64",
        "BLORA_PRESET": "lycoris_presets/blora_layout_style.toml",
        "BLORA_SAVE_MEMORY": "0",
        "BLORA_ACCELERATE_ARGS": "--multi_gpu --num_processes=2",
    }
    argv = kohya.argv(kohya.with_line("BLORA_RANK=1024", "BLORA_RANK=8"))
    changed = {"my_project/config": "cat/config", "my_project_1": "cat_7", "dim=1024": "dim=64"}
    changed |= {"alpha=1024": "alpha=64", "blora_content_style": "blora_layout_style"}
    expected = "\n".join(word for word in FAST if word != "--gradient_checkpointing")
    for old, new in changed.items():
        expected = expected.replace(old, new)
    assert argv[:4] == [*START, "--multi_gpu", "--num_processes=2"]
    assert argv[5:] == expected.split("\n")


UNSET = "BLORA_CHECKPOINT=path/to/sd_xl_base_1.0.safetensors"
# What people paste behind BLORA_CHECKPOINT=, and what has to arrive.
PASTED = {
    "an apostrophe": ("/my models/it's sdxl", "/my models/it's sdxl"),
    "a dollar": ("/a$b/$/sdxl", "/a$b/$/sdxl"),
    "a backtick": ("/a`b`c", "/a`b`c"),
    "braces": ("/a{b}c}", "/a{b}c}"),
    "a percent sign": ("/50% real/100%/%a", "/50% real/100%/%a"),
    "an exclamation mark": ("/wow!/!x!", "/wow!/!x!"),
    "an ampersand and a caret": ("/a & b ^ c^", "/a & b ^ c^"),
    "signs of redirection": ("/<a> | (b) ;c", "/<a> | (b) ;c"),
    "a hash": ("/models #1/sdxl", "/models #1/sdxl"),
    "other letters": ("/m\u00fcller/\u65e5\u672c", "/m\u00fcller/\u65e5\u672c"),
    "quote marks": ('"/a & b/sdxl"', "/a & b/sdxl"),
    "single quote marks": ("'/my models/it's sdxl'", "/my models/it's sdxl"),
    "curly quote marks": ("\u201c/a b/sdxl\u201d", "/a b/sdxl"),
    "an unclosed quote mark": ('"/a b/sdxl', "/a b/sdxl"),
    "a quote mark never opened": ('/a b/sdxl"', "/a b/sdxl"),
    "blanks and tabs around it": (" \t/a b/sdxl \t ", "/a b/sdxl"),
    "blanks inside quote marks": ('" /a b/sdxl "', "/a b/sdxl"),
    "a carriage return": ("/a b/sdxl\r", "/a b/sdxl"),
}


@pytest.mark.parametrize("pasted", PASTED)
def test_a_path_arrives_whole_however_it_was_pasted(kohya, pasted):
    typed, arrives = PASTED[pasted]
    kohya.env.clear()
    argv = kohya.argv(kohya.with_line(UNSET, f"BLORA_CHECKPOINT={typed}"))
    assert argv[3] == f"--pretrained_model_name_or_path={arrives}"
    assert argv[4:] == FAST[1:]


SAVED = {
    "with Windows line ends": lambda text: text.replace("\n", "\r\n").encode(),
    "with Unix line ends": lambda text: text.encode(),
    "as UTF-8 with a byte order mark": lambda text: text.encode("utf-8-sig"),
}


@pytest.mark.parametrize("saved", SAVED)
def test_a_launcher_runs_however_an_editor_saved_it(kohya, saved):
    file = kohya.launcher("sdxl_blora_fast")
    text = file.read_text(encoding="utf-8").replace("my_project", "caf\u00e9")
    file.write_bytes(SAVED[saved](text))
    if kohya.shell.suffix == ".sh":
        kohya.shell = Bash(("bash",) if "byte order" in saved else ())
    done, [_, training] = kohya.launch("sdxl_blora_fast")
    assert "--output_name=caf\u00e9_1" in training.argv
    assert training.argv[8:] == FAST[4:]
    # To a shell the mark belongs to the first command, which it then does not know.
    noise = "byte order" in saved
    assert (done.returncode, bool(done.output)) == (0, noise)


def test_a_sh_in_utf_16_gives_the_message_of_the_page(bash, tmp_path):
    file = make_kohya(tmp_path / "kohya") / "sdxl_blora_fast.sh"
    file.write_bytes(file.read_text().encode("utf-16"))
    done, calls = Bash(("bash",)).run(file, [], file.parent, tmp_path / "log", {"LC_ALL": "C"})
    message = "cannot execute binary file"
    assert message in done.stderr
    assert message in (ROOT / "docs/when_something_fails.md").read_text(encoding="utf-8")
    assert (done.returncode, calls) == (126, [])


def test_a_wrong_line_is_named_and_nothing_starts(kohya):
    done, calls = kohya.launch(kohya.with_line("BLORA_RANK=1024", "BLORA_RANK=64.0"))
    line = {".sh": 19, ".bat": 21}[kohya.shell.suffix]
    sentence = f'error: BLORA_RANK is "64.0" in line {line} of my copy{kohya.shell.suffix}: '
    assert done.stderr == f"{sentence}give a whole number, such as 64\n"
    assert (done.returncode, done.stdout, calls) == (1, "", [])


def test_ones_own_commands_and_variables_reach_the_training(kohya):
    first = {".sh": "#!/usr/bin/env -S bash #", ".bat": "@echo off"}[kohya.shell.suffix]
    command = {".sh": "export MINE=1 #", ".bat": "set MINE=1"}[kohya.shell.suffix]
    copy = kohya.with_line(first, f"{first}\r\n{command}")
    copy = kohya.with_line("BLORA_RANK=1024", "CUDA_VISIBLE_DEVICES=2\r\nBLORA_RANK=8", copy, copy)
    _, [_, training] = kohya.launch(copy)
    assert "--network_dim=8" in training.argv
    assert (training.env["MINE"], training.env["CUDA_VISIBLE_DEVICES"]) == ("1", "2")


# ---- Pre-flight ----------------------------------------------------------------------------------

STOPS = {
    "BLORA_PREVIEW": ("sheet & co.html", "The sheet is ready. To train, run this again without "),
    "BLORA_CHECK_ONLY": ("1", "Nothing was trained. To train, set "),
}


@pytest.mark.parametrize("setting", STOPS)
def test_a_setting_stops_it_after_preflight(kohya, setting):
    value, sentence = STOPS[setting]
    kohya.env |= {setting: value, "BLORA_REHEARSAL": ODD}
    done, [preflight] = kohya.launch("sdxl_blora_fast")
    assert (preflight.env[setting], preflight.env["BLORA_REHEARSAL"]) == (value, ODD)
    assert done.stdout.startswith(sentence + setting)
    assert (done.returncode, done.stdout.count("\n"), done.stderr) == (0, 1, "")


@pytest.mark.parametrize("code", [1, 2])
def test_nothing_is_trained_where_preflight_refuses(kohya, code):
    kohya.env |= {"RECORDER_EXIT_preflight": str(code), "BLORA_CHECK_ONLY": "1"}
    done, [_] = kohya.launch("sdxl_blora_fast")
    assert (done.returncode, done.output) == (code, "")


@pytest.mark.parametrize("code", [0, 1, 7])
def test_the_exit_code_of_the_training_is_the_launchers(kohya, code):
    kohya.env["RECORDER_EXIT_accelerate"] = str(code)
    done, calls = kohya.launch("sdxl_blora_fast")
    assert (done.returncode, len(calls)) == (code, 2)


# ---- Where things are ----------------------------------------------------------------------------


def test_the_training_script_of_a_kohya_ss_folder_is_found(shell, tmp_path):
    path = make_kohya(tmp_path / "kohya_ss", gui=True)
    shell.make_venv(path / "venv")
    argv = Kohya(shell, path, tmp_path / "log").argv("sdxl_blora_classic", cwd=tmp_path)
    assert argv[2:] == ["sd-scripts/sdxl_train_network.py", *CLASSIC]


# The environments there are, those of them without accelerate, and the one that counts.
ENVIRONMENTS = [
    (["venv", ".venv", "active"], [], "venv"),
    ([".venv", "active"], [], ".venv"),
    (["active"], [], "active"),
    (["venv", ".venv", "active"], ["venv"], ".venv"),
    (["venv", ".venv", "active"], ["venv", ".venv"], "active"),
]


@pytest.mark.parametrize(("present", "without", "used"), ENVIRONMENTS)
def test_venv_counts_then_dot_venv_then_the_active_one(shell, tmp_path, present, without, used):
    path = make_kohya(tmp_path / "kohya")
    programs = {name: shell.make_venv(path / name) for name in present}
    remove_files(path, *(f"{folder}/{shell.accelerate}" for folder in without))
    kohya = Kohya(shell, path, tmp_path / "log")
    kohya.env |= shell.path_variable(programs["active"])
    kohya.env["VIRTUAL_ENV"] = shell.shown(path / "active")
    done, calls = kohya.launch("sdxl_blora_fast")
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
def test_a_sh_goes_on_by_the_python_of_accelerate(bash, tmp_path, made):
    """Not by the `python` that comes first on PATH, and where there is none beside python3."""
    folder, lines, program = ACCELERATES[made]
    path, python = make_kohya(tmp_path / "kohya"), tmp_path / program
    bash.install_recorder(tmp_path / "other", "python")
    bash.install_recorder(python.parent, python.name)
    (tmp_path / "tools").mkdir()
    for tool in ("bash", "env", "dirname", "mkdir", "ls", "wc"):
        (tmp_path / "tools" / tool).symlink_to(shutil.which(tool))
    accelerate = tmp_path / folder / "accelerate"
    accelerate.write_text(lines.format(python=python))
    accelerate.chmod(0o755)
    env = SETTINGS | {"PATH": f"{tmp_path}/other:{python.parent}:{tmp_path}/tools"}
    done, [call] = bash.run(path / "sdxl_blora_fast.sh", ["x"], path, tmp_path / "log", env)
    assert (done.returncode, done.output, call.cwd) == (0, "", path)
    assert call.argv == [str(python), "-m", "blora.launch", "sdxl_blora_fast.sh", "x"]


@pytest.mark.parametrize("place", ["beside", "one folder up", "elsewhere on PATH"])
def test_a_bat_goes_on_by_the_python_of_accelerate(bat, tmp_path, place):
    """In a venv it lies beside, in conda one folder up, and pip --user leaves it where it was."""
    path, env, other = make_kohya(tmp_path / "kohya"), tmp_path / ODD, tmp_path / "other"
    bat.install_recorder(env / "Scripts", "accelerate")
    bat.install_recorder(other, "python")
    folders = {"beside": env / "Scripts", "one folder up": env, "elsewhere on PATH": other}
    bat.install_recorder(folders[place], "python")
    variables = bat.path_variable(env / "Scripts")
    variables["PATH"] = f"{bat.shown(other)};{variables['PATH']}"
    done, [call] = Kohya(bat, path, tmp_path / "log", variables).launch("sdxl_blora_fast", "x")
    assert (done.returncode, done.output, call.cwd) == (0, "", path)
    launcher = bat.shown(path / "sdxl_blora_fast.bat")
    python = bat.shown(folders[place] / "python.exe")
    assert call.argv == [python, "-m", "blora.launch", launcher, "x"]


@pytest.mark.parametrize("started", ["sh", "bash"])
def test_a_sh_runs_in_any_shell_and_in_its_own_folder_whatever_cdpath_says(bash, tmp_path, started):
    path = make_kohya(tmp_path / "kohya")
    for folder in (path, make_kohya(tmp_path / "elsewhere/kohya")):
        bash.make_venv(folder / "venv")
    env = SETTINGS | {"CDPATH": str(tmp_path / "elsewhere")}
    args = ["--training_comment", ODD]
    relative = Path("kohya/sdxl_blora_fast.sh")
    done, calls = Bash((started,)).run(relative, args, tmp_path, tmp_path / "log", env)
    assert done == Finished(0, "")
    assert [call.cwd for call in calls] == [path] * 2
    assert calls[1].argv[-2:] == args


CALLERS = {
    "from another drive": "cd /d %SYSTEMROOT%",  # which under Wine is on C:, and all else on Z:
    "with delayed expansion": "setlocal EnableDelayedExpansion",
    "without extensions": "setlocal DisableExtensions",  # Wine has them all the same
}


@pytest.mark.parametrize("caller", CALLERS)
def test_a_bat_does_the_same_whatever_calls_it(bat, tmp_path, caller):
    path = make_kohya(tmp_path / "wow!x!" / "kohya", name=ODD)
    bat.make_venv(path / "venv")
    # What a caller itself expands would lose the exclamation marks.
    folder = f"{bat.shown(path)}\\" if "drive" in caller else ""
    lines = f'@{CALLERS[caller]}\n@"{folder}sdxl_blora_fast.bat" "--seed=1" --x=2\n'
    (path / "caller.bat").write_text(lines, newline="\r\n")
    argv = Kohya(bat, path, tmp_path / "log", SETTINGS | {"BLORA_NAME": ODD}).argv("caller")
    assert argv[6:] == [f"--output_name={ODD}_1", *FAST[4:], "--seed=1", "--x=2"]


@pytest.mark.parametrize("earlier", ["", "elsewhere"])
def test_python_finds_a_network_module_of_the_folder_before_any_other(kohya, earlier):
    kohya.env |= {"PYTHONPATH": earlier} if earlier else {}
    _, calls = kohya.launch("sdxl_blora_fast")
    shown = kohya.shell.shown(kohya.path)
    expected = f"{shown}{kohya.shell.path_separator}{earlier}" if earlier else shown
    assert [call.env["PYTHONPATH"] for call in calls] == [expected] * 2


def test_what_the_launcher_is_given_is_handed_on_last(kohya):
    dora = ["--network_args", "preset=a.toml", "dora_wd=True"]
    override = ["--max_train_steps=10", "--training_comment", ODD, "--output_config", "", *dora]
    assert kohya.argv("sdxl_blora_fast", *override)[3:] == [*FAST, *override]


# ---- Refusals ------------------------------------------------------------------------------------

# What is missing, and what is said.
REFUSALS = {
    "sdxl_train_network.py": (
        'No sdxl_train_network.py in "{folder}" or its sd-scripts folder: copy the B-LoRA files '
        "into a kohya sd-scripts or kohya_ss folder."
    ),
    "venv": (
        "No accelerate in venv, .venv or the active environment: install kohya's requirements, "
        "or activate the environment that has them."
    ),
    "{python}": (
        'No Python found that runs "{accelerate}": make its environment again, with kohya\'s '
        "requirements."
    ),
}


@pytest.mark.parametrize("missing", REFUSALS)
def test_a_refusal_is_one_sentence_and_exit_1_before_anything_starts(kohya, missing):
    venv, shell = kohya.path / "venv", kohya.shell
    remove_files(kohya.path, missing.format(python=f"venv/{shell.python}"))
    done, calls = kohya.launch("sdxl_blora_fast")
    accelerate = shell.shown(venv / shell.accelerate)
    expected = REFUSALS[missing].format(folder=shell.shown(kohya.path), accelerate=accelerate)
    assert (done.stdout, done.stderr.splitlines()) == ("", [expected])
    assert (done.returncode, calls) == (1, [])


def test_a_sh_says_so_too_where_the_python_that_accelerate_names_is_gone(bash, tmp_path):
    path = make_kohya(tmp_path / "kohya")
    accelerate = bash.make_venv(path / "venv") / "accelerate"
    accelerate.write_text(f"#!{tmp_path}/moved/bin/python3\n")
    done, calls = bash.run(path / "sdxl_blora_fast.sh", [], path, tmp_path / "log", SETTINGS)
    sentence = REFUSALS["{python}"].format(accelerate=accelerate)
    assert (done.stdout, done.stderr) == ("", f"{sentence}\n")
    assert (done.returncode, calls) == (1, [])


def test_a_copy_apart_from_the_blora_folder_says_what_is_missing(kohya):
    shutil.rmtree(kohya.path / "blora")
    done, calls = kohya.launch("sdxl_blora_fast")
    wanted = {".sh": "blora/launch.sh: No such file", ".bat": 'No blora folder beside "'}
    assert wanted[kohya.shell.suffix] in done.output
    assert done.returncode in (1, 127)
    assert calls == []


@pytest.mark.parametrize("code", [0, 7])
def test_a_bat_waits_for_a_key_only_when_it_was_double_clicked(bat, tmp_path, code):
    path = make_kohya(tmp_path / ODD)
    bat.make_venv(path / "venv")
    env = SETTINGS | {"RECORDER_EXIT_accelerate": str(code)}
    clicked = bat.double_click(path / "sdxl_blora_fast.bat", [], tmp_path / "log", env)
    assert "Press any key" in clicked.stdout
    assert clicked.returncode == code
    typed, _ = bat.run(path / "sdxl_blora_fast.bat", [], path, tmp_path / "log", env)
    assert (typed.returncode, typed.output) == (code, "")


# ---- The files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_twins_are_the_same_text_below_the_lines_that_start_them(name):
    heads, texts = zip(
        *((ROOT / f"{name}{s}").read_text().split("\n\n", 1) for s in (".sh", ".bat")), strict=True
    )
    assert texts[0] == texts[1]
    assert [len(head.splitlines()) for head in heads] == [2, 4]


@pytest.mark.parametrize("suffix", [".sh", ".bat"])
def test_all_launchers_start_alike(suffix):
    first, second = ((ROOT / f"{name}{suffix}").read_text().split("\n\n")[0] for name in NAMES)
    assert first == second


@pytest.mark.parametrize("file", sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("**/*.bat")))
def test_a_bat_is_ascii_with_windows_line_ends_and_no_bom(file):
    content = (ROOT / file).read_bytes()
    assert content.isascii()
    assert content.endswith(b"\r\n")
    assert content.count(b"\n") == content.count(b"\r\n") == content.count(b"\r")
