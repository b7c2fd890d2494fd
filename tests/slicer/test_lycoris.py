"""LyCORIS writes the file, the slicer cuts it, and LyCORIS reads it as it should be."""

from __future__ import annotations

import pytest
import torch
from exact_strength import slice_all
from lora_algebra import bias_change, read_modules, weight_change
from lycoris_files import REFUSED, SCALED, lycoris_change, lycoris_file, reload_lycoris
from slicing import all_traits, refusal, stored


@pytest.mark.parametrize("strength", [0.3, -1.0])
@pytest.mark.parametrize("arguments", SCALED.values(), ids=SCALED)
def test_lycoris_reloads_a_slice_of_its_own_file_as_strength_times_the_change(
    tmp_path, arguments, strength
):
    lora = lycoris_file(tmp_path / "in.safetensors", arguments, torch.float32)
    source = reload_lycoris(lora, arguments)
    result = reload_lycoris(slice_all(lora, strength), arguments)
    assert set(result) == set(source) == set(read_modules(lora))
    for name, module in source.items():
        for before, after in zip(lycoris_change(module), lycoris_change(result[name]), strict=True):
            assert before.abs().max() > 1e-3
            torch.testing.assert_close(after, strength * before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("arguments", SCALED.values(), ids=SCALED)
def test_the_formulas_of_these_tests_are_those_of_lycoris(tmp_path, arguments):
    lora = lycoris_file(tmp_path / "in.safetensors", arguments, torch.float32)
    modules = read_modules(lora)
    for name, module in reload_lycoris(lora, arguments).items():
        base = module.org_module[0].weight if arguments["algo"] in ("ia3", "glora") else None
        ours = [weight_change(modules[name], base), bias_change(modules[name])]
        theirs = lycoris_change(module)
        for mine, its in zip([c for c in ours if c is not None], theirs, strict=True):
            torch.testing.assert_close(mine.reshape(its.shape), its.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("arguments", REFUSED.values(), ids=REFUSED)
def test_what_lycoris_cannot_scale_is_kept_to_the_byte_at_1_and_refused_at_another_strength(
    tmp_path, capsys, arguments
):
    lora = lycoris_file(tmp_path / "in.safetensors", arguments, torch.float16)
    assert stored(slice_all(lora, 1.0)) == stored(lora)
    capsys.readouterr()
    args = ("--traits", "all", "--traits_file", all_traits(tmp_path), "--alphas", "0.5")
    output = tmp_path / "half.safetensors"
    error = refusal(capsys, "--loras", lora, *args, "--output_path", output)
    assert error.startswith("cannot rescale ")
    assert not output.exists()
