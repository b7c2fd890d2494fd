"""diffusers loads slices and combined files by path, and changes each layer as it should."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lora_algebra import read_modules, weight_change
from lora_forms import FORMS, make_module
from lora_forms import write_modules as write
from slicing import cut, everything
from torch import Tensor

TRANSFORMER = "transformer_blocks.0"
# Blocks in kohya's sgm names by trait, the part of diffusers' pipeline that has them, and where.
BLOCKS = {
    "content": ("lora_unet_output_blocks_0_1_", "unet", "up_blocks.0.attentions.0."),
    "style": ("lora_unet_output_blocks_1_1_", "unet", "up_blocks.0.attentions.1."),
    "layout": ("lora_unet_input_blocks_8_1_", "unet", "down_blocks.2.attentions.1."),
    "clip_2_content": ("lora_te2_", "text_encoder_2", ""),
}
ATTENTION = [
    f"{TRANSFORMER}.{attention}.to_{projection}"
    for attention in ("attn1", "attn2")
    for projection in ("q", "k", "v", "out.0")
]
TEXT = [f"text_model.encoder.layers.0.self_attn.{name}_proj" for name in ("q", "k", "v", "out")]
# Layers in kohya's sgm names, and where diffusers' pipeline has them.
LAYERS = {
    f"{ours}{layer.replace('.', '_')}": (part, f"{theirs}{layer}")
    for ours, part, theirs in BLOCKS.values()
    for layer in (ATTENTION if part == "unet" else TEXT)
}


@pytest.fixture(scope="module")
def pipeline():
    from diffusers_sdxl import sdxl_pipeline

    torch.manual_seed(0)
    return sdxl_pipeline((1, 1, 1))


@pytest.fixture(autouse=True)
def no_warnings(caplog, monkeypatch) -> Iterator[None]:
    """diffusers and PEFT warn of nothing but that a file has nothing for a part of the pipeline."""
    for name in ("diffusers", "peft"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    yield
    said = [record.getMessage() for record in caplog.get_records("call")]
    assert [text for text in said if "No LoRA keys associated to" not in text] == []


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


HALF, BF, F32 = torch.float16, torch.bfloat16, torch.float32
COMBINED = [
    # by trait: rank, alpha, strength, type
    {"content": (4, None, 0.6, F32)},
    {"content": (4, 1.0, 0.6, F32), "style": (8, 8.0, -0.5, F32)},
    {"content": (4, 0.3, 0.6, HALF), "style": (2, 1.0, 1.0, BF)},
    {"content": (4, 0.3, -0.5, F32), "clip_2_content": (2, 2.0, 0.6, F32)},
    {"content": (4, 1.0, 1.0, F32), "style": (16, 8.0, 0.6, F32)}
    | {"layout": (2, None, -0.5, F32), "clip_2_content": (3, 2.0, 1.0, F32)},
]


@pytest.mark.parametrize("cuts", COMBINED, ids=lambda cuts: " ".join(cuts))
def test_each_layer_changes_by_the_strength_times_its_source(pipeline, tmp_path, cuts):
    loras, wanted = [], {}
    for seed, (trait, (rank, alpha, strength, dtype)) in enumerate(cuts.items()):
        modules = {
            name: make_module(name, FORMS["LoRA"], rank, alpha, dtype, 100 * seed + index)
            for index, name in enumerate(LAYERS)
        }
        loras.append(write(tmp_path / f"{trait}.safetensors", modules))
        for name, module in modules.items():
            if name.startswith(BLOCKS[trait][0]):
                rounding = {F32: 1e-5, HALF: 2**-10, BF: 2**-7}[dtype]
                wanted[LAYERS[name]] = strength * weight_change(module), rounding
    output = cut(*loras, "--traits", *cuts, "--alphas", *(cut[2] for cut in cuts.values()))
    found = loaded_changes(pipeline, output)
    assert set(found) == set(wanted)
    stored = {LAYERS[name]: weight_change(m) for name, m in read_modules(output).items()}
    for layer, (change, rounding) in wanted.items():
        assert (found[layer] - stored[layer]).norm() <= 1e-5 * max(stored[layer].norm(), 1), layer
        assert (stored[layer] - change).norm() <= rounding * change.norm(), layer


FULL_NAME = f"up_blocks.0.attentions.0.{TRANSFORMER}.attn1.to_q"
PEFT_SETTINGS = [
    {"use_rslora": True},
    {"rank_pattern": {f"{TRANSFORMER}.attn2.to_k": 2}},
    {"alpha_pattern": {f"{TRANSFORMER}.attn1.to_q": 3, "to_out.0": 1}},
    {"alpha_pattern": {FULL_NAME: 3, "to_q": 2}},
    {"alpha_pattern": {r"up_blocks\..*\.attn[12]\.to_q": 3}},
]


def save_with_diffusers(pipeline, folder: Path, settings: dict[str, object]) -> Path:
    """A file that diffusers saved of adapters that PEFT made: PEFT's names and settings."""
    from peft import LoraConfig, get_peft_model_state_dict

    torch.manual_seed(4)
    saved = {}
    for component in ("unet", "text_encoder", "text_encoder_2"):
        model, of = getattr(pipeline, component), {"r": 2, "lora_alpha": 3}
        targets = r".*(q_proj|out_proj)"
        if component == "unet":
            of = {"r": 4, "lora_alpha": 8} | settings
            targets = rf".*attentions.1.{TRANSFORMER}.attn[12].to_(q|k|out.0)|{FULL_NAME}"
        model.add_adapter(LoraConfig(target_modules=targets, init_lora_weights=False, **of))
        saved[f"{component}_lora_layers"] = get_peft_model_state_dict(model)
        saved[f"{component}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
    pipeline.save_lora_weights(str(folder), weight_name="in.safetensors", **saved)
    pipeline.unload_lora_weights()
    return folder / "in.safetensors"


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("settings", PEFT_SETTINGS, ids=json.dumps)
def test_what_diffusers_saved_itself_is_sliced_as_diffusers_loads_it(pipeline, tmp_path, settings):
    lora = save_with_diffusers(pipeline, tmp_path, settings)
    wanted = loaded_changes(pipeline, lora)
    modules = read_modules(cut(lora, *everything(tmp_path)))
    assert {name.split("_")[1] for name in modules} == {"unet", "te1", "te2"}
    assert len(modules) == len(wanted)
    ours = sorted(float(weight_change(module).norm()) for module in modules.values())
    theirs = sorted(float(change.norm()) for change in wanted.values())
    assert ours == pytest.approx(theirs, rel=1e-5)
