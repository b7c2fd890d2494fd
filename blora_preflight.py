#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["toml"]
# ///
"""Check a training before it begins, and describe it.

  blora_preflight.py sdxl_train_network.py --pretrained_model_name_or_path=... --dataset_config=...
      takes the command line of the training, as the launchers pass it and the kohya_ss GUI
      prints it. First it looks at files, folders, the checkpoint and the output. Then it
      rehearses: it runs the trainer's own code up to its first step, without the weights, and
      opens every picture as the trainer does. Nothing is written
  blora_preflight.py --preview sheet.jpg sdxl_train_network.py ...
      draws the pictures as the trainer will see them
  blora_preflight.py --json sdxl_train_network.py ...
      prints the same as JSON

Exit code 1 if the training would fail. Warnings never stop it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

VERSION = "2.0.0"

if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit("error: this Python is older than 3.10: activate kohya's venv, or use a newer one")
try:
    import blora

    if getattr(blora, "VERSION", "unknown") != VERSION:
        raise ImportError(f"it is version {getattr(blora, 'VERSION', 'unknown')}", name="blora")
    from blora.preflight.files import look
    from blora.preflight.option_warnings import advise, check_device, check_processes, processes
    from blora.preflight.options import parse_options
    from blora.preflight.plan import Started, plan
    from blora.preflight.rehearsal import Rehearsal, rehearse
    from blora.preflight.report import Report, attempt, print_report
    from blora.preflight.trainer_errors import ended_sentence, is_of_the_rehearsal, refusal
    from blora.text import BloraError, counted, say
except ImportError as error:
    sys.exit(
        f"error: blora_preflight.py {VERSION} cannot use the blora folder beside it ({error}): "
        "copy the whole bundle again"
    )

NOT_TOLD = "this release of sd-scripts does not let us tell the whole plan"


# ---- The rehearsal -------------------------------------------------------------------------------


def conclude(rehearsal: Rehearsal, report: Report) -> None:
    """Why it came no further, if it did not."""
    printed, failure = rehearsal.printed.getvalue(), rehearsal.failure
    if rehearsal.missing:
        report.notes.append(f"{rehearsal.missing}, so the training was not rehearsed")
    elif failure and is_of_the_rehearsal(failure):
        report.notes.append(
            f"without weights the rehearsal goes no further than the network ({failure})"
        )
    elif failure:
        report.errors += named_pictures(failure) or [refusal(failure, rehearsal.args, printed)]
    elif not rehearsal.ready:
        report.errors.append(ended_sentence(printed))


def named_pictures(failure: BaseException) -> list[str]:
    """A sentence for each picture that the trainer stumbled over."""
    try:
        # It needs numpy and Pillow, which the look does without.
        from blora.preflight.images import stumbled_over
    except ImportError:
        return []
    return stumbled_over(failure)


def look_at_pictures(
    rehearsal: Rehearsal, given: list[str], preview: Path | None, bar: TextIO | None, report: Report
) -> int:
    """Everything that the dataset shows; hands back the pixels of its largest batch."""
    from blora.preflight.captions import in_words
    from blora.preflight.images import check_dataset
    from blora.preflight.preview import thumbnail_side, write_preview

    side = thumbnail_side if preview else lambda count: 0
    datasets, kept_back = rehearsal.datasets, rehearsal.validation
    seen = check_dataset(rehearsal.args, given, datasets, report, bar, side, kept_back)
    report.plan["images"] = in_words(seen.folders)
    if seen.epoch:
        report.plan["epoch"] = (
            f"{counted(seen.epoch.images, 'image')} with "
            f"{counted(seen.epoch.captions, 'caption')}, {seen.epoch.repeated} with repeats, "
            f"{counted(seen.epoch.batches, 'batch', 'batches')}"
        )
    if preview:
        try:
            write_preview(preview, seen.folders, seen.opened)
            report.notes.append(f'"{preview}" shows the pictures as the trainer will see them')
        except BloraError as error:  # the training does without
            report.warnings.append(str(error))
    return seen.epoch.largest_batch if seen.epoch else 0


def check_rehearsed(
    script: Path,
    words: list[str],
    accelerate: list[str],
    preview: Path | None,
    bar: TextIO | None,
    report: Report,
) -> None:
    """Everything that the trainer's own code says of the training, and what it does not say."""
    rehearsal = rehearse(script, words)
    conclude(rehearsal, report)
    pixels = 0
    if rehearsal.group:
        given = list(parse_options(words).values)
        pixels = look_at_pictures(rehearsal, given, preview, bar, report)
    if rehearsal.ready:
        started = attempt(report, NOT_TOLD, processes, accelerate, str(script)) or Started()
        attempt(report, NOT_TOLD, plan, rehearsal, started, pixels, report)
        attempt(report, NOT_TOLD, advise, rehearsal, report)
        check_device(rehearsal.accelerator.device.type, accelerate, report)
        check_processes(started, report)


# ---- Both stages ---------------------------------------------------------------------------------


def check(
    script: Path,
    words: list[str],
    accelerate: list[str],
    rehearses: bool,
    preview: Path | None = None,
    bar: TextIO | None = None,
) -> Report:
    """Both stages; what fails at the look ends at once."""
    report = Report()
    try:
        look(script, parse_options(words), report)
        if rehearses and not report.errors:
            if bar:
                say("Rehearsing the training on the trainer's own code; this takes some seconds.")
            check_rehearsed(script, words, accelerate, preview, bar, report)
    except BloraError as error:
        report.errors.append(str(error))
    if preview and not rehearses:
        report.notes.append("there is no preview without the rehearsal")
    return report


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
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.add_argument(
        "--no_rehearsal",
        action="store_true",
        default=setting("BLORA_REHEARSAL") == "0",
        help="only look, without the trainer's own code (or set BLORA_REHEARSAL to 0)",
    )
    parser.add_argument(
        "--preview",
        type=Path,
        metavar="SHEET.jpg",
        default=setting("BLORA_PREVIEW") or None,
        help="draw the pictures as the trainer will see them (or set BLORA_PREVIEW)",
    )
    parser.add_argument("script", help="the training script")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="the options it will get")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 1 where the training would fail."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    args = build_parser().parse_args(argv)
    words = [args.script, *args.options]
    # The whole line may stand here, with accelerate and its options before the script.
    start = next((i for i, word in enumerate(words) if word.endswith(".py")), 0)
    try:
        report = check(
            Path(words[start]),
            words[start + 1 :],
            words[:start],
            not args.no_rehearsal,
            args.preview.expanduser() if args.preview else None,
            None if args.json else sys.stderr,
        )
    except KeyboardInterrupt:
        return 130  # as a shell counts Ctrl+C
    if args.json:
        print(json.dumps(asdict(report), indent=2))
    else:
        print_report(report)
    return 1 if report.errors else 0


if __name__ == "__main__":
    sys.exit(main())
