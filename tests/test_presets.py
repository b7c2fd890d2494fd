"""The presets train exactly the modules they name, and the traits keep exactly those."""

from __future__ import annotations

import json
import re
from itertools import chain

import pytest
import toml
from kohya_folder import ROOT
from lycoris_releases import LYCORIS, NEWEST, PRESETS, trained
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


def test_there_is_no_preset_beside_those():
    assert sorted(EXPECTED) == PRESETS


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_has_only_the_keys_lycoris_accepts(preset):
    assert list(toml.load(ROOT / f"lycoris_presets/{preset}.toml")) == [
        "enable_conv",
        "unet_target_module",
        "unet_target_name",
        "text_encoder_target_module",
        "text_encoder_target_name",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
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


TRAITS = load_traits(ROOT / "blora_traits.json")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "traits"),
    [
        ("blora_content_style", ["content", "style"]),
        ("blora_content_layout_style", ["content", "layout", "style"]),
        ("blora_layout_style", ["layout", "style"]),
    ],
)
def test_what_a_preset_trains_in_the_unet_is_what_its_traits_keep(preset, traits):
    modules = trained(NEWEST)[preset]["unet"]
    kept = [sorted(m for m in modules if TRAITS[trait].keeps(m)) for trait in traits]
    assert [len(part) for part in kept] == [80] * len(traits)
    assert sorted(chain.from_iterable(kept)) == sorted(modules)


@pytest.mark.parametrize(
    ("trait", "modules"),
    [
        ("content", block_modules(CONTENT)),
        ("style", block_modules(STYLE)),
        ("layout", block_modules(LAYOUT)),
        (
            "clip_2_content",
            {m for m in text_encoder_modules([0]) if m.startswith("lora_te2_")},
        ),
    ],
)
def test_of_all_sdxl_modules_a_trait_keeps_exactly_its_own(trait, modules):
    sdxl = json.loads((ROOT / "tests/data/sdxl_modules.json").read_text())
    names = {
        f"lora_{prefix}_{name.replace('.', '_')}"
        for prefix in ("unet", "te1", "te2")
        for name in sdxl[prefix]
    }
    assert {name for name in names if TRAITS[trait].keeps(name)} == modules


def test_the_traits_are_those_of_the_original():
    assert list(TRAITS) == ["content", "style", "layout", "clip_2_content"]
