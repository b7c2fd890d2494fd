"""Wrapped names, fused projections, folders, and files that are something else, each told truly."""

from __future__ import annotations

import json
import pickle
import time
from itertools import product
from pathlib import Path

import pytest
import torch
from lora_algebra import bias_change, final_weight, read_modules, weight_change
from lora_files import CONTENT, METADATA, SHAPES, STYLE, TE2, lora_module, write
from lora_forms import FORMS, REFUSED, base_weight, make_module, write_modules
from safetensors.torch import load_file, save_file
from slicing import everything, modules, slice_lora, stored
from torch import Tensor

from blora.slicer.keys import read_key

QUERY = CONTENT.format(0, 1, "q")
LAYER = "up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT = "text_model.encoder.layers.3.mlp.fc1"
UP, DOWN = "lora_up.weight", "lora_down.weight"

# ---- Wrappers ------------------------------------------------------------------------------------

# What torch.compile, DDP, FSDP, PEFT, pipelines and checkpoints put before a layer's name.
WRAPPERS = (
    "_orig_mod", "module", "_fsdp_wrapped_module", "base_model.model", "model",
    "model.diffusion_model", "unet", "lora_unet",
)  # fmt: skip


@pytest.mark.parametrize(("first", "second"), [*product(WRAPPERS, WRAPPERS)])
def test_wrappers_come_off_in_any_order_before_a_dot_or_an_underscore(first, second):
    for dot in "._":
        for words in ((first,), (first, second), (first, second, first)):
            key = dot.join(f"{'.'.join(words)}.{LAYER}".split(".")) + ".lora_A.weight"
            meaning = read_key(key)
            assert meaning, key
            assert meaning.spelling.layers[0].module == QUERY
            assert meaning.suffix == DOWN


@pytest.mark.parametrize(
    "key",
    [
        LAYER.replace(".attn1", "._orig_mod.attn1"),
        LAYER.replace(".attn1", "._checkpoint_wrapped_module.attn1._orig_mod"),
        f"lora_unet__orig_mod_{LAYER.replace('.', '_')}",
        LAYER.replace(".to_q", "._orig_mod.processor.to_q"),
        LAYER.replace("to_q", "q_proj"),  # IP-Adapter's
    ],
)
def test_wrappers_inside_a_name_come_off_too(key):
    assert read_key(f"{key}.lora_down.weight").spelling.layers[0].module == QUERY


ADAPTERS = ("default", "my-adapter", "стиль", "a b", "weight", "bias", "0")
TENSORS = (
    # PEFT's name of a tensor, what follows an adapter's name, and kohya's
    ("lora_A", ".weight", DOWN),
    ("lora_B", ".weight", UP),
    ("lora_B", ".bias", "lora_up.bias"),
    ("lora_magnitude_vector", ".weight", "dora_scale"),
    ("lora_magnitude_vector", "", "dora_scale"),
    ("oft_R", ".weight", "oft_R.weight"),
    *((name, "", name) for name in ("hada_w1_a", "hada_t2", "lokr_w1", "lokr_w2_b", "lokr_t2")),
)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapter_may_have_any_name_on_every_tensor_of_peft(adapter):
    for tensor, end, kohyas in TENSORS:
        assert read_key(f"base_model.model.{LAYER}.{tensor}.{adapter}{end}").suffix == kohyas


# ---- A text encoder alone ------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["te1", "te2"])
@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
def test_the_width_of_a_text_encoder_that_is_not_named_says_which_it_is(slicer, network, prefix):
    name = f"lora_{network}_{TEXT.replace('.', '_')}"
    module = lora_module(name, alpha=2.0)
    tensors = {f"{prefix}{TEXT}.{key.removeprefix(f'{name}.')}": t for key, t in module.items()}
    lora = write(slicer.folder / "a.safetensors", tensors)
    assert slicer(lora, *everything(slicer.folder)) == 0
    assert stored(slicer.output) == stored(write(slicer.folder / "wanted.safetensors", module))
    assert slicer.err == (
        f"note: a.safetensors names no text encoder, so its width decides: it is {network}\n"
    )


# ---- Fused projections ---------------------------------------------------------------------------

SELF, CROSS = CONTENT.format(0, 1, "{}"), CONTENT.format(0, 2, "{}")
TEXT_SELF = TE2.format(0, "{}")
# What a program calls the fused layer, kohya's names of those in it.
FUSED = {
    f"unet.{LAYER[:-5]}.to_qkv": [SELF.format(x) for x in "qkv"],
    SELF.format("qkv"): [SELF.format(x) for x in "qkv"],
    f"unet.{LAYER[:-6]}2.to_kv": [CROSS.format(x) for x in "kv"],
    "text_encoder_2.text_model.encoder.layers.0.self_attn.qkv_proj": [
        TEXT_SELF.format(x) for x in "qkv"
    ],
    "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj": [
        TEXT_SELF.format(x) for x in "qkv"
    ],
}
WHOLE = "lora_unet_fused"  # a layer of so many rows
SPLIT = [form for form in FORMS if form.startswith(("LoRA", "LoHa", "LoKr", "full"))]
SPLIT = [form for form in SPLIT if "tucker" not in form]


def fused_module(form: str, names: list[str]) -> tuple[dict[str, Tensor], int]:
    """A module of this form on the layers one above the other, and how many rows each has."""
    outputs, inputs = SHAPES[names[0]]
    SHAPES[WHOLE] = [outputs * len(names), inputs]
    forms = FORMS | REFUSED
    return make_module(WHOLE, forms[form], 2, 1.5, torch.float32), outputs


@pytest.mark.parametrize("strength", [1.0, -0.5])
@pytest.mark.parametrize("form", SPLIT)
@pytest.mark.parametrize(("fused", "names"), FUSED.items())
def test_fused_projections_are_split_by_rows(slicer, fused, names, form, strength):
    module, outputs = fused_module(form, names)
    lora = write_modules(slicer.folder / "a.safetensors", {fused: module})
    assert slicer(lora, *everything(slicer.folder), f"--alphas={strength}") == 0
    result = read_modules(slicer.output)
    assert list(result) == sorted(names)
    wanted = strength * weight_change(module)
    bias = bias_change(module)
    for index, name in enumerate(names):
        rows = slice(index * outputs, (index + 1) * outputs)
        assert (weight_change(result[name]) - wanted[rows]).norm() < 1e-6 * wanted[rows].norm()
        if bias is not None:
            torch.testing.assert_close(bias_change(result[name]), strength * bias[rows])
    assert "note: split fused projections of a.safetensors (1): " in slicer.err
    assert slicer(lora, "--inspect") == 0
    assert "fused projections, which a cut splits (1): " in slicer.out


def test_a_fused_dora_keeps_the_lengths_of_each_row(slicer):
    fused, names = next(iter(FUSED.items()))
    module, outputs = fused_module("DoRA", names)
    lora = write_modules(slicer.folder / "a.safetensors", {fused: module})
    assert slicer(lora) == 0
    result = read_modules(slicer.output)
    wanted = final_weight(module, torch.cat([base_weight(name) for name in names]))
    for index, name in enumerate(names):
        rows = wanted[index * outputs : (index + 1) * outputs]
        final = final_weight(result[name], base_weight(name))
        assert (final - rows).norm() < 1e-6 * rows.norm()


@pytest.mark.parametrize("form", ["DoRA, by column", "OFT"])
def test_fused_projections_that_cannot_be_split_are_refused_by_the_name_of_their_algorithm(
    slicer, form
):
    fused, names = next(iter(FUSED.items()))
    module, _ = fused_module(form, names)
    lora = write_modules(slicer.folder / "a.safetensors", {fused: module})
    assert slicer(lora) == 1
    assert slicer.sentence == (
        f"{fused.removeprefix('unet.')} in {lora} holds fused projections as {form.split(',')[0]}, "
        "which cannot be split into those of SDXL: unfuse them in the program that trained it"
    )


# ---- Folders, and files of other formats ---------------------------------------------------------


def folder_of(path: Path, *names: str) -> Path:
    """A folder with these files, each a LoRA where it is a safetensors file."""
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            write(path / name, lora_module(QUERY))
        else:
            (path / name).write_bytes(b"x")
    path.mkdir(exist_ok=True)
    return path


ADAPTER = "adapter_model.safetensors"
FOLDERS = {
    # the files in a folder, and what is said of it; None where it stands for the LoRA
    (ADAPTER,): None,
    ("pytorch_lora_weights.safetensors", "x.png"): None,
    (f"checkpoint-1/{ADAPTER}", "README.md"): None,
    (f"unet/{ADAPTER}", f"text_encoder/{ADAPTER}"): (
        f"{{0}} holds several LoRAs (text_encoder/{ADAPTER}, unet/{ADAPTER}): name one of them"
    ),
    ("my.safetensors",): "{0} is a folder: name the LoRA in it (my.safetensors)",
    ("adapter_config.json", "adapter_model.bin"): (
        "{0} is a folder with adapter_model.bin, a PyTorch file: save the LoRA again as safetensors"
    ),
    ("x.png",): "{0} is a folder without a .safetensors file (x.png): correct --loras",
    (): "{0} is a folder without a .safetensors file (empty): correct --loras",
}


@pytest.mark.parametrize(("names", "sentence"), FOLDERS.items(), ids=str)
def test_a_folder_stands_for_the_one_lora_in_it_or_below_or_says_what_it_holds(
    tmp_path, capsys, names, sentence
):
    folder, output = folder_of(tmp_path / "saved", *names), tmp_path / "out.safetensors"
    code = slice_lora("--loras", folder, "--output_path", output)
    err = capsys.readouterr().err
    if sentence:
        assert (code, err) == (1, f"error: {sentence.format(folder)}\n")
    else:
        assert (code, modules(output)) == (0, {QUERY})


def torch_file(path: Path, is_zip: bool) -> None:
    torch.save(lora_module(QUERY), path, _use_new_zipfile_serialization=is_zip)


RESAVE = "save it as safetensors with the program that made it"
FORMATS = {
    "a zipped .pt": (
        lambda path: torch_file(path, True),
        f"a PyTorch file (.pt, .bin, .ckpt) or another zip archive, not safetensors: {RESAVE}",
    ),
    "an old .pt": (
        lambda path: torch_file(path, False),
        f"an old PyTorch file (.pt, .bin, .ckpt), not safetensors: {RESAVE}",
    ),
    **{
        f"a pickle of protocol {protocol}": (
            lambda path, protocol=protocol: path.write_bytes(pickle.dumps({"a": 1}, protocol)),
            f"a Python pickle, not safetensors: {RESAVE}",
        )
        for protocol in (2, 4, 5)
    },
    "a pointer": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "a Git LFS pointer, not safetensors: download the file that it points to",
    ),
    "GGUF": (
        lambda path: path.write_bytes(b"GGUF\x03\0\0\0" + bytes(100)),
        "a GGUF file, not safetensors: use the safetensors file that it was made from",
    ),
    "a web page": (
        lambda path: path.write_text("\n<!DOCTYPE html><html></html>"),
        "a web page, not safetensors: download the file again",
    ),
}


@pytest.mark.parametrize(("make", "what"), FORMATS.values(), ids=FORMATS)
def test_a_file_of_another_format_is_told_by_how_it_begins(slicer, make, what):
    lora = slicer.folder / "a.safetensors"
    make(lora)
    assert slicer.refuses(lora) == f"{lora} is {what}".split(" (")[0]
    assert slicer.sentence == f"{lora} is {what}"


# ---- What is no LoRA, or nobody's ----------------------------------------------------------------

ROWS = torch.ones(1, 8)
CHECKPOINT = {
    "model.diffusion_model.out.2.weight": torch.zeros(4, 320, 3, 3),
    "first_stage_model.decoder.conv_in.weight": torch.zeros(1),
    "conditioner.embedders.1.model.ln_final.weight": torch.zeros(1),
}
ALONE = {
    "a checkpoint": (
        CHECKPOINT,
        "{0} is a checkpoint, not a LoRA: name a LoRA in --loras, and the checkpoint that a DoRA "
        "needs in --base_model",
    ),
    "HCP-Diffusion's": (
        {f"lora:{LAYER}.___.layer.W_up": ROWS},
        f"{{0}} has HCP-Diffusion's names (lora:{LAYER}.___.layer.W_up), which are not read here: "
        "convert it to the WebUI format with HCP-Diffusion",
    ),
    "UniLoRA": (
        {"base_model.unilora_theta_d": ROWS},
        "{0} is PEFT's UniLoRA, which kohya's names cannot express: use it with PEFT",
    ),
    "an unknown prefix": (
        {f"controlnet.{LAYER}.lora_A.weight": ROWS},
        '{0} has layers of SDXL behind a prefix that is not known ("controlnet."): rename its keys '
        "to kohya's",
    ),
    "nothing known": (
        {"emb_params": ROWS},
        "{0} is not an SDXL LoRA: it holds emb_params",
    ),
    "text encoders beside an unknown U-Net": (
        lora_module(TE2.format(0, "q")) | {"lora_unet_foo_1.lora_up.weight": ROWS},
        "{0} may not be for SDXL: beside SDXL's text encoders it has "
        "lora_unet_foo_1.lora_up.weight, of no layer of SDXL's U-Net; ask where you got it",
    ),
    "one of PEFT's own": (
        {f"base_model.model.{LAYER}.hra_u": torch.ones(1280, 8)},
        f'the kind of every "content" module in {{0}} is unknown (base_model.model.{LAYER}.hra_u): '
        "PEFT's HRA has such, which kohya's names cannot express; use it with PEFT",
    ),
    "AdaLoRA": (
        {
            f"{LAYER}.lora_A": torch.ones(4, 1280),
            f"{LAYER}.lora_B": torch.ones(1280, 4),
            f"{LAYER}.lora_E": torch.ones(4, 1),
        },
        f"{{0}} holds unknown tensors beside those of LoRA ({LAYER}.lora_E), so what a slice would "
        "do is not known: PEFT's AdaLoRA has such, which kohya's names cannot express; use it with "
        "PEFT",
    ),
    "PaddleMIX": (
        {f"unet.{LAYER}.lora_A": torch.ones(1280, 4), f"unet.{LAYER}.lora_B": torch.ones(4, 1280)},
        f"the factors of {QUERY} in {{0}} are transposed, as PaddleMIX stores them: convert them "
        "in that program, or use the LoRA there",
    ),
    "BD-LoRA": (
        {
            f"unet.{LAYER}.lora_A.weight": torch.ones(4, 320),
            f"unet.{LAYER}.lora_B.weight": torch.ones(1280, 4),
        },
        f"the factors of {QUERY} in {{0}} are block-diagonal, as PEFT's BD-LoRA stores them: "
        "convert them in that program, or use the LoRA there",
    ),
}


@pytest.mark.parametrize(("tensors", "sentence"), ALONE.values(), ids=ALONE)
def test_what_cannot_be_cut_is_named_for_what_it_is(slicer, tensors, sentence):
    lora = write(slicer.folder / "a.safetensors", tensors, {})
    for way in ((), ("--alphas", "0.5")):
        assert slicer(lora, *way) == 1
        assert slicer.sentence == sentence.format(lora)


def test_a_note_says_who_does_not_read_pefts_rotations(slicer):
    lora = write(slicer.folder / "a.safetensors", {f"{QUERY}.oft_R.weight": torch.ones(320, 6)})
    assert slicer(lora) == 0
    assert slicer.err == (
        "warning: a.safetensors is an OFT as PEFT and OneTrainer store it, which ComfyUI does not "
        f"read (1): {QUERY}\n"
    )


def test_an_alpha_of_0_stays_0_in_a_join_and_is_warned_of(slicer):
    zero = write(slicer.folder / "zero.safetensors", lora_module(QUERY, alpha=0.0))
    two = write(slicer.folder / "two.safetensors", lora_module(STYLE.format(0, 1, "q"), alpha=2.0))
    assert slicer(zero, two, "--traits", "content", "style") == 0
    assert stored(slicer.output) == stored(zero) | stored(two)
    assert slicer.err == (
        "warning: alpha is 0 in modules of zero.safetensors, which only trainers read as the rank: "
        f"to every program that draws it is no change (1): {QUERY}\n"
    )


def test_a_guessed_alpha_is_warned_of_by_inspect_too(slicer):
    tensors = {f"unet.{LAYER}.lora_A.weight": torch.ones(4, 1280)}
    tensors[f"unet.{LAYER}.lora_B.weight"] = torch.ones(1280, 4)
    assert slicer(write(slicer.folder / "a.safetensors", tensors, {}), "--inspect") == 0
    assert f"no alpha is stored, alpha = rank is assumed in modules (1): {QUERY}" in slicer.out


def test_ziploras_whole_change_is_a_diff(slicer):
    change = torch.randn(1280, 1280)
    lora = write(slicer.folder / "a.safetensors", {f"unet.unet.{LAYER}.lora.weight": change}, {})
    assert slicer(lora) == 0
    assert torch.equal(load_file(slicer.output)[f"{QUERY}.diff"], change)


# ---- Settings of a single model ------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "unet."])
@pytest.mark.parametrize(
    ("settings", "alpha"),
    [
        ({"lora_alpha": 16}, 16.0),
        ({"lora_alpha": 16, "use_rslora": True}, 32.0),
        ({"lora_alpha": 16, "alpha_pattern": {r".*\.attn[12]\.to_(q|k)": 6}}, 6.0),
        ({"lora_alpha": 16, "alpha_pattern": {"to_k": 6}}, 16.0),
        ({"lora_alpha": 16, "peft_type": None}, 16.0),
        ({"peft_type": "adalora"}, "is PEFT's ADALORA, which kohya's names cannot express"),
        ({"lora_alpha": 1, "kasa_config": {"a": 1}}, "is PEFT's KaSA, which kohya's names cannot"),
        ({"lora_alpha": 1, "init_lora_weights": "pissa_niter_4"}, "was trained with init_lora_"),
    ],
    ids=str,
)
def test_settings_with_and_without_a_networks_prefix_count_alike(slicer, prefix, settings, alpha):
    entries = {"r": 4, **settings}
    text = json.dumps({f"{prefix}{key}": value for key, value in entries.items()})
    tensors = {
        f"{prefix}{LAYER}.lora_A.weight": torch.ones(4, 1280),
        f"{prefix}{LAYER}.lora_B.weight": torch.ones(1280, 4),
    }
    lora = slicer.folder / "a.safetensors"
    save_file(tensors, lora, {"lora_adapter_metadata": text})
    if isinstance(alpha, str):
        assert slicer.refuses(lora).startswith(f"{lora} {alpha}")
    else:
        assert slicer(lora) == 0
        assert load_file(slicer.output)[f"{QUERY}.alpha"].item() == alpha


def test_a_dora_by_its_settings_without_lengths_is_warned_of(slicer):
    tensors = {
        f"{LAYER}.lora_A.weight": torch.ones(4, 1280),
        f"{LAYER}.lora_B.weight": torch.ones(1280, 4),
    }
    settings = json.dumps({"r": 4, "lora_alpha": 4, "use_dora": True})
    lora = slicer.folder / "a.safetensors"
    save_file(tensors, lora, {"lora_adapter_metadata": settings})
    assert slicer(lora) == 0
    assert slicer.err == (
        "warning: a.safetensors was trained with use_dora, and holds no lengths of a DoRA: the "
        "slice acts as a plain LoRA\n"
    )


# ---- Hostile files -------------------------------------------------------------------------------

MANY = 100_000
LONG = {
    "dots": "." * 1_000_000,
    "prefixes": "lora_unet_" * 100_000,
    "wrappers": "_orig_mod." * 100_000 + LAYER,
    "blocks": "unet.up_blocks." * 70_000,
    "a layer, and more": f"{QUERY}." * 10_000,
    "an adapter": f"{QUERY}.lora_B.{'x' * 1_000_000}.weight",
}
HOSTILE: dict[str, tuple[dict[str, Tensor], dict[str, str]]] = {
    **{what: ({key: torch.ones(1)}, {}) for what, key in LONG.items()},
    "foreign keys": ({f"lora_unet_double_blocks_{n}.alpha": ROWS[0, 0] for n in range(MANY)}, {}),
    "keys of a block": ({f"unet.up_blocks.0.{n}.alpha": ROWS[0, 0] for n in range(MANY)}, {}),
    "tensors of a layer": ({f"{QUERY}.x{n}": ROWS[0, 0] for n in range(MANY)}, {}),
    "one layer again and again": (
        {f"{'lora_unet_' * n}{LAYER}.lora_A.weight": torch.ones(1) for n in range(500)},
        {},
    ),
    "tags of many digits": ({}, {"ss_tag_frequency": f'{{"a": {{"b": 1{"0" * 4299}, "c": 1}}}}'}),
    **{
        f"the pattern {pattern[:9]}": (
            {f"{LAYER.replace('to_q', 'to_k')}.lora_{x}.weight": ROWS for x in "AB"},
            {"lora_adapter_metadata": json.dumps({"lora_alpha": 4, "alpha_pattern": {pattern: 1}})},
        )
        for pattern in ("(.*)*x!", "(a|aa)" * 40 + "!", ".*" * 10_000 + "x", "a" * 1_000_000)
    },
}


@pytest.mark.parametrize(("tensors", "metadata"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_takes_no_time(slicer, tensors, metadata):
    own = lora_module(QUERY)
    lora = slicer.folder / "a.safetensors"
    save_file({key: t.clone() for key, t in (own | tensors).items()}, lora, METADATA | metadata)
    for way in ((), ("--inspect",), ("--inspect", "--json")):
        started = time.process_time()
        slicer(lora, *way)
        assert time.process_time() - started < 5  # a second, on a machine that does nothing else
