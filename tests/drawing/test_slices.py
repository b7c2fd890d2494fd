"""The network module for gen_img.py: what it merges, and that nothing of it stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lora_algebra import final_weight
from lora_files import CONTENT, STYLE, blora_modules, write
from lora_forms import FORMS, REFUSED, base_weight, make_module, on_each_layer, write_modules
from torch import nn
from torch.testing import assert_close

from blora.drawing.slices import check_drawable, create_network_from_weights, write_looks
from blora.sdxl import Trait
from blora.slicer.cut import Cut
from blora.slicer.reader import read_lora
from blora.text import BloraError

EVERY = FORMS | REFUSED
OTHERS = "IA3", "GLoRA", "OFT", "BOFT", "T-LoRA", "with bias"
DRAWN = [form for form in EVERY if not any(other in form for other in OTHERS)]
ALL = Trait("all", ("",), ())


class Layer(nn.Module):
    """A layer with this weight, and a bias as a norm has it."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(len(weight)))


class Model(nn.Module):
    """What named_modules() finds by these names."""

    def __init__(self, layers: dict[str, nn.Module]):
        super().__init__()
        self.layers = layers

    def named_modules(self):  # as sd-scripts' U-Net for inference passes it on
        return self.layers.items()


def network(tmp_path: Path, looks: list[list[Cut]], layers: dict[str, nn.Module]):
    """The network as gen_img.py sets it up, on a U-Net of these layers."""
    write_looks(tmp_path / "looks.json", looks, None)
    unet = Model(layers)
    made, weights = create_network_from_weights(
        1.0, str(tmp_path / "looks.json"), None, [], unet, for_inference=True
    )
    assert not made.is_mergeable()
    made.apply_to([], unet)
    made.load_state_dict(weights, False)
    assert made.to(torch.float16).to("cpu") is made
    return made


def sgm(name: str) -> str:
    """A name that becomes kohya's, as every dot is an underscore there."""
    return name.removeprefix("lora_unet_")


@pytest.mark.parametrize("form", DRAWN)
def test_every_layer_becomes_what_its_module_makes_of_it(form, tmp_path):
    modules = on_each_layer(EVERY[form], 1.0, torch.float16)
    path = write_modules(tmp_path / "lora.safetensors", modules)
    layers = {sgm(name): Layer(base_weight(name)) for name in modules}
    made = network(tmp_path, [[], [Cut(path, ALL, 1.0)]], layers)
    made.set_multiplier(1.0)
    for name, module in modules.items():
        layer, expected = layers[sgm(name)], final_weight(module, base_weight(name)).float()
        assert_close(layer.weight.data, expected, rtol=1e-5, atol=1e-4)
        if "b_norm" in module:
            assert_close(layer.bias.data, module["b_norm"].float())
    made.set_multiplier(0.0)
    assert all(torch.equal(layers[sgm(name)].weight, base_weight(name)) for name in modules)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_look_takes_the_place_of_the_one_before_to_the_bit(tmp_path, dtype):
    tensors = blora_modules(CONTENT, STYLE)
    path = write(tmp_path / "lora.safetensors", tensors)
    content, style = (Trait(t, (f"output_blocks_{n}_1_",), ()) for t, n in (("c", 0), ("s", 1)))
    both = [Cut(path, content, 1.0), Cut(path, style, 1.0)]
    looks = [[], both[:1], [Cut(path, style, 0.5)], both]
    layers = {sgm(k.split(".")[0]): Layer(base_weight(k.split(".")[0]).to(dtype)) for k in tensors}
    shown = [layers[sgm(template.format(0, 2, "k"))] for template in (CONTENT, STYLE)]
    made, seen = network(tmp_path, looks, layers), {}
    for look in (0, 3, 1, 2, 2, 0, 3):
        made.set_multiplier(float(look))
        now = [layer.weight.detach().clone() for layer in shown]
        assert all(map(torch.equal, seen.setdefault(look, now), now))
    bare, one, half, both = (seen[look] for look in range(4))
    assert all(
        torch.equal(weight, base_weight(template.format(0, 2, "k")).to(dtype))
        for weight, template in zip(bare, (CONTENT, STYLE), strict=True)
    )
    assert torch.equal(one[0], both[0])
    assert torch.equal(one[1], bare[1])
    assert torch.equal(half[0], bare[0])
    middle = (bare[1].double() + both[1].double()) / 2
    assert_close(half[1].double(), middle, rtol=0.01, atol=0.01)
    assert not torch.allclose(half[1].double(), bare[1].double(), rtol=0.01, atol=0.01)


def test_a_rank_of_0_is_no_change(tmp_path):
    name = CONTENT.format(0, 1, "q")
    module = make_module(name, FORMS["LoRA"], 0, 1.0, torch.float16)
    path = write_modules(tmp_path / "lora.safetensors", {name: module})
    layer = Layer(base_weight(name))
    network(tmp_path, [[], [Cut(path, ALL, 1.0)]], {sgm(name): layer}).set_multiplier(1.0)
    assert torch.equal(layer.weight, base_weight(name))


def test_an_alpha_of_0_is_no_change_as_to_every_program_that_draws(tmp_path):
    name = CONTENT.format(0, 1, "q")
    path = write_modules(
        tmp_path / "lora.safetensors",
        {name: make_module(name, FORMS["LoRA"], 2, 0.0, torch.float32)},
    )
    layer = Layer(base_weight(name))
    network(tmp_path, [[], [Cut(path, ALL, 1.0)]], {sgm(name): layer}).set_multiplier(1.0)
    assert torch.equal(layer.weight, base_weight(name))


@pytest.mark.parametrize("form", sorted(EVERY.keys() - DRAWN))
def test_what_has_no_formula_is_refused_by_its_name(form, tmp_path):
    name = next(iter(on_each_layer(EVERY[form], 1.0, torch.float32)))
    module = make_module(name, EVERY[form], 2, 1.0, torch.float32)
    lora = read_lora(write_modules(tmp_path / "lora.safetensors", {name: module}))
    with pytest.raises(BloraError) as refusal:
        check_drawable(lora.modules.values(), lora.path)
    kind = "LoRA" if form.startswith("LoRA") else form.split(",")[0]
    start = f"{lora.path} cannot be drawn here: {name} is {kind} ("
    assert str(refusal.value).startswith(start)
    assert str(refusal.value).endswith(
        "), and only LoRA, DoRA, LoHa, LoKr and whole changes can; compare it in a program that "
        "reads it"
    )
