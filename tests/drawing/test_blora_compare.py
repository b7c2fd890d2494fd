"""blora_compare.py from its command line to its page, with a toy in place of gen_img.py.

What the real one draws is compared in tests/real/test_real_compare.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from comparing import CHECKPOINT, OF_SDXL, command, compare, make_folder, save, write_checkpoint
from lora_files import CONTENT, STYLE
from PIL import Image
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.slow

OUT = "_out/lora/sdxl/my_1"
NO_CARD = (
    "warning: torch finds no graphics card, so the pictures are drawn on the processor: install "
    "torch with CUDA\n"
)
SMALL = ["--size", "64", "--steps", "1"]
PROMPTS = "# a comment\nA \\[v\\] on a beach --l 7 --d 3\n\nA lighthouse\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with two saves, two prompts, and the page of them: nobody changes it."""
    folder = make_folder(tmp_path_factory.mktemp("compare") / "kohya folder")
    save(folder / OUT / "my_1.safetensors", 750, rank=4)
    save(folder / OUT / "my_1-000002.safetensors", 500)
    (folder / "p.txt").write_text(PROMPTS)
    done = compare(folder, "--loras", OUT, "--prompts", "p.txt", *SMALL)
    page = Path(OUT, "compare.html")
    assert (done.returncode, done.stdout) == (0, f"-> {page}: 14 pictures of 2 saves\n"), done
    assert done.stderr.startswith(f"{NO_CARD}drawing 14 pictures, once the model is loaded\n")
    return folder


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """A copy of it, with the pictures."""
    shutil.copytree(made, tmp_path / "folder")
    return tmp_path / "folder"


def pictures(folder: Path) -> dict[str, Path]:
    """The pictures by their names without the hash."""
    return {path.stem[:-11]: path for path in (folder / OUT / "compare").glob("*.png")}


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def settings(path: Path) -> dict[str, object]:
    with Image.open(path) as image:
        return json.loads(image.text["blora"])


def test_content_style_and_both_of_each_save_are_drawn_and_without_once(made):
    looks = [f"{lora}_{trait}" for lora in ("my_1-000002", "my_1") for trait in
             ("content", "style", "both")]  # fmt: skip
    subjects = "prompt1_seed3", "prompt2_seed1"
    names = [f"{look}_{subject}" for look in ("without", *looks) for subject in subjects]
    assert sorted(pictures(made)) == sorted(names)
    assert sorted(p.name for p in (made / OUT).iterdir()) == [
        "compare", "compare.html", "my_1-000002.safetensors", "my_1.safetensors"
    ]  # fmt: skip


def test_no_two_looks_of_a_subject_are_the_same_picture(made):
    found = pictures(made)
    for subject in ("prompt1_seed3", "prompt2_seed1"):
        drawn = [pixels(path).tobytes() for name, path in found.items() if name.endswith(subject)]
        assert len(set(drawn)) == len(drawn) == 7


def test_a_picture_holds_its_settings_and_the_generators(made):
    path = pictures(made)["my_1_style_prompt1_seed3"]
    told = settings(path)
    assert told["prompt"] == "A \\[v\\] on a beach --l 7 --s 1 --w 64 --h 64"
    assert (told["seed"], told["checkpoint"]["file"]) == (3, "sdxl.safetensors")
    [cut] = told["slices"]
    assert (cut["lora"]["file"], cut["trait"], cut["strength"]) == ("my_1.safetensors", "style", 1)
    with Image.open(path) as image:
        assert image.size == (64, 64)
        assert image.text["seed"] == "3"  # gen_img.py's own


def test_the_page_has_a_section_a_subject_a_row_a_save_and_a_column_a_slice(made, browser):
    browser.open(made / OUT / "compare.html", 1100)
    texts = "[...document.querySelectorAll('{}')].map(e => e.innerText)"
    assert browser.ask(texts.format("h2")) == [
        "A \\[v\\] on a beach, seed 3", "A lighthouse, seed 1",
    ]  # fmt: skip
    assert browser.ask(texts.format("h3")) == ["without", "content", "style", "both"] * 2
    rows = [["my_1-000002", "500 steps"]] * 3 + [["my_1", "750 steps"]] * 3
    captions = [text.split("\n\n") for text in browser.ask(texts.format("figcaption"))]
    assert captions == [["sdxl"], *rows] * 2
    places = "[...document.querySelectorAll('figure')].map(f => [f.offsetLeft, f.offsetTop])"
    left = [x for x, _ in browser.ask(places)][:7]
    assert left == sorted(set(left))[0:1] + sorted(set(left))[1:] * 2
    # The first column's picture stays in sight beside the last row.
    browser.driver.set_window_size(1100, 500)
    browser.ask("window.scrollTo(0, document.querySelectorAll('figure')[4].offsetTop)")
    boxes = "[...document.querySelectorAll('.mat')].map(m => m.getBoundingClientRect().top)"
    tops = browser.ask(boxes)
    assert abs(tops[0] - tops[4]) < 120
    links = browser.ask("[...document.querySelectorAll('a.mat')].map(a => decodeURI(a.href))")
    assert all(Path(link.removeprefix("file://")).is_file() for link in links)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_the_page_is_as_wide_as_the_window_and_a_section_can_be_moved(
    made, browser, scheme
):
    browser.open(made / OUT / "compare.html", 360, scheme)
    assert browser.ask("document.documentElement.scrollWidth") == 360
    widths = browser.ask("[...document.querySelectorAll('.mat')].map(m => m.offsetWidth)")
    assert min(widths) >= 112  # 7rem
    grid = "document.querySelector('.grid')"
    assert browser.ask(f"{grid}.scrollWidth") > browser.ask(f"{grid}.clientWidth")


def test_what_is_drawn_is_kept_and_only_what_changed_is_drawn_again(folder):
    before = {path: path.stat().st_mtime_ns for path in pictures(folder).values()}
    words = ["--loras", OUT, "--prompts", "p.txt", *SMALL]
    done = compare(folder, *words)
    assert (done.returncode, done.stderr) == (
        0,
        "nothing to draw: 14 pictures are there already\n",
    )
    assert {path: path.stat().st_mtime_ns for path in pictures(folder).values()} == before
    save(folder / OUT / "my_1.safetensors", 800, rank=3)
    done = compare(folder, *words, "--seeds", "3")
    # Of prompt 2 all seven of another seed, of prompt 1 three of the new save.
    assert "drawing 10 of 14 pictures, the others are there already\n" in done.stderr
    assert done.returncode == 0


def test_a_picture_that_was_deleted_is_drawn_as_it_was(folder):
    gone = pictures(folder)["my_1_both_prompt2_seed1"]
    before = pixels(gone)
    gone.unlink()
    done = compare(folder, "--loras", OUT, "--prompts", "p.txt", *SMALL)
    assert "drawing 1 of 14 pictures, the others are there already\n" in done.stderr
    assert np.array_equal(pixels(gone), before)


def test_traits_and_strengths_make_columns_and_trainings_make_rows(folder):
    save(folder / "_out/b/last.safetensors", 100, name="b")
    save(folder / "_out/c/last.safetensors", 100, name="c")
    words = ["--traits", "style", "--strengths", "0.5", "1", "--output", "my page.html"]
    loras = ["_out/b/last.safetensors", "_out/c"]
    (folder / "p.txt").write_text("A lighthouse\n")
    done = compare(folder, "--loras", *loras, "--prompts", "p.txt", *words, *SMALL)
    assert done.stdout == "-> my page.html: 5 pictures of 2 saves\n", done.stderr
    page = (folder / "my page.html").read_text("utf-8")
    assert re.findall("<h3.*?>(.*?)</h3>", page) == ["without", "style at 0.5", "style at 1"]
    assert re.findall('"name".*?>(.*?)</p>', page) == ["sdxl", *["b/last"] * 2, *["c/last"] * 2]
    drawn = {path.stem[:-11] for path in (folder / "my page").glob("*.png")}
    looks = [f"{lora}_style_at_{s}" for lora in ("b_last", "c_last") for s in ("0.5", "1")]
    assert drawn == {f"{look}_prompt1_seed1" for look in ("without", *looks)}


def test_a_kohya_ss_folder_has_the_generator_in_its_sd_scripts(tmp_path):
    folder = make_folder(tmp_path / "kohya_ss", kohya_ss=True)
    lora = save(folder / "my.safetensors", None, STYLE)
    (folder / "p.txt").write_text("A lighthouse\n")
    words = ["--loras", lora, "--traits", "style", "--prompts", "p.txt", *SMALL]
    done = compare(folder, *words, "--", "--batch_size", "4")
    assert done.stdout == f"-> {folder / 'compare.html'}: 2 pictures of 1 save\n", done.stderr


# ---- What goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        (
            "raise expected scalar type Half",
            "error: gen_img.py stopped: expected scalar type Half (all that it says is in {log})",
        ),
        (
            "raise CUDA out of memory. Tried to allocate 20.00 MiB",
            "error: gen_img.py ran out of memory: lower --size, such as --size 768, or close other "
            "programs (all that it says is in {log})",
        ),
    ],
)
def test_what_the_generator_refuses_is_told_and_the_page_has_what_was_drawn(
    folder, prompt, sentence
):
    (folder / "p.txt").write_text(f"A lighthouse\n{prompt}\n")
    shutil.rmtree(folder / OUT / "compare")
    done = compare(folder, "--loras", OUT, "--prompts", "p.txt", *SMALL)
    log = Path(OUT, "compare/gen_img.log")
    assert done.returncode == 1
    *_, note, error = done.stderr.splitlines()
    assert note == "note: 13 of 14 pictures are left"
    assert error == sentence.format(log=log)
    assert done.stdout == f"-> {Path(OUT, 'compare.html')}: 1 picture of 2 saves\n"
    page = (folder / OUT / "compare.html").read_text("utf-8")
    assert page.count("not drawn yet") == 13
    assert "RuntimeError" in (folder / log).read_text("utf-8")
    assert [path.suffix for path in (folder / OUT / "compare").iterdir()].count(".png") == 1


def test_an_option_that_the_generator_does_not_know_is_told_in_its_words(folder):
    shutil.rmtree(folder / OUT / "compare")
    done = compare(folder, "--loras", OUT, "--prompts", "p.txt", *SMALL, "--", "--sampler9", "ddim")
    assert done.returncode == 1
    sentence = "error: gen_img.py stopped: gen_img.py: error: unrecognized arguments: --sampler9 "
    assert sentence in done.stderr


@pytest.mark.parametrize(
    ("stop", "code"),
    [
        (lambda pid: os.killpg(pid, signal.SIGINT), 130),  # as a terminal does
        (lambda pid: os.kill(pid, signal.SIGTERM), 143),
    ],
    ids=["Ctrl+C", "kill"],
)
def test_what_stops_it_leaves_a_page_of_what_is_done(folder, stop, code):
    (folder / "p.txt").write_text("A lighthouse\nwait a minute\n")
    shutil.rmtree(folder / OUT / "compare")
    words = ["--loras", OUT, "--prompts", "p.txt", *SMALL]
    child = subprocess.Popen(
        command(folder, *words), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    until = time.monotonic() + 60
    while not pictures(folder) and time.monotonic() < until:
        time.sleep(0.1)
    stop(child.pid)
    out, err = child.communicate(timeout=30)
    assert child.returncode == code
    with pytest.raises(ProcessLookupError):  # gen_img.py has ended too
        os.killpg(child.pid, 0)
    assert out == f"-> {Path(OUT, 'compare.html')}: 1 picture of 2 saves\n"
    stopped = "stopped: the same command goes on with what is left\n" if code == 130 else ""
    assert err.endswith(f"note: 13 of 14 pictures are left\n{stopped}")
    assert (folder / OUT / "compare.html").read_text("utf-8").count("not drawn yet") == 13
    assert not list((folder / OUT / "compare").glob(".drawing*"))


REFUSED = {
    "no generator": (
        [],
        lambda folder: (folder / "gen_img.py").unlink(),
        'no gen_img.py in "{folder}": copy the bundle into a kohya sd-scripts or kohya_ss folder',
    ),
    "no checkpoint": (
        [],
        lambda folder: (folder / CHECKPOINT).unlink(),
        f'no checkpoint at "{CHECKPOINT}": correct --checkpoint',
    ),
    "another model": (
        [],
        lambda folder: write_checkpoint(folder / CHECKPOINT, OF_SDXL[0], (1280, 768)),
        f'"{CHECKPOINT}" is no SDXL checkpoint: correct --checkpoint',
    ),
    "a trait that there is not": (
        ["--traits", "mood"],
        None,
        'unknown trait "mood": choose one of content, style, layout, clip_2_content, text, '
        "content_block, style_block",
    ),
    "traits of the same modules": (
        ["--traits", "content", "content_block"],
        None,
        '"content" and "content_block" hold the same modules: leave one out of --traits',
    ),
    "a trait that the saves have not": (
        ["--traits", "layout"],
        None,
        f'no LoRA to compare in "{OUT}": correct --loras',
    ),
    "a pattern that fits nothing": (
        ["--loras", "_out/*/none*.safetensors"],
        None,
        'no LoRA to compare in "_out/*/none*.safetensors": correct --loras',
    ),
    "no prompt": (
        ["--prompts", "q.txt"],
        lambda folder: (folder / "q.txt").write_text("# none\n"),
        "no prompt in q.txt: write one a line, or correct --prompts",
    ),
    "no prompt file": (
        ["--prompts", "q.txt"],
        None,
        "cannot read q.txt ([Errno 2] No such file or directory: 'q.txt'): correct --prompts",
    ),
    "prompts of the trainer's other kind": (
        ["--prompts", "q.toml"],
        lambda folder: (folder / "q.toml").write_text("[prompt]\n"),
        "q.toml is no text file: write the prompts one a line for --prompts",
    ),
    "a prompt of many pictures": (
        ["--prompts", "q.txt"],
        lambda folder: (folder / "q.txt").write_text("A {e$$red|blue} fox\n"),
        '"A {e$$red|blue} fox" in q.txt draws several pictures: write each variant as a '
        "prompt of its own",
    ),
    "a page that is another's": (
        ["--output", "q.html"],
        lambda folder: (folder / "q.html").write_text("<p>mine</p>"),
        '"q.html" is not an earlier sheet: give --output another name',
    ),
    "an option that would make more than the LoRA differ": (
        ["--", "--mask_path", "x"],
        None,
        "with --mask_path behind -- the pictures cannot be compared: leave it out",
    ),
    "prompts in another encoding": (
        ["--prompts", "q.txt"],
        lambda folder: (folder / "q.txt").write_text("A fox", "utf-16"),
        "q.txt is not in UTF-8: save it so (invalid start byte)",
    ),
    "an option that is set": (
        ["--", "--outd", "x"],
        None,
        "--outd behind -- is set already: leave it out",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_missing_or_does_not_fit_is_one_sentence_and_nothing_is_written(folder, case):
    words, change, sentence = REFUSED[case]
    if change:
        change(folder)
    before = sorted(folder.rglob("*"))
    given = ["--loras", OUT, "--prompts", "p.txt", *SMALL, *words]
    done = compare(folder, *given)
    *notes, error = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (1, "")
    assert error == f"error: {sentence.replace('{folder}', str(folder))}"
    assert all(note.startswith("note: left out ") for note in notes)
    assert sorted(folder.rglob("*")) == before


def test_a_file_in_the_place_of_the_folder_of_the_pictures_is_told(folder):
    (folder / "q").touch()
    done = compare(folder, "--loras", OUT, "--prompts", "p.txt", *SMALL, "--output", "q.html")
    sentence = "error: cannot draw into q ([Errno 17] File exists: 'q'): change --output"
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == sentence
    assert not (folder / "q.html").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--size", "500"], "argument --size: '500' is not a multiple of 32, from 32 on"),
        (["--size", "x768"], "argument --size: 'x768' is no size: write 768, or 768x1024"),
        (["--steps", "0"], "argument --steps: '0' is not a whole number from 1 to 1000"),
        (["--seeds", "-1"], "argument --seeds: '-1' is not a whole number"),
        (["--strengths", "nan"], "argument --strengths: 'nan' is not a finite fp32 number"),
    ],
)
def test_a_value_that_is_none_is_a_mistake_of_usage(made, words, sentence):
    done = compare(made, "--loras", OUT, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == f"blora_compare.py: error: {sentence}"


def test_a_slice_beside_the_saves_is_left_out_of_a_folder_and_refused_by_name(folder):
    save(folder / OUT / "slice.safetensors", 750, CONTENT)
    done = compare(folder, "--loras", OUT, "--prompts", "p.txt", *SMALL)
    assert done.stderr.splitlines()[0] == (
        "note: left out slice.safetensors, which has nothing of style"
    )
    assert done.stdout == f"-> {Path(OUT, 'compare.html')}: 14 pictures of 2 saves\n"
    done = compare(folder, "--loras", f"{OUT}/slice.safetensors", "--prompts", "p.txt", *SMALL)
    assert done.stderr == (
        f'error: {Path(OUT, "slice.safetensors")} has no modules for the trait "style": its blocks '
        "are output_blocks.0.1\n"
    )


def test_names_that_bash_made_of_a_pattern_are_a_folder_s_saves(folder):
    """In the order of their steps, without the slices and the files that are no LoRA."""
    save(folder / OUT / "slice.safetensors", 750, CONTENT)
    (folder / OUT / "torn.safetensors").write_bytes(b"torn")
    names = sorted((folder / OUT).glob("*.safetensors"), reverse=True)
    done = compare(folder, "--loras", *names, "--prompts", "p.txt", *SMALL)
    notes = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
    assert [note.partition(" (")[0].partition(",")[0] for note in notes] == [
        "note: left out torn.safetensors", "note: left out slice.safetensors"
    ]  # fmt: skip
    page = Path(folder / OUT / "compare.html").read_text("utf-8")
    rows = [name for name in re.findall('"name".*?>(.*?)</p>', page) if name != "sdxl"]
    assert rows[:6] == ["my_1-000002"] * 3 + ["my_1"] * 3


def test_a_dora_at_another_strength_needs_the_checkpoint_as_one_file(folder):
    tensors = {}
    for key, tensor in load_file(folder / OUT / "my_1.safetensors").items():
        tensors[key] = tensor
        if key.endswith("up.weight"):
            name = key.removesuffix("lora_up.weight")
            tensors[f"{name}dora_scale"] = torch.ones(len(tensor), 1)
    save_file(tensors, folder / "dora.safetensors")
    (folder / "diffusers").mkdir()
    words = ["--checkpoint", "diffusers", "--loras", "dora.safetensors", "--prompts", "p.txt"]
    done = compare(folder, *words, "--strengths", "0.6", *SMALL)
    assert done.stderr == (
        "error: dora.safetensors is a DoRA, which at another strength than 1 needs the weights of "
        "the checkpoint: give --checkpoint as one .safetensors file, or leave --strengths out\n"
    )


def test_without_torch_there_is_a_sentence(folder):
    env = os.environ | {"PYTHONPATH": str(folder / "packages")}
    (folder / "packages").mkdir()
    (folder / "packages/torch.py").write_text("raise ModuleNotFoundError(name='torch')")
    done = subprocess.run(
        command(folder, "--loras", OUT), cwd=folder, env=env, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    sentence = f"error: no torch in this Python ({sys.executable}): activate kohya's venv\n"
    assert (done.returncode, done.stderr) == (1, sentence)
