"""A slice changes each layer by exactly its strength times what the source did.

Proven for every algorithm and form with arithmetic of the tests' own in float64, lora_algebra.py.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from exact_strength import (
    DTYPES,
    PROVE,
    assert_scaled,
    both_traits,
    digits,
    slice_all,
    small_modules,
    strengths,
)
from hypothesis import given
from hypothesis import strategies as st
from lora_algebra import read_modules
from lora_forms import FORMS, INPUT, OUTPUT, REFUSED, make_module, on_each_layer, write_modules
from namings import with_alpha
from slicing import all_traits, refusal, slice_lora, stored
from torch import Tensor

# ---- Strength times the change -------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.3, -1.0])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_is_scaled_on_every_kind_of_layer_that_has_it(tmp_path, form, strength):
    sources = on_each_layer(form, 1.5, torch.float16)
    result = read_modules(slice_all(write_modules(tmp_path / "in.safetensors", sources), strength))
    assert set(result) == set(sources)
    for name, source in sources.items():
        assert_scaled(name, result[name], source, strength)


@PROVE
@given(
    first=small_modules(INPUT),
    second=small_modules(OUTPUT),
    strength=strengths,
    other=strengths,
    apart=st.booleans(),
)
def test_the_change_of_the_slice_is_strength_times_the_change_of_the_source(
    first, second, strength, other, apart
):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        loras = [write_modules(folder / "a.safetensors", first if apart else first | second)]
        if apart:
            loras.append(write_modules(folder / "b.safetensors", second))
        output = folder / "out.safetensors"
        args = (*both_traits(folder), "--alphas", digits(strength), digits(other))
        assert slice_lora("--loras", *loras, *args, "--output_path", output) == 0
        result = read_modules(output)
    assert set(result) == set(first | second)
    for name, source in (first | second).items():
        assert_scaled(name, result[name], source, strength if name in first else other)


@PROVE
@given(first=small_modules(INPUT), second=small_modules(OUTPUT), strength=strengths)
def test_cut_by_cut_each_file_has_strength_times_the_change_too(first, second, strength):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lora = write_modules(folder / "a.safetensors", first | second)
        args = (*both_traits(folder), "--alphas", digits(strength), "1", "--not_combined")
        assert slice_lora("--loras", lora, *args, "--output_path", folder / "out.safetensors") == 0
        scaled = read_modules(folder / "out_input.safetensors")
        untouched = stored(folder / "out_output.safetensors")
        before = stored(lora)
    added = {f"{name}.alpha" for name, module in second.items() if "alpha" not in module}
    assert untouched.keys() - before.keys() <= added
    assert {key: untouched[key] for key in before if key in untouched} == {
        key: tensor for key, tensor in before.items() if key.split(".")[0] in second
    }
    assert {key.split(".")[0] for key in untouched} == set(second)
    assert set(scaled) == set(first)
    for module, source in first.items():
        assert_scaled(module, scaled[module], source, strength)


# ---- To the byte ---------------------------------------------------------------------------------

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def any_bits(shape: torch.Size, dtype: torch.dtype, seed: int) -> Tensor:
    """Random bits: NaN, inf, -0 and the smallest numbers among them."""
    kind = BITS[dtype.itemsize]
    limits = torch.iinfo(kind)
    noise = torch.Generator().manual_seed(seed)
    return torch.randint(limits.min, limits.max, shape, dtype=kind, generator=noise).view(dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("form", (FORMS | REFUSED).values(), ids=FORMS | REFUSED)
def test_at_strength_1_every_tensor_is_the_sources_to_the_byte(tmp_path, form, dtype):
    modules = on_each_layer(form, None, torch.float32)
    for seed, module in enumerate(modules.values()):
        for suffix, tensor in module.items():
            module[suffix] = any_bits(tensor.shape, dtype, seed)
        module["alpha"] = torch.tensor(0.1 * seed, dtype=dtype)
    lora = write_modules(tmp_path / "in.safetensors", modules)
    assert stored(slice_all(lora, 1.0)) == stored(lora)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_strength_sits_in_these_tensors_and_in_no_other(tmp_path, form, dtype):
    sources = on_each_layer(form, 1.5, dtype)
    lora = write_modules(tmp_path / "in.safetensors", sources)
    output = slice_all(lora, 0.3)
    before, after, result = stored(lora), stored(output), read_modules(output)
    assert set(after) == {f"{n}.{suffix}" for n, m in sources.items() for suffix in with_alpha(m)}
    assert {key for key in before if after[key] != before[key]} == {
        f"{name}.{suffix}" for name in sources for suffix in form.scaled
    }
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    for name, source in sources.items():
        for suffix in form.scaled:
            rounded_once = (source[suffix].to(wide) * torch.tensor(0.3, dtype=wide)).to(dtype)
            assert torch.equal(result[name][suffix], rounded_once)


# ---- What cannot carry a strength ----------------------------------------------------------------


@pytest.mark.parametrize("strength", ["0", "0.999"])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_carry_a_strength_is_refused_and_said_why(tmp_path, capsys, kind, strength):
    name = INPUT["attention"]
    module = make_module(name, REFUSED[kind], 2, None, torch.float32)
    lora = write_modules(tmp_path / "in.safetensors", {name: module})
    output = tmp_path / "out.safetensors"
    args = ("--traits", "all", "--traits_file", all_traits(tmp_path), "--alphas", strength)
    error = refusal(capsys, "--loras", lora, *args, "--output_path", output)
    assert error.startswith(f"cannot rescale {name} in {lora}, because ")
    assert f"it is {kind.split(',')[0]} and" in error
    assert "set the strength where the LoRA is used" in error
    assert not output.exists()
