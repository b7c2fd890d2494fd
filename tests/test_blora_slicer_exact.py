"""A slice changes each layer by exactly its strength times what the source did.

Proven with arithmetic of the tests' own in float64 (lora_algebra.py), with LyCORIS' own modules,
and with the names of diffusers' own U-Net.
"""

from __future__ import annotations

import json
import math
import struct
import tempfile
import tracemalloc
from decimal import Decimal
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_algebra import Module, bias_change, final_weight, read_modules, weight_change
from lora_files import CONTENT, STYLE
from lycoris_modules import SDXL, make_tree
from safetensors import deserialize
from safetensors.torch import save_file
from torch import Tensor, nn

import blora_slicer

# The same examples on every run.
PROVE = settings(derandomize=True, deadline=None, max_examples=150)

# Every algorithm and form that LyCORIS 4.1 writes: the tensors' shapes, a letter an axis, and the
# tensors that carry the strength. r is the rank; out is o = a * b, in is i = c * d.
SIZES = {"o": 6, "i": 8, "a": 2, "b": 3, "c": 2, "d": 4}
LORA = {"lora_up.weight": "or", "lora_down.weight": "ri"}
LOCON = {"lora_up.weight": "or11", "lora_down.weight": "ri33"}
TUCKER = {"lora_up.weight": "or11", "lora_mid.weight": "rr33", "lora_down.weight": "ri11"}
LOHA = {"hada_w1_a": "or", "hada_w1_b": "ri", "hada_w2_a": "or", "hada_w2_b": "ri"}
LOHA_TUCKER = {"hada_t1": "rr33", "hada_w1_a": "ro", "hada_w1_b": "ri"}
LOHA_TUCKER |= {"hada_t2": "rr33", "hada_w2_a": "ro", "hada_w2_b": "ri"}
GLORA = {"a1.weight": "ir", "a2.weight": "ri", "b1.weight": "or", "b2.weight": "ri"}
W2_FACTORS = {"lokr_w2_a": "br", "lokr_w2_b": "rd"}
W1_FACTORS = {"lokr_w1_a": "ar", "lokr_w1_b": "rc"}
W2_TUCKER = {"lokr_t2": "rr33", "lokr_w2_a": "rb", "lokr_w2_b": "rd"}
FORMS: dict[str, tuple[dict[str, str], set[str]]] = {
    "LoRA": (LORA, {"lora_up.weight"}),
    "LoCon": (LOCON, {"lora_up.weight"}),
    "LoCon, tucker": (TUCKER, {"lora_up.weight"}),
    "DyLoRA, conv": ({"lora_up.weight": "or", "lora_down.weight": "ri33"}, {"lora_up.weight"}),
    "LoHa": (LOHA, {"hada_w1_a"}),
    "LoHa, tucker": (LOHA_TUCKER, {"hada_w1_a"}),
    "LoKr, both whole": ({"lokr_w1": "ac", "lokr_w2": "bd"}, {"lokr_w1"}),
    "LoKr, both whole, conv": ({"lokr_w1": "ac", "lokr_w2": "bd33"}, {"lokr_w1"}),
    "LoKr, w2 factored": ({"lokr_w1": "ac"} | W2_FACTORS, {"lokr_w1"}),
    "LoKr, w1 factored": (W1_FACTORS | {"lokr_w2": "bd"}, {"lokr_w1_a"}),
    "LoKr, both factored": (W1_FACTORS | W2_FACTORS, {"lokr_w1_a"}),
    "LoKr, tucker": ({"lokr_w1": "ac"} | W2_TUCKER, {"lokr_w1"}),
    "full": ({"diff": "oi"}, {"diff"}),
    "full, with bias": ({"diff": "oi33", "diff_b": "o"}, {"diff", "diff_b"}),
    "norm": ({"w_norm": "o", "b_norm": "o"}, {"w_norm", "b_norm"}),
    "norm, without bias": ({"w_norm": "o"}, {"w_norm"}),
    "IA3": ({"weight": "o", "on_input": ""}, {"weight"}),
    "IA3, on the input": ({"weight": "i", "on_input": ""}, {"weight"}),
    "GLoRA": (GLORA, {"a2.weight", "b2.weight"}),
}
REFUSED = {
    "OFT": {"oft_blocks": "baa", "alpha": ""},
    "OFT, rescaled": {"oft_blocks": "baa", "rescale": "o1", "alpha": ""},
    "BOFT": {"oft_blocks": "2baa", "alpha": ""},
    "T-LoRA": {"q_layer.weight": "ri", "p_layer.weight": "or", "lambda_layer": "1r", "alpha": ""},
    "DoRA": LORA | {"dora_scale": "o1"},
    "DoRA, by column": LORA | {"dora_scale": "1i"},
    "LoHa with DoRA": LOHA | {"dora_scale": "o1"},
    "LoKr with DoRA": {"lokr_w1": "ac", "lokr_w2": "bd", "dora_scale": "o1"},
}
# The largest relative error of a stored number: half of its last bit, and where it is computed in
# fp32 also the roundings of the strength and of the product.
DTYPES = {
    torch.float16: 2**-11 + 2**-23,
    torch.bfloat16: 2**-8 + 2**-23,
    torch.float32: 2**-22,
    torch.float64: 2**-51,
}
SUBNORMAL = 2**-25  # half of fp16's smallest number
NAMES = [(0, 1, "q"), (0, 2, "out_0"), (3, 1, "v"), (9, 2, "k")]
BASE = torch.randn(SIZES["o"], SIZES["i"], generator=torch.Generator().manual_seed(1))


def make_module(
    form: dict[str, str], rank: int, alpha: float | None, dtype: torch.dtype, seed: int = 0
) -> Module:
    """Random tensors of these shapes; the same arguments give the same numbers."""
    noise = torch.Generator().manual_seed(seed)
    sizes = SIZES | {"r": rank}
    module = {
        suffix: torch.randn([sizes.get(axis) or int(axis) for axis in axes], generator=noise)
        for suffix, axes in form.items()
    }
    module = {suffix: tensor.to(dtype) for suffix, tensor in module.items()}
    if "on_input" in form:
        module["on_input"] = torch.tensor(int(form["weight"] == "i"))
    if alpha is not None and any("r" in axes for axes in form.values()):
        module["alpha"] = torch.tensor(alpha, dtype=dtype)
    return module


def write(path: Path, modules: dict[str, Module]) -> Path:
    """Save modules in kohya's names; safetensors refuses one tensor under two of them."""
    tensors = {f"{name}.{suffix}": t for name, m in modules.items() for suffix, t in m.items()}
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, path)
    return path


def slice_lora(*args: object) -> int:
    return blora_slicer.main([str(arg) for arg in args])


def digits(strength: float) -> str:
    """All digits of a float, without the exponent that argparse takes for an option."""
    return f"{Decimal(strength):f}"


def stored(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Type, shape and bytes of each tensor, as safetensors' own reader hands them out."""
    return {
        key: (entry["dtype"], entry["shape"], bytes(entry["data"]))
        for key, entry in deserialize(path.read_bytes())
    }


def all_traits(folder: Path, **traits: str) -> Path:
    """A traits file in which each trait is what starts with a word; "all" is everything."""
    path = folder / "traits.json"
    path.write_text(
        json.dumps({n: {"whitelist": [w]} for n, w in ({"all": "lora_"} | traits).items()})
    )
    return path


def carriers(module: Module) -> set[str]:
    """The tensors of a module that a strength multiplies."""
    every = set().union(*(scaled for _, scaled in FORMS.values()))
    return (every - {"lokr_w1_a"} if "lokr_w1" in module else every) & set(module)


def assert_scaled(result: Module, source: Module, strength: float) -> None:
    """The result's change is the strength times the source's, within the stored type's rounding."""
    scaled = carriers(source)
    unit = max(DTYPES[source[suffix].dtype] for suffix in scaled)
    sizes = {suffix: tensor.double().abs() for suffix, tensor in result.items()}
    tiny = sizes | {suffix: torch.full_like(sizes[suffix], SUBNORMAL) for suffix in scaled}
    for change in (lambda m: weight_change(m, BASE), bias_change):
        before, after = change(source), change(result)
        if before is None:
            assert after is None
            continue
        slack = unit * change_size(sizes, change) + change_size(tiny, change)
        assert torch.all((after - strength * before).abs() <= slack + 1e-300)


def change_size(sizes: Module, change) -> Tensor:
    """The change with nothing cancelled: what all numbers' errors together can amount to."""
    if "on_input" in sizes or "a1.weight" in sizes:
        return weight_change(sizes, BASE.abs())
    return change(sizes)


# ---- Strength times the change -------------------------------------------------------------------

strengths = st.sampled_from([1.0, 0.0, -1.0, 0.5, 0.3, 1e-3]) | st.floats(-4, 4)
modules = st.builds(
    make_module,
    form=st.sampled_from([form for form, _ in FORMS.values()]),
    rank=st.sampled_from([1, 2, 5]),
    alpha=st.sampled_from([None, 0.0, 0.3, 1.0, 2.0, 16.0]),
    dtype=st.sampled_from(list(DTYPES)),
    seed=st.integers(0, 9),
)
blocks = st.lists(modules, min_size=1, max_size=len(NAMES))


def named(template: str, block: list[Module]) -> dict[str, Module]:
    return {template.format(*NAMES[index]): module for index, module in enumerate(block)}


@PROVE
@given(content=blocks, style=blocks, first=strengths, second=strengths, two_files=st.booleans())
def test_the_change_of_the_slice_is_strength_times_the_change_of_the_source(
    content, style, first, second, two_files
):
    content, style = named(CONTENT, content), named(STYLE, style)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        loras = [write(folder / "a.safetensors", content if two_files else content | style)]
        if two_files:
            loras.append(write(folder / "b.safetensors", style))
        output = folder / "out.safetensors"
        args = ("--traits", "content", "style", "--alphas", digits(first), digits(second))
        assert slice_lora("--loras", *loras, *args, "--output_path", output) == 0
        result = read_modules(output)
    assert set(result) == set(content | style)
    for name, source in (content | style).items():
        assert_scaled(result[name], source, first if name in content else second)


@PROVE
@given(block=blocks, strength=strengths)
def test_cut_by_cut_each_file_has_strength_times_the_change_too(block, strength):
    content, style = named(CONTENT, block), named(STYLE, block)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lora = write(folder / "a.safetensors", content | style)
        args = ("--traits", "content", "style", "--alphas", digits(strength), "1")
        args += ("--not_combined", "--output_path", folder / "out.safetensors")
        assert slice_lora("--loras", lora, *args) == 0
        scaled = read_modules(folder / "out_content.safetensors")
        untouched = stored(folder / "out_style.safetensors")
        before = stored(lora)
    assert untouched == {key: before[key] for key in untouched}
    assert set(scaled) == set(content)
    for module, source in content.items():
        assert_scaled(scaled[module], source, strength)


# ---- Names ---------------------------------------------------------------------------------------

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
    "lora_te2_text_model_encoder_layers_0_mlp_fc1": (
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc1"
    ),
}
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


NAMINGS = {
    "kohya, diffusers names": diffusers_kohya,
    "PEFT": peft,
    "PEFT of a whole model": lambda layer, suffix: f"base_model.model.{peft(layer, suffix)}",
    "the original B-LoRA": original,
    "doubled": doubled,
    "attention processors": processor,
}


def renamed(modules: dict[str, Module], naming: str | None) -> dict[str, Tensor]:
    """The tensors by key, in one of the namings; None is kohya's sgm names."""
    names = LAYERS | MORE_LAYERS
    return {
        NAMINGS[naming](names[name], suffix) if naming else f"{name}.{suffix}": tensor
        for name, module in modules.items()
        for suffix, tensor in module.items()
    }


def layers_of(naming: str | None) -> dict[str, str]:
    return LAYERS if naming == "attention processors" else LAYERS | MORE_LAYERS


@pytest.mark.parametrize("naming", [None, *NAMINGS])
@pytest.mark.parametrize("alpha", [None, 0.3])
def test_every_naming_comes_out_in_kohyas_sgm_names_to_the_byte(tmp_path, naming, alpha):
    modules = {
        name: make_module(LORA, 2, alpha, torch.float16, seed)
        for seed, name in enumerate(layers_of(naming))
    }
    wanted = stored(write(tmp_path / "wanted.safetensors", modules))
    save_file(renamed(modules, naming), tmp_path / "in.safetensors")
    args = ("--traits", "all", "--traits_file", all_traits(tmp_path))
    output = tmp_path / "out.safetensors"
    assert slice_lora("--loras", tmp_path / "in.safetensors", *args, "--output_path", output) == 0
    assert stored(output) == wanted


@PROVE
@given(
    namings=st.tuples(*[st.sampled_from([None, *NAMINGS])] * 2),
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
                layer: make_module(LORA, ranks[index], alphas[index], dtypes[index], seed)
                for seed, layer in enumerate(layers_of(namings[index]))
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
        assert_scaled(result[layer], source, cut[not layer.startswith("lora_unet_")])


DOTTED = ["unet.{}.lora_A.weight", "unet.{}.lora.down.weight", "unet.unet.{}.lora.down.weight"]
DOTTED += ["base_model.model.unet.{}.lora_A.weight", "base_model.model.{}.lora_A.weight"]


def test_every_layer_of_diffusers_unet_maps_to_its_own_layer_of_sdxl_in_sgm_names():
    shapes = {
        f"lora_unet_{name.replace('.', '_')}": shape for name, (_, shape) in SDXL["unet"].items()
    }
    found: dict[str, list[int]] = {}
    norms = set()
    from diffusers_sdxl import sdxl_unet_without_weights

    for name, layer in sdxl_unet_without_weights().named_modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d | nn.LayerNorm | nn.GroupNorm):
            continue
        key = f"lora_unet_{name.replace('.', '_')}"
        placed = blora_slicer.place(f"{key}.lora_down.weight")
        assert placed is not None, key
        assert placed[1] == "lora_down.weight"
        if isinstance(layer, nn.LayerNorm | nn.GroupNorm):
            norms.add(placed[0])
            assert blora_slicer.place(f"{key}.w_norm") == (placed[0], "w_norm")
            continue
        found[placed[0]] = list(layer.weight.shape)
        for form in DOTTED:
            assert blora_slicer.place(form.format(name)) == placed, form.format(name)
    assert found == shapes
    assert len(norms) == 256
    assert not norms & set(shapes)


def test_every_layer_of_sdxl_keeps_its_own_name():
    for part, prefix in (("unet", "lora_unet_"), ("te1", "lora_te1_"), ("te2", "lora_te2_")):
        for name in SDXL[part]:
            kohya = prefix + name.replace(".", "_")
            assert blora_slicer.place(f"{kohya}.alpha") == (kohya, "alpha")


@pytest.mark.parametrize("encoder", ["te1", "te2"])
def test_text_encoder_layers_are_placed_with_and_without_the_text_model_around_them(encoder):
    component = {"te1": "text_encoder", "te2": "text_encoder_2"}[encoder]
    for name in SDXL[encoder]:
        kohya = f"lora_{encoder}_" + name.replace(".", "_")
        # transformers 5 has no text_model around the first encoder's layers any more.
        for layer in (name, name.removeprefix("text_model.")):
            key = f"{component}.{layer}.lora_A.weight"
            assert blora_slicer.place(key) == (kohya, "lora_down.weight"), key


@pytest.mark.parametrize(
    ("layer", "peft_shape", "shape"),
    [
        ("attentions.0.transformer_blocks.0.attn1.to_q", [6], [6, 1]),
        ("resnets.0.conv1", [1, 6, 1, 1], [6, 1, 1, 1]),
    ],
)
def test_pefts_dora_lengths_come_out_by_row_as_lycoris_has_them(tmp_path, layer, peft_shape, shape):
    key = f"unet.up_blocks.0.{layer}"
    lengths = torch.rand(peft_shape)
    kernel = [3, 3] if "conv" in layer else []
    tensors = {
        f"{key}.lora_A.weight": torch.rand(2, 8, *kernel),
        f"{key}.lora_B.weight": torch.rand(6, 2, *([1] * len(kernel))),
        f"{key}.lora_magnitude_vector": lengths,
    }
    save_file(tensors, tmp_path / "in.safetensors")
    args = ("--traits", "all", "--traits_file", all_traits(tmp_path))
    output = tmp_path / "out.safetensors"
    assert slice_lora("--loras", tmp_path / "in.safetensors", *args, "--output_path", output) == 0
    [module] = read_modules(output).values()
    assert torch.equal(module["dora_scale"], lengths.reshape(shape))


# ---- To the byte ---------------------------------------------------------------------------------

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def any_bits(shape: list[int], dtype: torch.dtype, seed: int) -> Tensor:
    """Random bits: NaN, inf, -0 and the smallest numbers among them."""
    kind = BITS[dtype.itemsize]
    limits = torch.iinfo(kind)
    noise = torch.Generator().manual_seed(seed)
    return torch.randint(limits.min, limits.max, shape, dtype=kind, generator=noise).view(dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn], ids=str)
def test_at_strength_1_every_tensor_is_the_sources_to_the_byte(tmp_path, dtype):
    forms = [form for form, _ in FORMS.values()] + list(REFUSED.values())
    modules = {}
    for index, form in enumerate(forms):
        shapes = make_module(form, 2, None, torch.float32)
        module = {s: any_bits(list(t.shape), dtype, index) for s, t in shapes.items()}
        module["alpha"] = torch.tensor(0.1 * index, dtype=dtype)
        modules[CONTENT.format(index % 10, 1 + index // 10 % 2, "qkv"[index // 20])] = module
    assert len(modules) == len(forms)
    lora = write(tmp_path / "in.safetensors", modules)
    output = tmp_path / "out.safetensors"
    assert slice_lora("--loras", lora, "--output_path", output) == 0
    assert stored(output) == stored(lora)


@pytest.mark.parametrize(("form", "scaled"), FORMS.values(), ids=FORMS)
def test_the_strength_sits_in_these_tensors_and_in_no_other(tmp_path, form, scaled):
    sources = named(CONTENT, [make_module(form, 2, 1.5, dtype) for dtype in DTYPES])
    lora = write(tmp_path / "in.safetensors", sources)
    output = tmp_path / "out.safetensors"
    assert slice_lora("--loras", lora, "--alphas", "0.3", "--output_path", output) == 0
    before, after, result = stored(lora), stored(output), read_modules(output)
    assert set(after) == set(before)
    assert {key for key in after if after[key] != before[key]} == {
        f"{name}.{suffix}" for name in sources for suffix in scaled
    }
    for (name, source), dtype in zip(sources.items(), DTYPES, strict=True):
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        for suffix in scaled:
            rounded_once = (source[suffix].to(wide) * torch.tensor(0.3, dtype=wide)).to(dtype)
            assert torch.equal(result[name][suffix], rounded_once)


@pytest.mark.parametrize("strength", ["0", "0.999"])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_carry_a_strength_is_refused_and_said_why(tmp_path, capsys, kind, strength):
    name = CONTENT.format(*NAMES[0])
    lora = write(
        tmp_path / "in.safetensors", {name: make_module(REFUSED[kind], 2, None, torch.float32)}
    )
    output = tmp_path / "out.safetensors"
    assert slice_lora("--loras", lora, "--alphas", strength, "--output_path", output) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: the strength of {name} in {lora} cannot go into the file")
    assert f"it is {kind.split(',')[0]} and" in error
    assert "set the strength where the LoRA is used" in error
    assert error.count("\n") == 1
    assert not output.exists()


# ---- Combining under one alpha -------------------------------------------------------------------


def combine(tmp_path: Path, content: list[Module], style: list[Module]) -> tuple[dict, dict, Path]:
    """Content of one file with style of another, at 1: the bytes before and after, and the file."""
    a = write(tmp_path / "a.safetensors", named(CONTENT, content))
    b = write(tmp_path / "b.safetensors", named(STYLE, style))
    output = tmp_path / "out.safetensors"
    args = ("--loras", a, b, "--traits", "content", "style", "--output_path", output)
    assert slice_lora(*args) == 0
    return stored(a) | stored(b), stored(output), output


ONE_ALPHA = [
    # alphas of the content, of the style, and the smallest of all; None means the rank, which is 2
    ([4.0, 4.0, 4.0], [1.0], 1.0),
    ([0.3, 1.0, 1.0], [1.0, 0.3], 0.3),
    ([None, None], [1.0], 1.0),
    ([1.0, 1.0], [None], 1.0),
    ([0.0, 0.0], [8.0], 2.0),
    ([None, 0.0], [2.0, 2.0], 2.0),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("content", "style", "common"), ONE_ALPHA)
def test_differing_alphas_become_one_and_the_changes_stay(tmp_path, content, style, common, dtype):
    blocks = [
        [make_module(LORA, 2, alpha, dtype, seed) for seed, alpha in enumerate(alphas)]
        for alphas in (content, style)
    ]
    before, after, output = combine(tmp_path, *blocks)
    assert {key.split(".")[0] for key in after} == {key.split(".")[0] for key in before}
    result = read_modules(output)
    sources = named(CONTENT, blocks[0]) | named(STYLE, blocks[1])
    # As diffusers reads it: one number for all, over each module's own rank.
    [alpha] = {float(module["alpha"]) for module in result.values()}
    assert alpha == pytest.approx(common, rel=2**-8)
    for name, source in sources.items():
        assert_scaled(result[name], source, 1.0)
        if "alpha" in source and float(source["alpha"]) == float(result[name]["alpha"]):
            assert all(after[f"{name}.{suffix}"] == before[f"{name}.{suffix}"] for suffix in source)
        # lora_down never changes.
        assert after[f"{name}.lora_down.weight"] == before[f"{name}.lora_down.weight"]


@pytest.mark.parametrize("alpha", [None, 0.0, 0.3, 2.0])
def test_alphas_that_agree_are_left_alone_whatever_the_ranks(tmp_path, alpha):
    content = [make_module(LORA, rank, alpha, torch.float16) for rank in (1, 2)]
    style = [make_module(LORA, 5, alpha, torch.float16), make_module(LOCON, 2, alpha, torch.half)]
    before, after, _ = combine(tmp_path, content, style)
    assert after == before


def test_only_loras_take_the_common_alpha(tmp_path):
    others = [
        make_module(FORMS[form][0], 2, 8.0, torch.float16)
        for form in ("LoHa", "LoKr, w2 factored", "GLoRA", "full")
    ]
    loras = [make_module(LORA, 2, alpha, torch.bfloat16) for alpha in (1.0, 1.0, 4.0)]
    before, after, output = combine(tmp_path, others, loras)
    changed = {key for key in after if after[key] != before[key]}
    assert changed == {
        f"{STYLE.format(*NAMES[2])}.{suffix}" for suffix in ("lora_up.weight", "alpha")
    }
    assert {float(read_modules(output)[STYLE.format(*name)]["alpha"]) for name in NAMES[:3]} == {
        1.0
    }


def test_a_dora_under_another_alpha_keeps_its_final_weight(tmp_path):
    dora = make_module(LORA | {"dora_scale": "o1"}, 2, 8.0, torch.float32)
    dora["dora_scale"] = dora["dora_scale"].abs()
    plain = [make_module(LORA, 2, 1.0, torch.float32, seed) for seed in (1, 2)]
    _, _, output = combine(tmp_path, [dora], plain)
    result = read_modules(output)[CONTENT.format(*NAMES[0])]
    assert float(result["alpha"]) == 1.0
    torch.testing.assert_close(
        final_weight(result, BASE), final_weight(dora, BASE), rtol=1e-6, atol=1e-6
    )


UNSOUND = {
    "without its lora_down": {"lora_up.weight": torch.ones(6, 2)},
    "of rank 0": {"lora_up.weight": torch.ones(6, 0), "lora_down.weight": torch.ones(0, 8)},
    "of a flat lora_down": {"lora_up.weight": torch.ones(6, 2), "lora_down.weight": torch.ones(())},
    "with an empty alpha": make_module(LORA, 2, 1.0, torch.half) | {"alpha": torch.ones(0)},
    "with NaN as its alpha": make_module(LORA, 2, math.nan, torch.half),
    "with inf as its alpha": make_module(LORA, 2, math.inf, torch.half),
}


@pytest.mark.parametrize("module", UNSOUND.values(), ids=UNSOUND)
def test_a_module_that_is_not_sound_harms_no_other(tmp_path, capsys, module):
    content = write(tmp_path / "a.safetensors", named(CONTENT, [module]))
    sound = make_module(LORA, 2, 8.0, torch.float32)
    style = write(tmp_path / "b.safetensors", named(STYLE, [sound]))
    output = tmp_path / "out.safetensors"
    args = ("--loras", content, style, "--traits", "content", "style", "--output_path", output)
    if slice_lora(*args) == 0:
        assert_scaled(read_modules(output)[STYLE.format(*NAMES[0])], sound, 1.0)
    else:
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1


# ---- LyCORIS writes and reads --------------------------------------------------------------------

TREE = {
    "output_blocks.0.0.in_layers.2": ("Conv2d", [64, 32, 3, 3]),
    "output_blocks.0.1.proj_in": ("Linear", [64, 32]),
    "output_blocks.0.1.transformer_blocks.0.attn1.to_q": ("Linear", [64, 32]),
    "output_blocks.0.1.transformer_blocks.0.attn1.to_out.0": ("Linear", [32, 64]),
}
TEXT_TREE = {"text_model.encoder.layers.0.self_attn.q_proj": ("Linear", [32, 64])}
# What follows network_args on kohya's command line, by algorithm and form.
LYCORIS = {
    "LoRA": {"algo": "lora"},
    "LoCon, tucker": {"algo": "locon", "use_tucker": "True"},
    "rank-stabilized LoRA": {"algo": "lora", "rs_lora": "True"},
    "LoHa": {"algo": "loha"},
    "LoHa, tucker": {"algo": "loha", "use_tucker": "True"},
    "LoKr, w2 factored": {"algo": "lokr"},
    "LoKr, both factored": {"algo": "lokr", "decompose_both": True},
    "LoKr, tucker": {"algo": "lokr", "use_tucker": "True"},
    "LoKr, both whole": {"algo": "lokr", "full_matrix": "True"},
    "full": {"algo": "full"},
    "IA3": {"algo": "ia3"},
    "GLoRA": {"algo": "glora"},
    "DyLoRA": {"algo": "dylora", "block_size": "1", "preset": "full-lin"},
    "norm": {"algo": "lora", "train_norm": "True"},
}
LYCORIS_DORA = {
    f"{algo}, by {'row' if on_output == 'True' else 'column'}": {
        "algo": algo,
        "dora_wd": "True",
        "wd_on_output": on_output,
    }
    for algo in ("lora", "loha", "lokr")
    for on_output in ("True", "False")
}
LYCORIS_REFUSED = LYCORIS_DORA | {
    "OFT": {"algo": "diag-oft"},
    "OFT, rescaled": {"algo": "diag-oft", "rescaled": "True", "constraint": "0.01"},
    "BOFT": {"algo": "boft"},
    "T-LoRA": {"algo": "tlora"},
}


def models() -> tuple[nn.Module, list[nn.Module]]:
    """A U-Net and two text encoders with SDXL's names and few weights; always the same."""
    torch.manual_seed(0)
    unet = make_tree(TREE)
    block = unet.get_submodule("output_blocks.0.1.transformer_blocks.0")
    block.add_module("norm1", nn.LayerNorm(32))
    return unet, [make_tree(TEXT_TREE), make_tree(TEXT_TREE)]


def lycoris_network(arguments: dict[str, object]) -> nn.Module:
    """LyCORIS' network as kohya makes it for a training, on the models."""
    from lycoris.kohya import create_network

    unet, encoders = models()
    network = create_network(
        1.0, 2, 1.5, None, encoders, unet, warn_on_unmatched=False, **arguments
    )
    network.apply_to(encoders, unet, True, True)
    return network


def lycoris_file(path: Path, arguments: dict[str, object], dtype: torch.dtype) -> Path:
    """A file that LyCORIS saved after the training moved every parameter a little."""
    network = lycoris_network(arguments)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    network.save_weights(str(path), dtype, None)
    return path


def reload_lycoris(path: Path, arguments: dict[str, object]) -> dict[str, nn.Module]:
    """The modules of a network of this kind with the weights of a file, by name."""
    if arguments["algo"] == "dylora":  # which LyCORIS loads as the LoRA it has become
        arguments = arguments | {"algo": "lora"}
    network = lycoris_network(arguments)
    state = network.load_weights(str(path))
    assert set(state) <= {"missing keys"}
    assert all(key.endswith((".scalar", ".dtype_tensor")) for key in state.get("missing keys", []))
    return {lora.lora_name: lora for lora in network.loras}


def lycoris_change(module: nn.Module) -> list[Tensor]:
    """The module's change as LyCORIS computes it in training: of the weight, and of the bias."""
    if type(module).__name__ in ("LohaModule", "LokrModule"):
        return [module.get_weight(module.shape)]  # get_diff_weight has alpha / rank in it twice
    return [change for change in module.get_diff_weight() if change is not None]


def slice_all(lora: Path, strength: float, *options: object) -> Path:
    """Everything that the file holds, at the strength."""
    output = lora.with_name("out.safetensors")
    traits = ("--traits", "all", "--traits_file", all_traits(lora.parent))
    args = (*traits, "--alphas", digits(strength), "--output_path", output, *options)
    assert slice_lora("--loras", lora, *args) == 0
    return output


@pytest.mark.parametrize("strength", [0.3, -1.0])
@pytest.mark.parametrize("arguments", LYCORIS.values(), ids=LYCORIS)
def test_lycoris_reloads_a_slice_of_its_own_file_as_strength_times_the_change(
    tmp_path, arguments, strength
):
    lora = lycoris_file(tmp_path / "in.safetensors", arguments, torch.float32)
    source = reload_lycoris(lora, arguments)
    result = reload_lycoris(slice_all(lora, strength), arguments)
    assert set(result) == set(source) == set(read_modules(lora))
    for name, module in source.items():
        for before, after in zip(lycoris_change(module), lycoris_change(result[name]), strict=True):
            assert before.abs().max() > 1e-3
            torch.testing.assert_close(after, strength * before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("arguments", LYCORIS.values(), ids=LYCORIS)
def test_the_formulas_here_are_those_of_lycoris(tmp_path, arguments):
    lora = lycoris_file(tmp_path / "in.safetensors", arguments, torch.float32)
    modules = read_modules(lora)
    for name, module in reload_lycoris(lora, arguments).items():
        base = module.org_module[0].weight if arguments["algo"] in ("ia3", "glora") else None
        ours = [weight_change(modules[name], base), bias_change(modules[name])]
        theirs = lycoris_change(module)
        for mine, its in zip([c for c in ours if c is not None], theirs, strict=True):
            torch.testing.assert_close(mine.reshape(its.shape), its.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("arguments", LYCORIS_REFUSED.values(), ids=LYCORIS_REFUSED)
def test_what_lycoris_cannot_scale_is_kept_to_the_byte_at_1_and_refused_at_another_strength(
    tmp_path, capsys, arguments
):
    lora = lycoris_file(tmp_path / "in.safetensors", arguments, torch.float16)
    assert stored(slice_all(lora, 1.0)) == stored(lora)
    args = ("--traits", "all", "--traits_file", all_traits(tmp_path), "--alphas", "0.5")
    output = tmp_path / "half.safetensors"
    assert slice_lora("--loras", lora, *args, "--output_path", output) == 1
    assert "cannot go into the file" in capsys.readouterr().err
    assert not output.exists()


# ---- DoRA with a base model ----------------------------------------------------------------------

# Modules, and where an SDXL checkpoint has their weight: its key, and the rows of it.
CHECKPOINT = {
    "lora_unet_output_blocks_0_1_transformer_blocks_0_attn1_to_q": (
        "model.diffusion_model.output_blocks.0.1.transformer_blocks.0.attn1.to_q.weight",
        slice(None),
    ),
    "lora_unet_output_blocks_0_0_in_layers_2": (
        "model.diffusion_model.output_blocks.0.0.in_layers.2.weight",
        slice(None),
    ),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": (
        "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
        slice(None),
    ),
}
OPEN_CLIP = "conditioner.embedders.1.model.transformer.resblocks.0."
for index, projection in enumerate("qkv"):
    CHECKPOINT[f"lora_te2_text_model_encoder_layers_0_self_attn_{projection}_proj"] = (
        f"{OPEN_CLIP}attn.in_proj_weight",
        slice(6 * index, 6 * index + 6),
    )
for ours, theirs in (
    ("self_attn_out_proj", "attn.out_proj"),
    ("mlp_fc1", "mlp.c_fc"),
    ("mlp_fc2", "mlp.c_proj"),
):
    CHECKPOINT[f"lora_te2_text_model_encoder_layers_0_{ours}"] = (
        f"{OPEN_CLIP}{theirs}.weight",
        slice(None),
    )
UNREAD = 1 << 30  # bytes of the tensors before and behind them that no one needs


def checkpoint_weights() -> dict[str, Tensor]:
    noise = torch.Generator().manual_seed(3)
    shapes = {key: [6, 8] for key, _ in CHECKPOINT.values()}
    shapes[f"{OPEN_CLIP}attn.in_proj_weight"] = [18, 8]
    shapes[CHECKPOINT["lora_unet_output_blocks_0_0_in_layers_2"][0]] = [6, 8, 3, 3]
    return {key: 0.1 * torch.randn(shape, generator=noise) for key, shape in shapes.items()}


def write_checkpoint(path: Path, weights: dict[str, Tensor], dtype: torch.dtype) -> Path:
    """A checkpoint whose other tensors are holes in the file, far larger than the memory used."""
    name = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}[dtype]
    stored = {key: tensor.to(dtype).view(torch.uint8).numpy() for key, tensor in weights.items()}
    header, end = {"first_stage_model.before": {"data_offsets": [0, UNREAD]}}, UNREAD
    for key, data in stored.items():
        header[key] = {"shape": list(weights[key].shape), "data_offsets": [end, end + data.nbytes]}
        header[key]["dtype"] = name
        end += data.nbytes
    header["first_stage_model.behind"] = {"data_offsets": [end, end + UNREAD]}
    for key in ("first_stage_model.before", "first_stage_model.behind"):
        header[key] |= {"dtype": "U8", "shape": [UNREAD]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.seek(UNREAD, 1)
        for data in stored.values():
            file.write(data.tobytes())
        file.truncate(file.tell() + UNREAD)
    return path


def doras(axes: str, weights: dict[str, Tensor], form: dict[str, str]) -> dict[str, Module]:
    """A DoRA for each weight, its lengths a little off those it had before the training."""
    modules = {}
    for seed, (name, (key, rows)) in enumerate(CHECKPOINT.items()):
        weight = weights[key][rows]
        shapes = LOCON if weight.dim() == 4 else form
        module = make_module(shapes, 2, 1.0, torch.float32, seed)
        module["lora_up.weight"] *= 0.05
        others = [axis for axis in range(weight.dim()) if axis != (axes == "1i")]
        length = weight.square().sum(others, keepdim=True).sqrt()
        noise = torch.Generator().manual_seed(seed)
        module["dora_scale"] = length * (1 + 0.2 * torch.randn(length.shape, generator=noise))
        modules[name] = module
    return modules


@pytest.mark.parametrize("strength", [0.5, 1.5, -0.5, 0.0, 1e-3])
@pytest.mark.parametrize("axes", ["o1", "1i"])
def test_a_dora_with_its_base_model_has_the_interpolated_final_weight(tmp_path, axes, strength):
    weights = checkpoint_weights()
    checkpoint = write_checkpoint(tmp_path / "sdxl.safetensors", weights, torch.float32)
    modules = doras(axes, weights, LORA)
    lora = write(tmp_path / "in.safetensors", modules)
    tracemalloc.start()
    result = read_modules(slice_all(lora, strength, "--base_model", checkpoint))
    assert tracemalloc.get_traced_memory()[1] < 16e6
    tracemalloc.stop()
    for name, source in modules.items():
        key, rows = CHECKPOINT[name]
        base = weights[key][rows].double()
        wanted = (1 - strength) * base + strength * final_weight(source, base)
        error = (final_weight(result[name], base) - wanted).norm() / wanted.norm()
        assert error < 1e-5
        assert {s: t.dtype for s, t in result[name].items()} == {
            s: t.dtype for s, t in source.items()
        }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("axes", ["o1", "1i"])
def test_a_dora_on_a_base_model_in_half_precision_is_as_exact(tmp_path, axes, dtype):
    weights = {key: weight.to(dtype) for key, weight in checkpoint_weights().items()}
    checkpoint = write_checkpoint(tmp_path / "sdxl.safetensors", weights, dtype)
    modules = doras(axes, {key: weight.float() for key, weight in weights.items()}, LORA)
    lora = write(tmp_path / "in.safetensors", modules)
    result = read_modules(slice_all(lora, 0.5, "--base_model", checkpoint))
    for name, source in modules.items():
        key, rows = CHECKPOINT[name]
        base = weights[key][rows].double()
        wanted = 0.5 * base + 0.5 * final_weight(source, base)
        assert (final_weight(result[name], base) - wanted).norm() / wanted.norm() < 1e-5


def test_a_weight_that_the_base_model_lacks_or_that_does_not_fit_is_refused(tmp_path, capsys):
    weights = checkpoint_weights()
    modules = doras("o1", weights, LORA)
    lora = write(tmp_path / "in.safetensors", modules)
    key = CHECKPOINT["lora_unet_output_blocks_0_1_transformer_blocks_0_attn1_to_q"][0]
    args = ("--alphas", "0.5", "--output_path", tmp_path / "out.safetensors")
    for name, other in (
        ("lacks", {k: w for k, w in weights.items() if k != key}),
        ("other", weights | {key: torch.ones(7, 8)}),
    ):
        checkpoint = tmp_path / f"{name}.safetensors"
        save_file(other, checkpoint)
        capsys.readouterr()
        assert slice_lora("--loras", lora, *args, "--base_model", checkpoint) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert str(checkpoint) in error


def test_lycoris_reads_the_interpolated_weight_of_a_dora(tmp_path):
    arguments = LYCORIS_DORA["lora, by row"]
    lora = lycoris_file(tmp_path / "in.safetensors", arguments, torch.float32)
    unet, encoders = models()
    weights = {
        f"model.diffusion_model.{name}.weight": unet.get_submodule(name).weight for name in TREE
    }
    query = encoders[0].get_submodule(*TEXT_TREE).weight
    weights |= {f"conditioner.embedders.0.transformer.{name}.weight": query for name in TEXT_TREE}
    query = encoders[1].get_submodule(*TEXT_TREE).weight
    weights |= {f"{OPEN_CLIP}attn.in_proj_weight": torch.cat([query, query + 1, query + 2])}
    checkpoint = tmp_path / "sdxl.safetensors"
    save_file({key: weight.detach() for key, weight in weights.items()}, checkpoint)
    source = reload_lycoris(lora, arguments)
    result = reload_lycoris(slice_all(lora, 0.5, "--base_model", checkpoint), arguments)
    for name, module in source.items():
        wanted = 0.5 * module.org_weight + 0.5 * module.get_merged_weight()[0]
        torch.testing.assert_close(
            result[name].get_merged_weight()[0], wanted, rtol=1e-5, atol=1e-6
        )
