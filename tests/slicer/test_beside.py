"""What stands beside a module's factors, and modules with a factor too few or of a wrong shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from exact_strength import both_traits
from lora_algebra import Module, alpha_over_rank, bias_change, read_modules, weight_change
from lora_files import CONTENT, weight_shape
from lora_forms import (
    FORMS,
    INPUT,
    OUTPUT,
    REFUSED,
    WITH_UP_BIAS,
    axis_lengths,
    make_module,
    write_modules,
)
from slicing import all_traits, slice_lora, stored

from blora.slicer import modules
from blora.tensorfile import Constant

FIRST, SECOND = INPUT["attention"], OUTPUT["attention"]
EVERY = FORMS | REFUSED


def on_a_layer(form: str) -> tuple[str, Module]:
    """A module of the form, and the small layer that it changes."""
    name = INPUT[EVERY[form].kinds[0]]
    return name, make_module(name, EVERY[form], 2, 1.0, torch.float16)


def numbers(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def everything(tmp_path: Path) -> tuple[object, ...]:
    return ("--traits", "all", "--traits_file", all_traits(tmp_path, other=SECOND))


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


@pytest.mark.parametrize("strengths", [("1", "1"), ("0.5", "-1"), ("0", "1")], ids=" ".join)
def test_every_bias_takes_the_strength_and_what_alpha_multiplies_the_ratio_of_a_common_alpha(
    tmp_path, output, strengths
):
    sources = {FIRST: with_biases(FIRST, 3.0, 1), SECOND: with_biases(SECOND, 0.7, 2)}
    loras = [
        write_modules(tmp_path / f"{number}.safetensors", {name: module})
        for number, (name, module) in enumerate(sources.items())
    ]
    args = (*both_traits(tmp_path), "--alphas", *strengths, "--output_path", output)
    assert slice_lora("--loras", *loras, *args) == 0
    result = read_modules(output)
    assert len({float(module["alpha"]) for module in result.values()}) == 1
    near = {"rtol": 1e-5, "atol": 1e-5}
    exact = {"rtol": 1e-6, "atol": 1e-7}
    for (name, before), strength in zip(sources.items(), map(float, strengths), strict=True):
        after = result[name]
        torch.testing.assert_close(weight_change(after), strength * weight_change(before), **near)
        torch.testing.assert_close(bias_change(after), strength * bias_change(before), **near)
        assert "lora_up.bias" not in after  # which no program reads
        old, new = (alpha_over_rank(m) * m["bias_values"] for m in (before, after))
        torch.testing.assert_close(new, strength * old, **exact)
        for suffix in ("bias_indices", "bias_size"):
            assert torch.equal(after[suffix], before[suffix])


@pytest.mark.parametrize("strength", [1.0, 0.3])
@pytest.mark.parametrize("alpha", [None, 1.5], ids=["no alpha", "alpha 1.5"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_a_bias_of_lora_up_comes_out_as_the_change_of_the_bias_that_it_means(
    slicer, everything, dtype, alpha, strength
):
    source = make_module(FIRST, WITH_UP_BIAS, 2, alpha, dtype)
    lora = write_modules(slicer.folder / "in.safetensors", {FIRST: source})
    assert slicer(lora, *everything, "--alphas", strength) == 0
    [result] = read_modules(slicer.output).values()
    assert set(result) == {"lora_up.weight", "lora_down.weight", "alpha", "diff_b"}
    unit = {torch.float16: 2e-3, torch.float64: 1e-12}[dtype]
    wanted = strength * bias_change(source)
    assert result["diff_b"].dtype == dtype
    assert (result["diff_b"].double() - wanted).norm() < unit * wanted.norm()


@pytest.mark.parametrize("form", EVERY)
def test_an_unknown_tensor_beside_those_of_an_algorithm_stops_a_cut_at_any_strength(
    slicer, everything, form
):
    name, module = on_a_layer(form)
    lora = write_modules(slicer.folder / "known.safetensors", {name: module})
    assert slicer(lora, *everything) == 0
    assert "unknown" not in slicer.err
    module["foo_bar"] = numbers(3, 0).half()
    lora = write_modules(slicer.folder / "in.safetensors", {name: module})
    for strength in ("1", "0.5", "0"):
        assert slicer(lora, *everything, "--alphas", strength) == 1
        start, _, end = slicer.sentence.partition(f" ({name}.foo_bar), ")
        assert start.startswith(f"{lora} holds unknown tensors beside those of ")
        assert end == (
            "so what a slice would do is not known: exclude the module with a trait's blacklist"
        )
    assert slicer(lora, "--inspect") == 0
    assert f"unknown tensors (1): {name}.foo_bar" in slicer.out


FACTORED = ["LoRA", "LoCon, tucker", "LoHa", "LoHa, tucker", "GLoRA", "T-LoRA", "DoRA"]
FACTORED += [form for form in FORMS if form.startswith("LoKr")]
# What a module can do without: the rest is then another module, though perhaps one that misfits.
NOT_A_HALF = {"lora_mid.weight", "hada_t1", "hada_t2", "lokr_t2", "dora_scale"}
# Tucker cores that do not fit: (rank, rank, kernel), where it should be 2, 2, 3, 3.
MISFITS = {
    "a tucker core of another rank": (3, 3, 3, 3),
    "a tucker core of another kernel": (2, 2, 5, 5),
}
# A form, and which of its tensors are there.
HALVES: dict[str, tuple[str, set[str]]] = {
    "alpha alone": ("LoRA", {"alpha"}),
    "a LoKr's w1 and core": ("LoKr, tucker", {"lokr_w1", "lokr_t2"}),
    **dict.fromkeys(MISFITS, ("LoCon, tucker", {*EVERY["LoCon, tucker"].axes, "alpha"})),
    **{f"{factor} alone": (form, {factor}) for form in FACTORED for factor in EVERY[form].axes},
    **{
        f"{form}, no {factor}": (form, {*EVERY[form].axes, "alpha"} - {factor})
        for form in FACTORED
        for factor in EVERY[form].axes
        if factor not in NOT_A_HALF
    },
}


@pytest.mark.parametrize("what", HALVES)
def test_half_a_module_is_left_out_and_named_and_refused_where_nothing_else_is_kept(
    slicer, everything, what
):
    form, there = HALVES[what]
    name, whole = on_a_layer(form)
    half = {suffix: tensor for suffix, tensor in whole.items() if suffix in there}
    if what in MISFITS:
        half["lora_mid.weight"] = torch.ones(MISFITS[what]).half()
    sound = {SECOND: make_module(SECOND, FORMS["LoRA"], 2, 1.0, torch.float16)}
    alone = write_modules(slicer.folder / "alone.safetensors", {name: half})
    beside = write_modules(slicer.folder / "beside.safetensors", {name: half} | sound)
    without = write_modules(slicer.folder / "without.safetensors", sound)
    for way in (everything, (*everything, "--alphas", "0.5")):
        assert slicer(without, *way) == 0
        wanted = stored(slicer.output)
        assert slicer(beside, *way) == 0
        assert stored(slicer.output) == wanted
        assert (
            slicer.err == f"note: left out incomplete modules of beside.safetensors (1): {name}\n"
        )
        assert slicer(alone, *way) == 1
        assert slicer.sentence == (
            f'every "all" module in {alone} is incomplete ({name}): save it again with the program '
            "that trained it"
        )
    assert slicer(beside, *everything, "--traits", "other") == 0
    assert slicer.err == ""
    assert slicer(alone, "--inspect", "--json") == 0
    [facts] = json.loads(slicer.out)
    assert (facts["incomplete"], facts["misfits"]) == ([name], [])
    assert [row["change"] for row in facts["blocks"]] == [None]
    assert slicer(alone, "--inspect") == 0
    assert f"incomplete modules (1): {name}" in slicer.out


@pytest.mark.parametrize(("form", "is_wrong"), [("LoCon, tucker", True), ("LoRA", False)])
def test_a_tucker_core_of_a_resized_file_is_warned_of(slicer, everything, form, is_wrong):
    """sd-scripts' tool resizes the factors alone; at the same rank no shape shows it."""
    name, module = on_a_layer(form)
    comment = {"ss_training_comment": "dimension is resized from 2 to 2; None"}
    lora = write_modules(slicer.folder / "in.safetensors", {name: module}, comment)
    assert slicer(lora, *everything) == 0
    assert slicer.err == is_wrong * (
        "warning: in.safetensors was resized, and sd-scripts' tool does not resize tucker "
        f"cores, so these modules are wrong (1): {name}\n"
    )


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_module_fits_until_one_of_its_axes_is_longer(form):
    def fits(name: str, shapes: dict[str, tuple[int, ...]]) -> bool:
        tensors = {suffix: Constant("F32", shape, b"") for suffix, shape in shapes.items()}
        return modules.Module(name, tensors).fits

    for kind in form.kinds:
        lengths = axis_lengths(INPUT[kind], 3)  # a rank unlike any axis of the layers
        shapes = {s: tuple(n for a in axes for n in lengths[a]) for s, axes in form.axes.items()}
        assert fits(INPUT[kind], shapes)
        for suffix, shape in shapes.items():
            for axis, length in enumerate(shape):
                # By two: twice the 320 inputs of the 1x1 convolution would be its 640 outputs.
                longer = (*shape[:axis], length + 2, *shape[axis + 1 :])
                assert not fits(INPUT[kind], shapes | {suffix: longer}), (kind, suffix, axis)


QUERY, KEY = CONTENT.format(0, 1, "q"), CONTENT.format(0, 2, "k")  # [1280, 1280], [1280, 2048]
UP_KEY = {"lora_up.weight": [1280, 4], "lora_down.weight": [4, 2048]}


def lora(up: list[int], down: list[int]) -> dict[str, list[int]]:
    return {"lora_up.weight": up, "lora_down.weight": down}


WRONG = {
    # the layer, and the shapes of a module that is none of it
    "a factor without axes": (QUERY, lora([], [4, 1280])),
    "a factor of one axis": (QUERY, lora([1280], [1, 1280])),
    "no rows at all": (QUERY, lora([0, 4], [4, 1280])),
    "a kernel that the layer has not": (QUERY, lora([1280, 4, 1, 1], [4, 1280, 3, 3])),
    "no kernel where the layer has one": (INPUT["3x3"], lora([320, 4], [4, 4])),
    "a bias of inputs beside factors": (KEY, UP_KEY | {"diff_b": [2048]}),
    "a DoRA of neither side": (KEY, UP_KEY | {"dora_scale": [640, 1]}),
    "a DoRA of one number": (KEY, UP_KEY | {"dora_scale": []}),
    "a DoRA of no numbers": (KEY, UP_KEY | {"dora_scale": [0, 1]}),
    "OFT of too few blocks": (QUERY, {"oft_blocks": [10, 4, 4]}),
    "OFT of a scalar": (QUERY, {"oft_blocks": []}),
    "OFT of no blocks": (QUERY, {"oft_blocks": [0, 2, 2]}),
    "OFT of blocks that are not square": (QUERY, {"oft_blocks": [320, 4, 2]}),
    "T-LoRA of other inputs": (
        KEY,
        {"q_layer.weight": [4, 768], "p_layer.weight": [1280, 4], "lambda_layer": [1, 4]},
    ),
}


@pytest.mark.parametrize(("layer", "shapes"), WRONG.values(), ids=WRONG)
def test_a_module_that_does_not_fit_is_refused_at_any_strength(slicer, everything, layer, shapes):
    module = {suffix: torch.ones(shape) for suffix, shape in shapes.items()}
    path = write_modules(slicer.folder / "a.safetensors", {layer: module})
    for strength in ("1", "0.5"):
        assert slicer(path, *everything, "--alphas", strength) == 1
        assert slicer.sentence.startswith(f"{layer} in {path} does not fit SDXL, ")


def test_what_does_not_fit_is_refused_by_its_shapes_where_it_is_kept_and_shown_by_inspect(
    slicer, everything
):
    narrow = {suffix: torch.ones(shape) for suffix, shape in lora([320, 2], [2, 320]).items()}
    narrow["alpha"] = torch.ones([])
    sound = make_module(SECOND, FORMS["LoRA"], 2, 1.0, torch.float16)
    path = write_modules(slicer.folder / "a.safetensors", {FIRST: narrow, SECOND: sound})
    assert slicer(path, *everything, "--traits", "other") == 0
    assert slicer(path, "--inspect", "--json") == 0
    [facts] = json.loads(slicer.out)
    assert facts["misfits"] == [FIRST]
    assert [row["change"] is None for row in facts["blocks"]] == [True, False]
    assert slicer(path, "--inspect") == 0
    assert f"modules that do not fit SDXL's layers (1): {FIRST}" in slicer.out.splitlines()
    assert slicer(path, *everything) == 1
    assert slicer.sentence == (
        f"{FIRST} in {path} does not fit SDXL, where the layer's weight is [640, 640]: it has "
        "lora_down.weight [2, 320], lora_up.weight [320, 2]; use a LoRA that was trained on SDXL, "
        "or exclude the module with a trait's blacklist"
    )


@pytest.mark.parametrize(
    # LyCORIS' LoKr of network_dim 100000 stores that as its alpha, which fp16 cannot hold.
    ("alpha", "dtype"),
    [(1e5, torch.float32), (torch.inf, torch.float16), (1e5, torch.bfloat16)],
)
def test_an_alpha_that_nothing_reads_is_not_reported_as_inf_and_stops_no_save_precision(
    slicer, everything, alpha, dtype
):
    source = make_module(FIRST, FORMS["LoKr, both whole"], 2, None, torch.float32)
    source["alpha"] = torch.tensor(alpha, dtype=dtype)
    lora = write_modules(slicer.folder / "in.safetensors", {FIRST: source})
    assert slicer(lora, "--inspect", "--json") == 0
    [facts] = json.loads(slicer.out)
    assert facts["not_finite"] == []
    assert facts["blocks"][0]["change"] > 0
    types = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    for precision, saved in types.items():
        for strength in (1.0, 0.5):
            way = ("--alphas", strength, "--save_precision", precision)
            assert slicer(lora, *everything, *way) == 0
            assert slicer.err == ""
            [result] = read_modules(slicer.output).values()
            assert torch.equal(result["lokr_w1"], (source["lokr_w1"] * strength).to(saved))
            assert torch.equal(result["lokr_w2"], source["lokr_w2"].to(saved))
