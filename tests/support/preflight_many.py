"""Ask pre-flight about many trainings, each in a fork of a process that has imported the trainer.

  echo '[{"name": "...", "folder": "...", "words": [...], "path": ""}]' |
    KOHYA_PYTHON preflight_many.py SDXL_TRAIN_NETWORK.py

The import is half of what a rehearsal takes. Run it with the bundle on PYTHONPATH. Prints a line of
JSON for each: its name, the exit code, and what pre-flight printed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from toy_training import fork_each


class Screen(io.StringIO):
    """Where pre-flight prints, which sets how a stream takes letters."""

    def reconfigure(self, **_options: Any) -> None:
        """All letters are taken as they are."""


def ask(script: Path, training: dict[str, Any]) -> dict[str, Any]:
    """Pre-flight's answer, as from the command line."""
    import blora_preflight

    os.chdir(training["folder"])
    if training["path"]:
        sys.path.insert(0, training["path"])
    code, printed, said = 1, Screen(), Screen()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
        try:
            code = blora_preflight.main(["--json", str(script), *training["words"]])
        except BaseException:
            traceback.print_exc()
    answer = {"name": training["name"], "code": code}
    return answer | {"out": printed.getvalue(), "err": said.getvalue()}


if __name__ == "__main__":
    fork_each(Path(sys.argv[1]).absolute(), json.load(sys.stdin), ask)
