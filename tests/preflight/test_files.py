"""Files, folders and numbers that options name, as sd-scripts' own parser reads them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from kohya_folder import ROOT
from sdxl_checkpoint import sdxl_shapes, write_checkpoint
from sdxl_train_network_options import build_parser

from blora.preflight.files import check_files
from blora.preflight.folders import (
    check_missing,
    config_subsets,
    image_folders,
    other_project,
)
from blora.preflight.report import Report

CORRECT = "correct --pretrained_model_name_or_path (BLORA_CHECKPOINT in the launcher)"
FILE = "a file"
CONFIG = "_in/lora/sdxl/hero/config.toml"
IMAGES = "_in/lora/sdxl/hero/images"
OPTIONS = {
    "dataset_config": CONFIG,
    "output_dir": "_out/hero_1",
    "output_name": "hero_1",
    "save_every_n_steps": "1000",
}
POSIX = pytest.mark.skipif(os.name == "nt", reason="Windows has other rules of names and rights")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A whole SDXL checkpoint."""
    path = tmp_path_factory.mktemp("models") / "sdxl.safetensors"
    write_checkpoint(path, sdxl_shapes())
    return path


@pytest.fixture(autouse=True)
def kohya(tmp_path, monkeypatch, checkpoint) -> Path:
    """A folder in which a training could begin; it is the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(OPTIONS, "pretrained_model_name_or_path", str(checkpoint))
    put(FILE)
    put(CONFIG)
    put("folder/inside")
    put("state/optimizer.bin")
    return tmp_path


def put(path: str, text: str = "") -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8")


def words(**changes: object) -> list[str]:
    """A command line of OPTIONS; None leaves one out, True gives it without a value."""
    line = []
    for name, value in (OPTIONS | changes).items():
        if isinstance(value, list):
            line += [f"--{name}", *value]
        elif value is not None:
            line.append(f"--{name}" if value is True else f"--{name}={value}")
    return line


def check(**changes: object) -> Report:
    report = Report()
    check_files(build_parser().parse_args(words(**changes)), report)
    return report


def clean(**changes: object) -> bool:
    report = check(**changes)
    return report.errors == report.warnings == report.notes == []


def test_a_training_that_can_begin_passes_without_a_word():
    assert clean()


def test_all_errors_come_at_once():
    put("_out")
    changes = {
        "pretrained_model_name_or_path": "gone.safetensors",
        "base_weights": "gone.safetensors",
        "vae": "gone.safetensors",
        "resume": "gone",
        "sample_at_first": True,
        "save_every_n_steps": "0",
        "dataset_config": None,
    }
    assert check(**changes).errors == [
        f'no checkpoint at "gone.safetensors": {CORRECT}',
        'no network weights at "gone.safetensors": correct --base_weights',
        'no VAE at "gone.safetensors": correct --vae',
        'no saved state in "gone": correct --resume',
        "sampling is on, but no prompts are given: add --sample_prompts",
        f'"{Path("_out").absolute()}" is not a folder, so nothing can be saved there: correct '
        "--output_dir",
        "--save_every_n_steps=0 ends the training after its first step: remove it",
        "there are no images: give --dataset_config",
    ]


def test_a_name_that_is_too_long_for_a_file_is_an_error_and_no_traceback():
    [error] = check(pretrained_model_name_or_path="x" * 300 + ".safetensors").errors
    assert error.startswith("cannot read a file or folder (")


def test_an_option_that_a_release_does_not_have_is_a_warning_and_the_other_checks_go_on():
    args = build_parser().parse_args(words(vae="gone.pt", save_every_n_steps="0"))
    del args.log_tracker_config
    report = Report()
    check_files(args, report)
    assert len(report.errors) == 2
    [warning] = report.warnings
    assert warning.startswith("could not check all options (AttributeError: 'Namespace' object has")


def test_v_prediction_may_be_given():
    write_checkpoint(Path("v.safetensors"), sdxl_shapes() | {"v_pred": ()})
    given = {"pretrained_model_name_or_path": "v.safetensors"}
    [warning] = check(**given).warnings
    assert warning.startswith('"v.safetensors" is a v-prediction model: ')
    for option in ("v_parameterization", "v_param"):
        assert clean(**given, **{option: True})


# ---- Files that options name ---------------------------------------------------------------------


MISSING = {
    'no network weights at "b": correct --base_weights': {"base_weights": [FILE, "b"]},
    'no tracker config at "a.toml": correct --log_tracker_config': {"log_tracker_config": "a.toml"},
    'no VAE at "a/b/c": correct --vae': {"vae": "a/b/c"},
    'no VAE at "a/vae.pt": correct --vae': {"vae": "a/vae.pt"},
    'no saved state in "a": correct --resume': {"resume": "a"},
    f'no saved state in "{FILE}": correct --resume': {"resume": FILE},
    'no saved state in "empty": correct --resume': {"resume": "empty"},
    'no dataset config at "a.toml": copy blora_dataset.toml there, or correct the path': {
        "dataset_config": "a.toml"
    },
    'no folder of images at "gone": correct --train_data_dir': {
        "dataset_config": None,
        "train_data_dir": "gone",
    },
    "there are no images: give --dataset_config": {"dataset_config": None},
}


@pytest.mark.parametrize("sentence", MISSING)
def test_a_file_that_an_option_names_and_that_is_missing_is_an_error(sentence):
    Path("empty").mkdir()
    assert check(**MISSING[sentence]).errors == [sentence]


THERE = [
    {"base_weights": [FILE, "folder/inside"]},
    {"log_tracker_config": FILE},
    {"vae": FILE},
    {"vae": "folder"},
    {"vae": "stabilityai/sdxl-vae"},
    {"vae": ""},
    {"resume": "state"},
    {"resume": "me/model/state", "resume_from_huggingface": True},
    {"resume": "me/model/state", "resume_from_hug": True},
    {"dataset_class": "own.Dataset", "dataset_config": "gone.toml"},
    {"train_data_dir": "gone"},
    {"dataset_config": None, "in_json": "meta.json", "train_data_dir": "gone"},
    {"dataset_config": None, "train_data_dir": "folder"},
]


@pytest.mark.parametrize("given", THERE)
def test_a_file_that_is_there_or_not_looked_for_here_passes(given):
    assert clean(**given)


def test_a_state_may_lie_in_the_home_folder(kohya, monkeypatch):
    monkeypatch.setenv("USERPROFILE" if os.name == "nt" else "HOME", str(kohya))
    assert clean(resume="~/state")


@pytest.mark.parametrize("reached", ["1600", "3000"])
def test_a_state_that_has_no_steps_left_is_an_error(reached):
    put("state/train_state.json", f'{{"current_epoch": 9, "current_step": {reached}}}')
    assert check(resume="state").errors == [
        f'the state in "state" is of step {reached}, and --max_train_steps=1600 counts from the '
        "beginning: raise it"
    ]


ON_FROM_STEP_3000 = [
    {"max_train_steps": "3001"},
    {"max_train_epochs": "1"},
    {"max_train_ep": "1"},
    {"max_train_st": "9000"},
    {"initial_step": "1"},
    {"initial_epoch": "1"},
]


@pytest.mark.parametrize("given", ON_FROM_STEP_3000)
def test_a_state_with_steps_left_or_nobody_knows_how_many_passes(given):
    put("state/train_state.json", '{"current_epoch": 9, "current_step": 3000}')
    assert clean(resume="state", **given)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"current_step": null}'])
def test_a_state_that_does_not_say_its_step_passes(text):
    put("state/train_state.json", text)
    assert clean(resume="state")


# ---- The dataset config --------------------------------------------------------------------------

NO_FOLDER = f'no folder of images at "{{}}": correct image_dir in "{CONFIG}"'


def subsets_of(*folders: str, **more: str) -> list[dict[str, str]]:
    """A config's subsets, one for each folder and one for what else is given."""
    subsets = [{"image_dir": folder} for folder in folders] + ([more] if more else [])
    return config_subsets(
        {"general": {"shuffle_caption": True}, "datasets": [{"subsets": subsets}]}
    )


MISSING_FOLDERS = {
    "all of them": (["gone", FILE, "gone"], {}, [["gone", FILE], []]),
    "beside another": (["gone", "folder"], {}, [[], ["gone"]]),
    "beside a list of pictures": (["gone"], {"metadata_file": "meta.json"}, [[], ["gone"]]),
    "none": (["folder"], {}, [[], []]),
}


@pytest.mark.parametrize("which", MISSING_FOLDERS)
def test_missing_folders_are_errors_unless_there_are_others(which):
    folders, more, expected = MISSING_FOLDERS[which]
    report = Report()
    check_missing(subsets_of(*folders, **more), Path(CONFIG), report)
    assert [report.errors, report.warnings] == [
        [NO_FOLDER.format(folder) for folder in kind] for kind in expected
    ]


PROJECT, OTHER = "_in/lora/sdxl/hero/images", "_in/lora/sdxl/villain/images"
OTHERS = {
    "the other's": ([OTHER], OTHER),
    "the other's, by a detour": (
        [f"{PROJECT}/../../../../../{OTHER}"],
        f"{PROJECT}/../../../../../{OTHER}",
    ),
    "the other's folder": ([f"{OTHER}/.."], f"{OTHER}/.."),
    "one's own and the other's": ([OTHER, PROJECT], None),
    "shared ones beside the projects": (["_in/lora/sdxl/shared"], None),
    "shared ones above them": (["_in/lora/shared"], None),
    "shared ones elsewhere": (["shared"], None),
}


@pytest.mark.parametrize("which", OTHERS)
def test_pictures_of_another_project_alone_are_noticed(which):
    folders, other = OTHERS[which]
    put("_in/lora/sdxl/villain/config.toml")
    Path(OTHER).mkdir()
    assert other_project(image_folders(subsets_of(*folders)), Path(CONFIG)) == other
    in_full = [str(Path(folder).absolute()) for folder in folders]
    assert bool(other_project(in_full, Path(CONFIG))) == bool(other)


@POSIX
def test_a_link_to_another_projects_pictures_is_ones_own():
    put("_in/lora/sdxl/villain/config.toml")
    Path(OTHER).mkdir()
    Path(PROJECT).symlink_to(Path(OTHER).absolute(), target_is_directory=True)
    assert other_project([PROJECT], Path(CONFIG)) is None


# ---- The output ----------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["output_dir", "logging_dir"])
def test_a_file_where_a_folder_is_to_be_is_an_error(option):
    Path("file").touch()
    for given, shown in (("file", "file"), ("file/a/b", Path("file").absolute())):
        assert check(**{option: given}).errors == [
            f'"{shown}" is not a folder, so nothing can be saved there: correct --{option}'
        ]


@POSIX
def test_a_link_to_nothing_where_a_folder_is_to_be_is_an_error():
    Path("link").symlink_to("gone")
    assert check(output_dir="link").errors == [
        '"link" is not a folder, so nothing can be saved there: correct --output_dir'
    ]


@pytest.mark.parametrize("given", [None, ""])
def test_a_training_that_saves_nowhere_is_an_error(given):
    assert check(output_dir=given).errors == ["there is no folder to save to: add --output_dir"]


# Root may do anything, so this is asked as nobody; the paths are relative, as nobody may not enter
# the folders above.
AS_NOBODY = """
import os, sys
from blora.preflight.files import check_folder
from blora.preflight.report import Report
if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
report = Report()
check_folder(sys.argv[1], "output_dir", report)
print(*report.errors, sep="\\n")
"""


@POSIX
@pytest.mark.parametrize(
    ("mode", "output"),
    [(0o555, "closed"), (0o000, "closed"), (0o666, "closed/a"), (0o000, "closed/a/b")],
)
def test_a_folder_that_may_not_be_written_to_is_an_error(kohya, mode, output):
    folder = kohya / "closed"
    folder.mkdir()
    folder.chmod(mode)
    kohya.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, output],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    folder.chmod(0o755)
    shown = output if output == "closed" else folder
    assert done.stdout == (
        f'no permission to write to "{shown}": correct --output_dir, or the permissions\n'
    )


def test_no_folder_is_made():
    check(logging_dir="logs")
    assert sorted(path.name for path in Path().iterdir()) == ["_in", FILE, "folder", "state"]


BLORA_NAME = "correct --output_name (BLORA_NAME in the launcher)"


def test_a_name_that_is_a_path_is_an_error():
    """As BLORA_NAME=chars/hero gives it."""
    given = {"output_dir": "_out/chars/hero_1", "output_name": "chars/hero_1"}
    folder = Path("_out/chars/hero_1/chars")
    assert check(**given).errors == [
        f'--output_name "chars/hero_1" is a path, and the folder "{folder}" does not exist: '
        f"{BLORA_NAME}"
    ]
    folder.mkdir(parents=True)
    assert check(**given).errors == []


@POSIX
@pytest.mark.parametrize("name", ["x" * 231, "ä" * 116, "x" * 300])
def test_a_name_that_is_too_long_for_its_saves_is_an_error(name):
    [error] = check(output_name=name).errors
    assert error.endswith(f'" is too long for a file: {BLORA_NAME}')
    assert clean(output_name="x" * 230)


WINDOWS = {
    "a:b": "with : in its name",
    "what?": "with ? in its name",
    'say "hi"': 'with " in its name',
    "a\\b": "with \\ in its name",
    "a<b>|*": "with * < > | in its name",
    "a\nb": "with \n in its name",
    "CON": "of this name",
    "nul.1": "of this name",
    "com1 ": "of this name",
}


@POSIX
@pytest.mark.parametrize("name", WINDOWS)
def test_a_name_that_only_windows_refuses_is_a_warning_elsewhere(name):
    report = check(output_name=name)
    assert report.errors == []
    assert report.warnings == [
        f'--output_name "{name}": Windows cannot save a file {WINDOWS[name]}: {BLORA_NAME}'
    ]


@pytest.mark.skipif(os.name != "nt", reason="the rule of Windows")
@pytest.mark.parametrize("name", [name for name in WINDOWS if "\\" not in name])
def test_a_name_that_windows_refuses_is_an_error_there(name):
    assert check(output_name=name).errors == [
        f'--output_name "{name}": Windows cannot save a file {WINDOWS[name]}: {BLORA_NAME}'
    ]


@pytest.mark.parametrize("name", ["hero 1", "ヒーロー", "v1.5", "console", "com10", "a.con"])
def test_other_names_pass(name):
    assert clean(output_name=name)


def test_an_earlier_lora_that_will_be_written_over_is_a_warning():
    for name in ("hero_1.safetensors", "last.safetensors", "hero_1.ckpt"):
        put(f"_out/hero_1/{name}")
    for given, name in (
        ({}, "hero_1.safetensors"),
        ({"output_name": None}, "last.safetensors"),
        ({"save_model_as": "ckpt"}, "hero_1.ckpt"),
    ):
        path = Path("_out/hero_1", name)
        assert check(**given).warnings == [
            f'"{path}" exists and will be overwritten: give another --output_name '
            "(BLORA_REVISION in the launcher), or move it away"
        ]
    for given in ({"output_name": "hero_2"}, {"save_model_as": "pt"}, {"save_model": "pt"}):
        assert clean(**given)
    assert clean(output_name=None, output_n="hero_2")


# ---- Numbers -------------------------------------------------------------------------------------

DIVISORS = {
    "save_every_n_steps": "step",
    "save_every_n_epochs": "epoch",
    "validate_every_n_steps": "step",
    "validate_every_n_epochs": "epoch",
}


@pytest.mark.parametrize("name", DIVISORS)
@pytest.mark.parametrize("zero", ["0", "-0"])
def test_a_zero_by_which_sd_scripts_divides_is_an_error(name, zero):
    assert check(**{name: zero}).errors == [
        f"--{name}=0 ends the training after its first {DIVISORS[name]}: remove it"
    ]


NO_ZEROS = [
    {"sample_every_n_steps": "0", "sample_every_n_epochs": "0"},
    {"save_every_n_steps": "-1"},
    {"save_every_n_epochs": "0", "save_n_epoch_ratio": "2"},
    {"save_every_n_steps": None},
]


@pytest.mark.parametrize("given", NO_ZEROS)
def test_a_number_that_sd_scripts_can_do_with_or_refuses_itself_passes(given):
    assert clean(**given)
