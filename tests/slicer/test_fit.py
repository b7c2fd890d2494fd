"""A module is cut only where its factors fit each other and SDXL's layer."""

from __future__ import annotations

import json

import pytest
import torch
from lora_files import CONTENT
from lora_forms import FORMS, INPUT, REFUSED, TRAITS, make_module, write_modules
from slicing import all_traits, refusal, slice_lora

QUERY = CONTENT.format(0, 1, "q")  # [1280, 1280]
KEY = CONTENT.format(0, 2, "k")  # [1280, 2048]
FIRST = INPUT["3x3"]  # [320, 4, 3, 3]
EVERY = FORMS | REFUSED


@pytest.mark.parametrize("form", EVERY.values(), ids=EVERY)
def test_every_form_of_every_algorithm_fits_the_layer_it_was_made_for(tmp_path, form):
    modules = {INPUT[k]: make_module(INPUT[k], form, 2, 1.0, torch.float16) for k in form.kinds}
    lora = write_modules(tmp_path / "a.safetensors", modules)
    traits = all_traits(tmp_path, **TRAITS)
    args = ("--traits", "input", "--traits_file", traits)
    assert slice_lora("--loras", lora, *args, "--output_path", tmp_path / "out.safetensors") == 0


def lora(up: list[int], down: list[int], **others: list[int]) -> dict[str, list[int]]:
    return {"lora_up.weight": up, "lora_down.weight": down} | others


MISFITS = {
    # the layer, and the shapes of a module that is none of it
    "a LoRA of a narrower layer": (QUERY, lora([320, 4], [4, 320])),
    "too few outputs": (QUERY, lora([1279, 4], [4, 1280])),
    "too many inputs": (QUERY, lora([1280, 4], [4, 2048])),
    "factors of two ranks": (QUERY, lora([1280, 4], [8, 1280])),
    "a factor without axes": (QUERY, lora([], [4, 1280])),
    "a factor of one axis": (QUERY, lora([1280], [1, 1280])),
    "no rows at all": (QUERY, lora([0, 4], [4, 1280])),
    "a kernel that the layer has not": (QUERY, lora([1280, 4, 1, 1], [4, 1280, 3, 3])),
    "no kernel where the layer has one": (FIRST, lora([320, 4], [4, 4])),
    "LoHa of halves that differ": (
        QUERY,
        {"hada_w1_a": [1280, 4], "hada_w1_b": [4, 1280], "hada_w2_a": [640, 4],
         "hada_w2_b": [4, 1280]},
    ),
    "LoKr of too small a product": (QUERY, {"lokr_w1": [16, 16], "lokr_w2": [80, 40]}),
    "LoKr whose factors differ": (
        QUERY, {"lokr_w1": [16, 16], "lokr_w2_a": [80, 4], "lokr_w2_b": [3, 80]},
    ),
    "a full change of another layer": (QUERY, {"diff": [1280, 2048]}),
    "a norm of another width": (INPUT["norm"], {"w_norm": [1280]}),
    "a bias of another width": (INPUT["norm"], {"w_norm": [640], "b_norm": [320]}),
    "a bias of inputs beside factors": (KEY, lora([1280, 4], [4, 2048], diff_b=[2048])),
    "IA3 of another width": (KEY, {"weight": [640], "on_input": []}),
    "a DoRA of neither side": (KEY, lora([1280, 4], [4, 2048], dora_scale=[640, 1])),
    "a DoRA of one number": (KEY, lora([1280, 4], [4, 2048], dora_scale=[])),
    "a DoRA of no numbers": (KEY, lora([1280, 4], [4, 2048], dora_scale=[0, 1])),
    "OFT of too few blocks": (QUERY, {"oft_blocks": [10, 4, 4]}),
    "OFT of a scalar": (QUERY, {"oft_blocks": []}),
    "OFT of no blocks": (QUERY, {"oft_blocks": [0, 2, 2]}),
    "OFT of blocks that are not square": (QUERY, {"oft_blocks": [320, 4, 2]}),
    "T-LoRA of other inputs": (
        KEY, {"q_layer.weight": [4, 768], "p_layer.weight": [1280, 4], "lambda_layer": [1, 4]},
    ),
    "GLoRA that acts on other inputs": (
        QUERY,
        {"a1.weight": [640, 4], "a2.weight": [4, 640], "b1.weight": [1280, 4],
         "b2.weight": [4, 1280]},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("layer", "shapes"), MISFITS.values(), ids=MISFITS)
@pytest.mark.parametrize("strength", ["1", "0.5"])
def test_a_module_that_does_not_fit_is_refused_at_any_strength(
    tmp_path, capsys, layer, shapes, strength
):
    module = {suffix: torch.ones(shape) for suffix, shape in shapes.items()}
    path, output = tmp_path / "a.safetensors", tmp_path / "out.safetensors"
    write_modules(path, {layer: module})
    traits = ("--traits", "all", "--traits_file", all_traits(tmp_path))
    args = ("--loras", path, *traits, "--alphas", strength, "--output_path", output)
    assert f"{layer} in {path} does not fit SDXL, " in refusal(capsys, *args)
    assert not output.exists()


def test_the_refusal_names_the_shapes(tmp_path, capsys):
    shapes = lora([320, 4], [4, 320])
    module = {suffix: torch.ones(shape) for suffix, shape in shapes.items()}
    path = write_modules(tmp_path / "a.safetensors", {QUERY: module | {"alpha": torch.ones([])}})
    assert refusal(capsys, "--loras", path, "--output_path", tmp_path / "out.safetensors") == (
        f"{QUERY} in {path} does not fit SDXL, where the layer's weight is [1280, 1280]: it has "
        "lora_down.weight [4, 320], lora_up.weight [320, 4]; use a LoRA that was trained on SDXL"
    )


def test_what_does_not_fit_outside_of_the_trait_stops_no_cut_and_is_shown_by_inspect(
    tmp_path, capsys
):
    good = make_module(QUERY, FORMS["LoRA"], 2, 1.0, torch.float16)
    bad = {"lora_up.weight": torch.ones(320, 2), "lora_down.weight": torch.ones(2, 320)}
    path = write_modules(tmp_path / "a.safetensors", {QUERY: good, INPUT["attention"]: bad})
    assert slice_lora("--loras", path, "--output_path", tmp_path / "out.safetensors") == 0
    capsys.readouterr()
    assert slice_lora("--loras", path, "--inspect", "--json") == 0
    [facts] = json.loads(capsys.readouterr().out)
    assert facts["misfits"] == [INPUT["attention"]]
    assert [row["change"] is None for row in facts["blocks"]] == [True, False]
    assert slice_lora("--loras", path, "--inspect") == 0
    told = f"modules that do not fit SDXL's layers (1): {INPUT['attention']}"
    assert told in capsys.readouterr().out.splitlines()
