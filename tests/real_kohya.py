"""The sd-scripts checkout and its Python that tests run on, where the environment names them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

KOHYA_ROOT, KOHYA_PYTHON = os.environ.get("KOHYA_ROOT"), os.environ.get("KOHYA_PYTHON")
if not (KOHYA_ROOT and KOHYA_PYTHON):
    pytest.skip(
        "NOT RUN on a real sd-scripts: set KOHYA_ROOT to a checkout and KOHYA_PYTHON to its python",
        allow_module_level=True,
    )
# Commands run in other folders. A venv's python must stay the link that it is.
KOHYA_ROOT, KOHYA_PYTHON = str(Path(KOHYA_ROOT).absolute()), str(Path(KOHYA_PYTHON).absolute())
