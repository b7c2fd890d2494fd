"""What every program needs: the one error type, escaped text, numbers as text, a progress bar, a
file that is written whole or not at all.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

MAX_LISTED = 3  # keys that a message lists, of any number
LONGEST_TEXT = 200  # characters of one


class BloraError(Exception):
    """A mistake the user can fix; the message is one sentence that says how."""


def printable(text: str) -> str:
    """`text` with everything that could move a terminal's cursor written as an escape."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shortened(text: str) -> str:
    """`text`, escaped, and cut off where it is long."""
    return printable(text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}...")


def first_few(keys: Iterable[str]) -> str:
    """Some of many keys, escaped: "a, b, c and 7 more"."""
    keys = [*keys]
    more = len(keys) - MAX_LISTED
    return ", ".join(map(shortened, keys[:MAX_LISTED])) + (f" and {more} more" if more > 0 else "")


def listed(keys: Collection[str]) -> str:
    """Keys at the end of a sentence, counted: "(10): a, b, c and 7 more"."""
    return f"({len(keys)}): {first_few(keys)}"


def span(values: Iterable[float | None]) -> str:
    """Numbers as text: "4", or "4 to 8" where they differ, "-" where there are none."""
    known = sorted({value for value in values if value is not None})
    return " to ".join(f"{value:g}" for value in dict.fromkeys(known[:1] + known[-1:])) or "-"


def number_text(number: float) -> str:
    """A weight with the digits that fp32 has: "1", "0.3"; -0 is "0"."""
    return f"{number + 0.0:.9g}"


def counted(number: int, one: str, more: str = "") -> str:
    """A number of things: "1 batch", "2 epochs"."""
    return f"{number} {one}" if number == 1 else f"{number} {more or one + 's'}"


def file_size(size: float) -> str:
    """Bytes as text: "56.4 MB", "1.80 GB"."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


@contextmanager
def written_whole(output: Path) -> Iterator[Path]:
    """A temporary file to write, which is then renamed to `output`; on an error it is removed.

    Where `output` is a link, its target is replaced. BloraError where it cannot be written.
    """
    target = Path(os.path.realpath(output)) if output.is_symlink() else output
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb+") as file:  # the bytes before the name, whatever the system is doing
            os.fsync(file.fileno())
        part.replace(target)
    except OSError as error:
        raise BloraError(f"cannot write {output} ({error})") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def escape_unencodable() -> None:
    """Let stdout and stderr escape what their encoding lacks: a console may lack a path's letter.

    Whatever else took their place, such as None under pythonw, stays as it is.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def progress_bar(total: int, **options: Any) -> Iterator[Callable[[int], object]]:
    """A bar on stderr, once that takes more than a second, and what moves it on.

    Without tqdm there is none: nothing else needs that package.
    """
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        yield lambda _: None
        return
    with tqdm(total=total, delay=1, leave=False, **options) as bar:
        yield bar.update


def say(sentence: str) -> None:
    """Print a message to stderr, on one line, escaped."""
    print(printable(sentence), file=sys.stderr)
