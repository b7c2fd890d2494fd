"""What blora_preflight.py says of images, captions and the dataset config."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import toml
from preflight_folder import (
    CONFIG,
    IMAGES,
    OURS,
    add_to_config,
    checked,
    edit_config,
    make_trainable,
)


@pytest.fixture
def kohya(tmp_path, monkeypatch) -> Path:
    """A folder in which a training could begin; it is the working directory."""
    return make_trainable(tmp_path, monkeypatch)


# ---- The config and its folders ------------------------------------------------------------------


def no_config(_kohya):
    Path(CONFIG).unlink()


def no_images(_kohya):
    for path in Path(IMAGES).glob("*.png"):
        path.unlink()


def config_of(text):
    """What makes this the whole config."""
    return lambda _kohya: Path(CONFIG).write_text(text)


NOT_THE_FORM = (
    f'the dataset config "{CONFIG}" is not of the form [[datasets]], [[datasets.subsets]]'
)
DATASETS = {
    "no config": (no_config, f'no dataset config at "{CONFIG}": write one there, or correct'),
    "no TOML": (config_of("[general\n"), f'the dataset config "{CONFIG}" is not valid TOML ('),
    "no tables": (config_of("datasets = 3"), NOT_THE_FORM),
    "no list of subsets": (config_of("[[datasets]]\nsubsets = 3"), NOT_THE_FORM),
    "no tables of subsets": (config_of("[[datasets]]\nsubsets = [3]"), NOT_THE_FORM),
    "no table of general settings": (config_of("general = 3"), NOT_THE_FORM),
    "no subsets": (
        config_of("[[datasets]]\nresolution = 1024"),
        f'"{CONFIG}" names no folder of images: add one',
    ),
    "no folder": (
        lambda _: Path(IMAGES).rename("elsewhere"),
        f'no folder of images at "{IMAGES}": correct image_dir in "{CONFIG}"',
    ),
    "no name of a folder": (
        lambda _: edit_config(f'image_dir = "{IMAGES}"\n', ""),
        f'"{CONFIG}" has a subset without an image_dir: add one',
    ),
    "no images": (no_images, f'"{IMAGES}" holds no images: put some there, or correct image_dir'),
    "no repeats": (
        lambda _: edit_config("num_repeats = 2", "num_repeats = 0"),
        f'"{IMAGES}" has num_repeats = 0 and is passed over: give it 1',
    ),
}


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_dataset_that_cannot_be_trained_on_is_an_error(kohya, capsys, dataset):
    spoil, sentence = DATASETS[dataset]
    spoil(kohya)
    [error] = checked(capsys)["errors"]
    assert error.startswith(sentence)


@pytest.mark.parametrize("others", ["", "[[datasets]]\nresolution = 64\n"])
def test_a_dataset_without_a_resolution_is_told_once(kohya, capsys, others):
    edit_config("resolution = 64\n", "")
    add_to_config(f'{others}[[datasets.subsets]]\nimage_dir = "{IMAGES}"\n')
    report = checked(capsys, **OURS, resolution=None)
    assert report["errors"] == [f'"{Path(CONFIG)}" has a dataset without a resolution: add one']


def test_the_resolution_may_come_from_the_command_line(kohya, capsys):
    edit_config("resolution = 64\n", "")
    assert checked(capsys, resolution="1024,1024")["errors"] == []


def test_a_config_may_be_json(kohya, capsys):
    path = Path(CONFIG).with_suffix(".json")
    path.write_text(json.dumps(toml.loads(Path(CONFIG).read_text())))
    report = checked(capsys, dataset_config=str(path))
    assert report["errors"] == []
    assert report["plan"]["images"] == "6 with 6 captions, 12 an epoch with repeats"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, 'no dataset config at "config.json": write one there, or correct the path'),
        ("{", 'the dataset config "config.json" is not valid JSON: correct it'),
        (
            "[]",
            'the dataset config "config.json" is not of the form [[datasets]], '
            "[[datasets.subsets]]: correct it",
        ),
    ],
)
def test_a_json_config_that_cannot_be_read_is_an_error(kohya, capsys, text, sentence):
    if text is not None:
        Path("config.json").write_text(text)
    assert checked(capsys, dataset_config="config.json")["errors"] == [sentence]


@pytest.mark.parametrize("way", ["in_json", "dataset_class"])
def test_images_that_are_given_in_another_way_pass_with_a_note(kohya, capsys, way):
    report = checked(capsys, dataset_config=None, **{way: "given"})
    note = "the images are not given by folders, and were not looked into"
    assert (report["errors"], report["notes"]) == ([], [note])


def test_no_images_at_all_are_an_error(kohya, capsys):
    errors = checked(capsys, dataset_config=None)["errors"]
    assert errors == ["there are no images: give --dataset_config"]


def test_a_missing_folder_of_folders_is_an_error(kohya, capsys):
    assert checked(capsys, dataset_config=None, train_data_dir="gone")["errors"] == [
        'no folder of images at "gone": correct --train_data_dir'
    ]


def make_folders(*names: str) -> None:
    """Folders of the same six captioned images in the folder "train"."""
    for name in names:
        shutil.copytree(IMAGES, f"train/{name}")


def test_folders_with_repeats_are_a_dataset_too(kohya, capsys):
    make_folders("3_sks cat", "2", "0_left out", "_no number", "words alone")
    Path("train/4_a file").touch()
    report = checked(capsys, dataset_config=None, train_data_dir="train")
    assert [w for w in report["warnings"] if "text-encoder" not in w] == report["errors"] == []
    assert report["plan"]["images"] == "12 with 12 captions, 30 an epoch with repeats"


def test_the_words_of_a_folder_with_repeats_stand_for_its_captions(kohya, capsys):
    make_folders("3_sks cat", "2")
    for path in Path("train").rglob("*.txt"):
        path.unlink()
    report = checked(capsys, dataset_config=None, train_data_dir="train")
    [warning] = [w for w in report["warnings"] if "caption" in w]
    assert warning.startswith(f'6 of 6 images in "{Path("train/2")}" have no .txt caption: ')


def test_a_folder_without_repeats_counts_once(kohya, capsys):
    edit_config("num_repeats = 2\n", "")
    assert checked(capsys)["plan"]["images"] == "6 with 6 captions, 6 an epoch with repeats"


def test_a_subset_goes_before_its_dataset_and_that_before_the_general_settings(kohya, capsys):
    edit_config("[general]", "[general]\nbatch_size = 8\nnum_repeats = 9")
    edit_config("batch_size = 1", "batch_size = 4\nnum_repeats = 7")
    plan = checked(capsys)["plan"]
    assert plan["images"].endswith(", 12 an epoch with repeats")
    assert ", batch 4, " in plan["training"]


@pytest.mark.parametrize(
    "ending", [".png", ".PNG", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl"]
)
def test_an_image_is_known_by_its_ending(kohya, capsys, ending):
    for path in Path(IMAGES).glob("*.png"):
        path.rename(path.with_suffix(ending))
    (Path(IMAGES) / "note.gif").touch()
    assert checked(capsys)["plan"]["images"].startswith("6 with 6 captions")


def test_a_folder_among_others_may_be_missing_or_empty(kohya, capsys):
    Path("empty").mkdir()
    for folder in ("gone", "empty"):
        add_to_config(f'[[datasets.subsets]]\nimage_dir = "{folder}"\n')
    report = checked(capsys)
    assert report["errors"] == []
    assert [w for w in report["warnings"] if "text-encoder" not in w] == [
        f'no folder of images at "gone": correct image_dir in "{CONFIG}"',
        '"empty" holds no images: put some there, or correct image_dir',
    ]
    assert report["plan"]["images"].startswith("6 with 6 captions")


def test_subsets_with_a_metadata_file_pass_with_a_note(kohya, capsys):
    edit_config("num_repeats", 'metadata_file = "meta.json"\nnum_repeats')
    report = checked(capsys)
    assert report["errors"] == []
    assert report["notes"] == ["subsets with a metadata_file were not looked into"]


def test_missing_captions_are_counted_and_the_first_named(kohya, capsys):
    for path in sorted(Path(IMAGES).glob("*.txt"))[:5]:
        path.unlink()
    names = [path.name for path in sorted(Path(IMAGES).glob("*.png"))[:3]]
    warning = f'5 of 6 images in "{IMAGES}" have no .txt caption: {", ".join(names)} and 2 more'
    report = checked(capsys)
    assert warning in report["warnings"]
    assert report["errors"] == []


def test_class_tokens_stand_for_missing_captions(kohya, capsys):
    for path in Path(IMAGES).glob("*.txt"):
        path.unlink()
    edit_config("num_repeats", 'class_tokens = "sks"\nnum_repeats')
    report = checked(capsys)
    assert [w for w in report["warnings"] if "caption" in w] == []
    assert report["plan"]["images"].startswith("6 with 0 captions")


@pytest.mark.parametrize(("given", "extension"), [(".cap", ".cap"), (None, ".caption")])
def test_where_the_config_has_no_caption_extension_the_option_counts_and_then_caption(
    kohya, capsys, given, extension
):
    edit_config('caption_extension = ".txt"\n', "")
    for path in Path(IMAGES).glob("*.txt"):
        path.rename(path.with_suffix(extension))
    report = checked(capsys, caption_extension=given)
    assert report["plan"]["images"].startswith("6 with 6 captions")


def test_a_caption_extension_is_put_behind_the_name_as_it_is(kohya, capsys):
    for path in Path(IMAGES).glob("*.txt"):
        path.rename(f"{path.with_suffix('')}_a.txt")
    edit_config('caption_extension = ".txt"', 'caption_extension = "_a.txt"')
    assert checked(capsys)["plan"]["images"].startswith("6 with 6 captions")


# ---- What contradicts a cache --------------------------------------------------------------------


CONTRADICTIONS = [
    ("cache_latents", "random_crop = true"),
    ("cache_latents", "color_aug = true"),
    ("cache_latents_to_disk", "random_crop = true"),
    ("cache_latents_to_disk", "color_aug = true"),
    ("cache_text_encoder_outputs", "shuffle_caption = true"),
    ("cache_text_encoder_outputs", "caption_dropout_rate = 0.1"),
    ("cache_text_encoder_outputs", "caption_tag_dropout_rate = 0.1"),
    ("cache_text_encoder_outputs", "token_warmup_step = 100"),
]


@pytest.mark.parametrize(("cache", "setting"), CONTRADICTIONS)
def test_a_setting_that_contradicts_a_cache_is_an_error_with_its_line(
    kohya, capsys, cache, setting
):
    edit_config("num_repeats", f"{setting}\nnum_repeats")
    name = setting.split()[0]
    assert checked(capsys, **{cache: True})["errors"] == [
        f'--{cache} does not go with {name} in "{CONFIG}" line 10: change that line, or leave the '
        "option out"
    ]
    assert checked(capsys)["errors"] == []


@pytest.mark.parametrize(("cache", "setting"), CONTRADICTIONS)
def test_an_option_that_contradicts_a_cache_is_an_error(kohya, capsys, cache, setting):
    name, value = setting.split(" = ")
    given = {cache: True, name: True if value == "true" else value}
    assert checked(capsys, **given)["errors"] == [
        f"--{cache} does not go with --{name}: leave one of them out"
    ]


@pytest.mark.parametrize(
    ("first", "lines"),
    [
        ("caption_dropout_rate = 0.2", "line 2 and 11"),
        ("caption_dropout_rate=0.2", "line 2 and 11"),
        ('"caption_dropout_rate"=1', "line 2 and 11"),
        ("  caption_dropout_rate\t=\t0.5", "line 2 and 11"),
        ("caption_dropout_rate=0", "line 11"),
        ("caption_dropout_rate=0.0", "line 11"),
        ("caption_dropout_rate=false", "line 11"),
        ("caption_dropout_rate = 0", "line 11"),
        ("caption_dropout_rate = 0.0", "line 11"),
        ("caption_dropout_rate = false", "line 11"),
        ("caption_dropout_rate = 0 # off", "line 11"),
        ("caption_dropout_rate=0.05", "line 2 and 11"),
        ("# caption_dropout_rate = 0.2", "line 11"),
        ("caption_tag_dropout_rate = 0", "line 11"),
    ],
)
def test_every_line_that_switches_the_setting_on_is_named(kohya, capsys, first, lines):
    edit_config("[general]", f"[general]\n{first}")
    edit_config("num_repeats", "caption_dropout_rate = 0.1\nnum_repeats")
    [error] = checked(capsys, cache_text_encoder_outputs=True)["errors"]
    assert f' in "{CONFIG}" {lines}: ' in error


def test_in_a_json_config_the_line_is_named_too(kohya, capsys):
    subset = {"image_dir": IMAGES, "random_crop": True}
    config = {"datasets": [{"resolution": 64, "subsets": [subset]}]}
    Path("config.json").write_text(json.dumps(config, indent=0))
    [error] = checked(capsys, dataset_config="config.json", cache_latents=True)["errors"]
    assert 'random_crop in "config.json" line 8: ' in error


def test_a_setting_whose_line_is_not_found_is_an_error_all_the_same(kohya, capsys):
    subset = f'{{ image_dir = "{IMAGES}", color_aug = true }}'
    Path(CONFIG).write_text(f"[[datasets]]\nresolution = 64\nsubsets = [{subset}]\n")
    [error] = checked(capsys, cache_latents=True)["errors"]
    assert f'color_aug in "{CONFIG}": change that line' in error


def test_cached_text_needs_text_encoders_that_are_not_trained(kohya, capsys):
    report = checked(capsys, cache_text_encoder_outputs=True, network_train_unet_only=None)
    assert report["errors"] == [
        "--cache_text_encoder_outputs needs --network_train_unet_only: add it"
    ]


def test_what_the_config_says_goes_before_the_command_line(kohya, capsys):
    edit_config("num_repeats", "random_crop = false\nnum_repeats")
    assert checked(capsys, cache_latents=True, random_crop=True)["errors"] == []


@pytest.mark.parametrize(
    ("setting", "named"),
    [("random_crop = true", f'random_crop in "{CONFIG}" line '), ("", "--random_crop: ")],
)
def test_one_subset_among_others_is_enough_for_a_contradiction(kohya, capsys, setting, named):
    edit_config("num_repeats", "random_crop = false\nnum_repeats")
    add_to_config(f'\n[[datasets.subsets]]\nimage_dir = "{IMAGES}"\n{setting}\n')
    [error] = checked(capsys, cache_latents=True, random_crop=True)["errors"]
    assert error.startswith(f"--cache_latents does not go with {named}")


@pytest.mark.parametrize("value", ["0", "0.0", "0.00"])
def test_a_dropout_of_0_contradicts_no_cache(kohya, capsys, value):
    given = {"cache_text_encoder_outputs": True, "caption_dropout_rate": value}
    assert checked(capsys, **given)["errors"] == []
