"""What the trainer itself warns of, which the rehearsal would keep to itself."""

from __future__ import annotations

import logging
import re
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blora.preflight.report import Report, one_line
from blora.preflight.trainer_errors import in_english


@contextmanager
def listening() -> Iterator[list[logging.LogRecord]]:
    """Every warning that is logged meanwhile, whatever the trainer does to the handlers."""
    heard: list[logging.LogRecord] = []
    make = logging.getLogRecordFactory()

    def note(*args: Any, **named: Any) -> logging.LogRecord:
        record = make(*args, **named)
        if record.levelno >= logging.WARNING:
            heard.append(record)
        return record

    logging.setLogRecordFactory(note)
    try:
        yield heard
    finally:
        logging.setLogRecordFactory(make)


# What pre-flight says in its own words, LyCORIS of every preset, or is Japanese.
SAID_ELSEWHERE = re.compile(
    "no regularization images|reg images are not used|ignore (duplicated )?subset|get image size|"
    "learning rate is too low|only the first one|recommend option|git commit hash|"
    "ignoring the following options|Prompt was truncated|"
    r"target module classes|^\S*[\u3040-\u30ff]"
)
OF_PICTURES = "load_dreambooth_dir"  # the function that lists pictures without a caption
# Something else is trained than was asked for; the rest is advice.
ELSE_TRAINED = re.compile(
    "training will be unexpected|does not support it|Parameters after|"
    "modules are skipped|will ignore network_dropout|No modules matched the following target names"
)


def speaker(record: logging.LogRecord) -> str:
    """Whose warning it is, if one of those that know the training: LyCORIS or sd-scripts."""
    if record.name == "LyCORIS":
        return record.name
    own = Path(sys.argv[0]).resolve().parent in Path(record.pathname).resolve().parents
    return "sd-scripts" if own else ""


def is_idle(text: str, args: Namespace) -> bool:
    """Whether LyCORIS speaks of what was not asked for: dropout, or names of its own list."""
    given = dict(str(item).partition("=")[::2] for item in args.network_args or ())
    if "network_dropout" in text:
        return not (args.network_dropout or given.get("dropout"))
    if "target names" not in text:
        return False
    key = "unet_target_name" if text.startswith("UNet") else "text_encoder_target_name"
    files = [Path(value) for value in given.values() if value.endswith(".toml")]
    return not any(key in file.read_text(encoding="utf-8") for file in files)


def pass_on(heard: list[logging.LogRecord], args: Namespace, report: Report) -> None:
    """Each of the trainer's own warnings, once, in English."""
    for record in heard:
        text = one_line(in_english(record.getMessage())).removeprefix("warning: ")
        is_said = SAID_ELSEWHERE.search(text) or record.funcName == OF_PICTURES
        if record.levelno != logging.WARNING or is_said or not speaker(record):
            continue
        if record.name == "LyCORIS" and is_idle(text, args):
            continue
        sentence = f"{speaker(record)} warns: {text}"
        sentences = report.warnings if ELSE_TRAINED.search(text) else report.notes
        if sentence not in sentences:
            sentences.append(sentence)
