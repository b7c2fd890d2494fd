"""The list that sd-webui-lora-block-weight (LBW) wants, for the whole file to act as a slice of it.

LBW_ROOT and INSPIRE_ROOT are checkouts of github.com/hako-mikan/sd-webui-lora-block-weight and of
github.com/ltdrdata/ComfyUI-Inspire-Pack; without them what they do stands in a table here.
"""

from __future__ import annotations

import ast
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lora_files import CONTENT, LAYOUT, SHAPES, STYLE, TE2, blora_modules, lora_module, write
from lora_forms import FORMS, INPUT, REFUSED, make_module, write_modules
from safetensors.torch import load_file
from slicing import cut, slice_lora

# scripts/lora_block_weight.py of b403cb7 (2025-06-19): BLOCKID12 and BLOCKID20, in which MID is
# M00, and ratiodealer, which looks for words of BLOCKS in a key; what has none of them gets 1. A
# number that a list lacks is 0 (to26).
PLACES = {
    12: "BASE IN04 IN05 IN07 IN08 MID OUT00 OUT01 OUT02 OUT03 OUT04 OUT05".split(),
    20: ["BASE", *(f"IN0{n}" for n in range(9)), "MID", *(f"OUT0{n}" for n in range(9))],
}
WORDS = {"BASE": r"lora_te\d_.*_encoder_", "MID": "lora_unet_middle_block_"} | {
    f"{way.upper()}0{n}": f"lora_unet_{way}put_blocks_{n}_"
    for way in ("in", "out")
    for n in range(9)
}


def weight_in_lbw(name: str, text: str) -> float:
    """What LBW multiplies a module with, by kohya's name, under a list."""
    numbers = [float(number) for number in text.split(",")]
    weights = dict(zip(PLACES[len(numbers)], numbers, strict=True))
    place = next((place for place, word in WORDS.items() if re.match(word, name)), None)
    return weights.get(place, 0) if place else 1


MIXED = [  # a module in each block of a list, and outside them
    *(re.sub("X", n, f"lora_unet_{b}_1_proj_in") for b, ns in
      {"input_blocks_X": "4578", "output_blocks_X": "012345"}.items() for n in ns),
    "lora_unet_middle_block_1_proj_in", TE2.format(0, "q"), TE2.format(9, "k"),
    TE2.format(0, "q").replace("te2", "te1"),
]  # fmt: skip
CONVOLUTIONS = [
    "lora_unet_input_blocks_1_0_in_layers_2",
    "lora_unet_output_blocks_6_0_out_layers_3",
]
OUTSIDE = ["lora_unet_time_embed_0", "lora_unet_out_2", "lora_unet_label_emb_0_0"]
HAS_LIST = {
    # the modules, the options, and the list
    "a B-LoRA's content": ([], "--traits content", "0,0,0,0,0,0,1,0,0,0,0,0"),
    "at a strength": ([], "--traits style --alphas -0.35", "0,0,0,0,0,0,0,-0.35,0,0,0,0"),
    "joined": ([], "--traits content style --alphas 1 0.3", "0,0,0,0,0,0,1,0.3,0,0,0,0"),
    "a block of many": (MIXED, "--blocks MID=0.1", "0,0,0,0,0,0.1,0,0,0,0,0,0"),
    "text": (MIXED, "--traits text", "1,0,0,0,0,0,0,0,0,0,0,0"),
    "a list of 12": (MIXED, "--blocks 0,1,2,3,4,5,6,7,8,9,10,11", "0,1,2,3,4,5,6,7,8,9,10,11"),
    "12 do where convolutions are left out": (
        [*MIXED, *CONVOLUTIONS], "--blocks OUT02=1e-9", "0,0,0,0,0,0,0,0,1e-09,0,0,0",
    ),
    "20 where one is kept": (
        [*MIXED, *CONVOLUTIONS], "--blocks OUT06=-0.5 OUT05=1",
        "0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,1,-0.5,0,0",
    ),
    "strengths multiply": (
        MIXED, "--traits text content_block --blocks BASE=3 OUT00=0.1 --alphas 0.1 3",
        "0.3,0,0,0,0,0,0.3,0,0,0,0,0",
    ),
}  # fmt: skip


def file_of(folder: Path, names: list[str]) -> Path:
    tensors = {k: t for name in names for k, t in lora_module(name).items()}
    return write(folder / "a.safetensors", tensors or blora_modules(CONTENT, STYLE))


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    """What is said of LBW after a cut."""
    [line] = re.findall(r"^LBW: (.+)$", capsys.readouterr().out, re.MULTILINE)
    return line


@pytest.mark.parametrize(("names", "options", "wanted"), HAS_LIST.values(), ids=HAS_LIST)
def test_the_list_gives_each_module_of_the_file_what_the_slice_has(
    tmp_path, capsys, names, options, wanted
):
    lora = file_of(tmp_path, names)
    output = cut(lora, *options.split(), "--save_precision", "float")
    line = printed(capsys)
    assert line == wanted
    before, after = ups(lora), ups(output)
    for name, up in before.items():
        strength = weight_in_lbw(name, line)
        result = after.pop(name, torch.zeros_like(up))
        torch.testing.assert_close(result, strength * up, rtol=1e-6, atol=0)
    assert not after


def ups(path: Path) -> dict[str, torch.Tensor]:
    return {k[:-15]: t.double() for k, t in load_file(path).items() if k.endswith("up.weight")}


CONTENT_Q, PROJ = CONTENT.format(0, 1, "q"), "lora_unet_output_blocks_0_1_proj_in"
NO_LIST = {
    # the file's modules, the options, and the reason
    "attention alone": (
        [CONTENT_Q, PROJ], "--traits content",
        f"in OUT00 {PROJ} is left out and {CONTENT_Q} is at 1",
    ),
    "a part of a text encoder": (
        [TE2.format(0, "q"), TE2.format(1, "q")], "--traits clip_2_content --alphas 0.3",
        f"in BASE {TE2.format(0, 'q')} is at 0.3 and {TE2.format(1, 'q')} is left out",
    ),
    "parts of a block": (
        [CONTENT_Q, "lora_unet_output_blocks_0_0_in_layers_2"],
        "--blocks output_blocks.0.0=1 output_blocks.0.1=0.5",
        f"in OUT00 lora_unet_output_blocks_0_0_in_layers_2 is at 1 and {CONTENT_Q} is at 0.5",
    ),
    **{
        f"outside, {name}": (
            [CONTENT_Q, name], "--blocks OUT00=1",
            f"{name} is left out, and LBW has no weight for it",
        )
        for name in (*OUTSIDE, "lora_te2_text_projection")
    },
    "outside, at a strength": (
        ["lora_te2_text_projection"], "--traits text --alphas 0.5",
        "lora_te2_text_projection is at 0.5, and LBW has no weight for it",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("names", "options", "reason"), NO_LIST.values(), ids=NO_LIST)
def test_where_no_list_does_it_the_first_reason_is_named(tmp_path, capsys, names, options, reason):
    cut(file_of(tmp_path, names), *options.split())
    assert printed(capsys) == f"none, because {reason}"


def test_what_lbw_always_applies_may_be_kept_at_1(tmp_path, capsys):
    cut(file_of(tmp_path, ["lora_te2_text_projection", TE2.format(0, "q")]), "--traits", "text")
    assert printed(capsys) == "1,0,0,0,0,0,0,0,0,0,0,0"


# Forge: lbwf keeps the patches of LORAS alone, and all biases are patches of another kind. A1111:
# lbw multiplies one factor (LORAANDSOON), whatever dora_scale does behind it, and w1 of a LoKr,
# which is None where it is factored.
DROPS, STAYS = "which LBW drops in Forge", "which LBW may not take out at 0 in A1111"
FAILS = "is a LoKr without a whole lokr_w1, at which LBW fails in A1111"
LENGTHS = "whose dora_scale LBW applies at any weight in A1111"
FACTORED = ("LoKr, w1 factored", "LoKr, both factored", "LoKr, w1 factored, tucker")


def kinds(*starts: str) -> list[str]:
    return [kind for kind in FORMS | REFUSED if kind.startswith(starts)]


def is_a(kind: str) -> str:
    return f"is {kind.split(',')[0]}"


OTHERS = kinds("full", "norm", "IA3", "GLoRA", "OFT", "BOFT", "T-LoRA")
KEPT_AT_1 = dict.fromkeys(FACTORED, FAILS) | {kind: f"{is_a(kind)}, {DROPS}" for kind in OTHERS}
KEPT_AT_1 |= {"LoRA, with bias": f"has diff_b, {DROPS}"}
LEFT_OUT = dict.fromkeys(FACTORED, FAILS)
LEFT_OUT |= {kind: f"{is_a(kind)}, {STAYS}" for kind in {*OTHERS} - {"full", *kinds("IA3")}}
LEFT_OUT |= {kind: f"{is_a(kind)}, {LENGTHS}" for kind in REFUSED if "DoRA" in kind}


@pytest.mark.parametrize("options", ["--blocks IN00=1 IN01=1 IN04=1", "--traits content"])
@pytest.mark.parametrize("kind", FORMS | REFUSED)
def test_a_list_is_given_for_what_lbw_multiplies_as_a_slice_is(tmp_path, capsys, kind, options):
    form, kept = (FORMS | REFUSED)[kind], "content" not in options
    names = [INPUT[layer] for layer in form.kinds]
    modules = {name: make_module(name, form, 2, 1.0, torch.float32) for name in names}
    modules |= {CONTENT_Q: make_module(CONTENT_Q, FORMS["LoRA"], 2, 1.0, torch.float32)}
    cut(write_modules(tmp_path / "a.safetensors", modules), *options.split())
    line, reason = printed(capsys), (KEPT_AT_1 if kept else LEFT_OUT).get(kind)
    if reason:
        assert line == f"none, because {min(names)} {reason}"
    else:
        assert all(weight_in_lbw(name, line) == kept for name in names)
        assert weight_in_lbw(CONTENT_Q, line) == (not kept)


ODD = STYLE.format(0, 1, "q")
ODD_TENSORS = {
    # tensors beside whole ones, and the reason
    "is incomplete": {f"{ODD}.lora_up.weight": torch.ones(1280, 2)},
    f"has a tensor that is not known ({ODD}.strange)": lora_module(ODD)
    | {f"{ODD}.strange": torch.ones(1)},
    "is there twice": lora_module(ODD)
    | lora_module(ODD.replace("output_blocks_1_1", "up_blocks_0_attentions_1"), layer=ODD),
}


@pytest.mark.parametrize(("reason", "tensors"), ODD_TENSORS.items(), ids=ODD_TENSORS)
def test_what_programs_make_of_such_a_module_is_not_known(tmp_path, capsys, reason, tensors):
    cut(write(tmp_path / "a.safetensors", blora_modules(CONTENT) | tensors))
    assert printed(capsys) == f"none, because {ODD} {reason}"


def test_names_that_a1111_does_not_read_have_none(tmp_path, capsys):
    name = "unet.up_blocks.0.attentions.0.proj_in"
    tensors = lora_module(name, layer=PROJ)
    cut(write(tmp_path / "a.safetensors", tensors), "--traits", "content_block")
    assert printed(capsys) == (
        "none, because A1111 reads kohya's names alone, not those of diffusers, diffusers names"
    )


def test_kohyas_names_behind_a_wrapper_have_none(tmp_path, capsys):
    name = f"lora_unet_{PROJ}"
    cut(
        write(tmp_path / "a.safetensors", lora_module(name, layer=PROJ)),
        "--traits",
        "content_block",
    )
    assert printed(capsys) == (f"none, because A1111 reads kohya's names alone, not {name}.alpha")


def test_a_joined_slice_has_a_list_for_each_file_and_not_combined_for_each_slice(tmp_path, capsys):
    a, b = (write(tmp_path / f"{n}.safetensors", blora_modules(CONTENT, STYLE)) for n in "ab")
    cut(a, b, "--traits", "content", "style")
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "LBW for a.safetensors: 0,0,0,0,0,0,1,0,0,0,0,0",
        "LBW for b.safetensors: 0,0,0,0,0,0,0,1,0,0,0,0",
    ]
    cut(a, "--traits", "content", "style", "--not_combined")
    lines = re.findall(r"^LBW: (.+)$", capsys.readouterr().out, re.MULTILINE)
    assert lines == ["0,0,0,0,0,0,1,0,0,0,0,0", "0,0,0,0,0,0,0,1,0,0,0,0"]


def test_inspect_shows_it_for_each_trait_that_keeps_something(tmp_path, capsys):
    lora = write(tmp_path / "a.safetensors", blora_modules(STYLE, LAYOUT) | lora_module(PROJ))
    assert slice_lora("--loras", lora, "--inspect") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("LBW")]
    lists = {
        "style": "0,0,0,0,0,0,0,1,0,0,0,0", "layout": "0,0,0,0,1,0,0,0,0,0,0,0",
        "content_block": "0,0,0,0,0,0,1,0,0,0,0,0", "style_block": "0,0,0,0,0,0,0,1,0,0,0,0",
    }  # fmt: skip
    assert lines == [f"LBW for {trait}: {text}" for trait, text in lists.items()]
    assert slice_lora("--loras", lora, "--inspect", "--json") == 0
    [facts] = json.loads(capsys.readouterr().out)
    assert facts["lbw"] == {trait: {"list": text, "reason": ""} for trait, text in lists.items()}


# ---- Their own code ------------------------------------------------------------------------------


def their(variable: str, file: str, *names: str, **given: Any) -> SimpleNamespace:
    """Definitions of a file that cannot be imported alone; skips where there is no checkout."""
    if not os.environ.get(variable):
        pytest.skip(f"NOT RUN: {variable} is not set")
    path = Path(os.environ[variable], file)
    body = ast.parse(path.read_text(encoding="utf-8")).body
    wanted = [
        node
        for node in body
        if getattr(node, "name", None) in names
        or (isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) in names)
    ]
    exec(compile(ast.Module(wanted, []), path, "exec"), given)  # noqa: S102
    return SimpleNamespace(**{name: given[name] for name in names})


def lbw_code() -> SimpleNamespace:
    constants = (
        "BLOCKID12 BLOCKID20 BLOCKID26 BLOCKID17 BLOCKIDFLUX BLOCKNUMS BLOCKIDS BLOCKS LORAS"
    )
    functions = "ratiodealer hyphener to26 checkloadcond lbw lbwf LORAANDSOON DEF_WEIGHT_PRESET"
    names = f"{constants} {functions}".split()
    return their(
        "LBW_ROOT", "scripts/lora_block_weight.py", *names, torch=torch, re=re, princ=False
    )


def keys_of(name: str) -> list[str]:
    """The names of a module in Forge, and in A1111 where it has one there, with underscores."""
    network, layer = re.match(r"lora_(unet|te1|te2)_(.+)", name).groups()
    if network == "unet":
        return [f"diffusion_model_{layer}", f"diffusion_model_{layer}_weight"]
    forge = f"clip_{'l' if network == 'te1' else 'g'}_transformer_{layer}_weight"
    if network == "te1":
        return [forge, f"0_transformer_{layer}"]
    block = re.sub(r"text_model_encoder_layers_(\d+)_", r"1_model_transformer_resblocks_\1_", layer)
    return [forge] if block == layer else [forge, block]


@pytest.mark.parametrize("count", [12, 20])
def test_lbw_itself_gives_every_layer_what_the_table_says(count):
    code = lbw_code()
    ids = {12: code.BLOCKID12, 20: code.BLOCKID20}[count]
    assert [place.replace("M00", "MID") for place in ids] == PLACES[count]
    numbers = [0.25 + place for place in range(count)]
    text = ",".join(map(str, numbers))
    for name in SHAPES:
        for key in keys_of(name):
            ratio, _ = code.ratiodealer(key, code.to26(numbers), "")
            assert ratio == weight_in_lbw(name, text), key


def test_lbw_in_forge_weights_patches_of_three_algorithms_and_drops_the_others():
    code, key = lbw_code(), "diffusion_model.output_blocks.0.1.proj_in.weight"
    kinds = ("lora", "loha", "lokr", "diff", "glora", "oft")
    patches = {("a", 1.0): {key: [(1.0, (kind, ()), 1.0) for kind in kinds]}}
    code.lbwf(patches, [1.0], [code.to26([0.5] * 12)], [""], [None], False)
    [result] = patches.values()
    assert [(patch[0], patch[1][0]) for patch in result[key]] == [
        (0.5, kind) for kind in ("lora", "loha", "lokr")
    ]


def test_lbw_in_a1111_multiplies_one_factor_and_fails_at_a_factored_w1():
    code, key = lbw_code(), "diffusion_model_output_blocks_0_1_proj_in"
    ones, lwei = torch.ones(2, 2), code.to26([0.5] * 12)
    names = ("Lora", "Hada", "Lokr", "Full", "Ia3")
    lora, hada, kron, full, ia3 = (type(f"NetworkModule{name}", (), {}) for name in names)

    def run(module: Any, **tensors: Any) -> Any:
        for name, value in tensors.items():
            setattr(module, name, value)
        code.lbw(SimpleNamespace(modules={key: module}), lwei, "")
        return module

    up = SimpleNamespace(weight=ones)
    assert torch.equal(run(lora(), up_model=up).up_model.weight, ones / 2)
    assert torch.equal(run(hada(), w1a=ones).w1a, ones / 2)
    assert torch.equal(run(kron(), w1=ones).w1, ones / 2)
    assert torch.equal(run(full(), weight=ones).weight, ones / 2)
    assert torch.equal(run(ia3(), w=ones).w, ones / 2)
    with pytest.raises(TypeError):
        run(kron(), w1=None)


ELEVEN = [
    *(f"input_blocks.{n}" for n in (4, 5, 7, 8)),
    "middle_block",
    *(f"output_blocks.{n}" for n in range(6)),
]


def inspire(blocks: list[str], vector: str) -> dict[str, float]:
    """What Inspire-Pack multiplies proj_in of each block with, and a text encoder's layer."""
    fake = SimpleNamespace(
        model_lora_keys_unet=lambda model: {},
        model_lora_keys_clip=lambda clip, keys: keys,
        load_lora=lambda lora, keys: lora,
    )
    names = ("is_numeric_string", "parse_unet_num", "LoraLoaderBlockWeight")
    comfy = SimpleNamespace(lora=fake)
    code = their("INSPIRE_ROOT", "inspire/lora_block_weight.py", *names, re=re, np=np, comfy=comfy)
    keys = {f"diffusion_model.{b}.1.proj_in.weight": b for b in blocks}
    keys["clip_g.transformer.text_model.encoder.layers.0.mlp.fc1.weight"] = "text"
    model, clip = SimpleNamespace(model=None), SimpleNamespace(cond_stage_model=None)
    weights, muted, _ = code.LoraLoaderBlockWeight.load_lbw(
        model, clip, dict.fromkeys(keys), False, 0, 4.0, 1.0, vector
    )
    return {b: 0.0 if key in muted else weights[key][1] for key, b in keys.items()}


def test_inspire_pack_reads_a_list_of_12_alike_where_the_file_has_those_blocks_and_no_others():
    numbers = [0.25 * n for n in range(12)]
    vector = ",".join(map(str, numbers))
    assert inspire(ELEVEN, vector) == dict(zip(["text", *ELEVEN], numbers, strict=True))
    # In a B-LoRA of two blocks the first number after BASE is the content's.
    two = inspire(["output_blocks.0", "output_blocks.1"], vector)
    assert two == {"text": 0.0, "output_blocks.0": 0.25, "output_blocks.1": 0.5}
