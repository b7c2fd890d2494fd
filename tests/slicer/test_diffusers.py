"""diffusers loads slices and combined files by path, and changes each layer as it should."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lora_algebra import Module, read_modules, weight_change
from lora_forms import FORMS, make_module
from lora_forms import write_modules as write
from slicing import all_traits, slice_lora
from torch import Tensor

TRANSFORMER = "transformer_blocks.0"
# Layers in kohya's sgm names, and where diffusers' pipeline has them.
UNET_LAYERS = {
    f"lora_unet_{block}_transformer_blocks_0_{attention}_{projection.replace('.', '_')}": (
        "unet",
        f"{theirs}.{TRANSFORMER}.{attention}.{projection}",
    )
    for block, theirs in (
        ("output_blocks_0_1", "up_blocks.0.attentions.0"),
        ("output_blocks_1_1", "up_blocks.0.attentions.1"),
        ("input_blocks_8_1", "down_blocks.2.attentions.1"),
    )
    for attention in ("attn1", "attn2")
    for projection in ("to_q", "to_k", "to_v", "to_out.0")
}
TEXT_LAYERS = {
    f"lora_te2_text_model_encoder_layers_0_self_attn_{projection}_proj": (
        "text_encoder_2",
        f"text_model.encoder.layers.0.self_attn.{projection}_proj",
    )
    for projection in ("q", "k", "v", "out")
}
TRAITS = {
    "content": "lora_unet_output_blocks_0_1_",
    "style": "lora_unet_output_blocks_1_1_",
    "layout": "lora_unet_input_blocks_8_1_",
    "clip_2_content": "lora_te2_text_model_encoder_layers_0_",
}


@pytest.fixture(scope="module")
def pipeline():
    """SDXL's pipeline with few layers, each where SDXL has it and as wide."""
    from diffusers_sdxl import sdxl_pipeline

    torch.manual_seed(0)
    return sdxl_pipeline((1, 1, 1))


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """What diffusers and PEFT warn of, such as keys that belong to no layer.

    That a file has nothing for a part of the pipeline is said as well, and no fault.
    """
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())
    handler.addFilter(lambda record: "No LoRA keys associated to" not in record.getMessage())
    loggers = [logging.getLogger(name) for name in ("diffusers", "peft")]
    for logger in loggers:
        logger.addHandler(handler)
    yield found
    for logger in loggers:
        logger.removeHandler(handler)


def make_loras(rank: int, alpha: float | None, dtype: torch.dtype, seed: int) -> dict[str, Module]:
    """A LoRA module for every layer, in kohya's names."""
    return {
        name: make_module(name, FORMS["LoRA"], rank, alpha, dtype, 100 * seed + index)
        for index, name in enumerate(UNET_LAYERS | TEXT_LAYERS)
    }


def loaded_changes(pipeline, path: Path) -> dict[str, Tensor]:
    """The change of each layer that diffusers took from a file, by its own name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    pipeline.load_lora_weights(str(path))
    changes = {}
    for component in ("unet", "text_encoder", "text_encoder_2"):
        for name, module in getattr(pipeline, component).named_modules():
            if isinstance(module, BaseTunerLayer):
                [adapter] = module.lora_A
                changes[component, name] = module.get_delta_weight(adapter).detach().double()
    pipeline.unload_lora_weights()
    return changes


def assert_loads_as(pipeline, path: Path, wanted: dict[str, Tensor], tolerance: float) -> None:
    """Each layer has its change, and no layer has another."""
    found = loaded_changes(pipeline, path)
    assert set(found) == {(UNET_LAYERS | TEXT_LAYERS)[name] for name in wanted}
    for name, change in wanted.items():
        error = (found[(UNET_LAYERS | TEXT_LAYERS)[name]] - change).norm()
        assert error <= tolerance * max(change.norm(), 1), name


COMBINED = [
    # by trait: rank, alpha, strength
    {"content": (4, 4.0, 1.0)},
    {"content": (4, None, 0.6)},
    {"content": (4, 1.0, 1.0), "style": (4, 1.0, 0.6)},
    {"content": (4, 1.0, 0.6), "style": (8, 8.0, -0.5)},
    {"content": (8, None, 1.0), "style": (2, 1.0, -0.5)},
    {"content": (4, 0.3, -0.5), "clip_2_content": (2, 2.0, 0.6)},
    {
        "content": (4, 1.0, 1.0),
        "style": (16, 8.0, 0.6),
        "layout": (2, None, -0.5),
        "clip_2_content": (3, 2.0, 1.0),
    },
]


@pytest.mark.parametrize("cuts", COMBINED, ids=lambda cuts: " ".join(cuts))
def test_each_layer_changes_by_the_strength_times_its_source(pipeline, tmp_path, warnings, cuts):
    loras, wanted = [], {}
    for seed, (trait, (rank, alpha, strength)) in enumerate(cuts.items()):
        modules = make_loras(rank, alpha, torch.float32, seed)
        loras.append(write(tmp_path / f"{trait}.safetensors", modules))
        for name, module in modules.items():
            if name.startswith(TRAITS[trait]):
                wanted[name] = strength * weight_change(module)
    output = tmp_path / "out.safetensors"
    args = ["--loras", *loras, "--traits", *cuts, "--output_path", output, "--alphas"]
    args += [strength for _, _, strength in cuts.values()]
    assert slice_lora(*args) == 0
    assert_loads_as(pipeline, output, wanted, 1e-5)
    assert warnings == []


def test_a_combined_file_of_two_types_loads_as_what_it_stores(pipeline, tmp_path, warnings):
    half = write(tmp_path / "a.safetensors", make_loras(4, 0.3, torch.float16, 1))
    brain = write(tmp_path / "b.safetensors", make_loras(2, 1.0, torch.bfloat16, 2))
    output = tmp_path / "out.safetensors"
    args = ["--traits", "content", "style", "--alphas", "0.6", "1", "--output_path", output]
    assert slice_lora("--loras", half, brain, *args) == 0
    stored = {name: weight_change(module) for name, module in read_modules(output).items()}
    assert_loads_as(pipeline, output, stored, 1e-5)
    source = read_modules(half) | {
        name: module for name, module in read_modules(brain).items() if TRAITS["style"] in name
    }
    for name, change in stored.items():
        strength = 0.6 if TRAITS["content"] in name else 1
        before = strength * weight_change(source[name])
        assert (change - before).norm() < 2**-7 * before.norm()
    assert warnings == []


FULL_NAME = f"up_blocks.0.attentions.0.{TRANSFORMER}.attn1.to_q"
PEFT_SETTINGS = [
    {"r": 4, "lora_alpha": 4},
    {"r": 4, "lora_alpha": 2, "use_rslora": True},
    {"r": 4, "lora_alpha": 8, "rank_pattern": {f"{TRANSFORMER}.attn2.to_k": 2}},
    {"r": 4, "lora_alpha": 8, "alpha_pattern": {f"{TRANSFORMER}.attn1.to_q": 3, "to_out.0": 1}},
    {"r": 4, "lora_alpha": 8, "alpha_pattern": {FULL_NAME: 3, "to_q": 2}},
    {"r": 4, "lora_alpha": 8, "alpha_pattern": {r"up_blocks\..*\.attn[12]\.to_q": 3}},
]


def save_with_diffusers(pipeline, folder: Path, settings: dict[str, object]) -> Path:
    """A file that diffusers saved of adapters that PEFT made: PEFT's names and settings."""
    from peft import LoraConfig, get_peft_model_state_dict

    torch.manual_seed(4)
    saved = {}
    for component in ("unet", "text_encoder", "text_encoder_2"):
        model, of = getattr(pipeline, component), {"r": 2, "lora_alpha": 3}
        targets: str | list[str] = ["q_proj", "out_proj"]
        if component == "unet":
            of, targets = settings, r".*attentions.1.transformer_blocks.0.attn[12].to_(q|k|out.0)"
            targets += rf"|{re.escape(FULL_NAME)}"
        model.add_adapter(LoraConfig(target_modules=targets, init_lora_weights=False, **of))
        saved[f"{component}_lora_layers"] = get_peft_model_state_dict(model)
        saved[f"{component}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
    pipeline.save_lora_weights(str(folder), weight_name="in.safetensors", **saved)
    pipeline.unload_lora_weights()
    return folder / "in.safetensors"


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("settings", PEFT_SETTINGS, ids=json.dumps)
def test_what_diffusers_saved_itself_is_sliced_as_diffusers_loads_it(
    pipeline, tmp_path, warnings, settings
):
    lora, output = save_with_diffusers(pipeline, tmp_path, settings), tmp_path / "out.safetensors"
    wanted = loaded_changes(pipeline, lora)
    args = ["--traits", "all", "--traits_file", all_traits(tmp_path), "--output_path", output]
    assert slice_lora("--loras", lora, *args) == 0
    unet, te1, te2 = ("lora_unet_", "lora_te1_", "lora_te2_")
    assert {name[:9] for name in read_modules(output)} == {unet[:9], te1[:9], te2[:9]}
    changes = {name: weight_change(module) for name, module in read_modules(output).items()}
    assert len(changes) == len(wanted)
    ours = sorted(float(change.norm()) for change in changes.values())
    theirs = sorted(float(change.norm()) for change in wanted.values())
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert warnings == []
