"""Files of other programs are cut as the program that wrote them means them.

PEFT, diffusers and LyCORIS write theirs here, and say themselves what each file changes. What other
programs write is laid out by hand, after their source.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from exact_strength import slice_all
from lora_algebra import Module, bias_change, final_weight, read_modules, weight_change
from lora_files import CONTENT, STYLE, lora_module, weight_shape
from lora_forms import FORMS, REFUSED, make_module, write_modules
from lycoris_files import lycoris_change
from lycoris_modules import SDXL, make_tree
from namings import with_alpha
from peft_files import DORA, LAYERS, LORA, SETTINGS, Merge, adapted, merges, saved
from safetensors.torch import load_file, save_file
from slicing import Stored, all_traits, refusal, slice_lora, stored
from torch import Tensor


def assert_near(found: Tensor, wanted: Tensor, unit: float = 1e-5) -> None:
    """Equal within `unit` of the whole."""
    assert wanted.norm() > 0
    assert (found.reshape(wanted.shape) - wanted).norm() < unit * wanted.norm()


# ---- PEFT ----------------------------------------------------------------------------------------


def assert_merged(modules: dict[str, Module], wanted: dict[str, Merge], strength: float) -> None:
    """The modules change each layer by the strength times what PEFT's merge does."""
    assert set(modules) == set(wanted)
    for name, merge in wanted.items():
        assert_near(weight_change(modules[name]), strength * merge.change)


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_an_adapter_that_peft_saved_changes_what_peft_merges(tmp_path, capsys, setting, strength):
    lora, wanted = saved(tmp_path / "adapter", setting)
    capsys.readouterr()
    assert_merged(read_modules(slice_all(lora, strength)), wanted, strength)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("setting", DORA.values(), ids=DORA)
def test_a_dora_that_peft_saved_makes_the_weight_that_peft_merges(tmp_path, capsys, setting):
    lora, wanted = saved(tmp_path / "adapter", setting)
    capsys.readouterr()
    modules = read_modules(slice_all(lora, 1.0))
    assert set(modules) == set(wanted)
    for name, merge in wanted.items():
        assert modules[name]["dora_scale"].shape == (len(merge.base), *[1] * (merge.base.dim() - 1))
        assert_near(final_weight(modules[name], merge.base), merge.merged)
        # What PEFT makes is well apart from what a plain LoRA of these factors would.
        assert (weight_change(modules[name]) - merge.change).norm() > 0.1 * merge.change.norm()
    assert capsys.readouterr().err == ""


def test_the_folder_of_an_adapter_stands_for_its_file(tmp_path):
    lora, wanted = saved(tmp_path / "adapter", SETTINGS["LoRA"])
    outputs = []
    for number, source in enumerate((lora, lora.parent)):
        output = tmp_path / f"{number}.safetensors"
        args = ("--traits", "all", "--traits_file", all_traits(tmp_path), "--no_metadata")
        assert slice_lora("--loras", source, *args, "--output_path", output) == 0
        outputs.append(output.read_bytes())
    assert outputs[0] == outputs[1]
    assert_merged(read_modules(output), wanted, 1.0)


def test_the_folder_of_an_adapter_can_be_inspected(tmp_path, capsys):
    lora, _ = saved(tmp_path / "adapter", SETTINGS["LoRA"])
    capsys.readouterr()
    assert slice_lora("--loras", lora.parent, "--inspect") == 0
    assert f"{len(LAYERS)} modules" in capsys.readouterr().out


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_an_adapter_without_its_settings_is_cut_at_alpha_equal_to_its_rank_with_a_warning(
    tmp_path, capsys, setting
):
    lora, merged = saved(tmp_path / "adapter", setting)
    alone = tmp_path / "alone.safetensors"
    shutil.copy(lora, alone)
    capsys.readouterr()
    modules = read_modules(slice_all(alone, 1.0))
    for name, merge in merged.items():
        assert_near(weight_change(modules[name]), merge.change / merge.scaling)
    assert capsys.readouterr().err == (
        "warning: no alpha is stored for alone.safetensors, whose names are PEFT's: alpha = rank "
        "is assumed; if it was trained with another alpha, put its adapter_config.json beside it "
        "and cut it again\n"
    )


def test_factors_that_took_a_part_of_the_base_model_are_refused(tmp_path, capsys):
    """Until PEFT has subtracted what they began with, which it does where it is asked to."""
    [linear] = [layer for layer in LAYERS if layer.endswith("to_q")]
    setting = ("LoraConfig", LORA | {"init_lora_weights": "pissa"})
    adapted(setting, {linear: LAYERS[linear]}).save_pretrained(tmp_path / "adapter")
    capsys.readouterr()
    output = tmp_path / "out.safetensors"
    args = ("--traits", "all", "--traits_file", all_traits(tmp_path), "--output_path", output)
    lora = tmp_path / "adapter/adapter_model.safetensors"
    assert refusal(capsys, "--loras", lora, *args) == (
        f"{lora} was trained with init_lora_weights=pissa, so its factors hold a part of the base "
        "model: save it with PEFT's path_initial_model_for_weight_conversion"
    )


@pytest.mark.parametrize("start", ["pissa_niter_4", "OLoRA", "corda", "loftq", "lora_ga"])
def test_every_such_start_is_refused_as_the_settings_say_it(tmp_path, capsys, start):
    lora, _ = saved(tmp_path / "adapter", SETTINGS["LoRA"])
    change_settings(lora, init_lora_weights=start)
    capsys.readouterr()
    sentence = refusal(capsys, "--loras", lora, "--output_path", tmp_path / "out.safetensors")
    assert f"was trained with init_lora_weights={start}, " in sentence


def change_settings(lora: Path, **settings: object) -> None:
    """Other values in the adapter_config.json beside a file; None takes one out."""
    config = lora.with_name("adapter_config.json")
    changed = json.loads(config.read_text("utf-8")) | settings
    kept = {key: value for key, value in changed.items() if value is not None}
    config.write_text(json.dumps(kept), "utf-8")


UNREADABLE = ["[]", "{", "1", '"r"', ""]


@pytest.mark.parametrize("text", UNREADABLE)
def test_settings_that_are_none_are_refused(tmp_path, capsys, text):
    lora, _ = saved(tmp_path / "adapter", SETTINGS["LoRA"])
    config = lora.with_name("adapter_config.json")
    config.write_text(text, "utf-8")
    capsys.readouterr()
    sentence = refusal(capsys, "--loras", lora, "--output_path", tmp_path / "out.safetensors")
    assert sentence.startswith(f"cannot read {config} (")
    assert sentence.endswith("): save the LoRA again with its program")


@pytest.mark.parametrize("settings", [{"r": None}, {"r": 0}, {"alpha": "x"}], ids=str)
def test_settings_without_a_number_are_refused(tmp_path, capsys, settings):
    lora, _ = saved(tmp_path / "adapter", SETTINGS["LoKr, both whole"])
    change_settings(lora, **settings)
    capsys.readouterr()
    args = ("--traits", "all", "--traits_file", all_traits(tmp_path))
    args += ("--output_path", tmp_path / "out.safetensors")
    sentence = refusal(capsys, "--loras", lora, *args)
    assert sentence.startswith("adapter_config.json gives lora_unet_")
    assert sentence.endswith(" an alpha that is not a number")


def test_settings_in_the_metadata_of_another_network_leave_the_file_beside_to_be_read(
    tmp_path, capsys
):
    lora, merged = saved(tmp_path / "adapter", SETTINGS["LoRA"])
    settings = {"lora_adapter_metadata": json.dumps({"text_encoder.lora_alpha": 1})}
    save_file(load_file(lora), lora, settings)
    capsys.readouterr()
    assert_merged(read_modules(slice_all(lora, 1.0)), merged, 1.0)
    assert capsys.readouterr().err == ""


def test_settings_in_the_metadata_come_before_the_file_beside(tmp_path, capsys):
    lora, merged = saved(tmp_path / "adapter", SETTINGS["LoRA"])
    save_file(load_file(lora), lora, {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 1})})
    capsys.readouterr()
    modules = read_modules(slice_all(lora, 1.0))
    assert {float(module["alpha"]) for module in modules.values()} == {1.0}
    assert set(modules) == set(merged)


def test_the_file_beside_is_for_the_modules_in_pefts_names_alone(tmp_path, capsys):
    lora, merged = saved(tmp_path / "adapter", SETTINGS["LoRA"])
    own = lora_module(CONTENT.format(0, 1, "q"), rank=LORA["r"], alpha=None)
    save_file(load_file(lora) | own, lora)
    capsys.readouterr()
    modules = read_modules(slice_all(lora, 1.0))
    assert float(modules.pop(CONTENT.format(0, 1, "q"))["alpha"]) == LORA["r"]
    assert_merged(modules, merged, 1.0)


QUERY = CONTENT.format(0, 1, "q")
UNDER_UNET = "unet.up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
MAGNITUDES = {
    "PEFT's": f"{UNDER_UNET}.lora_magnitude_vector",
    "kohya's": f"{QUERY}.dora_scale",
}


def peft_factors(name: str, layer: str) -> dict[str, Tensor]:
    """A LoRA's factors under PEFT's names, without an alpha."""
    factors = lora_module(name, alpha=None)
    return {
        f"{layer}.lora_A.weight": factors[f"{name}.lora_down.weight"],
        f"{layer}.lora_B.weight": factors[f"{name}.lora_up.weight"],
    }


@pytest.mark.parametrize("key", MAGNITUDES.values(), ids=MAGNITUDES)
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


def test_what_needs_no_alpha_is_not_warned_of(tmp_path, capsys):
    lora = tmp_path / "in.safetensors"
    save_file({"base_model.model.conv_in.diff": torch.ones(320, 4, 3, 3)}, lora)
    slice_all(lora, 1.0)
    assert capsys.readouterr().err == ""


def test_only_what_is_kept_is_warned_of(tmp_path, capsys):
    """The alpha of the one block is there, that of the other is not."""
    style = UNDER_UNET.replace("attentions.0", "attentions.1")
    tensors = peft_factors(QUERY, UNDER_UNET) | peft_factors(STYLE.format(0, 1, "q"), style)
    tensors[f"{UNDER_UNET}.alpha"] = torch.tensor(1.0)
    lora, output = tmp_path / "a.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, lora)
    for trait, warnings in (("content", 0), ("style", 1)):
        assert slice_lora("--loras", lora, "--traits", trait, "--output_path", output) == 0
        assert capsys.readouterr().err.count("warning: ") == warnings


def test_an_algorithm_that_only_peft_has_is_refused(tmp_path, capsys):
    lora, _ = saved(tmp_path / "adapter", ("AdaLoraConfig", {"init_r": 4, "total_step": 1}))
    capsys.readouterr()
    assert refusal(capsys, "--loras", lora, "--output_path", tmp_path / "out.safetensors") == (
        f"{lora} is PEFT's ADALORA, which kohya's names cannot express: use it with PEFT"
    )


def test_the_settings_of_a_lora_of_another_rank_are_not_taken(tmp_path, capsys):
    lora, merged = saved(tmp_path / "adapter", SETTINGS["LoRA"])
    change_settings(lora, r=16)
    capsys.readouterr()
    modules = read_modules(slice_all(lora, 1.0))
    for name, merge in merged.items():
        assert_near(weight_change(modules[name]), merge.change / merge.scaling)
    assert capsys.readouterr().err.startswith("warning: no alpha is stored for ")


def test_somebodys_settings_beside_a_file_in_kohyas_names_are_not_for_it(tmp_path, capsys):
    adapter, _ = saved(tmp_path / "adapter", SETTINGS["rank-stabilized LoRA"])
    capsys.readouterr()
    modules = {
        name: make_module(name, FORMS["LoRA"], 2, alpha, torch.float16)
        for name, alpha in zip(LAYERS.values(), (None, 0.3, 8.0), strict=True)
    }
    adapter.with_name("adapter_config.json").write_text("[]")
    lora = write_modules(adapter.with_name("kohya.safetensors"), modules)
    assert stored(slice_all(lora, 1.0)) == wanted_bytes(tmp_path, modules)
    assert capsys.readouterr().err == ""


def wanted_bytes(folder: Path, modules: dict[str, Module]) -> Stored:
    """The modules by kohya's names as a slice at 1.0 holds them."""
    modules = {name: with_alpha(module) for name, module in modules.items()}
    return stored(write_modules(folder / "wanted.safetensors", modules))


# ---- diffusers -----------------------------------------------------------------------------------

ENCODERS = {
    f"{component}.text_model.encoder.layers.0.self_attn.q_proj": (
        f"lora_{network}_text_model_encoder_layers_0_self_attn_q_proj"
    )
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
    wanted = merges(model, layers)
    assert set(modules) == set(wanted)
    for name, merge in wanted.items():
        assert ("dora_scale" in modules[name]) == use_dora
        assert_near(final_weight(modules[name], merge.base), merge.merged)
        if not use_dora:
            assert_near(weight_change(modules[name]), merge.change)


# ---- LyCORIS -------------------------------------------------------------------------------------

WRAPPED = {
    "LoRA": {"algo": "lora"},
    "LoCon, tucker": {"algo": "locon", "use_tucker": True},
    "LoHa": {"algo": "loha"},
    "LoKr": {"algo": "lokr"},
    "LoKr, both factored": {"algo": "lokr", "decompose_both": True},
    "LoKr, both whole": {"algo": "lokr", "full_matrix": True},
    "full": {"algo": "full"},
    "GLoRA": {"algo": "glora"},
}


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("arguments", WRAPPED.values(), ids=WRAPPED)
def test_what_lycoris_wrapper_saves_changes_what_lycoris_computes(tmp_path, arguments, strength):
    from lycoris import create_lycoris

    torch.manual_seed(0)
    shapes = {layer: weight_shape(name) for layer, name in LAYERS.items()}
    model = make_tree({n: ("Conv2d" if len(s) > 2 else "Linear", s) for n, s in shapes.items()})
    bases = {name: model.get_submodule(layer).weight.detach() for layer, name in LAYERS.items()}
    network = create_lycoris(model, 1.0, linear_dim=2, linear_alpha=1.5, **arguments)
    network.apply_to()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    lora = tmp_path / "in.safetensors"
    network.save_weights(str(lora), torch.float32, None)
    assert all(key.startswith("lycoris_") for key in load_file(lora))
    modules = read_modules(slice_all(lora, strength))
    names = {f"lycoris_{layer.replace('.', '_')}": name for layer, name in LAYERS.items()}
    assert set(modules) == set(names.values())
    for module in network.loras:
        name = names[module.lora_name]
        found = [weight_change(modules[name], bases[name]), bias_change(modules[name])]
        for ours, theirs in zip(
            [c for c in found if c is not None], lycoris_change(module), strict=True
        ):
            assert_near(ours, strength * theirs.detach().double())


EXTRACTED = {
    "input_blocks.4.0.skip_connection": (640, 320, 1, 1),
    "input_blocks.1.0.emb_layers.1": (320, 1280),
    "input_blocks.0.0": (320, 4, 3, 3),
}


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What LyCORIS extracts with a sparse bias from the difference of two models."""
    from lycoris.utils import extract_diff

    torch.manual_seed(0)
    models = [make_tree({layer: SDXL["unet"][layer] for layer in EXTRACTED}) for _ in range(2)]
    state = extract_diff(
        [], [], *models, linear_mode_param=2, conv_mode_param=2, use_bias=True, small_conv=False
    )
    path = tmp_path_factory.mktemp("extracted") / "in.safetensors"
    save_file(state, path)
    assert {"bias_indices", "bias_values", "bias_size"} < {key.split(".")[1] for key in state}
    return path


def with_every_alpha(lora: Path, alpha: float, path: Path) -> Path:
    """The file with another alpha in each module."""
    tensors = load_file(lora)
    for key, tensor in tensors.items():
        if key.endswith(".alpha"):
            tensors[key] = torch.full_like(tensor, alpha)
    save_file(tensors, path)
    return path


def test_the_sparse_bias_of_an_extraction_is_part_of_the_change(extracted):
    """Of these tests' own formula: the sparse bias brings factors nearer to what was extracted."""
    torch.manual_seed(0)
    base, trained = (
        make_tree({layer: SDXL["unet"][layer] for layer in EXTRACTED}) for _ in range(2)
    )
    modules = read_modules(extracted)
    assert len(modules) == len(EXTRACTED)
    for layer in EXTRACTED:
        module = modules[f"lora_unet_{layer.replace('.', '_')}"]
        change = (trained.get_submodule(layer).weight - base.get_submodule(layer).weight).double()
        factors = {s: t for s, t in module.items() if not s.startswith("bias_")}
        near, far = (
            (weight_change(m).reshape(change.shape) - change).norm() for m in (module, factors)
        )
        assert near < 0.98 * far


@pytest.mark.parametrize("alpha", [2.0, 0.7])
@pytest.mark.parametrize("strength", [0.5, -1.0])
def test_a_sparse_bias_is_multiplied_with_the_factors(tmp_path, extracted, strength, alpha):
    lora = with_every_alpha(extracted, alpha, tmp_path / "in.safetensors")
    source, result = read_modules(lora), read_modules(slice_all(lora, strength))
    assert set(result) == set(source)
    for name, module in source.items():
        assert_near(weight_change(result[name]), strength * weight_change(module), 1e-3)
        for suffix in ("bias_indices", "bias_size", "alpha"):
            assert torch.equal(result[name][suffix], module[suffix])


def test_a_sparse_bias_stays_exact_where_a_join_gives_all_modules_one_alpha(tmp_path, extracted):
    loras = [
        with_every_alpha(extracted, alpha, tmp_path / f"{alpha}.safetensors")
        for alpha in (3.0, 0.7)
    ]
    traits = all_traits(tmp_path, a="lora_unet_input_blocks_0_", b="lora_unet_input_blocks_4_")
    output = tmp_path / "out.safetensors"
    args = ("--traits", "a", "b", "--traits_file", traits, "--output_path", output)
    assert slice_lora("--loras", *loras, *args) == 0
    result = read_modules(output)
    assert len({float(module["alpha"]) for module in result.values()}) == 1
    sources = [read_modules(lora) for lora in loras]
    for name, source in zip(
        ("lora_unet_input_blocks_0_0", "lora_unet_input_blocks_4_0_skip_connection"),
        sources,
        strict=True,
    ):
        assert_near(weight_change(result.pop(name)), weight_change(source[name]), 1e-3)
    assert not result


# ---- As laid out by hand -------------------------------------------------------------------------

Q = "lora_unet_output_blocks_3_1_transformer_blocks_0_attn1_to_q"
Q_DIFFUSERS = "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
Q_SGM = "output_blocks.3.1.transformer_blocks.0.attn1.to_q"
CONV, CONV_DIFFUSERS, CONV_SGM = "lora_unet_out_2", "conv_out", "out.2"
TE1 = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
TE2 = "lora_te2_text_model_encoder_layers_31_mlp_fc1"
TE1_NAME = "text_model.encoder.layers.0.self_attn.q_proj"
TE2_NAME = "text_model.encoder.layers.31.mlp.fc1"
UP, DOWN = "lora_up.weight", "lora_down.weight"
PLAIN = {UP: ".lora_up.weight", DOWN: ".lora_down.weight", "alpha": ".alpha"}
PEFT = {UP: ".lora_B.weight", DOWN: ".lora_A.weight"}
WITH_DOTS = {UP: ".lora.up.weight", DOWN: ".lora.down.weight", "alpha": ".alpha"}


def underscored(layer: str) -> str:
    return layer.replace(".", "_")


# By program: the form, the key of each module less its suffix, and how suffixes are spelled.
LAYOUTS = {
    # OneTrainer's "legacy" format: an underscore before the factors' names, a dot before alpha.
    "OneTrainer, legacy LoHa": (
        "LoHa",
        {
            Q: f"lora_unet_{underscored(Q_DIFFUSERS)}",
            CONV: "lora_unet_conv_out",
            TE1: TE1,
            TE2: TE2,
        },
        {s: f"_{s}" for s in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
    ),
    "OneTrainer, legacy LoKr": (
        "LoKr, both factored",
        {Q: f"lora_unet_{underscored(Q_DIFFUSERS)}", CONV: "lora_unet_conv_out"},
        {s: f"_{s}" for s in ("lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b")},
    ),
    # Its diffusers format, and OMI's with sgm's words.
    "OneTrainer, diffusers": (
        "LoHa",
        {Q: f"unet.{Q_DIFFUSERS}", TE1: f"clip_l.{TE1_NAME}", TE2: f"clip_g.{TE2_NAME}"},
        {},
    ),
    "OneTrainer, OMI": (
        "LoHa",
        {Q: f"unet.{Q_SGM}", TE1: f"clip_l.{TE1_NAME}", TE2: f"clip_g.{TE2_NAME}"},
        {},
    ),
    "OneTrainer, OMI, LoRA": (
        "LoRA",
        {Q: f"unet.{Q_SGM}", TE1: f"clip_l.{TE1_NAME}", TE2: f"clip_g.{TE2_NAME}"},
        PLAIN,
    ),
    # ComfyUI's comfy_extras/nodes_train.py: the names of its own model, which are sgm's.
    "ComfyUI's trainer": (
        "LoRA",
        {
            Q: f"diffusion_model.{Q_SGM}",
            CONV: f"diffusion_model.{CONV_SGM}",
            TE1: f"text_encoders.clip_l.transformer.{TE1_NAME}",
            TE2: f"text_encoders.clip_g.transformer.{TE2_NAME}",
        },
        PLAIN,
    ),
    "ComfyUI's extractor": ("LoRA", {Q: f"diffusion_model.{Q_SGM}"}, PEFT | {"alpha": ".alpha"}),
    "bare names of sgm": ("LoRA", {Q: Q_SGM, CONV: CONV_SGM}, PLAIN),
    # SimpleTuner's LoRA of the U-Net before its pull request 2704.
    "SimpleTuner": (
        "LoRA",
        {
            Q: f"unet.base_model.model.{Q_DIFFUSERS}",
            CONV: f"unet.base_model.model.{CONV_DIFFUSERS}",
        },
        WITH_DOTS,
    ),
    # sd-scripts' networks/oft.py; alpha is its constraint.
    "sd-scripts OFT": (
        "OFT",
        {Q: f"oft_unet_{underscored(Q_SGM)}", CONV: "oft_unet_out_2"},
        {},
    ),
    "sd-scripts OFT of diffusers' names": (
        "OFT",
        {Q: f"oft_unet_{underscored(Q_DIFFUSERS)}", CONV: "oft_unet_conv_out"},
        {},
    ),
}


def laid_out(layout: str, path: Path) -> dict[str, Module]:
    """Write a file as this program lays it out; its modules by kohya's names."""
    form, keys, spellings = LAYOUTS[layout]
    every = FORMS | REFUSED
    modules = {
        name: make_module(name, every[form], 2, 0.3, torch.float16, seed)
        for seed, name in enumerate(keys)
    }
    save_file(
        {
            keys[name] + spellings.get(suffix, f".{suffix}"): tensor
            for name, module in modules.items()
            for suffix, tensor in module.items()
        },
        path,
    )
    return modules


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_of_every_program_comes_out_in_kohyas_names_to_the_byte(tmp_path, layout):
    lora = tmp_path / "in.safetensors"
    modules = laid_out(layout, lora)
    assert stored(slice_all(lora, 1.0)) == wanted_bytes(tmp_path, modules)


@pytest.mark.parametrize("strength", [0.5, -1.0])
@pytest.mark.parametrize("layout", [name for name, (form, *_) in LAYOUTS.items() if form in FORMS])
def test_the_layout_of_every_program_is_cut_at_a_strength_exactly(tmp_path, layout, strength):
    lora = tmp_path / "in.safetensors"
    modules = laid_out(layout, lora)
    result = read_modules(slice_all(lora, strength))
    assert set(result) == set(modules)
    for name, module in modules.items():
        assert_near(weight_change(result[name]), strength * weight_change(module))


@pytest.mark.parametrize("layout", [name for name, (form, *_) in LAYOUTS.items() if form == "OFT"])
def test_a_rotation_of_another_layout_is_refused_at_a_strength(tmp_path, capsys, layout):
    lora = tmp_path / "in.safetensors"
    modules = laid_out(layout, lora)
    args = ("--traits", "all", "--traits_file", all_traits(tmp_path), "--alphas", "0.5")
    output = tmp_path / "out.safetensors"
    sentence = refusal(capsys, "--loras", lora, *args, "--output_path", output)
    assert any(sentence.startswith(f"cannot rescale {name} in ") for name in modules)
    assert not output.exists()


def test_the_dora_of_ai_toolkit_gives_each_row_its_magnitude(tmp_path):
    """toolkit/models/DoRA.py: magnitude * (W + change) / the norm of each row of that."""
    module = make_module(Q, FORMS["LoRA"], 2, None, torch.float32)
    base = torch.randn(weight_shape(Q), generator=torch.Generator().manual_seed(2))
    magnitude = 1 + torch.rand(len(base), generator=torch.Generator().manual_seed(3))
    keys = {f"{Q}.{suffix}": tensor for suffix, tensor in module.items()}
    save_file(keys | {f"{Q}.magnitude": magnitude}, tmp_path / "in.safetensors")
    [(name, found)] = read_modules(slice_all(tmp_path / "in.safetensors", 1.0)).items()
    assert name == Q
    assert found["dora_scale"].shape == (len(base), 1)
    changed = base.double() + module[UP].double() @ module[DOWN].double()
    wanted = magnitude.double()[:, None] * changed / changed.norm(dim=1, keepdim=True)
    assert_near(final_weight(found, base), wanted)


def test_the_magnitude_of_ai_toolkit_makes_a_dora_that_no_strength_goes_into(tmp_path, capsys):
    module = make_module(Q, FORMS["LoRA"], 2, 1.0, torch.float32)
    keys = {f"{Q}.{suffix}": tensor for suffix, tensor in module.items()}
    lora = tmp_path / "in.safetensors"
    save_file(keys | {f"{Q}.magnitude": torch.ones(640)}, lora)
    args = ("--traits", "all", "--traits_file", all_traits(tmp_path), "--alphas", "0.5")
    output = tmp_path / "out.safetensors"
    sentence = refusal(capsys, "--loras", lora, *args, "--output_path", output)
    assert sentence.startswith(f"cannot rescale {Q} in {lora}, because ")
    assert "DoRA" in sentence


@pytest.mark.parametrize("strength", [1.0, 0.5, -1.0])
def test_the_bias_of_ai_toolkits_lora_up_is_multiplied_with_it(tmp_path, strength):
    module = make_module(Q, FORMS["LoRA"], 2, 0.3, torch.float32)
    module["lora_up.bias"] = torch.randn(640, generator=torch.Generator().manual_seed(4))
    lora = write_modules(tmp_path / "in.safetensors", {Q: module})
    [found] = read_modules(slice_all(lora, strength)).values()
    assert_near(weight_change(found), strength * weight_change(module))
    assert_near(bias_change(found), strength * bias_change(module))
