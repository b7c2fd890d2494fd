"""The lines of docs/rented_machine.md are run in its order, in two throw-away homes.

What cannot be had in a test has something in its place, by SUBSTITUTES; what is none of these is
run as it is.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bundle_files import unpack
from kohya_folder import CHECKPOINT_TABLE, ONE_PROCESS, ROOT, copy_command
from make_dataset import main as make_dataset
from readme_commands import blocks_of, check_launcher
from safetensors import safe_open
from safetensors.numpy import load_file
from sdxl_checkpoint import sdxl_shapes, write_checkpoint

linux = pytest.mark.skipif(sys.platform != "linux", reason="the page is for Linux")
pytestmark = [pytest.mark.slow, linux]
LINES = "".join(blocks_of("rented_machine", "bash")).splitlines()
TIME_LIMIT = "300"  # seconds; all of it takes 40
LORA = "_out/lora/sdxl/my_project_1/my_project_1.safetensors"
# The tests' own packages, where pip would fetch the page's.
LEND = """\
echo "$SITE" >"$(echo venv/lib/python*/site-packages)/lent.pth"
sed "1s|.*|#!$PWD/venv/bin/python|" "$PROGRAMS/accelerate" >venv/bin/accelerate
chmod +x venv/bin/accelerate"""
SUBSTITUTES = {
    r"apt-get .*": "",
    r"tmux .*": "",
    r"ssh root@<address>": "",
    r"ls -d .*-state": "",  # the stand-in saves none
    r"git clone --branch v0\.11\.1 \S+/kohya-ss/sd-scripts (~/sd-scripts)": r'cp -r "$STANDIN" \1',
    r"git clone <this repository> (~/blora)": r'cp -r "$BUNDLE" \1',
    r"pip install torch==.*": LEND,
    r"pip install .*": "",
    r"hf download \S+ (\S+) --local-dir (\S+)": r'mkdir \2 && cp "$CHECKPOINT" \2/\1',
    r"scp -r (\w+) root@<address>:(\S+)": r'cp -r "$AT_HOME"/\1 ~/\2',
    r'scp "root@<address>:(\S+)" \.': r'cp ~/\1 "$AT_HOME"',
    # As they are, but for what takes a CPU too long.
    r"(cp blora_dataset\.toml )(\S+)": r"\1\2 && sed -i 's/= 1024$/= 64/' \2",
    r"(\./sdxl_blora_fast\.sh --save_state)( 2>&1 .*)": r"\1 --max_train_steps=2\2",
    r"(\./sdxl_blora_fast\.sh) --max_train_steps=10": r"\1 --max_train_steps=2",
    r".* --resume=.*": "",  # nor goes on from one
}


def as_run(line: str) -> str:
    """The line, or what is run in its place."""
    for pattern, substitute in SUBSTITUTES.items():
        if match := re.fullmatch(pattern, line):
            return match.expand(substitute)
    return line


def test_the_page_leads_from_nothing_to_slices_at_home(tmp_path):
    # The rented machine's home, that of the person, and what stands in for downloads.
    places = {name: tmp_path / name for name in ("HOME", "AT_HOME", "STANDIN", "CHECKPOINT")}
    places["HOME"].mkdir()
    make_dataset([str(places["AT_HOME"])])
    shutil.copytree(ROOT / "tests/standin", places["STANDIN"])
    for name in ("tests/data/sdxl_train_network_options.json", CHECKPOINT_TABLE):
        shutil.copy(ROOT / name, places["STANDIN"])
    write_checkpoint(places["CHECKPOINT"], sdxl_shapes())
    places["BUNDLE"] = unpack(tmp_path / "BUNDLE")
    places |= {"SITE": Path(pytest.__file__).parents[1], "PROGRAMS": Path(sys.executable).parent}
    env = {name: text for name, text in os.environ.items() if not name.startswith("BLORA_")}
    env |= {name: str(place) for name, place in places.items()}
    # A CPU and wide enough toys, in place of a card.
    env |= {"BLORA_ACCELERATE_ARGS": ONE_PROCESS, "TOY_REAL_ATTENTION": "1"}
    script = "\n".join(["exec 2>&1 </dev/null", "set -e", *map(as_run, LINES)])
    # It ends all that the shell has started.
    command = ["timeout", TIME_LIMIT, "bash", "-c", script]
    done = subprocess.run(command, cwd=places["HOME"], env=env, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stdout
    kohya, home = places["HOME"] / "sd-scripts", places["AT_HOME"]
    trained = {key.split(".")[1] for key in load_file(kohya / LORA)}
    assert trained == {"alpha", "lora_down", "lora_up"}
    with safe_open(kohya / LORA, "pt") as file:
        assert file.metadata()["ss_num_train_images"] == "6"
    log = (kohya / "train.log").read_text()
    assert log.endswith("ended with 0\n")
    assert "steps: 100%" in log
    # The short test has left a LoRA of the name.
    overwritten = f'warning: "{LORA}" exists and will be overwritten'
    assert "warning: " not in log.replace(overwritten, "").replace("1 warning: see above", "")
    for trait in ("content", "style"):
        kept = load_file(home / f"my_project_{trait}.safetensors")
        assert len({key.split(".")[0] for key in kept}) == 80


def test_a_training_that_fails_says_so_in_the_log(tmp_path):
    [at] = [number for number, line in enumerate(LINES) if "| tee train.log" in line]
    assert LINES[at - 1] == "set -o pipefail"
    launcher, script = tmp_path / "sdxl_blora_fast.sh", "\n".join(LINES[at - 1 : at + 1])
    launcher.write_text("exit 3\n")
    launcher.chmod(0o755)
    subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, check=True)
    assert (tmp_path / "train.log").read_text() == "ended with 3\n"


def test_its_install_command_is_the_readmes():
    assert copy_command().replace('"<kohya folder>/"', "~/sd-scripts/") in LINES


def test_every_line_that_starts_the_launcher_has_options_of_sd_scripts():
    launching = [line for line in LINES if "./sdxl_" in line]
    assert len(launching) == 3
    for line in launching:
        check_launcher(line.partition(" 2>&1")[0])


def test_a_person_types_no_placeholder_but_the_named_ones():
    assert set(re.findall(r"<[^>]+>", "\n".join(LINES))) == {"<address>", "<this repository>"}


def test_every_substitute_stands_for_a_line_of_the_page():
    assert all(any(re.fullmatch(pattern, line) for line in LINES) for pattern in SUBSTITUTES)
