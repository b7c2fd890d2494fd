"""The LyCORIS releases that the tests use, and what each of them trains under a preset."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

from kohya_folder import ROOT

PRESETS = sorted(path.stem for path in (ROOT / "lycoris_presets").glob("*.toml"))
# The newest is the one in the test environment; tests/check.sh puts the others in folders.
LYCORIS = ["3.2.0.post2", "3.4.0", "4.1.3"]
NEWEST = LYCORIS[-1]
RELEASES = Path(sys.prefix) / "lycoris"


@cache
def trained(release: str, *others: str) -> dict[str, dict]:
    """What a LyCORIS release trains under each preset, or under others: see lycoris_modules.py."""
    folder = RELEASES / release
    env = {**os.environ, "PYTHONPATH": str(folder)}
    presets = others or [f"lycoris_presets/{name}.toml" for name in PRESETS]
    found = subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlib.metadata import version as v; print(v('lycoris_lora'))",
        ],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == release, "bash tests/check.sh installs the LyCORIS releases"
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("lycoris_modules.py"), *presets],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        check=True,
    )
    return {Path(name).stem: modules for name, modules in json.loads(done.stdout).items()}
