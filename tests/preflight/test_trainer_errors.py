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
    optimizer_args=["eps=-1"],
    network_args=["preset=my.toml"],
    network_dim=4,
    lr_scheduler="constant",
    network_module="lycoris.kohya",
    network_weights="before.safetensors",
    dataset_config="my/config.toml",
    pretrained_model_name_or_path="sdxl.safetensors",
    vae=None,
)
NOT_READ = argparse.Namespace()  # by sd-scripts
MATRIX = nn.Parameter(torch.ones(2, 2))


def raised(function: Callable[..., object], *given: object) -> BaseException:
    """The exception of a function, with the way it came."""
    try:
        function(*given)
    except (Exception, SystemExit) as failure:
        return failure
    raise AssertionError("nothing was raised")


def said(function: Callable[..., object], *given: object, printed: str = "") -> str:
    return refusal(raised(function, *given), ARGS, printed)


# ---- As sd-scripts calls them --------------------------------------------------------------------


def get_optimizer(args: list[str]) -> object:
    """--optimizer_args as train_util.get_optimizer reads them."""
    options = {}
    for arg in args:
        key, value = arg.split("=")
        options[key] = ast.literal_eval(value)
    return prodigyopt.Prodigy([MATRIX], **options)


def get_scheduler_fix(name: str) -> object:
    optimizer = torch.optim.AdamW([MATRIX])
    return transformers_scheduler(name, optimizer)


def train(args: list[str]) -> None:
    for net_arg in args:
        _key, _value = net_arg.split("=", 1)


class Transformer2DModel(nn.Module):
    """A class that LyCORIS' presets name."""

    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(4, 4)


def create_network(**options: str) -> object:
    unet, text = nn.Module(), nn.Module()
    unet.block = Transformer2DModel()
    return lycoris.kohya.create_network(1.0, 4, 4, None, text, unet, **options)


def loader() -> object:
    return torch.utils.data.DataLoader([1], num_workers=0, persistent_workers=True)


# ---- The sentences -------------------------------------------------------------------------------

OPTIMIZERS = {
    "an argument of another": (
        ["foo=1"],
        "--optimizer_type=prodigy does not take foo: give it --optimizer_args of its own, or "
        "--optimizer_args left empty (",
    ),
    "no =": (["decouple"], "--optimizer_args has decouple: write each one as NAME=VALUE, "),
    "split at a blank": (["betas=(0.9,"], "--optimizer_args has betas=(0.9,: write each one as "),
    "a word": (["betas=high"], "--optimizer_args has betas=high: write each one as NAME=VALUE, "),
    "a value that it refuses": (
        ["eps=-1"],
        "--optimizer_type=prodigy refuses --optimizer_args eps=-1, or its learning rate: correct "
        "them (Invalid epsilon value: -1)",
    ),
}


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_what_an_optimizer_refuses_is_told_by_its_argument(case):
    args, sentence = OPTIMIZERS[case]
    assert said(get_optimizer, args).startswith(sentence)


def test_a_scheduler_that_is_none_is_told_with_those_there_are():
    text = said(get_scheduler_fix, "cosin")
    assert text.startswith("--lr_scheduler=constant cannot be created: correct it (")
    assert "'linear', 'cosine'" in text


NETWORKS = {
    "an algo that is none": (
        {"algo": "dora"},
        "--network_args has algo=dora, which LyCORIS does not know: correct it ('dora')",
    ),
    "a word for a number": (
        {"conv_dim": "x"},
        "lycoris.kohya cannot build a network from --network_args preset=my.toml: correct them "
        "(invalid literal for int() with base 10: 'x')",
    ),
}


@pytest.mark.parametrize("case", NETWORKS)
def test_what_lycoris_refuses_is_told_by_the_network_args(case):
    options, sentence = NETWORKS[case]
    assert refusal(raised(lambda: create_network(**options)), ARGS, "") == sentence


PRESETS = {
    "missing": (
        None,
        "LyCORIS cannot read the preset of --network_args preset=my.toml: correct its path or its "
        "text (Error: cannot read preset file. ",
    ),
    "a key that is none": (
        {"dora_wd": True},
        "the preset of --network_args preset=my.toml has keys that LyCORIS refuses: remove them; "
        "dora_wd and the like are --network_args (Error: invalid preset content ",
    ),
}


@pytest.mark.parametrize("case", PRESETS)
def test_a_preset_that_lycoris_refuses_is_told_by_what_it_prints(case, tmp_path, capsys):
    content, sentence = PRESETS[case]
    path = tmp_path / "own.toml"
    if content is not None:
        path.write_text(toml.dumps(content))
    failure = raised(lambda: create_network(preset=str(path)))
    assert refusal(failure, ARGS, capsys.readouterr().out).startswith(sentence)


def test_a_network_argument_without_a_value_is_named():
    assert said(train, ["preset=x", "dora_wd"]).startswith(
        "--network_args has dora_wd: write each one as NAME=VALUE ("
    )


def test_workers_that_stay_need_workers():
    assert said(loader) == (
        "--persistent_data_loader_workers cannot be used with --max_data_loader_n_workers=0: "
        "remove one of the two (persistent_workers option needs num_workers > 0)"
    )


def test_a_network_without_modules_is_told_by_its_preset_and_rank():
    def get_optimizer() -> None:
        torch.optim.AdamW([])

    assert said(get_optimizer).startswith(
        "the network has nothing to train by --network_args preset=my.toml and --network_dim=4: "
        "correct the names in the preset, or the rank ("
    )


SUBSET = {voluptuous.Required("image_dir"): str, "num_repeats": int}
SCHEMA = voluptuous.Schema(
    {"general": {"keep_tokens": int}, "datasets": [{"resolution": int, "subsets": [SUBSET]}]}
)


@pytest.mark.parametrize(
    ("config", "place"),
    [
        ({"datasets": [{"foo": 1}]}, "extra keys not allowed @ data['datasets'][0]['foo']"),
        (
            {"datasets": [{"subsets": [{}]}]},
            "required key not provided @ data['datasets'][0]['subsets'][0]['image_dir']",
        ),
    ],
)
def test_a_dataset_config_is_refused_by_the_place_of_the_mistake(config, place):
    assert said(SCHEMA, config) == (
        f'the dataset config "my/config.toml" is not valid for sd-scripts: correct it ({place})'
    )


@pytest.mark.parametrize("reader", [toml.loads, json.loads])
def test_a_dataset_config_that_cannot_be_read_is_named(reader):
    def load_user_config() -> None:
        reader("x = = 1")

    sentence = 'the dataset config "my/config.toml" cannot be read: correct it ('
    assert said(load_user_config).startswith(sentence)


# ---- What sd-scripts itself says, in its own words -----------------------------------------------


def read_caption(cap_path: str, text: bytes) -> str:
    """As sd-scripts reads a caption."""
    lines = text.decode().splitlines()
    assert len(lines) > 0, f"caption file is empty / キャプションファイルが空です: {cap_path}"
    return lines[0]


CAPTIONS = {
    b"": 'the caption "a.txt" is empty: write its words, or delete it (caption file is empty)',
    b"caf\xe9": 'the caption "a.txt" is not UTF-8: save it as UTF-8 (',
}


@pytest.mark.parametrize("text", CAPTIONS)
def test_a_caption_that_cannot_be_read_is_named(text):
    assert said(read_caption, "a.txt", text).startswith(CAPTIONS[text])


WORDS = {
    "No data / 画像がありません": "No data",
    "a path / with a slash": "a path / with a slash",
    "two\n  lines": "two lines",
}


@pytest.mark.parametrize("text", WORDS)
def test_of_two_languages_the_english_words_are_told(text):
    assert own_words(ValueError(text)) == WORDS[text]


def test_variables_of_another_name_leave_the_trainers_own_words():
    def get_optimizer() -> None:
        _key, _value = "decouple".split("=")

    assert said(get_optimizer).startswith(
        "the training would stop: fix the cause given (ValueError: not enough values"
    )


def test_an_optimizer_that_fails_at_its_step_is_told_as_one():
    def state_per_byte() -> None:
        torch.optim.LBFGS([MATRIX]).step()

    assert said(state_per_byte).startswith(
        "--optimizer_type=prodigy refuses --optimizer_args eps=-1"
    )


def test_a_vae_that_cannot_be_loaded_is_not_taken_for_the_checkpoint():
    def load_vae() -> None:
        raise KeyError("encoder.conv_in.weight")

    def load_target_model() -> None:
        load_vae()

    assert said(load_target_model) == (
        "--vae=None cannot be loaded: correct it ('encoder.conv_in.weight')"
    )


def test_words_without_end_are_cut():
    assert own_words(ValueError("x" * 1000)) == "x" * 400 + "..."


def load_tokenizers() -> None:
    raise OSError("Can't load tokenizer for 'openai/clip-vit-large-patch14'.")


def test_tokenizers_that_are_not_there_need_the_internet_once():
    assert said(load_tokenizers) == (
        "SDXL's tokenizers are not on this machine and cannot be downloaded: connect to "
        "huggingface.co once, or give their folder as --tokenizer_cache_dir (Can't load tokenizer "
        "for 'openai/clip-vit-large-patch14'.)"
    )


# ---- Packages ------------------------------------------------------------------------------------


def replace_unet_modules() -> None:
    """As sd-scripts looks for a package."""
    try:
        importlib.import_module("no_such_package.ops")
    except ImportError:
        raise ImportError("No xformers / xformersがインストールされていないようです") from None


def test_a_package_that_is_missing_is_named_as_it_is_imported():
    assert said(replace_unet_modules) == (
        f"this Python ({sys.executable}) has no no_such_package: pip install no_such_package"
    )


def test_lycoris_is_installed_by_another_name():
    failure = ModuleNotFoundError("No module", name="lycoris")
    assert refusal(failure, ARGS, "").endswith("has no lycoris: pip install lycoris_lora")


def test_without_what_sd_scripts_imports_kohyas_requirements_are_missing():
    assert refusal(ModuleNotFoundError("No module", name="torch"), NOT_READ, "") == (
        f"this Python ({sys.executable}) has no torch: install kohya's requirements, or activate "
        "the environment that has them"
    )


NETWORK_MODULES = {
    "blora_network": "Python does not find blora_network.py: copy it beside sdxl_train_network.py, "
    "or put its folder on PYTHONPATH, as the launchers do",
    "nope": "unknown --network_module=nope.kohya: correct it",
    "lycoris.koyha": "unknown --network_module=lycoris.koyha: correct it",
}


@pytest.mark.parametrize("module", NETWORK_MODULES)
def test_a_network_module_that_is_missing_is_named(module):
    args = argparse.Namespace(network_module="nope.kohya" if module == "nope" else module)
    failure = ModuleNotFoundError("No module", name=module)
    assert refusal(failure, args, "") == NETWORK_MODULES[module]


# ---- The rest ------------------------------------------------------------------------------------


def test_an_option_that_is_none_is_told_in_argparses_words(capsys):
    parser = argparse.ArgumentParser(prog="sdxl_train_network.py")
    failure = raised(parser.parse_args, ["--max_train_stepz=2"])
    assert refusal(failure, NOT_READ, capsys.readouterr().err) == (
        "sd-scripts refuses the options: correct them (unrecognized arguments: --max_train_stepz=2)"
    )


def test_an_end_without_words_is_told_by_the_last_line_that_was_printed():
    def read_config_from_file(config_path: str) -> None:
        sys.exit(1)

    printed = "reading\ngui.toml not found.\n"
    assert refusal(raised(read_config_from_file, "gui.toml"), NOT_READ, printed) == (
        "--config_file gui.toml cannot be read: correct its path or its text (gui.toml not found.)"
    )
    assert refusal(SystemExit(1), ARGS, printed) == (
        "the training would stop: fix the cause given (SystemExit: gui.toml not found.)"
    )


def test_what_blora_network_ends_with_is_a_sentence_already():
    assert refusal(SystemExit("error: with bypass_mode: remove it"), ARGS, "") == (
        "with bypass_mode: remove it"
    )


def test_what_nobody_foresaw_is_told_in_the_trainers_words():
    assert said(int, "abc") == (
        "the training would stop: fix the cause given (ValueError: invalid "
        "literal for int() with base 10: 'abc')"
    )


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
