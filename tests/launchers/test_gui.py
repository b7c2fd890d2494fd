"""The recipes for the kohya_ss GUI are the launchers', in the GUI's own keys.

What the real GUI makes of them is in test_real_gui.py.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import write_gui_recipes
from kohya_folder import ROOT
from sdxl_train_network_options import build_parser

RECIPES = ("classic", "fast")
FILES = {name: (ROOT / f"blora_gui_{name}.json").read_text(encoding="utf-8") for name in RECIPES}
FIELDS = {name: json.loads(text) for name, text in FILES.items()}
# What a user fills in, and what of the form is nothing of a recipe's.
OWN = ["pretrained_model_name_or_path", "dataset_config", "output_dir", "output_name"]
ALSO_OWN = ["training_comment", "sample_prompts", "sample_every_n_steps", "vae", "logging_dir"]
# Refused on a machine with fewer processors, and every load and print of the form from then on.
REFUSED = "num_cpu_threads_per_process"
# Options that are no field of the same name, read back from the fields.
READ_BACK = {
    "network_module": lambda fields: added(fields).get("network_module", "lycoris.kohya"),
    "network_args": lambda fields: [
        f"preset={fields['LyCORIS_preset']}",
        *["bypass_mode=True"] * fields["bypass_mode"],
    ],
    "network_train_unet_only": lambda fields: bool(
        fields["unet_lr"] and not fields["text_encoder_lr"]
    ),
    "no_half_vae": lambda fields: fields["sdxl_no_half_vae"],
    "optimizer_args": lambda fields: fields["optimizer_args"].split(" "),
    "optimizer_type": lambda fields: fields["optimizer"].lower(),
    "resolution": lambda fields: fields["max_resolution"],
    "sdpa": lambda fields: fields["xformers"] == "sdpa",
}


def added(fields: dict[str, Any]) -> dict[str, str]:
    """The additional parameters, which sd-scripts reads last."""
    return dict(w[2:].split("=") for w in fields["additional_parameters"].split())


@pytest.fixture(scope="module")
def options() -> dict[str, list[str]]:
    """What each launcher hands to sd-scripts."""
    return {name: write_gui_recipes.launcher_options(name) for name in RECIPES}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_what_the_tool_writes_from_its_launcher(name):
    assert FILES[name] == write_gui_recipes.recipe_text(name), "run tools/write_gui_recipes.py"


@pytest.mark.parametrize("name", RECIPES)
def test_every_option_of_the_launcher_is_in_a_field_or_the_users(options, name):
    args = build_parser().parse_args(options[name])
    given = {word[2:].split("=")[0] for word in options[name] if word.startswith("--")}
    assert set(OWN) < given
    for option in given - set(OWN):
        read = READ_BACK.get(option, lambda fields, option=option: fields[option])
        assert read(FIELDS[name]) == getattr(args, option), option


def test_an_option_that_no_field_stands_for_is_refused(options):
    for more in (["--xformers"], ["--network_args", "preset=a.toml", "dora_wd=True"]):
        with pytest.raises((ValueError, KeyError), match=r"xformers|dora_wd"):
            write_gui_recipes.recipe([*options["classic"], *more])


@pytest.mark.parametrize("name", RECIPES)
def test_what_the_gui_would_drop_is_in_the_additional_parameters(name):
    dropped = {"seed": "0", "prior_loss_weight": "0"}
    if name == "classic":
        dropped["lr_warmup_steps"] = "500"
    if name == "fast":
        dropped["network_module"] = "blora_network"
    assert added(FIELDS[name]) == dropped


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_typed_behind_the_additional_parameters_is_a_word_of_its_own(name):
    assert FIELDS[name]["additional_parameters"][-1] == " "


@pytest.mark.parametrize("name", RECIPES)
def test_loading_a_recipe_takes_nothing_off_the_form_that_is_the_users(name):
    assert not {*OWN, *ALSO_OWN, REFUSED} & FIELDS[name].keys()


@pytest.mark.parametrize("name", RECIPES)
def test_the_rank_is_where_the_forms_slider_ends(name):
    assert FIELDS[name]["network_dim"] == FIELDS[name]["network_alpha"] == 512


@pytest.mark.parametrize("name", RECIPES)
def test_the_preset_is_one_of_the_bundle_and_its_path_has_no_blank(name):
    path = FIELDS[name]["LyCORIS_preset"]
    assert (ROOT / path).is_file()
    assert " " not in path


def test_one_recipe_loaded_after_the_other_leaves_nothing_of_it():
    classic, fast = FIELDS["classic"], FIELDS["fast"]
    assert classic.keys() == fast.keys()
    differing = {key for key in classic if classic[key] != fast[key]}
    shown = "additional_parameters bypass_mode cache_latents lr_warmup_steps mem_eff_attn"
    shown += " optimizer_args random_crop save_precision xformers"
    assert differing == set(shown.split())
