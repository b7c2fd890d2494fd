"""README and the pages in docs/ tell the truth, and the sample dataset config is one that works."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sdxl_train_network
import toml
from accelerate.commands.launch import launch_command_parser
from kohya_folder import BASH, CHECKPOINT, ROOT, install
from library import config_util
from lora_files import lora_module
from make_dataset import draw
from PIL import Image
from readme_commands import PAGES, blocks_of, check_launcher, check_setting
from rehearsed_networks import made, network
from safetensors.torch import save_file
from sdxl_checkpoint import sdxl_shapes, write_checkpoint
from sdxl_train_network_options import build_parser

import blora_blocks
import blora_compare
import blora_preflight
import blora_slicer
from blora import launch
from blora.drawing.survey import plan_columns
from blora.preflight import plan
from blora.preflight.folders import check_config
from blora.preflight.report import Report
from blora.preflight.trainer_errors import refusal
from blora.sdxl import load_traits
from blora.tensorfile import read_header

CONFIG = "_in/lora/sdxl/my_project/config.toml"
LORA = "_out/lora/sdxl/my_project_1/my_project_1.safetensors"
NAMES = [name for name in PAGES if name not in ("options", "tested_with")]
# Of git, pip, hf and Python; as far as the pattern below reads them.
OTHERS = {
    "rented_machine": {"--branch", "--upgrade", "--local", "--version"},
    "when_something_fails": {"--train_inpainting"},  # of sd-scripts since 0.10.4
    "see_what_it_learned": {"--zero_terminal_snr"},
}
# What programs print, among what people type.
PRINTED = (
    "  ",
    "error: ",
    "note: ",
    "middle of ",
    "content of ",
    "style of ",
    "-> ",
    "early stop: ",
)
PRINTED += ("LBW: ", "would write ", "Rehearsing ", "This training:", "LyCORIS trains ")
COMMANDS = [
    (page, line)
    for page in NAMES
    for line in "".join(blocks_of(page, "")).splitlines()
    if not line.startswith(PRINTED)
]


# Of sd-scripts' networks/resize_lora.py what the recipe speaks of; test_real_tools.py runs its
# command on the real one.
RESIZE = argparse.ArgumentParser()
for option in "model save_to new_rank dynamic_method device".split():
    RESIZE.add_argument(f"--{option}")
RESIZE.add_argument("--save_precision", choices=["fp16"], required=True)
RESIZE.add_argument("--verbose", action="store_true")
# The same of its tagger, which was run by hand with a toy in place of its model.
TAGGER = argparse.ArgumentParser()
TAGGER.add_argument("folder")
for option in "undesired_tags always_first_tags".split():
    TAGGER.add_argument(f"--{option}")
TAGGER.add_argument("--character_threshold", type=float)
for option in "onnx remove_underscore append_tags".split():
    TAGGER.add_argument(f"--{option}", action="store_true")


def check_slicer(line: str) -> None:
    args = blora_slicer.build_parser().parse_args(shlex.split(line)[2:])
    known = load_traits(args.traits_file)
    blocks = blora_slicer.parse_blocks(args.blocks) if args.blocks else None
    assert blora_slicer.plan_cuts(args.loras, args.traits, args.alphas, known, blocks)


def check_preflight(line: str) -> None:
    """A command line that pre-flight, accelerate if it is named, and sd-scripts take."""
    command = shlex.split(line)
    assert blora_preflight.build_parser().parse_args(command[2:]).options
    script = next(i for i, word in enumerate(command) if word.endswith("sdxl_train_network.py"))
    build_parser().parse_args(command[script + 1 :])
    if command[2:4] == ["accelerate", "launch"]:
        launch_command_parser().parse_args(command[4:])


def check_compare(line: str) -> None:
    """Options of ours that there are, and traits."""
    args = blora_compare.build_parser().parse_args(shlex.split(line.partition(" -- ")[0])[2:])
    assert blora_compare.chosen_traits(args.traits, args.traits_file)


def check_blocks(line: str) -> None:
    """Options of ours that there are and go together, blocks, and pairs of prompts."""
    words = shlex.split(line.partition(" -- ")[0])[2:]
    args = blora_blocks.build_parser().parse_args(words)
    assert not blora_blocks.misfit(args)
    assert plan_columns([*args.content, *args.style, *args.blocks])
    assert blora_blocks.chosen_pairs(args)


def check_pip(line: str) -> None:
    """Packages that the test environment has as well."""
    pinned = (ROOT / "tests/requirements.txt").read_text()
    assert all(f"\n{package}==" in f"\n{pinned}" for package in line.split()[2:])


CHECKS = {
    r"([A-Z_]+=(\"[^\"]*\"|\S+) )*\./(my|sdxl)_|my_": check_launcher,
    r'set "': lambda line: check_setting(line[5:-1]),
    # run below, with the trait that the page adds
    r"python blora_slicer\.py .* middle ": None,
    r"python blora_slicer\.py ": check_slicer,
    r"python blora_compare\.py ": check_compare,
    r"python blora_blocks\.py ": check_blocks,
    r"python finetune/tag_\w+\.py ": lambda line: TAGGER.parse_args(shlex.split(line)[2:]),
    r"python networks/resize_lora\.py ": lambda line: RESIZE.parse_args(shlex.split(line)[2:]),
    # run by test_preflight.py, and with the GUI itself by test_real_gui.py
    r"python blora_preflight\.py logs/print_command\.txt$": None,
    r"python blora_preflight\.py ": check_preflight,
}
IN_README = {
    # run by test_readme.py in bash, by it and by test_windows_lines.py in cmd.exe
    r"source |cp |mkdir -p |cd |\"<kohya folder>|x?copy |mkdir _in\\|pushd ": None,
    r"bash tests/(demo|check)\.sh$": None,  # one is run by the other's tests, the other right now
    r"pip install ": check_pip,
}
IN_UPKEEP = {
    r"for |rmdir ": None,  # run by test_readme.py, in bash and in cmd.exe
    # test_real_tools.py runs it
    r"python -c ": lambda line: ast.parse(shlex.split(line)[2]),
}


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_every_command_is_one_that_works(page, command, tmp_path, monkeypatch):
    shutil.copyfile(ROOT / "blora_traits.json", tmp_path / "blora_traits.json")
    # On the page of blocks blora_blocks.py writes them, as content and style.
    shutil.copyfile(ROOT / "blora_traits.json", tmp_path / "my_traits.json")
    for text in blocks_of(page, "json") if page == "recipes" else ():
        (tmp_path / "my_traits.json").write_text(text)
    monkeypatch.chdir(tmp_path)
    checks = CHECKS | {"README": IN_README, "upkeep": IN_UPKEEP}.get(page, {})
    check = next(check for start, check in checks.items() if re.match(start, command))
    if check:
        check(command)
    assert "--optimizer_type" not in command or "--optimizer_args" in command


def anchors(text: str) -> set[str]:
    """A page's headings, as GitHub turns them into links."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", NAMES)
def test_its_links_within_the_repository_lead_somewhere(page):
    folder = ROOT if page == "README" else ROOT / "docs"
    for target in re.findall(r"(?:\]\(|src(?:set)?=\")(?!https?://)([^)\"]+)", PAGES[page]):
        path, _, anchor = target.partition("#")
        file = folder / (path or f"{page}.md")
        assert file.is_file()
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", NAMES)
def test_the_presets_settings_and_options_that_it_names_exist(page):
    text = PAGES[page]
    assert set(re.findall(r"\bBLORA_[A-Z_]+", text)) <= set(launch.SETTINGS)
    presets = {path.stem for path in (ROOT / "lycoris_presets").iterdir()}
    assert set(re.findall(r"\bb(?:do|lo)ra_(?:content|layout|style)\w*", text)) <= presets
    programs = blora_slicer, blora_preflight, blora_compare, blora_blocks
    parsers = [program.build_parser() for program in programs]
    parsers += [build_parser(), RESIZE, TAGGER, launch_command_parser()]
    known = {option for parser in parsers for option in parser._option_string_actions}
    for benchmark in (ROOT / "tests").glob("bench_*.py"):
        known |= set(re.findall(r'add_argument\(\s*"(--\w+)"', benchmark.read_text()))
    assert set(re.findall(r"(?<![\w-])--[a-z]\w+", text)) - OTHERS.get(page, set()) <= known


def test_the_slicer_prints_what_the_first_screen_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tensors = {}
    for name in network(1).modules:
        tensors |= lora_module(name, 64, 64.0)
    Path(LORA).parent.mkdir(parents=True)
    save_file(tensors, LORA)
    first = blocks_of("README", "")[0]
    _, cut, *shown = first.splitlines()
    code, out, err = run(cut.replace("blora_slicer.py", str(ROOT / "blora_slicer.py")))
    assert (code, out.splitlines(), err) == (0, shown, "")
    assert f"{cut}\n" in blocks_of("README", "")[1:]  # once more, where it is explained


# ---- The GUI -------------------------------------------------------------------------------------
def test_the_page_copies_the_recipes_by_either_shell_to_where_the_gui_lists_them(kohya):
    [bash], [cmd] = blocks_of("gui", "bash"), blocks_of("gui", "bat")
    assert cmd.split()[1:] == [word.replace("/", "\\") for word in bash.split()[1:]]
    presets = Path("presets/lora/user_presets")
    presets.mkdir(parents=True)
    subprocess.run([BASH, "-c", bash], check=True)
    copied = {path.name for path in presets.iterdir()}
    assert copied == {"blora_gui_classic.json", "blora_gui_fast.json"}


@pytest.mark.parametrize("name", ["gui.png", "blocks_page.jpg", "blocks_page_dark.jpg"])
def test_a_page_s_picture_is_there_and_small(name):
    picture = ROOT / "docs" / name
    assert picture.stat().st_size < 150_000
    with Image.open(picture) as opened:
        assert 800 <= opened.width <= 1200


# ---- The sample dataset config -------------------------------------------------------------------
@pytest.fixture
def kohya(tmp_path, monkeypatch) -> Path:
    """A folder as the README sets it up, with one picture; it is the working directory."""
    install(tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("sdxl_train_network.py").touch()
    Path("models").mkdir()
    write_checkpoint(Path("models/sd_xl_base_1.0.safetensors"), sdxl_shapes())
    images = Path(CONFIG).parent / "images"
    images.mkdir(parents=True)
    draw(0, 64).save(images / "hero.png")
    shutil.copyfile(ROOT / "blora_dataset.toml", CONFIG)
    return tmp_path


def test_the_sample_dataset_config_has_the_launchers_paths_and_works_there(kohya, monkeypatch):
    standin = Path(config_util.__file__).parents[1]
    monkeypatch.setattr(sys, "argv", [str(standin / "sdxl_train_network.py")])
    assert CONFIG in Path(CONFIG).read_text(encoding="utf-8")
    args = build_parser().parse_args([f"--dataset_config={CONFIG}", "--caption_extension=.txt"])
    [subset] = sdxl_train_network.load_subsets(args)
    assert (subset.resolution, subset.batch_size, subset.repeats) == ((1024, 1024), 1, 1)
    assert subset.image_dir == Path(CONFIG).parent / "images"
    assert [caption for _, caption in subset.pairs] == ["A [v]"]
    report = Report()
    check_config(args, {}, report)
    assert report == Report()
    (subset.image_dir / "hero.txt").write_text("a knight")
    [subset] = sdxl_train_network.load_subsets(args)
    assert [caption for _, caption in subset.pairs] == ["a knight"]


# ---- See what it learned -------------------------------------------------------------------------
def test_the_sample_prompts_name_the_pages_command():
    prompts = (ROOT / "blora_prompts.txt").read_text(encoding="utf-8")
    lines = "".join(blocks_of("see_what_it_learned", "")).splitlines()
    command, in_cmd = (line for line in lines if line.startswith(("./my_fast", "my_fast")))
    assert f"#   {command}\n" in prompts
    assert in_cmd == command.replace("./", "").replace(".sh", ".bat")


def test_the_plots_values_replace_what_is_in_its_prompt():
    [prompt] = blocks_of("see_what_it_learned", "text")
    for slice_ in ("content", "style"):
        old, new = f"<lora:my_{slice_}:0>", f"<lora:my_{slice_}:1>"
        assert prompt.count(old) == 1
        assert f"| `{old}, {new}` |" in PAGES["see_what_it_learned"]


# ---- Your own blocks -----------------------------------------------------------------------------
def shown(*starts: str) -> list[str]:
    lines = "".join(blocks_of("own_blocks", "")).splitlines()
    return [line for line in lines if line.startswith(starts)]


[LOOK], [_, CUT] = shown("BLORA_CHECK_ONLY=1 "), shown("python blora_slicer.py")


PAIRS = json.loads((ROOT / "blora/drawing/pairs.json").read_text("utf-8"))


def test_the_page_names_every_pair_of_prompts():
    _, _, rest = PAGES["own_blocks"].partition("**Pairs.**")
    paragraph, _, _ = rest.partition("\n\n")
    assert set(re.findall("`([a-z]+)`", paragraph)) == set(PAIRS)


def test_the_page_s_first_command_draws_the_first_pair():
    [command] = shown("python blora_blocks.py --checkpoint")
    pair = next(iter(PAIRS.values()))
    assert shlex.split(command)[4:] == ["--prompt", pair["prompt"], "--other", pair["other"]]


def test_below_that_command_is_the_page_that_it_makes():
    [command] = shown("python blora_blocks.py --checkpoint")
    page, number = f"{Path(shlex.split(command)[3]).stem}_blocks.html", 2 + len(plan_columns([]))
    assert shown("-> pony") == [f"-> {page}: {number} pictures of 1 row"]


def test_below_the_command_that_writes_a_preset_is_what_it_prints(kohya):
    [command] = shown("python blora_blocks.py --write")
    code, out, err = run(command)
    lines = out.replace(f"{kohya.resolve()}", "<kohya folder>").replace("\\", "/").splitlines()
    assert (code, lines, err) == (0, shown("-> <kohya folder>", "LyCORIS trains "), "")
    [training] = shown("BLORA_PRESET=lycoris_presets/my")
    assert lines[0].endswith(training.split()[0].partition("=")[2])


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_has_two_prompts_without_weights_and_a_reason(name):
    assert list(PAIRS[name]) == ["prompt", "other", "why"]
    prompts = PAIRS[name]["prompt"] + PAIRS[name]["other"]
    assert not re.search(r"(?<!\\)[()\[\]]", prompts)  # in gen_img.py a bare bracket is a weight


def looks_at() -> list[str]:
    """The options that sd-scripts gets from the page's look, with a checkpoint that is set."""
    *settings, launcher = LOOK.split()
    environ = {"BLORA_CHECKPOINT": CHECKPOINT} | dict(word.split("=") for word in settings)
    fast = launch.read_launcher(ROOT / launcher.replace("my_", "sdxl_blora_"))
    return launch.chosen_options(fast, launch.chosen_settings(fast, environ), [])


@pytest.fixture
def own_blocks(kohya) -> Path:
    [preset], [trait] = blocks_of("own_blocks", "toml"), blocks_of("own_blocks", "json")
    Path("my_middle.toml").write_text(preset)
    traits = json.loads(Path("blora_traits.json").read_text()) | json.loads(f"{{{trait}}}")
    Path("blora_traits.json").write_text(json.dumps(traits))
    return kohya


def own_plan() -> dict[str, str]:
    args = build_parser().parse_args(looks_at())
    report, traits = Report(), load_traits(Path("blora_traits.json"))
    found = network(args.network_dim, "my_middle.toml")
    report.plan["modules"] = plan.count_by_trait(list(found.modules), traits)
    plan.plan_rank(found, args, report)
    return report.plan


def run(command: str) -> tuple[int, str, str]:
    words = [sys.executable, *shlex.split(command)[1:]]
    done = subprocess.run(words, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_preflight_shows_what_the_pages_preset_selects(own_blocks):
    assert shown("  ") == [f"  {name:<9} {text}" for name, text in own_plan().items()]
    shutil.copyfile(ROOT / "blora_traits.json", "blora_traits.json")
    assert "`80 in middle_block.1`" in PAGES["own_blocks"]
    assert ": 80 in middle_block.1, 80 style" in own_plan()["modules"]


def test_the_look_accepts_the_pages_command(own_blocks):
    line = ["--no_rehearsal", "sdxl_train_network.py", *looks_at()]
    code, _, err = run(shlex.join(["python", "blora_preflight.py", *line]))
    assert (code, err) == (0, "")


def test_a_preset_that_fits_nothing_is_refused_as_shown(own_blocks):
    text = Path("my_middle.toml").read_text()
    Path("none.toml").write_text(text.replace("_block", "_blok"))

    def get_optimizer() -> object:  # which looks for rates in the first group, for Prodigy
        groups = list(made(preset="none.toml").parameters())
        return groups[0]

    with pytest.raises(IndexError) as raised:
        get_optimizer()
    args = build_parser().parse_args(looks_at())
    assert shown("error: ") == [f"error: {refusal(raised.value, args, '')}"]


def test_the_slicer_keeps_the_pages_trait_of_what_its_preset_trains(own_blocks):
    tensors = {}
    for name in network(1, "my_middle.toml").modules:
        tensors |= lora_module(name, 64, 64.0)
    Path(LORA).parent.mkdir(parents=True)
    save_file(tensors, LORA)
    _, out, err = run(CUT)
    assert (out.splitlines(), err) == (shown("middle of", "-> my_middle", "LBW: "), "")
    kept, _ = read_header(Path("my_middle.safetensors"))
    assert set(kept) == {key for key in tensors if "_middle_block_1_" in key}


# ---- Several GPUs --------------------------------------------------------------------------------
def test_preflight_shows_what_two_gpus_change():
    args = build_parser().parse_args(["--max_train_steps=3000", "--mixed_precision=fp16"])
    report, images = Report(), 6 * 2  # with two repeats
    plan.plan_length(plan.length(args, images, 2), [1], plan.Started(2), args, report)
    assert f"  training  {report.plan['training']}\n" in blocks_of("several_gpus", "")


# ---- Recipes -------------------------------------------------------------------------------------
def test_the_recipe_for_one_image_is_the_papers():
    section = PAGES["recipes"].split("## One image")[1]
    [command] = re.findall(r"^BLORA_RANK=64 .*$", section.split("##")[0], re.MULTILINE)
    args = build_parser().parse_args(shlex.split(command)[2:])
    assert (args.learning_rate, args.lr_scheduler, args.max_train_steps) == (5e-5, "constant", 1000)
    assert (args.optimizer_type, args.optimizer_args) == ("AdamW8bit", ["weight_decay=1e-04"])


# ---- When something fails ------------------------------------------------------------------------
def quoted(section: str) -> list[str]:
    """The messages that a section of the page is about."""
    text = PAGES["when_something_fails"].split(f"\n## {section}\n")[1].split("\n## ")[0]
    return [quote for _, quote in re.findall(r"^- (``?)(.+)\1$", text, re.MULTILINE)]


def templates(*sources: Path) -> list[str]:
    """Every text in the sources, with "..." for what is filled in."""
    found = []
    for node in (n for s in sources for n in ast.walk(ast.parse(s.read_text(encoding="utf-8")))):
        if isinstance(node, ast.JoinedStr):
            parts = [p.value if isinstance(p, ast.Constant) else "..." for p in node.values]
            found.append("".join(parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(re.sub(r"\{[\w.]+\}", "...", node.value))
    return found


BEFORE = r"^(error|warning|note): "
ROWS = toml.load(ROOT / "blora/preflight/trainer_errors.toml")["row"]
SOURCES = *ROOT.glob("blora_*.py"), *ROOT.glob("blora/**/*.py")
TEXTS = [re.sub(BEFORE, "", text) for text in templates(*SOURCES)]
TEXTS += [re.sub(r"\{[\w.]+\}", "...", row["sentence"]) for row in ROWS]
OURS = [
    # What a text is added to comes behind its colon.
    re.compile(".+".join(map(re.escape, re.sub(": $", ": ...", text).split("..."))))
    for text in TEXTS
    if len(text.replace("...", "")) >= 12
]
OWN = [
    quote
    for section in ("Pre-flight", "Slicer", "blora_compare", "blora_blocks", "blora_network")
    for quote in quoted(section)
]


@pytest.mark.parametrize("message", [m for m in OWN if not m.startswith("ModuleNotFoundError: ")])
def test_a_message_of_ours_is_one_that_the_programs_have(message):
    ours = re.sub(BEFORE, "", message)
    forms = (ours, ours.removesuffix(" (...)"))  # without the trainer's own words
    assert any(pattern.fullmatch(form) for pattern in OURS for form in forms)


# What the system says of a launcher, not the launcher.
SYSTEM = ("Permission denied", "/usr/bin/env: ", "cannot execute ")


@pytest.mark.parametrize("message", [m for m in quoted("Launchers") if not m.startswith(SYSTEM)])
def test_a_message_of_the_launchers_is_in_what_they_start(message):
    names = "blora/launch.sh blora/launch.bat blora/launch.py sdxl_blora_fast.bat".split()
    in_sh, in_bat, in_python, start = (
        re.sub(r'\\"\$\w+\\"|"%[~\w]+?%?"', '"..."', (ROOT / name).read_text()) for name in names
    )
    if message.startswith("error: "):
        assert message.rpartition(": ")[2].split("...")[0] in in_python
    elif "No blora folder" in message:  # bash has its own words
        assert f"echo {message}& pause" in start
    else:
        assert f'fail "{message}"' in in_sh
        assert f"echo {message}>&2" in in_bat


@pytest.mark.parametrize("package", ["LyCORIS", "accelerate"])
def test_a_message_of_a_package_is_one_that_it_has(package):
    python = ("ModuleNotFoundError: ", "subprocess.", "LycorisNetworkKohya.")  # Python's own words
    folder = Path(importlib.util.find_spec(package.lower()).origin).parent
    names = ("kohya.py", "utils/preset.py", "accelerator.py", "commands/launch.py")
    texts = templates(*(folder / name for name in names if (folder / name).is_file()))
    messages = [m for m in quoted(package) if not m.startswith(python)]
    assert messages
    for message in messages:
        parts = [part.strip() for part in message.split("...") if part.strip(" .")]
        assert any(all(part in text for part in parts) for text in texts), message
