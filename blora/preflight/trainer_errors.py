"""What a trainer's exception means to the one who started the training, in one sentence.

The sentences are in trainer_errors.toml: each names the setting and says what to do, and the
trainer's own words follow in brackets. Any other exception gets those words alone.
"""

from __future__ import annotations

import re
import sys
import traceback
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from blora.preflight.report import one_line
from blora.text import first_few

ROWS = Path(__file__).with_suffix(".toml")
OTHERS = "the training would stop: fix the cause given"
INSTALLED_AS = {
    "lycoris": "lycoris_lora",
    "optimi": "torch-optimi",
    "prodigyplus": "prodigy-plus-schedule-free",
}


def frames(failure: BaseException) -> list[FrameType]:
    """The functions that an exception came through, the outermost first."""
    return [frame for frame, _ in traceback.walk_tb(failure.__traceback__)]


# sd-scripts says everything twice: "English / Japanese", "English / Japanese: value" or on two
# lines. A sentence in Japanese has kana in it.
IN_JAPANESE = re.compile(r"(?: / |\n)[^:\n]*[\u3040-\u30ff].*?(?:\s*: (?P<value>.*))?$", re.DOTALL)


def in_english(text: str) -> str:
    """The English half of a text in two languages, with the value that follows both."""
    if not (match := IN_JAPANESE.search(text.strip())):
        return text
    english, value = text.strip()[: match.start()], match["value"]
    return english if not value or value in english else f"{english.rstrip('.')}: {value}"


def own_words(failure: BaseException) -> str:
    """An exception's message on one line, in English; of a worker's, without its traceback."""
    text = str(failure).strip()
    if text.startswith("Caught ") and "Traceback" in text:
        text = text.rpartition("\n")[2]
    return one_line(in_english(text))


def names_of(failure: BaseException, args: Namespace) -> dict[str, Any]:
    """What a sentence can name: local variables, the innermost counting, and the options."""
    names = {name: v for frame in frames(failure) for name, v in frame.f_locals.items()}
    names |= {n: first_few(map(str, v)) for n, v in names.items() if isinstance(v, list)}
    items = ("network_args", "optimizer_args")  # as they are typed
    return names | {"args": args} | {n: " ".join(getattr(args, n, None) or []) for n in items}


def missing_packages(failure: BaseException | None) -> Iterator[str]:
    """Modules that Python did not find, also behind sd-scripts' own "No xformers"."""
    while failure:
        if isinstance(failure, ModuleNotFoundError) and failure.name:
            yield failure.name
        failure = failure.__cause__ or failure.__context__


def package_sentence(name: str, args: Namespace) -> str:
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
    if not vars(args):  # sd-scripts itself cannot be imported
        return f"{lacks}: install kohya's requirements, or activate the environment that has them"
    return f"{lacks}: pip install {INSTALLED_AS.get(name, name)}"


def row_sentence(failure: BaseException, words: str, args: Namespace) -> str:
    """The sentence of the first row that fits; `words` are the trainer's own."""
    import toml  # sd-scripts has it

    way = " > ".join(frame.f_code.co_name for frame in frames(failure))
    kind = type(failure).__name__
    for row in toml.loads(ROWS.read_text(encoding="utf-8"))["row"]:
        fits = all(
            getattr(args, name, None) == value for name, value in row.get("with", {}).items()
        )
        if fits and (match := re.search(row["pattern"], f"{way}: {kind}: {words}")):
            names = names_of(failure, args) | match.groupdict()
            try:
                sentence: str = row["sentence"].format_map(names)
                # What Python says of a None helps nobody who starts a training.
                return sentence if "NoneType" in words else f"{sentence} ({words})"
            except (KeyError, AttributeError):  # another release has other variables
                break
    return f"{OTHERS} ({kind}: {words})"


def exit_sentence(failure: SystemExit, args: Namespace, printed: str) -> str:
    """The sentence for a trainer that ended Python: the reason is what it printed last."""
    if isinstance(failure.code, str):
        return failure.code.removeprefix("error: ")  # as blora_network ends
    if not vars(args) and ": error: " in printed:  # argparse's
        words = printed.rpartition(": error: ")[2].splitlines()[0]
        return f"sd-scripts refuses the options: correct them ({words})"
    return row_sentence(failure, one_line(in_english(printed.strip().rpartition("\n")[2])), args)


def refusal(failure: BaseException, args: Namespace, printed: str) -> str:
    """The sentence for what the trainer raised; `printed` is what it printed before."""
    if isinstance(failure, SystemExit):
        return exit_sentence(failure, args, printed)
    packages = list(missing_packages(failure))
    if isinstance(failure, ImportError) and packages:
        return package_sentence(packages[-1], args)
    # LyCORIS prints what it has against a preset, and raises an AssertionError without words.
    errors = [line.strip() for line in printed.splitlines() if line.strip().startswith("Error")]
    return row_sentence(failure, own_words(failure) or "".join(errors[-1:]), args)


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
