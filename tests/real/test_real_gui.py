"""The recipes in a real kohya_ss GUI: what it prints trains what the launchers train.

  KOHYA_SS_ROOT=<kohya_ss> KOHYA_SS_PYTHON=<its python> KOHYA_ROOT=<sd-scripts> \\
    KOHYA_PYTHON=<its python> .venv/bin/python -m pytest tests/real/test_real_gui.py

takes a minute. The recipes are loaded and the commands printed by the GUI's own code, as for a
browser: see gui_probe.py. sd-scripts' own parser reads both command lines, and LyCORIS makes the
networks of both. The checkouts are only read.

KOHYA_SS_PYTHON needs what the GUI itself imports of kohya_ss' requirements, accelerate included;
KOHYA_PYTHON as for test_real_kohya.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from kohya_folder import CHECKPOINT, ROOT, SCRIPT, install
from real_kohya import KOHYA_PYTHON, make_copy, tokenizers
from write_gui_recipes import launcher_options

KOHYA_SS_ROOT, KOHYA_SS_PYTHON = map(os.environ.get, ("KOHYA_SS_ROOT", "KOHYA_SS_PYTHON"))
if not (KOHYA_SS_ROOT and KOHYA_SS_PYTHON):
    pytest.skip(
        "NOT RUN on a real GUI: set KOHYA_SS_ROOT to a kohya_ss and KOHYA_SS_PYTHON to its python",
        allow_module_level=True,
    )

pytestmark = pytest.mark.slow
TESTS = ROOT / "tests"
PROJECT = "_in/lora/sdxl/my_project"
RECIPES = ("classic", "fast")
# What a user types, in the launcher's words.
FILLED = {
    "Pretrained model name or path": CHECKPOINT,
    "Trained Model output name": "my_project_1",
    "Dataset config file (Optional. Select the toml configuration file to use for the dataset)": (
        f"./{PROJECT}/config.toml"
    ),
    "Output directory for trained model": "./_out/lora/sdxl/my_project_1",
}
# Presets of kohya_ss with much that is none of ours; all versions have them.
OTHERS = ("SDXL - LoRA kudou-reira prodigy v4.0", "SDXL - LoRA face dogu_cat v1.0")
LOADS = {
    f"{name}, {way}": deeds
    for name in RECIPES
    for way, deeds in {
        "as a preset": [{"preset": f"user_presets/blora_gui_{name}"}],
        "from a path": [{"file": f"blora_gui_{name}.json"}],
        "after the other": [
            {"preset": f"user_presets/blora_gui_{RECIPES[name == 'classic']}"},
            {"preset": f"user_presets/blora_gui_{name}"},
        ],
        "after presets of others": [
            *({"preset": other} for other in OTHERS),
            {"preset": f"user_presets/blora_gui_{name}"},
        ],
    }.items()
}
# Options that the GUI gives and the launcher does not, or in another word: why they are the same.
SAME_ALL_THE_SAME = {
    "config_file": "which brings the options",
    "dynamo_backend": "read only with --torch_compile",
    "epoch": "an option of nothing",
    "log_with": "the user's: a preset of others sets it",
    "lr_scheduler_args": "none, as an empty list",
    "max_timestep": "1000 is what sd-scripts takes where nothing is given",
    "max_token_length": "75 is what sd-scripts takes where nothing is given",
    "network_args": "compared by the network that they make",
    "noise_offset_type": "an option of nothing",
    "sample_prompts": "read only with --sample_every_n_steps or _epochs",
    "sample_sampler": "the same",
    "save_precision": "float is the fp32 that is saved where nothing is given",
    "training_comment": "the user's: a preset of others sets it",
    "unet_lr": "the learning rate, which is taken where it is not given",
    "wandb_run_name": "read only with --log_with",
}


@dataclass(frozen=True)
class Gui:
    """A kohya_ss folder with the bundle, and what its GUI prints for each of LOADS."""

    path: Path
    printed: dict[str, list[str]]

    def python(self, *args: str | Path, question: Any = None) -> subprocess.CompletedProcess[str]:
        """Run sd-scripts' Python in the folder, as the GUI runs a training."""
        return subprocess.run(
            [KOHYA_PYTHON, *args],
            cwd=self.path,
            env=os.environ | {"PYTHONPATH": str(self.path)},
            input=json.dumps(question),
            stdout=subprocess.PIPE,
            encoding="utf-8",
            check=False,
        )


@pytest.fixture(scope="module")
def gui(tmp_path_factory) -> Gui:
    """The folder set up as the page says, and every load in a page of its own."""
    path = tmp_path_factory.mktemp("gui") / "kohya_ss"
    make_copy(path, KOHYA_SS_ROOT)
    make_copy(path / "sd-scripts")
    install(path)
    page = (ROOT / "docs/gui.md").read_text(encoding="utf-8")
    [copy] = re.findall(r"^cp .*$", page, re.MULTILINE)
    subprocess.run(copy, shell=True, cwd=path, check=True)
    Path(path, PROJECT).mkdir(parents=True)
    shutil.copy(path / "blora_dataset.toml", path / PROJECT / "config.toml")
    Path(path, CHECKPOINT).parent.mkdir(exist_ok=True)
    for command in (["make_checkpoint.py", CHECKPOINT], ["make_dataset.py", "made"]):
        script, target = command
        subprocess.run([KOHYA_PYTHON, TESTS / "standin" / script, target], cwd=path, check=True)
    shutil.move(path / "made/images", path / PROJECT / "images")
    # The GUI looks for accelerate as in an active environment.
    programs = Path(KOHYA_SS_PYTHON).absolute().parent
    done = subprocess.run(
        [programs / Path(KOHYA_SS_PYTHON).name, TESTS / "support/gui_probe.py"],
        cwd=path,
        env=os.environ | {"PATH": os.pathsep.join([str(programs), os.defpath])},
        input=json.dumps({name: [*deeds, {"fields": FILLED}] for name, deeds in LOADS.items()}),
        stdout=subprocess.PIPE,
        encoding="utf-8",
        check=True,
    )
    return Gui(path, json.loads(done.stdout.splitlines()[-1])["printed"])


def options_of(line: list[str]) -> list[str]:
    """The options of a printed line, which sd-scripts gets."""
    return line[next(i for i, word in enumerate(line) if word.endswith(SCRIPT)) + 1 :]


@pytest.fixture(scope="module")
def answer(gui) -> dict[str, Any]:
    """What sd-scripts' parser and LyCORIS make of every load, and of the launchers."""
    command_lines = {name: options_of(line) for name, line in gui.printed.items()}
    command_lines |= {name: launcher_options(name) for name in RECIPES}
    question = {"command_lines": command_lines, "continue": {}, "from_file": []}
    done = gui.python(TESTS / "support/kohya_probe.py", gui.path / "sd-scripts", question=question)
    return json.loads(done.stdout)


@pytest.mark.parametrize("load", LOADS)
def test_sd_scripts_reads_the_options_of_the_launcher(answer, load):
    printed, launched = (answer["options"][n] for n in (load, load.split(",")[0]))
    printed["optimizer_type"] = printed["optimizer_type"].lower()  # as sd-scripts does
    printed["dataset_config"] = str(Path(printed["dataset_config"]))  # as its parser does
    assert len(launched) > 190
    differing = {n for n in printed.keys() | launched if printed.get(n) != launched.get(n)}
    assert differing - SAME_ALL_THE_SAME.keys() == set()
    assert (printed["unet_lr"], printed["max_timestep"]) == (launched["learning_rate"], 1000)
    assert printed["max_token_length"] == 75
    assert printed["lr_scheduler_args"] == []
    assert not (printed["torch_compile"] or printed["sample_every_n_steps"])
    assert not (printed["sample_every_n_epochs"] or printed["sample_at_first"])
    assert printed["save_precision"] == (launched["save_precision"] or "float")


@pytest.mark.parametrize("load", LOADS)
def test_lycoris_makes_the_same_modules(answer, load):
    assert answer["modules"][load] == answer["modules"][load.split(",")[0]]


@pytest.fixture(scope="module")
def steps(gui, answer) -> dict[str, Any]:
    """A step with the network of each load and launcher, on sd-scripts' U-Net: network_probe.py."""
    cases = {}
    for name, options in answer["options"].items():
        args = dict(item.split("=") for item in options["network_args"])
        case = {"module": options["network_module"], "args": args}
        cases[name] = case | {"checkpointing": options["gradient_checkpointing"]}
    # Loads of one recipe ask for the same step, which takes seconds.
    question = {"steps": {json.dumps(case): case for case in cases.values()}, "layers": {}}
    done = gui.python(
        TESTS / "support/network_probe.py", gui.path / "sd-scripts", question=question
    )
    steps = json.loads(done.stdout.splitlines()[-1])["steps"]
    return {name: steps[json.dumps(case)] for name, case in cases.items()}


@pytest.mark.parametrize("load", LOADS)
def test_a_step_has_the_same_output_and_gradients_bit_for_bit(steps, load):
    printed, launched = steps[load], steps[load.split(",")[0]]
    assert printed == launched
    assert printed["zero"] == []


def test_the_two_recipes_do_not_make_the_same_step(steps):
    assert steps["classic"]["gradients"] != steps["fast"]["gradients"]


@pytest.mark.parametrize("name", RECIPES)
def test_preflight_takes_the_whole_printed_line_and_plans_the_launchers_training(
    gui, name, tmp_path
):
    cache = f"--tokenizer_cache_dir={tokenizers(tmp_path, gui.path / 'sd-scripts')}"
    launched = [f"sd-scripts/{SCRIPT}", *launcher_options(name)]
    reports = []
    for words in (gui.printed[f"{name}, as a preset"], launched):
        done = gui.python("blora_preflight.py", "--json", *words, cache)
        assert done.returncode == 0, done.stdout
        # The GUI writes Prodigy, the launcher prodigy; what is free on the disk changes meanwhile.
        told = re.sub(r" \([\d.]+ \w+ free\)", "", done.stdout.replace("Prodigy", "prodigy"))
        reports.append(json.loads(told))
    assert reports[0] == reports[1]
    assert reports[0]["errors"] == []
    assert reports[0]["plan"]["rank"].startswith("512, alpha 512: ")
