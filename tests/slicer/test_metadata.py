"""A slice says what it is: metadata, hashes, and the order of bytes in the file."""

from __future__ import annotations

import hashlib
import json
import re
import struct
import time
from io import BytesIO
from pathlib import Path

import pytest
import safetensors.torch
import torch
from lora_files import CONTENT, METADATA, STYLE, blora_modules, lora_module, write
from safetensors import safe_open
from safetensors.torch import load_file
from slicing import LOOKS, cut, stored


def cut_metadata(*args: object) -> dict[str, str]:
    with safe_open(cut(*args), "np") as file:
        return file.metadata()


def joined(first: Path, one: dict[str, str], second: Path, other: dict[str, str]) -> dict[str, str]:
    """The metadata of content at 1 of one file and style at 0.5 of another."""
    write(first, blora_modules(CONTENT), one)
    write(second, blora_modules(STYLE), other)
    return cut_metadata(first, second, "--traits", "content", "style", "--alphas", "1", "0.5")


def test_the_sources_metadata_is_kept_and_the_slice_says_what_it_is(tmp_path):
    lora = write(tmp_path / "parent.safetensors", blora_modules(CONTENT, STYLE, alpha=2.0))
    metadata = cut_metadata(lora, "--traits", "content", "style", "--alphas", "0.5")
    date = metadata.pop("modelspec.date")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", date)
    own = ("sshs_model_hash", "sshs_legacy_hash")
    stale = (*own, "modelspec.hash_sha256")
    kept = {key: value for key, value in METADATA.items() if key not in stale}
    comment = "content of parent.safetensors at 0.5, style of parent.safetensors at 1"
    new = {
        **{"ss_output_name": "out", "ss_network_dim": "2", "ss_network_alpha": "2"},
        **{"modelspec.title": "out", "modelspec.merged_from": "parent"},
        "ss_training_comment": comment,
    }
    assert {key: value for key, value in metadata.items() if key not in own} == kept | new


ARCHITECTURE = {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}
SDXL = ARCHITECTURE | {"ss_base_model_version": "sdxl_base_v1-0"}
OTHERS = {"format": "pt", "lora_adapter_metadata": "{}"}
LYCORIS = {"modelspec.architecture": "stable-diffusion-xl-v1-base/lycoris"}
SEED = {"ss_seed": "1"}
COMMENT, CUT = "ss_training_comment", "content of a.safetensors at 1"
SOURCES: dict[str, tuple[dict[str, str] | None, dict[str, str | None]]] = {
    # its metadata, and what those of a slice then have; None is nothing
    "a comment": ({COMMENT: "of my cat"}, {COMMENT: f"{CUT}; of my cat"}),
    "sd-scripts' word for no comment": ({COMMENT: "None"}, {COMMENT: CUT}),
    "no metadata": (None, {"ss_network_dim": "2", "ss_network_alpha": "1"} | SDXL),
    "those of other programs": (OTHERS | SEED, dict.fromkeys(OTHERS) | SEED),
    "an architecture": (LYCORIS, LYCORIS),
}


@pytest.mark.parametrize(("source", "wanted"), SOURCES.values(), ids=SOURCES)
def test_what_a_slice_says_goes_by_what_its_source_says(tmp_path, source, wanted):
    metadata = cut_metadata(write(tmp_path / "a.safetensors", blora_modules(CONTENT), source))
    assert {key: metadata.get(key) for key in wanted} == wanted


@pytest.mark.parametrize(("count", "length"), [(1, 20_000_000), (100, 100_000), (40_000, 70)])
def test_the_longest_entries_go_where_the_header_would_pass_1_mib(tmp_path, capsys, count, length):
    long = {f"ss_{n}": "x" * length for n in range(count)}
    lora = write(tmp_path / "a.safetensors", blora_modules(CONTENT), long | SEED)
    started = time.monotonic()
    metadata = cut_metadata(lora)
    assert time.monotonic() - started < 10
    assert metadata["ss_seed"] == "1"
    assert int.from_bytes((tmp_path / "out.safetensors").read_bytes()[:8], "little") < 1 << 20
    left_out = len(long.keys() - metadata.keys())
    start = f"note: left out metadata that makes the header too long ({left_out}): ss_"
    err = capsys.readouterr().err
    assert err.startswith(start) and err.count("\n") == 1


@pytest.mark.parametrize(
    ("rank", "alpha", "dim", "told"),
    # under one alpha in the file, which is why it is not dynamic
    [(2, 2.0, "2", "2"), (3, 2.0, "Dynamic", "2"), (3, 1.0, "Dynamic", "1")],
)
def test_rank_and_alpha_are_true_or_dynamic(tmp_path, rank, alpha, dim, told):
    a = write(tmp_path / "a.safetensors", blora_modules(CONTENT, alpha=2.0))
    b = write(tmp_path / "b.safetensors", blora_modules(STYLE, rank=rank, alpha=alpha))
    metadata = cut_metadata(a, b, "--traits", "content", "style")
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == (dim, told)


def test_what_two_sources_agree_on_is_kept_and_what_differs_is_said_for_each(tmp_path):
    shared = {"ss_base_model_version": "sdxl_base_v1-0", "ss_steps": "3000"}
    a = {**shared, **ARCHITECTURE, **SEED, "ss_tag_frequency": '{"images": {"cat": 3}}'}
    b = {**shared, "ss_seed": "2", "ss_tag_frequency": '{"images": {"ink": 4}}'}
    metadata = joined(tmp_path / "a.safetensors", a, tmp_path / "b.safetensors", b)
    assert metadata["ss_steps"] == "3000"
    assert "ss_seed" not in metadata
    assert metadata.items() > ARCHITECTURE.items()  # though only one of them says it
    assert json.loads(metadata["ss_blora_sources"]) == [
        {"file": "a.safetensors", **ARCHITECTURE, **SEED},
        {"file": "b.safetensors", "ss_seed": "2"},
    ]
    words = {"a/images": {"cat": 3}, "b/images": {"ink": 4}}
    assert json.loads(metadata["ss_tag_frequency"]) == words
    assert metadata["modelspec.merged_from"] == "a, b"
    comment = "content of a.safetensors at 1, style of b.safetensors at 0.5"
    assert metadata["ss_training_comment"] == comment


def test_words_of_two_sources_of_one_name_under_one_folder_are_all_kept(tmp_path):
    """As trainers leave them: each training in a folder of its own, each LoRA by the same name."""
    cat, ink = ({"ss_tag_frequency": f'{{"images": {{"{word}": 3}}}}'} for word in ("cat", "ink"))
    (tmp_path / "ink").mkdir()
    own, other = (folder / "last.safetensors" for folder in (tmp_path, tmp_path / "ink"))
    metadata = joined(own, cat, other, ink)
    words = {"last 1/images": {"cat": 3}, "last 2/images": {"ink": 3}}
    assert json.loads(metadata["ss_tag_frequency"]) == words


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
@pytest.mark.parametrize("rank", [2, 40], ids=["0.1 MB", "1.8 MB"])
def test_both_hashes_are_those_that_kohya_computes(tmp_path, rank, strength):
    tensors = blora_modules(CONTENT, STYLE, rank=rank, dtype=torch.float16)
    metadata = {"ss_training_comment": 'a "quoted" ü \u2028 line\n', "modelspec.title": "é" * 50}
    output = cut(write(tmp_path / "a.safetensors", tensors, metadata), "--alphas", strength)
    with safe_open(output, "np") as file:
        found = file.metadata()
    assert (found["sshs_model_hash"], found["sshs_legacy_hash"]) == kohya_hashes(output)
    content = output.read_bytes()
    data = content[8 + int.from_bytes(content[:8], "little") :]
    assert found["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    # The shorter file ends before what the older hash is of, the longer one after it.
    assert (found["sshs_legacy_hash"] == "e3b0c442") == (rank == 2)
    assert len(content) < 0x100000 if rank == 2 else len(content) > 0x110000


def test_the_file_is_laid_out_as_safetensors_lays_it_out(tmp_path):
    mixed = blora_modules(CONTENT)
    mixed[f"{CONTENT.format(0, 1, 'q')}.alpha"] = torch.tensor(1.0)
    mixed[f"{CONTENT.format(0, 1, 'v')}.alpha"] = torch.tensor(True)
    mixed[f"{CONTENT.format(0, 1, 'k')}.alpha"] = torch.tensor(1, dtype=torch.int64)
    output = cut(write(tmp_path / "mixed.safetensors", mixed), "--no_metadata")
    assert output.read_bytes() == safetensors.torch.save(load_file(output))


NAME, OTHER = CONTENT.format(0, 1, "q"), STYLE.format(0, 1, "q")
DEEP, LONG = "[" * 100_000, '{"a":' * 100_000
VALUES = [
    "", "null", "1", "[]", "{}", "{", "x", "NaN", "1e999", '"a"', "1" * 5000, DEEP, LONG,
    '{"a": null}', '{"a": {"b": null}}', '{"a": {"b": 1e999}}', '{"a": {"b": 5' + "0" * 4000 + "}}",
    '{"a": {"b": -1}}', '{"a": {"\\ud800": 1}}', "\u2028",
]  # fmt: skip
KEYS = [
    "ss_tag_frequency", "ss_network_dim", "ss_network_alpha", "ss_training_comment",
    "ss_base_model_version", "modelspec.title", "ss_steps",
]  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_metadata_that_is_not_what_it_should_be_does_no_harm(slicer, key):
    tensors = lora_module(NAME, alpha=None)
    sound = write(slicer.folder / "sound.safetensors", lora_module(OTHER))
    failures = []
    for value in VALUES:
        lora = write(slicer.folder / "metadata.safetensors", tensors, {key: value})
        for way in ([sound, "--traits", "content", "style"], *LOOKS, []):
            if slicer(lora, *way) != 0:
                failures.append(f"{value[:60]} {way}: {slicer.err[:200]}")
        alpha = {f"{NAME}.alpha": ("F32", [], struct.pack("<f", 2))}
        assert stored(slicer.output) == stored(lora) | alpha
    assert failures == []


UNREADABLE = "cannot read lora_adapter_metadata of {lora}"
NO_NUMBER = f"lora_adapter_metadata gives {NAME} an alpha that is not a number"
PEFT = {
    # settings: the alpha of a module of rank 2, or the refusal
    **dict.fromkeys(
        ["", "null", "1", "[]", "{", "x", "NaN", "1e999", '"a"', "1" * 5000, DEEP, LONG, "\u2028"],
        UNREADABLE,
    ),
    "{}": 2.0,
    '{"a": null}': 2.0,
    **{
        f'{{"unet.lora_alpha": {value}}}': NO_NUMBER
        for value in ("null", "[]", "NaN", "1e999", "1e39", "1" + "0" * 400)
    },
    '{"unet.lora_alpha": "8"}': 8.0,
    '{"unet.lora_alpha": 0}': 0.0,
    '{"unet.lora_alpha": true}': 1.0,
    **{
        f'{{"unet.lora_alpha": 4, "unet.alpha_pattern": {pattern}}}': alpha
        for pattern, alpha in {
            "4": 4.0,
            "[4]": 4.0,
            '{"": 8}': 4.0,
            '{"to_q": 8}': 8.0,
            '{"to_k|to_q": 8}': 8.0,
            '{"to_q|x.to_k": 8}': 8.0,
            **dict.fromkeys(('{"to_q": null}', '{"to_q": "x"}'), NO_NUMBER),
            '{"(": 8}': (
                'alpha_pattern in lora_adapter_metadata has the pattern "(", which is not read: '
                "write the layers' names"
            ),
        }.items()
    },
    '{"unet.lora_alpha": 4, "unet.r": null}': 4.0,
    '{"unet.lora_alpha": 4, "unet.use_rslora": "x"}': 4 * 2**0.5,
}


@pytest.mark.parametrize(("settings", "outcome"), PEFT.items(), ids=lambda value: str(value)[:60])
def test_pefts_settings_are_read_as_peft_writes_them_or_refused(slicer, settings, outcome):
    layer = "unet.up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    factors = lora_module(NAME, alpha=None)
    tensors = {
        f"{layer}.lora_A.weight": factors[f"{NAME}.lora_down.weight"],
        f"{layer}.lora_B.weight": factors[f"{NAME}.lora_up.weight"],
    }
    lora = slicer.folder / "peft.safetensors"
    write(lora, tensors, {"lora_adapter_metadata": settings})
    if isinstance(outcome, str):
        assert slicer.refuses(lora) == outcome.format(lora=lora)
        return
    assert slicer(lora) == 0
    assert load_file(slicer.output)[f"{NAME}.alpha"].item() == pytest.approx(outcome)
