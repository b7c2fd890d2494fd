"""What stands beside a module's factors, and modules of which a part is missing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from exact_strength import both_traits, slice_all
from lora_algebra import Module, alpha_over_rank, read_modules, weight_change
from lora_files import weight_shape
from lora_forms import FORMS, INPUT, OUTPUT, REFUSED, make_module, write_modules
from namings import with_alpha
from slicing import all_traits, refusal, slice_lora, stored

FIRST, SECOND = INPUT["attention"], OUTPUT["attention"]
UNKNOWN = "foo_bar"


def numbers(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def everything(folder: Path, *options: object) -> tuple[object, ...]:
    """Options to keep all of a file, in a folder of the test's own."""
    traits = ("--traits", "all", "--traits_file", all_traits(folder))
    return (*traits, "--output_path", folder / "out.safetensors", *options)


# ---- Biases --------------------------------------------------------------------------------------


def with_biases(name: str, alpha: float, seed: int) -> Module:
    """A LoRA with ai-toolkit's bias of lora_up, LyCORIS' sparse bias and a change of the bias."""
    module = make_module(name, FORMS["LoRA, with bias"], 2, alpha, torch.float32, seed)
    outputs, inputs = weight_shape(name)
    return module | {
        "lora_up.bias": numbers(outputs, seed),
        "bias_indices": torch.tensor([[0, 3, 3], [1, 0, 5]], dtype=torch.int16),
        "bias_values": 10 * numbers(3, seed),
        "bias_size": torch.tensor([outputs, inputs], dtype=torch.int16),
    }


def assert_biases(result: Module, source: Module, strength: float) -> None:
    """Each part of the change is the strength times what it was."""
    near = {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(
        weight_change(result), strength * weight_change(source), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(result["diff_b"], strength * source["diff_b"], **near)
    for suffix in ("lora_up.bias", "bias_values"):
        before, after = (alpha_over_rank(m) * m[suffix] for m in (source, result))
        torch.testing.assert_close(after, strength * before, **near)
    for suffix in ("bias_indices", "bias_size"):
        assert torch.equal(result[suffix], source[suffix])


@pytest.mark.parametrize("strength", [0.5, -1.0, 0.0])
def test_every_bias_beside_the_factors_takes_the_strength(tmp_path, strength):
    source = with_biases(FIRST, 0.7, 1)
    lora = write_modules(tmp_path / "in.safetensors", {FIRST: source})
    assert_biases(read_modules(slice_all(lora, strength))[FIRST], source, strength)


@pytest.mark.parametrize("strengths", [("1", "1"), ("0.5", "-1")], ids=" ".join)
def test_what_alpha_multiplies_takes_the_ratio_of_a_common_alpha_and_diff_b_does_not(
    tmp_path, strengths
):
    sources = {FIRST: with_biases(FIRST, 3.0, 1), SECOND: with_biases(SECOND, 0.7, 2)}
    loras = [
        write_modules(tmp_path / f"{number}.safetensors", {name: module})
        for number, (name, module) in enumerate(sources.items())
    ]
    output = tmp_path / "out.safetensors"
    args = (*both_traits(tmp_path), "--alphas", *strengths, "--output_path", output)
    assert slice_lora("--loras", *loras, *args) == 0
    result = read_modules(output)
    assert len({float(module["alpha"]) for module in result.values()}) == 1
    for (name, source), strength in zip(sources.items(), strengths, strict=True):
        assert_biases(result[name], source, float(strength))


# ---- Tensors that nobody knows -------------------------------------------------------------------

EVERY = FORMS | REFUSED


def with_unknown(form: str) -> tuple[str, Module]:
    """A module of the form with a tensor beside it that no program here is known to write."""
    name = INPUT[EVERY[form].kinds[0]]
    module = make_module(name, EVERY[form], 2, 1.0, torch.float16)
    return name, module | {UNKNOWN: numbers(3, 0).half()}


@pytest.mark.parametrize("form", EVERY)
def test_a_tensor_that_is_not_known_is_copied_at_1_and_named(tmp_path, capsys, form):
    name, module = with_unknown(form)
    lora = write_modules(tmp_path / "in.safetensors", {name: module})
    assert slice_lora("--loras", lora, *everything(tmp_path)) == 0
    wanted = write_modules(tmp_path / "wanted.safetensors", {name: with_alpha(module)})
    assert stored(tmp_path / "out.safetensors") == stored(wanted)
    err = capsys.readouterr().err
    assert err.startswith("note: ")
    assert err.count("\n") == 1
    assert f"{name}.{UNKNOWN}" in err


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("strength", ["0.5", "0"])
def test_a_tensor_that_is_not_known_is_refused_at_another_strength(
    tmp_path, capsys, form, strength
):
    name, module = with_unknown(form)
    lora = write_modules(tmp_path / "in.safetensors", {name: module})
    sentence = refusal(capsys, "--loras", lora, *everything(tmp_path, "--alphas", strength))
    assert f"{name}.{UNKNOWN}" in sentence
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("form", EVERY)
def test_every_tensor_of_every_algorithm_is_known(tmp_path, capsys, form):
    name, module = with_unknown(form)
    del module[UNKNOWN]
    lora = write_modules(tmp_path / "in.safetensors", {name: module})
    assert slice_lora("--loras", lora, *everything(tmp_path)) == 0
    assert capsys.readouterr().err == ""


# ---- Half a module -------------------------------------------------------------------------------

FACTORED = ["LoRA", "LoCon, tucker", "LoHa", "LoHa, tucker", "GLoRA", "DoRA"]
FACTORED += [form for form in FORMS if form.startswith("LoKr")]
# What a module can do without: the rest is then another module, though perhaps one that misfits.
NOT_A_HALF = {"lora_mid.weight", "hada_t1", "hada_t2", "lokr_t2", "dora_scale"}
MISFIT = "a lora_mid of another rank"
HALVES: dict[str, tuple[str, str]] = {
    f"{form}, no {suffix}": (form, suffix)
    for form in FACTORED
    for suffix in EVERY[form].axes
    if suffix not in NOT_A_HALF
}


def half(what: str) -> tuple[str, Module]:
    """A module of which a part is missing, by the name of a small layer that could have it."""
    form, missing = HALVES.get(what, ("LoCon, tucker", ""))
    name = INPUT[EVERY[form].kinds[0]]
    module = make_module(name, EVERY[form], 2, 1.0, torch.float16)
    if what == "alpha alone":
        return name, {"alpha": module["alpha"]}
    if what == MISFIT:
        return name, module | {"lora_mid.weight": torch.ones(3, 3, 3, 3).half()}
    return name, {suffix: tensor for suffix, tensor in module.items() if suffix != missing}


INCOMPLETE = [*HALVES, "alpha alone", MISFIT]


@pytest.mark.parametrize("strength", ["1", "0.5"])
@pytest.mark.parametrize("what", INCOMPLETE)
def test_half_a_module_is_left_out_beside_a_sound_one_and_named(tmp_path, capsys, what, strength):
    name, module = half(what)
    sound = make_module(SECOND, FORMS["LoRA"], 2, 1.0, torch.float16)
    lora = write_modules(tmp_path / "in.safetensors", {name: module, SECOND: sound})
    assert slice_lora("--loras", lora, *everything(tmp_path, "--alphas", strength)) == 0
    result = read_modules(tmp_path / "out.safetensors")
    assert set(result) == {SECOND}
    wanted = float(strength) * weight_change(sound)
    torch.testing.assert_close(weight_change(result[SECOND]), wanted, rtol=1e-3, atol=1e-3)
    err = capsys.readouterr().err
    assert err.startswith("note: ")
    assert err.count("\n") == 1
    assert name in err


@pytest.mark.parametrize("strength", ["1", "0.5"])
@pytest.mark.parametrize("what", INCOMPLETE)
def test_half_a_module_alone_is_refused_by_its_name(tmp_path, capsys, what, strength):
    name, module = half(what)
    lora = write_modules(tmp_path / "in.safetensors", {name: module})
    sentence = refusal(capsys, "--loras", lora, *everything(tmp_path, "--alphas", strength))
    assert name in sentence
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("what", INCOMPLETE)
def test_half_a_module_that_the_trait_does_not_keep_stops_no_cut(tmp_path, what):
    name, module = half(what)
    sound = make_module(SECOND, FORMS["LoRA"], 2, 1.0, torch.float16)
    lora = write_modules(tmp_path / "in.safetensors", {name: module, SECOND: sound})
    traits = all_traits(tmp_path, other=SECOND)
    output = tmp_path / "out.safetensors"
    args = ("--traits", "other", "--traits_file", traits, "--output_path", output)
    assert slice_lora("--loras", lora, *args) == 0
    alone = write_modules(tmp_path / "alone.safetensors", {SECOND: sound})
    assert stored(output) == stored(alone)


@pytest.mark.parametrize("what", INCOMPLETE)
def test_half_a_module_is_shown_as_that(tmp_path, capsys, what):
    name, module = half(what)
    lora = write_modules(tmp_path / "in.safetensors", {name: module})
    assert slice_lora("--loras", lora, "--inspect", "--json") == 0
    [facts] = json.loads(capsys.readouterr().out)
    assert (facts["incomplete"], facts["misfits"]) == ([name], [])


@pytest.mark.parametrize(("form", "is_wrong"), [("LoCon, tucker", True), ("LoRA", False)])
def test_a_tucker_core_of_a_resized_file_is_warned_of(tmp_path, capsys, form, is_wrong):
    """sd-scripts' tool resizes the factors alone; at the same rank no shape shows it."""
    name = INPUT["3x3"]
    module = make_module(name, FORMS[form], 2, 1.0, torch.float16)
    comment = {"ss_training_comment": "dimension is resized from 2 to 2; None"}
    lora = write_modules(tmp_path / "in.safetensors", {name: module}, comment)
    assert slice_lora("--loras", lora, *everything(tmp_path)) == 0
    assert capsys.readouterr().err == is_wrong * (
        "warning: in.safetensors was resized, and sd-scripts' tool does not resize tucker "
        f"cores, so these modules are wrong (1): {name}\n"
    )


# ---- An alpha that nothing reads -----------------------------------------------------------------

# LyCORIS' LoKr of network_dim 100000 stores that as its alpha, which fp16 cannot hold.
UNREAD = {
    "100000 as fp32": torch.tensor(100000.0),
    "inf as fp16": torch.tensor(math.inf, dtype=torch.float16),
    "100000 as bf16": torch.tensor(100000.0, dtype=torch.bfloat16),
}


@pytest.fixture(params=UNREAD.values(), ids=UNREAD)
def whole_lokr(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A LoKr of two whole factors, on a layer of each kind, with an alpha that nothing reads."""
    form = FORMS["LoKr, both whole"]
    modules = {
        INPUT[kind]: make_module(INPUT[kind], form, 2, None, torch.float32)
        | {"alpha": request.param}
        for kind in form.kinds
    }
    return write_modules(tmp_path / "in.safetensors", modules)


def test_an_alpha_that_nothing_reads_is_not_reported_as_inf(whole_lokr, capsys):
    assert slice_lora("--loras", whole_lokr, "--inspect", "--json") == 0
    [facts] = json.loads(capsys.readouterr().out)
    assert facts["not_finite"] == []
    assert all(row["change"] > 0 for row in facts["blocks"])
    assert slice_lora("--loras", whole_lokr, "--inspect") == 0
    assert "NaN or inf" not in capsys.readouterr().out
    slice_all(whole_lokr, 0.5)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("precision", ["fp16", "bf16", "float"])
def test_an_alpha_that_nothing_reads_does_not_stop_save_precision(whole_lokr, precision, strength):
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "float": torch.float32}[precision]
    source = read_modules(whole_lokr)
    result = read_modules(slice_all(whole_lokr, strength, "--save_precision", precision))
    assert set(result) == set(source)
    for name, module in source.items():
        for suffix, factor in (("lokr_w1", strength), ("lokr_w2", 1)):
            assert torch.equal(result[name][suffix], (module[suffix] * factor).to(dtype))
