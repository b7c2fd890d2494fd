"""Whether a slice changes a layer by exactly its strength times what the source did."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import torch
from hypothesis import settings
from hypothesis import strategies as st
from lora_algebra import Module, bias_change, weight_change
from lora_forms import FORMS, SMALL, TRAITS, base_weight, make_module
from slicing import all_traits, cut, everything
from torch import Tensor

# The same examples on every run.
PROVE = settings(derandomize=True, deadline=None, max_examples=150)

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


def change_size(sizes: Module, change: Callable[[Module], Tensor], base: Tensor | None) -> Tensor:
    """The change with nothing cancelled: what all numbers' errors together can amount to."""
    return change(sizes) if base is None else weight_change(sizes, base.abs())


def assert_scaled(name: str, result: Module, source: Module, strength: float) -> None:
    """The result's change is the strength times the source's, within the stored type's rounding."""
    scaled = carriers(source)
    unit = max(DTYPES[source[suffix].dtype] for suffix in scaled)
    sizes = {suffix: tensor.double().abs() for suffix, tensor in result.items()}
    tiny = sizes | {suffix: torch.full_like(sizes[suffix], SUBNORMAL) for suffix in scaled}
    base = base_weight(name) if {"on_input", "a1.weight"} & set(source) else None
    for change in (lambda m: weight_change(m, base), bias_change):
        before, after = change(source), change(result)
        if before is None:
            assert after is None
            continue
        slack = unit * change_size(sizes, change, base) + change_size(tiny, change, base)
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


strengths = st.sampled_from([1.0, 0.0, -1.0, 0.5, 0.3, 1e-3]) | st.floats(-4, 4)


def modules_on(kind: str, name: str) -> st.SearchStrategy[Module]:
    """Modules of any form that a layer of this kind can have."""
    return st.builds(
        make_module,
        name=st.just(name),
        form=st.sampled_from([form for form in FORMS.values() if kind in form.kinds]),
        rank=st.sampled_from([1, 2, 5]),
        alpha=st.sampled_from([None, 0.0, 0.3, 1.0, 2.0, 16.0]),
        dtype=st.sampled_from(list(DTYPES)),
        seed=st.integers(0, 9),
    )


def small_modules(layers: dict[str, str]) -> st.SearchStrategy[dict[str, Module]]:
    """Modules on the small ones of these layers, on one of them at least."""
    every = {layers[kind]: modules_on(kind, layers[kind]) for kind in SMALL}
    return st.fixed_dictionaries({}, optional=every).filter(bool)
