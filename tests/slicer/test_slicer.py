"""What blora_slicer.py promises, on small real LoRA files."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kohya_folder import BASH, install
from lora_files import CONTENT, LAYOUT, STYLE, TE2, blora_modules, change, lora_module
from lora_files import write as write_lora
from safetensors.torch import load_file
from slicing import all_traits, modules, refusal, slice_lora, stored

import blora
import blora_slicer

SCRIPT = Path(blora_slicer.__file__)


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """A B-LoRA of content and style: 16 modules, rank 2, alpha 1, fp16."""
    return write_lora(tmp_path / "parent.safetensors", blora_modules(CONTENT, STYLE))


def names(template: str) -> set[str]:
    return {key.split(".")[0] for key in blora_modules(template)}


# ---- What is kept --------------------------------------------------------------------------------


def test_content_is_kept_by_default(lora, output):
    assert slice_lora("--loras", lora, "--output_path", output) == 0
    assert modules(output) == names(CONTENT)


@pytest.mark.parametrize(
    ("trait", "kept"),
    [("content", CONTENT), ("style", STYLE), ("layout", LAYOUT)],
)
def test_a_trait_keeps_the_attention_of_its_block_and_nothing_else(tmp_path, output, trait, kept):
    block = kept.split("transformer")[0]
    tensors = blora_modules(CONTENT, STYLE, LAYOUT)
    tensors |= lora_module(f"{block}transformer_blocks_0_ff_net_0_proj")
    tensors |= lora_module(f"{block}proj_in") | lora_module(f"{block}proj_out")
    tensors |= lora_module("lora_unet_output_blocks_2_1_transformer_blocks_0_attn1_to_q")
    lora = write_lora(tmp_path / "full.safetensors", tensors)
    assert slice_lora("--loras", lora, "--traits", trait, "--output_path", output) == 0
    assert modules(output) == names(kept)


def test_clip_2_content_keeps_layer_0_of_the_second_text_encoder(tmp_path, output):
    tensors = blora_modules(CONTENT)
    for layer in (0, 1, 10):
        tensors |= lora_module(TE2.format(layer, "q"))
    tensors |= lora_module(TE2.format(0, "q").replace("te2", "te1"))
    lora = write_lora(tmp_path / "clip.safetensors", tensors)
    assert slice_lora("--loras", lora, "--traits", "clip_2_content", "--output_path", output) == 0
    assert modules(output) == {TE2.format(0, "q")}


def test_a_kept_module_keeps_every_tensor_to_the_byte(tmp_path, output):
    tensors = blora_modules(CONTENT, STYLE, alpha=0.3, dtype=torch.bfloat16)
    lora = write_lora(tmp_path / "bf16.safetensors", tensors)
    assert slice_lora("--loras", lora, "--output_path", output) == 0
    kept = load_file(output)
    assert set(kept) == set(blora_modules(CONTENT))
    assert all(torch.equal(kept[key], tensors[key]) for key in kept)
    assert {t.dtype for t in kept.values()} == {torch.bfloat16}


def test_a_blacklist_of_alpha_in_an_old_traits_file_drops_no_alpha(lora, output, tmp_path):
    old = {
        "content": {
            "whitelist": ["lora_unet_output_blocks_0_1_"],
            "blacklist": ["ff_net", "proj_in", "proj_out", "alpha"],
        }
    }
    traits = tmp_path / "old_traits.json"
    traits.write_text(json.dumps(old))
    assert slice_lora("--loras", lora, "--traits_file", traits, "--output_path", output) == 0
    assert set(load_file(output)) == set(blora_modules(CONTENT))


def test_a_trait_of_ones_own_is_used_by_name(lora, output, tmp_path):
    traits = tmp_path / "traits.json"
    traits.write_text('\ufeff{"queries": {"whitelist": ["_to_q"]}}', encoding="utf-8")
    args = ("--traits", "queries", "--traits_file", traits, "--output_path", output)
    assert slice_lora("--loras", lora, *args) == 0
    assert modules(output) == {n for n in names(CONTENT) | names(STYLE) if n.endswith("to_q")}


# ---- Strength ------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [None, 0.5, 2.0, 8.0])
@pytest.mark.parametrize("strength", [0.5, -1.0, 0.0, 1.7])
def test_the_change_is_multiplied_by_the_strength_once(tmp_path, output, alpha, strength):
    tensors = blora_modules(CONTENT, alpha=alpha, dtype=torch.float32)
    lora = write_lora(tmp_path / "lora.safetensors", tensors)
    assert slice_lora("--loras", lora, "--alphas", strength, "--output_path", output) == 0
    for module in names(CONTENT):
        before = change(lora, module)
        error = change(output, module) - strength * before
        assert error.norm() < 1e-6 * before.norm()


def test_only_lora_up_carries_the_strength(lora, output):
    assert slice_lora("--loras", lora, "--alphas", "0.5", "--output_path", output) == 0
    before, after = stored(lora), stored(output)
    changed = {key for key in after if after[key] != before[key]}
    assert changed == {key for key in after if key.endswith(".lora_up.weight")}


def test_a_locon_module_with_a_mid_weight_is_scaled_once(tmp_path, output):
    name = "lora_unet_output_blocks_0_0_in_layers_2"  # from 2560 to 1280 channels
    locon = {
        f"{name}.lora_down.weight": torch.randn(2, 2560, 1, 1),
        f"{name}.lora_mid.weight": torch.randn(2, 2, 3, 3),
        f"{name}.lora_up.weight": torch.randn(1280, 2, 1, 1),
        f"{name}.alpha": torch.tensor(1.0),
    }
    lora = write_lora(tmp_path / "locon.safetensors", locon)
    args = ("--traits", "all", "--traits_file", all_traits(tmp_path), "--alphas", "0.5")
    assert slice_lora("--loras", lora, *args, "--output_path", output) == 0
    up = f"{name}.lora_up.weight"
    assert torch.equal(load_file(output)[up], locon[up] * 0.5)
    assert all(torch.equal(load_file(output)[k], locon[k]) for k in locon if k != up)


@pytest.mark.parametrize(
    ("suffix", "shape"), [("diff", (1280, 1280)), ("diff_b", (1280,)), ("b_norm", (1280,))]
)
def test_a_change_that_is_added_beside_the_factors_is_multiplied_too(
    tmp_path, output, suffix, shape
):
    key = f"{(name := CONTENT.format(0, 1, 'q'))}.{suffix}"
    tensors = lora_module(name, dtype=torch.float32) | {key: torch.ones(shape)}
    lora = write_lora(tmp_path / "added.safetensors", tensors)
    assert slice_lora("--loras", lora, "--alphas", "0.5", "--output_path", output) == 0
    assert torch.equal(load_file(output)[key], torch.full(shape, 0.5))


@pytest.mark.parametrize("strength", ["-1e-5", "-.5", "-2"])
def test_a_negative_strength_is_a_number_however_it_is_written(tmp_path, output, strength):
    lora = write_lora(
        tmp_path / "a.safetensors", blora_modules(CONTENT, STYLE, dtype=torch.float32)
    )
    args = ("--traits", "content", "style", "--alphas", "0.5", strength, "--output_path", output)
    assert slice_lora("--loras", lora, *args) == 0
    style = STYLE.format(0, 1, "q")
    wanted = float(strength) * change(lora, style)
    assert (change(output, style) - wanted).norm() < 1e-6 * wanted.norm()


def test_fp16_is_scaled_in_fp32_and_rounded_once(lora, output):
    assert slice_lora("--loras", lora, "--alphas", "0.3", "--output_path", output) == 0
    for key, tensor in load_file(output).items():
        if key.endswith(".lora_up.weight"):
            expected = (load_file(lora)[key].float() * 0.3).half()
            assert torch.equal(tensor, expected)


def test_a_dora_is_kept_at_1_and_refused_at_another_strength(tmp_path, output, capsys):
    name = CONTENT.format(0, 1, "q")
    dora = lora_module(name) | {f"{name}.dora_scale": torch.ones(1280, 1)}
    lora = write_lora(tmp_path / "dora.safetensors", dora)
    assert slice_lora("--loras", lora, "--output_path", output) == 0
    assert stored(output) == stored(lora)
    capsys.readouterr()
    assert slice_lora("--loras", lora, "--alphas", "0.5", "--output_path", output) == 1
    assert capsys.readouterr().err == (
        f"error: cannot rescale {name} in {lora}, because it is DoRA and "
        "it needs the weights it was trained on: give the checkpoint as --base_model, or cut it "
        "at 1.0 and set the strength where the LoRA is used\n"
    )


# ---- Several LoRAs, several traits ---------------------------------------------------------------


def test_content_of_one_joins_style_of_another(tmp_path, output):
    a = write_lora(tmp_path / "a.safetensors", blora_modules(CONTENT, STYLE, rank=2))
    b = write_lora(tmp_path / "b.safetensors", blora_modules(CONTENT, STYLE, rank=3))
    args = ("--traits", "content", "style", "--alphas", "1", "0.5")
    assert slice_lora("--loras", a, b, *args, "--output_path", output) == 0
    assert modules(output) == names(CONTENT) | names(STYLE)
    content, style = CONTENT.format(0, 1, "q"), STYLE.format(0, 1, "q")
    assert torch.equal(change(output, content), change(a, content))
    torch.testing.assert_close(change(output, style), 0.5 * change(b, style), rtol=1e-3, atol=0)


PAIRS = [
    # LoRAs, traits, alphas, the cuts they make
    ("a", "", "", "a:content:1"),
    ("a", "style", "", "a:style:1"),
    ("a", "content style", "", "a:content:1 a:style:1"),
    ("a b", "", "", "a:content:1 b:content:1"),
    ("a b", "style", "", "a:style:1 b:content:1"),
    ("a b", "content style", "0.5", "a:content:0.5 b:style:1"),
    ("a b", "content style layout", "0.5 2 -1", "a:content:0.5 b:style:2 b:layout:-1"),
]


@pytest.mark.parametrize(("loras", "traits", "alphas", "cuts"), PAIRS)
def test_loras_traits_and_alphas_pair_by_order(
    tmp_path, output, capsys, loras, traits, alphas, cuts
):
    for name in loras.split():
        write_lora(tmp_path / name, blora_modules(CONTENT, STYLE, LAYOUT, rank=1))
    options = [("--traits", traits), ("--alphas", alphas)]
    args = [word for option, text in options if text for word in (option, *text.split())]
    args += ["--not_combined", "--output_path", output]
    assert slice_lora("--loras", *(tmp_path / name for name in loras.split()), *args) == 0
    said = re.findall(r"^(\w+) of (\w+) at (\S+):", capsys.readouterr().out, re.M)
    assert [f"{lora}:{trait}:{strength}" for trait, lora, strength in said] == cuts.split()


def test_not_combined_writes_one_file_for_each_trait_beside_the_output_path(lora, output):
    args = ("--traits", "content", "style", "--not_combined", "--output_path", output)
    assert slice_lora("--loras", lora, *args) == 0
    assert modules(output.with_name("slice_content.safetensors")) == names(CONTENT)
    assert modules(output.with_name("slice_style.safetensors")) == names(STYLE)
    assert not output.exists()


def test_a_trait_whose_name_is_no_file_name_is_written_under_one(lora, output, tmp_path):
    traits = tmp_path / "traits.json"
    traits.write_text('{"a/b: c": {"whitelist": ["_to_q"]}}')
    args = ("--traits", "a/b: c", "--traits_file", traits, "--not_combined")
    assert slice_lora("--loras", lora, *args, "--output_path", output) == 0
    assert output.with_name("slice_a_b_c.safetensors").is_file()


def test_not_combined_adds_the_lora_to_the_name_where_two_give_the_same_trait(tmp_path, output):
    for name in ("a", "b"):
        write_lora(tmp_path / f"{name}.safetensors", blora_modules(CONTENT))
    loras = (tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert slice_lora("--loras", *loras, "--not_combined", "--output_path", output) == 0
    assert sorted(path.name for path in tmp_path.glob("slice*")) == [
        "slice_content_a.safetensors",
        "slice_content_b.safetensors",
    ]


# ---- What is said --------------------------------------------------------------------------------


def test_it_says_at_the_end_what_was_kept(lora, output, capsys):
    assert slice_lora("--loras", lora, "--alphas", "0.5", "--output_path", output) == 0
    size = f"{output.stat().st_size / 1e6:.1f}"
    assert capsys.readouterr().out.splitlines() == [
        "content of parent.safetensors at 0.5: 8 modules, 24 tensors, rank 2",
        f"-> {output}: 8 modules, 24 tensors, rank 2, {size} MB",
    ]


def test_debug_names_each_kept_module_on_stderr(lora, output, capsys):
    assert slice_lora("--loras", lora, "--debug", "--output_path", output) == 0
    err = capsys.readouterr().err.splitlines()
    assert err == [f"content of parent.safetensors: {name}" for name in sorted(names(CONTENT))]


# ---- Refusals: one sentence, exit 1, nothing written ---------------------------------------------


def test_an_unknown_trait_lists_the_known_ones(lora, output, capsys):
    args = ("--loras", lora, "--traits", "colour", "--output_path", output)
    assert refusal(capsys, *args) == (
        'unknown trait "colour": choose one of content, style, layout, clip_2_content'
    )


def test_a_trait_the_lora_does_not_hold_is_refused_with_the_blocks_it_has(lora, output, capsys):
    args = ("--loras", lora, "--traits", "layout", "--output_path", output)
    assert refusal(capsys, *args) == (
        f'{lora} has no modules for the trait "layout": its blocks are '
        "output_blocks.0.1, output_blocks.1.1"
    )
    assert not output.exists()


def test_the_same_module_from_two_loras_is_refused(tmp_path, output, capsys):
    name = CONTENT.format(0, 1, "q")
    a = write_lora(tmp_path / "a.safetensors", lora_module(name))
    b = write_lora(tmp_path / "b.safetensors", lora_module(name))
    assert refusal(capsys, "--loras", a, b, "--output_path", output) == (
        f"{name} would come from both content of a.safetensors and content of b.safetensors: "
        "leave one out, or write separate files with --not_combined"
    )
    assert not output.exists()


def test_a_file_that_is_no_lora_is_refused(tmp_path, output, capsys):
    checkpoint = write_lora(
        tmp_path / "base.safetensors", {"model.diffusion_model.out.2.bias": torch.zeros(4)}
    )
    assert refusal(capsys, "--loras", checkpoint, "--output_path", output) == (
        f"{checkpoint} is not an SDXL LoRA: it holds model.diffusion_model.out.2.bias"
    )


@pytest.mark.parametrize("damage", ["truncated", "pickle", "empty"])
def test_a_file_that_is_not_whole_safetensors_is_refused(lora, output, capsys, damage):
    if damage == "truncated":
        lora.write_bytes(lora.read_bytes()[:-1])
    elif damage == "pickle":
        torch.save({"a": torch.zeros(1)}, lora)
    else:
        lora.write_bytes(b"")
    sentence = refusal(capsys, "--loras", lora, "--output_path", output)
    assert sentence.startswith(f"{lora} is not a whole safetensors file (")
    assert sentence.endswith("): download it again, or save it as safetensors")
    assert not output.exists()


def test_a_missing_lora_is_named(tmp_path, output, capsys):
    args = ("--loras", tmp_path / "gone.safetensors", "--output_path", output)
    assert refusal(capsys, *args) == (
        f"no file at {tmp_path / 'gone.safetensors'}: correct --loras"
    )


def test_writing_over_an_input_is_refused(lora, capsys):
    before = lora.read_bytes()
    assert refusal(capsys, "--loras", lora, "--output_path", lora) == (
        f"the output {lora} is one of the inputs: change --output_path"
    )
    assert lora.read_bytes() == before


def test_writing_over_an_input_through_a_link_is_refused(lora, output, capsys):
    os.link(lora, output)
    assert "is one of the inputs" in refusal(capsys, "--loras", lora, "--output_path", output)


def test_not_combined_never_writes_over_an_input(tmp_path, capsys):
    lora = write_lora(tmp_path / "slice_content.safetensors", blora_modules(CONTENT))
    args = ("--not_combined", "--output_path", tmp_path / "slice.safetensors")
    assert "is one of the inputs" in refusal(capsys, "--loras", lora, *args)


@pytest.mark.parametrize(
    ("output_path", "reason"),
    [
        ("slice.pt", "the output {path} must end in .safetensors: change --output_path"),
        (
            "gone/slice.safetensors",
            "no folder {path.parent}: create it, or change --output_path",
        ),
        (
            "folder.safetensors",
            "the output {path} is a folder: name a file in --output_path",
        ),
    ],
)
def test_an_output_that_cannot_be_written_is_refused(lora, tmp_path, capsys, output_path, reason):
    (tmp_path / "folder.safetensors").mkdir()
    path = tmp_path / output_path
    assert refusal(capsys, "--loras", lora, "--output_path", path) == reason.format(path=path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[1]", "{path} holds no traits: its JSON must be an object of traits by name"),
        (
            '{"content": ["a"]}',
            'trait "content" in {path} is not of the form '
            '{{"whitelist": ["..."], "blacklist": ["..."]}}: correct it there',
        ),
        (
            '{"content": {"whitelist": "a"}}',
            'trait "content" in {path} is not of the form '
            '{{"whitelist": ["..."], "blacklist": ["..."]}}: correct it there',
        ),
    ],
)
def test_a_traits_file_of_another_form_is_refused(lora, output, tmp_path, capsys, text, reason):
    traits = tmp_path / "traits.json"
    traits.write_text(text)
    args = ("--loras", lora, "--traits_file", traits, "--output_path", output)
    assert refusal(capsys, *args) == reason.format(path=traits)


def test_a_traits_file_that_is_no_json_is_refused(lora, output, tmp_path, capsys):
    traits = tmp_path / "traits.json"
    traits.write_text("{")
    sentence = refusal(capsys, "--loras", lora, "--traits_file", traits, "--output_path", output)
    assert sentence.startswith(f"{traits} is not valid JSON (")


def test_a_missing_traits_file_is_named(lora, output, tmp_path, capsys):
    gone = tmp_path / "gone.json"
    args = ("--loras", lora, "--traits_file", gone, "--output_path", output)
    assert refusal(capsys, *args) == f"no traits file at {gone}: copy blora_traits.json there"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on a file's size")
def test_a_write_that_fails_half_way_leaves_the_old_file_and_no_part(lora, output):
    output.write_bytes(b"old")
    command = f'ulimit -f 1; exec "{sys.executable}" "{SCRIPT}" "$@"'
    args = ["--loras", lora, "--output_path", output]
    done = subprocess.run(
        [BASH, "-c", command, "bash", *args], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: cannot write {output} (")
    assert done.stderr.count("\n") == 1
    assert output.read_bytes() == b"old"
    assert sorted(path.name for path in output.parent.iterdir()) == [lora.name, output.name]


# ---- Usage: exit 2 -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "the following arguments are required: --loras"),
        (
            ["--loras", "a", "--alphas", "1", "1"],
            "--alphas: 2 values for 1 slice, leave some out",
        ),
        (
            ["--loras", "a", "--alphas", "nan"],
            "argument --alphas: 'nan' is not a finite fp32 number",
        ),
        (
            ["--loras", "a", "--alphas", "inf"],
            "argument --alphas: 'inf' is not a finite fp32 number",
        ),
        (
            ["--loras", "a", "--alphas", "1e39"],
            "argument --alphas: '1e39' is not a finite fp32 number",
        ),
        (
            ["--loras", "a", "--alphas=-3.5e38"],
            "argument --alphas: '-3.5e38' is not a finite fp32 number",
        ),
        (
            ["--loras", "a", "--alphas", "-inf"],
            "argument --alphas: '-inf' is not a finite fp32 number",
        ),
        (["--loras", "a", "--alphas", "x"], "argument --alphas: 'x' is not a finite fp32 number"),
        (["--loras", "a", "--trait_file", "b"], "unrecognized arguments: --trait_file b"),
    ],
)
def test_a_command_line_mistake_exits_2(capsys, args, message):
    with pytest.raises(SystemExit) as stop:
        slice_lora(*args)
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith(f"blora_slicer.py: error: {message}\n")


WRITING = {
    "--traits": ["style"],
    "--alphas": ["0.5"],
    "--output_path": ["slice.safetensors"],
    "--debug": [],
    "--not_combined": [],
    "--save_precision": ["fp16"],
    "--base_model": ["sdxl.safetensors"],
    "--no_metadata": [],
}


@pytest.mark.parametrize(("option", "values"), WRITING.items(), ids=WRITING)
def test_what_has_a_say_in_a_slice_does_not_go_with_inspect(lora, capsys, option, values):
    with pytest.raises(SystemExit) as stop:
        slice_lora("--loras", lora, "--inspect", option, *values)
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith(
        f"blora_slicer.py: error: --inspect writes nothing: leave out {option}\n"
    )


def test_every_option_is_for_a_slice_or_goes_with_inspect(capsys):
    with pytest.raises(SystemExit):
        slice_lora("--help")
    # Each has a sentence beside it or below it.
    options = set(re.findall(r"^  (--\w+)(?=.*(?:  |\n {10,})\w)", capsys.readouterr().out, re.M))
    assert options == {*WRITING, "--loras", "--traits_file", "--inspect", "--json", "--version"}


# ---- As a program --------------------------------------------------------------------------------


def test_the_version_is_that_of_the_blora_folder(capsys):
    with pytest.raises(SystemExit) as stop:
        slice_lora("--version")
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"blora_slicer.py {blora.VERSION}\n"


class Words(list):
    """A stream that is no file, such as a window of an editor: it has write and flush alone."""

    write = list.append

    def flush(self) -> None:
        pass


@pytest.mark.parametrize("stream", [None, Words()], ids=["none", "no file"])
def test_a_cut_works_where_stdout_and_stderr_are_no_files(lora, output, monkeypatch, stream):
    monkeypatch.setattr("sys.stdout", stream)  # None is what pythonw has
    monkeypatch.setattr("sys.stderr", stream)
    assert slice_lora("--loras", lora, "--output_path", output) == 0
    assert slice_lora("--loras", lora.with_name("gone"), "--output_path", output) == 1
    assert stream is None or "no file at" in "".join(stream)
    assert modules(output) == names(CONTENT)


def test_it_runs_from_any_folder_with_the_traits_and_the_output_beside_the_script(lora, tmp_path):
    home = tmp_path / "kohya & co (1)!"
    home.mkdir()
    install(home)
    done = subprocess.run(
        [sys.executable, home / "blora_slicer.py", "--loras", lora.name],
        cwd=lora.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert modules(home / "model.safetensors") == names(CONTENT)


def test_mistakes_are_told_without_loading_torch(tmp_path):
    code = (
        "import sys, blora_slicer\n"
        "assert blora_slicer.main(['--loras', 'gone.safetensors']) == 1\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent, check=False)
    assert done.returncode == 0
