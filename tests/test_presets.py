"""The presets train exactly the modules they name, and the traits keep exactly those."""

from __future__ import annotations

import json
import re

import pytest
import toml
from kohya_folder import ROOT
from lycoris_releases import LYCORIS, NEWEST, trained
from preset_modules import CONTENT, EXPECTED, LAYOUT, STYLE, block_modules, text_encoder_modules

from blora.sdxl import load_traits


@pytest.mark.slow
@pytest.mark.parametrize("preset", EXPECTED)
@pytest.mark.parametrize("release", LYCORIS)
def test_lycoris_trains_exactly_the_modules_of_the_preset(release, preset):
    blocks, layers = EXPECTED[preset]
    modules = trained(release)[preset]
    assert set(modules["unet"]) == set().union(*map(block_modules, blocks))
    assert len(modules["unet"]) == 80 * len(blocks)
    assert set(modules["text_encoders"]) == text_encoder_modules(layers)
    assert len(modules["text_encoders"]) == (176 if layers == "all" else 24)


def test_the_presets_are_those_and_have_only_the_keys_that_lycoris_accepts():
    found = {path.name: list(toml.load(path)) for path in (ROOT / "lycoris_presets").iterdir()}
    text_encoders = ["text_encoder_target_module", "text_encoder_target_name"]
    keys = ["enable_conv", "unet_target_module", "unet_target_name", *text_encoders]
    assert found == {f"{preset}.toml": keys for preset in EXPECTED}


@pytest.mark.slow
@pytest.mark.parametrize("preset", EXPECTED)
def test_the_first_comment_says_which_blocks_for_which_launcher_and_what_it_costs(preset):
    lines = (ROOT / f"lycoris_presets/{preset}.toml").read_text().splitlines()
    comment = " ".join(line[2:] for line in lines if line.startswith("# "))
    assert lines[0].startswith("# ")
    blocks, _ = EXPECTED[preset]
    named = re.findall(r"\((\w+put_blocks\.\d\.\d)\)", comment)
    assert sorted(named) == sorted(re.sub(r"_(\d)_(\d)$", r".\1.\2", b) for b in blocks)
    assert "launcher" in comment or "sdxl_blora_classic" in comment
    modules = trained(NEWEST)[preset]
    costs = [int(number.replace(",", "")) for number in re.findall(r"\d{2,3},\d{3}", comment)]
    assert costs == [modules["unet_parameters"], modules["text_encoder_parameters"]]


def test_of_all_sdxl_modules_a_trait_keeps_exactly_its_own():
    sdxl = json.loads((ROOT / "tests/data/sdxl_modules.json").read_text())
    modules = {
        f"lora_{network}_{name.replace('.', '_')}"
        for network in ("unet", "te1", "te2")
        for name in sdxl[network]
    }
    traits = load_traits(ROOT / "blora_traits.json")
    kept = [(name, set(filter(trait.keeps, modules))) for name, trait in traits.items()]
    assert kept == [
        ("content", block_modules(CONTENT)),
        ("style", block_modules(STYLE)),
        ("layout", block_modules(LAYOUT)),
        ("clip_2_content", {m for m in text_encoder_modules([0]) if m.startswith("lora_te2_")}),
        ("text", {m for m in modules if m.startswith(("lora_te1_", "lora_te2_"))}),
        ("content_block", {m for m in modules if m.startswith(f"lora_unet_{CONTENT}_")}),
        ("style_block", {m for m in modules if m.startswith(f"lora_unet_{STYLE}_")}),
    ]
