"""The network module of blora_blocks.py, which writes down what each attn2 of the U-Net hears.

A line a call, into a file beside the looks: the number of the look, the layer, and whether the
unconditional and the conditional row of its text are those of the first prompt, of the second, or
of neither.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blora.drawing.injection import Injection, read_looks


class CountedInjection(Injection):
    """Its own hooks stand behind those of the network: they see what the layer gets."""

    def __init__(self, path: Path) -> None:
        super().__init__(read_looks(path))
        self.lines = path.with_suffix(".calls").open("w")
        self.number = 0
        self.texts: dict[str, torch.Tensor] = {}  # [2, 77, 2048] of each prompt

    def apply_to(self, text_encoders: list[Any], unet: nn.Module) -> None:
        super().apply_to(text_encoders, unet)
        for name, layer in unet.named_modules():
            if name.endswith("attn2"):
                layer.register_forward_pre_hook(partial(self.count, name), with_kwargs=True)

    def set_multiplier(self, number: float) -> None:
        super().set_multiplier(number)
        self.number = int(number)

    def count(self, name: str, _: nn.Module, args: Any, kwargs: dict[str, torch.Tensor]) -> None:
        context = kwargs["context"]
        if self.look.is_kept:
            self.texts["second"] = context
        elif self.number == 0:
            self.texts["first"] = context
        rows = [self.whose(row, context[row]) for row in (0, 1)]
        print(self.number, name, *rows, file=self.lines, flush=True)

    def whose(self, row: int, text: torch.Tensor) -> str:
        whose = [name for name, rows in self.texts.items() if torch.equal(rows[row], text)]
        return "both" if len(whose) == 2 else whose[0] if whose else "neither"


def create_network_from_weights(
    multiplier: float, file: str, *models: object, **kwargs: object
) -> tuple[CountedInjection, dict[str, Any]]:
    return CountedInjection(Path(file)), {}
