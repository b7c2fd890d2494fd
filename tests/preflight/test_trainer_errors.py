"""What the trainer's exceptions become: a sentence that names the setting and what to do.

The exceptions are the real libraries' own. The functions that raise them here have the names of
sd-scripts' functions, by which they are known; sd-scripts itself is asked by
test_real_cases.py.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import sys
from collections.abc import Callable

import lycoris.kohya
import prodigyopt
import pytest
import toml
import torch
import voluptuous
from torch import nn
from transformers import get_scheduler as transformers_scheduler

from blora.preflight.trainer_errors import (
    ended_sentence,
    is_of_the_rehearsal,
    own_words,
    refusal,
)

ARGS = argparse.Namespace(
    optimizer_type="prodigy",
    optimizer_args=["eps=-1", "decouple=True"],
    network_args=["preset=my.toml", "algo=lora"],
    network_dim=4,
    lr_scheduler="constant",
    network_module="lycoris.kohya",
    network_weights="before.safetensors",
    dataset_config="my/config.toml",
    pretrained_model_name_or_path="sdxl.safetensors",
    vae=None,
)
MATRIX = nn.Parameter(torch.ones(2, 2))


def raised(function: Callable[..., object], *given: object) -> BaseException:
    """The exception of a function, with the way it came."""
    try:
        function(*given)
    except (Exception, SystemExit) as failure:
        return failure
    raise AssertionError("nothing was raised")


# ---- As sd-scripts calls them --------------------------------------------------------------------


def get_optimizer(args: list[str], *parameters: nn.Parameter) -> object:
    """--optimizer_args as train_util.get_optimizer reads them."""
    options = {}
    for arg in args:
        key, value = arg.split("=")
        options[key] = ast.literal_eval(value)
    return prodigyopt.Prodigy(parameters, **options)


def state_per_byte() -> None:
    torch.optim.LBFGS([MATRIX]).step()


def get_scheduler_fix(name: str) -> object:
    return transformers_scheduler(name, torch.optim.AdamW([MATRIX]))


def train(args: list[str]) -> None:
    for net_arg in args:
        _key, _value = net_arg.split("=", 1)


class Transformer2DModel(nn.Module):
    """A class that LyCORIS' presets name."""

    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(4, 4)


def create_network(options: dict[str, str]) -> object:
    unet, text = nn.Module(), nn.Module()
    unet.block = Transformer2DModel()
    return lycoris.kohya.create_network(1.0, 4, 4, None, text, unet, **options)


def loader() -> object:
    return torch.utils.data.DataLoader([1], num_workers=0, persistent_workers=True)


def load_user_config(reader: Callable[[str], object]) -> object:
    return reader("x = = 1")


def read_caption(cap_path: str, text: bytes) -> str:
    lines = text.decode().splitlines()
    assert len(lines) > 0, f"caption file is empty / キャプションファイルが空です: {cap_path}"
    return lines[0]


def load_vae() -> None:
    raise KeyError("encoder.conv_in.weight")


def load_target_model() -> None:
    load_vae()


def load_tokenizers() -> None:
    raise OSError("Can't load tokenizer for 'openai/clip-vit-large-patch14'.")


def replace_unet_modules() -> None:
    """As sd-scripts looks for a package."""
    try:
        importlib.import_module("no_such_package.ops")
    except ImportError:
        raise ImportError("No xformers / xformersがインストールされていないようです") from None


# ---- The sentences -------------------------------------------------------------------------------

SUBSET = {voluptuous.Required("image_dir"): str, "num_repeats": int}
SCHEMA = voluptuous.Schema(
    {"general": {"keep_tokens": int}, "datasets": [{"resolution": int, "subsets": [SUBSET]}]}
)
NO_VALUE = "--optimizer_args has {}: write each one as NAME=VALUE, without spaces"
REFUSED_VALUE = (
    "--optimizer_type=prodigy refuses --optimizer_args eps=-1 decouple=True, or its learning rate: "
    "correct them"
)
NOT_VALID = 'the dataset config "my/config.toml" is not valid for sd-scripts: correct it'
NOT_READ = 'the dataset config "my/config.toml" cannot be read: correct it'
STOP = "the training would stop: fix the cause given (ValueError: {})"
SENTENCES = [
    (
        "--optimizer_type=prodigy does not take foo: give it --optimizer_args of its own, or "
        "--optimizer_args left empty",
        (get_optimizer, ["foo=1"], MATRIX),
    ),
    (NO_VALUE.format("decouple"), (get_optimizer, ["decouple"])),
    (NO_VALUE.format("betas=(0.9,"), (get_optimizer, ["betas=(0.9,", "0.99)"])),
    (NO_VALUE.format("betas=high"), (get_optimizer, ["betas=high"])),
    (REFUSED_VALUE, (get_optimizer, ["eps=-1"], MATRIX)),
    (REFUSED_VALUE, (state_per_byte,)),
    (
        "the network has nothing to train by --network_args preset=my.toml algo=lora and "
        "--network_dim=4: correct the names in the preset, or the rank",
        (get_optimizer, []),
    ),
    ("--lr_scheduler=constant cannot be created: correct it", (get_scheduler_fix, "cosin")),
    (
        "--network_args has algo=dora, which LyCORIS does not know: correct it",
        (create_network, {"algo": "dora"}),
    ),
    (
        "lycoris.kohya cannot build a network from --network_args preset=my.toml algo=lora: "
        "correct them",
        (create_network, {"conv_dim": "x"}),
    ),
    ("--network_args has dora_wd: write each one as NAME=VALUE", (train, ["preset=x", "dora_wd"])),
    (
        "--persistent_data_loader_workers cannot be used with --max_data_loader_n_workers=0: "
        "remove one of the two",
        (loader,),
    ),
    (NOT_VALID, (SCHEMA, {"datasets": [{"foo": 1}]})),
    (NOT_VALID, (SCHEMA, {"datasets": [{"subsets": [{}]}]})),
    (NOT_READ, (load_user_config, toml.loads)),
    (NOT_READ, (load_user_config, json.loads)),
    ('the caption "a.txt" is empty: write its words, or delete it', (read_caption, "a.txt", b"")),
    ('the caption "a.txt" is not UTF-8: save it as UTF-8', (read_caption, "a.txt", b"caf\xe9")),
    ("--vae=None cannot be loaded: correct it", (load_target_model,)),  # not the checkpoint
    (
        "SDXL's tokenizers are not on this machine and cannot be downloaded: connect to "
        "huggingface.co once, or give their folder as --tokenizer_cache_dir",
        (load_tokenizers,),
    ),
]


@pytest.mark.parametrize(("sentence", "call"), SENTENCES)
def test_what_the_trainer_raises_is_told_by_the_setting_and_in_its_own_words(sentence, call):
    failure = raised(*call)
    assert refusal(failure, ARGS, "") == f"{sentence} ({own_words(failure)})"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("No data / 画像がありません", "No data"),
        ("a path / with a slash", "a path / with a slash"),
        ("two\n  lines", "two lines"),
        ("x" * 400, "x" * 400),
        ("x" * 401, "x" * 400 + "..."),
    ],
)
def test_its_own_words_are_the_english_ones_on_one_line_of_readable_length(text, words):
    assert own_words(ValueError(text)) == words


def test_what_nobody_foresaw_is_told_in_the_trainers_words():
    words = "invalid literal for int() with base 10: 'abc'"
    assert refusal(raised(int, "abc"), ARGS, "") == STOP.format(words)


def test_variables_of_another_name_leave_the_trainers_own_words():
    def get_optimizer() -> None:
        _key, _value = "decouple".split("=")

    words = "not enough values to unpack (expected 2, got 1)"
    assert refusal(raised(get_optimizer), ARGS, "") == STOP.format(words)


PRESETS = {
    "missing": (
        None,
        "LyCORIS cannot read the preset of --network_args preset=my.toml algo=lora: correct its "
        "path or its text (Error: cannot read preset file. ",
    ),
    "a key that is none": (
        {"dora_wd": True},
        "the preset of --network_args preset=my.toml algo=lora has keys that LyCORIS refuses: "
        "remove them; dora_wd and the like are --network_args (Error: invalid preset content ",
    ),
}


@pytest.mark.parametrize("case", PRESETS)
def test_a_preset_that_lycoris_refuses_is_told_by_what_it_prints(case, tmp_path, capsys):
    content, sentence = PRESETS[case]
    path = tmp_path / "own.toml"
    if content is not None:
        path.write_text(toml.dumps(content))
    failure = raised(create_network, {"preset": str(path)})
    assert refusal(failure, ARGS, f"{capsys.readouterr().out}then\n").startswith(sentence)


# ---- What needs none of them ---------------------------------------------------------------------


def read_config_from_file(config_path: str) -> None:
    sys.exit(1)


LACKS = f"this Python ({sys.executable}) has no "
REFUSALS = [
    (
        SystemExit(2),
        argparse.Namespace(),
        "usage: it\nit: error: unrecognized arguments: --max_train_stepz=2\nmore\n",
        "sd-scripts refuses the options: correct them (unrecognized arguments: "
        "--max_train_stepz=2)",
    ),
    (
        raised(read_config_from_file, "gui.toml"),
        argparse.Namespace(),
        "reading\ngui.toml not found.\n",
        "--config_file gui.toml cannot be read: correct its path or its text (gui.toml not found.)",
    ),
    (
        SystemExit(1),
        ARGS,
        "it: error: an earlier one\ngui.toml not found.\n",
        "the training would stop: fix the cause given (SystemExit: gui.toml not found.)",
    ),
    # As blora_network ends.
    (SystemExit("error: with bypass_mode: remove it"), ARGS, "", "with bypass_mode: remove it"),
    # Packages, as they are imported.
    (
        raised(replace_unet_modules),
        ARGS,
        "",
        f"{LACKS}no_such_package: pip install no_such_package",
    ),
    (ModuleNotFoundError(name="lycoris"), ARGS, "", f"{LACKS}lycoris: pip install lycoris_lora"),
    (
        ModuleNotFoundError(name="torch"),
        argparse.Namespace(),
        "",
        f"{LACKS}torch: install kohya's requirements, or activate the environment that has them",
    ),
    (
        ModuleNotFoundError(name="blora_network"),
        argparse.Namespace(network_module="blora_network"),
        "",
        "Python does not find blora_network.py: copy it beside sdxl_train_network.py, or put its "
        "folder on PYTHONPATH, as the launchers do",
    ),
    *(
        (
            ModuleNotFoundError(name=name),
            argparse.Namespace(network_module=module),
            "",
            f"unknown --network_module={module}: correct it",
        )
        for name, module in (("nope", "nope.kohya"), ("lycoris.koyha", "lycoris.koyha"))
    ),
]


@pytest.mark.parametrize(("failure", "args", "printed", "sentence"), REFUSALS)
def test_an_end_or_a_lack_is_told_by_name_or_by_what_was_printed(failure, args, printed, sentence):
    assert refusal(failure, args, printed) == sentence


def test_what_only_the_rehearsal_lacks_is_no_refusal():
    assert is_of_the_rehearsal(raised(torch.empty(1, device="meta").item))
    moved = nn.Linear(2, 2, device="meta").to
    assert is_of_the_rehearsal(raised(moved, "cpu"))
    for words in ("abc", "no metadata / メタデータ", "D:/meta/metal.png", "metadata_cache.json"):
        assert not is_of_the_rehearsal(raised(int, words)), words


def test_a_training_without_pictures_ends_without_a_word_that_is_seen():
    assert ended_sentence("ERROR    No data found. Please verify") == (
        "the trainer finds no picture: put pictures into the folders of the dataset config, not "
        "into subfolders, or correct image_dir there"
    )
    assert ended_sentence("") == (
        "the trainer ends before its first step: remove the option that ends it early"
    )
