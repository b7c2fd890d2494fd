"""The network that a training built: its modules, their parameters, and their bytes."""

from __future__ import annotations

from argparse import Namespace
from collections import Counter
from dataclasses import dataclass
from typing import Any

from blora.sdxl import block_of

MANY_BLOCKS = 11  # the U-Net's blocks with attention: where more are trained, nearly all are
BYTES = {"float": 4, "fp16": 2, "bf16": 2}  # of a number, by --save_precision


@dataclass(frozen=True)
class Built:
    """The network that will be trained: parameters of each module, by kohya's name."""

    modules: dict[str, int]

    @property
    def parameters(self) -> int:
        return sum(self.modules.values())

    @property
    def blocks(self) -> frozenset[str]:
        return frozenset(block_of(name) for name in self.modules if name.startswith("lora_unet"))

    @property
    def trains_text(self) -> bool:
        return any(name.startswith("lora_te") for name in self.modules)


def built(network: Any) -> Built:
    """The modules of a network and their trained parameters."""
    modules: Counter[str] = Counter()
    for name, parameter in network.named_parameters():
        modules[name.split(".")[0]] += parameter.numel()
    return Built(dict(modules))


def bytes_trained(args: Namespace) -> int:
    """Bytes of a number of the LoRA while it is trained."""
    return 2 if args.full_fp16 or args.full_bf16 else 4


def file_bytes(network: Built, args: Namespace) -> int:
    """Bytes of a saved LoRA."""
    each = BYTES.get(args.save_precision, bytes_trained(args))
    return network.parameters * each
