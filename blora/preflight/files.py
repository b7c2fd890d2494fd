"""Files, folders and numbers that stop a training only once it runs, or that it replaces.

Works on the options as the trainer has read them. What the trainer itself refuses on its way to
the first step is left to the rehearsal.
"""

from __future__ import annotations

import io
import json
import os
import re
from argparse import Namespace
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from blora.preflight.checkpoint import check_checkpoint, looks_like_hub_id
from blora.preflight.report import Report, cause, one_line
from blora.preflight.trainer import own
from blora.text import BloraError

# ---- What options name ---------------------------------------------------------------------------


def check_base(args: Namespace, report: Report) -> None:
    """The checkpoint to train on."""
    name = args.pretrained_model_name_or_path or ""
    check_checkpoint(name, args.v_parameterization, report)


def check_vae(args: Namespace, report: Report) -> None:
    """Whether the VAE is there; as a diffusers model it may be a folder, or on the hub."""
    if args.vae and not Path(args.vae).exists() and not looks_like_hub_id(args.vae):
        raise BloraError(f'no VAE at "{args.vae}": correct --vae')


def check_late_files(args: Namespace, report: Report) -> None:
    """Whether the files are there that sd-scripts opens late: LoRAs to merge, a tracker config."""
    late = [("network weights", "base_weights", file) for file in args.base_weights or ()]
    late.append(("tracker config", "log_tracker_config", args.log_tracker_config))
    for what, option, file in late:
        if file and not Path(file).is_file():
            report.errors.append(f'no {what} at "{file}": correct --{option}')


def check_images(args: Namespace, report: Report) -> None:
    """Whether any option says where the pictures are; sd-scripts takes the first of these."""
    if not (args.dataset_class or args.dataset_config or args.in_json or args.train_data_dir):
        raise BloraError("there are no images: give --dataset_config")
    config, folder = args.dataset_config, args.train_data_dir
    if args.dataset_class:
        return
    if config and not Path(config).is_file():
        raise BloraError(
            f'no dataset config at "{config}": copy blora_dataset.toml there, or correct the path'
        )
    if folder and not (config or args.in_json) and not Path(folder).is_dir():
        raise BloraError(f'no folder of images at "{folder}": correct --train_data_dir')


# ---- The prompts of samples ----------------------------------------------------------------------

PROMPT_ENDINGS = (".txt", ".toml", ".json")


def read_prompts(path: Path) -> list[Any]:
    """The prompts of a file, by the ending of its name as sd-scripts reads it: lines or tables.

    Raises what that raises (load_prompts in library/train_util.py, sample_images_common before
    0.10).
    """
    text = path.read_text(encoding="utf-8")
    if path.name.endswith(".json"):
        prompts = json.loads(text) or []
        if not isinstance(prompts, list) or not all(isinstance(p, str | dict) for p in prompts):
            raise TypeError("it is not a list of texts and tables")
        return prompts
    if path.name.endswith(".toml"):
        import toml  # sd-scripts has it

        table = toml.loads(text)["prompt"]
        return [dict(**table, **subset) for subset in table["subset"]]
    return [line.strip() for line in text.split("\n") if line.strip() and line[0] != "#"]


def check_samples(args: Namespace, report: Report) -> None:
    """Whether the samples that are wanted can be drawn, and as they are written.

    BloraError for what ends the training at the first of them.
    """
    if not (args.sample_at_first or args.sample_every_n_steps or args.sample_every_n_epochs):
        return
    if not args.sample_prompts:
        raise BloraError("sampling is on, but no prompts are given: add --sample_prompts")
    path = Path(args.sample_prompts)
    if not path.is_file():
        report.warnings.append(
            f'no prompts at "{path}", so no samples will be drawn: correct --sample_prompts'
        )
        return
    try:
        if not path.name.endswith(PROMPT_ENDINGS):
            raise ValueError(f"its name ends in none of {', '.join(PROMPT_ENDINGS)}")
        prompts = read_prompts(path)
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise BloraError(
            f'sd-scripts cannot read the prompts in "{path}", which ends the training at the first '
            f"sample: write them as in blora_prompts.txt ({type(error).__name__}: "
            f"{one_line(str(error))})"
        ) from error
    check_prompts(path, prompts, report)


def check_prompts(path: Path, prompts: list[Any], report: Report) -> None:
    """Prompts that are none, or that are drawn otherwise than they are written."""
    lines = [prompt for prompt in prompts if isinstance(prompt, str)]
    if not prompts:
        report.warnings.append(f'no prompt in "{path}", so no samples will be drawn: add one')
    if any(line.lstrip("\ufeff").startswith("#") for line in lines):
        report.warnings.append(
            f'a comment in "{path}" will be drawn as a prompt: # has to be the first character of '
            "the line, without a space or a byte order mark before it"
        )
    if ignored := ignored_options(lines):
        report.warnings.append(
            f'sd-scripts ignores these options in "{path}": {", ".join(ignored)}: write --w 1024, '
            "--h 1024, --s 25, --l 7, --d 1 or --n and a text"
        )


def ignored_options(lines: list[str]) -> list[str]:
    """The options behind prompts that sd-scripts does not know, as they are written, in quotes."""
    parts = dict.fromkeys(part for line in lines for part in line.split(" --")[1:])
    if not parts:
        return []
    with redirect_stderr(io.StringIO()):  # it may complain of a number
        read = own("line_to_prompt_dict")
        settings = {part: read(f" --{part}") for part in parts}
    return [f'"--{part.strip()}"' for part, known in settings.items() if known.keys() == {"prompt"}]


# ---- The output ----------------------------------------------------------------------------------

LONGEST_NAME = 255  # bytes, or on Windows letters, of a file's name on every common file system
LONGEST_ENDING = "-step00001000.safetensors"
NOT_ON_WINDOWS = '<>:"|?*\\'
DEVICES = re.compile(r"(con|prn|aux|nul|com[1-9]|lpt[1-9]) *(\..*)?", re.IGNORECASE)
CORRECT_NAME = "correct --output_name (BLORA_NAME in the launcher)"


def check_folder(text: str, option: str, report: Report) -> None:
    """Whether a folder can be created and written to, by the nearest one that exists."""
    path = Path(text)
    # On Windows there may be none, where the drive is missing.
    nearest = next((folder for folder in (path, *path.parents) if os.path.lexists(folder)), path)
    shown = text if nearest == path else nearest.absolute()
    if not nearest.is_dir():
        report.errors.append(
            f'"{shown}" is not a folder, so nothing can be saved there: correct --{option}'
        )
    elif not os.access(nearest, os.W_OK | os.X_OK):
        report.errors.append(
            f'no permission to write to "{shown}": correct --{option}, or the permissions'
        )


def check_folders(args: Namespace, report: Report) -> None:
    """Whether the LoRA can be saved, and the logs where they are wanted."""
    if not args.output_dir:
        report.errors.append("there is no folder to save to: add --output_dir")
    for option in ("output_dir", "logging_dir"):
        if folder := getattr(args, option):
            check_folder(folder, option, report)


def check_output_name(args: Namespace, report: Report) -> None:
    """Whether files can have the LoRA's name, here and on Windows."""
    name, is_windows = args.output_name or "", os.name == "nt"
    folder = Path(args.output_dir or "", name).parent
    shown = name if len(name) < LONGEST_NAME else f"{name[:20]}..."
    if ("/" in name or os.sep in name) and not folder.is_dir():
        raise BloraError(
            f'--output_name "{shown}" is a path, and the folder "{folder}" does not exist: '
            f"{CORRECT_NAME}"
        )
    longest = Path(name + LONGEST_ENDING).name
    if (len(longest) if is_windows else len(os.fsencode(longest))) > LONGEST_NAME:
        raise BloraError(f'--output_name "{shown}" is too long for a file: {CORRECT_NAME}')
    letters = sorted({letter for letter in name if letter in NOT_ON_WINDOWS or letter < " "})
    if letters or DEVICES.fullmatch(name):
        why = f"with {' '.join(letters)} in its name" if letters else "of this name"
        (report.errors if is_windows else report.warnings).append(
            f'--output_name "{shown}": Windows cannot save a file {why}: {CORRECT_NAME}'
        )


def check_overwriting(args: Namespace, report: Report) -> None:
    """A LoRA that the training's own would replace."""
    ending = args.save_model_as or "safetensors"
    saved = Path(args.output_dir or "", f"{args.output_name or 'last'}.{ending}")
    if args.output_dir and os.path.lexists(saved):
        report.warnings.append(
            f'"{saved}" exists and will be overwritten: give another --output_name '
            "(BLORA_REVISION in the launcher), or move it away"
        )


CHECKS: tuple[Callable[[Namespace, Report], Any], ...] = (
    check_base, check_late_files, check_vae, check_samples, check_folders,
    check_output_name, check_overwriting, check_images,
)  # fmt: skip


def check_files(args: Namespace, report: Report) -> None:
    """Every check of this file; each runs whatever the others find, so all errors come at once."""
    for check in CHECKS:
        try:
            check(args, report)
        except BloraError as error:
            report.errors.append(str(error))
        except OSError as error:
            report.errors.append(
                f"cannot read a file or folder ({error}): correct its path or its permissions"
            )
        except Exception as error:  # as for an option that this release does not have
            report.warnings.append(f"could not check all options ({cause(error)})")
