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


def make_datasets(argv: list[str], rehearsal: Any) -> None:
    """Record the datasets that train() makes, and its arguments as it then has them."""
    import sdxl_train_network

    class Trainer(sdxl_train_network.SdxlNetworkTrainer):
        def assert_extra_args(self, args, group, *more):
            rehearsal.args, rehearsal.group = args, group
            raise Made

    with suppress(Made):
        Trainer().train(rehearsal.args)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("kohya", type=Path)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--sheet", type=Path)
    end = sys.argv.index("--")
    ours, argv = parser.parse_args(sys.argv[1:end]), sys.argv[end + 1 :]
    sys.path[:0] = [str(ours.kohya), str(ours.bundle)]
    from blora.preflight.dataset import list_folders
    from blora.preflight.folders import check_config
    from blora.preflight.images import check_dataset, stumbled_over
    from blora.preflight.preview import write_preview
    from blora.preflight.rehearsal import read_options, trainer_environment
    from blora.preflight.report import Report
    from blora.sheet import thumbnail_limit

    report = Report()
    script = ours.kohya / "sdxl_train_network.py"
    with trainer_environment(script, argv) as rehearsal:
        read_options(script, argv, rehearsal)
        check_config(rehearsal.args, rehearsal.given, report)
        try:
            make_datasets(argv, rehearsal)
        except Exception as error:
            answer = {"errors": stumbled_over(error), "warnings": [], "notes": []}
            print(json.dumps(answer), file=sys.__stdout__)
            return 1
        dataset = check_dataset(rehearsal, None, thumbnail_limit, report)
    if ours.sheet:
        write_preview(ours.sheet, dataset.folders, dataset.opened, report)
    answer = {
        "errors": report.errors,
        "warnings": report.warnings,
        "notes": report.notes,
        "folders": list_folders(dataset.folders),
        "epoch": vars(dataset.epoch) if dataset.epoch else None,
        "opened": len(dataset.opened),
    }
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
