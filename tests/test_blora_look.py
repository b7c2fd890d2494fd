"""What blora/preflight/files.py finds before any package is loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kohya_folder import ROOT
from sdxl_checkpoint import sdxl_shapes, write_checkpoint

from blora.preflight import files
from blora.preflight.options import parse_options
from blora.preflight.report import Report

CORRECT = "correct --pretrained_model_name_or_path (BLORA_CHECKPOINT in the launcher)"
CORRECT_PRESET = "correct the preset of --network_args (BLORA_PRESET in the launcher)"
SCRIPT = "sdxl_train_network.py"
CONFIG = "_in/lora/sdxl/hero/config.toml"
IMAGES = "_in/lora/sdxl/hero/images"
OPTIONS = {
    "dataset_config": CONFIG,
    "output_dir": "_out/hero_1",
    "output_name": "hero_1",
    "network_module": "lycoris.kohya",
    "network_args": ["preset=presets/style.toml"],
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
    Path(SCRIPT).touch()
    Path(IMAGES).mkdir(parents=True)
    write_config(IMAGES)
    put("presets/style.toml")
    put("state/optimizer.bin")
    return tmp_path


def put(path: str, text: str = "") -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8")


def config_of(*folders: str) -> str:
    subsets = "".join(f'[[datasets.subsets]]\nimage_dir = "{folder}"\n' for folder in folders)
    return f"[[datasets]]\nresolution = 1024\n{subsets}"


def write_config(*folders: str, path: str = CONFIG) -> None:
    put(path, config_of(*folders))


def words(**changes: object) -> list[str]:
    """A command line of OPTIONS; None leaves one out, True gives it without a value."""
    line = []
    for name, value in (OPTIONS | changes).items():
        if isinstance(value, list):
            line += [f"--{name}", *value]
        elif value is not None:
            line.append(f"--{name}" if value is True else f"--{name}={value}")
    return line


def looked(script: str = SCRIPT, **changes: object) -> Report:
    report = Report()
    files.look(Path(script), parse_options(words(**changes)), report)
    return report


def clean(**changes: object) -> bool:
    report = looked(**changes)
    return report.errors == report.warnings == report.notes == []


def test_a_training_that_can_begin_passes_without_a_word():
    assert clean()


def test_all_errors_come_at_once():
    Path(IMAGES).rmdir()
    Path("_out").touch()
    changes = {
        "pretrained_model_name_or_path": "gone.safetensors",
        "network_args": ["preset=presets/gone.toml"],
        "network_weights": "gone.safetensors",
        "vae": "gone.safetensors",
        "resume": "gone",
        "sample_at_first": True,
        "save_every_n_steps": "0",
    }
    assert looked("gone.py", **changes).errors == [
        'no training script at "gone.py": run this in a kohya sd-scripts or kohya_ss folder',
        f'no checkpoint at "gone.safetensors": {CORRECT}',
        'no network weights at "gone.safetensors": correct --network_weights',
        'no VAE at "gone.safetensors": correct --vae',
        f'no preset at "presets/gone.toml": {CORRECT_PRESET}',
        'no saved state at "gone": correct --resume',
        "--sample_at_first asks for samples without their prompts: add --sample_prompts",
        f'"{Path("_out").absolute()}" is not a folder, so nothing can be saved there: correct '
        "--output_dir",
        "--save_every_n_steps=0 ends the training after its first step: leave it out",
        f'no folder of images at "{IMAGES}": correct image_dir in "{CONFIG}"',
    ]


def test_a_name_that_is_too_long_for_a_file_is_an_error_and_no_traceback():
    [error] = looked(pretrained_model_name_or_path="x" * 300 + ".safetensors").errors
    assert error.startswith("cannot read a file or folder (")


def test_v_prediction_may_be_given():
    write_checkpoint(Path("v.safetensors"), sdxl_shapes() | {"v_pred": ()})
    given = {"pretrained_model_name_or_path": "v.safetensors"}
    [warning] = looked(**given).warnings
    assert warning.startswith('"v.safetensors" says it predicts v: ')
    for option in ("v_parameterization", "v_param"):
        assert clean(**given, **{option: True})


# ---- Files that options name ---------------------------------------------------------------------


MISSING = {
    'no network weights at "a": correct --network_weights': {"network_weights": "a"},
    'no network weights at "presets": correct --network_weights': {"network_weights": "presets"},
    'no network weights at "b": correct --base_weights': {"base_weights": [SCRIPT, "b"]},
    'no tracker config at "a.toml": correct --log_tracker_config': {"log_tracker_config": "a.toml"},
    'no VAE at "a/b/c": correct --vae': {"vae": "a/b/c"},
    'no VAE at "a/vae.pt": correct --vae': {"vae": "a/vae.pt"},
    'no saved state at "a": correct --resume': {"resume": "a"},
    f'no saved state at "{SCRIPT}": correct --resume': {"resume": SCRIPT},
    f'no preset at "a.toml": {CORRECT_PRESET}': {"network_args": ["preset=a.toml"]},
    f'no preset at "presets/a": {CORRECT_PRESET}': {
        "network_module": "blora_network",
        "network_args": ["preset=presets/a"],
    },
    'no --config_file at "gui.toml": write one there, or correct the path': {"config_file": "gui"},
    'no dataset config at "a.toml": copy blora_dataset.toml there, or correct the path': {
        "dataset_config": "a.toml"
    },
}


@pytest.mark.parametrize("sentence", MISSING)
def test_a_file_that_an_option_names_and_that_is_missing_is_an_error(sentence):
    assert looked(**MISSING[sentence]).errors == [sentence]


THERE = [
    {"network_weights": SCRIPT},
    {"base_weights": [SCRIPT, "presets/style.toml"]},
    {"log_tracker_config": "presets/style.toml"},
    {"vae": SCRIPT},
    {"vae": "presets"},
    {"vae": "stabilityai/sdxl-vae"},
    {"vae": ""},
    {"resume": "state"},
    {"resume": "me/model/state", "resume_from_huggingface": True},
    {"resume": "me/model/state", "resume_from_hug": True},
    {"network_args": ["preset=attn-mlp"]},
    {"network_args": None},
    {"network_module": "networks.lora", "network_args": ["preset=gone.toml"]},
]


@pytest.mark.parametrize("given", THERE)
def test_a_file_that_is_there_or_not_looked_for_here_passes(given):
    assert clean(**given)


def test_a_state_may_lie_in_the_home_folder(kohya, monkeypatch):
    monkeypatch.setenv("USERPROFILE" if os.name == "nt" else "HOME", str(kohya))
    assert clean(resume="~/state")


def test_a_folder_without_a_saved_state_is_an_error():
    Path("empty").mkdir()
    assert looked(resume="empty").errors == ['no saved state in "empty": correct --resume']


@pytest.mark.parametrize("reached", ["1600", "3000"])
def test_a_state_that_has_no_steps_left_is_an_error(reached):
    put("state/train_state.json", f'{{"current_epoch": 9, "current_step": {reached}}}')
    assert looked(resume="state").errors == [
        f'the state in "state" is of step {reached}, and --max_train_steps=1600 counts from the '
        "beginning: give more"
    ]


ON_FROM_STEP_3000 = [
    {"max_train_steps": "3001"},
    {"max_train_epochs": "1"},
    {"max_train_ep": "1"},
    {"max_train_st": "9000"},
    {"initial_step": "1"},
    {"initial_epoch": "1"},
    {"max_train_steps": "many"},
]


@pytest.mark.parametrize("given", ON_FROM_STEP_3000)
def test_a_state_with_steps_left_or_nobody_knows_how_many_passes(given):
    put("state/train_state.json", '{"current_epoch": 9, "current_step": 3000}')
    assert clean(resume="state", **given)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"current_step": null}'])
def test_a_state_that_does_not_say_its_step_passes(text):
    put("state/train_state.json", text)
    assert clean(resume="state")


# ---- --config_file -------------------------------------------------------------------------------


def test_options_may_come_from_a_config_file():
    put("gui.toml", '[section]\nsave_every_n_steps = 0\nvae = ""\nnetwork_weights = "gone"\n')
    assert looked(config_file="gui.toml", save_every_n_steps=None).errors == [
        'no network weights at "gone": correct --network_weights',
        "--save_every_n_steps=0 ends the training after its first step: leave it out",
    ]


def test_a_config_file_that_is_no_toml_is_the_last_that_is_told():
    put("gui.toml", "[section")
    errors = looked("gone.py", config_file="gui.toml", output_dir=None, vae="gone").errors
    assert len(errors) == 2
    assert errors[0].startswith('no training script at "gone.py"')
    assert errors[1].startswith('the --config_file "gui.toml" is not valid TOML (')


# ---- The dataset ---------------------------------------------------------------------------------


NO_FOLDER = f'no folder of images at "{{}}": correct image_dir in "{CONFIG}"'


def test_folders_that_are_all_missing_are_errors_each_told_once():
    Path("file").touch()
    write_config("gone", "file", "gone")
    report = looked()
    assert report.errors == [NO_FOLDER.format("gone"), NO_FOLDER.format("file")]
    assert report.warnings == []


def test_a_folder_that_is_missing_beside_another_is_a_warning():
    write_config("gone", IMAGES)
    report = looked()
    assert report.errors == []
    assert report.warnings == [NO_FOLDER.format("gone")]


def test_a_subset_by_metadata_may_be_all_there_is():
    put(CONFIG, config_of("gone") + '[[datasets.subsets]]\nmetadata_file = "meta.json"\n')
    assert looked().errors == []


def test_a_config_may_be_json():
    put("config.JSON", json.dumps({"datasets": [{"subsets": [{"image_dir": "gone"}]}]}))
    assert looked(dataset_config="config.JSON").errors == [
        'no folder of images at "gone": correct image_dir in "config.JSON"'
    ]


BROKEN = {
    "config.toml": ("[general\n", 'the dataset config "config.toml" is not valid TOML ('),
    "config.json": (
        "{",
        'the dataset config "config.json" is not valid JSON (Expecting property name enclosed in '
        "double quotes: line 1 column 2 (char 1)): correct it",
    ),
    "config.txt": (
        config_of(IMAGES),
        'the name of the dataset config "config.txt" ends neither in .toml nor in .json: rename it',
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_config_that_cannot_be_read_is_an_error(name):
    text, sentence = BROKEN[name]
    put(name, text)
    [error] = looked(dataset_config=name).errors
    assert error.startswith(sentence)


OTHER_FORMS = [
    "datasets = 3",
    "[[datasets]]\nsubsets = 3",
    "[[datasets]]\nsubsets = [3]",
    "datasets = [3]",
    "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 3",
]


@pytest.mark.parametrize("text", OTHER_FORMS)
def test_a_config_of_another_form_is_left_to_the_rehearsal(text):
    put(CONFIG, text)
    assert clean()


def test_a_json_config_of_another_form_is_left_to_the_rehearsal():
    put("config.json", "[]")
    assert clean(dataset_config="config.json")


def test_no_images_at_all_are_an_error():
    assert looked(dataset_config=None).errors == ["there are no images: give --dataset_config"]


WAYS = [
    {"dataset_class": "own.Dataset", "dataset_config": "gone.toml"},
    {"dataset_config": CONFIG, "train_data_dir": "gone"},
    {"dataset_config": None, "in_json": "meta.json", "train_data_dir": "gone"},
    {"dataset_config": None, "train_data_dir": "presets"},
]


@pytest.mark.parametrize("given", WAYS)
def test_only_what_sd_scripts_takes_the_images_from_is_looked_at(given):
    assert clean(**given)


def test_a_missing_folder_of_folders_is_an_error():
    assert looked(dataset_config=None, train_data_dir="gone").errors == [
        'no folder of images at "gone": correct --train_data_dir'
    ]


# ---- Another project's pictures ------------------------------------------------------------------

OTHER = "_in/lora/sdxl/villain"


@pytest.fixture
def other() -> str:
    """The pictures of a second project."""
    Path(OTHER, "images").mkdir(parents=True)
    write_config(f"{OTHER}/images", path=f"{OTHER}/config.toml")
    return f"{OTHER}/images"


@pytest.mark.parametrize("spelled", ["{}", "_in/lora/sdxl/hero/../../../../{}", "{}/.."])
def test_a_config_that_was_copied_from_another_project_is_a_warning(other, spelled):
    folder = spelled.format(other)
    write_config(folder)
    report = looked()
    assert report.errors == []
    assert report.warnings == [
        f'"{CONFIG}" names the pictures of another project, "{folder}": correct image_dir in it'
    ]


def test_the_other_project_may_be_named_in_full(other, kohya):
    write_config((kohya / other).as_posix())
    assert len(looked().warnings) == 1


def test_pictures_of_another_project_may_be_added_to_ones_own(other):
    write_config(other, IMAGES)
    assert clean()


def test_a_folder_of_pictures_beside_the_projects_may_be_shared():
    for shared in ("_in/lora/sdxl/shared", "_in/lora/shared", "shared"):
        Path(shared).mkdir()
        write_config(shared)
        assert clean()


def test_a_link_to_another_projects_pictures_is_ones_own(other):
    Path(IMAGES).rmdir()
    try:
        Path(IMAGES).symlink_to(Path(other).absolute(), target_is_directory=True)
    except OSError:
        pytest.skip("links need a right on Windows")
    assert clean()


# ---- The output ----------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["output_dir", "logging_dir"])
def test_a_file_where_a_folder_is_to_be_is_an_error(option):
    Path("file").touch()
    for given, shown in (("file", "file"), ("file/a/b", Path("file").absolute())):
        assert looked(**{option: given}).errors == [
            f'"{shown}" is not a folder, so nothing can be saved there: correct --{option}'
        ]


@POSIX
def test_a_link_to_nothing_where_a_folder_is_to_be_is_an_error():
    Path("link").symlink_to("gone")
    assert looked(output_dir="link").errors == [
        '"link" is not a folder, so nothing can be saved there: correct --output_dir'
    ]


@pytest.mark.parametrize("given", [None, ""])
def test_a_training_that_saves_nowhere_is_an_error(given):
    assert looked(output_dir=given).errors == ["there is no folder to save to: add --output_dir"]


# Root may do anything, so the look goes on as nobody; the paths are relative, as nobody may not
# enter the folders above. Nor could it import anything more: a first look does that.
AS_NOBODY = """
import os, sys, pathlib
from blora.preflight import files, options, report
def errors(words):
    found = report.Report()
    files.look(pathlib.Path("x.py"), options.parse_options(words), found)
    return found.errors
errors(sys.argv[1:])
if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
print("\\n".join(errors(sys.argv[1:])))
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
        [sys.executable, "-c", AS_NOBODY, f"--output_dir={output}"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    folder.chmod(0o755)
    shown = output if output == "closed" else folder
    assert (
        f'nothing may be written to "{shown}": correct --output_dir, or its permissions'
        in done.stdout.splitlines()
    )


def test_the_look_makes_no_folder():
    looked(logging_dir="logs")
    assert sorted(path.name for path in Path().iterdir()) == ["_in", "presets", SCRIPT, "state"]


BLORA_NAME = "correct --output_name (BLORA_NAME in the launcher)"


def test_a_name_that_is_a_path_is_an_error():
    """As BLORA_NAME=chars/hero gives it."""
    given = {"output_dir": "_out/chars/hero_1", "output_name": "chars/hero_1"}
    folder = Path("_out/chars/hero_1/chars")
    assert looked(**given).errors == [
        f'--output_name "chars/hero_1" is a path, and nothing can be saved in "{folder}": '
        f"{BLORA_NAME}"
    ]
    folder.mkdir(parents=True)
    assert looked(**given).errors == []
    assert clean(output_dir=None, output_name="chars/hero_1", output_di="_out")


@POSIX
@pytest.mark.parametrize("name", ["x" * 231, "ä" * 116, "x" * 300])
def test_a_name_that_is_too_long_for_its_saves_is_an_error(name):
    [error] = looked(output_name=name).errors
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
    report = looked(output_name=name)
    assert report.errors == []
    assert report.warnings == [
        f'--output_name "{name}": Windows cannot save a file {WINDOWS[name]}: {BLORA_NAME}'
    ]


@pytest.mark.skipif(os.name != "nt", reason="the rule of Windows")
@pytest.mark.parametrize("name", [name for name in WINDOWS if "\\" not in name])
def test_a_name_that_windows_refuses_is_an_error_there(name):
    assert looked(output_name=name).errors == [
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
        assert looked(**given).warnings == [
            f'"{path}" is there and will be written over: give another '
            "--output_name (BLORA_REVISION in the launcher), or move it away"
        ]
    for given in ({"output_name": "hero_2"}, {"save_model_as": "pt"}, {"save_model": "pt"}):
        assert clean(**given)
    assert clean(output_name=None, output_n="hero_2")
    put("hero_1.safetensors")
    assert clean(output_dir=None, output_di="elsewhere")


# ---- Numbers -------------------------------------------------------------------------------------

DIVISORS = {
    "save_every_n_steps": "step",
    "save_every_n_epochs": "epoch",
    "validate_every_n_steps": "step",
    "validate_every_n_epochs": "epoch",
}


@pytest.mark.parametrize("name", DIVISORS)
@pytest.mark.parametrize("zero", ["0", "00", "-0"])
def test_a_zero_by_which_sd_scripts_divides_is_an_error(name, zero):
    assert looked(**{name: zero}).errors == [
        f"--{name}=0 ends the training after its first {DIVISORS[name]}: leave it out"
    ]


NO_ZEROS = [
    {"sample_every_n_steps": "0", "sample_every_n_epochs": "0"},
    {"save_every_n_steps": "many"},
    {"save_every_n_steps": "-1"},
    {"save_every_n_epochs": "0", "save_n_epoch_ratio": "2"},
    {"save_every_n_steps": None},
]


@pytest.mark.parametrize("given", NO_ZEROS)
def test_a_number_that_sd_scripts_can_do_with_or_refuses_itself_passes(given):
    assert clean(**given)


# ---- Options by their first letters --------------------------------------------------------------


ABBREVIATED = [
    {"pretrained_model_name_or_path": None, "pretrained_model": "somewhere"},
    {"pretrained_model_name_or_path": "gone.safetensors", "pretrained": "somewhere"},
    {"dataset_config": None, "dataset_con": "somewhere"},
    {"output_dir": None, "output_d": "somewhere"},
    {"output_name": "x" * 300, "output_n": "x"},
    {"save_every_n_steps": "0", "save_every_n_s": "9"},
    {"network_args": ["preset=gone.toml"], "network_ar": ["preset=full"]},
    {"network_module": None, "network_mod": "networks.lora", "network_args": ["preset=gone.toml"]},
    {"base_weights": "gone", "base_weight": [SCRIPT]},
    {"resume": "gone", "resum": "presets"},
]


@pytest.mark.parametrize("given", ABBREVIATED)
def test_of_an_option_that_may_be_given_by_its_first_letters_nothing_is_said(given):
    assert clean(**given)


# ---- Python --------------------------------------------------------------------------------------

IN_BARE_PYTHON = """
import sys
from pathlib import Path
from blora.preflight import files, options, report
found = report.Report()
files.look(Path("sdxl_train_network.py"), options.parse_options(sys.argv[1:]), found)
print(*found.errors, *found.warnings, *found.notes, sep="\\n")
"""


def in_bare_python(**changes: object) -> list[str]:
    """The sentences of a look by a Python that has its standard library and no package."""
    done = subprocess.run(
        [sys.executable, "-S", "-c", IN_BARE_PYTHON, *words(**changes)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


NO_TOML = "no toml in this Python, so the configs were not checked"


def test_without_toml_it_goes_on_with_a_note():
    put(CONFIG, "[")
    put("prompts.toml", "[")
    assert in_bare_python() == [NO_TOML]
    assert in_bare_python(sample_at_first=True, sample_prompts="prompts.toml") == [NO_TOML]
    assert in_bare_python(vae="gone.pt", config_file="gone") == [NO_TOML]
    shutil.move(CONFIG, "elsewhere.toml")
    assert in_bare_python(vae="gone.pt") == [
        'no VAE at "gone.pt": correct --vae',
        f'no dataset config at "{CONFIG}": copy blora_dataset.toml there, or correct the path',
        NO_TOML,
    ]


def test_it_loads_no_package_but_toml():
    code = f"{IN_BARE_PYTHON}\nprint(sys.modules.keys() & {{'torch', 'lycoris', 'numpy'}})"
    done = subprocess.run(
        [sys.executable, "-c", code, *words()],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "\nset()\n"
