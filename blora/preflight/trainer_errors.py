"""What a trainer's exception means to the one who started the training, in one sentence.

rehearsal.py catches it. The sentence names the setting and says what to do; the trainer's own
words follow in brackets. What is in no row here is told by those words alone.
"""

from __future__ import annotations

import argparse
import re
import sys
import traceback
from collections.abc import Iterator
from types import FrameType
from typing import Any

# An exception as the functions that it came through, its class and its words:
# "train > get_optimizer > __init__: TypeError: ...". The first row that is found in it counts.
# Names in {} are groups of the row, the trainer's options, or local variables of its functions.
REFUSALS = (
    # ---- The optimizer and its scheduler
    (
        r"get_optimizer.*: (ValueError: optimizer got an empty parameter list|IndexError)",
        "the network has nothing to train by --network_args {network_args} and "
        "--network_dim={args.network_dim}: correct the names in the preset, or the rank",
    ),
    (
        r"get_optimizer.*: TypeError: .*unexpected keyword argument '(?P<name>\w+)'",
        "--optimizer_type={args.optimizer_type} does not take {name}: give it --optimizer_args of "
        "its own, or --optimizer_args with nothing behind it",
    ),
    (
        r"get_optimizer[^:]*: (SyntaxError|ValueError: (not enough values|malformed node))",
        "--optimizer_args holds {arg}: write each one as NAME=VALUE, without spaces",
    ),
    (
        r"get_optimizer.*: AttributeError",
        "--optimizer_type={args.optimizer_type} is none: correct it",
    ),
    (
        r"(get_optimizer|try_optimizer).*:",
        "--optimizer_type={args.optimizer_type} refuses --optimizer_args {optimizer_args}, or its "
        "learning rate: correct them",
    ),
    (
        r"get_scheduler_fix.*: ValueError: .*does not require `num_warmup_steps`",
        "--lr_scheduler={args.lr_scheduler} has no warm-up: add --lr_warmup_steps=0",
    ),
    (
        r"get_scheduler_fix.*: ValueError: .*not a valid SchedulerType",
        "there is no --lr_scheduler={args.lr_scheduler}: use one of those in brackets",
    ),
    (
        r"get_scheduler_fix.*: AttributeError",
        "there is no --lr_scheduler_type={args.lr_scheduler_type}: correct it",
    ),
    (r"get_scheduler_fix.*:", "--lr_scheduler={args.lr_scheduler} cannot be made: correct it"),
    # ---- The network
    (
        r"create_network.*: KeyError: '(?P<name>[^']*)'",
        "--network_args holds algo={name}, which LyCORIS does not know: correct it",
    ),
    (
        r"create_network.*: AssertionError: Error: cannot read preset file",
        "LyCORIS cannot read the preset of --network_args {network_args}: correct its path or its "
        "text",
    ),
    (
        r"create_network.*: AssertionError: Error: invalid preset content",
        "the preset of --network_args {network_args} has keys that LyCORIS refuses: remove them; "
        "dora_wd and the like are --network_args",
    ),
    (
        r"create_network_from_weights.*: TypeError: expected str, bytes or os.PathLike object",
        "--dim_from_weights takes the ranks from --network_weights: add it",
    ),
    (
        r"create_network.*:",
        "{args.network_module} makes no network with --network_args {network_args}: correct them",
    ),
    (
        r"load_weights.*: (SafetensorError|FileNotFoundError|UnpicklingError)",
        "--network_weights={args.network_weights} cannot be read: correct it",
    ),
    (
        r"load_weights.*:",
        "--network_weights={args.network_weights} does not fit the network: use the "
        "--network_args and --network_dim that it was trained with, or add --dim_from_weights",
    ),
    (
        r"import_module: AttributeError",
        "there is no --network_module: add --network_module=lycoris.kohya",
    ),
    (
        r"> train: ValueError: (not enough|too many) values to unpack",
        "--network_args holds {net_arg}: write each one as NAME=VALUE",
    ),
    # ---- The dataset
    (
        r": AssertionError: datasets should not be an empty iterable",
        'the dataset config "{args.dataset_config}" has no [[datasets]]: add it, with its '
        "[[datasets.subsets]]",
    ),
    (
        r"make_bucket_resolutions: ZeroDivisionError",
        "max_bucket_reso is below bucket_reso_steps: raise it in the dataset config",
    ),
    (r"make_buckets: ZeroDivisionError", "batch_size is 0: give 1 in the dataset config"),
    (
        r": (TomlDecodeError|JSONDecodeError): ",
        'the dataset config "{args.dataset_config}" cannot be read: correct it',
    ),
    (
        r"(load_user_config|load).*: ValueError: .*not supported config file format",
        'the dataset config "{args.dataset_config}" is neither .toml nor .json: rename it',
    ),
    (
        r"read_caption.*: UnicodeDecodeError",
        'the caption "{cap_path}" is not UTF-8: save it as UTF-8',
    ),
    (
        r"read_caption.*: AssertionError: caption file is empty",
        'the caption "{cap_path}" is empty: write its words, or delete it',
    ),
    (
        r"AssertionError: min_bucket_reso must be",
        "the resolution, {resolution}, is below min_bucket_reso, {min_bucket_reso}: raise "
        "resolution in the dataset config, or add --min_bucket_reso",
    ),
    (
        r"AssertionError: max_bucket_reso must be",
        "the resolution, {resolution}, is above max_bucket_reso, {max_bucket_reso}: raise "
        "max_bucket_reso in the dataset config",
    ),
    (
        r"AssertionError: bucket_reso_steps is \d+\. it must be divisible by (?P<by>\d+)",
        "this sd-scripts wants --bucket_reso_steps to be divisible by {by}: add "
        "--bucket_reso_steps={by}, or update it",
    ),
    (
        r"AssertionError: when caching latents",
        "--cache_latents cannot be used with random_crop or color_aug, which change a picture each "
        "time: leave one of the two out, in the options and in {args.dataset_config}",
    ),
    (
        r"AssertionError: when caching Text Encoder output",
        "--cache_text_encoder_outputs cannot be used with shuffle_caption, token_warmup_step and "
        "dropout of captions, which change a caption each time: leave one of the two out, in the "
        "options and in {args.dataset_config}",
    ),
    (
        r"AssertionError: network for Text Encoder cannot be trained with caching",
        "--cache_text_encoder_outputs needs --network_train_unet_only: add it",
    ),
    (
        r": AssertionError: resolution is required",
        "{args.dataset_config} has no resolution: add one",
    ),
    # ---- The rest
    (
        r"load_tokenizers?\b.*:",
        "the tokenizers of SDXL are not on this machine and cannot be fetched: let it reach "
        "huggingface.co once, or give their folder as --tokenizer_cache_dir",
    ),
    (
        r": ValueError: persistent_workers option needs num_workers > 0",
        "--persistent_data_loader_workers cannot be used with --max_data_loader_n_workers=0: leave "
        "one of the two out",
    ),
    (r"load_vae.*:", "--vae={args.vae} cannot be loaded: correct it"),
    (
        r"load_models_from_sdxl_checkpoint.*: (RuntimeError|KeyError): ",
        "{args.pretrained_model_name_or_path} is not a whole SDXL checkpoint: give another",
    ),
)
NO_REFUSAL = "the training would stop: correct what the trainer names"
LONGEST = 400  # letters of the trainer's own words
INSTALLED_AS = {"lycoris": "lycoris_lora"}


def frames(failure: BaseException) -> list[FrameType]:
    """The functions that an exception came through, the outermost first."""
    return [frame for frame, _ in traceback.walk_tb(failure.__traceback__)]


def shorten(text: str) -> str:
    """A text on one line, of a length that can be read."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}..."


def in_english(text: str) -> str:
    """The first half of what sd-scripts says in two languages: Japanese stands behind " / "."""
    return text.split(" / ")[0] if re.search(r" / .*[^\x00-\x7f]", text) else text


def own_words(failure: BaseException) -> str:
    """An exception's message on one line, in English."""
    return in_english(shorten(str(failure)))


def described(failure: BaseException, said: str) -> str:
    """An exception as the rows of REFUSALS know it."""
    way = " > ".join(frame.f_code.co_name for frame in frames(failure))
    return f"{way}: {type(failure).__name__}: {said}"


def local_names(failure: BaseException) -> dict[str, Any]:
    """The local variables of the functions it came through; those of the innermost count."""
    names: dict[str, Any] = {}
    for frame in frames(failure):
        names |= frame.f_locals
    return names


def joined(args: argparse.Namespace | None) -> dict[str, Any]:
    """The options, and the NAME=VALUE items among them as they are typed."""
    items = ("network_args", "optimizer_args")
    return {"args": args} | {name: " ".join(getattr(args, name, None) or []) for name in items}


def missing_packages(failure: BaseException) -> Iterator[str]:
    """Modules that were not found: sd-scripts says "No xformers" while handling that."""
    while failure:
        if isinstance(failure, ModuleNotFoundError) and failure.name:
            yield failure.name
        failure = failure.__cause__ or failure.__context__


def package_sentence(name: str, args: argparse.Namespace | None) -> str:
    """What to do about a module that Python does not find."""
    module = getattr(args, "network_module", None) or ""
    if name == "blora_network":
        return (
            "Python does not find blora_network.py: copy it beside sdxl_train_network.py, or put "
            "its folder on PYTHONPATH, as the launchers do"
        )
    if name == module or (name != "lycoris" and name == module.split(".")[0]):
        return f"there is no --network_module={args.network_module}: correct it"
    name = name.split(".")[0]
    lacks = f"this Python ({sys.executable}) has no {name}"
    if args is None:  # sd-scripts itself cannot be imported
        return f"{lacks}: install kohya's requirements, or activate the environment that has them"
    return f"{lacks}: pip install {INSTALLED_AS.get(name, name)}"


def place(path: list[str | int]) -> str:
    """Where in a dataset config a setting is: "image_dir in [[datasets.subsets]] 2"."""
    *tables, name = path
    names = ".".join(str(part) for part in tables if isinstance(part, str))
    numbers = [part + 1 for part in tables if isinstance(part, int)]
    if not names:
        return f"{name}"
    return f"{name} in " + (f"[[{names}]] {numbers[-1]}" if numbers else f"[{names}]")


def config_sentence(failure: Any, args: argparse.Namespace) -> str:
    """What sd-scripts' schema has against a dataset config; `failure` is voluptuous' own."""
    mistakes = []
    for error in failure.errors:
        where, said = place([getattr(part, "schema", part) for part in error.path]), str(error.msg)
        if said.startswith("extra keys"):
            mistakes.append(f"there is no setting {where}")
        elif said.startswith("required key"):
            mistakes.append(f"there must be {where}")
        else:
            mistakes.append(f"{where} has a value of the wrong kind ({said})")
    return (
        f'the dataset config "{args.dataset_config}" is not valid for sd-scripts: '
        f"{', and '.join(mistakes)}: correct it"
    )


def usage_sentence(printed: str) -> str:
    """argparse's own words, of the last line that it printed."""
    said = [line.partition(": error: ")[2] for line in printed.splitlines() if ": error: " in line]
    text = said[-1] if said else " ".join(printed.split())[-200:]
    return f"sd-scripts refuses the options: correct them ({text})"


def last_error(printed: str) -> str:
    """What LyCORIS prints of a preset before it raises an AssertionError without words."""
    lines = [line.strip() for line in printed.splitlines()]
    return next((line for line in reversed(lines) if line.startswith("Error")), "")


def refusal(failure: BaseException, args: argparse.Namespace | None, printed: str) -> str:
    """The sentence for what the trainer raised; `printed` is what it said before."""
    if isinstance(failure, SystemExit) and isinstance(failure.code, str):
        return failure.code.removeprefix("error: ")  # as blora_network ends
    if isinstance(failure, SystemExit):
        return usage_sentence(printed) if args is None else f"{NO_REFUSAL} ({failure})"
    packages = list(missing_packages(failure))
    if isinstance(failure, ImportError) and packages:
        return package_sentence(packages[-1], args)
    if type(failure).__name__ == "MultipleInvalid":
        return config_sentence(failure, args)
    said = own_words(failure) or last_error(printed)
    for pattern, sentence in REFUSALS:
        if found := re.search(pattern, described(failure, said)):
            known = local_names(failure) | joined(args) | found.groupdict()
            try:
                return f"{sentence.format_map(known)} ({said})"
            except (KeyError, AttributeError):  # another release calls its variables otherwise
                break
    return f"{NO_REFUSAL} ({type(failure).__name__}: {said})"


def is_of_the_rehearsal(failure: BaseException) -> bool:
    """Whether it failed because the rehearsal's tensors have no numbers, as no training's do."""
    return bool(re.search(r"\bmeta (tensor|device)|device.{0,12}\bmeta\b", own_words(failure)))


def ended_sentence(printed: str) -> str:
    """Why train() came back before its first step."""
    if "No data found" in printed:
        return (
            "the trainer finds no picture: put pictures into the folders of the dataset config, "
            "not into subfolders, or correct image_dir there"
        )
    return "the trainer ends before its first step: leave out the option that asks for that"
