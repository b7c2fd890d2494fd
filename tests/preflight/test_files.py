"""Files, folders, prompts and numbers that options name, as sd-scripts' own parser reads them."""

from __future__ import annotations

import os
import re
import struct
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote, split
from unittest.mock import ANY

import pytest
from kohya_folder import ROOT
from reports import reported
from sdxl_checkpoint import Shapes, sdxl_shapes, write_checkpoint
from sdxl_train_network_options import build_parser

from blora.preflight.checkpoint import explain_model
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
    "prompts.txt": "# a comment\n\na dog # 1\n",
    "prompts.toml": '[prompt]\nwidth = 512\n[[prompt.subset]]\nprompt = "a dog"\n',
    "prompts.json": '["a dog", {"prompt": "a cat", "width": 512}]',
}
NO_CHECKPOINT = f'no checkpoint at "{{}}": correct {BASE} (BLORA_CHECKPOINT in the launcher)'
NO_PROMPTS = "sampling is on, but no prompts are given: add --sample_prompts"
NO_FOLDER = '"{}" is not a folder, so nothing can be saved there: correct --{}'
NOT_SET = (
    f"no checkpoint is set yet: give your SDXL checkpoint as {BASE} (BLORA_CHECKPOINT in the "
    "launcher)"
)
ONE_OF_EACH_CHECK = {
    f"{BASE}=gone.safetensors": NO_CHECKPOINT.format("gone.safetensors"),
    "--base_weights file b": 'no network weights at "b": correct --base_weights',
    "--vae=a/vae.pt": 'no VAE at "a/vae.pt": correct --vae',
    "--sample_at_first": NO_PROMPTS,
    "--output_dir=file": NO_FOLDER.format("file", "output_dir"),
    "--dataset_config=": "there are no images: give --dataset_config",
}
ERRORS = {
    **ONE_OF_EACH_CHECK,
    **dict.fromkeys([f"{BASE}=", f"{BASE}=path/to/sd_xl_base_1.0.safetensors"], NOT_SET),
    "--log_tracker_config=a": 'no tracker config at "a": correct --log_tracker_config',
    "--vae=a/b/c": 'no VAE at "a/b/c": correct --vae',  # a name of the hub has one slash
    **{f"--sample_every_n_{unit}s=1": NO_PROMPTS for unit in ("step", "epoch")},
    "--logging_dir=file": NO_FOLDER.format("file", "logging_dir"),
    "--output_dir=": "there is no folder to save to: add --output_dir",
    "--dataset_config=a.toml": 'no dataset config at "a.toml": copy blora_dataset.toml there, or '
    "correct the path",
    "--dataset_config= --train_data_dir=gone": 'no folder of images at "gone": correct '
    "--train_data_dir",
}
POSIX = pytest.mark.skipif(os.name == "nt", reason="Windows has other rules of names and rights")


@pytest.fixture(autouse=True)
def kohya(tmp_path, monkeypatch) -> Path:
    """A folder in which a training could begin; it is the working directory."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint(Path("a.safetensors"), KNOWN)
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
    return reported(check_files, args)


@pytest.mark.parametrize("line", ERRORS)
def test_what_would_end_a_training_is_an_error(line):
    assert check(line) == Report([ERRORS[line]], plan=ANY)


def test_all_errors_come_at_once():
    assert check(" ".join(ONE_OF_EACH_CHECK)).errors == [*ONE_OF_EACH_CHECK.values()]


def test_what_is_there_or_not_looked_for_here_passes_without_a_word():
    before = sorted(Path().rglob("*"))
    for line in (
        "",
        "--output_dir=new/a --logging_dir=logs --vae=file --log_tracker_config=file",
        "--vae=folder --base_weights file folder/inside",
        "--vae=stabilityai/sdxl-vae --dataset_class=own.Dataset --dataset_config=gone.toml",
        "--vae= --train_data_dir=gone",
        "--dataset_config= --in_json=meta.json --train_data_dir=gone",
        "--dataset_config= --train_data_dir=folder",
        # Prompts: those that sd-scripts reads, and those that it never reads.
        "--sample_prompts=prompts.txt --sample_at_first",
        "--sample_prompts=prompts.toml --sample_every_n_steps=100",
        "--sample_prompts=prompts.json --sample_every_n_epochs=1",
        "--sample_prompts=gone.md --sample_every_n_steps=0 --sample_every_n_epochs=0",
        # Names.
        *(f"--output_name='{name}'" for name in ("hero 1", "ヒーロー", "v1.5", "com10", "a.con")),
        f"--output_name={'x' * 230}",
    ):
        assert check(line) == Report(plan=ANY), line
    assert sorted(Path().rglob("*")) == before  # no folder is made


def test_a_name_that_is_too_long_for_a_file_is_an_error_and_no_traceback():
    [error] = check(f"{BASE}={'x' * 300}.safetensors").errors
    assert error.startswith("cannot read a file or folder (")
    assert error.endswith("): correct its path or its permissions")


def test_an_option_that_a_release_does_not_have_is_a_warning_and_the_other_checks_go_on():
    args = PARSER.parse_args(["--vae=gone.pt", "--sample_at_first"])
    del args.log_tracker_config
    report = reported(check_files, args)
    assert {'no VAE at "gone.pt": correct --vae', NO_PROMPTS} < {*report.errors}
    [warning] = report.warnings
    assert warning.startswith("could not check all options (AttributeError: 'Namespace' object has")


# ---- The checkpoint ------------------------------------------------------------------------------

CONV_IN = f"{UNET}input_blocks.0.0.weight"
DISTILLED = r"\.transformer_blocks\.[4-9]\.|middle_block\.[12]\."
NO_VAE = (
    '"{}" has no VAE, and sd-scripts loads no checkpoint without one, not even with --vae: give '
    "one that has it"
)
OTHER_MODELS = {
    "a LoRA": "lora_unet_out_2.alpha unet.conv_in.lora_A.weight base_model.model.out.lora_A.weight "
    "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
    "an SDXL refiner": "conditioner.embedders.0.model.ln_final.weight",
    "an SD 1.x checkpoint": "cond_stage_model.transformer.text_model.final_layer_norm.weight",
    "an SD 2.x checkpoint": "cond_stage_model.model.ln_final.weight",
    "a Flux checkpoint": f"double_blocks.0.img_attn.qkv.weight {UNET}double_blocks.0.img_mod.lin",
    "an SD3 checkpoint": f"joint_blocks.0.x_block.attn.qkv.weight {UNET}joint_blocks.0.x_block.mlp",
    "a diffusers U-Net": "down_blocks.0.resnets.0.conv1.weight",
    "a VAE": "decoder.conv_in.weight encoder.conv_in.weight",
    "something else": "anything",
}
BY_ITS_NAME = (
    '"{}" is a safetensors file, which sd-scripts recognizes by its name alone: give one whose '
    "name ends in .safetensors"
)


def of_shapes(shapes: Shapes) -> Report:
    write_checkpoint(Path("b.safetensors"), shapes)
    return check(f"{BASE}=b.safetensors")


def without(*starts: str) -> Shapes:
    return {name: shape for name, shape in SDXL.items() if not name.startswith(starts)}


def test_what_is_missing_or_more_is_left_to_the_trainers_loader():
    odd = {f"{UNET}middle_block.1.proj_in.weight": (1280, 1280, 1, 1)}
    more = {f"{TEXT_2}attn_mask": (77, 77), "model_ema.decay": ()}
    shapes = without(TEXT_1, f"{VAE}encoder", f"{UNET}out.2.bias") | odd | more
    assert of_shapes(shapes) == Report(plan=ANY)


def test_a_v_prediction_model_without_its_option_is_a_warning():
    plan = {"base": "b.safetensors (SDXL, 6.94 GB)"}
    words = '"b.safetensors" is a v-prediction model: add --v_parameterization --zero_terminal_snr'
    assert of_shapes(SDXL | {"v_pred": ()}) == Report(warnings=[words], plan=plan)
    assert check(f"{BASE}=b.safetensors --v_parameterization") == Report(plan=plan)


OTHER_UNET = (
    '"b.safetensors" is {}, whose U-Net takes {} channels, not SDXL\'s 4: give a checkpoint of '
    "SDXL itself"
)
FEW_BLOCKS = (
    '"b.safetensors" is a distilled model, as SSD-1B and Segmind Vega are: its U-Net has 30 of '
    "SDXL's 70 transformer blocks: give a checkpoint of SDXL itself"
)
REFUSED_MODELS = [
    (NO_VAE.format("b.safetensors"), without(VAE)),
    *(
        (f'"b.safetensors" is {kind}, not an SDXL checkpoint: give the one to train on', {k: (1,)})
        for kind, keys in OTHER_MODELS.items()
        for k in keys.split()
    ),
]


@pytest.mark.parametrize(("sentence", "shapes"), REFUSED_MODELS)
def test_a_model_that_sd_scripts_cannot_train_is_named_in_the_error(sentence, shapes):
    assert of_shapes(shapes) == Report([sentence], plan={"base": "b.safetensors"})


OTHER_UNETS = {
    OTHER_UNET.format("an inpainting model", 9): SDXL | {CONV_IN: (320, 9, 3, 3)},
    OTHER_UNET.format("a model of its own", 8): SDXL | {CONV_IN: (320, 8, 3, 3)},
    FEW_BLOCKS: {n: shape for n, shape in SDXL.items() if not re.search(DISTILLED, n)},
    "": SDXL,
}


def load_target_model(failure: Exception) -> None:
    """As sd-scripts' loader ends."""
    raise failure


@pytest.mark.parametrize("sentence", OTHER_UNETS)
def test_another_unet_is_named_where_sd_scripts_refuses_it(sentence):
    assert of_shapes(OTHER_UNETS[sentence]).errors == []
    args = Namespace(pretrained_model_name_or_path="b.safetensors")
    with pytest.raises(RuntimeError) as refused:
        load_target_model(RuntimeError("size mismatch"))
    assert explain_model(args, refused.value) == sentence
    assert explain_model(args, RuntimeError("of another place")) == ""
    args.pretrained_model_name_or_path = None
    assert explain_model(args, refused.value) == ""


def test_a_file_that_is_not_whole_is_an_error():
    for content, why in {
        struct.pack("<Q", 99) + b"{": "it ends before its header does",
        struct.pack("<Q", 4) + b"nope": "Expecting value: line 1 column 1 (char 0)",
        b"": "it ends before its header does",
        struct.pack("<Q", 2) + b"{}more": "it is 4 bytes longer than its header says",
    }.items():
        Path("b.safetensors").write_bytes(content)
        assert check(f"{BASE}=b.safetensors").errors == [
            f"b.safetensors is not a whole safetensors file ({why}): download it again, or save it "
            "as safetensors"
        ]


def test_a_name_that_is_no_file_is_a_mistake_or_one_of_the_hub():
    for name in ("models/sdxl.safetensors", "a/b/c"):
        assert check(f"{BASE}={name}") == Report([NO_CHECKPOINT.format(name)], plan={"base": name})
    for name in ("stabilityai/stable-diffusion-xl-base-1.0", "me/model"):
        note = f'"{name}" is not a file here, so it is taken for a model of the Hugging Face hub'
        assert check(f"{BASE}={name}") == Report(notes=[note], plan={"base": name})


def test_a_folder_is_a_diffusers_model_if_it_says_so_itself():
    put("model/a")
    assert check(f"{BASE}=model").errors == [
        '"model" is a folder without a model_index.json, so it is not a diffusers model: give the '
        ".safetensors file itself"
    ]
    put("model/model_index.json")
    note = '"model" is a folder, taken for a diffusers model and not checked'
    assert check(f"{BASE}=model") == Report(notes=[note], plan={"base": "model"})


def test_a_file_of_another_name_is_told_by_its_first_bytes():
    not_checked = '"old.ckpt" is not a .safetensors file, so it was not checked'
    neither = (
        '"old.ckpt" is neither a safetensors file nor a torch file: download it again, or give '
        "another"
    )
    for content, errors, notes in (
        (b"PK\3\4 and so on", [], [not_checked]),
        (b"\x80\2}q\0.", [], [not_checked]),
        (b"", [neither], []),
        (b"<html></html>", [neither], []),
        (struct.pack("<Q", 2) + b"{}", [BY_ITS_NAME.format("old.ckpt")], []),
    ):
        Path("old.ckpt").write_bytes(content)
        assert check(f"{BASE}=old.ckpt") == Report(errors, [], notes, {"base": "old.ckpt"})


ELSEWHERE = (
    '"models/x.safetensors" is a link to "real.safetensors", which sd-scripts looks for in the '
    'working folder: give "{}/models/real.safetensors" itself'
)


def test_a_link_is_followed_as_sd_scripts_follows_it(kohya):
    Path("models").mkdir()
    for name in ("b.safetensors", "B.SAFETENSORS", "31e35c80", "models/real.safetensors"):
        write_checkpoint(Path(name), SDXL)
    Path("models/novae.safetensors").touch()
    write_checkpoint(Path("novae.safetensors"), without(VAE))
    for link, target, sentence in (
        ("models/x.safetensors", "{}/b.safetensors", None),
        ("x.safetensors", "B.SAFETENSORS", None),  # the same ending
        ("x.safetensors", "gone.safetensors", NO_CHECKPOINT.format("x.safetensors")),
        # As the hub's cache has its files: under a hash.
        ("models/x.safetensors", "{}/31e35c80", BY_ITS_NAME.format("{}/31e35c80")),
        # A relative one is looked for in the working folder.
        ("models/x.safetensors", "real.safetensors", ELSEWHERE),
        ("models/x.safetensors", "novae.safetensors", NO_VAE.format("novae.safetensors")),
    ):
        Path(link).unlink(missing_ok=True)
        Path(link).symlink_to(target.format(kohya))
        errors = [sentence.format(kohya)] if sentence else []
        base = link if sentence else f"{link} (SDXL, 6.94 GB)"
        assert check(f"{BASE}={quote(link)}") == Report(errors, plan={"base": base})


# ---- The prompts of samples ----------------------------------------------------------------------


def test_the_sample_prompts_pass_and_are_three():
    starts = [prompt.split(" --")[0] for prompt in read_prompts(ROOT / "blora_prompts.txt")]
    assert starts == [r"A \[v\] on a beach", r"A lighthouse in \[v\] style", "A lighthouse"]


def test_prompts_that_sd_scripts_cannot_read_are_an_error():
    for ending, text, why in (
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
    ):
        path = Path(f"p.{ending}")
        path.write_bytes(text.encode("cp1252"))
        [error] = check(f"--sample_at_first --sample_prompts={path}").errors
        assert error.startswith(
            f'sd-scripts cannot read the prompts in "{path}", which ends the training at the first '
            f"sample: write them as in blora_prompts.txt ({why}"
        )
        assert error.endswith(")")


def test_prompts_that_are_none_or_drawn_otherwise_are_a_warning():
    gone = 'no prompts at "gone.md", so no samples will be drawn: correct --sample_prompts'
    assert check("--sample_at_first --sample_prompts=gone.md").warnings == [gone]  # it goes on
    for ending, text in (
        ("txt", "# a comment\n\n"),
        ("json", "[]"),
        ("json", "{}"),
        ("json", '""'),
    ):
        put(f"p.{ending}", text)
        none = f'no prompt in "p.{ending}", so no samples will be drawn: add one'
        assert check(f"--sample_at_first --sample_prompts=p.{ending}").warnings == [none]
    for start in (" ", "\t", "\ufeff"):
        put("p.txt", f"{start}# a comment\na dog")
        assert check("--sample_at_first --sample_prompts=p.txt") == Report(
            warnings=[
                'a comment in "p.txt" will be drawn as a prompt: # has to be the first character '
                "of the line, without a space or a byte order mark before it"
            ],
            plan=ANY,
        )


# ---- The dataset config --------------------------------------------------------------------------

PROJECT, OTHER = "_in/lora/sdxl/hero/images", "_in/lora/sdxl/villain/images"
DETOUR = f"{PROJECT}/../../../../../{OTHER}"


def test_missing_folders_are_errors_unless_there_are_others():
    gone, file, folder = ({"image_dir": name} for name in ("gone", "file", "folder"))
    sentence = f'no folder of images at "{{}}": correct image_dir in "{CONFIG}"'
    for subsets, missing, missed in (
        ([gone, file, gone], ["gone", "file"], []),
        ([gone, folder], [], ["gone"]),
        ([gone, {"metadata_file": "meta.json"}], [], ["gone"]),
        ([folder], [], []),
    ):
        report = reported(check_missing, subsets, Path(CONFIG))
        assert report.errors == [sentence.format(name) for name in missing]
        assert report.warnings == [sentence.format(name) for name in missed]


def test_pictures_of_another_project_alone_are_noticed(kohya):
    put("_in/lora/sdxl/villain/config.toml")
    Path(OTHER).mkdir()
    link = Path("_in/lora/sdxl/hero/link")
    if os.name != "nt":
        link.symlink_to(kohya / OTHER)
    others = [OTHER], [DETOUR], [f"{OTHER}/.."]
    # Shared ones beside the projects, above them, elsewhere, and by a link.
    shared = ["_in/lora/sdxl/shared"], ["_in/lora/shared"], ["shared"], [str(link)]
    for folders in (*others, [OTHER, PROJECT], *shared):
        for written in (folders, [str(Path(folder).absolute()) for folder in folders]):
            other = written[0] if folders in others else None
            assert other_project(written, Path(CONFIG)) == other


# ---- The output ----------------------------------------------------------------------------------

NO_RIGHT = 'no permission to write to "{}": correct --{}, or the permissions'
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
def test_a_folder_that_cannot_be_written_to_is_an_error(kohya):
    kohya.chmod(0o755)
    Path("link").symlink_to("gone")
    Path("closed").mkdir()
    for mode, output, sentence, shown in (
        (0o755, "file/a/b", NO_FOLDER, kohya / "file"),
        (0o755, "link", NO_FOLDER, "link"),
        (0o555, "closed", NO_RIGHT, "closed"),
        (0o000, "closed", NO_RIGHT, "closed"),
        (0o666, "closed/a", NO_RIGHT, kohya / "closed"),
        (0o000, "closed/a/b", NO_RIGHT, kohya / "closed"),
    ):
        Path("closed").chmod(mode)
        with as_nobody():  # by a relative path, as nobody may not enter the folders above
            report = reported(check_folder, output, "output_dir")
        Path("closed").chmod(0o755)
        assert report.errors == [sentence.format(shown, "output_dir")]


def test_a_name_that_is_a_path_is_an_error():
    """As BLORA_NAME=chars/hero gives it."""
    line, folder = "--output_dir=_out --output_name=chars/hero_1", Path("_out/chars")
    assert check(line).errors == [
        f'--output_name "chars/hero_1" is a path, and the folder "{folder}" does not exist: '
        f"{BLORA_NAME}"
    ]
    folder.mkdir(parents=True)
    assert check(line) == Report(plan=ANY)


@POSIX
def test_a_name_that_is_too_long_for_its_saves_is_an_error():
    for name in ("x" * 231, "ä" * 116, "x" * 255):
        shown = name if len(name) < 255 else "x" * 20 + "..."
        [error] = check(f"--output_name={name}").errors
        assert error == f'--output_name "{shown}" is too long for a file: {BLORA_NAME}'


def test_a_name_that_windows_refuses_is_an_error_there_and_a_warning_elsewhere():
    kind = "errors" if os.name == "nt" else "warnings"
    for name, why in {
        "a:b": "with : in its name",
        "what?": "with ? in its name",
        'say "hi"': 'with " in its name',
        "a<b>|*": "with * < > | in its name",
        "a\nb": "with \n in its name",
        "CON": "of this name",
        "nul.1": "of this name",
        "com1 ": "of this name",
        **({} if os.name == "nt" else {"a\\b": "with \\ in its name"}),  # a path on Windows
    }.items():
        sentence = f'--output_name "{name}": Windows cannot save a file {why}: {BLORA_NAME}'
        assert check(f"--output_name={quote(name)}") == Report(**{kind: [sentence]}, plan=ANY)


def test_an_earlier_lora_that_will_be_written_over_is_a_warning():
    for earlier in ("hero_1.safetensors", "last.safetensors", "hero_1.ckpt"):
        put(f"_out/hero_1/{earlier}")
    for line, name in {
        "": "hero_1.safetensors",
        "--output_name=": "last.safetensors",
        "--save_model_as=ckpt": "hero_1.ckpt",
        "--output_name=hero_2": None,
        "--save_model_as=pt": None,
    }.items():
        sentence = (
            f'"{Path("_out/hero_1", str(name))}" exists and will be overwritten: give another '
            "--output_name (BLORA_REVISION in the launcher), or move it away"
        )
        assert check(line) == Report(warnings=[sentence] * bool(name), plan=ANY)
