"""Files, folders, prompts and numbers that options name, as sd-scripts' own parser reads them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from kohya_folder import ROOT
from sdxl_checkpoint import write_checkpoint
from sdxl_train_network_options import build_parser

from blora.preflight.files import check_files, check_folder, read_prompts
from blora.preflight.folders import check_missing, config_subsets, image_folders, other_project
from blora.preflight.report import Report

PARSER = build_parser()
# The tensors by which pre-flight knows SDXL: enough for it, and quickly read.
UNET, TEXT_2 = "model.diffusion_model.", "conditioner.embedders.1.model."
SDXL = dict.fromkeys(
    (f"{UNET}label_emb.0.0.weight", f"{TEXT_2}ln_final.weight", "first_stage_model.a"), (1,)
)
FILE = "a file"
CONFIG = "_in/lora/sdxl/hero/config.toml"
OPTIONS = {
    "pretrained_model_name_or_path": "sdxl.safetensors",
    "dataset_config": CONFIG,
    "output_dir": "_out/hero_1",
    "output_name": "hero_1",
    "save_every_n_steps": "1000",
}
FILES = {
    FILE: "",
    CONFIG: "",
    "folder/inside": "",
    "state/optimizer.bin": "",
    "at 1600/train_state.json": '{"current_epoch": 9, "current_step": 1600}',
    "at 3000/train_state.json": '{"current_epoch": 9, "current_step": 3000}',
    "prompts.txt": "# a comment\n\na dog # 1\n",
    "prompts.toml": '[prompt]\nwidth = 512\n[[prompt.subset]]\nprompt = "a dog"\n',
    "prompts.json": '["a dog", {"prompt": "a cat", "width": 512}]',
}
POSIX = pytest.mark.skipif(os.name == "nt", reason="Windows has other rules of names and rights")


@pytest.fixture(autouse=True)
def kohya(tmp_path, monkeypatch) -> Path:
    """A folder in which a training could begin; it is the working directory."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint(Path("sdxl.safetensors"), SDXL)
    Path("empty").mkdir()
    for path, text in FILES.items():
        put(path, text)
    return tmp_path


def put(path: str, text: str = "") -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8")


def check(**changes: object) -> Report:
    """The sentences on OPTIONS with changes: None leaves one out, True gives it without a value."""
    line = []
    for name, value in (OPTIONS | changes).items():
        if isinstance(value, list):
            line += [f"--{name}", *value]
        elif value is not None:
            line.append(f"--{name}" if value is True else f"--{name}={value}")
    report = Report()
    check_files(PARSER.parse_args(line), report)
    report.plan.clear()
    return report


# ---- What options name ---------------------------------------------------------------------------

NO_CHECKPOINT = (
    'no checkpoint at "gone.safetensors": correct --pretrained_model_name_or_path '
    "(BLORA_CHECKPOINT in the launcher)"
)
NO_CONFIG = 'no dataset config at "a.toml": copy blora_dataset.toml there, or correct the path'
NO_IMAGES = 'no folder of images at "gone": correct --train_data_dir'
NO_PROMPTS = "sampling is on, but no prompts are given: add --sample_prompts"
NO_FOLDER = '"{}" is not a folder, so nothing can be saved there: correct --{}'
NOWHERE = "there is no folder to save to: add --output_dir"
NO_STEPS = (
    'the state in "at {0}" is of step {0}, and --max_train_steps=1600 counts from the beginning: '
    "raise it"
)
ZERO = "--{0}_every_n_{1}s=0 ends the training after its first {1}: remove it"
SAMPLES = [
    {"sample_at_first": True},
    {"sample_every_n_steps": "100"},
    {"sample_every_n_epochs": "1"},
]
ONE_OF_EACH_CHECK = [
    (NO_CHECKPOINT, {"pretrained_model_name_or_path": "gone.safetensors"}),
    ('no network weights at "b": correct --base_weights', {"base_weights": [FILE, "b"]}),
    ('no VAE at "a/vae.pt": correct --vae', {"vae": "a/vae.pt"}),
    ('no saved state in "a": correct --resume', {"resume": "a"}),
    (NO_PROMPTS, SAMPLES[0]),
    (NO_FOLDER.format(FILE, "output_dir"), {"output_dir": FILE}),
    (ZERO.format("save", "step"), {"save_every_n_steps": "0"}),
    ("there are no images: give --dataset_config", {"dataset_config": None}),
]


@pytest.mark.parametrize(
    ("sentence", "given"),
    [
        *ONE_OF_EACH_CHECK,
        ('no tracker config at "a": correct --log_tracker_config', {"log_tracker_config": "a"}),
        ('no VAE at "a/b/c": correct --vae', {"vae": "a/b/c"}),  # a name of the hub has one slash
        (f'no saved state in "{FILE}": correct --resume', {"resume": FILE}),
        ('no saved state in "empty": correct --resume', {"resume": "empty"}),
        (NO_STEPS.format(1600), {"resume": "at 1600"}),
        (NO_STEPS.format(3000), {"resume": "at 3000"}),
        (NO_PROMPTS, SAMPLES[1]),
        (NO_PROMPTS, SAMPLES[2]),
        (NO_FOLDER.format(FILE, "logging_dir"), {"logging_dir": FILE}),
        (NOWHERE, {"output_dir": None}),
        (NOWHERE, {"output_dir": ""}),
        (ZERO.format("save", "step"), {"save_every_n_steps": "-0"}),
        (ZERO.format("save", "epoch"), {"save_every_n_epochs": "0"}),
        (ZERO.format("validate", "step"), {"validate_every_n_steps": "0"}),
        (ZERO.format("validate", "epoch"), {"validate_every_n_epochs": "0"}),
        (NO_CONFIG, {"dataset_config": "a.toml"}),
        (NO_IMAGES, {"dataset_config": None, "train_data_dir": "gone"}),
    ],
)
def test_what_would_end_a_training_is_an_error(sentence, given):
    assert check(**given) == Report(errors=[sentence])


def test_all_errors_come_at_once():
    changes = {name: value for _, given in ONE_OF_EACH_CHECK for name, value in given.items()}
    assert check(**changes).errors == [sentence for sentence, _ in ONE_OF_EACH_CHECK]


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"base_weights": [FILE, "folder/inside"]},
        {"log_tracker_config": FILE},
        {"vae": FILE},
        {"vae": "folder"},
        {"vae": "stabilityai/sdxl-vae"},
        {"vae": ""},
        {"dataset_class": "own.Dataset", "dataset_config": "gone.toml"},
        {"train_data_dir": "gone"},
        {"dataset_config": None, "in_json": "meta.json", "train_data_dir": "gone"},
        {"dataset_config": None, "train_data_dir": "folder"},
        # States: with steps left, or nobody knows how many.
        {"resume": "state"},
        {"resume": "me/model/state", "resume_from_huggingface": True},
        {"resume": "at 3000", "max_train_steps": "3001"},
        {"resume": "at 3000", "max_train_epochs": "1"},
        {"resume": "at 3000", "initial_step": "1"},
        {"resume": "at 3000", "initial_epoch": "1"},
        # An option may be shortened.
        {"resume": "at 3000", "max_train_st": "9000"},
        # Prompts: those that sd-scripts reads, and those that it never reads.
        *(
            {"sample_prompts": name, **given}
            for name in FILES
            if "prompts" in name
            for given in SAMPLES
        ),
        {"sample_prompts": "gone.md"},
        {"sample_prompts": "gone.md", "sample_every_n_steps": "0", "sample_every_n_epochs": "0"},
        # Numbers that sd-scripts can do with, or refuses itself.
        {"save_every_n_steps": "-1"},
        {"save_every_n_epochs": "0", "save_n_epoch_ratio": "2"},
        {"save_every_n_steps": None},
        # Names.
        *(
            {"output_name": name}
            for name in ("hero 1", "ヒーロー", "v1.5", "console", "com10", "a.con")
        ),
        {"output_name": "x" * 230},
    ],
    ids=str,
)
def test_what_is_there_or_not_looked_for_here_passes_without_a_word(given):
    assert check(**given) == Report()


def test_a_name_that_is_too_long_for_a_file_is_an_error_and_no_traceback():
    [error] = check(pretrained_model_name_or_path="x" * 300 + ".safetensors").errors
    assert error.startswith("cannot read a file or folder (")
    assert error.endswith("): correct its path or its permissions")


def test_an_option_that_a_release_does_not_have_is_a_warning_and_the_other_checks_go_on():
    args = PARSER.parse_args(["--vae=gone.pt", "--save_every_n_steps=0"])
    del args.log_tracker_config
    report = Report()
    check_files(args, report)
    assert 'no VAE at "gone.pt": correct --vae' in report.errors
    assert "--save_every_n_steps=0 ends the training after its first step: remove it" in (
        report.errors
    )
    [warning] = report.warnings
    assert warning.startswith("could not check all options (AttributeError: 'Namespace' object has")


def test_v_prediction_may_be_given():
    write_checkpoint(Path("sdxl.safetensors"), SDXL | {"v_pred": ()})
    assert len(check().warnings) == 1
    assert check(v_parameterization=True) == Report()


def test_a_state_may_lie_in_the_home_folder(kohya, monkeypatch):
    monkeypatch.setenv("USERPROFILE" if os.name == "nt" else "HOME", str(kohya))
    assert check(resume="~/state") == Report()


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"current_step": null}'])
def test_a_state_that_does_not_say_its_step_passes(text):
    put("state/train_state.json", text)
    assert check(resume="state") == Report()


# ---- The prompts of samples ----------------------------------------------------------------------


@pytest.mark.parametrize("given", SAMPLES)
def test_prompts_that_are_missing_are_a_warning_as_sd_scripts_goes_on(given):
    sentence = 'no prompts at "gone.md", so no samples will be drawn: correct --sample_prompts'
    assert check(**given, sample_prompts="gone.md") == Report(warnings=[sentence])


def test_the_sample_prompts_pass_and_are_three():
    prompts = read_prompts(ROOT / "blora_prompts.txt")
    assert [prompt.split(" --")[0] for prompt in prompts] == [
        r"A \[v\] on a beach",
        r"A lighthouse in \[v\] style",
        "A lighthouse",
    ]


@pytest.mark.parametrize(
    ("ending", "text", "why"),
    [
        ("toml", "", "KeyError: 'prompt')"),
        ("toml", "prompt = 1", "TypeError: "),
        ("toml", "[prompt]", "KeyError: 'subset')"),
        ("toml", FILES["prompts.toml"] + "width = 64", "TypeError: "),
        ("toml", "a dog", "TomlDecodeError: "),
        ("json", '{"prompt": "a dog"}', "TypeError: it is not a list of texts and tables)"),
        ("json", '"a dog"', "TypeError: it is not a list of texts and tables)"),
        ("json", "[1]", "TypeError: it is not a list of texts and tables)"),
        ("json", "a dog", "JSONDecodeError: Expecting value: line 1 column 1 (char 0))"),
        ("json", "[" * 100_000, "RecursionError: "),
        ("txt", "a café", "UnicodeDecodeError: "),
        ("md", "a dog", "ValueError: its name ends in none of .txt, .toml, .json)"),
        ("TXT", "a dog", "ValueError: its name ends in none of .txt, .toml, .json)"),
    ],
)
def test_prompts_that_sd_scripts_cannot_read_are_an_error(ending, text, why):
    path = Path(f"p.{ending}")
    path.write_bytes(text.encode("cp1252"))
    [error] = check(sample_at_first=True, sample_prompts=path).errors
    assert error.startswith(
        f'sd-scripts cannot read the prompts in "{path}", which ends the training at the first '
        f"sample: write them as in blora_prompts.txt ({why}"
    )


NONE_GIVEN = 'no prompt in "{}", so no samples will be drawn: add one'
COMMENT = (
    'a comment in "{}" will be drawn as a prompt: # has to be the first character of the line, '
    "without a space or a byte order mark before it"
)


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("p.txt", "# a comment\n\n", NONE_GIVEN),
        *(("p.json", empty, NONE_GIVEN) for empty in ("[]", "{}", '""')),
        *(("p.txt", f"{start}# a comment\na dog", COMMENT) for start in (" ", "\t", "\ufeff")),
    ],
)
def test_prompts_that_are_none_or_drawn_otherwise_are_a_warning(name, text, sentence):
    put(name, text)
    report = check(sample_at_first=True, sample_prompts=name)
    assert report == Report(warnings=[sentence.format(name)])


# ---- The dataset config --------------------------------------------------------------------------


def subsets_of(*folders: str, **more: str) -> list[dict[str, str]]:
    """A config's subsets, one for each folder and one for what else is given."""
    subsets = [{"image_dir": folder} for folder in folders] + ([more] if more else [])
    return config_subsets(
        {"general": {"shuffle_caption": True}, "datasets": [{"subsets": subsets}]}
    )


@pytest.mark.parametrize(
    ("subsets", "missing", "missed"),
    [
        (subsets_of("gone", FILE, "gone"), ["gone", FILE], []),
        (subsets_of("gone", "folder"), [], ["gone"]),
        (subsets_of("gone", metadata_file="meta.json"), [], ["gone"]),
        (subsets_of("folder"), [], []),
    ],
)
def test_missing_folders_are_errors_unless_there_are_others(subsets, missing, missed):
    report = Report()
    check_missing(subsets, Path(CONFIG), report)
    sentence = f'no folder of images at "{{}}": correct image_dir in "{CONFIG}"'
    assert report.errors == [sentence.format(folder) for folder in missing]
    assert report.warnings == [sentence.format(folder) for folder in missed]


PROJECT, OTHER = "_in/lora/sdxl/hero/images", "_in/lora/sdxl/villain/images"
DETOUR = f"{PROJECT}/../../../../../{OTHER}"


@pytest.mark.parametrize(
    ("folders", "other"),
    [
        ([OTHER], OTHER),
        ([DETOUR], DETOUR),
        ([f"{OTHER}/.."], f"{OTHER}/.."),
        ([OTHER, PROJECT], None),
        # Shared ones beside the projects, above them, elsewhere, and by a link.
        (["_in/lora/sdxl/shared"], None),
        (["_in/lora/shared"], None),
        (["shared"], None),
        pytest.param(["_in/lora/sdxl/hero/link"], None, marks=POSIX),
    ],
)
def test_pictures_of_another_project_alone_are_noticed(kohya, folders, other):
    put("_in/lora/sdxl/villain/config.toml")
    Path(OTHER).mkdir()
    if "link" in folders[0]:
        Path("_in/lora/sdxl/hero/link").symlink_to(kohya / OTHER)
    assert other_project(image_folders(subsets_of(*folders)), Path(CONFIG)) == other
    in_full = [str(Path(folder).absolute()) for folder in folders]
    assert bool(other_project(in_full, Path(CONFIG))) == bool(other)


# ---- The output ----------------------------------------------------------------------------------


def test_the_nearest_folder_of_those_to_be_made_is_named_in_full(kohya):
    sentence = NO_FOLDER.format(kohya / FILE, "output_dir")
    assert check(output_dir=f"{FILE}/a/b").errors == [sentence]


@POSIX
def test_a_link_to_nothing_where_a_folder_is_to_be_is_an_error():
    Path("link").symlink_to("gone")
    assert check(output_dir="link").errors == [NO_FOLDER.format("link", "output_dir")]


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root may do anything, so the process is nobody for a while."""
    is_root = os.getuid() == 0
    if is_root:
        os.setreuid(65534, 0)
        os.seteuid(65534)
    yield
    if is_root:
        os.seteuid(0)
        os.setreuid(0, 0)


@POSIX
@pytest.mark.parametrize(
    ("mode", "output"),
    [(0o555, "closed"), (0o000, "closed"), (0o666, "closed/a"), (0o000, "closed/a/b")],
)
def test_a_folder_that_may_not_be_written_to_is_an_error(kohya, mode, output):
    kohya.chmod(0o755)
    Path("closed").mkdir()
    Path("closed").chmod(mode)
    report = Report()
    with as_nobody():  # by a relative path, as nobody may not enter the folders above
        check_folder(output, "output_dir", report)
    Path("closed").chmod(0o755)
    shown = output if output == "closed" else kohya / "closed"
    assert report.errors == [
        f'no permission to write to "{shown}": correct --output_dir, or the permissions'
    ]


def test_no_folder_is_made():
    before = sorted(Path().rglob("*"))
    check(output_dir="new/a", logging_dir="logs")
    assert sorted(Path().rglob("*")) == before


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
    assert check(**given) == Report()


@POSIX
@pytest.mark.parametrize(
    ("name", "shown"),
    [("x" * 231, "x" * 231), ("ä" * 116, "ä" * 116), ("x" * 300, "x" * 20 + "...")],
    ids=["letters", "bytes", "far too long"],
)
def test_a_name_that_is_too_long_for_its_saves_is_an_error(name, shown):
    [error] = check(output_name=name).errors
    assert error == f'--output_name "{shown}" is too long for a file: {BLORA_NAME}'


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("a:b", "with : in its name"),
        ("what?", "with ? in its name"),
        ('say "hi"', 'with " in its name'),
        pytest.param("a\\b", "with \\ in its name", marks=POSIX),  # a path on Windows
        ("a<b>|*", "with * < > | in its name"),
        ("a\nb", "with \n in its name"),
        ("CON", "of this name"),
        ("nul.1", "of this name"),
        ("com1 ", "of this name"),
    ],
)
def test_a_name_that_windows_refuses_is_an_error_there_and_a_warning_elsewhere(name, why):
    sentence = f'--output_name "{name}": Windows cannot save a file {why}: {BLORA_NAME}'
    kind = "errors" if os.name == "nt" else "warnings"
    assert check(output_name=name) == Report(**{kind: [sentence]})


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({}, "hero_1.safetensors"),
        ({"output_name": None}, "last.safetensors"),
        ({"save_model_as": "ckpt"}, "hero_1.ckpt"),
        ({"output_name": "hero_2"}, None),
        ({"save_model_as": "pt"}, None),
    ],
)
def test_an_earlier_lora_that_will_be_written_over_is_a_warning(given, name):
    for earlier in ("hero_1.safetensors", "last.safetensors", "hero_1.ckpt"):
        put(f"_out/hero_1/{earlier}")
    sentence = (
        f'"{Path("_out/hero_1", str(name))}" exists and will be overwritten: give another '
        "--output_name (BLORA_REVISION in the launcher), or move it away"
    )
    assert check(**given) == Report(warnings=[sentence] if name else [])
