"""A slice changes each layer by exactly its strength times what the source did.

Proven for every algorithm and form with arithmetic of the tests' own in float64, lora_algebra.py,
and with LyCORIS, which wrote the file and reads the slice.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import lycoris_files
import pytest
import torch
from exact_strength import DTYPES, assert_scaled, both_traits, digits, slice_all
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_algebra import Module, bias_change, read_modules, weight_change, with_alpha
from lora_forms import FORMS, INPUT, OUTPUT, REFUSED, make_module, on_each_layer, write_modules
from lycoris_files import SCALED, lycoris_change, lycoris_file, reload_lycoris
from slicing import everything, refused, slice_lora, stored
from torch import Tensor

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
    """Modules on one or both layers of so few numbers that hundreds of changes take seconds."""
    every = {layers[kind]: modules_on(kind, layers[kind]) for kind in ("3x3", "norm")}
    return st.fixed_dictionaries({}, optional=every).filter(bool)


@settings(derandomize=True, deadline=None, max_examples=150)  # the same examples on every run
@given(
    first=small_modules(INPUT),
    second=small_modules(OUTPUT),
    strength=strengths,
    other=strengths,
    way=st.sampled_from(["one file", "two files", "cut by cut"]),
)
def test_the_change_of_the_slice_is_strength_times_the_change_of_the_source(
    first, second, strength, other, way
):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = [first, second] if way == "two files" else [first | second]
        loras = [write_modules(folder / f"{n}.safetensors", m) for n, m in enumerate(sources)]
        args = [*both_traits(folder), "--alphas", digits(strength), digits(other)]
        args += ["--not_combined"] * (way == "cut by cut")
        output = folder / "out.safetensors"
        assert slice_lora("--output_path", output, "--loras", *loras, *args) == 0
        written = [read_modules(path) for path in sorted(folder.glob("out*"))]
    result = written[0] | written[-1]
    assert [set(modules) for modules in written] == (
        [set(first), set(second)] if way == "cut by cut" else [set(first | second)]
    )
    for name, source in (first | second).items():
        assert_scaled(name, result[name], source, strength if name in first else other)


def any_bits(shape: torch.Size, dtype: torch.dtype, seed: int) -> Tensor:
    """Random bits: NaN, inf, -0 and the smallest numbers among them."""
    data = random.Random(seed).randbytes(shape.numel() * dtype.itemsize)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)


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
        assert_scaled(name, result[name], source, 0.3)
        for suffix in form.scaled:
            rounded_once = (source[suffix].to(wide) * torch.tensor(0.3, dtype=wide)).to(dtype)
            assert torch.equal(result[name][suffix], rounded_once)


ITS_WEIGHTS = "it needs the weights it was trained on"
WHY = {
    **dict.fromkeys(("OFT", "BOFT"), "a rotation cannot be multiplied"),
    "T-LoRA": "the factors it started from are not in it",
    **dict.fromkeys(("DoRA", "LoHa with DoRA", "LoKr with DoRA"), ITS_WEIGHTS),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_carry_a_strength_is_refused_and_said_why(tmp_path, capsys, kind):
    name = INPUT["attention"]
    module = make_module(name, REFUSED[kind], 2, None, torch.float32)
    lora = write_modules(tmp_path / "in.safetensors", {name: module})
    algorithm = kind.split(",")[0]
    base = "give the checkpoint as --base_model, or " * (algorithm == "DoRA")
    traits = everything(tmp_path)
    for strength in ("0", "0.999"):
        assert refused(capsys, lora, *traits, "--alphas", strength) == (
            f"cannot rescale {name} in {lora}, because it is {algorithm} and {WHY[algorithm]}: "
            f"{base}cut it at 1.0 and set the strength where the LoRA is used"
        )


@pytest.mark.parametrize("arguments", SCALED.values(), ids=SCALED)
def test_lycoris_reloads_a_slice_of_its_own_file_as_strength_times_the_change(tmp_path, arguments):
    lora = lycoris_file(tmp_path / "in.safetensors", arguments, torch.float32)
    modules, source = read_modules(lora), reload_lycoris(lora, arguments)
    results = {
        strength: reload_lycoris(slice_all(lora, strength), arguments) for strength in (0.3, -1)
    }
    near = {"rtol": 1e-5, "atol": 1e-6}
    for name, module in source.items():
        changes = lycoris_change(module)
        base = module.org_module[0].weight if arguments["algo"] in ("ia3", "glora") else None
        ours = [weight_change(modules[name], base), bias_change(modules[name])]
        for mine, its in zip([c for c in ours if c is not None], changes, strict=True):
            torch.testing.assert_close(mine.reshape(its.shape), its.double(), **near)
        for strength, result in results.items():
            assert set(result) == set(source) == set(modules)
            for before, after in zip(changes, lycoris_change(result[name]), strict=True):
                assert before.abs().max() > 1e-3
                torch.testing.assert_close(after, strength * before, **near)


@pytest.mark.parametrize("arguments", lycoris_files.REFUSED.values(), ids=lycoris_files.REFUSED)
def test_what_lycoris_cannot_scale_is_kept_to_the_byte_at_1_and_refused_at_another_strength(
    tmp_path, capsys, arguments
):
    lora = lycoris_file(tmp_path / "in.safetensors", arguments, torch.float16)
    output = slice_all(lora, 1.0)
    assert stored(output) == stored(lora)
    output.unlink()
    capsys.readouterr()
    sentence = refused(capsys, lora, *everything(tmp_path), "--alphas", "0.5")
    assert sentence.startswith("cannot rescale ")
