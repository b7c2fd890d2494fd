"""Print as JSON what pre-flight sees in the datasets that sd-scripts makes of a command line.

  PYTHONPATH=BUNDLE KOHYA_PYTHON dataset_probe.py KOHYA_ROOT SHEET [options of the training...]

sd-scripts' own train() runs until its datasets are made; no model is loaded. The folder it runs in
is where the paths of the dataset config are right. A SHEET that is not "" is drawn.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from blora.preflight.dataset import list_folders
from blora.preflight.folders import check_config
from blora.preflight.images import check_dataset, stumbled_over
from blora.preflight.preview import write_preview
from blora.preflight.rehearsal import read_options, trainer_environment
from blora.preflight.report import Report
from blora.sheet import thumbnail_limit


class Made(BaseException):
    """The datasets are there."""


def make_datasets(rehearsal: Any) -> None:
    """Record the datasets that train() makes, and its arguments as it then has them."""
    import sdxl_train_network

    class Trainer(sdxl_train_network.SdxlNetworkTrainer):
        def assert_extra_args(self, args, group, *more):
            rehearsal.args, rehearsal.group = args, group
            raise Made

    with suppress(Made):
        Trainer().train(rehearsal.args)


def look(kohya: str, sheet: str, *argv: str) -> dict[str, Any]:
    report, script, words = Report(), Path(kohya, "sdxl_train_network.py"), list(argv)
    sys.path.insert(0, kohya)
    with trainer_environment(script, words) as rehearsal:
        read_options(script, words, rehearsal)
        check_config(rehearsal.args, rehearsal.given, report)
        try:
            make_datasets(rehearsal)
        except Exception as error:
            return {"errors": stumbled_over(error), "warnings": [], "notes": []}
        dataset = check_dataset(rehearsal, None, thumbnail_limit, report)
    if sheet:
        write_preview(Path(sheet), dataset.folders, dataset.opened, report)
    said = {kind: getattr(report, kind) for kind in ("errors", "warnings", "notes")}
    epoch = vars(dataset.epoch) if dataset.epoch else None
    folders, opened = list_folders(dataset.folders), len(dataset.opened)
    return {**said, "folders": folders, "epoch": epoch, "opened": opened}


if __name__ == "__main__":
    print(json.dumps(look(*sys.argv[1:])))
