"""How the stand-in reads a dataset config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import toml


def load_user_config(path: str) -> dict[str, Any]:
    return toml.loads(Path(path).read_text(encoding="utf-8"))
