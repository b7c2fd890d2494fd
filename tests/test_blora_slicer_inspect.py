"""--inspect shows what a LoRA file holds, and writes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lora_files import CONTENT, METADATA, STYLE, TE2, blora_modules, change, lora_module, write

import blora_slicer


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """Content of rank 2, style of rank 3, two te2 layers, in fp32."""
    tensors = blora_modules(CONTENT, dtype=torch.float32)
    tensors |= blora_modules(STYLE, rank=3, alpha=2.0, dtype=torch.float32)
    for layer in (0, 5):
        tensors |= lora_module(TE2.format(layer, "q"), dtype=torch.float32)
    return write(tmp_path / "a.safetensors", tensors)


def inspected(capsys, *args: object) -> list[dict]:
    assert blora_slicer.main([str(arg) for arg in (*args, "--inspect", "--json")]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return json.loads(captured.out)


def norm(path: Path, *names: str) -> float:
    return sum(float(change(path, name).square().sum()) for name in names) ** 0.5


def test_each_block_has_a_row_for_each_trait(lora, capsys):
    [facts] = inspected(capsys, "--loras", lora)
    rows = [(row["block"], row["trait"], row["modules"]) for row in facts["blocks"]]
    assert sorted(rows) == [
        ("output_blocks.0.1", "content", 8),
        ("output_blocks.1.1", "style", 8),
        ("te2", "-", 1),
        ("te2", "clip_2_content", 1),
    ]
    style = facts["blocks"][[row[1] for row in rows].index("style")]
    assert (style["algorithm"], style["ranks"], style["alphas"]) == ("LoRA", [3], [2.0])
    assert (style["dtype"], style["bytes"]) == ("F32", 8 * 4 * (3 * 6 + 5 * 3 + 1))


def test_the_change_is_the_frobenius_norm_and_the_shares_add_up(lora, capsys):
    [facts] = inspected(capsys, "--loras", lora)
    rows = {row["trait"]: row for row in facts["blocks"]}
    names = {key.split(".")[0] for key in blora_modules(CONTENT)}
    assert rows["content"]["change"] == pytest.approx(norm(lora, *names), rel=1e-5)
    total = sum(row["change"] ** 2 for row in facts["blocks"])
    for row in facts["blocks"]:
        assert row["share"] == pytest.approx(row["change"] ** 2 / total, rel=1e-6)


def test_the_report_reads_as_a_table_with_bars(lora, capsys):
    assert blora_slicer.main(["--loras", str(lora), "--inspect"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{lora}: 18 modules, 0.0 MB"
    assert lines[1].split() == (
        [
            "block",
            "trait",
            "modules",
            "algorithm",
            "rank",
            "alpha",
            "dtype",
            "size",
            "change",
            "share",
        ]
    )
    [content] = [line for line in lines if line.startswith("output_blocks.0.1")]
    cells = content.split()
    assert cells[:7] == ["output_blocks.0.1", "content", "8", "LoRA", "2", "1", "F32"]
    share = float(cells[10].rstrip("%")) / 100
    assert cells[11] == "#" * round(20 * share)
    assert "base: sdxl_base_v1-0" in lines
    assert "trigger words: sks (3)" in lines


def test_training_facts_come_from_the_metadata(tmp_path, capsys):
    metadata = METADATA | {
        "ss_steps": "3000",
        "ss_num_train_images": "12",
        "ss_sd_model_name": "sdxl.safetensors",
        "ss_training_comment": "None",
        "ss_tag_frequency": json.dumps({"a": {"sks": 3, "cat": 1}, "b": {"cat": 7}}),
    }
    lora = write(tmp_path / "a.safetensors", blora_modules(CONTENT), metadata)
    [facts] = inspected(capsys, "--loras", lora)
    assert facts["training"] == {
        "base": "sdxl_base_v1-0",
        "checkpoint": "sdxl.safetensors",
        "steps": "3000",
        "images": "12",
        "trigger_words": {"cat": 8, "sks": 3},
    }


@pytest.mark.parametrize("text", ["no json", "[1]", '{"a": 3}', '{"a": {"b": "c"}}'])
def test_a_strange_tag_frequency_is_passed_over(tmp_path, capsys, text):
    lora = write(tmp_path / "a.safetensors", blora_modules(CONTENT), {"ss_tag_frequency": text})
    [facts] = inspected(capsys, "--loras", lora)
    assert facts["training"] == {}


def test_tensors_that_hold_nan_or_inf_are_named(tmp_path, capsys):
    tensors = blora_modules(CONTENT)
    broken = [f"{CONTENT.format(0, a, 'q')}.lora_up.weight" for a in (1, 2)]
    tensors[broken[0]][0, 0] = float("nan")
    tensors[broken[1]][0, 0] = float("inf")
    lora = write(tmp_path / "a.safetensors", tensors)
    [facts] = inspected(capsys, "--loras", lora)
    assert facts["not_finite"] == broken
    assert facts["blocks"][0]["change"] is None
    assert blora_slicer.main(["--loras", str(lora), "--inspect"]) == 0
    assert f"NaN or inf in 2 tensors: {', '.join(broken)}" in capsys.readouterr().out


def test_an_ordinary_lora_is_shown_too_with_what_no_trait_keeps(tmp_path, capsys):
    tensors = blora_modules(CONTENT)
    tensors |= lora_module("lora_unet_output_blocks_0_1_proj_in")
    tensors |= lora_module("lora_unet_mid_block_attentions_0_proj_in")
    tensors |= {"strange": torch.zeros(1)}
    [facts] = inspected(capsys, "--loras", write(tmp_path / "a.safetensors", tensors))
    rows = {(row["block"], row["trait"]): row["modules"] for row in facts["blocks"]}
    assert rows == {
        ("output_blocks.0.1", "content"): 8,
        ("output_blocks.0.1", "-"): 1,
        ("middle_block.1", "-"): 1,
    }
    assert facts["unplaced"] == ["strange"]


def test_several_files_are_shown_one_after_the_other(lora, tmp_path, capsys):
    other = write(tmp_path / "b.safetensors", blora_modules(STYLE))
    assert [facts["file"] for facts in inspected(capsys, "--loras", lora, other)] == [
        str(lora),
        str(other),
    ]


def test_it_writes_nothing(lora, capsys):
    before = {path: path.read_bytes() for path in lora.parent.iterdir()}
    inspected(capsys, "--loras", lora)
    assert {path: path.read_bytes() for path in lora.parent.iterdir()} == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--inspect", "--traits", "style"], "--inspect writes nothing: leave out --traits"),
        (["--inspect", "--alphas", "0.5"], "--inspect writes nothing: leave out --alphas"),
        (["--json"], "--json: only --inspect has something to show as JSON, add it"),
    ],
)
def test_options_that_do_not_go_with_it_exit_2(lora, capsys, args, message):
    with pytest.raises(SystemExit) as stop:
        blora_slicer.main(["--loras", str(lora), *args])
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith(f"blora_slicer.py: error: {message}\n")
