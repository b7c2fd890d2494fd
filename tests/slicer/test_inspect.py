"""--inspect shows what a LoRA file holds, and writes nothing."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from lora_algebra import Module, bias_change, weight_change
from lora_files import (
    CONTENT,
    LAYOUT,
    METADATA,
    STYLE,
    TE2,
    blora_modules,
    change,
    lora_module,
    write,
)
from lora_forms import (
    FORMS,
    INPUT,
    LINEAR,
    LOHA,
    REFUSED,
    WITH_UP_BIAS,
    Form,
    on_each_layer,
    write_modules,
)
from slicing import slice_lora, stored


def shown(capsys: pytest.CaptureFixture[str], *args: object) -> list[str]:
    """The lines that are shown of these files; nothing else is said."""
    assert slice_lora("--loras", *args, "--inspect") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out.splitlines()


def inspected(capsys: pytest.CaptureFixture[str], *args: object) -> list[dict]:
    return json.loads("\n".join(shown(capsys, *args, "--json")))


def test_each_block_has_a_row_for_each_trait_with_its_share_of_the_whole_change(tmp_path, capsys):
    tensors = blora_modules(CONTENT, dtype=torch.float32)
    tensors |= (style := blora_modules(STYLE, rank=3, alpha=2.0, dtype=torch.float32))
    middle = "lora_unet_middle_block_1_proj_in"
    tensors |= lora_module("lora_unet_mid_block_attentions_0_proj_in", layer=middle)
    for other in (TE2.format(0, "q"), TE2.format(5, "q"), "lora_unet_output_blocks_0_1_proj_in"):
        tensors |= lora_module(other)
    lora = write(tmp_path / "a.safetensors", tensors | {"strange": torch.zeros(1)})
    [facts] = inspected(capsys, lora)
    rows = {(row["block"], row["trait"]): row for row in facts["blocks"]}
    assert {key: row["modules"] for key, row in rows.items()} == {
        ("middle_block.1", "-"): 1,
        ("output_blocks.0.1", "content_block"): 1,
        ("output_blocks.0.1", "content, content_block"): 8,
        ("output_blocks.1.1", "style, style_block"): 8,
        ("te2", "text"): 1,
        ("te2", "clip_2_content, text"): 1,
    }
    row = rows["output_blocks.1.1", "style, style_block"]
    assert (row["algorithm"], row["ranks"], row["alphas"]) == ("LoRA", [3], [2.0])
    assert (row["dtype"], row["bytes"]) == ("F32", sum(t.nbytes for t in style.values()))
    names = {key.split(".")[0] for key in blora_modules(CONTENT)}
    content = math.hypot(*(float(change(lora, name).norm()) for name in names))
    row = rows["output_blocks.0.1", "content, content_block"]
    assert row["change"] == pytest.approx(content, rel=1e-5)
    total = sum(row["change"] ** 2 for row in facts["blocks"])
    for row in facts["blocks"]:
        assert row["share"] == pytest.approx(row["change"] ** 2 / total, rel=1e-6)
    assert facts["unplaced"] == ["strange"]


BY_THE_WEIGHT = {
    name: form
    for name, form in (FORMS | REFUSED).items()
    if name.startswith(("IA3", "GLoRA", "OFT", "BOFT", "T-LoRA"))
}
MEASURED = {n: form for n, form in (FORMS | REFUSED).items() if n not in BY_THE_WEIGHT}
MEASURED["LoRA, with a bias of lora_up"] = WITH_UP_BIAS
for half in "12":
    core = {f"hada_t{half}": "rr", f"hada_w{half}_a": "ro"}
    MEASURED[f"LoHa, tucker in half {half} alone"] = Form(LOHA | core, kinds=LINEAR)


def frobenius(module: Module) -> float:
    """Of what the module adds to its layer, weight and bias; of a DoRA, that of its factors."""
    changes = (weight_change(module), bias_change(module))
    return math.hypot(*(float(change.norm()) for change in changes if change is not None))


@pytest.mark.parametrize("alpha", [None, 0.0, 1.5, -3.0])
@pytest.mark.parametrize("form", MEASURED.values(), ids=MEASURED)
def test_the_change_of_every_form_is_its_frobenius_norm(tmp_path, capsys, form, alpha):
    modules = on_each_layer(form, alpha, torch.float16)
    [facts] = inspected(capsys, write_modules(tmp_path / "a.safetensors", modules))
    assert len(facts["blocks"]) == len(modules)  # each layer lies in a block of its own
    changes = sorted(row["change"] for row in facts["blocks"])
    assert changes == pytest.approx(sorted(map(frobenius, modules.values())), rel=1e-5)


@pytest.mark.parametrize("name", BY_THE_WEIGHT)
def test_a_change_in_proportion_to_the_weight_has_no_size(tmp_path, capsys, name):
    modules = on_each_layer(BY_THE_WEIGHT[name], 1.0, torch.float16)
    [facts] = inspected(capsys, write_modules(tmp_path / "a.safetensors", modules))
    assert len(facts["blocks"]) == len(modules)
    for row in facts["blocks"]:
        assert row["algorithm"] == name.split(",")[0]
        assert (row["change"], row["share"]) == (None, None)


def test_the_report_reads_as_a_table_with_bars(tmp_path, capsys):
    ones = {"lora_up.weight": torch.ones(1280, 4), "lora_down.weight": torch.ones(4, 1280)}
    dora = {"dora_scale": torch.ones(1280, 1), "alpha": torch.tensor(0.5)}
    zeros = torch.zeros(1280, 8).half()
    none = {"lora_up.weight": zeros, "lora_down.weight": zeros.reshape(8, 1280)}
    modules = {
        CONTENT.format(0, 1, "q"): ones | {"alpha": torch.tensor(1.0)},
        STYLE.format(0, 1, "q"): ones | dora,
        STYLE.format(1, 1, "q"): none | {"alpha": torch.tensor(1.0)},
        INPUT["norm"]: {"w_norm": torch.zeros(640)},
        INPUT["attention"]: {"oft_blocks": torch.zeros(320, 2, 2).bfloat16()},
        "strange": {"weight": torch.ones(1)},
    }
    lora = write_modules(tmp_path / "a.safetensors", modules, METADATA)
    assert shown(capsys, lora) == [
        f"{lora}: 5 modules, 0.1 MB",
        "block              trait                   modules   algorithm    rank     alpha      "
        "dtype    size  change  share",
        "input_blocks.4.1   -                             2   OFT, norm       -         -  "
        "BF16, F32  0.0 MB       -      -",
        "output_blocks.0.1  content, content_block        1        LoRA       4         1        "
        "F32  0.0 MB    1280  80.0%  ################",
        "output_blocks.1.1  style, style_block            2  DoRA, LoRA  4 to 8  0.5 to 1   "
        "F32, F16  0.1 MB     640  20.0%  ####",
        "naming: kohya, sgm names",
        *(
            f"LBW for {trait}: none, because {INPUT['attention']} is OFT, which LBW may not take "
            "out at 0 in A1111"
            for trait in ("content", "style", "content_block", "style_block")
        ),
        "base: sdxl_base_v1-0",
        "trigger words: sks (3)",
        "tensors with unknown names (1): strange.weight",
    ]


def test_a_lora_that_changes_nothing_has_no_shares(tmp_path, capsys):
    zeros = {key: 0 * tensor for key, tensor in lora_module(KOHYA).items()}
    lora = write(tmp_path / "a.safetensors", zeros)
    [facts] = inspected(capsys, lora)
    assert [(row["change"], row["share"]) for row in facts["blocks"]] == [(0, None)]
    assert shown(capsys, lora)[2].split()[-2:] == ["0", "-"]


BLOCK = "transformer_blocks.0.attn1"
BLOCK_0 = f"up_blocks.0.attentions.0.{BLOCK}"
SGM, DIFFUSERS = f"output_blocks.0.1.{BLOCK}.to_q", f"{BLOCK_0}.to_q"
KOHYA = CONTENT.format(0, 1, "q")
OTHER = f"lora_unet_{DIFFUSERS.replace('.', '_')}"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"
AB, UP_DOWN = (".lora_B.weight", ".lora_A.weight"), (".lora_up.weight", ".lora_down.weight")
UP_AND_DOWN = (".lora.up.weight", ".lora.down.weight")
HADA = tuple(f"hada_w{n}_{side}" for n in (1, 2) for side in "ab")
NAMINGS = [
    # how a naming is called, how its keys begin, and how they go on
    ("kohya, sgm names", KOHYA, UP_DOWN),
    ("kohya, diffusers names", OTHER, UP_DOWN),
    ("kohya", TE2.format(0, "q"), UP_DOWN),
    ("OneTrainer's legacy format, diffusers names", f"{OTHER}_", HADA),
    ("OneTrainer, diffusers names", f"unet.{DIFFUSERS}.", HADA),
    ("OneTrainer", f"clip_l.{TEXT}", UP_DOWN),
    ("OneTrainer", f"clip_g.{TEXT}", UP_DOWN),
    ("LyCORIS' wrapper, diffusers names", OTHER.replace("lora_unet", "lycoris"), AB),
    ("sd-scripts' OFT, sgm names", KOHYA.replace("lora", "oft", 1), (".oft_blocks",)),
    ("ComfyUI, sgm names", f"diffusion_model.{SGM}", UP_DOWN),
    ("ComfyUI", f"text_encoders.clip_l.transformer.{TEXT}", UP_DOWN),
    ("ComfyUI", f"text_encoders.clip_g.transformer.{TEXT}", UP_DOWN),
    ("no prefix, sgm names", SGM, AB),
    ("diffusers with PEFT, diffusers names", f"unet.{DIFFUSERS}", AB),
    ("diffusers, diffusers names", f"unet.{DIFFUSERS}", UP_AND_DOWN),
    ("diffusers, sgm names", f"unet.unet.{SGM}", UP_DOWN),
    ("diffusers", f"text_encoder.{TEXT}", UP_DOWN),
    ("diffusers", f"text_encoder_2.{TEXT}", UP_DOWN),
    ("older diffusers, diffusers names", f"unet.{BLOCK_0}.processor.to_q", ("_lora.up.weight",)),
    ("PEFT, diffusers names", f"base_model.model.{DIFFUSERS}", AB),
    ("PEFT, sgm names", f"base_model.model.unet.{SGM}", UP_DOWN),
    ("PEFT", f"base_model.model.text_encoder.{TEXT}", UP_DOWN),
    ("PEFT", f"base_model.model.text_encoder_2.{TEXT}", UP_DOWN),
    ("SimpleTuner, diffusers names", f"unet.base_model.model.{DIFFUSERS}", UP_AND_DOWN),
    ("SimpleTuner", f"text_encoder.base_model.model.{TEXT}", UP_DOWN),
    ("SimpleTuner", f"text_encoder_2.base_model.model.{TEXT}", UP_DOWN),
    (
        "diffusers' conversion to kohya, diffusers names; kohya, diffusers names",
        "lora_unet_",
        (*(OTHER[10:] + end for end in UP_DOWN), f"{DIFFUSERS}.lora_magnitude_vector"),
    ),
]


@pytest.mark.parametrize(("naming", "start", "ends"), NAMINGS)
def test_it_says_which_programs_naming_a_file_has(tmp_path, capsys, naming, start, ends):
    tensors = {f"{start}{end}": torch.ones(1280, 1) for end in ends}
    # An alpha is spelt alike everywhere, so it says nothing of the naming.
    lora = write(tmp_path / "a.safetensors", tensors | {f"{KOHYA}.alpha": torch.ones(())})
    [facts] = inspected(capsys, lora)
    assert "; ".join(sorted(facts["naming"].split("; "))) == naming
    assert facts["modules"] == (2 if "text" in start else 1)


def test_all_that_a_slice_would_leave_out_or_refuse_is_named(tmp_path, capsys):
    half, whole, copied = (CONTENT.format(n, 1, "q") for n in range(3))
    tensors = lora_module(half) | lora_module(whole) | {f"{whole}.strange": torch.ones(1)}
    del tensors[f"{half}.lora_down.weight"]
    tensors |= lora_module(copied, dtype=torch.float32)
    again = copied.replace("output_blocks_0_1", "up_blocks_0_attentions_0")
    tensors |= {key.replace(copied, again): t + 1 for key, t in tensors.items() if copied in key}
    tensors |= {"unet.conv_in.weight": torch.ones(1), "unet.conv_in.bias": torch.ones(1)}
    lora = write(tmp_path / "a.safetensors", tensors)
    assert shown(capsys, lora)[-4:] == [
        f"incomplete modules (1): {half}",
        f"unknown tensors (1): {whole}.strange",
        f"duplicate modules (1): {copied}",
        "plain layer weights, not part of a LoRA (2): unet.conv_in.bias, unet.conv_in.weight",
    ]


def test_tensors_that_hold_nan_or_inf_are_named(tmp_path, capsys):
    tensors = blora_modules(CONTENT)
    tensors[f"{KOHYA}.lora_up.weight"][0, 0] = math.nan
    lora = write(tmp_path / "a.safetensors", tensors)
    assert inspected(capsys, lora)[0]["blocks"][0]["change"] is None
    assert shown(capsys, lora)[-1] == f"tensors with NaN or inf (1): {KOHYA}.lora_up.weight"


TAGS = {"a": {"sks": 3, "cat": 1}, "b": {"cat": 7}}
KNOWN = {
    "ss_steps": "3000", "ss_num_train_images": "12", "ss_sd_model_name": "xl.safetensors",
    "ss_training_comment": "None", "ss_tag_frequency": json.dumps(TAGS),
}  # fmt: skip
SHOWN = {
    "base": "sdxl_base_v1-0", "checkpoint": "xl.safetensors", "steps": "3000", "images": "12",
    "trigger_words": {"cat": 8, "sks": 3},
}  # fmt: skip


def test_training_facts_come_from_the_metadata_where_they_are_some(tmp_path, capsys):
    metadata = [METADATA | KNOWN, {}]
    metadata += [{"ss_tag_frequency": t} for t in ("no", "[1]", '{"a": 3}', '{"a": {"b": "c"}}')]
    loras = [
        write(tmp_path / f"{number}.safetensors", lora_module(KOHYA), entries)
        for number, entries in enumerate(metadata)
    ]
    facts = inspected(capsys, *loras)
    assert [fact["file"] for fact in facts] == [str(lora) for lora in loras]
    assert [fact["training"] for fact in facts] == [SHOWN, {}, {}, {}, {}, {}]


# ---- The preview of a cut ------------------------------------------------------------------------

TOO_LARGE = {f"{CONTENT.format(0, 1, 'q')}.lora_up.weight": torch.full((1280, 2), 60000.0).half()}
DORA = {f"{STYLE.format(0, 1, 'q')}.dora_scale": torch.ones(1280, 1)}
CUTS = [
    # what follows "--loras a.safetensors": of these some are refused
    "--traits content", "--alphas 0.5", "--save_precision float", "--no_metadata", "--debug",
    "--output_path new.safetensors", "b.safetensors --traits content style",
    "--traits content style --not_combined", "--blocks OUT00=1 OUT01=0.3",
    "--traits odd", "--traits layout",
    "--traits content content", "--output_path a.safetensors", "--output_path no/a.safetensors",
    "--base_model gone.safetensors", "--alphas 2",
    "b.safetensors --traits content style --alphas 1 0.5",
]  # fmt: skip


@pytest.fixture
def loras(tmp_path, monkeypatch) -> Path:
    """The working directory: two LoRAs, one with a DoRA, and an older slice."""
    monkeypatch.chdir(tmp_path)
    strange = {"strange": torch.zeros(1)} | TOO_LARGE
    write(tmp_path / "a.safetensors", blora_modules(CONTENT, STYLE) | strange)
    write(tmp_path / "b.safetensors", blora_modules(STYLE, rank=3, alpha=2.0) | DORA)
    (tmp_path / "out.safetensors").write_bytes(b"older")
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("options", CUTS)
def test_with_the_options_of_a_cut_it_says_what_the_cut_says_and_would_write(
    loras, capsys, options
):
    options = f"--output_path out.safetensors --loras a.safetensors {options}".split()
    before = contents(loras)
    code = slice_lora(*options, "--inspect")
    shown, said = capsys.readouterr()
    assert slice_lora(*options, "--inspect", "--json") == code
    facts, said_again = capsys.readouterr()
    assert contents(loras) == before
    assert slice_lora(*options) == code
    out, err = capsys.readouterr()
    overwrote = re.findall("^note: overwrote (.*), which was there before\n", err, re.M)
    assert said == said_again == re.sub("(?m)^note: overwrote .*\n", "", err)
    if code:
        assert (shown, facts, out) == ("", "", "")
        return
    kept = re.findall("^-> (.*?): (.*)$", out, re.M)
    cuts = re.findall("^(.* of .*? at .*?): ", out, re.M)
    would = re.findall("^would (write|overwrite) (.*?): (.*?): (.*)$", shown, re.M)
    assert [(path, keeps) for _, path, _, keeps in would] == kept
    assert ", ".join(names for _, _, names, _ in would) == ", ".join(cuts)
    assert [path for way, path, _, _ in would if way == "overwrite"] == overwrote
    for fact in json.loads(facts):
        assert [file["file"] for file in fact["cut"]] == [path for path, _ in kept]
        for file in fact["cut"]:
            assert file["bytes"] == Path(file["file"]).stat().st_size
            assert file["tensors"] == len(stored(Path(file["file"])))


def test_in_json_the_preview_says_what_each_slice_is(loras, capsys):
    options = ("--blocks", "OUT01=1", "--output_path", "new.safetensors")
    [facts] = inspected(capsys, loras / "b.safetensors", *options)
    [file] = facts["cut"]
    assert file["slices"] == [
        {
            "lora": str(loras / "b.safetensors"),
            "keeps": "OUT01=1",
            "strength": 1.0,
            "modules": 8,
        }
    ]
    assert (file["modules"], file["ranks"], file["overwrites"]) == (8, [3], False)


def test_the_preview_stands_under_the_table(loras, capsys):
    lora = write(loras / "c.safetensors", blora_modules(CONTENT, STYLE, LAYOUT))
    table = shown(capsys, lora)
    assert shown(capsys, lora, "--traits", "layout", "style", "--output_path", "x.safetensors") == [
        *table,
        "would write x.safetensors: layout of c.safetensors at 1, style of c.safetensors at 1: "
        "16 modules, 48 tensors, rank 2, 0.2 MB",
        "LBW: 0,0,0,0,1,0,0,1,0,0,0,0",
    ]
