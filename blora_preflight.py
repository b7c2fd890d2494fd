#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["toml"]
# ///
"""Check a training before it begins, and describe it.

  blora_preflight.py sdxl_train_network.py --pretrained_model_name_or_path=... --dataset_config=...
      takes the command line of the training, as the launchers pass it. The trainer's own parser
      reads the options; then files, folders, the checkpoint and the output are checked. Then it
      rehearses: it runs the trainer's own code through its first two steps, without the weights,
      and opens every picture as the trainer does. Nothing is left behind
  blora_preflight.py logs/print_command.txt
      takes the last command that the kohya_ss GUI printed
  blora_preflight.py --preview sheet.html sdxl_train_network.py ...
      writes a web page that shows the pictures as the trainer will see them
  blora_preflight.py --json sdxl_train_network.py ...
      prints the same as JSON

Exit code 1 if the training would fail. Warnings never stop it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

VERSION = "2.5.0"


def cannot_load(error: ImportError) -> str:
    """What to say where a file of the blora folder is missing, or of a different version."""
    return (
        f"blora_preflight.py {VERSION} cannot use the blora folder beside it ({error}): copy the "
        "whole bundle again"
    )


if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit("error: this Python is older than 3.10: activate kohya's venv, or use a newer one")
try:
    import blora

    if getattr(blora, "VERSION", "unknown") != VERSION:
        raise ImportError(f"it is version {getattr(blora, 'VERSION', 'unknown')}", name="blora")
    from blora.preflight.base_weights import check_base_weights
    from blora.preflight.checkpoint import NOT_SET, PLACEHOLDER, explain_model
    from blora.preflight.counts import check_counts
    from blora.preflight.files import check_files
    from blora.preflight.names import check_file, watch_names
    from blora.preflight.option_warnings import check_options
    from blora.preflight.plan import plan
    from blora.preflight.processes import (
        Started,
        check_device,
        check_processes,
        printed_command,
        processes,
    )
    from blora.preflight.rehearsal import (
        Rehearsal,
        read_options,
        rehearse,
        trainer_environment,
    )
    from blora.preflight.report import Report, attempt, cause, print_report
    from blora.preflight.steps import check_steps, is_unknown, is_without_weights, other_optimizer
    from blora.preflight.trainer import check_release
    from blora.preflight.trainer_errors import ended_sentence, frames, refusal
    from blora.preflight.trainer_warnings import listening, pass_on
    from blora.sheet import check_page, thumbnail_limit
    from blora.text import BloraError, counted, escape_unencodable, printable
except ImportError as error:
    sys.exit(f"error: {cannot_load(error)}")

ANNOUNCEMENT = "Rehearsing the training with the trainer's own code; this takes a few seconds."


@dataclass(frozen=True)
class Training:
    """A training as it would be started, and how it is to be checked."""

    script: Path
    words: list[str]  # its options
    accelerate: list[str]  # what stands before the script: "accelerate", "launch", "--multi_gpu"
    rehearses: bool = True
    preview: Path | None = None  # the sheet to draw
    terminal: TextIO | None = None  # for progress; None beside JSON


# ---- The rehearsal -------------------------------------------------------------------------------


def conclude(rehearsal: Rehearsal, report: Report) -> None:
    """Why the trainer came no further, if it did not."""
    printed, failure = rehearsal.printed.getvalue(), rehearsal.failure
    if rehearsal.missing:
        report.notes.append(f"{rehearsal.missing}, so the training was not rehearsed")
    elif failure is None:
        if not rehearsal.ready and not report.errors:
            report.errors.append(ended_sentence(printed))
    elif isinstance(failure, ImportError):
        report.errors.append(refusal(failure, rehearsal.args, printed))
    else:
        check_failure(failure, rehearsal, report)


def check_failure(failure: BaseException, rehearsal: Rehearsal, report: Report) -> None:
    """Why the trainer stopped, unless broken pictures say it already."""
    from blora.preflight.images import stumbled_over

    words = refusal(failure, rehearsal.args, rehearsal.printed.getvalue())
    is_reading = any(frame.f_code.co_name == "__getitem__" for frame in frames(failure))
    if is_without_weights(rehearsal):
        report.notes.append(
            f"without weights the rehearsal goes no further than the network ({cause(failure)})"
        )
    elif is_unknown(rehearsal):
        report.warnings.append(
            "the rehearsal could not go through the first steps, so the optimizer, the saves and "
            f"--resume were not tried ({cause(failure)})"
        )
    elif sentence := explain_model(rehearsal.args, failure) or other_optimizer(rehearsal):
        report.errors.append(sentence)
    elif not (is_reading and report.errors):
        report.errors += stumbled_over(failure) or [words]


def check_pictures(training: Training, rehearsal: Rehearsal, report: Report) -> int:
    """Everything that the dataset shows; returns the pixels of the training's largest batch."""
    from blora.preflight.dataset import list_folders
    from blora.preflight.images import check_dataset
    from blora.preflight.preview import write_preview

    limit_for = thumbnail_limit if training.preview else None
    dataset = check_dataset(rehearsal, training.terminal, limit_for, report)
    report.plan["images"] = list_folders(dataset.folders)
    if epoch := dataset.epoch:
        report.plan["epoch"] = (
            f"{counted(epoch.images, 'image')} with {counted(epoch.captions, 'caption')}, "
            f"{epoch.repeated} with repeats, {counted(epoch.batches, 'batch', 'batches')}"
        )
    if training.preview:
        write_preview(training.preview, dataset.folders, dataset.opened, report)
    return dataset.epoch.largest_batch if dataset.epoch else 0


def check_rehearsed(training: Training, rehearsal: Rehearsal, report: Report) -> None:
    """Everything that the trainer's own code says of the training, and what it does not say."""
    watch_names(rehearsal)
    if rehearsal.trainer:
        check_release(training.script, report)
    rehearse(training.script, rehearsal)
    pixels = check_pictures(training, rehearsal, report) if rehearsal.group else 0
    conclude(rehearsal, report)
    if training.preview and not rehearsal.group and not report.errors:
        why = rehearsal.missing or "the rehearsal ended before the trainer built its datasets"
        report.errors.append(f"cannot draw the pictures ({why}): remove --preview (BLORA_PREVIEW)")
    if rehearsal.ready:
        line = training.accelerate, str(training.script)
        started = attempt(report, "count the processes", processes, *line) or Started()
        attempt(report, "work out the plan", plan, rehearsal, started, pixels, report)
        base = rehearsal.merged, rehearsal.modules, rehearsal.args
        attempt(report, "check the base weights", check_base_weights, *base, report)
        attempt(report, "check the options", check_options, rehearsal, report)
        attempt(report, "check the rehearsed steps", check_steps, rehearsal, report)
        attempt(report, "check the numbers", check_counts, rehearsal, started, report)
        device = rehearsal.accelerator.device.type
        check_device(device, training.accelerate, started, report)
        check_processes(started, report)


def check_start(training: Training) -> None:
    """What can be said before the trainer reads the options; BloraError for what is wrong."""
    if not training.script.is_file():
        raise BloraError(
            f'no training script at "{training.script}": run this in a kohya sd-scripts or '
            "kohya_ss folder"
        )
    if any(word.rpartition("=")[2] == PLACEHOLDER for word in training.words):
        raise BloraError(NOT_SET)


def check_trainer(training: Training, rehearsal: Rehearsal, report: Report) -> None:
    """Let the trainer read the options, check the files that they name, and rehearse."""
    read_options(training.script, training.words, rehearsal)
    if rehearsal.missing or rehearsal.failure:
        conclude(rehearsal, report)
        return
    check_files(rehearsal.args, report)
    attempt(report, "check the names of options", check_file, rehearsal, report)
    if rehearsal.args.dataset_config and not report.errors:
        from blora.preflight.folders import check_config

        given = rehearsal.given
        attempt(report, "check the dataset config", check_config, rehearsal.args, given, report)
    if training.rehearses and not report.errors:
        if training.terminal:
            print(ANNOUNCEMENT, file=training.terminal, flush=True)
        check_rehearsed(training, rehearsal, report)


def check(training: Training) -> Report:
    """Every stage; an error of one ends before the next."""
    report = Report()
    if note := blora.leftovers():
        report.notes.append(note)
    try:
        check_start(training)
        with (
            trainer_environment(training.script, training.words) as rehearsal,
            listening() as heard,
        ):
            check_trainer(training, rehearsal, report)
            attempt(report, "pass on warnings", pass_on, heard, rehearsal.args, report)
    except BloraError as error:
        report.errors.append(str(error))
    except ImportError as error:  # of what only the pictures need
        is_ours = (error.name or "").startswith("blora")
        sentence = cannot_load(error) if is_ours else refusal(error, argparse.Namespace(), "")
        report.errors.append(sentence)
    return report


# ---- Command line --------------------------------------------------------------------------------


def setting(name: str) -> str:
    """A setting from the environment, without the quote marks and blanks that cmd leaves in it."""
    return os.environ.get(name, "").strip().strip("\"'")


def build_parser() -> argparse.ArgumentParser:
    """The training script, and its options behind it."""
    parser = argparse.ArgumentParser(
        prog="blora_preflight.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    # fmt: off
    add("--version", action="version", version=f"%(prog)s {VERSION}")
    add("--json", action="store_true", help="print it as JSON")
    add("--no_rehearsal", action="store_true", default=setting("BLORA_REHEARSAL") == "0",
        help="check files only, without a rehearsal (or set BLORA_REHEARSAL to 0)")
    add("--preview", metavar="SHEET.html", type=lambda path: Path(path).expanduser(),
        default=setting("BLORA_PREVIEW") if os.environ.get("BLORA_PREVIEW") else None,
        help="show the pictures as the trainer will see them (or set BLORA_PREVIEW)")
    add("script", help="the training script, or a file with what the GUI printed")
    add("options", nargs=argparse.REMAINDER, help="the options it will get")
    # fmt: on
    return parser


def check_preview(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse, with exit code 2, a sheet that could not be written."""
    if args.preview and args.no_rehearsal:
        parser.error("--preview requires the rehearsal: remove --no_rehearsal (BLORA_REHEARSAL=0)")
    try:
        if args.preview:
            check_page(args.preview, "--preview (BLORA_PREVIEW)")
    except BloraError as error:
        parser.error(printable(str(error)))


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 1 where the training would fail."""
    escape_unencodable()
    parser = build_parser()
    args = parser.parse_args(argv)
    check_preview(args, parser)
    words = [args.script]
    if args.script.lower().endswith(".txt"):
        try:
            words = printed_command(Path(args.script))
        except BloraError as error:
            parser.error(printable(str(error)))
    words += args.options
    # The whole line may stand here, with accelerate and its options before the script.
    start = next((i for i, word in enumerate(words) if word.endswith(".py")), 0)
    training = Training(
        Path(words[start]),
        words[start + 1 :],
        words[:start],
        rehearses=not args.no_rehearsal,
        preview=args.preview,
        terminal=None if args.json else sys.stderr,
    )
    try:
        report = check(training)
    except KeyboardInterrupt:
        return 130  # as a shell counts Ctrl+C
    if args.json:
        print(json.dumps(asdict(report), indent=2))
    else:
        print_report(report)
    return 1 if report.errors else 0


if __name__ == "__main__":
    sys.exit(main())
