"""The LyCORIS releases that the tests use, and what each of them trains under a preset."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from importlib.metadata import distributions
from pathlib import Path

from kohya_folder import ROOT

PRESETS = sorted(path.stem for path in (ROOT / "lycoris_presets").glob("*.toml"))
# The newest is the one in the test environment; tests/check.sh puts the others in folders.
LYCORIS = ["3.2.0.post2", "3.4.0", "4.1.3"]
NEWEST = LYCORIS[-1]
RELEASES = Path(sys.prefix) / "lycoris"


def with_release(release: str, *command: object) -> str:
    """What this Python prints, in which LyCORIS is of that release."""
    folder = str(RELEASES / release)
    first = next(distributions(name="lycoris_lora", path=[folder, *sys.path]))
    assert first.version == release, "bash tests/check.sh installs the LyCORIS releases"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((folder, str(ROOT)))}
    return subprocess.check_output([sys.executable, *map(str, command)], env=env, text=True)


def trained_under(release: str, *presets: Path) -> dict[str, dict]:
    """What a LyCORIS release trains under each preset, by its name: see lycoris_modules.py."""
    printed = with_release(release, Path(__file__).with_name("lycoris_modules.py"), *presets)
    return {Path(name).stem: modules for name, modules in json.loads(printed).items()}


@cache
def trained(release: str) -> dict[str, dict]:
    """The same of the presets of the bundle."""
    return trained_under(release, *(ROOT / f"lycoris_presets/{name}.toml" for name in PRESETS))
