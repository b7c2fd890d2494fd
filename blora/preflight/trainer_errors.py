"""What a trainer's exception means to the one who started the training, in one sentence.

The sentence names the setting and says what to do; the trainer's own words follow in brackets. An
exception of no row here gets those words alone.
"""

from __future__ import annotations

import re
import sys
import traceback
from argparse import Namespace
from collections.abc import Iterator
from types import FrameType
from typing import Any

from blora.preflight.report import one_line

# An exception as the functions that it came through, its class and its words:
# "train > get_optimizer > __init__: TypeError: ...". The first row that is found in it counts.
# Names in {} are groups of the row, the trainer's options, or local variables of its functions.
REFUSALS = (
    # ---- The options
    (
        r"read_config_from_file.*: ",
        "--config_file cannot be read: correct its path or its text",
    ),
    # ---- The optimizer and its scheduler
    (
        r"get_optimizer.*: (ValueError: optimizer got an empty parameter list|IndexError)",
        "the network has nothing to train by --network_args {network_args} and "
        "--network_dim={args.network_dim}: correct the names in the preset, or the rank",
    ),
    (
        r"get_optimizer.*: TypeError: .*unexpected keyword argument '(?P<name>\w+)'",
        "--optimizer_type={args.optimizer_type} does not take {name}: give it --optimizer_args of "
        "its own, or --optimizer_args left empty",
    ),
    (
        r"get_optimizer[^:]*: (SyntaxError|ValueError: (not enough values|malformed node))",
        "--optimizer_args has {arg}: write each one as NAME=VALUE, without spaces",
    ),
    (
        r"get_optimizer.*: AttributeError",
        "unknown --optimizer_type={args.optimizer_type}: correct it",
    ),
    (
        r"(get_optimizer|state_per_byte).*:",
        "--optimizer_type={args.optimizer_type} refuses --optimizer_args {optimizer_args}, or its "
        "learning rate: correct them",
    ),
    (
        r"get_scheduler_fix.*: ValueError: .*does not require `num_warmup_steps`",
        "--lr_scheduler={args.lr_scheduler} has no warm-up: add --lr_warmup_steps=0",
    ),
    (
        r"get_scheduler_fix.*: AttributeError",
        "unknown --lr_scheduler_type={args.lr_scheduler_type}: correct it",
    ),
    (r"get_scheduler_fix.*:", "--lr_scheduler={args.lr_scheduler} cannot be created: correct it"),
    # ---- The network
    (
        r"create_network.*: KeyError: '(?P<name>[^']*)'",
        "--network_args has algo={name}, which LyCORIS does not know: correct it",
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
        "{args.network_module} cannot build a network from --network_args {network_args}: correct "
        "them",
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
        "no --network_module is given: add --network_module=lycoris.kohya",
    ),
    (
        r"> train: ValueError: (not enough|too many) values to unpack",
        "--network_args has {net_arg}: write each one as NAME=VALUE",
    ),
    # ---- The dataset
    (
        r"make_bucket_resolutions: ZeroDivisionError",
        "max_bucket_reso is below bucket_reso_steps: raise it in the dataset config",
    ),
    (r"make_buckets: ZeroDivisionError", "batch_size is 0: give 1 in the dataset config"),
    (
        r"load_user_config.*: (TomlDecodeError|JSONDecodeError|UnicodeDecodeError): ",
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
        r"AssertionError: bucket_reso_steps is \d+\. it must be divisible by (?P<by>\d+)",
        "this sd-scripts wants --bucket_reso_steps to be divisible by {by}: add "
        "--bucket_reso_steps={by}, or update it",
    ),
    # ---- The rest
    (
        r"load_tokenizers?\b.*:",
        "SDXL's tokenizers are not on this machine and cannot be downloaded: connect to "
        "huggingface.co once, or give their folder as --tokenizer_cache_dir",
    ),
    (
        r": ValueError: persistent_workers option needs num_workers > 0",
        "--persistent_data_loader_workers cannot be used with --max_data_loader_n_workers=0: "
        "remove one of the two",
    ),
    (r"load_vae.*:", "--vae={args.vae} cannot be loaded: correct it"),
    (
        r"load_models_from_sdxl_checkpoint.*: (RuntimeError|KeyError|ValueError): ",
        '"{args.pretrained_model_name_or_path}" is not a whole SDXL checkpoint: download it again, '
        "or give another",
    ),
)
OTHERS = "the training would stop: fix the cause given"
INSTALLED_AS = {"lycoris": "lycoris_lora"}


def frames(failure: BaseException) -> list[FrameType]:
    """The functions that an exception came through, the outermost first."""
    return [frame for frame, _ in traceback.walk_tb(failure.__traceback__)]


def in_english(text: str) -> str:
    """The English half of a text in two languages: sd-scripts puts Japanese behind " / "."""
    return text.split(" / ")[0] if re.search(r" / .*[^\x00-\x7f]", text) else text


def own_words(failure: BaseException) -> str:
    """An exception's message on one line, in English."""
    return in_english(one_line(str(failure)))


def described(failure: BaseException, words: str) -> str:
    """An exception as the rows of REFUSALS know it."""
    way = " > ".join(frame.f_code.co_name for frame in frames(failure))
    return f"{way}: {type(failure).__name__}: {words}"


def local_names(failure: BaseException) -> dict[str, Any]:
    """The local variables of the functions it came through; those of the innermost count."""
    names: dict[str, Any] = {}
    for frame in frames(failure):
        names |= frame.f_locals
    return names


def joined(args: Namespace | None) -> dict[str, Any]:
    """The options, and the NAME=VALUE items among them as they are typed."""
    items = ("network_args", "optimizer_args")
    return {"args": args} | {name: " ".join(getattr(args, name, None) or []) for name in items}


def missing_packages(failure: BaseException) -> Iterator[str]:
    """Modules that Python did not find, also behind sd-scripts' own "No xformers"."""
    while failure:
        if isinstance(failure, ModuleNotFoundError) and failure.name:
            yield failure.name
        failure = failure.__cause__ or failure.__context__


def package_sentence(name: str, args: Namespace | None) -> str:
    """What to do about a module that Python does not find."""
    module = getattr(args, "network_module", None) or ""
    if name == "blora_network":
        return (
            "Python does not find blora_network.py: copy it beside sdxl_train_network.py, or put "
            "its folder on PYTHONPATH, as the launchers do"
        )
    if name == module or (name != "lycoris" and name == module.split(".")[0]):
        return f"unknown --network_module={args.network_module}: correct it"
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


def config_sentence(failure: Any, args: Namespace) -> str:
    """What sd-scripts' schema refuses in a dataset config; `failure` is voluptuous' own."""
    mistakes = []
    for error in failure.errors:
        where = place([getattr(part, "schema", part) for part in error.path])
        words = str(error.msg)
        if words.startswith("extra keys"):
            mistakes.append(f"unknown setting {where}")
        elif words.startswith("required key"):
            mistakes.append(f"missing {where}")
        else:
            mistakes.append(f"{where} has a value of the wrong kind ({words})")
    return (
        f'the dataset config "{args.dataset_config}" is not valid for sd-scripts: '
        f"{', and '.join(mistakes)}: correct it"
    )


def usage_sentence(printed: str) -> str:
    """argparse's own words, of the last line that it printed."""
    text = printed.rpartition(": error: ")[2].splitlines()[0]
    return f"sd-scripts refuses the options: correct them ({text})"


def last_error(printed: str) -> str:
    """What LyCORIS prints of a preset before it raises an AssertionError without words."""
    lines = [line.strip() for line in printed.splitlines()]
    return next((line for line in reversed(lines) if line.startswith("Error")), "")


def row_sentence(failure: BaseException, words: str, args: Namespace | None) -> str:
    """The sentence of the first row that fits; `words` are the trainer's own."""
    for pattern, sentence in REFUSALS:
        if match := re.search(pattern, described(failure, words)):
            names = local_names(failure) | joined(args) | match.groupdict()
            try:
                return f"{sentence.format_map(names)} ({words})"
            except (KeyError, AttributeError):  # another release has other variables
                break
    return f"{OTHERS} ({type(failure).__name__}: {words})"


def exit_sentence(failure: SystemExit, args: Namespace | None, printed: str) -> str:
    """The sentence for a trainer that ended Python: the reason is what it printed last."""
    if isinstance(failure.code, str):
        return failure.code.removeprefix("error: ")  # as blora_network ends
    if args is None and ": error: " in printed:
        return usage_sentence(printed)
    return row_sentence(failure, one_line(printed.strip().rpartition("\n")[2]), args)


def refusal(failure: BaseException, args: Namespace | None, printed: str) -> str:
    """The sentence for what the trainer raised; `printed` is what it printed before."""
    if isinstance(failure, SystemExit):
        return exit_sentence(failure, args, printed)
    packages = list(missing_packages(failure))
    if isinstance(failure, ImportError) and packages:
        return package_sentence(packages[-1], args)
    if type(failure).__name__ == "MultipleInvalid":
        return config_sentence(failure, args)
    return row_sentence(failure, own_words(failure) or last_error(printed), args)


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
    return "the trainer ends before its first step: remove the option that ends it early"
