"""Safetensors files for hypothesis: sound headers, and the same with a few faults in them."""

from __future__ import annotations

import json
import math
import re

import pytest
from broken_files import raw, tensor
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize


def library_types() -> list[str]:
    """Every type of the installed safetensors, which lists them where it refuses another."""
    with pytest.raises(SafetensorError) as refused:
        deserialize(raw({"a": tensor("none")}, bytes(4)))
    return re.findall(r"`([A-Z]\w+)`", str(refused.value))


TYPES = library_types()
BITS = {name: int(re.search(r"\d+", name)[0]) if name != "BOOL" else 8 for name in TYPES}
FIELDS = ["dtype", "shape", "data_offsets"]
names = st.sampled_from(["a", "b", "", "é", "\u2028", "alpha", *FIELDS]) | st.text(max_size=3)
# What a header's text is made of, and what can stand in it by mistake.
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[^\s\[\]{}:,"]+|[\[\]{}:,]')
words = st.sampled_from([*TYPES, *FIELDS, "a", "b", "__metadata__", "f32", "F31", "", "F32 ", "4"])
# None between 2**60 and 2**64, which only the library takes for a length in a shape with a 0.
numbers = st.sampled_from([*range(-1, 9), 2**31, 2**32, 2**64, 10**30])
OTHERS = [
    "-0", "0.0", "4.0", "4e0", "4E+0", "0.5", "1e400", "00", "+4", "0x4", "NaN", "Infinity",
    "-Infinity", "-", "4.", ".5", "1" * 5000, "null", "true", "false", "nul", "[]", "[0]", "[[0]]",
    "{}", '{"a": "b"}', "[" * 100 + "]" * 100, "[" * 200 + "]" * 200, '"\\ud83d\\ude00"',
    '"\\x41"', '"a\nb"', "'a'", "//", "{,}", "[1,]", '{"a" 1}', '{"a": 1,}', "{1: 2}", '"', "\0",
    "[", "]", "{", "}", ",", ":", "\n", "\ufeff", "\udc80",
]  # fmt: skip
others = st.sampled_from(OTHERS)


@st.composite
def sound_headers(draw, keys: list[str]) -> tuple[dict[str, object], int]:
    """A header that is right, in any order of its tensors, and how many bytes they take."""
    end, tensors = 0, []
    for name in draw(st.lists(st.sampled_from(keys) | names, max_size=4, unique=True)):
        dtype = draw(st.sampled_from(TYPES))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        if (BITS[dtype] * math.prod(shape)) % 8:
            shape.append(8)
        size = BITS[dtype] * math.prod(shape) // 8
        fields = tensor(dtype, shape, [end, end + size])
        tensors.append((name, dict(draw(st.permutations([*fields.items()])))))
        end += size
    header = dict(draw(st.permutations(tensors)))
    if draw(st.booleans()):
        metadata = draw(st.dictionaries(names, st.text(max_size=3), max_size=3))
        header = {"__metadata__": metadata} | header
    return header, end


@st.composite
def files(draw, keys: list[str]) -> bytes:
    """A file of a sound header with up to three faults, of which some are none.

    Some of its tensors have one of these keys.
    """
    header, size = draw(sound_headers(keys))
    tokens = TOKEN.findall(json.dumps(header, ensure_ascii=draw(st.booleans())))
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from(["other"] * 4 + ["any", "put in", "leave out", "spoil"]))
        keyed = [at for at, sign in enumerate(tokens[1:]) if sign == ":"]
        values = [at for at, token in enumerate(tokens) if token not in list("[]{}:,")]
        if not keyed:
            break
        if kind == "spoil":
            tokens.insert(draw(st.integers(0, len(tokens))), draw(others))
        elif kind in ("other", "any"):  # a word for a word, a number for a number, or neither
            at = draw(st.sampled_from(values))
            same = words.map(json.dumps) if tokens[at].startswith('"') else numbers.map(str)
            tokens[at] = draw(same if kind == "other" else others)
        elif kind == "put in":
            pair = [json.dumps(draw(words)), ":", draw(words.map(json.dumps) | others), ","]
            at = draw(st.sampled_from(keyed))
            tokens[at:at] = pair
        else:
            at = draw(st.sampled_from(keyed))
            del tokens[at : next((key for key in keyed if key > at), len(tokens) - 1)]
    text = " ".join(tokens).encode(errors="surrogateescape")
    length = len(text)
    if not draw(st.integers(0, 9)):
        length = draw(
            st.sampled_from([0, 1, max(0, length - 1), length + 1, 2**31, 2**63, 2**64 - 1])
        )
    size += draw(st.sampled_from([0] * 9 + [1, -1]))
    return raw(text, bytes(at % 251 for at in range(max(0, size))), length)
