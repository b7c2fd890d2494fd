"""The first look at a training: what is wrong before any package is loaded.

Files and folders that options name, the checkpoint by its header, where the LoRA will be saved, and
numbers that stop a training once it runs. It takes a tenth of a second and the standard library
alone; the trainer's own rules are for the rehearsal. Each check goes on where another one failed,
so that all errors come at once.

argparse also takes an option by its first letters (--max_train_step=2). Those are not known here:
where they may stand for an option, nothing is said of it.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from blora.preflight.checkpoint import check_checkpoint, is_of_the_hub
from blora.preflight.options import Options, load_toml, pairs, with_config_file
from blora.preflight.report import Report
from blora.text import BloraError

# ---- Options -------------------------------------------------------------------------------------


def is_abbreviated(options: Options, name: str) -> bool:
    """Whether the line has a beginning of the option; "resume" is an option of its own."""
    return any(name.startswith(word) and word not in (name, "resume") for word in options.values)


def value(options: Options, name: str) -> str:
    """The value of an option; empty where there is none, or none that is known for sure."""
    return "" if is_abbreviated(options, name) else options.text(name)


def is_absent(options: Options, name: str) -> bool:
    """Whether an option is not given in any way."""
    return not options.has(name) and not is_abbreviated(options, name)


def as_float(text: str) -> float:
    """A number; NaN for everything that argparse will refuse, or that is not given."""
    try:
        return float(text)
    except ValueError:
        return math.nan


# ---- Files that options name ---------------------------------------------------------------------


def check_files(options: Options, report: Report) -> None:
    """Whether each file is there that sd-scripts opens once the models have loaded."""
    for name, what in (
        ("network_weights", "network weights"),
        ("base_weights", "network weights"),
        ("log_tracker_config", "tracker config"),
    ):
        given = [] if is_abbreviated(options, name) else options.values.get(name, [])
        for file in given:
            if file and not Path(file).is_file():
                report.errors.append(f'no {what} at "{file}": correct --{name}')


def check_vae(options: Options, report: Report) -> None:
    """Whether the VAE is there; as diffusers' model it may be a folder, or on the hub."""
    vae = value(options, "vae")
    if vae and not Path(vae).exists() and not is_of_the_hub(vae):
        report.errors.append(f'no VAE at "{vae}": correct --vae')


def check_preset(options: Options, report: Report) -> None:
    """Whether the preset is there; a bare name is LyCORIS' own, and the rehearsal's."""
    if not re.match(r"lycoris\.|blora_network$", value(options, "network_module")):
        return
    if is_abbreviated(options, "network_args"):
        return
    preset = pairs(options.values.get("network_args")).get("preset", "")
    is_a_path = "/" in preset or os.sep in preset or preset.endswith(".toml")
    if is_a_path and not Path(preset).is_file():
        report.errors.append(
            f'no preset at "{preset}": correct the preset of --network_args '
            "(BLORA_PRESET in the launcher)"
        )


def check_resume(options: Options, report: Report) -> None:
    """Whether there is a state to go on from, and steps left to go on for."""
    state = value(options, "resume")
    if not state or not is_absent(options, "resume_from_huggingface"):
        return
    folder = Path(state).expanduser()  # as accelerate does
    if not folder.is_dir():
        report.errors.append(f'no saved state at "{state}": correct --resume')
        return
    if not any(folder.iterdir()):
        report.errors.append(f'no saved state in "{state}": correct --resume')
        return
    others = ("max_train_epochs", "initial_epoch", "initial_step", "max_train_steps")
    if any(is_abbreviated(options, name) for name in others) or any(map(options.has, others[:3])):
        return
    reached, steps = reached_steps(folder), as_float(options.text("max_train_steps", "1600"))
    if reached >= steps:
        report.errors.append(
            f'the state in "{state}" is of step {reached:g}, and --max_train_steps={steps:g} '
            "counts from the beginning: give more"
        )


def reached_steps(state: Path) -> float:
    """The step at which a state was saved; NaN where it does not say."""
    try:
        saved = json.loads((state / "train_state.json").read_text(encoding="utf-8"))
        return float(saved["current_step"])
    except (OSError, ValueError, TypeError, KeyError):
        return math.nan


def has_toml() -> bool:
    """Whether configs can be looked into; the trainer's Python has it."""
    return importlib.util.find_spec("toml") is not None


# ---- Samples -------------------------------------------------------------------------------------

PROMPTS = (".txt", ".toml", ".json")


def check_samples(options: Options, report: Report) -> None:
    """Whether samples that are asked for have prompts: sd-scripts ends at the first one without."""
    asked = [
        name
        for name in ("sample_every_n_steps", "sample_every_n_epochs")
        if as_float(value(options, name)) > 0
    ]
    asked += ["sample_at_first"] if options.has("sample_at_first") else []
    prompts = value(options, "sample_prompts")
    if not asked:
        return
    if is_absent(options, "sample_prompts"):
        report.errors.append(
            f"--{asked[0]} asks for samples without their prompts: add --sample_prompts"
        )
    elif prompts and not Path(prompts).is_file():
        report.warnings.append(
            f'no prompts at "{prompts}", so there will be no samples: correct --sample_prompts'
        )
    elif prompts and not prompts.endswith(PROMPTS):
        report.errors.append(
            f'"{prompts}" ends in none of {", ".join(PROMPTS)}, by which sd-scripts reads prompts: '
            "rename it, and correct --sample_prompts"
        )
    elif prompts and not is_utf8(Path(prompts)):
        report.errors.append(
            f'"{prompts}" is not UTF-8, and would end the training at the first sample: save the '
            "--sample_prompts as UTF-8"
        )
    elif prompts and (not prompts.endswith(".toml") or has_toml()):
        check_prompts(Path(prompts), report)


def is_utf8(path: Path) -> bool:
    """Whether a text file can be read as sd-scripts reads it."""
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True


def read_prompts(path: Path) -> Any:
    """The prompts of a file, by the ending of its name as sd-scripts reads it.

    Each is a line of text or a table. BloraError, KeyError or TypeError where they cannot be read.
    """
    if path.name.endswith(".json"):
        return load_json(path, "prompt file")
    if path.name.endswith(".toml"):
        table = load_toml(path, "prompt file")["prompt"]
        return [dict(**table, **subset) for subset in table["subset"]]
    lines = path.read_text(encoding="utf-8").split("\n")
    return [line.strip() for line in lines if line.strip() and line[0] != "#"]


def check_prompts(path: Path, report: Report) -> None:
    """Whether the prompts can be read, whether there are any, and whether a comment is one."""
    try:
        prompts = read_prompts(path)
        is_list = isinstance(prompts, list) and all(isinstance(p, (str, dict)) for p in prompts)
        is_sound = is_list or prompts in ({}, "")  # of which it takes none
    except (KeyError, TypeError):
        is_sound = False
    if not is_sound:
        report.errors.append(
            f'the prompts in "{path}" would end the training at the first sample: put them in '
            "[[prompt.subset]] of a .toml, without repeating what [prompt] sets, or in a list in a "
            ".json"
        )
    elif not prompts:
        report.warnings.append(f'no prompt in "{path}", so there will be no samples: add one')
    elif any(isinstance(p, str) and p.lstrip("\ufeff").startswith("#") for p in prompts):
        report.warnings.append(
            f'a comment in "{path}" will be drawn as a prompt: # has to be the first character of '
            "the line, without a space or a byte order mark before it"
        )


# ---- The dataset ---------------------------------------------------------------------------------


def load_config(path: Path) -> Any:
    """The dataset config, by the ending of its name as sd-scripts reads it; none without toml."""
    if not path.is_file():
        raise BloraError(
            f'no dataset config at "{path}": copy blora_dataset.toml there, or correct the path'
        )
    ending = path.suffix.lower()
    if ending == ".toml":
        return load_toml(path, "dataset config") if has_toml() else None
    if ending != ".json":
        raise BloraError(
            f'the name of the dataset config "{path}" ends neither in .toml nor in .json: rename it'
        )
    return load_json(path, "dataset config")


def load_json(path: Path, what: str) -> Any:
    """A JSON file, read as sd-scripts reads it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BloraError(f'the {what} "{path}" is not valid JSON ({error}): correct it') from error


def tables(config: Any, name: str) -> Iterator[dict[str, Any]]:
    """The tables of this name; what has another form is the rehearsal's to tell."""
    inside = config.get(name) if isinstance(config, dict) else None
    for table in inside if isinstance(inside, list) else []:
        if isinstance(table, dict):
            yield table


def check_dataset(options: Options, report: Report) -> None:
    """Whether the pictures' folders are there, given by a config or as the GUI gives them.

    sd-scripts takes the first of these that is given, whatever else is.
    """
    ways = ("dataset_class", "dataset_config", "in_json", "train_data_dir")
    way = next((name for name in ways if not is_absent(options, name)), None)
    given = value(options, way) if way else ""
    if way is None:
        raise BloraError("there are no images: give --dataset_config")
    if way == "dataset_config" and given:
        path = Path(given)
        check_folders(path, load_config(path), report)
    if way == "train_data_dir" and given and not Path(given).is_dir():
        raise BloraError(f'no folder of images at "{given}": correct --train_data_dir')


def check_folders(path: Path, config: Any, report: Report) -> None:
    """Whether the folders of a dataset config are there; others may be missing while one is."""
    datasets = tables(config, "datasets")
    subsets = [subset for dataset in datasets for subset in tables(dataset, "subsets")]
    named = [subset["image_dir"] for subset in subsets if isinstance(subset.get("image_dir"), str)]
    folders = list(dict.fromkeys(named))
    missing = [folder for folder in folders if not Path(folder).is_dir()]
    all_of_it = len(missing) == len(folders) and not any("metadata_file" in s for s in subsets)
    for folder in missing:
        (report.errors if all_of_it else report.warnings).append(
            f'no folder of images at "{folder}": correct image_dir in "{path}"'
        )
    if other := other_project(path, folders):
        report.warnings.append(
            f'"{path}" names the pictures of another project, "{other}": correct image_dir in it'
        )


def in_full(path: Path) -> Path:
    """The absolute path without "..", by its names alone: links are not followed."""
    return Path(os.path.normpath(path.absolute()))


def other_project(config: Path, folders: list[str]) -> str | None:
    """The first folder, where none is of the config's own project and it is of one beside it.

    A folder beside the config's is a project if it has a config of the same name.
    """
    own = in_full(config).parent
    projects = []
    for folder in folders:
        inside = [in_full(Path(folder)), *in_full(Path(folder)).parents]
        if own in inside:
            return None
        beside = [parent for parent in inside if parent.parent == own.parent]
        projects += [folder for project in beside if (project / config.name).is_file()]
    return projects[0] if projects else None


# ---- The output ----------------------------------------------------------------------------------

LONGEST_NAME = 255  # bytes, or on Windows letters, of a file's name on every common file system
LONGEST_ENDING = "-step00001000.safetensors"
NOT_ON_WINDOWS = '<>:"|?*\\'
DEVICES = re.compile(r"(con|prn|aux|nul|com[1-9]|lpt[1-9]) *(\..*)?", re.IGNORECASE)
NAMED_BY = "correct --output_name (BLORA_NAME in the launcher)"


def check_folder(options: Options, name: str, report: Report) -> None:
    """Whether a folder can be made and written to, by the nearest one that is there."""
    text = value(options, name)
    if not text:
        return
    path = Path(text)
    # On Windows there may be none, where the drive is missing.
    nearest = next((folder for folder in (path, *path.parents) if os.path.lexists(folder)), path)
    shown = text if nearest == path else nearest.absolute()
    if not nearest.is_dir():
        report.errors.append(
            f'"{shown}" is not a folder, so nothing can be saved there: correct --{name}'
        )
    elif not os.access(nearest, os.W_OK | os.X_OK):
        report.errors.append(
            f'nothing may be written to "{shown}": correct --{name}, or its permissions'
        )


def check_name(options: Options, report: Report) -> None:
    """Whether files can have the LoRA's name, here and on Windows."""
    name = value(options, "output_name")
    is_windows = os.name == "nt"
    folder = Path(value(options, "output_dir"), name).parent
    shown = name if len(name) < LONGEST_NAME else f"{name[:20]}..."
    is_path = "/" in name or os.sep in name
    if is_path and not is_abbreviated(options, "output_dir") and not folder.is_dir():
        report.errors.append(
            f'--output_name "{shown}" is a path, and nothing can be saved in "{folder}": {NAMED_BY}'
        )
        return
    longest = Path(name + LONGEST_ENDING).name
    if (len(longest) if is_windows else len(os.fsencode(longest))) > LONGEST_NAME:
        report.errors.append(f'--output_name "{shown}" is too long for a file: {NAMED_BY}')
    letters = sorted({letter for letter in name if letter in NOT_ON_WINDOWS or letter < " "})
    if letters or DEVICES.fullmatch(name):
        why = f"with {' '.join(letters)} in its name" if letters else "of this name"
        (report.errors if is_windows else report.warnings).append(
            f'--output_name "{shown}": Windows cannot save a file {why}: {NAMED_BY}'
        )


def check_output(options: Options, report: Report) -> None:
    """Whether the LoRA can be saved, and whether one is there that it will take the place of."""
    if is_absent(options, "output_dir"):
        report.errors.append("there is no folder to save to: add --output_dir")
    check_folder(options, "output_dir", report)
    check_folder(options, "logging_dir", report)
    check_name(options, report)
    output = value(options, "output_dir")
    ending = value(options, "save_model_as") or "safetensors"
    if is_abbreviated(options, "output_name") or is_abbreviated(options, "save_model_as"):
        return
    saved = Path(output, f"{options.text('output_name', 'last')}.{ending}")
    if output and os.path.lexists(saved):
        report.warnings.append(
            f'"{saved}" is there and will be written over: give another '
            "--output_name (BLORA_REVISION in the launcher), or move it away"
        )


# ---- Numbers -------------------------------------------------------------------------------------

# What sd-scripts divides the step or the epoch by. It leaves 0 out by itself of sample_every_n_.
DIVISORS = {
    "save_every_n_steps": "step",
    "save_every_n_epochs": "epoch",
    "validate_every_n_steps": "step",
    "validate_every_n_epochs": "epoch",
}


def check_divisors(options: Options, report: Report) -> None:
    """Refuse a 0 by which the training would end at the first step or epoch, with nothing saved."""
    for name, unit in DIVISORS.items():
        # --save_n_epoch_ratio takes the place of --save_every_n_epochs.
        replaced = name == "save_every_n_epochs" and not is_absent(options, "save_n_epoch_ratio")
        if as_float(value(options, name)) == 0 and not replaced:
            report.errors.append(
                f"--{name}=0 ends the training after its first {unit}: leave it out"
            )


# ---- All of it -----------------------------------------------------------------------------------


def attempt(report: Report, check: Callable[..., Any], *args: Any) -> Any:
    """What a check hands back, or None where it ends with an error, which goes into the report."""
    try:
        return check(*args)
    except BloraError as error:
        report.errors.append(str(error))
    except OSError as error:
        report.errors.append(
            f"cannot read a file or folder ({error}): correct its path or its permissions"
        )
    return None


def check_base(options: Options, report: Report) -> None:
    """The checkpoint, unless its option may be given by its first letters."""
    name = "pretrained_model_name_or_path"
    if not is_abbreviated(options, name):
        predicts_v = not is_absent(options, "v_parameterization")
        check_checkpoint(options.text(name), predicts_v, report)


CHECKS = (
    check_base, check_files, check_vae, check_preset, check_resume, check_samples, check_output,
    check_divisors, check_dataset,
)  # fmt: skip


def look(script: Path, options: Options, report: Report) -> None:
    """Write what is wrong into the report; `options` are those of the command line.

    --config_file is laid under them here. Where that cannot be read, hardly an option is known, and
    the look ends with its error.
    """
    if not has_toml():
        report.notes.append("no toml in this Python, so the configs were not checked")

    if not script.is_file():
        report.errors.append(
            f'no training script at "{script}": run this in a kohya sd-scripts or kohya_ss folder'
        )
    if options.has("config_file"):
        options = attempt(report, with_config_file, options) if has_toml() else None
        if options is None:
            return
    for check in CHECKS:
        attempt(report, check, options, report)
