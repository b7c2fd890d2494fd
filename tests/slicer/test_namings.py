"""Layers by any program's name for them come out as kohya's sgm names, with all their numbers.

Every prefix by every name of a layer by every algorithm; and held against diffusers' own U-Net and
every layer of SDXL.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from exact_strength import DTYPES, PROVE, assert_scaled, digits, slice_all, strengths
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_algebra import Module, read_modules
from lora_files import SDXL, SHAPES, weight_shape
from lora_forms import FORMS, REFUSED, make_module, write_modules
from namings import (
    LAYER_NAMINGS,
    MAGNITUDES,
    NAMINGS,
    SPELLINGS,
    Naming,
    in_kohyas_names,
    kohya_name,
    spread,
    with_alpha,
)
from safetensors.torch import save_file
from slicing import Stored, all_traits, refusal, slice_lora, stored
from torch import Tensor, nn

NETWORKS = ("unet", "te1", "te2")
ALPHA = 0.3  # where a module has one


def write(path: Path, naming: Naming, modules: dict[str, Module]) -> Path:
    save_file(naming.keys(modules), path)
    return path


# ---- Every naming by every algorithm -------------------------------------------------------------


@pytest.mark.parametrize("naming", NAMINGS, ids=str)
def test_every_algorithm_in_every_naming_comes_out_in_kohyas_names_to_the_byte(tmp_path, naming):
    for forms in (FORMS, REFUSED):
        modules = spread(forms, naming.network, None)
        lora = write(tmp_path / "in.safetensors", naming, modules)
        wanted = in_kohyas_names(naming.network, modules)
        wanted = stored(write_modules(tmp_path / "wanted.safetensors", wanted))
        assert stored(slice_all(lora, 1.0)) == wanted


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stored]:
    """Half of every algorithm's change in kohya's own names, shown to be that in float64."""
    found = {}
    for network in NETWORKS:
        sources = in_kohyas_names(network, spread(FORMS, network, ALPHA))
        lora = write_modules(tmp_path_factory.mktemp("half") / "in.safetensors", sources)
        output = slice_all(lora, 0.5)
        results = read_modules(output)
        assert set(results) == set(sources)
        for name, source in sources.items():
            assert_scaled(name, results[name], source, 0.5)
        found[network] = stored(output)
    return found


@pytest.mark.parametrize("naming", NAMINGS, ids=str)
def test_half_of_every_algorithm_in_every_naming_is_exactly_half_its_change(
    tmp_path, halves, naming
):
    modules = spread(FORMS, naming.network, ALPHA)
    lora = write(tmp_path / "in.safetensors", naming, modules)
    assert stored(slice_all(lora, 0.5)) == halves[naming.network]


@pytest.mark.parametrize("naming", NAMINGS, ids=str)
def test_what_cannot_be_halved_is_refused_by_its_kohya_name_in_every_naming(
    tmp_path, capsys, naming
):
    modules = spread(REFUSED, naming.network, None)
    lora = write(tmp_path / "in.safetensors", naming, modules)
    names = [kohya_name(naming.network, layer) for layer in modules]
    traits = all_traits(tmp_path, **{name: name for name in names})
    output = tmp_path / "out.safetensors"
    for name in names:
        args = ("--traits", name, "--traits_file", traits, "--alphas", "0.5")
        sentence = refusal(capsys, "--loras", lora, *args, "--output_path", output)
        assert sentence.startswith(f"cannot rescale {name} in ")
    assert not output.exists()


# ---- Every spelling of LoRA and DoRA -------------------------------------------------------------


@pytest.mark.parametrize("naming", LAYER_NAMINGS, ids=str)
def test_every_spelling_of_a_loras_factors_comes_in_under_every_prefix(tmp_path, naming):
    layers = spread(dict.fromkeys(SPELLINGS, FORMS["LoRA"]), naming.network, None)
    tensors, wanted = {}, {}
    for (layer, module), (up, down) in zip(layers.items(), SPELLINGS.values(), strict=True):
        tensors[naming.layer(layer) + up] = module["lora_up.weight"]
        tensors[naming.layer(layer) + down] = module["lora_down.weight"]
        wanted[kohya_name(naming.network, layer)] = with_alpha(module)
    save_file(tensors, tmp_path / "in.safetensors")
    wanted = stored(write_modules(tmp_path / "wanted.safetensors", wanted))
    assert stored(slice_all(tmp_path / "in.safetensors", 1.0)) == wanted


@pytest.mark.parametrize("naming", LAYER_NAMINGS, ids=str)
def test_every_spelling_of_a_doras_magnitudes_comes_out_by_row_as_lycoris_has_them(
    tmp_path, naming
):
    # Each spelling on a convolution and on a matrix: `spread` takes the kinds of layers in turn.
    spellings = [*MAGNITUDES, *MAGNITUDES[2:], *MAGNITUDES[:2]]
    layers = spread(dict.fromkeys(range(8), REFUSED["DoRA"]), naming.network, 1.0)
    tensors, wanted = {}, {}
    for spelling, (layer, module) in zip(spellings, layers.items(), strict=True):
        key, scale = naming.layer(layer), module["dora_scale"]
        # One number a row: [out], and [1, out, 1, 1] of a convolution.
        by_row = scale.flatten() if scale.dim() == 2 else scale.swapaxes(0, 1).contiguous()
        tensors[key + spelling] = by_row
        for suffix in ("lora_up.weight", "lora_down.weight", "alpha"):
            tensors[f"{key}.{suffix}"] = module[suffix]
        wanted[kohya_name(naming.network, layer)] = module
    save_file(tensors, tmp_path / "in.safetensors")
    wanted = stored(write_modules(tmp_path / "wanted.safetensors", wanted))
    assert stored(slice_all(tmp_path / "in.safetensors", 1.0)) == wanted


# ---- Programs' own namings -----------------------------------------------------------------------

# Layers in kohya's sgm names, and as diffusers calls them.
LAYERS = {
    "lora_unet_output_blocks_0_1_transformer_blocks_0_attn1_to_q": (
        "unet.up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    ),
    "lora_unet_output_blocks_4_1_transformer_blocks_1_attn2_to_out_0": (
        "unet.up_blocks.1.attentions.1.transformer_blocks.1.attn2.to_out.0"
    ),
    "lora_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_k": (
        "unet.down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k"
    ),
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_v": (
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_v"
    ),
    "lora_unet_middle_block_1_transformer_blocks_2_attn1_to_q": (
        "unet.mid_block.attentions.0.transformer_blocks.2.attn1.to_q"
    ),
    "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": (
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    ),
    "lora_te2_text_model_encoder_layers_31_self_attn_out_proj": (
        "text_encoder_2.text_model.encoder.layers.31.self_attn.out_proj"
    ),
}
# Those that the attention-processor form has no name for.
MORE_LAYERS = {
    "lora_unet_output_blocks_1_1_transformer_blocks_0_ff_net_0_proj": (
        "unet.up_blocks.0.attentions.1.transformer_blocks.0.ff.net.0.proj"
    ),
    "lora_unet_input_blocks_5_1_proj_in": "unet.down_blocks.1.attentions.1.proj_in",
    "lora_unet_input_blocks_4_0_skip_connection": "unet.down_blocks.1.resnets.0.conv_shortcut",
    "lora_unet_out_2": "unet.conv_out",
    "lora_te2_text_model_encoder_layers_0_mlp_fc1": (
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc1"
    ),
}
SMALL = 600_000  # numbers in a weight whose change is compared in float64, hundreds of times
PEFT = {"lora_up.weight": "lora_B.weight", "lora_down.weight": "lora_A.weight"}
ORIGINAL = {"lora_up.weight": "lora.up.weight", "lora_down.weight": "lora.down.weight"}
OLD_TEXT = {
    "lora_up.weight": "lora_linear_layer.up.weight",
    "lora_down.weight": "lora_linear_layer.down.weight",
}


def diffusers_kohya(layer: str, suffix: str) -> str:
    for prefix, ours in (
        ("unet.", "unet_"),
        ("text_encoder_2.", "te2_"),
        ("text_encoder.", "te1_"),
    ):
        if layer.startswith(prefix):
            return f"lora_{ours}{layer.removeprefix(prefix).replace('.', '_')}.{suffix}"
    raise ValueError(layer)


def peft(layer: str, suffix: str) -> str:
    return f"{layer}.{PEFT.get(suffix, suffix)}"


def whole_peft(layer: str, suffix: str) -> str:
    return f"base_model.model.{peft(layer, suffix)}"


def unet_peft(layer: str, suffix: str) -> str:
    """PEFT of the U-Net alone, which does not say so."""
    return whole_peft(layer.removeprefix("unet."), suffix)


def original(layer: str, suffix: str) -> str:
    suffixes = ORIGINAL if layer.startswith("unet.") else OLD_TEXT
    return f"{layer}.{suffixes.get(suffix, suffix)}"


def doubled(layer: str, suffix: str) -> str:
    key = original(layer, suffix)
    return f"unet.{key}" if layer.startswith("unet.") else key


def processor(layer: str, suffix: str) -> str:
    """Such as attn1.processor.to_out_lora.up.weight, and self_attn.to_q_lora.up.weight."""
    parent, _, projection = layer.removesuffix(".0").rpartition(".")
    if layer.startswith("unet."):
        parent += ".processor"
    else:
        projection = "to_" + projection.removesuffix("_proj")
    return f"{parent}.{projection}_{ORIGINAL.get(suffix, f'lora.{suffix}')}"


Program = Callable[[str, str], str]
PROGRAMS: dict[str, Program] = {
    "kohya, diffusers names": diffusers_kohya,
    "PEFT": peft,
    "PEFT of a whole model": whole_peft,
    "the original B-LoRA": original,
    "doubled": doubled,
    "attention processors": processor,
}
UNET_PROGRAMS = {name: key for name, key in PROGRAMS.items() if key is not processor} | {
    "PEFT of the U-Net": unet_peft
}


def renamed(modules: dict[str, Module], naming: str | None) -> dict[str, Tensor]:
    """The tensors by key, in one of the namings; None is kohya's sgm names."""
    names = LAYERS | MORE_LAYERS
    return {
        PROGRAMS[naming](names[name], suffix) if naming else f"{name}.{suffix}": tensor
        for name, module in modules.items()
        for suffix, tensor in module.items()
    }


def layers_of(naming: str | None) -> dict[str, str]:
    return LAYERS if naming == "attention processors" else LAYERS | MORE_LAYERS


def small_layers(naming: str | None) -> list[str]:
    return [name for name in layers_of(naming) if math.prod(weight_shape(name)) < SMALL]


@pytest.mark.parametrize("naming", [None, *PROGRAMS])
@pytest.mark.parametrize("alpha", [None, 0.3])
def test_the_naming_of_every_program_comes_out_in_kohyas_names_to_the_byte(tmp_path, naming, alpha):
    modules = {
        name: make_module(name, FORMS["LoRA"], 2, alpha, torch.float16, seed)
        for seed, name in enumerate(layers_of(naming))
    }
    wanted = {name: with_alpha(module) for name, module in modules.items()}
    wanted = stored(write_modules(tmp_path / "wanted.safetensors", wanted))
    save_file(renamed(modules, naming), tmp_path / "in.safetensors")
    assert stored(slice_all(tmp_path / "in.safetensors", 1.0)) == wanted


@settings(PROVE, max_examples=10)
@given(
    namings=st.tuples(*[st.sampled_from([None, *PROGRAMS])] * 2),
    ranks=st.tuples(*[st.sampled_from([1, 2, 5])] * 2),
    alphas=st.tuples(*[st.sampled_from([None, 0.3, 1.0, 2.0])] * 2),
    dtypes=st.tuples(*[st.sampled_from(list(DTYPES))] * 2),
    cut=st.tuples(strengths, strengths),
)
def test_two_loras_of_any_namings_join_into_the_change_of_both(namings, ranks, alphas, dtypes, cut):
    sources: dict[str, Module] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for index, part in enumerate(("lora_unet_", "lora_te")):
            modules = {
                layer: make_module(
                    layer, FORMS["LoRA"], ranks[index], alphas[index], dtypes[index], seed
                )
                for seed, layer in enumerate(small_layers(namings[index]))
            }
            save_file(renamed(modules, namings[index]), folder / f"{index}.safetensors")
            sources |= {layer: m for layer, m in modules.items() if layer.startswith(part)}
        traits = all_traits(folder, unet="lora_unet_", text="lora_te")
        args = ["--traits", "unet", "text", "--traits_file", traits, "--alphas", *map(digits, cut)]
        args += ["--output_path", folder / "out.safetensors"]
        loras = (folder / "0.safetensors", folder / "1.safetensors")
        assert slice_lora("--loras", *loras, *args) == 0
        result = read_modules(folder / "out.safetensors")
    assert set(result) == set(sources)
    for layer, source in sources.items():
        assert_scaled(layer, result[layer], source, cut[not layer.startswith("lora_unet_")])


# ---- Every layer ---------------------------------------------------------------------------------


def places(lora: Path) -> dict[int, str]:
    """Under which name the slicer writes the module of each number, all of them told apart."""
    modules = read_modules(slice_all(lora, 1.0))
    names = {
        int(next(t for suffix, t in m.items() if suffix != "alpha").flatten()[0]): name
        for name, m in modules.items()
    }
    assert len(names) == len(modules)
    return names


def numbered(naming: Program, layers: dict[str, list[int]]) -> dict[str, Tensor]:
    """A LoRA of rank 1 on every layer, whose lora_up and lora_down hold the layer's number."""
    tensors = {}
    for number, (layer, (outputs, inputs, *kernel)) in enumerate(layers.items()):
        ones = [1 for _ in kernel]
        up, down = [outputs, 1, *ones], [1, inputs, *kernel]
        tensors[naming(layer, "lora_up.weight")] = torch.full(up, float(number))
        tensors[naming(layer, "lora_down.weight")] = torch.full(down, float(number))
    return tensors


@pytest.fixture(scope="module")
def diffusers_layers() -> dict[str, nn.Module]:
    """The layers of diffusers' own U-Net that a LoRA can change, without weights."""
    from diffusers_sdxl import sdxl_unet_without_weights

    kinds = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GroupNorm)
    modules = sdxl_unet_without_weights().named_modules()
    return {f"unet.{name}": layer for name, layer in modules if isinstance(layer, kinds)}


@pytest.mark.parametrize("naming", UNET_PROGRAMS.values(), ids=UNET_PROGRAMS)
def test_every_layer_of_diffusers_unet_is_its_own_layer_of_sdxl(tmp_path, diffusers_layers, naming):
    shapes = {
        name: list(layer.weight.shape)
        for name, layer in diffusers_layers.items()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }
    save_file(numbered(diffusers_kohya, shapes), tmp_path / "kohya.safetensors")
    save_file(numbered(naming, shapes), tmp_path / "in.safetensors")
    names = places(tmp_path / "in.safetensors")
    assert names == places(tmp_path / "kohya.safetensors")
    found = {names[number]: shape for number, shape in enumerate(shapes.values())}
    assert found == {name: shape for name, shape in SHAPES.items() if name.startswith("lora_unet_")}


def test_every_norm_of_diffusers_unet_is_a_norm_of_its_own(tmp_path, diffusers_layers):
    norms = {
        diffusers_kohya(name, "w_norm"): torch.full(layer.weight.shape, float(number))
        for number, (name, layer) in enumerate(diffusers_layers.items())
        if not isinstance(layer, nn.Linear | nn.Conv2d)
    }
    save_file(norms, tmp_path / "in.safetensors")
    names = set(places(tmp_path / "in.safetensors").values())
    assert len(names) == len(norms) == 256
    assert not names & set(SHAPES)


@pytest.mark.parametrize("around", ["text_model.", ""])
@pytest.mark.parametrize("encoder", ["te1", "te2"])
def test_text_encoder_layers_are_placed_with_and_without_the_text_model_around_them(
    tmp_path, encoder, around
):
    component = {"te1": "text_encoder", "te2": "text_encoder_2"}[encoder]
    # transformers 5 has no text_model around the first encoder's layers any more.
    layers = {
        f"{component}.{name.replace('text_model.', around)}": shape
        for name, (_, shape) in SDXL[encoder].items()
    }
    save_file(numbered(peft, layers), tmp_path / "in.safetensors")
    wanted = [f"lora_{encoder}_{name.replace('.', '_')}" for name in SDXL[encoder]]
    assert places(tmp_path / "in.safetensors") == dict(enumerate(wanted))
