"""What sd-scripts leaves unsaid of captions, folders and settings, and what --preview shows.

The page of --preview itself is tested in test_sheet.py.
"""

from __future__ import annotations

import html
import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from reports import reported

from blora.preflight.captions import check_captions
from blora.preflight.dataset import Folder, Picture, letters_kept, list_folders
from blora.preflight.folders import (
    check_folders,
    config_subsets,
    overridden,
    passed_over,
    unnumbered,
)
from blora.preflight.images import Opened
from blora.preflight.preview import sections_of, trained_picture, write_preview
from blora.preflight.report import Report
from blora.sheet import Line

DOG = {"a.txt": "a dog"}


def draw(path: Path) -> Path:
    """A real picture of 8 x 8 pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path, "PNG")
    return path


def make_folder(
    path: Path,
    pictures: str = "a.png",
    beside: dict[str, str] = DOG,
    default: str = "",
    **settings: object,
) -> Folder:
    """A folder of pictures with files beside them, read as sd-scripts reads it.

    Its captions are the first lines of the .txt files, with `default` as class_tokens.
    """
    path.mkdir()
    for name, text in beside.items():
        (path / name).write_text(text, encoding="utf-8")
    read = []
    for file in (draw(path / name) for name in pictures.split()):
        text = file.with_suffix(".txt")
        words = text.read_text("utf-8").split("\n")[0].strip() if text.exists() else default
        numbers = len(words.split()), len(words)
        read.append(Picture(file, (8, 8), (1024, 1024), 1, words, words, *numbers))
    seen = frozenset(picture.path for picture in read)
    return Folder(
        path,
        tuple(read),
        seen,
        **{"caption_extension": ".txt", "class_tokens": default, **settings},
    )


def said(*folders: Folder) -> list[str]:
    """Warnings, then notes, with the folder that the tests write into as ~."""
    report = Report()
    check_captions(folders, report)
    check_folders(folders, report)
    assert not report.errors
    found = [*report.warnings, *(f"note: {note}" for note in report.notes)]
    return [text.replace(str(folders[0].path.parent), "~") for text in found]


# ---- Captions ------------------------------------------------------------------------------------

MISSING = 'images in "~/dogs" have no .txt caption'
RENAME = "not read: rename to .txt, or correct caption_extension"
CAPTIONS = {
    "each picture has one": ("a.png", DOG, "", ""),
    "none, with class_tokens, as in the paper": ("a.png b.png", {}, "A [v]", ""),
    "none, and no class_tokens": ("a.png b.png", DOG, "", f"1 of 2 {MISSING}: b.png"),
    "many without one": (
        "a.png b.png c.png d.png e.png",
        {},
        "",
        f"5 of 5 {MISSING}: a.png, b.png, c.png and 2 more",
    ),
    "one of two, and class_tokens": (
        "a.png b.png",
        DOG,
        "A [v]",
        f'note: 1 of 2 {MISSING} and are trained as "A [v]", the class_tokens: b.png',
    ),
    "under another ending": (
        "a.png b.png",
        {"a.caption": "a dog", "b.png.txt": "a cat"},
        "A [v]",
        f'2 of 2 {MISSING} and are trained as "A [v]", the class_tokens: a.caption, b.png.txt are '
        + RENAME,
    ),
    "under another ending, without class_tokens": (
        "a.png",
        {"a.TXT": "a dog"},
        "",
        f"1 of 1 {MISSING} and are trained without one: a.TXT is {RENAME}",
    ),
    "of several lines": (
        "a.png",
        {"a.txt": "a dog\n\nand a cat\n"},
        "",
        'captions of several lines are trained with their first line alone, 1 in "~/dogs": a.txt: '
        "make it one line, or set enable_wildcard = true, which draws a line at each step",
    ),
    "with blank lines behind it": ("a.png", {"a.txt": "a dog\n \n\n"}, "", ""),
    "with a blank line before it": (
        "a.png b.png",
        {"a.txt": "\na dog\n", "b.txt": "a cat"},
        "",
        'captions that begin with an empty line are trained as empty, 1 in "~/dogs": a.txt: put '
        "the words on the first line",
    ),
}


@pytest.mark.parametrize("case", CAPTIONS)
def test_captions_that_are_not_trained_are_named(tmp_path, case):
    *files, sentence = CAPTIONS[case]
    assert said(make_folder(tmp_path / "dogs", *files)) == ([sentence] if sentence else [])


def test_a_caption_that_the_trainer_found_elsewhere_is_one(tmp_path):
    folder = make_folder(tmp_path / "dogs", beside={})
    [picture] = folder.pictures
    assert said(replace(folder, pictures=(replace(picture, caption="a dog"),))) == []


def test_with_wildcards_several_lines_are_no_mistake(tmp_path):
    beside = {"a.txt": "a dog\na cat\n"}
    assert said(make_folder(tmp_path / "dogs", beside=beside, has_wildcards=True)) == []


def test_where_a_metadata_file_lists_the_pictures_nothing_is_looked_for_beside_them(tmp_path):
    beside = {"a.caption": "a dog", "a.gif": "GIF8"}
    folder = make_folder(tmp_path / "dogs", beside=beside, caption_extension="")
    draw(tmp_path / "dogs/below/a.png")
    assert said(folder) == []


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (75, None),
        (76, "shorten them, or give --max_token_length=150"),
        (150, "shorten them, or give --max_token_length=150"),
        (151, "shorten them, or give --max_token_length=225"),
        (225, "shorten them, or give --max_token_length=225"),
        (226, "shorten them"),
    ],
)
def test_a_caption_that_is_cut_is_named_with_its_tokens(tmp_path, words, advice):
    beside = {"a.txt": "dog " * words, "b.txt": "a cat"}
    warning = f'captions are cut after 75 tokens, 1 in "~/dogs": a.png ({words}): {advice}'
    folder = make_folder(tmp_path / "dogs", "a.png b.png", beside, most_tokens=75)
    assert said(folder) == ([warning] if advice else [])


@pytest.mark.parametrize("most", range(5))
def test_a_caption_is_cut_at_the_last_letter_within_its_tokens(most):
    text = "one two three"
    kept = letters_kept(text, lambda part: len(part.split()), most)
    assert text[:kept].strip() == " ".join(text.split()[:most])


def test_a_prefix_that_cached_captions_leave_out_is_named(tmp_path):
    folder = make_folder(tmp_path / "dogs", has_affix=True)
    assert said(folder) == [
        'caption_prefix and caption_suffix of "~/dogs" are not trained with '
        "--cache_text_encoder_outputs: write them into the captions"
    ]
    [picture] = folder.pictures
    assert said(replace(folder, pictures=(replace(picture, prompt="sks, a dog"),))) == []


# ---- Folders -------------------------------------------------------------------------------------

LEFT_OUT = {
    # of another kind, a phone, the web; without an ending, with one of its own
    "save as .png or .jpg": "b.gif b.heic b.jfif b b.jpg_large",
    "write the ending in lower case": "b.Png b.Jpg b.Jpeg b.Webp b.Bmp",
    "pip install pillow-avif-plugin": "b.avif",
    "pip install pillow-jxl-plugin": "b.jxl",
}


@pytest.mark.parametrize(
    ("name", "remedy"), [(name, key) for key, names in LEFT_OUT.items() for name in names.split()]
)
def test_a_picture_that_is_left_out_for_its_ending_is_named(tmp_path, name, remedy):
    folder = make_folder(tmp_path / "dogs")
    draw(folder.path / name)
    assert said(folder) == [f'left out of "~/dogs", unsupported file type: {name}: {remedy}']


def test_what_is_no_picture_is_not_named(tmp_path):
    # A bitmap begins with BM, and so may a text.
    beside = dict.fromkeys(["._a.png", ".hidden.gif", "a.npz", "notes.md", "Thumbs.db"], "BM")
    assert said(make_folder(tmp_path / "dogs", beside={**DOG, **beside, "readme": "text"})) == []


def test_pictures_in_a_subfolder_are_named_unless_it_is_trained_itself(tmp_path):
    outer = make_folder(tmp_path / "dogs")
    inner = make_folder(tmp_path / "dogs/more")
    (tmp_path / "dogs/empty").mkdir()
    assert said(outer) == [
        'pictures in subfolders of "~/dogs" are not trained, more: move them up, or add a '
        "[[datasets.subsets]] for each folder"
    ]
    assert said(outer, inner) == []


def test_regularization_pictures_that_count_nothing_are_named(tmp_path):
    dogs = make_folder(tmp_path / "dogs", loss_weight=0.0)  # which counts for is_reg alone
    reg = make_folder(tmp_path / "reg", is_reg=True, loss_weight=0.0)
    assert said(dogs, reg) == [
        "1 of 2 pictures an epoch have no effect, since prior_loss_weight is 0 and is_reg is set "
        "for ~/reg: remove that folder, or give --prior_loss_weight=1"
    ]
    assert said(dogs, replace(reg, loss_weight=1.0)) == []


def test_the_plan_names_each_folder_with_its_pictures_and_repeats(tmp_path):
    dogs = replace(make_folder(tmp_path / "dogs", "a.png b.png"), path=Path("dogs"))
    reg = replace(dogs, path=Path("reg"), repeats=3, is_reg=True)
    assert list_folders([dogs, reg]) == '2 in "dogs", 2 in "reg" (x3) (is_reg)'


# ---- The config ----------------------------------------------------------------------------------


def test_folders_that_the_config_names_and_nobody_trains_are_named(tmp_path):
    for picture in ("dogs/a.png", "gifs/a.gif", "none/a.png"):
        draw(tmp_path / picture)
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
    subsets = [{"image_dir": "a"}, {"flip_aug": False}]
    general = {"num_repeats": 2, "flip_aug": True}
    config = {"general": general, "datasets": [{"num_repeats": 3, "subsets": subsets}]}
    outer = {"num_repeats": 3, "flip_aug": True, "subsets": subsets}
    assert config_subsets(config) == [{**outer, "image_dir": "a"}, {**outer, "flip_aug": False}]


def test_folders_of_train_data_dir_without_a_number_are_named(tmp_path):
    for name in ("3_dogs", "7", "cats", "12cats"):
        draw(tmp_path / name / "a.png")
    (tmp_path / "log").mkdir()
    assert [text.replace(str(tmp_path), "~") for text in unnumbered(tmp_path)] == [
        f'"~/{name}" is skipped, since its name does not begin with a number of repeats: call '
        f'it "1_{name}"'
        for name in ("12cats", "cats")
    ]


@pytest.mark.parametrize(
    ("given", "config", "told"),
    [
        # what the recipe gives, and a config with a mind of its own
        ({"resolution": (1024, 1024)}, {"resolution": 768}, None),
        ({"enable_bucket": True}, {"enable_bucket": False}, None),
        ({"min_bucket_reso": 512}, {"min_bucket_reso": 256}, None),
        ({"bucket_reso_steps": 32}, {"bucket_reso_steps": 64}, None),
        ({"random_crop": True}, {"random_crop": False}, None),
        ({"caption_extension": ".txt"}, {"caption_extension": ".caption"}, None),
        # what both say, or the config does not
        ({"train_batch_size": 4}, {"batch_size": 4}, None),
        ({"train_batch_size": 4}, {"resolution": 768}, None),
        ({"resolution": (768, 768)}, {"resolution": 768}, None),
        ({"resolution": "768"}, {"resolution": [768, 768]}, None),
        (
            {"train_batch_size": 4, "seed": 0},
            {"batch_size": 1},
            ("--train_batch_size=4 has", "batch_size = 1"),
        ),
        (
            {"dataset_repeats": 4},
            {"num_repeats": 1},
            ("--dataset_repeats=4 has", "num_repeats = 1"),
        ),
        (
            {"train_batch_size": 4, "resolution": (768, 512), "flip_aug": True},
            {"batch_size": 1, "resolution": 1024, "flip_aug": False},
            (
                "--train_batch_size=4 and --resolution=768,512 and --flip_aug=true have",
                "batch_size = 1 and resolution = 1024 and flip_aug = false",
            ),
        ),
    ],
)
def test_an_option_that_the_config_overrides_is_named_unless_the_recipe_gives_it(
    given, config, told
):
    sentence = '{} no effect, since "c.toml" has {}: change it there'
    subsets = config_subsets({"datasets": [{**config, "subsets": [{"image_dir": "a"}]}]})
    found = overridden(given, subsets, Path("c.toml"))
    assert found == ([sentence.format(*told)] if told else [])


# ---- The sheet of --preview ----------------------------------------------------------------------

THUMBNAIL = b"RIFF"


@pytest.fixture
def dogs(tmp_path) -> tuple[Folder, list[Opened]]:
    """A folder of two pictures with captions, and both as they were opened."""
    folder = make_folder(tmp_path / "dogs", "0.png 1.png", {"0.txt": "a dog", "1.txt": "a dog"})
    opened = [Opened(p.path, p.bucket, p.size, thumbnail=THUMBNAIL) for p in folder.pictures]
    return folder, opened


SIZE = Line("1024x1024 of 8x8", "detail")


@pytest.mark.parametrize(
    ("trained", "file", "lines"),
    [
        ({"size": (1024, 1024)}, "", [Line("1024x1024", "detail"), Line("a dog")]),
        (
            {"size": (8, 4), "repeats": 3},
            "",
            [Line("1024x1024 of 8x4, x3", "detail"), Line("a dog")],
        ),
        ({"prompt": "a dog and a cat"}, "", [SIZE, Line("a dog", cut=" and a cat")]),
        ({}, "a dog\nand a cat\n", [SIZE, Line("a dog"), Line("", cut="and a cat")]),
        (
            {"prompt": "doghouse", "kept": 3},
            "doghouse\na bird",
            [SIZE, Line("dog", cut="house"), Line("", cut="a bird")],
        ),
        (
            {"prompt": "", "kept": 0},
            "\na dog",
            [SIZE, Line("(no words) ", "note"), Line("", cut="a dog")],
        ),
    ],
)
def test_a_picture_has_its_name_bucket_repeats_and_caption_with_what_is_cut_struck_out(
    dogs, trained, file, lines
):
    folder, [opened, _] = dogs
    (folder.path / "0.txt").write_text(file)
    picture = trained_picture(replace(folder.pictures[0], **trained), folder, opened)
    assert (picture.name, picture.thumbnail) == ("0.png", THUMBNAIL)
    assert list(picture.lines) == lines


def test_a_photo_that_is_stored_turned_says_so(dogs):
    folder, [opened, _] = dogs
    lines = trained_picture(folder.pictures[0], folder, replace(opened, orientation=6)).lines
    assert lines == (SIZE, Line("stored turned (EXIF)", "alarm"), Line("a dog"))


def test_what_is_left_out_comes_last_grey_with_its_reason(dogs):
    folder, opened = dogs
    opened[1] = replace(opened[1], error="the file is empty")
    draw(folder.path / "z.gif")
    (folder.path / "z.heic").write_bytes(b"")
    trained, lost = sections_of([folder], opened)
    assert (trained.title, lost.title) == (str(folder.path), "Left out")
    assert [(picture.name, picture.is_out) for picture in trained.pictures] == [("0.png", False)]
    assert all(picture.is_out for picture in lost.pictures)
    drawn = {p.name: (*p.lines, p.thumbnail is not None) for p in lost.pictures}
    assert drawn == {
        "1.png": (Line("the file is empty", "alarm"), True),
        "z.gif": (Line(".gif is not read", "alarm"), True),
        "z.heic": (Line(".heic is not read", "alarm"), False),
    }


@pytest.mark.parametrize(
    ("is_reg", "title", "reason"),
    [(True, " (is_reg)", "surplus regularization image"), (False, "", "kept for validation")],
)
def test_pictures_that_the_trainer_knows_and_does_not_take_are_left_out(
    dogs, is_reg, title, reason
):
    folder, opened = dogs
    taken = replace(folder, pictures=folder.pictures[:1], is_reg=is_reg)
    trained, lost = sections_of([taken], opened)
    assert trained.title == f"{folder.path}{title}"
    [picture] = lost.pictures
    assert (picture.name, picture.lines) == ("1.png", (Line(reason, "alarm"),))


def test_one_picture_in_two_folders_is_drawn_in_each_as_it_is_trained_there(dogs):
    folder, [opened, _] = dogs
    [picture, _] = folder.pictures
    small = replace(picture, bucket=(512, 512))
    folders = [replace(folder, pictures=(each,)) for each in (picture, small)]
    seen = [opened, replace(opened, bucket=(512, 512), thumbnail=b"small")]
    first, second, *_ = sections_of(folders, seen)
    assert [s.pictures[0].thumbnail for s in (first, second)] == [THUMBNAIL, b"small"]


def test_the_sheet_shows_the_sections_and_the_report_says_so(dogs, tmp_path):
    folder, opened = dogs
    sheet = tmp_path / "sheet.html"
    (folder.path / "z.heic").write_bytes(b"")  # is left out, and cannot be drawn
    assert reported(write_preview, sheet, [folder], opened) == Report(
        notes=[f'"{sheet}" shows the pictures as the trainer will see them']
    )
    page = sheet.read_text(encoding="utf-8")
    assert re.findall(r"<h2.*?>(.*) <small>(.*)</small>", page) == [
        (html.escape(str(folder.path)), "2"),
        ("Left out", "1"),
    ]
    assert page.count("data:image/webp;base64,UklGRg==") == 2


@pytest.mark.parametrize(("shown", "of"), [(0, 2), (1, 2), (0, 0)])
def test_pictures_that_could_not_be_opened_are_not_said_to_be_shown(dogs, tmp_path, shown, of):
    """As with a release of sd-scripts that opens them in another way."""
    folder, opened = dogs
    sheet = tmp_path / "sheet.html"
    assert reported(write_preview, sheet, [folder] * (of > 0), opened[:shown]) == Report(
        warnings=[
            f'"{sheet}" shows {shown} of {of} pictures: pre-flight could not open the others as '
            "this release of sd-scripts does"
        ]
    )
    assert sheet.read_text(encoding="utf-8").count("a dog") == of


def test_a_sheet_that_cannot_be_written_is_an_error(dogs, tmp_path):
    folder, opened = dogs
    report = reported(write_preview, tmp_path / "gone/sheet.html", [folder], opened)
    [error] = report.errors
    assert error.startswith(f"cannot write {tmp_path / 'gone/sheet.html'} (")
    assert (report.notes, report.warnings) == ([], [])
