"""LoRAs of different alphas are joined under one, as diffusers reads them, and nothing changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from exact_strength import assert_scaled, both_traits
from lora_algebra import Module, final_weight, read_modules
from lora_files import CONTENT, STYLE
from lora_forms import FORMS, INPUT, OUTPUT, REFUSED, WEIGHTS, base_weight, make_module
from lora_forms import write_modules as write
from slicing import cut, stored

LORA = FORMS["LoRA"]
HALF, F32, F64 = torch.float16, torch.float32, torch.float64
Modules = dict[str, Module]


def loras(
    layers: dict[str, str], alphas: list[float | None], dtype: torch.dtype, ranks: str = "2222"
) -> Modules:
    """LoRA modules with these alphas and ranks, on one layer after the other."""
    return {
        layers[kind]: make_module(layers[kind], LORA, int(rank), alpha, dtype, seed)
        for seed, (kind, alpha, rank) in enumerate(zip(WEIGHTS, alphas, ranks, strict=False))
    }


def join(
    folder: Path, first: Modules, second: Modules, strengths: tuple[float, float] = (1, 1)
) -> tuple[Modules, set[str]]:
    """The modules of two files joined, and the tensors that the join alters or adds."""
    a, b = write(folder / "a.safetensors", first), write(folder / "b.safetensors", second)
    output = cut(a, b, *both_traits(folder), "--alphas", *strengths)
    before, after = stored(a) | stored(b), stored(output)
    assert before.keys() <= after.keys()
    return read_modules(output), {key for key in after if after[key] != before.get(key)}


ONE_ALPHA = [
    # alphas of the first file, of the second, their ranks, and the smallest alpha; None is the rank
    ([4.0, 4.0, 4.0], [1.0], ("222", "2"), 1.0),
    ([0.3, 1.0, 1.0], [1.0, 0.3], ("222", "22"), 0.3),
    ([None, None], [1.0], ("22", "2"), 1.0),
    ([1.0, 1.0], [None], ("22", "2"), 1.0),
    ([None], [None], ("3", "4"), 3.0),
]


@pytest.mark.parametrize("strengths", [(1, 1), (0.3, -2)], ids=str)
@pytest.mark.parametrize("dtype", [HALF, F64], ids=str)
@pytest.mark.parametrize(("first", "second", "ranks", "common"), ONE_ALPHA)
def test_differing_alphas_become_one_and_the_changes_stay(
    tmp_path, first, second, ranks, common, dtype, strengths
):
    sources = [loras(INPUT, first, dtype, ranks[0]), loras(OUTPUT, second, dtype, ranks[1])]
    result, altered = join(tmp_path, *sources, strengths)
    assert set(result) == set(sources[0] | sources[1])
    # As diffusers reads it: one number for all, over each module's own rank.
    [alpha] = {float(module["alpha"]) for module in result.values()}
    assert alpha == pytest.approx(common, rel=2**-8)
    for modules, strength in zip(sources, strengths, strict=True):
        for name, source in modules.items():
            assert_scaled(name, result[name], source, strength)
            kept = {"lora_down.weight"}  # which never changes
            if strength == 1 and float(source.get("alpha", -1)) == alpha:
                kept = set(source)
            assert not altered & {f"{name}.{suffix}" for suffix in kept}


def test_files_of_one_layout_are_not_taken_for_each_other(tmp_path):
    # What is kept of the second begins at the very byte where that of the first ends.
    names = [CONTENT.format(0, 1, "q"), STYLE.format(0, 1, "q")]
    files, kept = [], {}
    for seed, own in enumerate(names):
        modules = {name: make_module(name, LORA, 2, 1.0, HALF, seed) for name in names}
        file = write(tmp_path / f"{seed}.safetensors", modules)
        files.append(file)
        kept |= {key: tensor for key, tensor in stored(file).items() if key.startswith(own)}
    assert stored(cut(*files, "--traits", "content", "style")) == kept


@pytest.mark.parametrize("alpha", [0.0, 0.3, 2.0])
def test_what_has_one_alpha_is_joined_to_the_byte_whatever_the_ranks(tmp_path, alpha):
    first, second = (loras(x, [alpha] * 2, HALF, r) for x, r in ((INPUT, "12"), (OUTPUT, "52")))
    no_rank = {"lora_up.weight": torch.ones(640, 0), "lora_down.weight": torch.ones(0, 640)}
    first |= {INPUT["attention"]: no_rank | {"alpha": torch.tensor(0.5)}}
    assert join(tmp_path, first, second)[1] == set()


def test_only_loras_take_the_common_alpha(tmp_path):
    others = {
        INPUT[kind]: make_module(INPUT[kind], FORMS[form], 2, 8.0, HALF)
        for kind, form in zip(WEIGHTS, ("LoHa", "LoKr, w2 factored", "GLoRA", "full"), strict=True)
    }
    result, altered = join(tmp_path, others, loras(OUTPUT, [1.0, 1.0, 4.0], torch.bfloat16))
    assert altered == {f"{OUTPUT['linear']}.{suffix}" for suffix in ("lora_up.weight", "alpha")}
    assert {float(result[OUTPUT[kind]]["alpha"]) for kind in WEIGHTS[:3]} == {1.0}


def test_a_dora_under_another_alpha_keeps_its_final_weight(tmp_path):
    name = INPUT["attention"]
    dora = make_module(name, REFUSED["DoRA"], 2, 8.0, F32)
    dora["dora_scale"] = dora["dora_scale"].abs()
    result, _ = join(tmp_path, {name: dora}, loras(OUTPUT, [1.0, 1.0], F32))
    assert float(result[name]["alpha"]) == 1.0
    before, after = (final_weight(module, base_weight(name)) for module in (dora, result[name]))
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)


def test_an_empty_alpha_means_the_rank(tmp_path):
    name = INPUT["attention"]
    source = make_module(name, LORA, 2, None, F32)
    first = {name: source | {"alpha": torch.ones(0)}}
    result, _ = join(tmp_path, first, loras(OUTPUT, [8.0], F32))
    assert {float(module["alpha"]) for module in result.values()} == {2.0}
    assert_scaled(name, result[name], source, 1.0)
    assert (result[name]["alpha"].dtype, result[name]["alpha"].shape) == (F32, ())
