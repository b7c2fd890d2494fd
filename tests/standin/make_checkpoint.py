"""Write a checkpoint that is SDXL's by names and shapes, for the stand-in, which does not read it.

python make_checkpoint.py FILE
"""

from __future__ import annotations

import sys
from pathlib import Path

from sdxl_checkpoint import sdxl_shapes, write_checkpoint


def main(argv: list[str]) -> None:
    """All tensors, and a hole where their numbers would be."""
    write_checkpoint(Path(argv[0]), sdxl_shapes())


if __name__ == "__main__":
    main(sys.argv[1:])
