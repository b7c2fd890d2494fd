"""blora_blocks.py from its command line to its page, with a toy in place of gen_img.py.

What the real one draws is compared in tests/real/test_real_blocks.py.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import toml
from comparing import CHECKPOINT, compare, make_folder, write_checkpoint
from kohya_folder import ROOT
from PIL import Image

import blora_blocks
from blora.blocks import attention_blocks
from blora.drawing.survey import plan_columns

pytestmark = pytest.mark.slow

EACH = [*attention_blocks()]
ALL = "+".join(EACH)
PAGE = "sdxl_blocks.html"
SMALL = ["--size", "64", "--steps", "1"]
OWN = ["--prompt", "a fox --l 5 --n blurry", "--other", "a drawing of a teapot"]


def draw(folder: Path, *words: object):
    return compare(folder, *words, program="blora_blocks.py")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with the page of each block, both together, all, and all with the pooled text."""
    folder = make_folder(tmp_path_factory.mktemp("blocks") / "kohya folder")
    blocks = [*EACH, "OUT00+OUT01", ALL, f"{ALL}+POOLED"]
    done = draw(folder, *OWN, *SMALL, "--seeds", 3, 1, "--blocks", *blocks)
    assert (done.returncode, done.stdout) == (0, f"-> {PAGE}: 32 pictures of 2 rows\n"), done
    assert "drawing 32 pictures, once the model is loaded\n" in done.stderr
    return folder


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """A copy of it, with the pictures."""
    shutil.copytree(made, tmp_path / "folder")
    return tmp_path / "folder"


def pictures(folder: Path, seed: int = 1) -> dict[str, Path]:
    """The pictures of a seed by what is drawn: "first", "OUT00"."""
    names = {path: path.stem[:-11] for path in (folder / "sdxl_blocks").glob("*.png")}
    end = f"_seed{seed}"
    found = {name: path for path, name in names.items() if name.endswith(end)}
    return {
        name.removeprefix("own_").removesuffix(end).replace("_", "+"): path
        for name, path in found.items()
    }


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_a_seed_has_both_prompts_and_the_first_with_each_of_the_blocks(made):
    expected = {"first", "second", *EACH, "OUT00+OUT01", ALL, f"{ALL}+POOLED"}
    assert pictures(made).keys() == pictures(made, 3).keys() == expected


def test_no_two_of_them_are_the_same_but_the_second_and_the_first_with_all_of_the_text(made):
    drawn = {name: pixels(path).tobytes() for name, path in pictures(made).items()}
    assert drawn.pop(f"{ALL}+POOLED") == drawn["second"]
    assert len(set(drawn.values())) == len(drawn)


def test_the_options_behind_the_first_prompt_hold_for_both(made):
    texts = []
    for name in ("first", "second"):
        with Image.open(pictures(made)[name]) as image:
            settings = json.loads(image.text["blora"])
            texts.append(settings["prompt"])
            assert "blocks" not in settings
    options = "--l 5 --n blurry --s 1 --w 64 --h 64"
    assert texts == [f"a fox {options}", f"a drawing of a teapot {options}"]


def test_a_picture_holds_the_blocks_and_what_they_heard(made):
    with Image.open(pictures(made)["OUT00+OUT01"]) as image:
        settings = json.loads(image.text["blora"])
    assert settings["blocks"] == ["output_blocks.0.1", "output_blocks.1.1"]
    assert (settings["hear"], settings["seed"]) == ("a drawing of a teapot", 1)
    assert settings["prompt"] == "a fox --l 5 --n blurry --s 1 --w 64 --h 64"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_has_a_row_a_seed_and_a_column_a_block_by_all_its_names(made, browser, scheme):
    browser.open(made / PAGE, 1280, scheme)
    texts = "[...document.querySelectorAll('{}')].map(e => e.innerText)"
    assert browser.ask(texts.format("h2")) == ["a fox → a drawing of a teapot"]
    headings = [text.split("\n") for text in browser.ask(texts.format("h3"))]
    assert [lines[0] for lines in headings[:2]] == ["first prompt", "second prompt"]
    by_name = {lines[0].split()[0]: lines for lines in headings[2:]}
    assert [*by_name] == [*EACH, "OUT00+OUT01", ALL, f"{ALL}+POOLED"]
    for block in attention_blocks().values():
        assert by_name[block.lbw][-2:] == [block.kohya, block.diffusers]
    marked = {name: re.sub(r"^\S+\s*", "", " ".join(x[:-2])) for name, x in by_name.items()}
    trained = {name: mark for name, mark in marked.items() if mark and name in EACH}
    assert trained == {"IN08": "layout", "OUT00": "content", "OUT01": "style"}
    intro = browser.ask(texts.format("body > p"))[0].split("\n")
    assert [line.split(".")[0] for line in intro] == [
        "Each row is a seed",
        "No block hears the pooled text, one vector for the whole prompt, which reaches the U-Net "
        "with the time step",
        "The bars say how far a picture is from the first of its row, from 0, the same, to 1, both "
        "shrunk to 256 pixels",
    ]
    assert intro[0].split(". ")[1].startswith("sdxl.safetensors drew the first prompt, the second")
    assert intro[2].endswith("They are aids to the eye: a number decides nothing.")
    names = browser.ask(texts.format(".name"))
    assert names == ["seed 3"] * 16 + ["seed 1"] * 16


def test_under_each_picture_but_the_first_are_bars_of_how_far_it_is_from_that(made):
    page = (made / PAGE).read_text("utf-8")
    figures = page.split("<figure")[1:]
    numbers = [re.findall(r"(colours|shapes) (\d\.\d\d)", figure) for figure in figures]
    assert [[name for name, _ in found] for found in numbers] == (
        ([[]] + [["colours", "shapes"]] * 15) * 2
    )
    shares = [[float(value) for _, value in found] for found in numbers]
    assert shares[1] == shares[15]  # the second prompt, and all of its text
    assert shares[1] != shares[2]


def test_what_is_drawn_is_kept_and_another_column_is_drawn_alone(folder):
    before = {path: path.stat().st_mtime_ns for path in (folder / "sdxl_blocks").glob("*.png")}
    words = [*OWN, *SMALL, "--seeds", 1]
    done = draw(folder, *words, "--blocks", "up_blocks.0.attentions.0", "middle_block.1")
    assert done.stdout == f"-> {PAGE}: 4 pictures of 1 row\n"
    assert done.stderr == "nothing to draw: 4 pictures are there already\n"
    done = draw(folder, *words, "--blocks", "OUT00+MID", "OUT00")
    assert "drawing 1 of 4 pictures, the others are there already\n" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
    done = draw(folder, *words, "--blocks", "MID+OUT00", "OUT00+MID+OUT00")
    assert done.stderr == "nothing to draw: 3 pictures are there already\n"
    kept = pixels(pictures(folder)["OUT00"])
    pictures(folder)["OUT00"].unlink()
    draw(folder, *words, "--blocks", "OUT00")
    assert np.array_equal(pixels(pictures(folder)["OUT00"]), kept)


def test_pairs_by_name_make_a_section_each_and_the_first_is_the_default(folder):
    known = json.loads((ROOT / "blora/drawing/pairs.json").read_text("utf-8"))
    words = [*SMALL, "--blocks", "OUT01", "--output", "p.html"]
    done = draw(folder, "--pairs", "portrait", "anime", *words)
    assert done.stdout == "-> p.html: 6 pictures of 2 rows\n", done.stderr
    titles = re.findall("<h2.*?>(.*?)</h2>", (folder / "p.html").read_text("utf-8"))
    chosen = [known[name] for name in ("portrait", "anime")]
    assert titles == [f"{pair['prompt']} → {pair['other']}" for pair in chosen]
    drawn = {path.stem[:-11]: path for path in (folder / "p").glob("*.png")}
    seconds = [pixels(drawn[f"{name}_second_seed1"]) for name in ("portrait", "anime")]
    assert (seconds[0] != seconds[1]).any()
    done = draw(folder, *words, "--output", "d.html", "--seeds", 4)
    [first, *_] = known.values()
    title = f"{first['prompt']} → {first['other']}"
    assert f">{title}</h2>" in (folder / "d.html").read_text("utf-8")


def test_each_pair_hears_its_own_second_prompt(folder):
    words = [*SMALL, "--blocks", f"{ALL}+POOLED", "--pairs", "colour", "objects"]
    assert draw(folder, *words, "--output", "p.html").returncode == 0
    drawn = {path.stem[:-11]: pixels(path) for path in (folder / "p").glob("*.png")}
    for name in ("colour", "objects"):
        all_text = next(drawn[key] for key in drawn if key.startswith(f"{name}_IN04"))
        assert np.array_equal(all_text, drawn[f"{name}_second_seed1"])


def test_without_guidance_the_whole_batch_is_conditional(folder):
    words = ["--prompt", "a fox --l 1", "--other", "a teapot", *SMALL]
    assert draw(folder, *words, "--blocks", f"{ALL}+POOLED", "--output", "g.html").returncode == 0
    drawn = {path.stem[:-11]: pixels(path) for path in (folder / "g").glob("*.png")}
    first, second = drawn["own_first_seed1"], drawn["own_second_seed1"]
    all_text = next(drawn[key] for key in drawn if key.startswith("own_IN04"))
    assert np.array_equal(all_text, second)
    assert (first != second).any()


def test_without_scikit_image_the_page_has_no_bars_and_it_is_said_how_it_has(folder):
    (folder / "skimage.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'skimage'\", name='skimage')\n"
    )
    done = draw(folder, *OWN, *SMALL, "--blocks", "OUT00", "--seeds", 1)
    assert done.returncode == 0
    reason = "No module named 'skimage'"
    sentence = f"note: nothing is measured ({reason}): pip install scikit-image\n"
    assert sentence in done.stderr
    assert "bars" not in (folder / PAGE).read_text("utf-8").split("<h2")[0].split("</style>")[1]
    assert "colours" not in (folder / PAGE).read_text("utf-8").split("<h2")[1]


def test_a_sampler_that_needs_four_steps_draws_too(folder):
    words = [*OWN, "--size", "64", "--steps", "4", "--blocks", "OUT00"]
    done = draw(folder, *words, "--", "--sampler", "pndm")
    assert (done.returncode, done.stdout) == (0, f"-> {PAGE}: 3 pictures of 1 row\n"), done.stderr


def test_a_survey_that_ends_early_shows_what_is_there_and_goes_on(folder):
    gone = [pictures(folder, 3)["first"], pictures(folder)["IN05"]]
    drawn = [pixels(path) for path in gone]
    for path in gone:
        path.unlink()
    words = [*OWN, *SMALL, "--seeds", 3, 1, "--blocks", "IN04", "IN05"]
    toy = folder / "toy_sdxl.py"  # the text of the other prompt is heard before the first fails
    whole, start = toy.read_text("utf-8"), "def tokenize(caption: str) -> list[int]:\n"
    toy.write_text(whole.replace(start, f"{start}    assert caption != 'a fox'\n"))
    done = draw(folder, *words)
    assert (done.returncode, done.stdout) == (1, f"-> {PAGE}: 6 pictures of 2 rows\n")
    assert "note: 2 of 8 pictures are left\n" in done.stderr
    figures = (folder / PAGE).read_text("utf-8").split("<figure")[1:]
    empty = [figure.count("not drawn yet") for figure in figures]
    bars = [figure.count("colours") for figure in figures]
    # Of a row without its first picture nothing is measured.
    assert (empty, bars) == ([1, 0, 0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 1, 1, 0])
    toy.write_text(whole)
    assert draw(folder, *words).returncode == 0
    assert all(
        np.array_equal(pixels(path), before) for path, before in zip(gone, drawn, strict=True)
    )


# ---- What goes wrong -----------------------------------------------------------------------------

ELEVEN = "IN04, IN05, IN07, IN08, MID, OUT00, OUT01, OUT02, OUT03, OUT04, OUT05"
REFUSED = {
    "no generator": (
        [],
        lambda folder: (folder / "gen_img.py").unlink(),
        'no gen_img.py in "{folder}": copy the bundle into a kohya sd-scripts or kohya_ss folder',
    ),
    "another model": (
        [],
        lambda folder: write_checkpoint(folder / CHECKPOINT, shape=(1280, 768)),
        f'"{CHECKPOINT}" is no SDXL checkpoint: correct --checkpoint',
    ),
    "a block that there is not": (
        ["--blocks", "OUT00+OUT07"],
        None,
        f'SDXL has no attention block "OUT07": choose one of {ELEVEN}',
    ),
    "a pair that there is not": (
        ["--pairs", "cat"],
        None,
        'no pair of prompts "cat": choose one of fox, portrait, anime, objects, colour, layout',
    ),
    "the same prompt twice": (
        ["--prompt", "a fox --l 5", "--other", " a  fox "],
        None,
        "both prompts are the same, so nothing would change: change --other",
    ),
    "options behind the second prompt": (
        ["--prompt", "a fox", "--other", "a teapot --l 5"],
        None,
        '"a teapot --l 5" has options, and those behind --prompt hold for both: leave them out of '
        "--other",
    ),
    "two dashes, at which sd-scripts ends the words": (
        ["--prompt", "a fox", "--other", "a teapot -- on a table"],
        None,
        '"a teapot -- on a table" has options, and those behind --prompt hold for both: leave them '
        "out of --other",
    ),
    "no words": (
        ["--prompt", "--l 5", "--other", "a teapot"],
        None,
        "a prompt in --prompt has no words: write them before the options",
    ),
    "a prompt of many pictures": (
        ["--prompt", "a fox", "--other", "a {e$$red|blue} teapot"],
        None,
        '"a {e$$red|blue} teapot" in --other draws several pictures: write each variant as a '
        "prompt of its own",
    ),
    "a prompt of which the seed chooses a variant": (
        ["--prompt", "a {red|blue} fox", "--other", "a {red|blue} teapot"],
        None,
        '"a {red|blue} teapot --s 1 --w 64 --h 64" has variants, and sd-scripts chooses one by the '
        "seed: write one of them",
    ),
    "options of which the seed chooses a variant": (
        ["--prompt", "a fox --l {1|7}", "--other", "a teapot"],
        None,
        '"a teapot --l {1|7} --s 1 --w 64 --h 64" has variants, and sd-scripts chooses one by the '
        "seed: write one of them",
    ),
    "a prompt in several parts": (
        ["--prompt", "a fox AND a hare", "--other", "a teapot"],
        None,
        '"a fox AND a hare" in --prompt has AND, at which sd-scripts parts a prompt for several '
        "regions: write it small",
    ),
    "a comment in place of a prompt": (
        ["--prompt", "# a fox", "--other", "a teapot"],
        None,
        '"# a fox" in --prompt is a comment to sd-scripts: begin it with words',
    ),
    "a page that is another's": (
        ["--output", "q.html"],
        lambda folder: (folder / "q.html").write_text("<p>mine</p>"),
        '"q.html" is not an earlier sheet: give --output another name',
    ),
    "prompts in any order": (
        ["--", "--shuffle_prompts"],
        None,
        "with --shuffle_prompts behind -- the pictures cannot be compared: leave it out",
    ),
    "an option that is set": (
        ["--", "--network_mul", "1"],
        None,
        "--network_mul behind -- is set already: leave it out",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_missing_or_does_not_fit_is_one_sentence_and_nothing_is_written(folder, case):
    words, change, sentence = REFUSED[case]
    if change:
        change(folder)
    before = sorted(folder.rglob("*"))
    done = draw(folder, *SMALL, *words)
    *_, error = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (1, "")
    assert error == f"error: {sentence.replace('{folder}', str(folder))}"
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "give --checkpoint to draw with, or --write with the blocks that you chose"),
        (
            ["--write", "my", "--content", "MID", "--blocks", "MID"],
            "give --checkpoint to draw with, or --write with the blocks that you chose",
        ),
        (
            ["--checkpoint", "x", "--v_parameterization", "--scale", "5"],
            "unknown --v_parameterization --scale 5: options of gen_img.py go behind --",
        ),
        (["--checkpoint", "x", "--prompt", "a fox"], "--prompt and --other go together: give both"),
        (
            ["--checkpoint", "x", "--prompt", "a", "--other", "b", "--pairs", "fox"],
            "--pairs brings its own prompts: leave it out, or --prompt and --other",
        ),
        (
            ["--checkpoint", "x", "--content", "MID"],
            "--content and --style are for --write: give it a name",
        ),
    ],
)
def test_options_that_do_not_go_together_are_a_mistake_of_usage(words, sentence, capsys):
    with pytest.raises(SystemExit) as ended:
        blora_blocks.main(words)
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(f"blora_blocks.py: error: {sentence}\n")


# ---- Write ---------------------------------------------------------------------------------------


def test_chosen_blocks_are_written_as_a_preset_and_traits_and_lycoris_is_asked(folder):
    words = ["--write", "my", "--content", "OUT00", "--style", "OUT01+up_blocks.0.attentions.2"]
    program = [sys.executable, "blora_blocks.py", *words]
    done = subprocess.run(program, cwd=folder, capture_output=True, text=True, check=False)
    preset, traits = folder / "lycoris_presets/my_content_style.toml", folder / "my_traits.json"
    assert (done.returncode, done.stdout.splitlines()) == (
        0,
        [
            f"-> {preset}",
            f"-> {traits}",
            "LyCORIS trains 80 modules of content and 160 modules of style",
        ],
    ), done.stderr
    assert done.stderr == ""
    assert len(toml.load(preset)["unet_target_name"]) == 3
    assert [*json.loads(traits.read_text())] == ["content", "style"]


@pytest.mark.parametrize("style", [["OUT01+OUT02"], ["OUT01", "OUT02"], ["OUT01,OUT02"]])
def test_blocks_are_joined_by_a_plus_a_blank_or_a_comma(style):
    words = ["--write", "my", "--content", "up_blocks.0.attentions.0", "--style", *style]
    chosen = blora_blocks.chosen_blocks(blora_blocks.build_parser().parse_args(words))
    names = {name: [block.lbw for block in blocks] for name, blocks in chosen.items()}
    assert names == {"content": ["OUT00"], "style": ["OUT01", "OUT02"]}


def test_columns_may_be_parted_by_commas_and_a_plus_may_have_blanks_around_it():
    columns = plan_columns(["OUT00, MID", "out01", "+", "IN8 ,"])
    assert [column.name for column in columns] == ["OUT00", "MID", "IN08+OUT01"]


@pytest.mark.parametrize("option", ["--content", "--style"])
def test_blocks_that_a_script_left_empty_are_not_all_of_them(option, folder, capsys):
    assert blora_blocks.main(["--write", "my", option, ""]) == 1
    error = f'error: SDXL has no attention block "": choose one of {ELEVEN}\n'
    assert capsys.readouterr().err == error


def test_without_lycoris_it_is_said_that_nobody_checked(folder):
    (folder / "lycoris.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'lycoris'\", name='lycoris')\n"
    )
    program = [sys.executable, "blora_blocks.py", "--write", "my", "--style", "MID"]
    done = subprocess.run(program, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert [Path(line[3:]).name for line in done.stdout.splitlines()] == [
        "my_style.toml",
        "my_traits.json",
    ]
    sentence = "no lycoris in this Python, so nobody checked what the preset trains"
    assert done.stderr == f"note: {sentence}\n"


def test_a_lycoris_that_would_train_anything_else_is_not_to_be_trained_with(folder):
    (folder / "lycoris").mkdir()
    (folder / "lycoris/__init__.py").touch()
    (folder / "lycoris/kohya.py").write_text(
        "class Network:\n    lora_name = 'lora_unet_out_2'\n\n\n"
        "Network.unet_loras, Network.text_encoder_loras = [Network], []\n\n\n"
        "def create_network(*args, **kwargs):\n    return Network()\n"
    )
    program = [sys.executable, "blora_blocks.py", "--write", "my", "--style", "IN04"]
    done = subprocess.run(program, cwd=folder, capture_output=True, text=True, check=False)
    start = f"by {folder}/lycoris_presets/my_style.toml LyCORIS does not train exactly the "
    assert done.returncode == 1
    modules = "attention of these blocks, but differs in modules (17): lora_unet_input_blocks_4_1_"
    assert done.stderr.startswith(f"error: {start}{modules}")
    assert done.stderr.endswith(" and 14 more: do not train with it\n")


def test_the_pooled_text_is_no_block_to_train(folder):
    done = draw(folder, "--write", "my", "--content", "OUT00+POOLED", "--style", "OUT01")
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr == "error: POOLED is no block, so no preset trains it: give blocks to --write\n"
    )
    assert not [*folder.glob("my*"), *folder.glob("lycoris_presets/my*")]
