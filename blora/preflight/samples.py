"""The prompts of sample pictures, which sd-scripts reads only when it draws the first."""

from __future__ import annotations

import io
import json
from argparse import Namespace
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from blora.preflight.report import Report, one_line
from blora.text import BloraError

ENDINGS = (".txt", ".toml", ".json")


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
        if not path.name.endswith(ENDINGS):
            raise ValueError(f"its name ends in none of {', '.join(ENDINGS)}")
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
    from library.train_util import line_to_prompt_dict  # sd-scripts' own

    with redirect_stderr(io.StringIO()):  # it may complain of a number
        settings = {part: line_to_prompt_dict(f" --{part}") for part in parts}
    return [f'"--{part.strip()}"' for part, known in settings.items() if known.keys() == {"prompt"}]
