"""Files, folders, prompts and numbers that options name, as sd-scripts' own parser reads them."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote, split
from unittest.mock import ANY

import pytest
from kohya_folder import ROOT
from sdxl_checkpoint import Shapes, sdxl_shapes, write_checkpoint
from sdxl_train_network_options import build_parser

from blora.preflight.files import check_files, check_folder, read_prompts
from blora.preflight.folders import check_missing, other_project
from blora.preflight.report import Report

PARSER = build_parser()
BASE = "--pretrained_model_name_or_path"
UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXT_1, TEXT_2 = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
SDXL = sdxl_shapes()
# The tensors by which pre-flight knows SDXL: enough for it, and quickly read.
KNOWN = dict.fromkeys((f"{UNET}label_emb.0.0.weight", f"{TEXT_2}ln_final.weight", f"{VAE}a"), (1,))
CONFIG = "_in/lora/sdxl/hero/config.toml"
LINE = (
    f"{BASE}=a.safetensors --dataset_config={CONFIG} --output_dir=_out/hero_1 --output_name=hero_1"
)
FILES = {
    "file": "",
    CONFIG: "",
    "folder/inside": "",
    "state/optimizer.bin": "",
    "at_1600/train_state.json": '{"current_epoch": 9, "current_step": 1600}',
    "at_3000/train_state.json": '{"current_epoch": 9, "current_step": 3000}',
    "prompts.txt": "# a comment\n\na dog # 1\n",
    "prompts.toml": '[prompt]\nwidth = 512\n[[prompt.subset]]\nprompt = "a dog"\n',
    "prompts.json": '["a dog", {"prompt": "a cat", "width": 512}]',
}
NO_CHECKPOINT = f'no checkpoint at "{{}}": correct {BASE} (BLORA_CHECKPOINT in the launcher)'
NO_CONFIG = 'no dataset config at "a.toml": copy blora_dataset.toml there, or correct the path'
NO_IMAGES = 'no folder of images at "gone": correct --train_data_dir'
NO_PROMPTS = "sampling is on, but no prompts are given: add --sample_prompts"
NO_FOLDER = '"{}" is not a folder, so nothing can be saved there: correct --{}'
NOWHERE = "there is no folder to save to: add --output_dir"
NO_STEPS = (
    'the state in "at_{0}" is of step {0}, and --max_train_steps=1600 counts from the beginning: '
    "raise it"
)
NOT_SET = (
    f"no checkpoint is set yet: give your SDXL checkpoint as {BASE} (BLORA_CHECKPOINT in the "
    "launcher)"
)
ZERO = "--{0}_every_n_{1}s=0 ends the training after its first {1}: remove it"
ONE_OF_EACH_CHECK = [
    (NO_CHECKPOINT.format("gone.safetensors"), f"{BASE}=gone.safetensors"),
    ('no network weights at "b": correct --base_weights', "--base_weights file b"),
    ('no VAE at "a/vae.pt": correct --vae', "--vae=a/vae.pt"),
    ('no saved state in "a": correct --resume', "--resume=a"),
    (NO_PROMPTS, "--sample_at_first"),
    (NO_FOLDER.format("file", "output_dir"), "--output_dir=file"),
    (ZERO.format("save", "step"), "--save_every_n_steps=0"),
    ("there are no images: give --dataset_config", "--dataset_config="),
]
POSIX = pytest.mark.skipif(os.name == "nt", reason="Windows has other rules of names and rights")


@pytest.fixture(autouse=True)
def kohya(tmp_path, monkeypatch) -> Path:
    """A folder in which a training could begin; it is the working directory."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint(Path("a.safetensors"), KNOWN)
    Path("empty").mkdir()
    for path, text in FILES.items():
        put(path, text)
    return tmp_path


def put(path: str, text: str = "") -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8")


def check(line: str = "") -> Report:
    """The report on LINE with other options behind it; an empty --dataset_config is none."""
    args = PARSER.parse_args(split(f"{LINE} {line}"))
    args.dataset_config = None if args.dataset_config == Path() else args.dataset_config
    report = Report()
    check_files(args, report)
    return report


@pytest.mark.parametrize(
    ("sentence", "line"),
    [
        *ONE_OF_EACH_CHECK,
        (NOT_SET, "--pretrained_model_name_or_path="),
        (NOT_SET, "--pretrained_model_name_or_path=path/to/sd_xl_base_1.0.safetensors"),
        ('no tracker config at "a": correct --log_tracker_config', "--log_tracker_config=a"),
        ('no VAE at "a/b/c": correct --vae', "--vae=a/b/c"),  # a name of the hub has one slash
        ('no saved state in "file": correct --resume', "--resume=file"),
        ('no saved state in "empty": correct --resume', "--resume=empty"),
        (NO_STEPS.format(1600), "--resume=at_1600"),
        (NO_STEPS.format(3000), "--resume=at_3000"),
        (NO_PROMPTS, "--sample_every_n_steps=100"),
        (NO_PROMPTS, "--sample_every_n_epochs=1"),
        (NO_FOLDER.format("file", "logging_dir"), "--logging_dir=file"),
        (NOWHERE, "--output_dir="),
        (ZERO.format("save", "step"), "--save_every_n_steps=-0"),
        (ZERO.format("save", "epoch"), "--save_every_n_epochs=0"),
        (ZERO.format("validate", "step"), "--validate_every_n_steps=0"),
        (ZERO.format("validate", "epoch"), "--validate_every_n_epochs=0"),
        (NO_CONFIG, "--dataset_config=a.toml"),
        (NO_IMAGES, "--dataset_config= --train_data_dir=gone"),
    ],
)
def test_what_would_end_a_training_is_an_error(sentence, line):
    assert check(line) == Report([sentence], plan=ANY)


def test_all_errors_come_at_once():
    lines = " ".join(line for _, line in ONE_OF_EACH_CHECK)
    assert check(lines).errors == [sentence for sentence, _ in ONE_OF_EACH_CHECK]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--output_dir=new/a --logging_dir=logs",
        "--base_weights file folder/inside",
        "--log_tracker_config=file",
        "--vae=file",
        "--vae=folder",
        "--vae=stabilityai/sdxl-vae",
        "--vae=",
        "--dataset_class=own.Dataset --dataset_config=gone.toml",
        "--train_data_dir=gone",
        "--dataset_config= --in_json=meta.json --train_data_dir=gone",
        "--dataset_config= --train_data_dir=folder",
        # States: with steps left, or nobody knows how many.
        "--resume=state",
        "--resume=me/model/state --resume_from_huggingface",
        "--resume=at_3000 --max_train_steps=3001",
        "--resume=at_3000 --max_train_epochs=1",
        "--resume=at_3000 --initial_step=1",
        "--resume=at_3000 --initial_epoch=1",
        # Prompts: those that sd-scripts reads, and those that it never reads.
        "--sample_prompts=prompts.txt --sample_at_first",
        "--sample_prompts=prompts.toml --sample_every_n_steps=100",
        "--sample_prompts=prompts.json --sample_every_n_epochs=1",
        "--sample_prompts=gone.md",
        "--sample_prompts=gone.md --sample_every_n_steps=0 --sample_every_n_epochs=0",
        # Numbers that sd-scripts can do with, or refuses itself.
        "--save_every_n_steps=-1",
        "--save_every_n_epochs=0 --save_n_epoch_ratio=2",
        # Names.
        "--output_name='hero 1'",
        *(f"--output_name={name}" for name in ("ヒーロー", "v1.5", "console", "com10", "a.con")),
        f"--output_name={'x' * 230}",
    ],
    ids=str,
)
def test_what_is_there_or_not_looked_for_here_passes_without_a_word(line):
    before = sorted(Path().rglob("*"))
    assert check(line) == Report(plan=ANY)
    assert sorted(Path().rglob("*")) == before  # no folder is made


def test_a_name_that_is_too_long_for_a_file_is_an_error_and_no_traceback():
    [error] = check(f"{BASE}={'x' * 300}.safetensors").errors
    assert error.startswith("cannot read a file or folder (")
    assert error.endswith("): correct its path or its permissions")


def test_an_option_that_a_release_does_not_have_is_a_warning_and_the_other_checks_go_on():
    args = PARSER.parse_args(["--vae=gone.pt", "--save_every_n_steps=0"])
    del args.log_tracker_config
    report = Report()
    check_files(args, report)
    assert {'no VAE at "gone.pt": correct --vae', ZERO.format("save", "step")} < {*report.errors}
    [warning] = report.warnings
    assert warning.startswith("could not check all options (AttributeError: 'Namespace' object has")


def test_a_state_may_lie_in_the_home_folder(kohya, monkeypatch):
    monkeypatch.setenv("USERPROFILE" if os.name == "nt" else "HOME", str(kohya))
    assert check("--resume=~/state") == Report(plan=ANY)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"current_step": null}'])
def test_a_state_that_does_not_say_its_step_passes(text):
    put("state/train_state.json", text)
    assert check("--resume=state") == Report(plan=ANY)


# ---- The checkpoint ------------------------------------------------------------------------------

CONV_IN = f"{UNET}input_blocks.0.0.weight"
DISTILLED = r"\.transformer_blocks\.[4-9]\.|middle_block\.[12]\."
NO_VAE = (
    '"{}" has no VAE, and sd-scripts loads no checkpoint without one, not even with --vae: give '
    "one that has it"
)
OTHER_UNET = (
    '"b.safetensors" is {}, whose U-Net takes {} channels, not SDXL\'s 4: give a checkpoint of '
    "SDXL itself"
)
FEW_BLOCKS = (
    '"b.safetensors" is a distilled model, as SSD-1B and Segmind Vega are: its U-Net has 30 of '
    "SDXL's 70 transformer blocks: give a checkpoint of SDXL itself"
)
OTHER_MODEL = '"b.safetensors" is {}, not an SDXL checkpoint: give the one to train on'
OTHER_MODELS = {
    "lora_unet_out_2.alpha": "a LoRA",
    "unet.conv_in.lora_A.weight": "a LoRA",
    "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": "a LoRA",
    "base_model.model.conv_in.lora_A.weight": "a LoRA",
    "conditioner.embedders.0.model.ln_final.weight": "an SDXL refiner",
    "cond_stage_model.transformer.text_model.final_layer_norm.weight": "an SD 1.x checkpoint",
    "cond_stage_model.model.ln_final.weight": "an SD 2.x checkpoint",
    "double_blocks.0.img_attn.qkv.weight": "a Flux checkpoint",
    f"{UNET}double_blocks.0.img_attn.qkv.weight": "a Flux checkpoint",
    "joint_blocks.0.x_block.attn.qkv.weight": "an SD3 checkpoint",
    f"{UNET}joint_blocks.0.x_block.attn.qkv.weight": "an SD3 checkpoint",
    "down_blocks.0.resnets.0.conv1.weight": "a diffusers U-Net",
    "decoder.conv_in.weight": "a VAE",
    "encoder.conv_in.weight": "a VAE",
    "anything": "something else",
}
NOT_WHOLE = (
    "b.safetensors is not a whole safetensors file ({}): download it again, or save it as "
    "safetensors"
)
ON_THE_HUB = '"{}" is not a file here, so it is taken for a model of the Hugging Face hub'
NO_MODEL = (
    '"old.ckpt" is neither a safetensors file nor a torch file: download it again, or give another'
)
NOT_CHECKED = '"old.ckpt" is not a .safetensors file, so it was not checked'
BY_ITS_NAME = (
    '"{}" is a safetensors file, which sd-scripts recognizes by its name alone: give one whose '
    "name ends in .safetensors"
)
NO_INDEX = (
    '"model" is a folder without a model_index.json, so it is not a diffusers model: give the '
    ".safetensors file itself"
)
IS_DIFFUSERS = '"model" is a folder, taken for a diffusers model and not checked'
ELSEWHERE = (
    '"models/x.safetensors" is a link to "real.safetensors", which sd-scripts looks for in the '
    'working folder: give "{}/models/real.safetensors" itself'
)


def of_shapes(shapes: Shapes) -> Report:
    write_checkpoint(Path("b.safetensors"), shapes)
    return check(f"{BASE}=b.safetensors")


def without(*starts: str) -> Shapes:
    return {name: shape for name, shape in SDXL.items() if not name.startswith(starts)}


LEFT_TO_THE_LOADER = {
    "nothing missing or more": SDXL,
    "one tensor too few": without(f"{UNET}out.2.bias"),
    "one of another shape": SDXL | {f"{UNET}middle_block.1.proj_in.weight": (1280, 1280, 1, 1)},
    "more than SDXL has": SDXL | {f"{TEXT_2}attn_mask": (77, 77), "model_ema.decay": ()},
    "no first text encoder": without(TEXT_1),
    "half a VAE": without(f"{VAE}encoder"),
}


@pytest.mark.parametrize("which", LEFT_TO_THE_LOADER)
def test_what_is_missing_or_more_is_left_to_the_trainers_loader(which):
    assert of_shapes(LEFT_TO_THE_LOADER[which]) == Report(plan=ANY)


def test_a_v_prediction_model_without_its_option_is_a_warning():
    plan = {"base": "b.safetensors (SDXL, 6.94 GB)"}
    words = '"b.safetensors" is a v-prediction model: add --v_parameterization --zero_terminal_snr'
    assert of_shapes(SDXL | {"v_pred": ()}) == Report(warnings=[words], plan=plan)
    assert check(f"{BASE}=b.safetensors --v_parameterization") == Report(plan=plan)


@pytest.mark.parametrize(
    ("shapes", "sentence"),
    [
        (without(VAE), NO_VAE.format("b.safetensors")),
        (SDXL | {CONV_IN: (320, 9, 3, 3)}, OTHER_UNET.format("an inpainting model", 9)),
        (SDXL | {CONV_IN: (320, 8, 3, 3)}, OTHER_UNET.format("a model of its own", 8)),
        ({n: shape for n, shape in SDXL.items() if not re.search(DISTILLED, n)}, FEW_BLOCKS),
        *(({key: (1,)}, OTHER_MODEL.format(kind)) for key, kind in OTHER_MODELS.items()),
    ],
)
def test_a_model_that_sd_scripts_cannot_train_is_named_in_the_error(shapes, sentence):
    assert of_shapes(shapes) == Report(errors=[sentence], plan={"base": "b.safetensors"})


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (struct.pack("<Q", 99) + b"{", "it ends before its header does"),
        (struct.pack("<Q", 4) + b"nope", "Expecting value: line 1 column 1 (char 0)"),
        (b"", "it ends before its header does"),
        (struct.pack("<Q", 2) + b"{}more", "it is 4 bytes longer than its header says"),
    ],
)
def test_a_file_that_is_not_whole_is_an_error(content, sentence):
    Path("b.safetensors").write_bytes(content)
    assert check(f"{BASE}=b.safetensors").errors == [NOT_WHOLE.format(sentence)]


@pytest.mark.parametrize(
    ("name", "files", "kind", "sentence"),
    [
        ("models/sdxl.safetensors", {}, "errors", NO_CHECKPOINT),
        ("a/b/c", {}, "errors", NO_CHECKPOINT),
        ("stabilityai/stable-diffusion-xl-base-1.0", {}, "notes", ON_THE_HUB),
        ("me/model", {}, "notes", ON_THE_HUB),
        ("model", {"model/a": b""}, "errors", NO_INDEX),
        ("model", {"model/model_index.json": b""}, "notes", IS_DIFFUSERS),
        ("old.ckpt", {"old.ckpt": b"PK\3\4 and so on"}, "notes", NOT_CHECKED),
        ("old.ckpt", {"old.ckpt": b"\x80\2}q\0."}, "notes", NOT_CHECKED),
        ("old.ckpt", {"old.ckpt": b""}, "errors", NO_MODEL),
        ("old.ckpt", {"old.ckpt": b"<html></html>"}, "errors", NO_MODEL),
        ("base.ckpt", {"base.ckpt": struct.pack("<Q", 2) + b"{}"}, "errors", BY_ITS_NAME),
    ],
)
def test_a_name_that_is_no_safetensors_file_is_told_by_what_is_there(name, files, kind, sentence):
    for path, content in files.items():
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_bytes(content)
    report = Report(**{kind: [sentence.format(name)]}, plan={"base": name})
    assert check(f"{BASE}={quote(name)}") == report


@pytest.mark.parametrize(
    ("link", "target", "sentence"),
    [
        ("models/x.safetensors", "{}/b.safetensors", None),
        ("x.safetensors", "B.SAFETENSORS", None),  # the same ending
        ("x.safetensors", "gone.safetensors", NO_CHECKPOINT.format("x.safetensors")),
        # As the hub's cache has its files: under a hash.
        ("models/x.safetensors", "{}/31e35c80", BY_ITS_NAME.format("{}/31e35c80")),
        # A relative one is looked for in the working folder.
        ("models/x.safetensors", "real.safetensors", ELSEWHERE),
        ("models/x.safetensors", "novae.safetensors", NO_VAE.format("novae.safetensors")),
    ],
)
def test_a_link_is_followed_as_sd_scripts_follows_it(kohya, link, target, sentence):
    Path("models").mkdir()
    for name in ("b.safetensors", "B.SAFETENSORS", "31e35c80", "models/real.safetensors"):
        write_checkpoint(Path(name), SDXL)
    Path("models/novae.safetensors").touch()
    write_checkpoint(Path("novae.safetensors"), without(VAE))
    Path(link).symlink_to(target.format(kohya))
    errors = [sentence.format(kohya)] if sentence else []
    base = link if sentence else f"{link} (SDXL, 6.94 GB)"
    assert check(f"{BASE}={quote(link)}") == Report(errors, plan={"base": base})


# ---- The prompts of samples ----------------------------------------------------------------------

NO_FILE = 'no prompts at "{}", so no samples will be drawn: correct --sample_prompts'
NONE_GIVEN = 'no prompt in "{}", so no samples will be drawn: add one'
COMMENT = (
    'a comment in "{}" will be drawn as a prompt: # has to be the first character of the line, '
    "without a space or a byte order mark before it"
)


def test_the_sample_prompts_pass_and_are_three():
    starts = [prompt.split(" --")[0] for prompt in read_prompts(ROOT / "blora_prompts.txt")]
    assert starts == [r"A \[v\] on a beach", r"A lighthouse in \[v\] style", "A lighthouse"]


@pytest.mark.parametrize(
    ("ending", "text", "why"),
    [
        ("toml", "", "KeyError: 'prompt')"),
        ("toml", "prompt = 1", "TypeError: "),
        ("toml", "[prompt]", "KeyError: 'subset')"),
        ("toml", FILES["prompts.toml"] + "width = 64", "TypeError: "),
        ("toml", "a dog", "TomlDecodeError: "),
        ("json", '{"prompt": "a dog"}', "TypeError: it is not a list of texts and tables)"),
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
    [error] = check(f"--sample_at_first --sample_prompts={path}").errors
    assert error.startswith(
        f'sd-scripts cannot read the prompts in "{path}", which ends the training at the first '
        f"sample: write them as in blora_prompts.txt ({why}"
    )
    assert error.endswith(")")


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("gone.md", None, NO_FILE),  # with which sd-scripts goes on
        ("p.txt", "# a comment\n\n", NONE_GIVEN),
        *(("p.json", empty, NONE_GIVEN) for empty in ("[]", "{}", '""')),
        *(("p.txt", f"{start}# a comment\na dog", COMMENT) for start in (" ", "\t", "\ufeff")),
    ],
)
def test_prompts_that_are_none_or_drawn_otherwise_are_a_warning(name, text, sentence):
    if text is not None:
        put(name, text)
    report = check(f"--sample_at_first --sample_prompts={name}")
    assert report == Report(warnings=[sentence.format(name)], plan=ANY)


# ---- The dataset config --------------------------------------------------------------------------

PROJECT, OTHER = "_in/lora/sdxl/hero/images", "_in/lora/sdxl/villain/images"
GONE, FILE, FOLDER = ({"image_dir": name} for name in ("gone", "file", "folder"))
DETOUR = f"{PROJECT}/../../../../../{OTHER}"


@pytest.mark.parametrize(
    ("subsets", "missing", "missed"),
    [
        ([GONE, FILE, GONE], ["gone", "file"], []),
        ([GONE, FOLDER], [], ["gone"]),
        ([GONE, {"metadata_file": "meta.json"}], [], ["gone"]),
        ([FOLDER], [], []),
    ],
)
def test_missing_folders_are_errors_unless_there_are_others(subsets, missing, missed):
    report = Report()
    check_missing(subsets, Path(CONFIG), report)
    sentence = f'no folder of images at "{{}}": correct image_dir in "{CONFIG}"'
    assert report.errors == [sentence.format(folder) for folder in missing]
    assert report.warnings == [sentence.format(folder) for folder in missed]


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
    assert other_project(folders, Path(CONFIG)) == other
    in_full = [str(Path(folder).absolute()) for folder in folders]
    assert bool(other_project(in_full, Path(CONFIG))) == bool(other)


# ---- The output ----------------------------------------------------------------------------------

NO_RIGHT = 'no permission to write to "{}": correct --output_dir, or the permissions'
BLORA_NAME = "correct --output_name (BLORA_NAME in the launcher)"


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
    ("mode", "output", "sentence", "shown"),
    [
        (0o755, "file/a/b", NO_FOLDER, "{}/file"),
        (0o755, "link", NO_FOLDER, "link"),
        (0o555, "closed", NO_RIGHT, "closed"),
        (0o000, "closed", NO_RIGHT, "closed"),
        (0o666, "closed/a", NO_RIGHT, "{}/closed"),
        (0o000, "closed/a/b", NO_RIGHT, "{}/closed"),
    ],
)
def test_a_folder_that_cannot_be_written_to_is_an_error(kohya, mode, output, sentence, shown):
    kohya.chmod(0o755)
    Path("link").symlink_to("gone")
    Path("closed").mkdir()
    Path("closed").chmod(mode)
    report = Report()
    with as_nobody():  # by a relative path, as nobody may not enter the folders above
        check_folder(output, "output_dir", report)
    Path("closed").chmod(0o755)
    assert report.errors == [sentence.format(shown.format(kohya), "output_dir")]


def test_a_name_that_is_a_path_is_an_error():
    """As BLORA_NAME=chars/hero gives it."""
    line = "--output_dir=_out/chars/hero_1 --output_name=chars/hero_1"
    folder = Path("_out/chars/hero_1/chars")
    assert check(line).errors == [
        f'--output_name "chars/hero_1" is a path, and the folder "{folder}" does not exist: '
        f"{BLORA_NAME}"
    ]
    folder.mkdir(parents=True)
    assert check(line) == Report(plan=ANY)


@POSIX
@pytest.mark.parametrize(
    ("name", "shown"),
    [("x" * 231, "x" * 231), ("ä" * 116, "ä" * 116), ("x" * 255, "x" * 20 + "...")],
)
def test_a_name_that_is_too_long_for_its_saves_is_an_error(name, shown):
    [error] = check(f"--output_name={quote(name)}").errors
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
    assert check(f"--output_name={quote(name)}") == Report(**{kind: [sentence]}, plan=ANY)


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("", "hero_1.safetensors"),
        ("--output_name=", "last.safetensors"),
        ("--save_model_as=ckpt", "hero_1.ckpt"),
        ("--output_name=hero_2", None),
        ("--save_model_as=pt", None),
    ],
)
def test_an_earlier_lora_that_will_be_written_over_is_a_warning(line, name):
    for earlier in ("hero_1.safetensors", "last.safetensors", "hero_1.ckpt"):
        put(f"_out/hero_1/{earlier}")
    sentence = (
        f'"{Path("_out/hero_1", str(name))}" exists and will be overwritten: give another '
        "--output_name (BLORA_REVISION in the launcher), or move it away"
    )
    assert check(line) == Report(warnings=[sentence] if name else [], plan=ANY)
