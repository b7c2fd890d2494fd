"""Whether a slice changes a layer by exactly its strength times what the source did."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import torch
from lora_algebra import Module, bias_change, weight_change
from lora_forms import FORMS, TRAITS, base_weight
from slicing import all_traits, cut, everything

# The largest relative error of a stored number: half of its last bit, and where it is computed in
# fp32 also the roundings of the strength and of the product.
DTYPES = {
    torch.float16: 2**-11 + 2**-23,
    torch.bfloat16: 2**-8 + 2**-23,
    torch.float32: 2**-22,
    torch.float64: 2**-51,
}
SUBNORMAL = 2**-25  # half of fp16's smallest number


def carriers(module: Module) -> set[str]:
    """The tensors of a module that a strength multiplies."""
    every = set().union(*(form.scaled for form in FORMS.values()))
    return (every - {"lokr_w1_a"} if "lokr_w1" in module else every) & set(module)


def assert_scaled(name: str, result: Module, source: Module, strength: float) -> None:
    """The result's change is the strength times the source's, within the stored type's rounding."""
    scaled = carriers(source)
    unit = max(DTYPES[source[suffix].dtype] for suffix in scaled)
    sizes = {suffix: tensor.double().abs() for suffix, tensor in result.items()}
    tiny = sizes | {suffix: torch.full_like(sizes[suffix], SUBNORMAL) for suffix in scaled}
    base = base_weight(name) if {"on_input", "a1.weight"} & set(source) else None
    size = None if base is None else base.abs()
    for change in (weight_change, lambda m, _: bias_change(m)):
        before, after = change(source, base), change(result, base)
        if before is None:
            assert after is None
            continue
        # With nothing cancelled: what all numbers' errors together can amount to.
        slack = unit * change(sizes, size) + change(tiny, size)
        assert torch.all((after - strength * before).abs() <= slack + 1e-300)


def digits(strength: float) -> str:
    """All digits of a float, without an exponent."""
    return f"{Decimal(strength):f}"


def slice_all(lora: Path, strength: float, *options: object) -> Path:
    """Everything that the file holds, at the strength."""
    return cut(lora, *everything(lora.parent), "--alphas", digits(strength), *options)


def both_traits(folder: Path) -> tuple[object, ...]:
    """The options to keep the layers of INPUT from one file and those of OUTPUT from another."""
    return ("--traits", *TRAITS, "--traits_file", all_traits(folder, **TRAITS))
