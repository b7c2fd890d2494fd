"""The recipes in a real kohya_ss GUI: what it prints trains what the launchers train.

The recipes are loaded and the commands printed by the GUI's own code, as for a browser: see
gui_probe.py. sd-scripts' own parser reads both command lines, and LyCORIS makes the networks of
both. The checkouts are only read. It takes a minute.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from kohya_folder import CHECKPOINT, ROOT, SCRIPT, install
from real_kohya import SUPPORT, kohya_python, make_copy, options_of
from write_gui_recipes import launcher_options

from blora.preflight.checkpoint import PLACEHOLDER

KOHYA_SS_ROOT, KOHYA_SS_PYTHON = map(os.environ.get, ("KOHYA_SS_ROOT", "KOHYA_SS_PYTHON"))
if not (KOHYA_SS_ROOT and KOHYA_SS_PYTHON):
    pytest.skip(
        "NOT RUN on a real GUI: KOHYA_SS_ROOT=<kohya_ss> KOHYA_SS_PYTHON=<its python>",
        allow_module_level=True,
    )

pytestmark = pytest.mark.slow
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
OURS = "user_presets/blora_gui_{}".format
PRESETS = {  # in their order
    f"{name}, {way}": [*before, OURS(name)]
    for name, other in (RECIPES, RECIPES[::-1])
    for way, before in {
        "as a preset": (),
        "after the other": (OURS(other),),
        "after presets of others": OTHERS,
    }.items()
}
LOADS = {name: [{"preset": preset} for preset in presets] for name, presets in PRESETS.items()}
LOADS |= {f"{name}, from a path": [{"file": f"blora_gui_{name}.json"}] for name in RECIPES}
# Options that the GUI gives and the launcher does not, or in another word: why they are the same.
SAME_ALL_THE_SAME = {
    "config_file": "which brings the options",
    "dynamo_backend": "read only with --torch_compile",
    "epoch noise_offset_type": "options of nothing",
    "log_with training_comment": "the user's: a preset of others sets them",
    "lr_scheduler_args": "none, as an empty list",
    "max_timestep": "1000 is what sd-scripts takes where nothing is given",
    "max_token_length": "75 is what sd-scripts takes where nothing is given",
    "network_args": "compared by the network that they make",
    "sample_prompts sample_sampler": "read only with --sample_every_n_steps or _epochs",
    "save_precision": "float is the fp32 that is saved where nothing is given",
    "unet_lr": "the learning rate, which is taken where it is not given",
    "wandb_run_name": "read only with --log_with",
}


def launched(name: str) -> list[str]:
    """What the launcher gives sd-scripts once it names a checkpoint."""
    return [word.replace(PLACEHOLDER, CHECKPOINT) for word in launcher_options(name)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A kohya_ss folder with the bundle, set up as the page says."""
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
    for script, target in {"make_checkpoint.py": CHECKPOINT, "make_dataset.py": "made"}.items():
        kohya_python(ROOT / "tests/standin" / script, target, cwd=path)
    shutil.move(path / "made/images", path / PROJECT / "images")
    return path


@pytest.fixture(scope="module")
def printed(folder) -> dict[str, list[str]]:
    """What the GUI prints for each of LOADS, in a page of its own."""
    # The GUI looks for accelerate as in an active environment.
    programs = Path(KOHYA_SS_PYTHON).absolute().parent
    done = subprocess.run(
        [programs / Path(KOHYA_SS_PYTHON).name, SUPPORT / "gui_probe.py"],
        cwd=folder,
        env=os.environ | {"PATH": os.pathsep.join([str(programs), os.defpath])},
        input=json.dumps({name: [*deeds, {"fields": FILLED}] for name, deeds in LOADS.items()}),
        stdout=subprocess.PIPE,
        encoding="utf-8",
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def probed(folder: Path, probe: str, **question: Any) -> Any:
    """A probe's answer in the folder, where the GUI runs a training."""
    program = [SUPPORT / probe, folder / "sd-scripts"]
    told = kohya_python(*program, cwd=folder, path=folder, question=question)
    return json.loads(told.splitlines()[-1])


@pytest.fixture(scope="module")
def answer(folder, printed) -> dict[str, Any]:
    """What sd-scripts' parser and LyCORIS make of every load, and of the launchers."""
    of_gui = {name: options_of(line) for name, line in printed.items()}
    command_lines = of_gui | {name: launched(name) for name in RECIPES}
    return probed(folder, "kohya_probe.py", command_lines=command_lines)


@pytest.mark.parametrize("load", LOADS)
def test_sd_scripts_reads_the_options_of_the_launcher(answer, load):
    printed, launched = (answer["options"][n] for n in (load, load.split(",")[0]))
    printed["optimizer_type"] = printed["optimizer_type"].lower()  # as sd-scripts does
    printed["dataset_config"] = str(Path(printed["dataset_config"]))  # as its parser does
    assert len(launched) > 190
    differing = {n for n in printed.keys() | launched if printed.get(n) != launched.get(n)}
    assert differing - set(" ".join(SAME_ALL_THE_SAME).split()) == set()
    told = {"unet_lr": launched["learning_rate"], "max_timestep": 1000, "max_token_length": 75}
    told |= {"lr_scheduler_args": [], "save_precision": launched["save_precision"] or "float"}
    assert printed | told == printed
    unasked = "torch_compile sample_every_n_steps sample_every_n_epochs sample_at_first".split()
    assert not any(printed[name] for name in unasked)


@pytest.fixture(scope="module")
def steps(folder, answer) -> dict[str, Any]:
    """A step with the network of each load and launcher, on sd-scripts' U-Net: network_probe.py."""
    cases = {}
    for name, options in answer["options"].items():
        args = dict(item.split("=") for item in options["network_args"])
        case = {"module": options["network_module"], "args": args}
        cases[name] = case | {"checkpointing": options["gradient_checkpointing"]}
    # Loads of one recipe ask for the same step, which takes seconds.
    asked = {json.dumps(case): case for case in cases.values()}
    steps = probed(folder, "network_probe.py", steps=asked, layers={})["steps"]
    return {name: steps[json.dumps(case)] for name, case in cases.items()}


@pytest.mark.parametrize("load", LOADS)
def test_a_step_has_the_same_modules_output_and_gradients_bit_for_bit(answer, steps, load):
    assert answer["modules"][load] == answer["modules"][load.split(",")[0]]
    assert steps[load] == steps[load.split(",")[0]]
    assert steps[load]["zero"] == []
    assert steps["classic"]["gradients"] != steps["fast"]["gradients"]


@pytest.mark.parametrize("name", RECIPES)
def test_preflight_takes_the_file_of_the_printed_line_and_plans_the_launchers_training(
    folder, printed, cached_tokenizers, name
):
    of_launcher = [f"sd-scripts/{SCRIPT}", *launched(name)]
    reports = []
    lines = Path(folder, "logs/print_command.txt").read_text("utf-8").splitlines()
    [line] = [line for line in lines if line.split() == printed[f"{name}, as a preset"]]
    Path(folder, "logs/the_last.txt").write_text(f"one before it\n{line}\n")
    for words in (["logs/the_last.txt"], of_launcher):
        asked = ["blora_preflight.py", "--json", *words, cached_tokenizers]
        told = kohya_python(*asked, cwd=folder, path=folder)
        # The GUI writes Prodigy, the launcher prodigy; what is free on the disk changes meanwhile.
        told = re.sub(r" \([\d.]+ \w+ free\)", "", told.replace("Prodigy", "prodigy"))
        reports.append(json.loads(told))
    assert reports[0] == reports[1]
    assert reports[0]["errors"] == []
    assert reports[0]["plan"]["rank"].startswith("512, alpha 512: ")
