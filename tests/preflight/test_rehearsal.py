"""What of the rehearsal needs no sd-scripts: meta tensors, options, and sentences on errors.

Exceptions are the real libraries' own, raised under the names of sd-scripts' functions, by which
they are known. Its own train() is rehearsed by test_real_kohya.py and test_real_cases.py.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from types import FunctionType

import lycoris.kohya
import prodigyopt
import pytest
import toml
import torch
import voluptuous
from accelerate import Accelerator
from accelerate.commands import launch
from reports import reported
from safetensors.torch import load_file, save_file
from sdxl_checkpoint import sdxl_shapes
from torch import nn
from torch.optim import AdamW
from torch.utils.data import DataLoader
from transformers import get_scheduler

from blora.preflight import rehearsal
from blora.preflight.processes import Started, check_device, check_processes, processes
from blora.preflight.rehearsal import ROOT
from blora.preflight.report import Report
from blora.preflight.trainer_errors import ended_sentence, is_of_the_rehearsal, own_words, refusal
from blora.preflight.weightless import (
    BLANK,
    header_tensors,
    kept_apart,
    on_meta,
    silence_unet,
)
from blora.text import BloraError


class Transformer2DModel(nn.ModuleDict):
    """A class that LyCORIS' presets name."""

    def __init__(self):
        super().__init__({"to_q": nn.Linear(64, 64), "conv": nn.Conv2d(64, 64, 3)})


def network(block: nn.Module, **options: str) -> nn.Module:
    unet = nn.ModuleDict({"block": block})
    return lycoris.kohya.create_network(1.0, 4, 4, None, nn.Module(), unet, **options)


# ---- Tensors without numbers ---------------------------------------------------------------------


@pytest.fixture
def file(tmp_path) -> Path:
    tensors = {
        "matrix": torch.ones(3, 2, dtype=torch.float16),
        "kernel": torch.ones(2, 2, 3, 3),
        "one row": torch.ones(1, 4, dtype=torch.bfloat16),
        "empty": torch.ones(0, 4),
        "alpha": torch.tensor(8.0),
        "alpha in a list": torch.tensor([4.0]),
        "numbers": torch.arange(3),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def test_a_file_is_read_as_far_as_its_header(file):
    with on_meta():
        read = header_tensors(file, device="cpu")
    assert {n: (t.shape, t.dtype) for n, t in read.items()} == {
        n: (t.shape, t.dtype) for n, t in load_file(file).items()
    }
    numbers = {name: tensor.item() for name, tensor in read.items() if not tensor.is_meta}
    assert numbers == {"alpha": 8, "alpha in a list": 4}


def test_what_is_made_has_no_numbers_and_goes_to_no_device_but_a_number_stays_one():
    with on_meta():
        made = torch.zeros(2, 2)
        moved = [made.cpu(), made.to("cpu"), made.to(0), made.to(torch.device("cpu"), torch.half)]
        moved += [made.to(device="cpu", dtype=torch.half), nn.Linear(2, 2).to("cpu").weight]
        assert torch.tensor(4.0).item() == 4
        assert torch.ones(1, device="cpu").to("cpu").item() == 1
    assert all(tensor.is_meta for tensor in (made, *moved))
    assert [tensor.dtype for tensor in moved[3:5]] == [torch.half, torch.half]
    assert not torch.zeros(1).is_meta


@pytest.mark.parametrize("dora", ["False", "True"])
@pytest.mark.parametrize("algo", "lora locon loha lokr dylora full ia3 glora diag-oft boft".split())
def test_lycoris_builds_the_same_modules_without_numbers_as_with(algo, dora):
    def build(block: nn.Module) -> dict[str, torch.Size]:
        built = network(block, algo=algo, dora_wd=dora, conv_dim="4")
        built.apply_to(nn.Module(), nn.Module(), False, True)
        return {name: tensor.shape for name, tensor in built.state_dict().items()}

    real = build(Transformer2DModel())
    with on_meta():
        rehearsed = build(Transformer2DModel().to("cpu"))
    assert rehearsed == real
    assert real


def test_once_all_is_built_numbers_stay_numbers_and_new_ones_are_numbers():
    with on_meta():
        weight = nn.Linear(2, 2).weight
    with kept_apart():
        ids = torch.ones(1, 2)
        assert ids.to(weight.device) is ids
        assert ids.to("meta", torch.half).sum().item() == 2
        assert weight.to("cpu").is_meta
        assert torch.zeros(1).item() == 0


def test_a_checkpoint_that_is_not_read_is_sdxl_by_its_names(tmp_path):
    tensors = header_tensors(tmp_path / BLANK)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == sdxl_shapes()
    assert all(tensor.is_meta and tensor.dtype == torch.half for tensor in tensors.values())


def test_an_inpainting_unet_refuses_latents_without_a_mask():
    unet = nn.ModuleDict({"first": nn.Conv2d(9, 320, 3)})
    silence_unet(unet, lambda: torch.zeros(()))
    assert unet(torch.zeros(2, 9, 8, 8), None).unique().tolist() == [1]
    args = Namespace(pretrained_model_name_or_path="a.safetensors")
    assert refusal(raised(unet, torch.zeros(2, 4, 8, 8), None), args, "") == (
        '"a.safetensors" is an inpainting model, which is trained with masks: add '
        "--train_inpainting and remove --cache_latents, or give a checkpoint of SDXL itself (the "
        "U-Net takes 9 channels and gets 4)"
    )


# ---- What it leaves alone ------------------------------------------------------------------------


def test_options_that_write_show_or_read_much_are_taken_away(tmp_path, file):
    (tmp_path / "empty").mkdir()
    given_and_left = {
        "output_dir": ("_out", str(tmp_path)),
        "output_name": ("/elsewhere/hero", "hero"),
        "logging_dir": ("logs", str(tmp_path)),
        "wandb_api_key": ("secret", None),
        "console_log_file": ("log.txt", None),
        "huggingface_repo_id": ("me/hero", None),
        "save_state_to_huggingface": (True, None),
        "resume": ("me/hero/state", None),
        "resume_from_huggingface": (True, True),
        "disable_mmap_load_safetensors": (True, False),
        "debug_dataset": (True, False),
        "vae": ("stabilityai/sdxl-vae", None),
        "tokenizer_cache_dir": (str(tmp_path / "empty"), None),
        "max_data_loader_n_workers": (8, 0),
        "persistent_data_loader_workers": (True, False),
    }
    args = Namespace(**{name: given for name, (given, _) in given_and_left.items()})
    rehearsal.keep_to(tmp_path, args)
    assert vars(args) == {name: left for name, (_, left) in given_and_left.items()}
    read = {"vae": str(file), "tokenizer_cache_dir": str(tmp_path), "logging_dir": None}
    read |= {"resume": "state", "max_data_loader_n_workers": 0, "output_name": None}
    args = Namespace(**read)
    rehearsal.keep_to(tmp_path, args)
    left = read | {"disable_mmap_load_safetensors": False, "debug_dataset": False}
    assert vars(args) == left | {"output_dir": str(tmp_path), "output_name": "last"}


def test_our_folder_stays_where_pythonpath_has_it_alone(tmp_path, monkeypatch):
    before, script = [str(ROOT), "/elsewhere"], tmp_path / "script.py"
    for python_path in ([], ["/other", str(ROOT)]):
        monkeypatch.setattr(sys, "path", before)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(python_path))
        with rehearsal.as_started(script, ["--a", "b"]):
            assert sys.path == [str(tmp_path), *(before if python_path else before[1:])]
            assert sys.argv == [str(script), "--a", "b"]
        assert sys.path == [str(ROOT), "/elsewhere"]


def test_what_the_trainer_prints_is_kept_unwrapped(monkeypatch, capsys):
    for before, width in ({}, "1000"), ({"COLUMNS": "80"}, "80"):
        monkeypatch.setattr(os, "environ", before)
        with rehearsal.trainer_environment(Path("script.py"), []) as environment:
            print("log")
            print("warning", file=sys.stderr)
            assert os.environ == {"COLUMNS": width}
        assert environment.printed.getvalue() == "log\nwarning\n"
        assert capsys.readouterr() == ("", "")


def test_files_are_written_in_the_scratch_folder_alone(tmp_path):
    scratch, path = tmp_path / "scratch", tmp_path / "metadata_cache.json"
    scratch.mkdir()
    opened = rehearsal.scratch_open(scratch)
    for mode in ("w", "a", "x", "wb"):
        with opened(path, mode) as file:
            file.write(b"a" if "b" in mode else "a")
    assert not path.exists()
    path.write_text("a")
    with opened(path, "r", encoding="utf-8") as file:
        assert file.read() == "a"
    with opened(str(scratch / "state.json"), "w") as file:
        file.write("a")
    assert (scratch / "state.json").read_text() == "a"


def test_a_state_stays_in_its_file_unless_it_cannot(tmp_path):
    load = rehearsal.mapped_load(torch.load)
    for zipped in (True, False):
        torch.save(torch.ones(3), tmp_path / "a.bin", _use_new_zipfile_serialization=zipped)
        assert load(tmp_path / "a.bin", map_location="cpu").tolist() == [1, 1, 1]
    assert load(BytesIO((tmp_path / "a.bin").read_bytes())).tolist() == [1, 1, 1]


def test_a_link_is_a_checkpoint_if_sd_scripts_finds_its_target(file, monkeypatch, tmp_path):
    models = tmp_path / "models"
    models.mkdir()
    (models / "relative.safetensors").symlink_to("../a.safetensors")
    (models / "absolute.safetensors").symlink_to(file)
    monkeypatch.chdir(models)
    names = "../a.safetensors", "absolute.safetensors", "relative.safetensors"
    assert all(map(rehearsal.is_safetensors, names))
    monkeypatch.chdir(tmp_path)
    assert not any(map(rehearsal.is_safetensors, ("models/relative.safetensors", "models")))


# ---- Errors, as sd-scripts comes to them ---------------------------------------------------------

ARGS = Namespace(
    optimizer_type="prodigy",
    optimizer_args=["a=b", "c=d"],
    network_args=["a=b", "c=d"],
    network_dim=4,
    lr_scheduler="constant",
    network_module="lycoris.kohya",
    dataset_config="my/config.toml",
    vae=None,
    resume="my-state",
)
MATRIX, BLOCK = nn.Parameter(torch.ones(2, 2)), Transformer2DModel()


def raised(function: Callable[..., object], *given: object) -> BaseException:
    """The exception of a function, with the way it came."""
    with pytest.raises((Exception, SystemExit)) as caught:
        function(*given)
    return caught.value


def named(name: str, function: FunctionType) -> FunctionType:
    """The function under the name of one of sd-scripts'."""
    return FunctionType(function.__code__.replace(co_name=name), globals())


def get_optimizer(args: list[str], *parameters: nn.Parameter) -> object:
    """--optimizer_args as train_util.get_optimizer reads them."""
    options = {}
    for arg in args:
        key, value = arg.split("=")
        options[key] = ast.literal_eval(value)
    return prodigyopt.Prodigy(parameters, **options)


def train(args: list[str]) -> None:
    for net_arg in args:
        _key, _value = net_arg.split("=", 1)


def read_caption(cap_path: str, text: bytes) -> str:
    lines = text.decode().splitlines()
    assert len(lines) > 0, f"caption file is empty / キャプションファイルが空です: {cap_path}"
    return lines[0]


def replace_unet_modules() -> None:
    """As sd-scripts looks for a package."""
    try:
        importlib.import_module("no_such_package.ops")
    except ImportError:
        raise ImportError("No xformers / xformersがインストールされていないようです") from None


def two_rates() -> None:
    groups = [{"params": [nn.Parameter(MATRIX.detach())], "lr": rate} for rate in (1.0, 0.5)]
    for group in groups:
        group["params"][0].grad = torch.ones(2, 2)
    prodigyopt.Prodigy(groups).step()


def fused() -> None:
    raise AssertionError(
        "fused_backward_pass currently only works with optimizer_type Adafactor / "
        "fused_backward_passは現在optimizer_type Adafactorでのみ機能します"
    )


def resume_from_local_or_hf_if_specified(load: Callable[..., object], *given: object) -> None:
    Path("cut.bin").write_bytes(b"PK\3\4")
    load(*given)


def load_another_rank() -> None:
    nn.Linear(2, 2).load_state_dict(nn.Linear(2, 4).state_dict())


def load_another_optimizer() -> None:
    two = [nn.Parameter(MATRIX.detach()), nn.Parameter(MATRIX.detach())]
    AdamW(two).load_state_dict(AdamW(two[:1]).state_dict())


def begin_at_the_end() -> None:
    words = "max_train_steps should be greater than initial step"
    raise AssertionError(f"{words} / max_train_stepsは初期ステップより大きい必要があります: 2 vs 2")


LEARNING = (
    "--optimizer_type=prodigy refuses --optimizer_args a=b c=d, or its learning rate: correct them"
)
NO_VALUE = "--optimizer_args has {}: write each one as NAME=VALUE, without spaces"
NO_PYTHON = (
    "--optimizer_args has {}, which is no value of Python: write a number, True, False or None"
)
GONE_ON = 'the state in "my-state" is not of this {}: give the {} that it was trained with'
NO_TOKENIZERS = (
    "sd-scripts cannot load SDXL's tokenizers: connect to huggingface.co, set HF_HUB_OFFLINE=1 if "
    "it downloaded them before, or give their whole folder as --tokenizer_cache_dir"
)
NOT_READ = 'the dataset config "my/config.toml" cannot be read: correct it'
REFUSALS = {
    partial(get_optimizer, ["foo=1"], MATRIX): "--optimizer_type=prodigy does not take foo: give "
    "it --optimizer_args of its own, or --optimizer_args left empty",
    partial(get_optimizer, ["decouple"]): NO_VALUE.format("decouple"),
    partial(get_optimizer, ["betas=(0.9,", "0.99)"]): NO_VALUE.format("betas=(0.9,"),
    partial(get_optimizer, ["betas=high"]): NO_PYTHON.format("betas=high"),
    partial(get_optimizer, ["decouple=true"]): NO_PYTHON.format("decouple=true"),
    two_rates: "--optimizer_type=prodigy takes one learning rate: leave out --unet_lr and "
    "--text_encoder_lr, or give both the value of --learning_rate",
    named("get_optimizer", fused): "--fused_backward_pass cannot be used here: remove it",
    partial(resume_from_local_or_hf_if_specified, load_another_rank): GONE_ON.format(
        "network", "--network_dim, --network_module and --network_args"
    ),
    partial(resume_from_local_or_hf_if_specified, load_another_optimizer): GONE_ON.format(
        "optimizer and network", "--optimizer_type and --network_args"
    ),
    partial(resume_from_local_or_hf_if_specified, lambda: torch.load("cut.bin")): "the state in "
    '"my-state" is damaged: resume from another',
    partial(resume_from_local_or_hf_if_specified, lambda: torch.load("gone.bin")): '"my-state" is '
    "not a whole saved state: give --resume a folder that --save_state has made, whose name ends "
    "in -state",
    partial(resume_from_local_or_hf_if_specified, Accelerator(cpu=True).load_state, "my-state"): (
        'no saved state in "my-state": correct --resume'
    ),
    named("train", begin_at_the_end): "nothing is left to train, since --resume, --initial_step or "
    "--initial_epoch begins at the end or behind it: raise --max_train_steps or --max_train_epochs",
    named("__getitem__", lambda: torch.stack([MATRIX, MATRIX[:1]])): "a batch cannot be built, "
    "because its pictures, masks or cached latents differ in size: give each mask the size of its "
    "picture, and delete .npz files of earlier trainings",
    partial(get_optimizer, ["eps=-1"], MATRIX): LEARNING,
    partial(get_optimizer, []): "the network has nothing to train by --network_args a=b c=d and "
    "--network_dim=4: correct the names in the preset, or the rank",
    named("get_scheduler_fix", lambda: get_scheduler("cosin", AdamW([MATRIX]))): "--lr_scheduler="
    "constant cannot be created: correct it",
    partial(network, BLOCK, algo="dora"): "--network_args has algo=dora, which LyCORIS does not "
    "know: correct it",
    partial(network, BLOCK, preset="gone.toml"): "LyCORIS cannot read the preset of --network_args "
    "a=b c=d: correct its path or its text",
    partial(network, BLOCK, preset="odd.toml"): "the preset of --network_args a=b c=d has keys "
    "that LyCORIS refuses: remove them; dora_wd and the like are --network_args",
    partial(network, BLOCK, conv_dim="x"): "lycoris.kohya cannot build a network from "
    "--network_args a=b c=d: correct them",
    partial(train, ["a=x", "dora_wd"]): "--network_args has dora_wd: write each one as NAME=VALUE",
    partial(DataLoader, [1], persistent_workers=True): "--persistent_data_loader_workers cannot be "
    "used with --max_data_loader_n_workers=0: remove one of the two",
    partial(voluptuous.Schema({}), {"foo": 1}): 'the dataset config "my/config.toml" is not valid '
    "for sd-scripts: correct it",
    named("load_user_config", lambda: toml.loads("x = = 1")): NOT_READ,
    named("load_user_config", lambda: json.loads("x = = 1")): NOT_READ,
    partial(read_caption, "a", b""): 'the caption "a" is empty: write its words, or delete it',
    partial(read_caption, "a", b"caf\xe9"): 'the caption "a" is not UTF-8: save it as UTF-8',
    named("load_vae", lambda: {}["encoder.weight"]): "--vae=None cannot be loaded: correct it",
    named("load_tokenizers", lambda: Path("clip-vit").read_text()): NO_TOKENIZERS,
}


@pytest.mark.parametrize("call", REFUSALS)
def test_what_it_raises_is_told_by_its_setting(tmp_path, monkeypatch, capsys, call):
    monkeypatch.chdir(tmp_path)
    Path("odd.toml").write_text("dora_wd = true")
    failure = raised(call)
    printed = capsys.readouterr().out
    # LyCORIS prints what it has against a preset, and raises nothing but an AssertionError.
    words = own_words(failure) or re.search(r"^Error.*", printed, re.MULTILINE)[0].strip()
    assert refusal(failure, ARGS, f"{printed}\nit\n") == f"{REFUSALS[call]} ({words})"


def test_what_python_says_of_a_none_is_left_out():
    """transformers opens the vocabulary that it did not find, whose path is None."""
    assert refusal(raised(named("_load_tokenizer", lambda: Path(None))), ARGS, "") == NO_TOKENIZERS


def test_a_rate_of_zero_is_blamed_before_the_preset():
    empty = raised(named("get_optimizer", lambda: AdamW([])))
    for option in ("unet_lr", "learning_rate"):
        told = refusal(empty, Namespace(**{option: 0.0}), "")
        assert told.startswith(f"--{option}=0 leaves nothing to train: ")


def test_its_own_words_are_the_english_ones_on_one_line_of_readable_length():
    expected = {
        "No data / 画像がありません": "No data",
        "a path / with a slash": "a path / with a slash",
        "two\n  lines": "two lines",
        "it is empty. / キャプションファイルが空です。: a / b.txt": "it is empty: a / b.txt",
        "it lacks a.png / 見つかりません: a.png": "it lacks a.png",
        "it is 48.\n48です": "it is 48.",
        "cannot open /写真/a.png": "cannot open /写真/a.png",
        "Caught KeyError in DataLoader worker process 0.\nOriginal Traceback\nKeyError: 'a'": (
            "KeyError: 'a'"
        ),
        "x" * 400: "x" * 400,
        "x" * 401: "x" * 400 + "...",
    }
    assert {text: own_words(ValueError(text)) for text in expected} == expected


def test_what_nobody_foresaw_and_variables_of_another_name_leave_its_own_words():
    def get_optimizer() -> None:
        _key, _value = "decouple".split("=")

    for failure in (raised(int, "abc"), raised(get_optimizer)):
        assert refusal(failure, ARGS, "") == (
            f"the training would stop: fix the cause given (ValueError: {failure})"
        )


def test_a_package_that_is_missing_is_named():
    lacks = f"this Python ({sys.executable}) has no "
    unknown = "unknown --network_module=a.b: correct it"
    not_found = (
        "Python does not find blora_network.py: copy it beside sdxl_train_network.py, or put its "
        "folder on PYTHONPATH, as the launchers do"
    )
    for name, module, sentence in (
        ("lycoris", "lycoris.kohya", f"{lacks}lycoris: pip install lycoris_lora"),
        ("prodigyplus", "a", f"{lacks}prodigyplus: pip install prodigy-plus-schedule-free"),
        ("a", "a.b", unknown),
        ("a.b", "a.b", unknown),
        ("blora_network", "blora_network", not_found),
    ):
        failure = ModuleNotFoundError(name=name)
        assert refusal(failure, Namespace(network_module=module), "") == sentence
    hidden = raised(replace_unet_modules)
    assert refusal(hidden, ARGS, "") == f"{lacks}no_such_package: pip install no_such_package"


def test_an_end_is_told_by_the_last_words():
    words = "unrecognized arguments: --stepz=2"
    assert refusal(SystemExit(2), Namespace(), f"a\nb: error: {words}\nc\n") == (
        f"sd-scripts refuses the options: correct them ({words})"
    )
    not_found = raised(named("read_config_from_file", lambda config_path: sys.exit(1)), "a.toml")
    assert refusal(not_found, Namespace(), "a\na.toml not found.\n") == (
        "--config_file a.toml cannot be read: correct its path or its text (a.toml not found.)"
    )
    assert refusal(SystemExit(1), ARGS, "a: error: an earlier one\na.toml not found.\n") == (
        "the training would stop: fix the cause given (SystemExit: a.toml not found.)"
    )
    # As blora_network ends.
    assert refusal(SystemExit("error: with bypass_mode"), ARGS, "") == "with bypass_mode"


def test_what_only_the_rehearsal_lacks_is_no_refusal():
    assert is_of_the_rehearsal(raised(torch.empty(1, device="meta").item))
    assert is_of_the_rehearsal(raised(nn.Linear(2, 2, device="meta").to, "cpu"))
    for words in ("abc", "no metadata / メタデータ", "D:/meta/metal.png", "metadata_cache.json"):
        assert not is_of_the_rehearsal(raised(int, words)), words


def test_a_training_without_pictures_ends_without_a_word_that_is_seen():
    assert ended_sentence("ERROR    No data found. Please verify") == (
        "the trainer finds no picture: put pictures into the folders of the dataset config, not "
        "into subfolders, or correct image_dir there"
    )


# ---- The processes that accelerate starts, by its own sum ----------------------------------------

SCRIPT = "sdxl_train_network.py"
CONFIG = (
    "{{compute_environment: LOCAL_MACHINE, distributed_type: 'NO', num_machines: 1, "
    "num_processes: {}, use_cpu: true}}"
)
LONE = "launch --num_processes=2"
TWO = f"{LONE} --multi_gpu"
MEET = "--num_machines=2 --main_process_ip=10.0.0.1"
WHERE = "accelerate's options (BLORA_ACCELERATE_ARGS in the launcher)"


@pytest.fixture
def no_cards(tmp_path, monkeypatch) -> None:
    """accelerate finds no config and no card; the working directory has two configs."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr(launch, "default_config_file", str(tmp_path / "default.yaml"))
    monkeypatch.chdir(tmp_path)
    for number in (1, 3):
        Path(f"{number}.yaml").write_text(CONFIG.format(number))


@pytest.mark.usefixtures("no_cards")
def test_accelerate_says_how_many_it_starts(capsys, monkeypatch):
    chosen = []
    for name in ("simple_launcher", "multi_gpu_launcher"):
        monkeypatch.setattr(launch, name, lambda args, name=name: chosen.append(name))
    for line, started in {
        "": Started(is_chosen=False),
        "accelerate launch --mixed_precision=bf16": Started(is_chosen=False),
        "accelerate launch --multi_gpu --num_processes 2": Started(2),
        "launch --multi_gpu": Started(),  # as many as there are cards: none
        "launch --cpu --num_processes=2": Started(),
        "launch --config_file 1.yaml": Started(cpu_config="1.yaml"),
        f"{TWO} --config_file=3.yaml": Started(2, cpu_config="3.yaml"),
        "launch --config_file=3.yaml --multi_gpu": Started(3, cpu_config="3.yaml"),
        # Whatever number is asked for, accelerate starts one.
        LONE: Started(lacks_multi_gpu=True),
        "launch --config_file=3.yaml": Started(lacks_multi_gpu=True, cpu_config="3.yaml"),
        "launch --cpu --config_file=1.yaml": Started(),
        f"{LONE} {MEET} --main_process_port=29500": Started(lacks_multi_gpu=True),
        # A rank means nothing where there is one machine.
        f"{TWO} --num_machines=1 --machine_rank=1": Started(2),
        # --num_processes is that of all machines.
        f"{TWO} {MEET} --machine_rank=0": Started(2, 2),
        f"{TWO} {MEET} --machine_rank=1": Started(2, 2, 1),
        f"{TWO} {MEET} --num_processes=5 --machine_rank=1": Started(4, 2, 1),
    }.items():
        assert processes(line.split(), SCRIPT) == started, line
        assert capsys.readouterr() == ("", "")
        # Its own choice of a way to start them is the same.
        words = line.rpartition("launch")[2].split()
        launch.launch_command(launch.launch_command_parser().parse_args([*words, SCRIPT]))
        capsys.readouterr()
        way = "multi_gpu_launcher" if "--multi_gpu" in words else "simple_launcher"
        assert chosen.pop() == way, line
        assert started.processes == 1 or "--multi_gpu" in words


@pytest.mark.usefixtures("no_cards")
def test_accelerate_takes_all_cards_unless_a_number_is_chosen(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert processes(["launch"], SCRIPT) == Started(2, is_chosen=False)
    assert processes(LONE.split(), SCRIPT) == Started(2)


@pytest.mark.usefixtures("no_cards")
def test_accelerates_refusals_are_errors_in_its_words(capsys):
    for options, words in {
        "--num_processes=many": "invalid int value: 'many'",
        "--multi_gpu --num_processes=1": "You need to use at least 2 processes to use `--m",
        "--config_file=gone.yaml": "gone.yaml",
    }.items():
        with pytest.raises(BloraError) as raised:
            processes(["launch", *options.split()], SCRIPT)
        start, told = str(raised.value).split(f": correct {WHERE} (")
        assert start == "accelerate refuses its options"
        assert words in told
        assert capsys.readouterr() == ("", "")


def test_a_device_or_a_number_that_nobody_chose_is_a_warning():
    assert reported(check_device, "cpu", ["launch"], Started(cpu_config="a")).warnings == [
        "torch finds no graphics card, so the training would run on the processor: install torch "
        "with CUDA"
    ]
    assert reported(check_device, "cuda", ["launch"], Started(cpu_config="my.yaml")).warnings == [
        '"my.yaml" has use_cpu: true, so accelerate would train on the processor and not on the '
        "graphics card: write use_cpu: false there, or run accelerate config"
    ]
    assert reported(check_processes, Started(2, is_chosen=False)).warnings == [
        "accelerate finds 2 graphics cards and will train on all of them, which takes 2 times the "
        f"pictures a step: for one, add --num_processes=1 to {WHERE}"
    ]
    assert reported(check_processes, Started(lacks_multi_gpu=True)).warnings == [
        "without --multi_gpu accelerate starts one process on each machine, and each trains a LoRA "
        f"of its own: add it to {WHERE}"
    ]
    for device in (("cpu", ["launch", "--cpu"]), ("cuda", ["launch"]), ("mps", [])):
        assert reported(check_device, *device, Started()) == Report()
    for started in (Started(), Started(is_chosen=False), Started(2)):
        assert reported(check_processes, started) == Report()
