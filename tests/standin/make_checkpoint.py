"""Write a checkpoint that is SDXL's by names and shapes, for the stand-in, which does not read it.

python make_checkpoint.py FILE
"""

import sys
from pathlib import Path

from sdxl_checkpoint import sdxl_shapes, write_checkpoint

write_checkpoint(Path(sys.argv[1]), sdxl_shapes())
