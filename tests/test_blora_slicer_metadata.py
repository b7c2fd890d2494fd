"""A slice says what it is: metadata, hashes, and the order of bytes in the file."""

from __future__ import annotations

import hashlib
import json
from io import BytesIO
from pathlib import Path

import pytest
import safetensors.torch
import torch
from lora_files import CONTENT, METADATA, STYLE, blora_modules, write
from safetensors import safe_open
from safetensors.torch import load_file

import blora_slicer


def cut(output: Path, *args: object) -> dict[str, str] | None:
    """Cut into the output and hand back its metadata."""
    words = [str(arg) for arg in ("--output_path", output, "--loras", *args)]
    assert blora_slicer.main(words) == 0
    with safe_open(output, "pt") as file:
        return file.metadata()


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return write(tmp_path / "parent.safetensors", blora_modules(CONTENT, STYLE, alpha=2.0))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "slice.safetensors"


def test_the_sources_metadata_is_kept_and_the_slice_says_what_it_is(lora, output):
    metadata = cut(output, lora, "--alphas", "0.5")
    own = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.date", "modelspec.hash_sha256")
    kept = {key: value for key, value in METADATA.items() if key not in own}
    new = {
        "ss_output_name": "slice",
        "ss_network_dim": "2",
        "ss_network_alpha": "2",
        "ss_training_comment": "content of parent.safetensors at 0.5",
        "modelspec.title": "slice",
        "modelspec.merged_from": "parent",
    }
    assert {key: value for key, value in metadata.items() if key not in own} == kept | new
    assert "modelspec.hash_sha256" not in metadata
    assert len(metadata["modelspec.date"]) == len("2026-01-31T12:34:56")


@pytest.mark.parametrize(("comment", "behind"), [("of my cat", "; of my cat"), ("None", "")])
def test_a_comment_of_the_source_stands_behind_the_cut(tmp_path, output, comment, behind):
    tensors = blora_modules(CONTENT)
    lora = write(tmp_path / "a.safetensors", tensors, {"ss_training_comment": comment})
    metadata = cut(output, lora)
    assert metadata["ss_training_comment"] == f"content of a.safetensors at 1{behind}"


def test_a_source_without_metadata_gives_a_slice_that_is_known_as_sdxl(tmp_path, output):
    metadata = cut(output, write(tmp_path / "bare.safetensors", blora_modules(CONTENT), None))
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert metadata["ss_network_dim"] == "2"
    assert metadata["ss_network_alpha"] == "1"


def test_foreign_metadata_is_left_out(tmp_path, output):
    foreign = {"format": "pt", "lora_adapter_metadata": "{}", "ss_seed": "1"}
    metadata = cut(output, write(tmp_path / "a.safetensors", blora_modules(CONTENT), foreign))
    assert not {"format", "lora_adapter_metadata"} & set(metadata)
    assert metadata["ss_seed"] == "1"


def test_no_metadata_writes_none_at_all(lora, output):
    assert cut(output, lora, "--no_metadata") is None


@pytest.mark.parametrize(
    ("other", "dim", "alpha"),
    [
        ({"rank": 2, "alpha": 2.0}, "2", "2"),
        ({"rank": 3, "alpha": 2.0}, "Dynamic", "2"),
        # under one alpha, which is why it is not dynamic
        ({"rank": 3, "alpha": 1.0}, "Dynamic", "1"),
    ],
)
def test_rank_and_alpha_are_true_or_dynamic(lora, tmp_path, output, other, dim, alpha):
    second = write(tmp_path / "b.safetensors", blora_modules(STYLE, **other))
    metadata = cut(output, lora, second, "--traits", "content", "style")
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == (dim, alpha)


def test_what_two_sources_agree_on_is_kept_and_what_differs_is_said_for_each(tmp_path, output):
    shared = {"ss_base_model_version": "sdxl_base_v1-0", "ss_steps": "3000"}
    a = {**shared, "ss_seed": "1", "ss_tag_frequency": '{"images": {"cat": 3}}'}
    b = {**shared, "ss_seed": "2", "ss_tag_frequency": '{"images": {"ink": 4}}'}
    loras = [
        write(tmp_path / "a.safetensors", blora_modules(CONTENT), a),
        write(tmp_path / "b.safetensors", blora_modules(STYLE), b),
    ]
    metadata = cut(output, *loras, "--traits", "content", "style", "--alphas", "1", "0.5")
    assert metadata["ss_steps"] == "3000"
    assert "ss_seed" not in metadata
    assert json.loads(metadata["ss_blora_sources"]) == [
        {"file": "a.safetensors", "ss_seed": "1"},
        {"file": "b.safetensors", "ss_seed": "2"},
    ]
    assert json.loads(metadata["ss_tag_frequency"]) == {
        "a/images": {"cat": 3},
        "b/images": {"ink": 4},
    }
    assert metadata["modelspec.merged_from"] == "a, b"
    comment = "content of a.safetensors at 1, style of b.safetensors at 0.5"
    assert metadata["ss_training_comment"] == comment


def test_two_slices_of_one_source_are_of_one_source(lora, output):
    metadata = cut(output, lora, "--traits", "content", "style")
    assert metadata["modelspec.merged_from"] == "parent"
    assert metadata["ss_tag_frequency"] == METADATA["ss_tag_frequency"]


def test_the_longest_entries_go_where_the_header_would_pass_1_mib(tmp_path, output, capsys):
    long = {"ss_tag_frequency": "x" * 2_000_000, "ss_seed": "1"}
    metadata = cut(output, write(tmp_path / "a.safetensors", blora_modules(CONTENT), long))
    assert "ss_tag_frequency" not in metadata
    assert metadata["ss_seed"] == "1"
    assert int.from_bytes(output.read_bytes()[:8], "little") < 1 << 20
    err = capsys.readouterr().err
    assert err == "note: left out, as the header would be too long: ss_tag_frequency\n"


def kohya_hashes(path: Path) -> tuple[str, str]:
    """Both hashes as sd-scripts' precalculate_safetensors_hashes defines them."""
    with safe_open(path, "pt") as file:
        metadata = {k: v for k, v in file.metadata().items() if k.startswith("ss_")}
    saved = BytesIO(safetensors.torch.save(load_file(path), metadata))
    length = int.from_bytes(saved.read(8), "little")
    saved.seek(8 + length)
    model = hashlib.sha256(saved.read()).hexdigest()
    saved.seek(0x100000)
    return model, hashlib.sha256(saved.read(0x10000)).hexdigest()[:8]


@pytest.mark.parametrize("strength", ["1", "0.5"])
@pytest.mark.parametrize("rank", [2, 20], ids=["200 KB", "2 MB"])
def test_both_hashes_are_those_that_kohya_computes(tmp_path, output, rank, strength):
    tensors = blora_modules(CONTENT, STYLE, rank=rank, dtype=torch.float16)
    metadata = {"ss_training_comment": 'a "quoted" ü \u2028 line\n', "modelspec.title": "é" * 50}
    lora = write(tmp_path / "a.safetensors", tensors, metadata)
    found = cut(output, lora, "--alphas", strength)
    assert (found["sshs_model_hash"], found["sshs_legacy_hash"]) == kohya_hashes(output)
    content = output.read_bytes()
    data = content[8 + int.from_bytes(content[:8], "little") :]
    assert found["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    assert (found["sshs_legacy_hash"] == "e3b0c442") == (len(content) < 0x100000)


def test_the_file_is_laid_out_as_safetensors_lays_it_out(tmp_path, output):
    tensors = blora_modules(CONTENT, dtype=torch.float16)
    mixed = {
        key: tensor.to(torch.float32) if "to_q.alpha" in key else tensor
        for key, tensor in tensors.items()
    }
    mixed[f"{CONTENT.format(0, 1, 'v')}.on_input"] = torch.tensor(True)
    mixed[f"{CONTENT.format(0, 1, 'k')}.alpha"] = torch.tensor(1, dtype=torch.int64)
    cut(output, write(tmp_path / "mixed.safetensors", mixed), "--no_metadata")
    assert output.read_bytes() == safetensors.torch.save(load_file(output))


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("float", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)],
)
@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_save_precision_rounds_as_torch_does(tmp_path, output, source, precision, dtype):
    tensors = blora_modules(CONTENT, dtype=source)
    lora = write(tmp_path / "a.safetensors", tensors)
    cut(output, lora, "--save_precision", precision)
    kept = load_file(output)
    assert all(torch.equal(kept[key], tensors[key].to(dtype)) for key in tensors)


@pytest.mark.parametrize(
    ("value", "alphas", "precision"),
    [(1e5, "1", "fp16"), (-65519.0, "1.5", None), (60000.0, "2", None)],
)
def test_overflow_on_the_way_to_fp16_is_an_error_that_names_the_module(
    tmp_path, output, capsys, value, alphas, precision
):
    name = CONTENT.format(0, 1, "q")
    tensors = blora_modules(CONTENT, dtype=torch.float32 if precision else torch.float16)
    tensors[f"{name}.lora_up.weight"][0, 0] = value
    lora = write(tmp_path / "a.safetensors", tensors)
    args = ["--loras", str(lora), "--alphas", alphas, "--output_path", str(output)]
    assert blora_slicer.main(args + (["--save_precision", precision] if precision else [])) == 1
    assert capsys.readouterr().err == (
        f"error: {name}.lora_up.weight has values that F16 cannot hold: lower --alphas, or use "
        "--save_precision float\n"
    )
    assert not output.exists()


def test_inf_and_nan_of_the_source_are_kept(tmp_path, output):
    tensors = blora_modules(CONTENT, dtype=torch.float32)
    up = tensors[f"{CONTENT.format(0, 1, 'q')}.lora_up.weight"]
    up[0, 0], up[0, 1] = float("inf"), float("nan")
    lora = write(tmp_path / "a.safetensors", tensors)
    for precision in ("fp16", "bf16"):
        cut(output, lora, "--alphas", "0.5", "--save_precision", precision)
        kept = load_file(output)[f"{CONTENT.format(0, 1, 'q')}.lora_up.weight"]
        assert kept[0, 0] == float("inf")
        assert kept[0, 1].isnan()
