"""What blora_slicer.py promises on its command line, on small real LoRA files."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
import torch
from kohya_folder import install
from lora_files import CONTENT, LAYOUT, STYLE, TE2, blora_modules, lora_module, write
from safetensors.torch import load_file
from slicing import Stored, all_traits, cut, modules, refused, slice_lora, stored

import blora
import blora_slicer

NAME = CONTENT.format(0, 1, "q")
TE = ("te1", "te2")


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """A B-LoRA of content and style: 16 modules, rank 2, alpha 1, fp16."""
    return write(tmp_path / "my_content.safetensors", blora_modules(CONTENT, STYLE))


def names(*templates: str) -> set[str]:
    return {key.split(".")[0] for key in blora_modules(*templates)}


def tensors_of(path: Path, kept: set[str]) -> Stored:
    return {key: entry for key, entry in stored(path).items() if key.split(".")[0] in kept}


OTHER_LAYERS = ("transformer_blocks_0_ff_net_0_proj", "proj_in")
KEPT = {
    "content": names(CONTENT),
    "style": names(STYLE),
    "layout": names(LAYOUT),
    "clip_2_content": {TE2.format(0, "q")},
    "text": {TE2.format(layer, "q").replace("te2", te) for layer in (0, 10) for te in TE},
    "content_block": names(CONTENT) | {f"{CONTENT[:27]}_{layer}" for layer in OTHER_LAYERS},
    "style_block": names(STYLE) | {f"{STYLE[:27]}_{layer}" for layer in OTHER_LAYERS},
}


@pytest.mark.parametrize("trait", KEPT)
def test_a_trait_keeps_the_modules_of_its_block_and_nothing_else(tmp_path, trait):
    tensors = blora_modules(CONTENT, STYLE, LAYOUT, alpha=0.3, dtype=torch.bfloat16)
    others = ["lora_unet_output_blocks_2_1_transformer_blocks_0_attn1_to_q"]
    for block in (CONTENT[:27], STYLE[:27], LAYOUT[:26]):
        others += [f"{block}_{layer}" for layer in OTHER_LAYERS]
    for name in (*others, *KEPT["text"]):
        tensors |= lora_module(name)
    lora = write(tmp_path / "full.safetensors", tensors)
    assert stored(cut(lora, "--traits", trait)) == tensors_of(lora, KEPT[trait])


OWN_TRAITS = {
    "a name of one's own": ({"queries": {"whitelist": ["_to_q"]}}, "_to_q"),
    "a blacklist of alpha, as old files have": (
        {"content": {"whitelist": ["lora_"], "blacklist": ["ff_net", "to_k", "alpha"]}},
        ("_to_q", "_to_v", "_to_out_0"),
    ),
}


@pytest.mark.parametrize(("traits", "ends"), OWN_TRAITS.values(), ids=OWN_TRAITS)
def test_a_traits_file_of_ones_own_says_what_is_kept(lora, tmp_path, traits, ends):
    path = tmp_path / "traits.json"
    path.write_text(json.dumps(traits), encoding="utf-8-sig")  # as Notepad saves it
    kept = {name for name in names(CONTENT, STYLE) if name.endswith(ends)}
    output = cut(lora, "--traits", *traits, "--traits_file", path)
    assert stored(output) == tensors_of(lora, kept)


def test_every_change_that_is_added_beside_the_factors_is_multiplied_too(tmp_path):
    added = {"diff": torch.ones(1280, 1280), "diff_b": torch.ones(1280), "b_norm": torch.ones(1280)}
    tensors = lora_module(NAME) | {f"{NAME}.{suffix}": value for suffix, value in added.items()}
    halves = load_file(cut(write(tmp_path / "added.safetensors", tensors), "--alphas", "0.5"))
    assert all(torch.equal(halves[f"{NAME}.{s}"], 0.5 * value) for s, value in added.items())


PAIRS = [
    # LoRAs, traits, alphas, the cuts they make
    ("a", "", "", "a:content:1"),
    ("a", "style", "", "a:style:1"),
    ("a", "content style", "", "a:content:1 a:style:1"),
    ("a b", "", "", "a:content:1 b:content:1"),
    ("a b", "style", "", "a:style:1 b:content:1"),
    ("a b", "content style", "0.5", "a:content:0.5 b:style:1"),
    ("a b", "content style layout", "0.5 2 -1", "a:content:0.5 b:style:2 b:layout:-1"),
    # argparse takes some of these for options
    ("a", "content style layout", "-1e-5 -.5e+0 -2", "a:content:-1e-05 a:style:-0.5 a:layout:-2"),
    ("a", "content", "-5E+0", "a:content:-5"),
]


@pytest.mark.parametrize(("loras", "traits", "alphas", "cuts"), PAIRS)
def test_loras_traits_and_alphas_pair_by_order(tmp_path, capsys, loras, traits, alphas, cuts):
    for name in loras.split():
        write(tmp_path / name, blora_modules(CONTENT, STYLE, LAYOUT, rank=1, dtype=torch.float32))
    options = [("--traits", traits), ("--alphas", alphas)]
    args = [word for option, text in options if text for word in (option, *text.split())]
    cut(*(tmp_path / name for name in loras.split()), *args, "--not_combined")
    said = re.findall(r"^(\w+) of (\w+) at (\S+):", capsys.readouterr().out, re.M)
    assert [f"{lora}:{trait}:{strength}" for trait, lora, strength in said] == cuts.split()


NOT_COMBINED = {
    # LoRAs, traits, and what the files hold
    "two traits": ("a", ["content", "style"], {"out_content": CONTENT, "out_style": STYLE}),
    "a trait whose name is no file name": ("a", ["a/b: c"], {"out_a_b_c": STYLE}),
    "one trait of two": ("ab", ["style"] * 2, {"out_style_a": STYLE, "out_style_b": STYLE}),
}


@pytest.mark.parametrize(("loras", "traits", "files"), NOT_COMBINED.values(), ids=NOT_COMBINED)
def test_not_combined_names_a_file_after_each_trait_and_where_it_must_its_lora(
    tmp_path, loras, traits, files
):
    own = {"content": CONTENT[:27], "style": STYLE[:27], "a/b: c": STYLE[:27]}
    paths = [tmp_path / f"{name}.safetensors" for name in loras]
    for lora in paths:
        write(lora, blora_modules(CONTENT, STYLE))
    traits_file = all_traits(tmp_path, **own)
    cut(*paths, "--traits", *traits, "--traits_file", traits_file, "--not_combined")
    written = {path.stem: modules(path) for path in tmp_path.glob("out*")}
    assert written == {name: names(template) for name, template in files.items()}


def test_it_says_at_the_end_what_was_kept_and_with_debug_each_module_before(lora, capsys):
    output = cut(lora, "--alphas", "0.5")
    said = capsys.readouterr()
    assert said.err == ""
    size = f"{output.stat().st_size / 1e6:.1f}"
    assert said.out.splitlines() == [
        "content of my_content.safetensors at 0.5: 8 modules, 24 tensors, rank 2",
        f"-> {output}: 8 modules, 24 tensors, rank 2, {size} MB",
        "LBW: 0,0,0,0,0,0,0.5,0,0,0,0,0",
    ]
    cut(lora, "--debug")
    err = capsys.readouterr().err.splitlines()
    assert err == [f"content of {lora.name}: {name}" for name in sorted(names(CONTENT))]


FORM = 'is not of the form {"whitelist": ["..."], "blacklist": ["..."]}: correct it there'
IS_INPUT = "is one of the inputs: change --output_path"
REFUSALS = {
    # what follows "--loras one.safetensors", and the sentence
    "--traits odd": (
        'unknown trait "odd": choose one of content, style, layout, clip_2_content, text, '
        "content_block, style_block"
    ),
    "--traits layout": (
        'one.safetensors has no modules for the trait "layout": its blocks are output_blocks.0.1, '
        "output_blocks.1.1"
    ),
    "my_content.safetensors": (
        f"content of one.safetensors and content of my_content.safetensors both hold {NAME}: "
        "leave one out, or write separate files with --not_combined"
    ),
    "--traits style content style": "style of one.safetensors is asked for twice: leave one out",
    "--traits content q --traits_file q.json": (
        f"content of one.safetensors and q of one.safetensors both hold {NAME}: leave one out, or "
        "write separate files with --not_combined"
    ),
    "--traits content content --not_combined": (
        "two slices would both be written to out_content_one.safetensors: cut them one by one"
    ),
    "--loras base.safetensors": "base.safetensors is not an SDXL LoRA: it holds strange.bias",
    "--loras gone.safetensors": "no file at gone.safetensors: correct --loras",
    "--output_path one.safetensors": f"the output one.safetensors {IS_INPUT}",
    "--output_path link.safetensors": f"the output link.safetensors {IS_INPUT}",
    "my_content.safetensors --traits style --not_combined --output_path my.safetensors": (
        f"the output my_content.safetensors {IS_INPUT}"
    ),
    "--base_model base.safetensors --output_path base.safetensors": (
        f"the output base.safetensors {IS_INPUT}"
    ),
    "--output_path slice.pt": "the output slice.pt must end in .safetensors: change --output_path",
    "--output_path no/a.safetensors": "no folder no: create it, or change --output_path",
    "--output_path i.safetensors": (
        "the output i.safetensors is a folder: name a file in --output_path"
    ),
    "--traits_file no.json": "no traits file at no.json: copy blora_traits.json there",
    "--traits_file 1.json": "1.json holds no traits: its JSON must be an object of traits by name",
    "--traits_file list.json": f'trait "content" in list.json {FORM}',
    "--traits_file text.json": f'trait "content" in text.json {FORM}',
    "--traits_file x.json": (
        "x.json is not valid JSON (Expecting value: line 1 column 1 (char 0)): correct it there"
    ),
}
TRAITS_FILES = {
    "1.json": "[1]",
    "q.json": '{"content": {"whitelist": ["_0_1_"]}, "q": {"whitelist": ["_to_q"]}}',
    "list.json": '{"content": ["a"]}',
    "text.json": '{"content": {"whitelist": "a"}}',
    "x.json": "x",
}


@pytest.mark.parametrize(("args", "sentence"), REFUSALS.items(), ids=REFUSALS)
def test_what_cannot_be_cut_is_refused_in_one_sentence(
    lora, tmp_path, monkeypatch, capsys, args, sentence
):
    monkeypatch.chdir(tmp_path)
    one = write(Path("one.safetensors"), lora_module(NAME) | lora_module(STYLE.format(0, 1, "q")))
    os.link(one, "link.safetensors")
    write(Path("base.safetensors"), {"strange.bias": torch.zeros(4)})
    Path("i.safetensors").mkdir()
    for name, text in TRAITS_FILES.items():
        Path(name).write_text(text)
    before = {path: path.read_bytes() for path in (one, lora)}
    assert refused(capsys, one, *args.split()) == sentence
    assert {path: path.read_bytes() for path in before} == before


def test_an_older_slice_that_is_overwritten_is_named_and_where_there_was_none_nothing_is(
    lora, capsys
):
    assert refused(capsys, lora, "--traits", "layout")
    output = cut(lora)
    assert capsys.readouterr().err == ""
    assert refused(capsys, lora, "--traits", "layout")  # and what there was stays
    assert slice_lora("--loras", lora, "--traits", "style", "--output_path", output) == 0
    assert capsys.readouterr().err == f"note: overwrote {output}, which was there before\n"
    assert modules(output) == names(STYLE)


RUN = "python blora_slicer.py --loras"
NO_NUMBERS = ("nan", "inf", "-inf", "1e39", "-3.5e38", "x")
USAGE = {
    "": f"no LoRA is given: {RUN} my_project_1.safetensors --traits content",
    "--traits style": f"no LoRA is given: {RUN} my_project_1.safetensors --traits style",
    "a.safetensors": f"LoRAs come after --loras: {RUN} a.safetensors --traits content",
    "a b --traits style --alphas -1": (
        f"LoRAs come after --loras: {RUN} a b --traits style --alphas -1"
    ),
    "--loras a --debug b": "no option takes b: put it after its option, such as --loras",
    "--loras a --trait_file b": "there is no option --trait_file: use --traits_file",
    "--output-path=b a": "there is no option --output-path=b: use --output_path",
    "-loras a": "there is no option -loras: use --loras",
    "\u2014loras a": "there is no option \u2014loras: use --loras",
    "-i a": f"there is no option -i: {RUN} my_project_1.safetensors",
    "--loras a --trait b": "--trait could match --traits, --traits_file: write one of them out",
    "--loras a --debug=1": "--debug takes no value: write --debug alone",
    "--loras a --alphas 1 1": "--alphas: 2 values for 1 slice, leave some out",
    "--loras a --json": "--json requires --inspect",
    **{
        f"--loras a --alphas {x}": f"--alphas: '{x}' is not a finite fp32 number"
        for x in NO_NUMBERS
    },
    **{
        f"{option}": f"{option} needs a value, such as {option} {value}"
        for option, value in blora_slicer.EXAMPLES.items()
    },
}


def mistake(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one sentence that is said of a command line, which ends with exit code 2."""
    with pytest.raises(SystemExit, match=r"^2$"):
        slice_lora(*args)
    out, err = capsys.readouterr()
    assert (out, err[:7], err.count("\n")) == ("", "error: ", 1)
    return err[7:-1]


@pytest.mark.parametrize(("args", "sentence"), USAGE.items(), ids=USAGE)
def test_a_mistake_in_the_command_line_is_told_in_one_sentence(capsys, args, sentence):
    assert mistake(capsys, *args.split()) == sentence


def test_a_precision_that_there_is_not_is_told_with_those_that_there_are(capsys):
    said = mistake(capsys, "--loras", "a", "--save_precision", "int8")
    assert said.startswith("--save_precision: invalid choice: 'int8' (choose from ")
    assert all(precision in said for precision in blora_slicer.PRECISIONS)


@pytest.mark.parametrize("options", [[], ["--traits", "style"], ["--inspect"]])
def test_the_command_that_is_told_for_a_file_without_loras_works(tmp_path, capsys, options):
    lora = write(tmp_path / "my first b's.safetensors", blora_modules(CONTENT, STYLE))
    output = tmp_path / "out.safetensors"
    said = mistake(capsys, str(lora), *options, "--output_path", str(output))
    words = shlex.split(said.partition(": ")[2])
    assert words[:2] == ["python", "blora_slicer.py"]
    assert slice_lora(*words[2:]) == 0
    assert str(output) in capsys.readouterr().out


def test_every_option_with_a_value_has_an_example_of_it():
    actions = blora_slicer.build_parser()._option_string_actions
    assert set(blora_slicer.EXAMPLES) == {
        name for name, action in actions.items() if action.nargs != 0
    }


def test_the_version_is_that_of_the_folder_and_every_option_is_for_a_slice_or_inspect(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        slice_lora("--version")
    assert capsys.readouterr().out == f"blora_slicer.py {blora.VERSION}\n"
    with pytest.raises(SystemExit, match=r"^0$"):
        slice_lora("--help")
    # Each has a sentence beside it or below it.
    options = set(re.findall(r"^  (--\w+)(?=.*(?:  |\n {10,})\w)", capsys.readouterr().out, re.M))
    others = {"--debug", "--not_combined", "--no_metadata", "--inspect", "--json", "--version"}
    assert options == {*blora_slicer.EXAMPLES, *others}


@pytest.mark.parametrize("stream", [None, StringIO()], ids=["none", "no file"])
def test_a_cut_works_where_stdout_and_stderr_are_no_files(lora, monkeypatch, stream):
    monkeypatch.setattr("sys.stdout", stream)  # None is what pythonw has
    monkeypatch.setattr("sys.stderr", stream)
    assert modules(cut(lora)) == names(CONTENT)
    assert slice_lora("--loras", lora.with_name("gone")) == 1
    assert stream is None or "no file at" in stream.getvalue()


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
