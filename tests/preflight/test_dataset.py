"""A dataset: captions, folders, pictures and caches that do less than they seem, and its sheet."""

from __future__ import annotations

import io
import logging
import os
import random
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import PIL
import pytest
from PIL import Image
from reports import reported

from blora.preflight import folders, images, opening
from blora.preflight.captions import check_captions
from blora.preflight.dataset import (
    DROPOUTS,
    Folder,
    Picture,
    dropped_by,
    letters_kept,
    list_folders,
)
from blora.preflight.images import broken_pictures
from blora.preflight.opening import ORIENTATION, Header, Job, Look, MaskError, Opened, open_one
from blora.preflight.preview import sections_of, trained_picture, write_preview
from blora.preflight.report import Report
from blora.sheet import Line, make_thumbnail

DOG = {"a.txt": "a dog"}
BUCKET = (512, 512)


@pytest.fixture(autouse=True)
def working_directory(tmp_path, monkeypatch) -> None:
    """With a picture of 8 x 4; a dataset is here what opens each of its pictures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(opening, "openers", lambda dataset, _cached: dataset)
    draw("a.png")


def draw(path: str) -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 4)).save(path, "PNG")
    return Path(path)


def make_folder(
    pictures: str = "a.png", beside: dict[str, str] = DOG, path: str = "dogs", **settings: object
) -> Folder:
    """A folder of pictures with files beside them, read as sd-scripts reads it.

    Its captions are the first lines of the .txt files, or else its class_tokens.
    """
    for file, text in ((Path(path, name), text) for name, text in beside.items()):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    read = []
    for file in (draw(f"{path}/{name}") for name in pictures.split()):
        words = settings.get("class_tokens", "")
        if (text := file.with_suffix(".txt")).exists():
            words = text.read_text("utf-8").split("\n")[0].strip()
        numbers = len(words.split()), len(words)
        read.append(Picture(file, (8, 4), BUCKET, 1, words, words, *numbers))
    seen = frozenset(picture.path for picture in read)
    return Folder(Path(path), tuple(read), seen, **{"caption_extension": ".txt", **settings})


def said(*subsets: Folder) -> list[str]:
    """Warnings, then notes."""
    report = reported(check_captions, subsets)
    folders.check_folders(subsets, report)
    assert not report.errors
    return [*report.warnings, *(f"note: {note}" for note in report.notes)]


# ---- Captions ------------------------------------------------------------------------------------

UNLISTED = (
    '1 of 1 images in "meta.json" are trained without a word: a.png: give each a "caption" there'
)


def make_listed(text: str, **settings: object) -> Folder:
    """A picture of a metadata_file of this text, by which it has no caption."""
    Path("meta.json").write_text(text)
    listed = {"metadata": Path("meta.json"), "caption_extension": ""}
    return make_folder(beside={}, **listed, **settings)


TOKENS = {"class_tokens": "A [v]"}
INSTEAD = 'are trained as "A [v]", the class_tokens'
MISSING = 'images in "dogs" have no .txt caption'
RENAME = "not read: rename to .txt, or correct caption_extension"
SEVERAL = {"a.txt": "a dog\n\nand a cat\n"}
LONG = {number: {"a.txt": "dog " * number} for number in (75, 150, 225, 226)}
CUT = 'captions are cut after 75 tokens, 1 in "dogs": a.png'
SAID = {
    f"1 of 2 {MISSING}: b.png": lambda: make_folder("a.png b.png"),
    f"5 of 5 {MISSING}: a.png, b.png, c.png and 2 more": lambda: make_folder(
        "a.png b.png c.png d.png e.png", {}
    ),
    f"note: 1 of 2 {MISSING} and {INSTEAD}: b.png": lambda: make_folder("a.png b.png", **TOKENS),
    f"2 of 2 {MISSING} and {INSTEAD}: a.caption, b.png.txt are {RENAME}": lambda: make_folder(
        "a.png b.png", {"a.caption": "a dog", "b.png.txt": "a cat"}, **TOKENS
    ),
    f"1 of 1 {MISSING} and are trained without one: a.TXT is {RENAME}": lambda: make_folder(
        beside={"a.TXT": ""}
    ),
    'captions of several lines are trained with their first line alone, 1 in "dogs": a.txt: make '
    "it one line, or set enable_wildcard = true, which draws a line at each step": lambda: (
        make_folder("a.png b.png", {**SEVERAL, "b.txt": "a cat\n \n\n"})
    ),
    'captions that begin with an empty line are trained as empty, 1 in "dogs": a.txt: put the '
    "words on the first line": lambda: make_folder(
        "a.png b.png", {"a.txt": "\na dog\n", "b.txt": "a cat"}
    ),
    **{
        f"{CUT} ({tokens}): shorten them{remedy}": lambda n=tokens: make_folder(beside=LONG[n])
        for tokens, remedy in {
            150: ", or give --max_token_length=150",
            225: ", or give --max_token_length=225",
            226: "",
        }.items()
    },
    'caption_prefix and caption_suffix of "dogs" are not trained with '
    "--cache_text_encoder_outputs: write them into the captions": lambda: make_folder(
        has_affix=True
    ),
    'no caption of "dogs" is trained, since caption_dropout_rate = 1.0 drops every word at each '
    "step: lower or remove it": lambda: make_folder(dropped_by=("caption_dropout_rate = 1.0",)),
    f"{UNLISTED}": lambda: make_listed('{"a.png": {"tags": "dog"}}'),
    f"{UNLISTED}, or remove enable_wildcard, which drops tags without one": lambda: make_listed(
        '{"a.png": {"tags": "dog"}}', has_wildcards=True
    ),
}


@pytest.mark.parametrize("sentence", SAID)
def test_captions_that_are_not_trained_are_named(sentence):
    assert said(SAID[sentence]()) == [sentence]


def test_a_folder_without_a_mistake_passes():
    expected = {
        "as many tokens as there may be, beside files that are no pictures": {
            # A bitmap begins with BM, and so may a text.
            "beside": dict.fromkeys("._a.png .b.gif a.npz notes.md Thumbs.db".split(), "BM")
            | {**LONG[75], "readme": "text"},
        },
        "class_tokens alone, as in the paper": {"beside": {}, **TOKENS},
        "several lines, with wildcards": {"beside": SEVERAL, "has_wildcards": True},
        "a metadata file, beside which nothing counts": {
            "beside": {"a.caption": "a dog", "a.gif": "GIF8", "below/a.png": "GIF8"},
            "caption_extension": "",
        },
    }
    for number, (case, settings) in enumerate(expected.items()):
        assert said(make_folder(path=f"{number}", **settings)) == [], case


def test_a_caption_is_what_the_trainer_found_and_trains():
    found, trained = make_folder(path="found", beside={}), make_folder(has_affix=True)
    for folder, change in ((found, {"caption": "a dog"}), (trained, {"prompt": "sks, a dog"})):
        [picture] = folder.pictures
        assert said(replace(folder, pictures=(replace(picture, **change),))) == []


def test_a_dropout_that_leaves_no_word_is_named_alone():
    def process_caption(subset: SimpleNamespace, caption: str) -> str:
        every = subset.caption_dropout_every_n_epochs
        is_dropped = random.random() < subset.caption_dropout_rate
        return "" if is_dropped or (every and dataset.current_epoch % every == 0) else caption

    dataset = SimpleNamespace(process_caption=process_caption, current_epoch=1)
    for settings, named in (
        ((0, 0, 0), ()),
        ((0.99, 2, 0.5), ()),
        ((1.0, 2, 0), ("caption_dropout_rate = 1.0",)),
        ((0.1, 1, 0), ("caption_dropout_every_n_epochs = 1",)),
    ):
        subset = SimpleNamespace(**dict(zip(DROPOUTS, settings, strict=True)))
        assert dropped_by(dataset, subset) == named


def test_what_a_list_leaves_behind_is_named():
    folder = make_folder("a.png b.png", {"a.txt": "a dog", "b.txt": "a cat"})
    kept = replace(folder, cache=Path("cache.json"))
    changed = replace(kept.pictures[0], caption="a wolf")
    kept = replace(kept, pictures=(changed, kept.pictures[1]), uncached=frozenset({Path("c.png")}))
    captions, pictures = said(kept)
    assert captions.startswith('captions are trained as "cache.json" has them')
    assert ", 1 in all: a.png: delete" in captions
    assert '"cache.json" does not list them, 1 in all: c.png: delete' in pictures
    [doubled] = said(replace(folder, metadata=Path("a.json"), replaced=2))
    assert doubled.startswith('2 pictures of "a.json" will not be trained, since another')


def test_a_caption_is_cut_at_the_last_letter_within_its_tokens():
    text = "one two three"
    for most in range(5):
        kept = letters_kept(text, lambda part: len(part.split()), most)
        assert text[:kept].strip() == " ".join(text.split()[:most])


# ---- Folders -------------------------------------------------------------------------------------


def test_a_picture_that_is_left_out_for_its_ending_is_named():
    folder = make_folder()
    for remedy, names in {
        # of another kind, a phone, the web; without an ending, with one of its own
        "save as .png or .jpg": "b.gif b.heic b.jfif b b.jpg_large",
        "write the ending in lower case": "b.Png b.Jpg b.Jpeg b.Webp b.Bmp",
        "pip install pillow-avif-plugin": "b.avif",
        "pip install pillow-jxl-plugin": "b.jxl",
    }.items():
        for left_out in map(draw, (f"dogs/{name}" for name in names.split())):
            sentence = 'left out of "dogs", unsupported file type: {}: {}'
            assert said(folder) == [sentence.format(left_out.name, remedy)]
            left_out.unlink()


def test_pictures_in_a_subfolder_are_named_unless_it_is_trained_itself():
    outer, inner = make_folder(), make_folder(path="dogs/more")
    Path("dogs/empty").mkdir()
    assert said(outer) == [
        'pictures in subfolders of "dogs" are not trained, more: move them up, or add a '
        "[[datasets.subsets]] for each folder"
    ]
    assert said(outer, inner) == []


def test_regularization_pictures_that_count_nothing_are_named():
    dogs = make_folder(loss_weight=0.0)  # which counts for is_reg alone
    reg = make_folder(path="reg", is_reg=True, loss_weight=0.0)
    assert said(dogs, reg) == [
        "1 of 2 pictures an epoch have no effect, since prior_loss_weight is 0 and is_reg is set "
        "for reg: remove that folder, or give --prior_loss_weight=1"
    ]
    assert said(dogs, replace(reg, loss_weight=1.0)) == []


def test_regularization_pictures_that_are_too_many_are_named():
    reg = make_folder("a.png b.png", path="reg", is_reg=True)
    surplus, small = draw("reg/c.png"), draw("reg/d.png")
    reg = replace(reg, seen=reg.seen | {surplus, small}, too_small=frozenset({small}))
    [warning] = reported(folders.check_surplus, [reg]).warnings
    assert warning.startswith('sd-scripts leaves out 1 regularization picture of "reg", since')
    assert warning.endswith("remove c.png")
    assert not reported(folders.check_surplus, [replace(reg, loss_weight=0)]).warnings


def test_the_plan_names_each_folder_with_its_pictures_and_repeats():
    dogs = make_folder("a.png b.png")
    reg = replace(dogs, path=Path("reg"), repeats=3, is_reg=True)
    assert list_folders([dogs, reg]) == '2 in "dogs", 2 in "reg" (x3) (is_reg)'


def test_folders_that_the_config_names_and_nobody_trains_are_named(monkeypatch):
    monkeypatch.setattr(folders, "own", lambda _name: lambda path, _: [*Path(path).glob("*.png")])
    for picture in ("dogs/a.png", "gifs/a.gif", "none/a.png", "small/a.png"):
        draw(picture)
    Path("empty").mkdir()
    Path("empty.json").touch()
    names = ("dogs", "gifs", "none", "empty", "missing", "dogs", "small", "./dogs")
    subsets = [{"image_dir": name} for name in names]
    subsets[2]["num_repeats"] = 0
    subsets.append({"metadata_file": "empty.json", "image_dir": "dogs"})
    assert folders.passed_over([*subsets, {}], ["dogs", "./dogs"]) == [
        '"dogs" is listed twice in one dataset but counts once: use num_repeats to weight it',
        '"gifs" is skipped (sd-scripts does not read a.gif): save them as .png or .jpg',
        '"none" is skipped (num_repeats = 0): give it 1',
        '"empty" is skipped (no pictures): put some there, or correct image_dir',
        '"small" is skipped (its pictures are all left out): lower skip_image_resolution or '
        "validation_split",
        '"empty.json" is skipped (no pictures in it): list some there',
    ]


def test_folders_of_train_data_dir_without_a_number_are_named():
    for name in ("3_dogs", "7", "cats", "12cats"):
        draw(f"in/{name}/a.png")
    Path("in/log").mkdir()
    assert folders.unnumbered(Path("in")) == [
        f'"{Path("in", name)}" is skipped, since its name does not begin with a number of '
        f'repeats: call it "1_{name}"'
        for name in ("12cats", "cats")
    ]


def test_a_subset_has_what_the_outer_tables_say_unless_it_says_so_itself():
    subsets = [{"image_dir": "a"}, {"flip_aug": False}]
    general = {"num_repeats": 2, "flip_aug": True}
    config = {"general": general, "datasets": [{"num_repeats": 3, "subsets": subsets}]}
    outer = {"num_repeats": 3, "flip_aug": True, "subsets": subsets}
    read = folders.config_subsets(config)
    assert read == [{**outer, "image_dir": "a"}, {**outer, "flip_aug": False}]


def without_effect(given: dict[str, object], config: dict[str, object]) -> list[str]:
    subsets = folders.config_subsets({"datasets": [{**config, "subsets": [{"image_dir": "a"}]}]})
    return folders.overridden(given, subsets, Path("c.toml"))


def test_an_option_that_the_config_overrides_is_named():
    for option, setting in (("train_batch_size", "batch_size"), ("dataset_repeats", "num_repeats")):
        assert without_effect({option: 4, "seed": 0}, {setting: 1}) == [
            f'--{option}=4 has no effect, since "c.toml" has {setting} = 1: change it there'
        ]
    options = {"train_batch_size": 4, "resolution": (768, 512), "flip_aug": True}
    assert without_effect(options, {"batch_size": 1, "resolution": 1024, "flip_aug": False}) == [
        "--train_batch_size=4 and --resolution=768,512 and --flip_aug=true have no effect, since "
        '"c.toml" has batch_size = 1 and resolution = 1024 and flip_aug = false: change it there'
    ]


def test_a_config_of_several_values_means_them():
    tables = [{"resolution": side, "subsets": [{"image_dir": "a"}]} for side in (512, 768)]
    subsets = folders.config_subsets({"datasets": tables})
    assert folders.overridden({"resolution": (512, 512)}, subsets, Path("c.toml")) == []
    assert len(folders.overridden({"resolution": (640, 640)}, subsets, Path("c.toml"))) == 1


def test_an_option_of_the_recipe_or_of_both_passes():
    for given, config in (
        # what the recipe gives, and a config with a mind of its own
        ({"resolution": (1024, 1024)}, {"resolution": 768}),
        ({"enable_bucket": True}, {"enable_bucket": False}),
        ({"min_bucket_reso": 512}, {"min_bucket_reso": 256}),
        ({"bucket_reso_steps": 32}, {"bucket_reso_steps": 64}),
        ({"random_crop": True}, {"random_crop": False}),
        ({"caption_extension": ".txt"}, {"caption_extension": ".caption"}),
        # what both say, or the config does not
        ({"train_batch_size": 4}, {"batch_size": 4}),
        ({"train_batch_size": 4}, {"resolution": 768}),
        ({"resolution": (768, 768)}, {"resolution": 768}),
        ({"resolution": "768"}, {"resolution": [768, 768]}),
    ):
        assert without_effect(given, config) == [], given


# ---- Pictures ------------------------------------------------------------------------------------


LOOK = Look(np.zeros((8, 8, 3), np.uint8))


def job(opener: Mock, path: str = "a.png", has_buckets: bool = True, **info: object) -> Job:
    """A picture, whether it has buckets, and what sd-scripts makes of it: a look, or an error."""
    settings = {"absolute_path": path, "bucket_reso": BUCKET, "cond_img_path": "mask.png", **info}
    return Job(SimpleNamespace(**settings), opener, has_buckets)


def opened(
    path: str, result: object = LOOK, has_buckets: bool = True, limit: int = 0, **info: object
) -> Opened:
    return open_one(job(Mock(side_effect=[result]), path, has_buckets, **info), limit)


def test_a_picture_is_opened_with_its_size_and_on_request_a_thumbnail():
    assert opened("a.png") == Opened(Path("a.png"), BUCKET, (8, 4))
    thumbnail = opened("a.png", limit=1000).thumbnail
    assert thumbnail == make_thumbnail(Image.new("RGB", (8, 8)), 1000)
    gone = opened("gone.png", ValueError("a"))
    assert (gone.size, gone.error) == ((0, 0), os.strerror(2))  # in the words of the system


def test_why_it_cannot_be_opened_is_told_with_the_remedy():
    small = AssertionError("image size is small / 画像サイズが小さいようです: a.png")
    re_save = "re-save or remove it"
    buckets = "add --enable_bucket, or save it at the size of the resolution"
    for error, has_buckets, text, reason, remedy in (
        (small, False, None, "image size is small, it is 8x4", buckets),
        (small, True, None, "image size is small, it is 8x4", re_save),
        (OSError("image file\nis cut"), False, None, "image file", re_save),
        (ValueError(), False, None, "ValueError", re_save),
        (PIL.UnidentifiedImageError(), True, None, "PIL cannot read it as a picture", re_save),
        (small, True, "\n<!DOCTYPE html>", "it is a web page, not a picture", re_save),
        (ValueError(), True, "", "the file is empty", re_save),
        (ValueError(), True, " \n", "the file is empty", re_save),
    ):
        if text is not None:
            Path("a.png").write_text(text)
        [sentence] = broken_pictures([opened("a.png", error, has_buckets)] * 2)
        assert sentence == f'cannot open the picture "a.png" ({reason}): {remedy}'


def test_more_than_three_are_summed_up():
    pictures = [Opened(Path(f"{n}.png"), BUCKET, BUCKET, error="cut") for n in range(4)]
    assert len(broken_pictures(pictures[:3])) == 3
    assert broken_pictures(pictures) == [
        'cannot open 4 pictures, "0.png" (cut), "1.png" (cut), "2.png" (cut) and 1 more: '
        "re-save or remove them"
    ]


def test_a_mask_that_cannot_be_used_is_named():
    Image.new("L", (4, 4)).save("mask.png")
    for cause, reason, remedy in (
        (AssertionError("size"), "it is 4x4, and its picture 8x4", "save both at one size"),
        (OSError("is cut"), "is cut", "re-save or remove it"),
        (Image.DecompressionBombError("200 pixels"), "200 pixels", "make it smaller"),
    ):
        wrong = MaskError()
        wrong.__cause__ = cause
        [sentence] = broken_pictures([opened("a.png", wrong)])
        assert sentence == f'cannot use the mask "mask.png" ({reason}): {remedy}'


def test_a_picture_without_a_bucket_is_named():
    dataset = SimpleNamespace(image_data={}, bucket_manager=Mock())
    dataset.bucket_manager.select_bucket.side_effect = [ZeroDivisionError, ((64, 64), None, 0)]
    for name in ("a.png", "dogs/b.png"):
        draw(name)
        info = SimpleNamespace(absolute_path=name, image_size=(8, 4))
        dataset.image_data[name] = info
    sentence = (
        'cannot train the picture "a.png" (it is 8x4, less than bucket_reso_steps): enlarge or '
        "remove it, or remove bucket_no_upscale"
    )
    assert broken_pictures(images.without_bucket(dataset)) == [sentence]
    assert broken_pictures([opened("a.png", bucket_reso=(0, 64))]) == [sentence]


def test_a_bomb_is_to_be_made_smaller(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # PIL refuses twice as many
    info = SimpleNamespace(absolute_path="a.png", image_size=None)
    [sentence] = broken_pictures(images.without_bucket(SimpleNamespace(image_data={0: info})))
    assert sentence.startswith('cannot open the picture "a.png" (Image size (32 pixels)')
    assert sentence.endswith("): make it smaller")


@pytest.mark.parametrize("is_masked", [True, False])
def test_masks_of_one_colour_are_named(is_masked):
    folder = replace(make_folder("a.png b.png"), is_masked=is_masked, has_alpha_mask=not is_masked)
    for weights, has_alpha, words in (
        ([(0, 1), (1, 1)], True, ""),
        ([(0, 0), (1, 1)], True, "teach nothing, since their masks are black, 1 in all: a.png"),
        ([(1, 1), (1, 1)], is_masked, "all white" if is_masked else "alpha_mask masks nothing"),
    ):
        seen = {
            picture.path: Opened(picture.path, BUCKET, BUCKET, weights=each, has_alpha=has_alpha)
            for picture, each in zip(folder.pictures, weights, strict=True)
        }
        warnings = reported(images.check_masks, folder, seen).warnings
        assert [words in text for text in warnings] == [True] * bool(words), weights


def test_what_a_viewer_shows_otherwise_is_named():
    def load(path: Path, alpha: bool) -> np.ndarray:
        image = Image.open(path)
        if image.mode.startswith("I"):  # as a Pillow that cuts off
            image = Image.fromarray(np.minimum(np.asarray(image), 255).astype(np.uint8))
        return np.asarray(image.convert("RGBA" if alpha else "RGB"))

    deep = np.full((4, 4), 32_000, np.uint16)
    Image.fromarray(deep).save("deep.png")
    for name, colour in (("black", (0, 0, 0, 0)), ("white", (255, 255, 255, 0))):
        Image.new("RGBA", (4, 4), colour).save(f"{name}.png")
    for name, is_trained, change in (
        ("deep", True, opening.TOO_BRIGHT),
        ("black", True, opening.SEE_THROUGH),
        ("black", False, ""),
        ("white", True, ""),
        ("a", True, ""),
    ):
        path = Path(f"{name}.png")
        asked = replace(job(Mock()), load=load, is_alpha_trained=is_trained)
        assert opening.change_of(path, opening.read_header(path), asked) == change, name
    assert opening.read_header(Path("gone.png")) == Header()


@pytest.mark.parametrize("ending", ["png", "jpg"])
@pytest.mark.parametrize("orientation", [None, *range(10)])
def test_a_photo_that_is_stored_turned_is_named(ending, orientation):
    path, exif = Path(f"b.{ending}"), Image.Exif()
    if orientation is not None:
        exif[ORIENTATION] = orientation
    Image.new("RGB", (8, 4)).save(path, exif=exif)
    picture = opened(path)
    assert picture.orientation == (1 if orientation is None else orientation)
    turned = (
        "photos are trained sideways, as the camera stored them, since sd-scripts does not turn "
        f"them by EXIF, 1 in all: b.{ending}: rotate them in an image editor and save"
    )
    broken = replace(picture, error="cut")
    warned = reported(images.check_upright, [picture, broken]).warnings
    assert warned == [turned] * (orientation in range(2, 9))
    assert reported(images.check_upright, [broken]) == Report()


def open_all(*openers: Mock, stream: io.StringIO | None = None) -> list[Opened]:
    return opening.open_pictures([map(job, openers)], True, stream)


def test_a_bar_shows_where_it_takes_more_than_a_second(capsys):
    quick, stream = Mock(return_value=LOOK), io.StringIO()
    slow = Mock(side_effect=lambda: time.sleep(1.1) or LOOK)
    assert len(open_all(quick, quick, stream=stream)) == 2
    assert stream.getvalue() == ""
    open_all(slow, quick, quick, stream=stream)
    assert "opening pictures: " in stream.getvalue()
    open_all(slow, quick, quick)
    assert capsys.readouterr() == ("", "")


def test_what_the_trainer_logs_of_a_picture_reaches_nobody(caplog):
    logger = logging.getLogger("library")
    assert len(open_all(Mock(side_effect=lambda: logger.error("cannot load") or LOOK))) == 1
    assert caplog.records == []
    logger.error("shown again")
    assert len(caplog.records) == 1


def test_a_call_that_fits_no_picture_is_an_error_of_the_call():
    for error in (TypeError, AttributeError):
        call, broken = Mock(side_effect=error("one argument more")), Mock(side_effect=KeyError)
        assert [picture.is_api_mismatch for picture in open_all(call, broken)] == [True, False]
        with pytest.raises(TypeError, match=r"^one argument more$"):
            open_all(call, call)
    assert open_all() == []


def test_a_wrong_size_that_is_taken_from_elsewhere_is_named():
    path = Path("dogs/a.png")
    for size, beside, leftover, is_named in (
        ((16, 8), "b_0016x0008_sdxl.npz", (), False),
        ((8, 4), "a_0016x0008_sdxl.npz", (), False),
        ((16, 8), "a_0016x0008_sdxl.npz", (), True),
        ((16, 8), "a_0016x0008_sdxl.npz", {path}, False),  # its cache is trained
        ((16, 8), "metadata_cache.json", (), True),
    ):
        folder = make_folder(beside={beside: ""})
        dogs = replace(folder, pictures=(replace(folder.pictures[0], size=size),))
        report = reported(images.check_sizes, [dogs], [opened(path)], leftover)
        assert [": a.png (16x8, is 8x4): " in text for text in report.warnings] == [True] * is_named
        Path("dogs", beside).unlink()


def test_latents_of_another_picture_are_told_by_their_sizes_and_age():
    for original, latents, age, why in (
        ((8, 4), (4, 2), 1, ""),
        ((8, 4), (4, 2), 0, ""),
        ((8, 4), (4, 2), -1, "older than the picture"),
        ((9, 4), (4, 2), 1, "of a picture of 9x4, not 8x4"),
        ((8, 4), (4, 3), 1, "of 24x32, not 16x32"),
    ):
        Path("a.npz").touch()
        os.utime("a.png", (1000, 1000))
        os.utime("a.npz", (1000 + age, 1000 + age))
        read = np.zeros((4, *latents)), list(original), "more"
        strategy = SimpleNamespace(load_latents_from_disk=lambda _npz, _bucket, read=read: read)
        dataset = SimpleNamespace(latents_caching_strategy=strategy)
        told = images.why_stale(Path("a.png"), Path("a.npz"), (8, 4), (16, 32), dataset)
        assert told == why


def test_outputs_that_are_older_than_the_caption_are_named():
    folder = make_folder(beside={**DOG, "a_te_outputs.npz": ""})
    os.utime("dogs/a.txt", (1000, 1000))
    for extension, age in ((".txt", -1), (".txt", 0), (".caption", -1), ("", -1)):
        os.utime("dogs/a_te_outputs.npz", (1000 + age, 1000 + age))
        read = replace(folder, caption_extension=extension)
        warnings = reported(images.check_cached_captions, [read]).warnings
        is_named = (extension, age) == (".txt", -1)
        assert [" 1 in all: a_te_outputs.npz: " in text for text in warnings] == [True] * is_named


# ---- The sheet of --preview ----------------------------------------------------------------------

THUMBNAIL = b"RIFF"
SIZE, NO_WORDS = Line("512x512 of 8x4", "detail"), Line("(no words) ", "note")


@pytest.fixture
def dogs() -> tuple[Folder, list[Opened]]:
    """A folder of two pictures with captions, and both as they were opened."""
    folder = make_folder("0.png 1.png", {"0.txt": "a dog", "1.txt": "a dog"})
    return folder, [Opened(p.path, BUCKET, p.size, thumbnail=THUMBNAIL) for p in folder.pictures]


def test_below_a_picture_what_is_cut_off_its_caption_is_struck_out(dogs):
    folder, [seen, _] = dogs
    for trained, file, lines in (
        ({"size": BUCKET}, "", [Line("512x512", "detail"), Line("a dog")]),
        ({"repeats": 3}, "", [Line("512x512 of 8x4, x3", "detail"), Line("a dog")]),
        ({"prompt": "a dog and a cat"}, "", [SIZE, Line("a dog", cut=" and a cat")]),
        ({}, "a dog\nand a cat\n", [SIZE, Line("a dog"), Line("", cut="and a cat")]),
        ({"prompt": "doghouse", "kept": 3}, "", [SIZE, Line("dog", cut="house")]),
        ({"prompt": "", "kept": 0}, "\na dog", [SIZE, NO_WORDS, Line("", cut="a dog")]),
    ):
        Path("dogs/0.txt").write_text(file)
        picture = trained_picture(replace(folder.pictures[0], **trained), folder, seen)
        assert list(picture.lines) == lines


def test_each_folder_is_drawn_as_it_is_trained_and_what_is_left_out_comes_last_and_grey(dogs):
    folder, [seen, broken] = dogs
    draw("dogs/z.gif")
    Path("dogs/z.heic").touch()
    folder = replace(folder, seen=folder.seen | {draw("dogs/validation.png")})
    small = {"bucket": (64, 64)}
    reg = make_folder("surplus.png", path="reg", is_reg=True)
    reg = replace(reg, pictures=(replace(folder.pictures[0], **small),))
    opened = [replace(seen, orientation=6), replace(broken, error="it is cut")]
    drawn = {
        section.title: [(p.name, p.thumbnail, p.is_out, *p.lines) for p in section.pictures]
        for section in sections_of([folder, reg], [*opened, replace(seen, thumbnail=b"0", **small)])
    }
    words, grey = Line("a dog"), make_thumbnail(Image.new("RGB", (8, 4)), 60_000)
    left_out = {
        "1.png": (grey, "it is cut"),
        "z.gif": (grey, ".gif is not read"),
        "z.heic": (None, ".heic is not read"),
        "validation.png": (grey, "kept for validation"),
        "surplus.png": (grey, "surplus regularization image"),
    }
    assert drawn == {
        "dogs": [("0.png", THUMBNAIL, False, SIZE, Line("stored turned (EXIF)", "alarm"), words)],
        "reg (is_reg)": [("0.png", b"0", False, Line("64x64 of 8x4", "detail"), words)],
        "Left out": [
            (name, image, True, Line(why, "alarm")) for name, (image, why) in left_out.items()
        ],
    }


def test_the_report_says_whether_all_pictures_are_on_the_sheet(dogs):
    folder, opened = dogs
    sheet = Path("sheet.html")
    Path("dogs/z.heic").touch()  # is left out, and cannot be drawn
    assert reported(write_preview, sheet, [folder], opened) == Report(
        notes=['"sheet.html" shows the pictures as the trainer will see them']
    )
    page = sheet.read_text(encoding="utf-8")
    assert "<h1>The pictures as the trainer sees them</h1>" in page
    assert page.count("data:image/webp;base64,UklGRg==") == 2
    # As with a release of sd-scripts that opens them in another way.
    for subsets, shown, number in (([folder], 0, 2), ([folder], 1, 2), ([], 0, 0)):
        assert reported(write_preview, sheet, subsets, opened[:shown]) == Report(
            warnings=[
                f'"sheet.html" shows {shown} of {number} pictures: pre-flight could not open the '
                "others as this release of sd-scripts does"
            ]
        )
        assert sheet.read_text(encoding="utf-8").count("a dog") == number
    [error] = reported(write_preview, Path("gone/sheet.html"), [folder], opened).errors
    assert error.startswith(f"cannot write {Path('gone/sheet.html')} (")
