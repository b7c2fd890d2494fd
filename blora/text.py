"""What all programs of the bundle do alike: the one error type, escaped text, numbers in words, and
a file that is written whole or not at all.

The lowest room: every other blora file may import it, and it imports none of them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NAMED = 3  # how many of many keys a message names
LONGEST_NAME = 200  # letters of each


class BloraError(Exception):
    """A mistake the user can fix; the message is one sentence that says how."""


def printable(text: str) -> str:
    """`text` with everything that could move a terminal's cursor written as an escape."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def first_few(keys: Iterable[str]) -> str:
    """Some of many keys, escaped: "a, b, c and 7 more"."""
    keys = [key if len(key) <= LONGEST_NAME else f"{key[:LONGEST_NAME]}..." for key in keys]
    keys = [printable(key) for key in keys]
    more = len(keys) - NAMED
    return ", ".join(keys[:NAMED]) + (f" and {more} more" if more > 0 else "")


def span(values: Iterable[float | None]) -> str:
    """Numbers in words: "4", or "4 to 8" where they differ, "-" where there are none."""
    known = sorted({value for value in values if value is not None})
    return " to ".join(f"{value:g}" for value in dict.fromkeys(known[:1] + known[-1:])) or "-"


def counted(number: int, one: str, more: str = "") -> str:
    """A number of things in words: "1 batch", "2 epochs"."""
    return f"{number} {one}" if number == 1 else f"{number} {more or one + 's'}"


def file_size(size: float) -> str:
    """Bytes in words: "56.4 MB", "1.80 GB"."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


@contextmanager
def written_whole(output: Path) -> Iterator[Path]:
    """The file to write, beside its final name, to which it is then moved: no half file is there.

    BloraError where it cannot be written.
    """
    part = output.with_name(f".{output.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(output)
    except OSError as error:
        raise BloraError(f"cannot write {output} ({error})") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def say(sentence: str) -> None:
    """Print what is not a result: it goes to stderr, on one line, escaped."""
    print(printable(sentence), file=sys.stderr)
