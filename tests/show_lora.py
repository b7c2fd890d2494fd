"""Show what LoRA files hold, block by block: modules, tensors, rank, and the size of the change.

python show_lora.py FILE...
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import torch
from safetensors.torch import load_file

BLOCK_WORDS = 6


def module_change(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    """The weight change of one LoRA module: alpha / rank * lora_up @ lora_down."""
    up, down = tensors[f"{module}.lora_up.weight"], tensors[f"{module}.lora_down.weight"]
    return tensors[f"{module}.alpha"] / down.shape[0] * (up.float() @ down.float())


def block_lines(path: Path) -> list[str]:
    """A line for each block of the file."""
    tensors = load_file(path)
    blocks = defaultdict(list)
    for key in tensors:
        module = key.split(".")[0]
        blocks["_".join(module.split("_")[:BLOCK_WORDS])].append(module)
    lines = []
    for block, keys in sorted(blocks.items()):
        modules = sorted(set(keys))
        norms = torch.stack([module_change(tensors, module).norm() for module in modules])
        moved = int((norms > 0).sum())
        rank = tensors[f"{modules[0]}.lora_down.weight"].shape[0]
        lines.append(
            f"  {block}: {len(modules)} modules ({moved} trained), {len(keys)} tensors, "
            f"rank {rank}, change {norms.norm():.3g}"
        )
    return lines


def main(argv: list[str]) -> int:
    """Print each file's name and size, then its blocks."""
    for path in map(Path, argv):
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")
        print(*block_lines(path), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
