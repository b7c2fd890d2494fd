"""What pre-flight says of pictures, on the datasets that a real sd-scripts makes.

Each case is a process with sd-scripts' imports; no model is loaded. BLORA_WRITE_PREVIEW=1 writes
docs/preview.png and docs/preview_dark.png anew.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kohya_folder import ROOT
from make_dataset import draw
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from real_kohya import BEFORE_0_10, KOHYA_ROOT, SUPPORT, kohya_python
from sample_pictures import make_sample

pytestmark = pytest.mark.slow

CLASSIC, FAST = ("--random_crop",), ("--cache_latents",)  # how the two launchers open pictures
BOTH = pytest.mark.parametrize("options", [CLASSIC, FAST], ids=["classic", "fast"])
ON_DISK = (*FAST, "--cache_latents_to_disk")
RECIPE = """
  --pretrained_model_name_or_path=none.safetensors --dataset_config=config.toml
  --network_module=lycoris.kohya --network_train_unet_only --mixed_precision=no
  --caption_extension=.txt --prior_loss_weight=0 --seed=0 --max_train_steps=10
  --resolution=1024,1024 --min_bucket_reso=512 --bucket_reso_steps=32
""".split()


class Training:
    """A folder with pictures and a dataset config, and what pre-flight says of it."""

    def __init__(self, path: Path, tokenizers: str):
        self.path, self.tokenizers, self.images = path, tokenizers, path / "images"
        self.images.mkdir()
        self.config()

    def config(self, more: str = "") -> None:
        """One dataset of 512 x 512 and one subset, with more lines for the subset."""
        subset = '[[datasets.subsets]]\nimage_dir = "images"\nclass_tokens = "A [v]"'
        text = f"[[datasets]]\nresolution = 512\n{subset}\n{more}"
        (self.path / "config.toml").write_text(text, encoding="utf-8")

    def draw(self, name: str, size: tuple[int, int] = (512, 512), **options: Any) -> Path:
        path = self.images / name
        path.parent.mkdir(exist_ok=True)
        draw(1, max(size)).resize(size).save(path, **options)
        return path

    def npz(self, name: str, size: tuple[int, int], trained: tuple[int, int] = (512, 512)) -> Path:
        """A latent cache as sd-scripts writes it, newer than the pictures."""
        latents = np.zeros((4, trained[1] // 8, trained[0] // 8), np.float32)
        path = self.images / name
        np.savez(path, latents=latents, original_size=np.array(size), crop_ltrb=np.zeros(4))
        os.utime(path, (4e9, 4e9))
        return path

    def ask(self, *options: str, buckets: bool = True, sheet: Path | None = None) -> dict:
        """What pre-flight says of the launchers' options and these."""
        given = [*RECIPE, *(["--enable_bucket"] if buckets else []), *options, self.tokenizers]
        before = self.contents()
        probe = [SUPPORT / "dataset_probe.py", KOHYA_ROOT, str(sheet or "")]
        told = kohya_python(*probe, *given, cwd=self.path, path=ROOT)
        assert self.contents() == before  # it looks, and writes nothing
        return json.loads(told.splitlines()[-1])

    def contents(self) -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in self.path.rglob("*") if path.is_file()}


@pytest.fixture
def training(tmp_path, cached_tokenizers) -> Training:
    return Training(tmp_path, cached_tokenizers)


@pytest.fixture
def sheet(tmp_path_factory) -> Path:
    """Where it is drawn: not in the training's folder."""
    return tmp_path_factory.mktemp("sheet") / "sheet.html"


def said(answer: dict) -> list[str]:
    return [*answer["errors"], *answer["warnings"], *answer["notes"]]


# ---- Nothing to say ------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [CLASSIC, FAST, ON_DISK])
def test_of_a_sound_dataset_there_is_nothing_to_say(training, options):
    training.config((ROOT / "blora_dataset.toml").read_text("utf-8").split("[general]")[0])
    sizes = {"a.png": (512, 512), "b.jpg": (700, 500), "c.webp": (300, 900)}
    for name, size in sizes.items():
        training.draw(name, size).with_suffix(".txt").write_text("a cat")
    training.draw("d.png").with_suffix(".txt").write_text("a dog\n")
    (training.images / "._a.png").write_bytes(b"macOS")
    answer = training.ask(*options)
    assert (said(answer), answer["folders"], answer["opened"]) == ([], '4 in "images"', 4)


def test_an_epoch_is_counted_in_the_trainers_own_buckets(training):
    training.config("num_repeats = 3")
    for name in ("a.png", "b.png"):
        training.draw(name)
    training.draw("c.png", (768, 512)).with_suffix(".txt").write_text("a dog")
    epoch = training.ask(*FAST, "--train_batch_size=4")["epoch"]
    # 2 x 3 squares make two batches of 4, and 3 wide ones another.
    expected = {"images": 3, "captions": 1, "repeated": 9, "batches": 3}
    assert epoch | expected | {"largest_batch": 4 * 512 * 512} == epoch


# ---- Pictures that cannot be trained -------------------------------------------------------------


def half(kind: str) -> bytes:
    data = io.BytesIO()
    Image.effect_noise((512, 512), 50).save(data, kind)
    return data.getvalue()[: data.tell() // 2]


HALF = {
    "b.jpg": (half("JPEG"), "image file is truncated"),
    "c.png": (half("PNG"), "image file is truncated"),
}
EMPTY = {"b.jpg": (b"", "the file is empty")}  # 0.10 stops at it
NO_PICTURES = {
    "b.jpg": (b"<!DOCTYPE html>", "it is a web page"),
    "c.jpg": (b"hello " * 99, "PIL cannot read it as a picture"),
    "d.jpg": (b"\xff\xd8\xff\xe0" * 4, "PIL cannot read it|Truncated File Read"),
}


@pytest.mark.parametrize(
    ("files", "options"), [(HALF, CLASSIC), (HALF, FAST), (EMPTY, FAST), (NO_PICTURES, FAST)]
)
def test_a_picture_that_cannot_be_opened_is_named(training, files, options):
    training.draw("a.png")
    for name, (content, _) in files.items():
        (training.images / name).write_bytes(content)
    errors = sorted(training.ask(*options)["errors"])
    for error, (name, (_, reason)) in zip(errors, files.items(), strict=True):
        assert error.startswith(f'cannot open the picture "images/{name}" (')
        assert re.search(reason, error)
        assert error.endswith("): re-save or remove it")


def test_without_buckets_a_picture_of_another_size_is_named(training):
    for name, side in (("ok.png", 512), ("small.png", 300), ("big.png", 600)):
        training.draw(name, (side, side))
    training.config("random_crop = false")
    small, big = training.ask(buckets=False)["errors"]
    assert 'small.png" (image size is small, it is 300x300): add --enable_bucket' in small
    assert 'big.png" (image too large' in big
    assert not training.ask(*FAST, buckets=False)["errors"]  # where it is resized all the same


# ---- What the trainer does not say ---------------------------------------------------------------

PREFIX, NO_FLIPS = 'caption_prefix = "sks"', "flip_aug = false"
TEXT_CACHE = "--cache_text_encoder_outputs"
CUT_76 = 'captions are cut after 75 tokens, 1 in "images": a.png (77): shorten them, or give'
LEFT_OUT = 'caption_prefix and caption_suffix of "images" are not trained'
CUT_151 = (
    'captions are cut after 150 tokens, 1 in "images": a.png (151): shorten them, or give '
    "--max_token_length=225"
)
OVERRIDDEN = (
    '--resolution=768 and --flip_aug=true have no effect, since "config.toml" has resolution = '
    "512 and flip_aug = false: change it there"
)
ONE_PICTURE = {  # its subset's settings, its caption, options, and the warning
    "74 words and a prefix": (PREFIX, "dog " * 74, "", ""),
    "76 words and a prefix": (PREFIX, "dog " * 76, "", CUT_76),
    "a prefix that cached captions leave out": (PREFIX, "a dog", TEXT_CACHE, LEFT_OUT),
    "more tokens than were asked for": ("", "dog " * 151, "--max_token_length=150", CUT_151),
    "a setting of the config": (NO_FLIPS, "a dog", "", ""),
    "overridden options": (NO_FLIPS, "a dog", "--flip_aug --resolution=768", OVERRIDDEN),
}


@pytest.mark.parametrize("case", ONE_PICTURE)
def test_what_is_said_of_one_picture(training, case):
    settings, caption, options, warning = ONE_PICTURE[case]
    training.config(settings)
    training.draw("a.png").with_suffix(".txt").write_text(caption)
    answer = training.ask(*FAST, *options.split())
    told = [text[: len(warning)] for text in answer["warnings"]]
    assert (answer["errors"], told, answer["notes"]) == ([], [warning] if warning else [], [])


@BOTH
def test_what_lies_beside_the_pictures_is_named(training, options):
    training.draw("a.png").with_suffix(".caption").write_text("a dog")
    training.draw("left.gif")
    training.draw("below/a.png")
    expected = [
        'images in "images" have no .txt caption and are trained as "A [v]", the class_tokens: '
        "a.caption is not read",
        'left out of "images", unsupported file type: left.gif',
        'pictures in subfolders of "images" are not trained, below: move them up',
    ]
    answer = training.ask(*options)
    assert (answer["errors"], answer["notes"]) == ([], [])
    for text, warning in zip(expected, answer["warnings"], strict=True):
        assert text in warning


# ---- Leftovers -----------------------------------------------------------------------------------


def test_latents_of_a_picture_that_was_replaced_are_named_where_they_would_be_trained(training):
    for name in "abcd":
        training.draw(f"{name}.png").with_suffix(".txt").write_text("a dog")
    suffix = ".npz" if BEFORE_0_10 else "_0512x0512_sdxl.npz"
    training.npz(f"a{suffix}", (512, 512))  # its own
    os.utime(training.npz(f"b{suffix}", (512, 512)), (1, 1))
    training.npz("c.npz", (600, 600))  # in 0.9's own name, which 0.10 takes too
    [warning] = training.ask(*ON_DISK)["warnings"]
    assert warning == (
        f"stale cached latents will be used in place of pictures, 2 in all: b{suffix} (older than "
        "the picture), c.npz (of a picture of 600x600, not 512x512): delete these files"
    )
    assert said(training.ask(*FAST)) == []  # where nothing is read from the disk


def test_a_broken_picture_whose_latents_are_taken_stops_nothing(training):
    training.draw("a.png")
    (training.images / "b.jpg").write_bytes(half("JPEG"))
    training.npz("b.npz", (512, 512))
    assert not training.ask(*ON_DISK)["errors"]
    assert len(training.ask(*FAST)["errors"]) == 1


@pytest.mark.skipif(BEFORE_0_10, reason="0.9 opens each picture for its size")
@BOTH
def test_a_picture_that_is_distorted_by_the_name_of_a_leftover_is_named(training, options):
    training.draw("a.png")
    training.npz("a_0768x0512_sdxl.npz", (768, 512), (640, 416))
    [warning] = training.ask(*options)["warnings"]
    assert warning == (
        "pictures are trained distorted, since sd-scripts takes their size from an earlier file, 1 "
        "in all: a.png (768x512, is 512x512): delete the .npz files (or metadata_cache.json) "
        "beside them"
    )
    [warning] = training.ask(*ON_DISK)["warnings"]
    assert "a_0768x0512_sdxl.npz (of a picture of 768x512, not 512x512)" in warning


MULTIPLE = "multi_resolution=True"  # as the releases say it that keep the latents of every size


def test_a_folder_at_two_resolutions_is_named_where_one_file_holds_its_latents(training):
    training.draw("a.png").with_suffix(".txt").write_text("a dog")
    training.config('[[datasets]]\nresolution = 768\n[[datasets.subsets]]\nimage_dir = "images"')
    strategy = Path(KOHYA_ROOT, "library/strategy_sd.py")
    keeps = strategy.is_file() and MULTIPLE in strategy.read_text(encoding="utf-8")
    warnings = training.ask(*ON_DISK)["warnings"]
    assert ["a.png (512x512 and 768x768): remove" in text for text in warnings] == [True] * (
        not keeps
    )
    assert said(training.ask(*FAST)) == []


def test_two_pictures_of_one_name_have_one_file_of_latents(training):
    for name in ("a.png", "a.jpg", "b.png"):
        training.draw(name).with_suffix(".txt").write_text("a dog")
    [warning] = training.ask(*ON_DISK)["warnings"]
    assert "a.jpg and a.png (a" in warning
    assert said(training.ask(*FAST)) == []


def test_latents_that_cannot_be_read_are_named(training):
    training.draw("a.png").with_suffix(".txt").write_text("a dog")
    (training.images / "a.npz").write_bytes(b"cut")
    [error] = training.ask(*ON_DISK)["errors"]
    assert error == 'the cached latents "images/a.npz" cannot be read: delete this file'


def test_the_sheet_shows_pictures_that_have_masks(training, sheet):
    training.draw("a.png").with_suffix(".txt").write_text("a dog")
    training.draw("../masks/a.png")
    training.config('conditioning_data_dir = "masks"')
    text = (training.path / "config.toml").read_text(encoding="utf-8")
    (training.path / "config.toml").write_text(text.replace('class_tokens = "A [v]"\n', ""))
    for options in ((), FAST):
        answer = training.ask(*options, "--masked_loss", sheet=sheet)
        assert (said(answer)[1:], answer["folders"], answer["opened"]) == ([], '1 in "images"', 1)
        assert "shows the pictures as the trainer will see them" in said(answer)[0]
        assert sheet.read_text(encoding="utf-8").count("base64,") == 1


def test_tags_alone_are_named_where_wildcards_drop_them(training):
    training.draw("a.png")
    listed = {str(training.images / "a.png"): {"tags": "dog"}}
    (training.path / "meta.json").write_text(json.dumps(listed), encoding="utf-8")
    training.config('metadata_file = "meta.json"\nenable_wildcard = true')
    text = (training.path / "config.toml").read_text(encoding="utf-8")
    (training.path / "config.toml").write_text(text.replace('class_tokens = "A [v]"\n', ""))
    warnings = training.ask(*FAST)["warnings"]
    assert ["or remove enable_wildcard" in text for text in warnings] == [True] * (not BEFORE_0_10)


def test_cached_words_that_are_older_than_the_caption_are_named(training):
    training.draw("a.png").with_suffix(".txt").write_text("a dog")
    cached = training.images / "a_te_outputs.npz"
    np.savez(cached, nothing=np.zeros(1))
    options = (*FAST, TEXT_CACHE, f"{TEXT_CACHE}_to_disk")
    assert said(training.ask(*options)) == []
    os.utime(cached, (1, 1))
    [warning] = training.ask(*options)["warnings"]
    assert "will be used in their place, 1 in all: a_te_outputs.npz: delete" in warning


# ---- The sheet -----------------------------------------------------------------------------------

PREVIEWS = {"light": ROOT / "docs/preview.png", "dark": ROOT / "docs/preview_dark.png"}


def test_the_readmes_preview_is_what_a_browser_shows_of_the_sample(training, sheet, browser):
    shutil.rmtree(training.images)
    make_sample(training.path)
    training.ask(*FAST, sheet=sheet)
    # Another browser has other fonts, so each picture holds the hash of the page that it shows;
    # without the thumbnails and a broken JPEG's length, which another Pillow makes another way.
    page = re.sub(r"base64,[^\"]*|\d+ bytes", "", sheet.read_text(encoding="utf-8"))
    shown = hashlib.sha256(page.encode()).hexdigest()
    for scheme, path in PREVIEWS.items():
        if os.environ.get("BLORA_WRITE_PREVIEW") == "1":
            browser.open(sheet, 1340, scheme)
            named = PngInfo()
            named.add_text("sheet", shown)
            picture = Image.open(io.BytesIO(base64.b64decode(browser.picture())))
            picture.convert("RGB").save(path, optimize=True, pnginfo=named)
        with Image.open(path) as picture:
            hint = f"{path.name} is stale: run this with BLORA_WRITE_PREVIEW=1"
            assert picture.text["sheet"] == shown, hint
            assert picture.width == 1340
        assert path.stat().st_size < 250_000


@pytest.mark.parametrize("options", [(), FAST], ids=["step", "cache"])
def test_the_sheet_shows_a_picture_cropped_as_the_trainer_crops_it(training, sheet, options):
    """A bar down the left edge, which the crop of a panorama to its bucket cuts off."""
    wide = Image.new("RGB", (1000, 100), "#2f9e44")
    wide.paste("#d03030", (0, 0, 100, 100))
    wide.save(training.images / "wide.png")
    training.ask(*options, sheet=sheet)
    [thumbnail] = re.findall(r"base64,([^\"]*)", sheet.read_text(encoding="utf-8"))
    with Image.open(io.BytesIO(base64.b64decode(thumbnail))) as image:
        assert image.size == (480, 480)
        red, green, blue = np.asarray(image.convert("RGB")).reshape(-1, 3).T
    assert ((green > 130) & (red < 90)).sum() > 1000
    assert ((red > 180) & (green < 90) & (blue < 90)).sum() < 50
