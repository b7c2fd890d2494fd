"""LoRAs of different alphas are joined under one, as diffusers reads them, and nothing changes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from exact_strength import assert_scaled, both_traits
from lora_algebra import Module, final_weight, read_modules
from lora_files import CONTENT, STYLE
from lora_forms import FORMS, INPUT, OUTPUT, REFUSED, WEIGHTS, base_weight, make_module
from lora_forms import write_modules as write
from slicing import Stored, refusal, slice_lora, stored

LORA = FORMS["LoRA"]


def loras(
    layers: dict[str, str], alphas: list[float | None], dtype: torch.dtype
) -> dict[str, Module]:
    """LoRA modules of rank 2 with these alphas, on one layer after the other."""
    return {
        layers[kind]: make_module(layers[kind], LORA, 2, alpha, dtype, seed)
        for seed, (kind, alpha) in enumerate(zip(WEIGHTS, alphas, strict=False))
    }


def join(
    folder: Path,
    first: dict[str, Module],
    second: dict[str, Module],
    strengths: tuple[float, float] = (1, 1),
) -> tuple[Stored, Stored, Path]:
    """Two files joined: the bytes before and after, and the file."""
    a, b = write(folder / "a.safetensors", first), write(folder / "b.safetensors", second)
    output = folder / "out.safetensors"
    args = (*both_traits(folder), "--alphas", *strengths, "--output_path", output)
    assert slice_lora("--loras", a, b, *args) == 0
    return stored(a) | stored(b), stored(output), output


ONE_ALPHA = [
    # alphas of the first file, of the second, and the smallest of all; None is the rank, which is 2
    ([4.0, 4.0, 4.0], [1.0], 1.0),
    ([0.3, 1.0, 1.0], [1.0, 0.3], 0.3),
    ([None, None], [1.0], 1.0),
    ([1.0, 1.0], [None], 1.0),
    ([0.0, 0.0], [8.0], 2.0),
    ([None, 0.0], [2.0, 2.0], 2.0),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("first", "second", "common"), ONE_ALPHA)
def test_differing_alphas_become_one_and_the_changes_stay(tmp_path, first, second, common, dtype):
    sources = [loras(INPUT, first, dtype), loras(OUTPUT, second, dtype)]
    before, after, output = join(tmp_path, *sources)
    assert {key.split(".")[0] for key in after} == {key.split(".")[0] for key in before}
    result = read_modules(output)
    # As diffusers reads it: one number for all, over each module's own rank.
    [alpha] = {float(module["alpha"]) for module in result.values()}
    assert alpha == pytest.approx(common, rel=2**-8)
    for name, source in (sources[0] | sources[1]).items():
        assert_scaled(name, result[name], source, 1.0)
        if "alpha" in source and float(source["alpha"]) == float(result[name]["alpha"]):
            assert all(after[f"{name}.{suffix}"] == before[f"{name}.{suffix}"] for suffix in source)
        # lora_down never changes.
        assert after[f"{name}.lora_down.weight"] == before[f"{name}.lora_down.weight"]


def test_a_strength_and_a_common_alpha_are_both_in_the_result(tmp_path):
    sources = loras(INPUT, [4.0, 1.0], torch.float64), loras(OUTPUT, [2.0], torch.float64)
    _, _, output = join(tmp_path, *sources, strengths=(0.3, -2))
    result = read_modules(output)
    assert {float(module["alpha"]) for module in result.values()} == {1.0}
    for strength, source in zip((0.3, -2), sources, strict=True):
        for name, module in source.items():
            assert_scaled(name, result[name], module, strength)


def test_files_of_one_layout_are_not_taken_for_each_other(tmp_path):
    # What is kept of the second begins at the very byte where that of the first ends.
    names = [CONTENT.format(0, 1, "q"), STYLE.format(0, 1, "q")]
    first, second = (
        {name: make_module(name, LORA, 2, 1.0, torch.float16, seed) for name in names}
        for seed in (1, 2)
    )
    a, b = write(tmp_path / "a.safetensors", first), write(tmp_path / "b.safetensors", second)
    output = tmp_path / "out.safetensors"
    args = ("--traits", "content", "style", "--output_path", output)
    assert slice_lora("--loras", a, b, *args) == 0
    kept = {key: value for key, value in stored(a).items() if key.startswith(names[0])}
    kept |= {key: value for key, value in stored(b).items() if key.startswith(names[1])}
    assert stored(output) == kept


@pytest.mark.parametrize("alpha", [0.0, 0.3, 2.0])
def test_alphas_that_agree_are_left_alone_whatever_the_ranks(tmp_path, alpha):
    first, second = (
        {
            layers[kind]: make_module(layers[kind], LORA, rank, alpha, torch.float16)
            for kind, rank in ranks.items()
        }
        for layers, ranks in (
            (INPUT, {"attention": 1, "linear": 2}),
            (OUTPUT, {"attention": 5, "3x3": 2}),
        )
    )
    before, after, _ = join(tmp_path, first, second)
    assert after == before


def test_only_loras_take_the_common_alpha(tmp_path):
    others = {
        INPUT[kind]: make_module(INPUT[kind], FORMS[form], 2, 8.0, torch.float16)
        for kind, form in zip(WEIGHTS, ("LoHa", "LoKr, w2 factored", "GLoRA", "full"), strict=True)
    }
    before, after, output = join(tmp_path, others, loras(OUTPUT, [1.0, 1.0, 4.0], torch.bfloat16))
    changed = {key for key in after if after[key] != before[key]}
    assert changed == {f"{OUTPUT['linear']}.{suffix}" for suffix in ("lora_up.weight", "alpha")}
    alphas = {float(read_modules(output)[OUTPUT[kind]]["alpha"]) for kind in WEIGHTS[:3]}
    assert alphas == {1.0}


def test_a_dora_under_another_alpha_keeps_its_final_weight(tmp_path):
    name = INPUT["attention"]
    dora = make_module(name, REFUSED["DoRA"], 2, 8.0, torch.float32)
    dora["dora_scale"] = dora["dora_scale"].abs()
    _, _, output = join(tmp_path, {name: dora}, loras(OUTPUT, [1.0, 1.0], torch.float32))
    result = read_modules(output)[name]
    assert float(result["alpha"]) == 1.0
    torch.testing.assert_close(
        final_weight(result, base_weight(name)),
        final_weight(dora, base_weight(name)),
        rtol=1e-6,
        atol=1e-6,
    )


# ---- Alphas that are none ------------------------------------------------------------------------


def test_an_empty_alpha_means_the_rank(tmp_path):
    name = INPUT["attention"]
    source = make_module(name, LORA, 2, None, torch.float32)
    first = {name: source | {"alpha": torch.ones(0)}}
    _, after, output = join(tmp_path, first, loras(OUTPUT, [8.0], torch.float32))
    assert {float(module["alpha"]) for module in read_modules(output).values()} == {2.0}
    assert_scaled(name, read_modules(output)[name], source, 1.0)
    assert after[f"{name}.alpha"][:2] == ("F32", [])


@pytest.mark.parametrize("alpha", [math.nan, math.inf])
def test_an_alpha_that_is_no_number_is_refused(tmp_path, capsys, alpha):
    name = INPUT["attention"]
    first = {name: make_module(name, LORA, 2, alpha, torch.float16)}
    a = write(tmp_path / "a.safetensors", first)
    b = write(tmp_path / "b.safetensors", loras(OUTPUT, [8.0], torch.float32))
    output = tmp_path / "out.safetensors"
    args = ("--loras", a, b, *both_traits(tmp_path), "--output_path", output)
    assert refusal(capsys, *args) == (
        f"the alpha of {name} is not a finite fp32 number: write separate files with --not_combined"
    )
    assert not output.exists()


def test_ranks_that_differ_are_joined_under_one_alpha_where_there_was_none(tmp_path):
    first, second = (
        {layers["linear"]: make_module(layers["linear"], LORA, rank, None, torch.float32)}
        for layers, rank in ((INPUT, 3), (OUTPUT, 4))
    )
    _, _, output = join(tmp_path, first, second)
    result = read_modules(output)
    assert {float(module["alpha"]) for module in result.values()} == {3.0}
    for name, source in (first | second).items():
        assert_scaled(name, result[name], source, 1.0)


def test_a_module_of_rank_0_takes_no_part_in_it(tmp_path):
    nothing = {"lora_up.weight": torch.ones(640, 0), "lora_down.weight": torch.ones(0, 640)}
    first = {INPUT["attention"]: nothing | {"alpha": torch.tensor(0.5)}}
    before, after, _ = join(tmp_path, first, loras(OUTPUT, [8.0, 8.0], torch.float32))
    assert after == before
