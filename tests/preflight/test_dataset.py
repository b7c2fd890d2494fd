"""What sd-scripts leaves unsaid of captions, folders and settings: which words pre-flight finds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from blora.preflight.captions import check_captions
from blora.preflight.dataset import Folder, Picture, letters_kept, list_folders
from blora.preflight.folders import (
    check_folders,
    config_subsets,
    overridden,
    passed_over,
    unnumbered,
)
from blora.preflight.report import Report


def draw(path: Path) -> Path:
    """A real picture of 8 x 8 pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path, "PNG")
    return path


def make_folder(path: Path, files: dict[str, str], default: str = "", **settings) -> Folder:
    """A folder of files, each .png a picture, read as sd-scripts reads it.

    Its captions are the first lines of the .txt files, with `default` as class_tokens.
    """
    pictures = []
    for name, text in files.items():
        if name.endswith(".png"):
            draw(path / name)
        else:
            path.mkdir(parents=True, exist_ok=True)
            (path / name).write_text(text, encoding="utf-8")
    for name in (name for name in files if name.endswith(".png")):
        file = (path / name).with_suffix(".txt")
        caption = file.read_text("utf-8").split("\n")[0].strip() if file.exists() else default
        picture = Picture(path / name, (8, 8), (1024, 1024), 1, caption, caption)
        words = len(caption.split())
        pictures.append(replace(picture, tokens=words, kept=len(caption)))
    seen = frozenset(picture.path for picture in pictures)
    known = {"caption_extension": ".txt", "class_tokens": default, **settings}
    return Folder(path, tuple(pictures), seen, **known)


def said(*folders: Folder) -> tuple[list[str], list[str]]:
    """Warnings and notes, with the folder that the tests write into as ~."""
    report = Report()
    check_captions(folders, report)
    check_folders(folders, report)
    assert not report.errors
    parent = str(folders[0].path.parent)
    shortened = (
        [text.replace(parent, "~") for text in some] for some in (report.warnings, report.notes)
    )
    return tuple(shortened)


# ---- Captions ------------------------------------------------------------------------------------

CAPTIONS = {
    "each picture has one": ({"a.png": "", "a.txt": "a dog"}, "", [], []),
    "none, with class_tokens, as in the paper": ({"a.png": "", "b.png": ""}, "A [v]", [], []),
    "none, and no class_tokens": (
        {"a.png": "", "b.png": "", "b.txt": "a dog"},
        "",
        ['1 of 2 images in "~/dogs" have no .txt caption: a.png'],
        [],
    ),
    "many without one": (
        {f"{n}.png": "" for n in range(9)},
        "",
        ['9 of 9 images in "~/dogs" have no .txt caption: 0.png, 1.png, 2.png and 6 more'],
        [],
    ),
    "one of two, and class_tokens": (
        {"a.png": "", "b.png": "", "b.txt": "a dog"},
        "A [v]",
        [],
        [
            '1 of 2 images in "~/dogs" have no .txt caption and are trained as "A [v]", the '
            "class_tokens: a.png"
        ],
    ),
    "under another ending": (
        {"a.png": "", "a.caption": "a dog", "b.png": "", "b.png.txt": "a cat"},
        "A [v]",
        [
            '2 of 2 images in "~/dogs" have no .txt caption and are trained as "A [v]", the '
            "class_tokens: a.caption, b.png.txt are not read: rename to .txt, or correct "
            "caption_extension"
        ],
        [],
    ),
    "under another ending, without class_tokens": (
        {"a.png": "", "a.TXT": "a dog"},
        "",
        [
            '1 of 1 images in "~/dogs" have no .txt caption and are trained without one: a.TXT is '
            "not read: rename to .txt, or correct caption_extension"
        ],
        [],
    ),
    "of several lines": (
        {"a.png": "", "a.txt": "a dog\n\nand a cat\n"},
        "",
        [
            'captions of several lines are trained with their first line alone, 1 in "~/dogs": '
            "a.txt: make it one line, or set enable_wildcard = true, which draws a line at each "
            "step"
        ],
        [],
    ),
    "with blank lines behind it": ({"a.png": "", "a.txt": "a dog\n \n\n"}, "", [], []),
    "with a blank line before it": (
        {"a.png": "", "a.txt": "\na dog\n", "b.png": "", "b.txt": "a cat"},
        "",
        [
            'captions that begin with an empty line are trained as empty, 1 in "~/dogs": '
            "a.txt: put the words on the first line"
        ],
        [],
    ),
}


@pytest.mark.parametrize("case", CAPTIONS)
def test_captions_that_are_not_trained_are_named(tmp_path, case):
    files, default, warnings, notes = CAPTIONS[case]
    assert said(make_folder(tmp_path / "dogs", files, default)) == (warnings, notes)


def test_a_caption_that_the_trainer_found_elsewhere_is_one(tmp_path):
    folder = make_folder(tmp_path / "dogs", {"a.png": ""})
    [picture] = folder.pictures
    assert said(replace(folder, pictures=(replace(picture, caption="a dog"),))) == ([], [])


def test_with_wildcards_several_lines_are_no_mistake(tmp_path):
    files = {"a.png": "", "a.txt": "a dog\na cat\n"}
    assert said(make_folder(tmp_path / "dogs", files, has_wildcards=True)) == ([], [])


def test_where_a_metadata_file_lists_the_pictures_nothing_is_looked_for_beside_them(tmp_path):
    files = {"a.png": "", "a.caption": "a dog", "a.gif": "GIF8"}
    draw(tmp_path / "dogs/below/a.png")
    assert said(make_folder(tmp_path / "dogs", files, caption_extension="")) == ([], [])


@pytest.mark.parametrize(
    ("words", "most", "advice"),
    [
        (75, 75, None),
        (76, 75, "shorten them, or give --max_token_length=150"),
        (151, 75, "shorten them, or give --max_token_length=225"),
        (226, 75, "shorten them"),
    ],
)
def test_a_caption_that_is_cut_is_named_with_its_tokens(tmp_path, words, most, advice):
    files = {"a.png": "", "a.txt": "dog " * words, "b.png": "", "b.txt": "a cat"}
    warning = f'captions are cut after {most} tokens, 1 in "~/dogs": a.png ({words}): {advice}'
    folder = make_folder(tmp_path / "dogs", files, most_tokens=most)
    assert said(folder) == ([warning] if advice else [], [])


@pytest.mark.parametrize("most", [0, 1, 2, 3, 4])
def test_a_caption_is_cut_at_the_last_letter_within_its_tokens(most):
    text = "one two three"
    kept = letters_kept(text, lambda part: len(part.split()), most)
    assert text[:kept].strip() == " ".join(text.split()[:most])


def test_a_prefix_that_cached_captions_leave_out_is_named(tmp_path):
    folder = make_folder(tmp_path / "dogs", {"a.png": "", "a.txt": "a dog"}, has_affix=True)
    [warning], _ = said(folder)
    assert warning == (
        'caption_prefix and caption_suffix of "~/dogs" are not trained with '
        "--cache_text_encoder_outputs: write them into the captions"
    )
    [picture] = folder.pictures
    assert said(replace(folder, pictures=(replace(picture, prompt="sks, a dog"),))) == ([], [])


# ---- Folders -------------------------------------------------------------------------------------

LEFT_OUT = {
    "of another kind": ("b.gif", "save as .png or .jpg"),
    "of a phone": ("b.heic", "save as .png or .jpg"),
    "of the web": ("b.jfif", "save as .png or .jpg"),
    **{
        f"with a capital in .{ending}": (f"b.{ending}", "write the ending in lower case")
        for ending in ("Png", "Jpg", "Jpeg", "Webp", "Bmp")
    },
    "for a plugin": ("b.avif", "pip install pillow-avif-plugin"),
    "without an ending": ("b", "save as .png or .jpg"),
    "with an ending of its own": ("b.jpg_large", "save as .png or .jpg"),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_a_picture_that_is_left_out_for_its_ending_is_named(tmp_path, case):
    name, remedy = LEFT_OUT[case]
    folder = make_folder(tmp_path / "dogs", {"a.png": "", "a.txt": "a dog"})
    draw(folder.path / name)
    warning = f'left out of "~/dogs", unsupported file type: {name}: {remedy}'
    assert said(folder) == ([warning], [])


@pytest.mark.parametrize(
    "name", ["._a.png", ".hidden.gif", "a.npz", "notes.md", "readme", "Thumbs.db"]
)
def test_what_is_no_picture_is_not_named(tmp_path, name):
    folder = make_folder(tmp_path / "dogs", {"a.png": "", "a.txt": "a dog"})
    ending = Path(name).suffix
    # A bitmap begins with BM, and so may a text.
    (folder.path / name).write_text("BM" if ending else "no picture")
    assert said(folder) == ([], [])


def test_pictures_in_a_subfolder_are_named_unless_it_is_trained_itself(tmp_path):
    files = {"a.png": "", "a.txt": "a dog"}
    outer = make_folder(tmp_path / "dogs", files)
    inner = make_folder(tmp_path / "dogs/more", files)
    (tmp_path / "dogs/empty").mkdir()
    assert said(outer) == (
        [
            'pictures in subfolders of "~/dogs" are not trained, more: move them up, or add a '
            "[[datasets.subsets]] for each folder"
        ],
        [],
    )
    assert said(outer, inner) == ([], [])


def test_regularization_pictures_that_count_nothing_are_named(tmp_path):
    files = {"a.png": "", "a.txt": "a dog"}
    dogs = make_folder(tmp_path / "dogs", files, loss_weight=0.0)  # which counts for is_reg alone
    reg = make_folder(tmp_path / "reg", files, is_reg=True, loss_weight=0.0)
    assert said(dogs, reg) == (
        [
            "1 of 2 pictures an epoch have no effect, since prior_loss_weight is 0 and is_reg is "
            "set for ~/reg: remove that folder, or give --prior_loss_weight=1"
        ],
        [],
    )
    assert said(dogs, replace(reg, loss_weight=1.0)) == ([], [])


def test_the_plan_names_each_folder_with_its_pictures_and_repeats(tmp_path):
    dogs = make_folder(Path(tmp_path / "dogs"), {"a.png": "", "b.png": ""})
    reg = replace(dogs, path=Path("reg"), repeats=3, is_reg=True)
    assert (
        list_folders([replace(dogs, path=Path("dogs")), reg])
        == '2 in "dogs", 2 in "reg" (x3) (is_reg)'
    )


# ---- The config ----------------------------------------------------------------------------------


def test_folders_that_the_config_names_and_nobody_trains_are_named(tmp_path):
    draw(tmp_path / "dogs/a.png")
    draw(tmp_path / "gifs/a.gif")
    draw(tmp_path / "none/a.png")
    (tmp_path / "empty").mkdir()
    names = ("dogs", "gifs", "none", "empty", "missing", "dogs")
    subsets = [{"image_dir": str(tmp_path / name)} for name in names]
    subsets[2]["num_repeats"] = 0
    found = passed_over([*subsets, {}], [tmp_path / "dogs"])
    assert [text.replace(str(tmp_path), "~") for text in found] == [
        '"~/gifs" is skipped (sd-scripts does not read a.gif): save them as .png or .jpg',
        '"~/none" is skipped (num_repeats = 0): give it 1',
        '"~/empty" is skipped (no pictures): put some there, or correct image_dir',
        '"~/dogs" is listed twice but counts once: use num_repeats to weight it',
    ]


def test_a_subset_has_what_the_outer_tables_say_unless_it_says_so_itself():
    config = {
        "general": {"num_repeats": 2, "flip_aug": True},
        "datasets": [{"num_repeats": 3, "subsets": [{"image_dir": "a"}, {"flip_aug": False}]}],
    }
    assert config_subsets(config) == [
        {
            "num_repeats": 3,
            "flip_aug": True,
            "subsets": config["datasets"][0]["subsets"],
            "image_dir": "a",
        },
        {"num_repeats": 3, "flip_aug": False, "subsets": config["datasets"][0]["subsets"]},
    ]


def test_folders_of_train_data_dir_without_a_number_are_named(tmp_path):
    for name in ("3_dogs", "7", "cats", "12cats"):
        draw(tmp_path / name / "a.png")
    (tmp_path / "log").mkdir()
    assert [text.replace(str(tmp_path), "~") for text in unnumbered(tmp_path)] == [
        f'"~/{name}" is skipped, since its name does not begin with a number of repeats: call '
        f'it "1_{name}"'
        for name in ("12cats", "cats")
    ]


def one_table(**settings) -> dict:
    return {"datasets": [{**settings, "subsets": [{"image_dir": "a"}]}]}


OVERRIDDEN = {
    "the recipe, and a config with a mind of its own": (
        {
            "resolution": (1024, 1024),
            "enable_bucket": True,
            "min_bucket_reso": 512,
            "bucket_reso_steps": 32,
            "random_crop": True,
            "caption_extension": ".txt",
        },
        one_table(
            resolution=768,
            enable_bucket=False,
            min_bucket_reso=256,
            bucket_reso_steps=64,
            random_crop=False,
            caption_extension=".caption",
        ),
        "",
    ),
    "what both say": ({"train_batch_size": 4}, one_table(batch_size=4), ""),
    "what the config does not say": ({"train_batch_size": 4}, one_table(resolution=768), ""),
    "one size in two ways": ({"resolution": (768, 768)}, one_table(resolution=768), ""),
    "as a text": ({"resolution": "768"}, one_table(resolution=[768, 768]), ""),
    "another batch": (
        {"train_batch_size": 4, "seed": 0},
        one_table(batch_size=1),
        '--train_batch_size=4 has no effect, since "c.toml" has batch_size = 1: change it there',
    ),
    "other repeats": (
        {"dataset_repeats": 4},
        one_table(num_repeats=1),
        '--dataset_repeats=4 has no effect, since "c.toml" has num_repeats = 1: change it there',
    ),
    "several": (
        {"train_batch_size": 4, "resolution": (768, 512), "flip_aug": True},
        one_table(batch_size=1, resolution=1024, flip_aug=False),
        "--train_batch_size=4 and --resolution=768,512 and --flip_aug=true have no effect, "
        'since "c.toml" has batch_size = 1 and resolution = 1024 and flip_aug = false: change it '
        "there",
    ),
}


@pytest.mark.parametrize("case", OVERRIDDEN)
def test_an_option_that_the_config_overrides_is_named_unless_the_recipe_gives_it(case):
    given, config, sentence = OVERRIDDEN[case]
    assert overridden(given, config_subsets(config), Path("c.toml")) == (
        [sentence] if sentence else []
    )
