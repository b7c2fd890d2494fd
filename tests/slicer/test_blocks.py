"""--blocks keeps blocks of SDXL at their weights."""

from __future__ import annotations

import re

import pytest
import torch
from exact_strength import assert_scaled
from lora_algebra import final_weight, layer_change, read_modules
from lora_files import CONTENT, METADATA, SHAPES, STYLE, TE2, blora_modules, lora_module, write
from lora_forms import FORMS, INPUT, OUTPUT, REFUSED, base_weight, make_module, write_modules
from safetensors import safe_open
from slicing import cut, modules, refused, slice_lora

from blora.slicer.blocks import parse_blocks

UNET = "lora_unet_"
TWELVE = "BASE IN04 IN05 IN07 IN08 MID OUT00 OUT01 OUT02 OUT03 OUT04 OUT05".split()
TWENTY = ["BASE", *(f"IN0{n}" for n in range(9)), "MID", *(f"OUT0{n}" for n in range(9))]
# How the names of the modules in a block begin.
STARTS = {"BASE": "lora_te", "MID": f"{UNET}middle_block_"} | {
    f"{way.upper()}0{n}": f"{UNET}{way}put_blocks_{n}_" for way in ("in", "out") for n in range(9)
}
SPELLINGS = {
    "base": "lora_te", "te1": "lora_te1_", "lora_te2_": "lora_te2_", "text_encoder_2": "lora_te2_",
    "out0": f"{UNET}output_blocks_0_", "In08": f"{UNET}input_blocks_8_",
    "mid": f"{UNET}middle_block_", "M00": f"{UNET}middle_block_", "MID00": f"{UNET}middle_block_",
    "output_blocks.0": f"{UNET}output_blocks_0_", "output_blocks_0_1": f"{UNET}output_blocks_0_1_",
    "lora_unet_output_blocks_0_1_": f"{UNET}output_blocks_0_1_",
    "diffusion_model.input_blocks.8.1": f"{UNET}input_blocks_8_1_",
    "middle_block.1": f"{UNET}middle_block_1_", "mid_block": f"{UNET}middle_block_",
    "unet.mid_block.attentions.0": f"{UNET}middle_block_1_",
    "up_blocks.0.attentions.0": f"{UNET}output_blocks_0_1_",
    "down_blocks_2_attentions_1": f"{UNET}input_blocks_8_1_",
    "up_blocks.0.upsamplers.0": f"{UNET}output_blocks_2_2_",
    "up_blocks.0": rf"{UNET}output_blocks_[012]_", "conv_in": f"{UNET}input_blocks_0_0",
}  # fmt: skip


@pytest.mark.parametrize(("name", "start"), (STARTS | SPELLINGS).items())
def test_a_block_is_all_layers_whose_names_begin_so(name, start):
    kept = {module for module in parse_blocks([f"{name}=2"]).modules if module in SHAPES}
    assert kept == {module for module in SHAPES if re.match(start, module)} != set()


@pytest.mark.parametrize("places", [TWELVE, TWENTY], ids=len)
def test_a_list_has_these_places(places):
    for place in range(len(places)):
        words = ["0"] * len(places)
        words[place] = "0.25"
        by_name = parse_blocks([f"{places[place]}=0.25"])
        assert parse_blocks([",".join(words)]) == by_name
        assert parse_blocks(["".join(f"{word}, " for word in words).rstrip(", ")]) == by_name


ALIKE = [
    ["--blocks", "OUT00=-0.5", "OUT01=3e-1"],
    ["--blocks", "OUT00=-0.5,OUT01=0.3"],
    ["--blocks", "out0", "=", "-.5,", "OUT1=0.3", "MID=0"],
    ["--blocks", "-0,0,0,0,0,0,-0.5,0.3,0,0,0,0"],
    ["--blocks", *"-0, 0, 0, 0, 0, 0, -0.5, 0.3, 0, 0, 0, 0".split()],
    ["--blocks", "0", *["0"] * 10, "-0.5", "0.3", *["0"] * 7],
]


@pytest.mark.parametrize("words", ALIKE, ids=" ".join)
def test_blocks_are_written_in_many_ways(tmp_path, capsys, words):
    lora = write(tmp_path / "a.safetensors", blora_modules(CONTENT, STYLE))
    cut(lora, *words)
    assert capsys.readouterr().out.startswith("OUT00=-0.5 OUT01=0.3 of a.safetensors at 1: 16 ")


WEIGHTS = {"IN00": 1, "IN01": 0.3, "IN04": -0.5, "OUT03": 0, "OUT06": 1e-3}


def weight_of(name: str, weights: dict[str, float]) -> float:
    """0 outside all blocks."""
    return next((w for block, w in weights.items() if name.startswith(STARTS[block])), 0)


@pytest.mark.parametrize("options", [[], ["--alphas", "-0.5"]], ids=["at 1", "at -0.5"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_each_block_is_kept_at_its_weight_times_the_strength(tmp_path, form, options):
    layers = [where[kind] for where in (INPUT, OUTPUT) for kind in form.kinds]
    sources = {name: make_module(name, form, 2, 1.5, torch.float32) for name in layers}
    lora = write_modules(tmp_path / "in.safetensors", sources)
    words = [f"{block}={weight}" for block, weight in WEIGHTS.items()]
    result = read_modules(cut(lora, "--blocks", *words, *options))
    weights = {name: weight_of(name, WEIGHTS) for name in sources}
    assert set(result) == {name for name, weight in weights.items() if weight}
    for name, module in result.items():
        assert_scaled(name, module, sources[name], weights[name] * float((options or [1])[-1]))


def test_with_traits_the_two_multiply(tmp_path):
    tensors = blora_modules(CONTENT, STYLE, dtype=torch.float32)
    for name in ("lora_unet_output_blocks_0_1_proj_in", TE2.format(0, "q"), TE2.format(1, "q")):
        tensors |= lora_module(name, dtype=torch.float32)
    lora = write(tmp_path / "a.safetensors", tensors)
    source = read_modules(lora)
    traits = ["--traits", "content", "style", "clip_2_content", "--alphas", "1", "-2"]
    result = read_modules(cut(lora, *traits, "--blocks", "BASE=0.25", "OUT00=-0.5", "OUT01=2"))
    starts = {STARTS["OUT00"]: -0.5, STARTS["OUT01"]: -4, STARTS["BASE"]: 0.25}
    assert set(result) == set(source) - {"lora_unet_output_blocks_0_1_proj_in", TE2.format(1, "q")}
    for name, module in result.items():
        [strength] = (s for start, s in starts.items() if name.startswith(start))
        assert_scaled(name, module, source[name], strength)


@pytest.mark.parametrize("kind", ["DoRA", "DoRA, by column"])
def test_a_dora_takes_a_weight_with_its_base_model(tmp_path, kind):
    name = INPUT["attention"]
    base = base_weight(name)
    source = make_module(name, REFUSED[kind], 2, 1.5, torch.float32)
    lora = write_modules(tmp_path / "a.safetensors", {name: source})
    layer = "input_blocks.4.1.transformer_blocks.0.attn1.to_q"
    weights = {f"model.diffusion_model.{layer}.weight": base}
    checkpoint = write(tmp_path / "base.safetensors", weights)
    options = ["--base_model", checkpoint, "--alphas", "2", "--blocks", "IN04=0.25"]
    [result] = read_modules(cut(lora, *options)).values()
    wanted = base.double() + 0.5 * layer_change(source, base)
    torch.testing.assert_close(final_weight(result, base), wanted, rtol=1e-5, atol=1e-5)


KEPT = {
    # options, what is said of the slice, and the name of its file
    "--blocks out01=0.3 MID=1": ("OUT01=0.3 MID=1", "OUT01_MID"),
    "--blocks output_blocks.1.1=-1e-9": ("output_blocks_1_1=-1e-09", "output_blocks_1_1"),
    "--traits style --blocks OUT01=0.3": ("style in OUT01=0.3", "style_OUT01"),
}


@pytest.mark.parametrize(("options", "kept"), KEPT.items(), ids=KEPT)
def test_the_output_its_name_and_its_metadata_say_what_was_kept(tmp_path, capsys, options, kept):
    said, named = kept
    lora = write(tmp_path / "a.safetensors", blora_modules(CONTENT, STYLE), METADATA)
    cut(lora, *options.split(), "--not_combined", "--alphas", "0.5")
    assert f"{said} of a.safetensors at 0.5: 8 modules, " in capsys.readouterr().out
    output = tmp_path / f"out_{named}.safetensors"
    with safe_open(output, "pt") as file:
        comment = file.metadata()["ss_training_comment"]
    assert comment == f"{said} of a.safetensors at 0.5"
    assert modules(output) == {key.split(".")[0] for key in blora_modules(STYLE)}


def test_every_lora_is_cut_to_the_same_blocks(tmp_path):
    loras = [write(tmp_path / f"{n}.safetensors", blora_modules(CONTENT, STYLE)) for n in "ab"]
    cut(*loras, "--blocks", "OUT00=1", "--not_combined")
    files = {path.name for path in tmp_path.glob("out*")}
    assert files == {"out_OUT00_a.safetensors", "out_OUT00_b.safetensors"}


def test_blocks_that_the_file_has_nothing_in_are_refused(tmp_path, capsys):
    lora = write(tmp_path / "a.safetensors", blora_modules(CONTENT))
    for options, wanted in {
        "--blocks OUT01=1 MID=2": "OUT01=1 MID=2",
        "--blocks OUT00=1 --traits style": "style in OUT00=1",
    }.items():
        assert refused(capsys, lora, *options.split()) == (
            f"{lora} has no modules for {wanted}: its blocks are output_blocks.0.1"
        )


HOW = (
    "give blocks with their weights, such as OUT00=1 OUT01=0.3 or output_blocks.0.1=1, or a list "
    "of 12 numbers (BASE IN04 IN05 IN07 IN08 MID OUT00 to OUT05) or of 20 (BASE IN00 to IN08 MID "
    "OUT00 to OUT08)"
)
NO_NUMBERS = ("nan", "inf", "-inf", "1e39", "-3.5e38", "x", "", "1=2")
MISTAKES = {
    **{f"OUT00={n}": f'the weight "{n}" is not a finite fp32 number: {HOW}' for n in NO_NUMBERS},
    "OUT00": f'the weight "OUT00" is not a finite fp32 number: {HOW}',
    "1,,0": f'the weight "" is not a finite fp32 number: {HOW}',
    "OUT00=1 OUT01": f'"OUT01" is no block with a weight: {HOW}',
    "OUT09=1": f'SDXL has no block "OUT09": {HOW}',
    "out=1": f'SDXL has no block "out": {HOW}',  # is it the last layer or all that goes up?
    "=1": f'SDXL has no block "": {HOW}',
    "\x1b[2J=1": f'SDXL has no block "\\x1b[2J": {HOW}',
    f"{'o' * 999}=1": f'SDXL has no block "{"o" * 200}...": {HOW}',
    "-1": f"a list of 1 is not for SDXL: {HOW}",
    ",".join("1" * 17): f"a list of 17 is not for SDXL: {HOW}",
    "OUT00=1 out0=1": "OUT00 and OUT00 have layers in common: give one of them",
    "OUT00=1 output_blocks.0.1=0": (
        "output_blocks_0_1 and OUT00 have layers in common: give one of them"
    ),
    "OUT00=0 MID=-0": "every weight is 0, so that nothing is kept: give another to some block",
}


@pytest.mark.parametrize(("words", "sentence"), MISTAKES.items(), ids=MISTAKES)
def test_blocks_that_mean_nothing_exit_2(capsys, words, sentence):
    with pytest.raises(SystemExit) as stop:
        slice_lora("--loras", "a.safetensors", "--blocks", *words.split(" "))
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: --blocks: {sentence}\n"
