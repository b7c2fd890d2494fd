"""Print as JSON what pre-flight sees in the datasets that sd-scripts makes of a command line.

  KOHYA_PYTHON dataset_probe.py KOHYA_ROOT BUNDLE [--sheet SHEET.jpg] -- options of the training

sd-scripts' own train() runs until its datasets are made; no model is loaded. The folder it runs in
is where the paths of the dataset config are right.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any


class Made(BaseException):
    """The datasets are there."""


def make_datasets(argv: list[str]) -> tuple[argparse.Namespace, list[Any]]:
    """The datasets that train() makes, and its arguments as it then has them."""
    import sdxl_train_network
    from library import train_util

    groups = []

    class Trainer(sdxl_train_network.SdxlNetworkTrainer):
        def assert_extra_args(self, args, group, *more):
            groups.append(group)
            raise Made

    sys.argv = ["sdxl_train_network.py", *argv]
    parser = sdxl_train_network.setup_parser()
    args = parser.parse_args(argv)
    train_util.verify_command_line_training_args(args)
    args = train_util.read_config_from_file(args, parser)
    with suppress(Made):
        Trainer().train(args)
    return args, groups[0].datasets


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("kohya", type=Path)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--sheet", type=Path)
    end = sys.argv.index("--")
    ours, argv = parser.parse_args(sys.argv[1:end]), sys.argv[end + 1 :]
    sys.path[:0] = [str(ours.kohya), str(ours.bundle)]
    from blora.preflight.captions import in_words
    from blora.preflight.images import check_dataset, stumbled_over
    from blora.preflight.preview import thumbnail_side, write_preview
    from blora.preflight.report import Report

    try:
        args, datasets = make_datasets(argv)
    except Exception as error:
        print(json.dumps({"errors": stumbled_over(error), "warnings": [], "notes": []}))
        return 1
    report, given = Report(), [word[2:].split("=")[0] for word in argv if word.startswith("--")]
    seen = check_dataset(args, given, datasets, report, sys.stderr, thumbnail_side)
    if ours.sheet:
        write_preview(ours.sheet, seen.folders, seen.opened)
    answer = {
        "errors": report.errors,
        "warnings": report.warnings,
        "notes": report.notes,
        "folders": in_words(seen.folders),
        "epoch": vars(seen.epoch) if seen.epoch else None,
        "opened": len(seen.opened),
    }
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
