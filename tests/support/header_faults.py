"""Safetensors files for hypothesis: sound headers, and the same with a few faults in them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from copy import deepcopy

import pytest
from broken_files import raw, tensor
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize


class Pairs(list):
    """A JSON object as pairs, so that a key can stand in it twice."""


class Token(str):
    """A piece of JSON as it is written, whether or not JSON has it."""


def as_json(value: object) -> str:
    """The JSON of a value that may hold pairs and tokens."""
    if isinstance(value, Token):
        return value
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{as_json(key)}: {as_json(item)}" for key, item in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_json, value)) + "]"
    return json.dumps(value)


def library_types() -> list[str]:
    """Every type of the installed safetensors, which lists them where it refuses another."""
    with pytest.raises(SafetensorError) as refused:
        deserialize(raw({"a": tensor("none")}, bytes(4)))
    return re.findall(r"`([A-Z]\w+)`", str(refused.value))


TYPES = library_types()
BITS = {name: int(re.search(r"\d+", name)[0]) if name != "BOOL" else 8 for name in TYPES}
WRONG_TYPES = ["f32", "F31", "", "FLOAT", "F32 "]
NUMBERS = [
    0, 1, 2, 3, 4, 8, -1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30,
    *map(Token, ("-0", "0.0", "4.0", "4e0", "4E+0", "0.5", "1e400", "00", "+4", "0x4", "NaN")),
    *map(Token, ("Infinity", "-Infinity", "-", "4.", ".5", "1" * 5000)),
]  # fmt: skip
OTHERS = [
    None, True, False, "", "4", "F32", [], [0], [[0]], Pairs(), Pairs([("a", "b")]),
    *(Token("[" * depth + "]" * depth) for depth in (100, 200)),
    *map(Token, ('"\\ud83d\\ude00"', '"\\x41"', '"a\nb"', "'a'", "nul")),
    *map(Token, ("//", "{,}", "[1,]", '{"a" 1}', '{"a": 1,}', "{1: 2}", '"')),
]  # fmt: skip
FIELDS = ["dtype", "shape", "data_offsets"]
# Copied, as further faults may be put into a list.
anything = (st.sampled_from(NUMBERS) | st.sampled_from(OTHERS)).map(deepcopy)
names = st.sampled_from(["a", "b", "", "é", "\u2028", "alpha", *FIELDS]) | st.text(max_size=3)


@st.composite
def sound_headers(draw, keys: list[str]) -> tuple[Pairs, int]:
    """A header that is right, in any order of its tensors, and how many bytes they take."""
    end, tensors = 0, []
    for name in draw(st.lists(st.sampled_from(keys) | names, max_size=4, unique=True)):
        dtype = draw(st.sampled_from(TYPES))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        if (BITS[dtype] * math.prod(shape)) % 8:
            shape.append(8)
        size = BITS[dtype] * math.prod(shape) // 8
        fields = [("dtype", dtype), ("shape", shape), ("data_offsets", [end, end + size])]
        tensors.append((name, Pairs(draw(st.permutations(fields)))))
        end += size
    header = Pairs(draw(st.permutations(tensors)))
    if draw(st.booleans()):
        metadata = draw(st.dictionaries(names, st.text(max_size=3), max_size=3))
        header.insert(0, ("__metadata__", Pairs(metadata.items())))
    return header, end


def a_pair(draw, pairs: Pairs) -> int:
    """The index of one of the pairs; a new one where there is none."""
    if not pairs:
        pairs.append(("a", Pairs()))
    return draw(st.integers(0, len(pairs) - 1))


def other_value(draw, pairs: Pairs) -> None:
    """One value becomes anything, from a number off by one to no JSON at all."""
    at = a_pair(draw, pairs)
    key, value = pairs[at]
    if isinstance(value, Pairs) and draw(st.integers(0, 4)):
        other_value(draw, value)
    elif type(value) is list and value and draw(st.integers(0, 4)):
        index = draw(st.integers(0, len(value) - 1))
        if isinstance(value[index], int) and draw(st.booleans()):
            value[index] += draw(st.sampled_from([-8, -1, 1, 8]))
        else:
            value[index] = draw(anything)
    else:
        pairs[at] = (key, draw(st.sampled_from(TYPES + WRONG_TYPES) | anything))


def other_fields(draw, pairs: Pairs) -> None:
    """A pair is doubled, left out, moved, put in or renamed, in the header or in a part of it."""
    at = a_pair(draw, pairs)
    key, value = pairs[at]
    if isinstance(value, Pairs) and draw(st.booleans()):
        other_fields(draw, value)
        return
    kind = draw(st.sampled_from(["double", "leave out", "move", "put in", "rename"]))
    if kind != "double" and kind != "put in":
        pairs.pop(at)
    new = {
        "double": [(key, value)],
        "put in": [(draw(names | st.just("__metadata__")), draw(anything))],
        "move": [(key, value)],
        "rename": [(draw(names | st.just("__metadata__")), value)],
    }
    for pair in new.get(kind, []):
        pairs.insert(draw(st.integers(0, len(pairs))), pair)


def other_layout(draw, pairs: Pairs) -> None:
    """A tensor's bytes begin or end elsewhere: a gap, an overlap, a part of another tensor."""
    for _, entry in pairs:
        offsets = dict(entry).get("data_offsets") if isinstance(entry, Pairs) else None
        if isinstance(offsets, list) and draw(st.booleans()):
            by = draw(st.sampled_from([-4, -1, 1, 4]))
            offsets[:] = [n + by if isinstance(n, int) else n for n in offsets]


def spoil(draw, text: bytes) -> bytes:
    """The header's text with something in it that is no part of JSON, or no harm to it."""
    at = draw(st.integers(0, len(text)))
    piece = draw(
        st.sampled_from([b" ", b"\n", b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b",", b"}"])
        | st.binary(max_size=2)
    )
    return draw(
        st.sampled_from([text[:at] + piece + text[at:], text + piece, text[:at], piece + text])
    )


MUTATIONS: list[Callable] = [other_value, other_value, other_fields, other_layout]


@st.composite
def files(draw, keys: list[str]) -> bytes:
    """A file of a sound header with up to three faults, of which some are none.

    Some of its tensors have one of these keys.
    """
    header, size = draw(sound_headers(keys))
    for mutate in draw(st.lists(st.sampled_from(MUTATIONS), max_size=3)):
        mutate(draw, header)
    text = as_json(header).encode(errors="surrogatepass")
    if not draw(st.integers(0, 3)):
        text = spoil(draw, text)
    length = len(text)
    if not draw(st.integers(0, 9)):
        length = draw(
            st.sampled_from([0, 1, max(0, length - 1), length + 1, 2**31, 2**63, 2**64 - 1])
        )
    more = draw(st.sampled_from([0] * 10 + [1, -1, 8]))
    data = bytes(at % 251 for at in range(max(0, size + more)))
    return raw(text, data, length)
