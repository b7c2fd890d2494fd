"""Files that PEFT, diffusers and LyCORIS save are cut as the program itself reads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from exact_strength import slice_all
from lora_algebra import bias_change, final_weight, read_modules, weight_change
from lora_files import CONTENT, STYLE, lora_module
from lycoris_files import SCALED, lycoris_change
from lycoris_modules import SDXL, make_tree
from peft_files import LAYERS, Merge, Setting, adapted, assert_merged, assert_near, merges, tree_of
from safetensors.torch import load_file, save_file
from slicing import all_traits, everything
from torch import Tensor

# ---- PEFT ----------------------------------------------------------------------------------------

LORA = {"r": 4, "lora_alpha": 6, "init_lora_weights": False}
OTHER = {"r": 4, "alpha": 6, "init_weights": False}
PATTERNS = {"rank_pattern": {"to_q": 3, "conv_in": 5}, "alpha_pattern": {"conv_shortcut": 1.5}}
# What the product of the factors is multiplied with differs from 1 in each.
SETTINGS: dict[str, Setting] = {
    "LoRA": ("LoraConfig", LORA),
    "rank-stabilized LoRA": ("LoraConfig", LORA | {"use_rslora": True}),
    "LoRA, ranks and alphas by pattern": ("LoraConfig", LORA | PATTERNS),
    "rank-stabilized LoRA by pattern": ("LoraConfig", LORA | PATTERNS | {"use_rslora": True}),
    "LoHa": ("LoHaConfig", OTHER),
    "LoHa, tucker": ("LoHaConfig", OTHER | {"use_effective_conv2d": True}),
    "LoHa, ranks and alphas by pattern": ("LoHaConfig", OTHER | PATTERNS),
    "LoKr, w2 factored": ("LoKrConfig", OTHER),
    "LoKr, tucker": ("LoKrConfig", OTHER | {"use_effective_conv2d": True}),
    "LoKr, both factored": ("LoKrConfig", OTHER | {"decompose_both": True}),
    "LoKr, ranks and alphas by pattern": ("LoKrConfig", OTHER | PATTERNS),
    # PEFT multiplies by alpha / r even where no factor has a rank.
    "LoKr, both whole": ("LoKrConfig", OTHER | {"r": 64}),
    "LoKr, both whole, by pattern": ("LoKrConfig", OTHER | PATTERNS | {"rank_pattern": {".*": 96}}),
}


Adapter = tuple[Path, dict[str, Merge]]


def saved(folder: Path, setting: Setting) -> Adapter:
    """adapter_model.safetensors beside its adapter_config.json, and what PEFT makes of it."""
    model = adapted(setting, LAYERS)
    model.save_pretrained(folder)
    return folder / "adapter_model.safetensors", merges(model.base_model.model, LAYERS)


@pytest.fixture(scope="module", params=SETTINGS.values(), ids=SETTINGS)
def each_adapter(request: pytest.FixtureRequest, tmp_path_factory) -> Adapter:
    return saved(tmp_path_factory.mktemp("each"), request.param)


@pytest.fixture
def adapter(tmp_path: Path) -> Adapter:
    return saved(tmp_path / "adapter", SETTINGS["LoRA"])


def change_settings(lora: Path, **settings: object) -> None:
    """Other values of settings that PEFT saved beside a file; None takes one out."""
    config = lora.with_name("adapter_config.json")
    known = json.loads(config.read_text("utf-8"))
    assert settings.keys() <= known.keys()
    changed = {key: value for key, value in (known | settings).items() if value is not None}
    config.write_text(json.dumps(changed), "utf-8")


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_an_adapter_that_peft_saved_changes_what_peft_merges(each_adapter, capsys, strength):
    lora, wanted = each_adapter
    assert_merged(read_modules(slice_all(lora, strength)), wanted, strength)
    assert capsys.readouterr().err == ""


def test_an_adapter_without_its_settings_is_cut_at_alpha_equal_to_its_rank_with_a_warning(
    each_adapter, tmp_path, capsys
):
    lora, wanted = each_adapter
    modules = read_modules(slice_all(shutil.copy(lora, tmp_path / "alone.safetensors"), 1.0))
    for name, merge in wanted.items():
        assert_near(weight_change(modules[name]), merge.change / merge.scaling)
    assert capsys.readouterr().err == (
        "warning: no alpha is stored for alone.safetensors, whose names are PEFT's: alpha = rank "
        "is assumed; if it was trained with another alpha, put its adapter_config.json beside it "
        "and cut it again\n"
    )


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_dora_that_peft_saved_makes_the_weight_that_peft_merges(tmp_path, capsys, use_rslora):
    dora = LORA | {"use_dora": True, "use_rslora": use_rslora}
    lora, wanted = saved(tmp_path / "adapter", ("LoraConfig", dora))
    capsys.readouterr()
    modules = read_modules(slice_all(lora, 1.0))
    assert set(modules) == set(wanted)
    for name, merge in wanted.items():
        assert modules[name]["dora_scale"].shape == (len(merge.base), *[1] * (merge.base.dim() - 1))
        assert_near(final_weight(modules[name], merge.base), merge.merged)
        # What PEFT makes is well apart from what a plain LoRA of these factors would.
        assert (weight_change(modules[name]) - merge.change).norm() > 0.1 * merge.change.norm()
    assert capsys.readouterr().err == ""


def test_the_folder_of_an_adapter_stands_for_its_file(adapter, slicer):
    lora, wanted = adapter
    assert slicer(lora.parent, *everything(slicer.folder)) == 0
    assert_merged(read_modules(slicer.output), wanted, 1.0)
    assert slicer(lora.parent, "--inspect") == 0
    assert f"{len(LAYERS)} modules" in slicer.out


# ---- PEFT's settings -----------------------------------------------------------------------------

QUERY = CONTENT.format(0, 1, "q")
UNDER_UNET = "unet.up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
# A start of the factors from the base model, which PEFT can subtract when it saves them.
STARTS = ("pissa", "pissa_niter_4", "OLoRA", "corda", "loftq", "lora_ga")


def test_what_only_peft_can_load_is_refused(adapter, slicer):
    lora, _ = adapter
    for start in STARTS:
        change_settings(lora, init_lora_weights=start)
        assert slicer(lora) == 1
        assert slicer.sentence == (
            f"{lora} was trained with init_lora_weights={start}, so its factors hold a part of the "
            "base model: save it with PEFT's path_initial_model_for_weight_conversion"
        )
    change_settings(lora, peft_type="ADALORA")
    assert slicer(lora) == 1
    assert slicer.sentence == (
        f"{lora} is PEFT's ADALORA, which kohya's names cannot express: use it with PEFT"
    )


def test_settings_that_are_none_are_refused(adapter, slicer):
    lora, _ = adapter
    config = lora.with_name("adapter_config.json")
    for text in ("[]", "{", "1", '"r"', ""):
        config.write_text(text, "utf-8")
        assert slicer(lora) == 1
        assert slicer.sentence.startswith(f"cannot read {config} (")
        assert slicer.sentence.endswith("): save the LoRA again with its program")


@pytest.mark.parametrize("settings", [{"r": None}, {"r": 0}, {"alpha": "x"}], ids=str)
def test_settings_without_a_number_are_refused(slicer, settings):
    lora, _ = saved(slicer.folder / "adapter", SETTINGS["LoKr, both whole"])
    change_settings(lora, **settings)
    assert slicer(lora, *everything(slicer.folder)) == 1
    assert slicer.sentence == (
        "adapter_config.json gives lora_unet_input_blocks_0_0 an alpha that is not a number"
    )


SOURCES = {
    # settings in the metadata and beside the file, and the alpha that they give
    "the metadata is of a text encoder": ({"text_encoder.lora_alpha": 1}, {}, 6),
    "the metadata comes first": ({"unet.lora_alpha": 1}, {}, 1),
    "the file is of a LoRA of another rank": ({}, {"r": 16}, None),
}


@pytest.mark.parametrize(("in_metadata", "beside", "alpha"), SOURCES.values(), ids=SOURCES)
def test_an_alpha_comes_from_the_settings_that_are_the_files_own(
    adapter, capsys, in_metadata, beside, alpha
):
    lora, wanted = adapter
    save_file(load_file(lora), lora, {"lora_adapter_metadata": json.dumps(in_metadata)})
    change_settings(lora, **beside)
    modules = read_modules(slice_all(lora, 1.0))
    assert_merged(modules, wanted, (alpha or LORA["r"]) / LORA["lora_alpha"])
    assert ("warning: no alpha is stored for " in capsys.readouterr().err) == (alpha is None)


def test_the_file_beside_is_for_the_modules_in_pefts_names_alone(adapter, capsys):
    lora, wanted = adapter
    own = lora_module(QUERY, rank=LORA["r"], alpha=None)
    save_file(load_file(lora) | own, lora)
    modules = read_modules(slice_all(lora, 1.0))
    assert float(modules.pop(QUERY)["alpha"]) == LORA["r"]
    assert_merged(modules, wanted, 1.0)
    save_file(own, lora)
    lora.with_name("adapter_config.json").write_text("[]")  # which is not read at all
    assert set(read_modules(slice_all(lora, 1.0))) == {QUERY}
    assert capsys.readouterr().err == ""


def peft_factors(name: str, layer: str) -> dict[str, Tensor]:
    """A LoRA's factors under PEFT's names, without an alpha."""
    factors = lora_module(name, alpha=None)
    return {
        f"{layer}.lora_A.weight": factors[f"{name}.lora_down.weight"],
        f"{layer}.lora_B.weight": factors[f"{name}.lora_up.weight"],
    }


@pytest.mark.parametrize("key", [f"{UNDER_UNET}.lora_magnitude_vector", f"{QUERY}.dora_scale"])
@pytest.mark.parametrize("shape", [(1, 1280), (1280, 1)], ids=str)
def test_a_scale_of_two_axes_beside_pefts_factors_stays_by_row_or_by_column(
    tmp_path, capsys, key, shape
):
    """As diffusers leaves it, which gives LyCORIS' scale PEFT's name."""
    lora = tmp_path / "in.safetensors"
    save_file(peft_factors(QUERY, UNDER_UNET) | {key: torch.ones(shape).half()}, lora)
    [module] = read_modules(slice_all(lora, 1.0)).values()
    assert module["dora_scale"].shape == shape
    # The factors are PEFT's, whatever stands beside them.
    assert capsys.readouterr().err.startswith("warning: no alpha is stored for ")


def test_an_alpha_is_warned_of_only_where_it_is_missing_in_what_is_kept(slicer):
    style = UNDER_UNET.replace("attentions.0", "attentions.1")
    tensors = peft_factors(QUERY, UNDER_UNET) | peft_factors(STYLE.format(0, 1, "q"), style)
    tensors["base_model.model.conv_in.diff"] = torch.ones(320, 4, 3, 3)  # which needs none
    lora = slicer.folder / "a.safetensors"
    save_file(tensors | {f"{UNDER_UNET}.alpha": torch.tensor(1.0)}, lora)
    traits = all_traits(slicer.folder, content="output_blocks_0_1", style="1_1", first="input")
    for trait, warnings in (("content", 0), ("style", 1), ("first", 0)):
        assert slicer(lora, "--traits_file", traits, "--traits", trait) == 0
        assert slicer.err.count("warning: ") == warnings


@pytest.mark.parametrize("alpha", [3.0, 0.0])
def test_an_alpha_that_is_stored_wins_over_pefts_settings(tmp_path, alpha):
    tensors = peft_factors(QUERY, UNDER_UNET) | {f"{UNDER_UNET}.alpha": torch.tensor(alpha)}
    settings = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 1})}
    save_file(tensors, tmp_path / "in.safetensors", settings)
    [module] = read_modules(slice_all(tmp_path / "in.safetensors", 1.0)).values()
    assert module["alpha"].item() == alpha


ENCODER_QUERY = "text_model.encoder.layers.0.self_attn.q_proj"
ENCODERS = {
    f"{component}.{ENCODER_QUERY}": f"lora_{network}_{ENCODER_QUERY.replace('.', '_')}"
    for component, network in (("text_encoder", "te1"), ("text_encoder_2", "te2"))
}


@pytest.mark.parametrize("use_dora", [False, True])
def test_what_diffusers_converts_to_kohya_changes_what_peft_merges(tmp_path, use_dora):
    """Of a DoRA's keys only some are converted: it keeps dots and PEFT's lora_magnitude_vector."""
    from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
    from peft import get_peft_model_state_dict

    layers = {f"unet.{layer}": name for layer, name in LAYERS.items()} | ENCODERS
    # The conversion drops lora_alpha for the rank, so only where they agree is the change kept.
    setting = ("LoraConfig", LORA | {"lora_alpha": LORA["r"], "use_dora": use_dora})
    model = adapted(setting, layers)
    state = get_peft_model_state_dict(model)
    state = {key.removeprefix("base_model.model."): tensor for key, tensor in state.items()}
    converted = convert_state_dict_to_kohya(state)
    assert any("lora_magnitude_vector" in key for key in converted) == use_dora
    save_file(converted, tmp_path / "in.safetensors")
    modules = read_modules(slice_all(tmp_path / "in.safetensors", 1.0))
    wanted = merges(model.base_model.model, layers)
    assert set(modules) == set(wanted)
    for name, merge in wanted.items():
        assert ("dora_scale" in modules[name]) == use_dora
        assert_near(final_weight(modules[name], merge.base), merge.merged)


# ---- LyCORIS -------------------------------------------------------------------------------------

WRAPPED = ["LoRA", "LoCon, tucker", "LoHa", "full", "GLoRA"]
WRAPPED += [f"LoKr, {form}" for form in ("w2 factored", "both factored", "both whole")]


@pytest.mark.parametrize("form", WRAPPED)
def test_half_of_what_lycoris_wrapper_saves_is_half_of_what_lycoris_computes(tmp_path, form):
    from lycoris import create_lycoris

    model = tree_of(LAYERS)
    bases = {name: model.get_submodule(layer).weight.detach() for layer, name in LAYERS.items()}
    network = create_lycoris(model, 1.0, linear_dim=2, linear_alpha=1.5, **SCALED[form])
    network.apply_to()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    lora = tmp_path / "in.safetensors"
    network.save_weights(str(lora), torch.float32, None)
    assert all(key.startswith("lycoris_") for key in load_file(lora))
    modules = read_modules(slice_all(lora, 0.5))
    names = {f"lycoris_{layer.replace('.', '_')}": name for layer, name in LAYERS.items()}
    assert set(modules) == set(names.values())
    for module in network.loras:
        name = names[module.lora_name]
        found = [weight_change(modules[name], bases[name]), bias_change(modules[name])]
        halves = [change for change in found if change is not None]
        for half, whole in zip(halves, lycoris_change(module), strict=True):
            assert_near(half, 0.5 * whole.detach().double())


EXTRACTED = ("input_blocks.4.0.skip_connection", "input_blocks.1.0.emb_layers.1")


def test_the_sparse_bias_that_lycoris_extracts_is_multiplied_with_the_factors(tmp_path):
    from lycoris.utils import extract_diff

    torch.manual_seed(0)
    base, trained = (make_tree({x: SDXL["unet"][x] for x in EXTRACTED}) for _ in range(2))
    options = {"linear_mode_param": 2, "conv_mode_param": 2, "small_conv": False}
    lora = tmp_path / "in.safetensors"
    save_file(extract_diff([], [], base, trained, use_bias=True, **options), lora)
    source, halves = read_modules(lora), read_modules(slice_all(lora, 0.5))
    assert len(halves) == len(source) == len(EXTRACTED)
    for layer in EXTRACTED:
        name = f"lora_unet_{layer.replace('.', '_')}"
        assert_near(weight_change(halves[name]), 0.5 * weight_change(source[name]), 1e-3)
        # The tests' own formula: the sparse bias brings the factors nearer to what was extracted.
        wanted = trained.get_submodule(layer).weight - base.get_submodule(layer).weight
        factors = {s: t for s, t in source[name].items() if not s.startswith("bias_")}
        near, far = (weight_change(m).reshape(wanted.shape) for m in (source[name], factors))
        assert (near - wanted).norm() < 0.98 * (far - wanted).norm()
