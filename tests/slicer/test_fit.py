"""A module is cut only where its factors fit each other and SDXL's layer."""

from __future__ import annotations

import json

import pytest
import torch
from lora_files import CONTENT
from lora_forms import FORMS, INPUT, make_module, write_modules
from slicing import cut, everything, refused, slice_lora

QUERY = CONTENT.format(0, 1, "q")  # [1280, 1280]
KEY = CONTENT.format(0, 2, "k")  # [1280, 2048]
FIRST = INPUT["3x3"]  # [320, 4, 3, 3]


def lora(up: list[int], down: list[int], **others: list[int]) -> dict[str, list[int]]:
    return {"lora_up.weight": up, "lora_down.weight": down} | others


# Those of one axis that is too long are in test_modules.py.
MISFITS = {
    # the layer, and the shapes of a module that is none of it
    "a LoRA of a narrower layer": (QUERY, lora([320, 4], [4, 320])),
    "a factor without axes": (QUERY, lora([], [4, 1280])),
    "a factor of one axis": (QUERY, lora([1280], [1, 1280])),
    "no rows at all": (QUERY, lora([0, 4], [4, 1280])),
    "a kernel that the layer has not": (QUERY, lora([1280, 4, 1, 1], [4, 1280, 3, 3])),
    "no kernel where the layer has one": (FIRST, lora([320, 4], [4, 4])),
    "LoKr whose factors differ": (
        QUERY,
        {"lokr_w1": [16, 16], "lokr_w2_a": [80, 4], "lokr_w2_b": [3, 80]},
    ),
    "a norm of another width": (INPUT["norm"], {"w_norm": [1280]}),
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
        KEY,
        {"q_layer.weight": [4, 768], "p_layer.weight": [1280, 4], "lambda_layer": [1, 4]},
    ),
}


@pytest.mark.parametrize(("layer", "shapes"), MISFITS.values(), ids=MISFITS)
def test_a_module_that_does_not_fit_is_refused_at_any_strength(tmp_path, capsys, layer, shapes):
    module = {suffix: torch.ones(shape) for suffix, shape in shapes.items()}
    path = write_modules(tmp_path / "a.safetensors", {layer: module})
    traits = everything(tmp_path)
    for strength in ("1", "0.5"):
        sentence = refused(capsys, path, *traits, "--alphas", strength)
        assert f"{layer} in {path} does not fit SDXL, " in sentence


def test_what_does_not_fit_is_refused_by_its_shapes_where_it_is_kept_and_shown_by_inspect(
    tmp_path, capsys
):
    bad = {"lora_up.weight": torch.ones(320, 2), "lora_down.weight": torch.ones(2, 320)}
    modules = {
        QUERY: make_module(QUERY, FORMS["LoRA"], 2, 1.0, torch.float16),
        INPUT["attention"]: bad | {"alpha": torch.ones([])},
    }
    path = write_modules(tmp_path / "a.safetensors", modules)
    cut(path)
    capsys.readouterr()
    assert slice_lora("--loras", path, "--inspect", "--json") == 0
    [facts] = json.loads(capsys.readouterr().out)
    assert facts["misfits"] == [INPUT["attention"]]
    assert [row["change"] is None for row in facts["blocks"]] == [True, False]
    assert slice_lora("--loras", path, "--inspect") == 0
    told = f"modules that do not fit SDXL's layers (1): {INPUT['attention']}"
    assert told in capsys.readouterr().out.splitlines()
    (tmp_path / "out.safetensors").unlink()
    assert refused(capsys, path, *everything(tmp_path)) == (
        f"{INPUT['attention']} in {path} does not fit SDXL, where the layer's weight is "
        "[640, 640]: it has lora_down.weight [2, 320], lora_up.weight [320, 2]; use a LoRA that "
        "was trained on SDXL"
    )
