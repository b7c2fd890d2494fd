"""Write a checkpoint that is SDXL's by its names alone, for the stand-in, which does not read it.

python make_checkpoint.py FILE
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

NAMES = (
    "model.diffusion_model.label_emb.0.0.weight",
    "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight",
    "conditioner.embedders.1.model.ln_final.weight",
)


def main(argv: list[str]) -> int:
    """One number under each name."""
    save_file({name: np.zeros(1, dtype=np.float16) for name in NAMES}, Path(argv[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
