"""The launchers, presets and slicer on a real sd-scripts checkout, with real LyCORIS.

sd-scripts' own parser and LyCORIS on sd-scripts' own SDXL take two minutes. With BLORA_E2E=1 each
recipe also trains two steps of a full-size SDXL with random weights on the CPU, which takes minutes
a recipe and 16 GB of memory.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from kohya_folder import ROOT, SCRIPT, Bash, install, with_text_encoders
from network_cases import MODULES, PLAIN, cases, preset_files, with_both
from preset_modules import CONTENT, EXPECTED, STYLE, block_modules, text_encoder_modules
from real_kohya import (
    BEFORE_0_10,
    KOHYA_PYTHON,
    SUPPORT,
    kohya_python,
    make_copy,
    options_of,
    random_sdxl,
)
from safetensors import safe_open
from safetensors.torch import load_file
from torch.testing import assert_close

from blora.preflight import plan

pytestmark = pytest.mark.slow

NO_TRAINING = "NOT RUN: BLORA_E2E=1 trains a full-size SDXL on the CPU, minutes a recipe"
if os.environ.get("BLORA_E2E") == "1":
    NO_TRAINING = ""
STANDIN = ROOT / "tests/standin"
NAME = "demo"
PRESET = "preset=lycoris_presets/{}.toml".format


@dataclass(frozen=True)
class Recipe:
    """How somebody starts a training: a launcher, and options given to it."""

    launcher: str
    overrides: tuple[str, ...] = ()
    # Whether the line --network_train_unet_only is deleted, in a copy of the launcher.
    text_encoders: bool = False
    save_memory: str = "1"  # BLORA_SAVE_MEMORY, which classic does not have
    kohya_ss: bool = False  # a folder whose trainer lies in sd-scripts/
    after: str = ""  # the recipe whose file it goes on from
    trait: str = ""  # or from the slice of this trait
    content_of: str = ""  # the recipe whose content is merged into the model before


CLASSIC, FAST = "sdxl_blora_classic", "sdxl_blora_fast"
PLAIN_ARGS = ("--network_args", PRESET("blora_content_style"))
DORA = ("dora_wd=True", "wd_on_output=False")
DORA_ARGS = ("--network_args", PRESET("bdora_content_style_clip"), *DORA)
TEN_STEPS = ("--max_train_steps=10",)
# Trainings that are to give the same file bit for bit, with LyCORIS' network and with ours.
LYCORIS_NETWORK = ("--network_module=lycoris.kohya", *PLAIN_ARGS)
GO_ON = ("--dim_from_weights",)
CONTENT_ALONE = ("--network_args", PRESET("blora_content"), "bypass_mode=True")
STYLE_ALONE = ("--network_args", PRESET("blora_style"), "bypass_mode=True")
LOOK = ("--sample_prompts=prompts.txt", "--sample_every_n_steps=1", "--sample_at_first")
if not BEFORE_0_10:
    LOOK += ("--validation_split=0.4", "--validate_every_n_steps=1")
COMPILED = ("--torch_compile", "--dynamo_backend=eager")
RECIPES = {
    "classic": Recipe(CLASSIC),
    "fast": Recipe(FAST),
    "classic, ten steps": Recipe(CLASSIC, TEN_STEPS),
    "fast, ten steps": Recipe(FAST, TEN_STEPS),
    "fast, DoRA": Recipe(FAST, DORA_ARGS),
    "classic, DoRA": Recipe(CLASSIC, DORA_ARGS),
    "fast, DoRA and clip": Recipe(FAST, DORA_ARGS, text_encoders=True),
    "classic, our network": Recipe(CLASSIC, ("--network_module=blora_network",)),
    "fast, all kept": Recipe(FAST, save_memory="0"),
    "fast, no bypass": Recipe(FAST, PLAIN_ARGS),
    "fast, LyCORIS": Recipe(FAST, LYCORIS_NETWORK),
    "fast, no bypass, compiled": Recipe(FAST, (*PLAIN_ARGS, *COMPILED)),
    "fast, no bypass, kohya_ss": Recipe(FAST, PLAIN_ARGS, kohya_ss=True),
    "fast, no bypass, looking": Recipe(FAST, (*PLAIN_ARGS, *LOOK)),
    "fast, LyCORIS, looking": Recipe(FAST, (*LYCORIS_NETWORK, *LOOK)),
    "fast, no bypass, going on": Recipe(FAST, (*PLAIN_ARGS, *GO_ON), after="fast, LyCORIS"),
    "fast, LyCORIS, going on": Recipe(FAST, (*LYCORIS_NETWORK, *GO_ON), after="fast, LyCORIS"),
    "fast, going on, slice": Recipe(FAST, GO_ON, after="fast, LyCORIS", trait="content"),
    "fast, content": Recipe(FAST, CONTENT_ALONE),
    "fast, style": Recipe(FAST, STYLE_ALONE),
    "fast, style on content": Recipe(FAST, STYLE_ALONE, content_of="fast, content"),
}
EQUAL = [
    ("classic", "classic, our network"),
    ("fast, LyCORIS", "fast, no bypass"),
    ("fast, LyCORIS", "fast, no bypass, compiled"),
    ("fast, LyCORIS", "fast, no bypass, kohya_ss"),
    ("fast, LyCORIS, looking", "fast, no bypass, looking"),
    ("fast, LyCORIS, going on", "fast, no bypass, going on"),
]
for preset_name in EXPECTED:
    override = ("--network_args", PRESET(preset_name))
    RECIPES[f"classic, {preset_name}"] = Recipe(CLASSIC, override)
    RECIPES[f"fast, {preset_name}, text encoders"] = Recipe(FAST, override, text_encoders=True)


def expected_modules(recipe: Recipe) -> set[str]:
    """The modules of the recipe's preset, by its definition in preset_modules.py."""
    presets = [Path(item).stem for item in recipe.overrides if item.startswith("preset=")]
    blocks, layers = EXPECTED[presets[0] if presets else "blora_content_style"]
    modules = set().union(*map(block_modules, blocks))
    return modules | text_encoder_modules(layers) if recipe.text_encoders else modules


# ---- A kohya folder ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kohya:
    """A copy of the checkout with the bundle in it, a dataset and a checkpoint."""

    path: Path
    bin: Path
    checkpoint: Path

    def launcher(self, recipe: Recipe) -> Path:
        """The launcher, or a copy without --network_train_unet_only as the README describes."""
        original = self.path / f"{recipe.launcher}.sh"
        return with_text_encoders(original) if recipe.text_encoders else original

    def settings(self, folder: Path) -> dict[str, str]:
        """The settings of the launchers, with the folder's programs found first."""
        settings = {"BLORA_NAME": NAME, "BLORA_CHECKPOINT": str(self.checkpoint)}
        return Bash().path_variable(folder) | settings

    def python(self, *command: str | Path, question: Any = None) -> str:
        return kohya_python(*command, cwd=self.path, path=self.path, question=question)

    def ask(self, **question: Any) -> dict[str, Any]:
        """The answers of kohya_probe.py."""
        return json.loads(self.python(SUPPORT / "kohya_probe.py", self.path, question=question))


def make_ready(path: Path, trainer: Path) -> Kohya:
    """A copy with the bundle, six drawings and a checkpoint that is SDXL's by its names alone."""
    make_copy(trainer)
    install(path)
    (path / "prompts.txt").write_text("a sks circle --w 64 --h 64 --s 1 --d 1\n")
    programs = path.with_name("bin")
    Bash().install_recorder(programs, "accelerate")
    (programs / "python").write_text(f'#!/bin/sh\nexec "{KOHYA_PYTHON}" "$@"\n')
    (programs / "python").chmod(0o755)
    made = Kohya(path, programs, path.with_name("sdxl.safetensors"))
    made.python(STANDIN / "make_checkpoint.py", made.checkpoint)
    made.python(STANDIN / "make_dataset.py", f"_in/lora/sdxl/{NAME}")
    return made


@pytest.fixture(scope="module")
def kohya(tmp_path_factory) -> Kohya:
    path = tmp_path_factory.mktemp("real") / "sd-scripts"
    return make_ready(path, path)


@pytest.fixture(scope="module")
def kohya_ss(tmp_path_factory) -> Kohya:
    """The same as kohya_ss has it: the trainer in a folder below that of the bundle."""
    path = tmp_path_factory.mktemp("gui") / "kohya_ss"
    return make_ready(path, path / "sd-scripts")


# ---- Seconds: what sd-scripts and LyCORIS make of the command line -------------------------------


@pytest.fixture(scope="module")
def real(kohya, kohya_ss, tmp_path_factory) -> dict[str, Any]:
    """Every recipe, started by the real launcher, as far as accelerate; and what becomes of it."""
    command_lines = {}
    for name, recipe in RECIPES.items():
        log = tmp_path_factory.mktemp("log")
        folder = kohya_ss if recipe.kohya_ss else kohya
        # What the rehearsal says of them is asked below.
        quick = {"BLORA_SAVE_MEMORY": recipe.save_memory, "BLORA_REHEARSAL": "0"}
        env, launcher = folder.settings(folder.bin) | quick, folder.launcher(recipe)
        done, calls = Bash().run(launcher, recipe.overrides, folder.path, log, env)
        assert done.returncode == 0, done.output
        [command_lines[name]] = (options_of(call.argv) for call in calls)
    return kohya.ask(command_lines=command_lines) | {"given": command_lines}


def given(command_line: list[str]) -> dict[str, list[str]]:
    """The options of a command line with their values; the last of a name wins."""
    options: dict[str, list[str]] = {}
    for word in command_line:
        if word.startswith("--"):
            name, *value = word[2:].split("=", 1)
            options[name] = last = value
        else:
            last.append(word)
    return options


def same(parsed: Any, typed: list[str]) -> bool:
    """Whether an option was read as it was typed: sd-scripts makes numbers and paths of some."""
    values = [] if parsed is True else parsed if isinstance(parsed, list) else [parsed]
    read = list(map(str, values))
    try:
        return read == typed or [float(v) for v in read] == [float(v) for v in typed]
    except ValueError:
        return [Path(v) for v in read] == [Path(v) for v in typed]


@pytest.mark.parametrize("recipe", RECIPES)
def test_sd_scripts_reads_every_option_of_the_launcher_as_it_was_given(real, recipe):
    parsed = real["options"][recipe]
    for name, values in given(real["given"][recipe]).items():
        assert same(parsed[name], values), name


# A recipe that goes on from a file is asked where there is one, in minutes.
@pytest.mark.parametrize("recipe", [name for name in RECIPES if not RECIPES[name].after])
def test_lycoris_builds_the_modules_preflight_announced_on_sd_scripts_own_sdxl(
    kohya, real, cached_tokenizers, recipe
):
    # Drawings of 64 x 64, in buckets that sd-scripts 0.9 takes too.
    small = ["--min_bucket_reso=64", "--bucket_reso_steps=64", cached_tokenizers]
    words = ["blora_preflight.py", "--json", SCRIPT, *real["given"][recipe], *small]
    announced = json.loads(kohya.python(*words))
    assert announced["errors"] == []
    assert sorted(announced["modules"]) == real["modules"][recipe]
    assert set(announced["modules"]) == expected_modules(RECIPES[recipe])


# ---- Seconds: the gradients of sd-scripts' own U-Net, a tenth as wide ----------------------------


@pytest.fixture(scope="module")
def steps(kohya, tmp_path_factory) -> dict[str, dict[str, Any]]:
    """The cases of network_cases.py that need no text encoder: see network_probe.py."""
    asked = with_both(cases(preset_files(tmp_path_factory.mktemp("presets")), ""))
    probe = SUPPORT / "network_probe.py"
    told = kohya.python(probe, kohya.path, question={"steps": asked, "layers": {}})
    return json.loads(told.splitlines()[-1])["steps"]


@pytest.mark.parametrize("name", PLAIN)
def test_the_gradients_of_sd_scripts_own_unet_are_those_of_lycoris_bit_for_bit(steps, name):
    theirs, ours = (steps[f"{name}|{module}"] for module in MODULES)
    assert ours["output"] == theirs["output"]
    assert ours["gradients"] == theirs["gradients"]
    assert theirs["without_gradient"] == theirs["zero"] == theirs["log"] == []
    assert len(theirs["reached"]) == 36
    assert len(ours["reached"]) < 25
    assert ours["log"][0].startswith("early stop: the backward pass ends at ")


# ---- The figures of plan.py --------------------------------------------------------------------


def test_the_models_have_as_many_parameters_as_preflight_says(real):
    first, second, vae, unet = real["parameters"]
    assert (first + second, vae, unet) == (plan.TEXT_ENCODERS, plan.VAE, plan.UNET)


@pytest.mark.skipif(bool(NO_TRAINING), reason=NO_TRAINING)
def test_the_activations_are_those_that_the_benchmark_counts(kohya):
    bench = ROOT / "tests/bench_blora_training.py"
    printed = kohya.python(bench, "--kohya", kohya.path, "--blocks").splitlines()
    page = (ROOT / "docs/speed.md").read_text(encoding="utf-8")
    assert all(line in page for line in printed if " TF, " in line)
    rows = [line.strip("| ").split(" | ") for line in printed]
    counted = {row[0]: tuple(map(float, row[1:])) for row in rows if "_block" in row[0]}
    assert set(counted) == set(plan.FROM_BLOCK)
    for block, figures in counted.items():
        told = [size / 1e9 for size in plan.ALL + plan.FROM_BLOCK[block]]
        assert figures == pytest.approx(told, abs=0.006)


@pytest.mark.skipif(bool(NO_TRAINING), reason=NO_TRAINING)
def test_what_measures_on_a_card_trains_sd_scripts_own_unet_on_the_cpu_too(kohya):
    bench = ROOT / "tests/bench_blora_training.py"
    small = "--card cpu --size 64 --ranks 4 --seconds 0".split()
    rows = kohya.python(bench, "--kohya", kohya.path, *small).splitlines()[4:]
    names = ["classic", "classic with --sdpa", "fast", "fast, BLORA_SAVE_MEMORY=0"]
    assert [row.split(" | ")[0] for row in rows] == [f"| {name}, rank 4" for name in names]
    assert all("(median of 1)" in row for row in rows)


# ---- Minutes: two steps of a full-size SDXL ------------------------------------------------------

SIZE, RANK = 256, 8
ACCELERATE = "--cpu --num_processes=1 --num_machines=1 --mixed_precision=bf16 --dynamo_backend=no"
# What a CPU cannot do, and what makes the run short. fp16 mixed precision needs a GPU.
SHORT = (
    "--mixed_precision=bf16 --max_train_steps=2 --lr_warmup_steps=0 --max_data_loader_n_workers=1 "
    f"--min_bucket_reso={SIZE}"
).split()
if BEFORE_0_10:
    SHORT += ["--bucket_reso_steps=64"]  # it refuses the recipes' 32 in every network training
# At which bf16 does not round away what content learns in two steps.
MUCH = "10000"
TRAINED = ["classic", "fast", "fast, DoRA", "fast, DoRA and clip"]


class Run:
    """A training that has ended: its recipe, what it printed, and its file."""

    def __init__(self, kohya: Kohya, name: str, printed: str, file: Path) -> None:
        self.kohya, self.name, self.printed, self.file = kohya, name, printed, file
        self.recipe = RECIPES[name]
        self.is_dora = "dora_wd=True" in self.recipe.overrides
        self.tensors = load_file(file)
        self.modules = {name.split(".")[0] for name in self.tensors}


@pytest.fixture(scope="module")
def trained(kohya, kohya_ss, tmp_path_factory) -> Callable[[str], Run]:
    """A recipe, trained by the real launcher, accelerate, sd-scripts, LyCORIS and Prodigy."""
    if NO_TRAINING:
        pytest.skip(NO_TRAINING)
    sdxl = random_sdxl(tmp_path_factory.mktemp("random_sdxl"))

    @cache  # so it is trained when it is first asked for
    def by_name(name: str) -> Run:
        recipe, revision = RECIPES[name], str(list(RECIPES).index(name))
        more = [*SHORT, f"--tokenizer_cache_dir={sdxl / 'tokenizers'}"]
        if recipe.after:
            before = by_name(recipe.after)
            weights = cut(before)[recipe.trait] if recipe.trait else before.file
            more.append(f"--network_weights={weights}")
        if recipe.content_of:
            content = cut(by_name(recipe.content_of), ("content",), MUCH)["content"]
            more += ["--base_weights", str(content), "--base_weights_multiplier", "1"]
        folder = kohya_ss if recipe.kohya_ss else kohya
        dataset = folder.path / f"_in/lora/sdxl/{NAME}"
        shutil.rmtree(dataset)
        drawn = ["--images=3", f"--size={SIZE}", "--repeats=1"]
        folder.python(STANDIN / "make_dataset.py", dataset, *drawn)
        env = folder.settings(Path(KOHYA_PYTHON).parent) | {
            "BLORA_CHECKPOINT": str(sdxl / "random_sdxl.safetensors"),
            "BLORA_REVISION": revision,
            "BLORA_RANK": str(RANK),
            "BLORA_SAVE_MEMORY": recipe.save_memory,
            "BLORA_ACCELERATE_ARGS": ACCELERATE,
            "HF_HUB_OFFLINE": "1",
        }
        log, overrides = tmp_path_factory.mktemp("log"), [*recipe.overrides, *more]
        done, _ = Bash().run(folder.launcher(recipe), overrides, folder.path, log, env)
        assert done.returncode == 0, done.output
        project = f"{NAME}_{revision}"
        file = folder.path / f"_out/lora/sdxl/{project}/{project}.safetensors"
        return Run(folder, name, done.output, file)

    return by_name


@pytest.fixture(scope="module", params=TRAINED)
def run(request, trained) -> Run:
    return trained(request.param)


@cache
def cut(
    run: Run, traits: tuple[str, ...] = ("content", "style"), strength: str = "1"
) -> dict[str, Path]:
    """Slices of its file by trait, cut by the real slicer."""
    output = run.file.with_name("cut.safetensors")
    options = ["--traits", *traits, "--not_combined", "--output_path", output]
    options += ["--alphas", *[strength] * len(traits)]
    run.kohya.python("blora_slicer.py", "--loras", run.file, *options)
    return {trait: run.file.with_name(f"cut_{trait}.safetensors") for trait in traits}


def test_the_training_saves_one_file_with_every_module_that_was_announced(run):
    assert [path.name for path in run.file.parent.iterdir()] == [run.file.name]
    assert run.modules == expected_modules(run.recipe)
    scale = ["dora_scale"] if run.is_dora else []
    parts = ["alpha", *scale, "lora_down.weight", "lora_up.weight"]
    assert sorted(run.tensors) == sorted(f"{m}.{part}" for m in run.modules for part in parts)
    [told] = re.findall(r"([\d.]+) MB a file", run.printed)
    # Beside the numbers a file holds their names and the metadata.
    assert float(told) * 1e6 < run.file.stat().st_size < float(told) * 1.03e6 + 5e4


def test_every_module_has_moved_and_has_the_shapes_and_the_precision_of_its_recipe(run):
    dtype = torch.float16 if run.recipe.launcher == FAST else torch.float32
    assert {tensor.dtype for tensor in run.tensors.values()} == {dtype}
    assert all(tensor.isfinite().all() for tensor in run.tensors.values())
    for module in run.modules:
        down, up = (run.tensors[f"{module}.lora_{end}.weight"] for end in ("down", "up"))
        assert up.any()  # it begins at zero
        assert len(down) == up.shape[1] == run.tensors[f"{module}.alpha"] == RANK
        scale = run.tensors.get(f"{module}.dora_scale")
        assert scale is None or scale.shape == (1, down.shape[1])


def test_the_metadata_says_what_was_trained(run):
    with safe_open(run.file, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert metadata["ss_output_name"] == run.file.stem
    # Whichever of the two trained it: programs tell by it how to read the tensors.
    assert metadata["ss_network_module"] == "lycoris.kohya"
    assert metadata["ss_network_dim"] == str(RANK)
    assert metadata["ss_steps"] == metadata["ss_max_train_steps"] == "2"
    assert metadata["ss_optimizer"].startswith("prodigyopt.prodigy.Prodigy")


@pytest.mark.parametrize(("theirs", "ours"), EQUAL)
def test_our_network_trains_the_same_file_as_lycoris_bit_for_bit(trained, theirs, ours):
    expected, found = trained(theirs), trained(ours)
    assert "early stop: the backward pass ends at output_blocks.0.1 and spares 387" in found.printed
    assert "early stop" not in expected.printed
    assert len(found.tensors) == 480
    assert_close(found.tensors, expected.tensors, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["fast", "fast, all kept"])
def test_bypass_mode_trains_nearly_the_same(trained, name):
    """In bf16 the two forms of LyCORIS round differently: after two steps by some percent."""
    expected, found = trained("fast, LyCORIS").tensors, trained(name).tensors
    assert sorted(found) == sorted(expected)
    apart = sum((found[n].float() - expected[n].float()).square().sum() for n in found)
    assert (apart / sum(tensor.float().square().sum() for tensor in expected.values())) < 0.05**2


def test_text_encoders_that_are_trained_forbid_an_early_stop(trained):
    told = "no early stop: text encoders are trained, and their gradients pass through the whole"
    assert told in trained("fast, DoRA and clip").printed


def test_inspect_shows_its_blocks_and_nothing_broken(run):
    asked = ["--inspect", "--json", "--loras", run.file]
    [shown] = json.loads(run.kohya.python("blora_slicer.py", *asked))
    assert (shown["modules"], shown["not_finite"], shown["unplaced"]) == (len(run.modules), [], [])
    blocks = {block["block"]: block for block in shown["blocks"]}
    text_encoders = ["te1", "te2"] if run.recipe.text_encoders else []
    assert sorted(blocks) == ["output_blocks.0.1", "output_blocks.1.1", *text_encoders]
    assert [blocks[f"output_blocks.{n}.1"]["trait"] for n in (0, 1)] == ["content", "style"]
    expected = {"algorithm": "DoRA" if run.is_dora else "LoRA", "ranks": [RANK], "alphas": [RANK]}
    for block in blocks.values():
        assert block | expected == block
        assert block["change"] > 0


@pytest.mark.parametrize(("trait", "block"), [("content", CONTENT), ("style", STYLE)])
def test_a_slice_holds_its_block_bit_for_bit(run, trait, block):
    block = {n: run.tensors[n] for n in run.tensors if n.split(".")[0] in block_modules(block)}
    assert len(block) == len(run.tensors) * 80 // len(run.modules)
    assert_close(load_file(cut(run)[trait]), block, rtol=0, atol=0)


@pytest.mark.parametrize("alone", [False, True], ids=["into the recipe's network", "alone"])
def test_lycoris_loads_the_file_and_its_slices(run, real, alone):
    line = [*real["given"][run.name], f"--network_dim={RANK}", f"--network_alpha={RANK}"]
    files = [str(path) for path in (run.file, *cut(run).values())]
    into = {"command_lines": {"it": line}, "continue": dict.fromkeys(files, "it")}
    loaded = list(run.kohya.ask(**({"from_file": files} if alone else into))["loaded"].values())
    if alone and run.is_dora:  # it takes every DoRA for one with wd_on_output=True
        assert all("doesn't match the broadcast shape" in network["refused"] for network in loaded)
        return
    slices_alone = [block_modules(CONTENT), block_modules(STYLE)]
    expected = [run.modules, *(slices_alone if alone else [run.modules] * 2)]
    assert [set(network["modules"]) for network in loaded] == expected
    assert [network["differing"] for network in loaded] == [[], [], []]


def test_going_on_from_a_slice_trains_its_modules_and_no_others(trained):
    going_on = trained("fast, going on, slice")
    begun = load_file(cut(trained("fast, LyCORIS"))["content"])
    assert going_on.modules == block_modules(CONTENT)
    assert sorted(going_on.tensors) == sorted(load_file(cut(going_on, ("content",))["content"]))
    assert sorted(going_on.tensors) == sorted(begun)
    same = {name for name in begun if torch.equal(begun[name], going_on.tensors[name])}
    # Two steps of Prodigy move lora_down by less than fp16 shows.
    assert not any(name.endswith("lora_up.weight") for name in same)
    assert {name for name in begun if name.endswith(".alpha")} <= same


def test_style_on_a_merged_content_trains_the_style_block_alone_on_another_model(trained):
    style, alone = trained("fast, style on content"), trained("fast, style")
    printed = " ".join(style.printed.split())
    assert "merged 80: 80 content (output_blocks.0.1), at 1 from " in printed
    assert "modules 80: 80 style (output_blocks.1.1) " in printed
    stop = "the backward pass ends at output_blocks.1.1 and spares 493 of the U-Net's 794 layers"
    assert stop in style.printed
    content = trained("fast, content")
    assert (content.modules, style.modules) == (block_modules(CONTENT), block_modules(STYLE))
    # The same seed: what differs is the U-Net that the content is merged into.
    differing = [n for n in style.tensors if not torch.equal(style.tensors[n], alone.tensors[n])]
    assert {name.split(".")[0] for name in differing} == style.modules
    assert_close(load_file(cut(style, ("style",))["style"]), style.tensors, rtol=0, atol=0)
