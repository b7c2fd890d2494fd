"""A LoRA file as a safetensors file: the slicer reads what safetensors reads, and nothing else.

Held against the safetensors library, on files damaged byte by byte and on headers made up by
hypothesis. Through the command line: exit 0 with a whole file, or exit 1 with one sentence; never
a traceback, never a half file under the final name, never a touched input.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import pytest
from broken_files import DOWN, NAME, STRANGERS, header_of, raw, small_file, survey, tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open
from slicing import Stored, one_sentence, opens, slice_lora, stored, too_new

from blora import tensorfile
from blora.tensorfile import HASHES, Constant, header_bytes, read_header
from blora.text import BloraError

# The same examples on every run.
PROVE = settings(derandomize=True, deadline=None, max_examples=1000)
PART = f"{NAME}.diff_b"  # a LoRA of one tensor

Whole = tuple[Stored, dict[str, str]]  # the tensors of a file, and its metadata


def read(path: Path) -> Whole | None:
    """What the slicer's own reader finds in a file; None where it refuses it."""
    try:
        tensors, metadata = read_header(path)
    except BloraError:
        return None
    data = {key: b"".join(t.chunks()) for key, t in tensors.items()}
    return {key: (t.dtype, list(t.shape), data[key]) for key, t in tensors.items()}, metadata


def library(path: Path) -> Whole | None:
    """The same of the safetensors library."""
    try:
        with safe_open(path, "np") as file:
            return stored(path), file.metadata() or {}
    except SafetensorError:
        return None


def assert_agreed(path: Path) -> None:
    """The slicer's reader finds in a file what the library finds, and refuses what it refuses.

    JSON that Python reads and the library does not, such as a field twice, is taken as Python reads
    it: what counts is that the library agrees once it is written plainly. A type that the library
    does not know says nothing of either: see the tests of types.
    """
    if too_new(path):
        return
    found = read(path)
    if found is None or found != library(path):
        assert library(path) is None
    if found is not None:  # its header as Python's own JSON, with the fields that tensors have
        header, data = header_of(path.read_bytes())
        metadata = {"__metadata__": header.pop("__metadata__", None) or {}}
        plain = {key: {name: entry[name] for name in tensor()} for key, entry in header.items()}
        copy = write_bytes(path.with_name("plain.safetensors"), raw(metadata | plain, data))
        assert library(copy) == found


def write_bytes(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


SOME = 20  # every so many bytes a damage is also tried on the whole command


def test_a_file_cut_off_anywhere_is_refused(slicer):
    data, lora = small_file(), slicer.folder / "cut.safetensors"
    for length in range(len(data)):
        assert read(write_bytes(lora, data[:length])) is None, length
    lengths = range(0, len(data), SOME)
    codes = survey(slicer, ((f"cut at {at}", data[:at]) for at in lengths))
    assert codes == {0: 0, 1: 2 * len(lengths)}


@pytest.mark.parametrize("pattern", [0x01, 0x04, 0x20, 0xFF])
def test_a_flipped_byte_before_the_tensors_is_read_as_safetensors_reads_it(slicer, pattern):
    data, lora = small_file(), slicer.folder / "flipped.safetensors"
    start = len(data) - len(header_of(data)[1])
    flipped = [data[:at] + bytes([data[at] ^ pattern]) + data[at + 1 :] for at in range(start)]
    refused = 0
    for damaged in flipped:
        assert_agreed(write_bytes(lora, damaged))
        refused += library(lora) is None
    assert start / 3 < refused <= start
    survey(slicer, enumerate(flipped[::SOME]))


OUTPUTS = [1280]  # of the layer, so many as a bias of it has numbers
TEXT = json.dumps({PART: tensor("F32", OUTPUTS, [0, 5120])}).encode()
NUMBER = b"\0\0\x80\x3f"
NUMBERS = NUMBER * 1280
HEADERS: dict[str, object] = {
    "an empty object": {},
    "a list": [],
    "a byte order mark": b"\xef\xbb\xbf" + TEXT,
    "utf-16": TEXT.decode().encode("utf-16"),
    "invalid utf-8 in a key": TEXT.replace(b"lora_unet", b"lora_\xff\xfe"),
    "a surrogate in utf-8": TEXT.replace(b"lora_unet", b"lora_\xed\xa0\x80"),
    "deep lists": b"[" * 100_000,
    "a tensor that is null": {PART: None},
    "no dtype": {PART: {"shape": [1], "data_offsets": [0, 4]}},
    "no shape": {PART: {"dtype": "F32", "data_offsets": [0, 4]}},
    "no offsets": {PART: {"dtype": "F32", "shape": [1]}},
    "one offset": {PART: tensor(offsets=[0])},
    "three offsets": {PART: tensor(offsets=[0, 4, 4])},
    "offsets that are no list": {PART: tensor(offsets=4)},
    "a negative offset": {PART: tensor(offsets=[-4, 0])},
    "a whole float offset": {PART: tensor(offsets=[0.0, 4.0])},
    "a huge offset": {PART: tensor(offsets=[0, 2**63])},
    "an offset beyond floats": TEXT.replace(b"5120]", b"5120" + b"0" * 5000 + b"]"),
    "offsets turned round": {PART: tensor(offsets=[4, 0])},
    "an end beyond the file": {PART: tensor(shape=[2], offsets=[0, 8])},
    "a gap after": {PART: tensor("F16", [1], [0, 2])},
    "a gap between": {PART: tensor("U8", [1], [0, 1]), DOWN: tensor("U8", [1], [3, 4])},
    "the same bytes twice": {PART: tensor(), DOWN: tensor()},
    "a shape too large": {PART: tensor(shape=[2])},
    "a shape too small": {PART: tensor(shape=[0])},
    "a shape that is a number": {PART: tensor(shape=1)},
    "two negative lengths": {PART: tensor(shape=[-1, -1])},
    "a shape of true": {PART: tensor(shape=[True])},
    "a shape that overflows": {PART: tensor(shape=[2**32, 2**32])},
    "a shape that overflows to fit": {PART: tensor(shape=[2**62, 4], offsets=[0, 0])},
    "an empty dtype": {PART: tensor("")},
    "a dtype in small letters": {PART: tensor("f32")},
    "a dtype that is a number": {PART: tensor(32)},
    "a dtype not known yet, of less than no bytes": {PART: tensor("Q4", [1], [4, 0])},
    "half a byte": {PART: tensor("F4", [1], [0, 1])},
    "metadata that is a list": {"__metadata__": [], PART: tensor()},
    "a metadata value that is a number": {"__metadata__": {"ss_steps": 1}, PART: tensor()},
}

LENGTHS = [0, 1, 2, 7, 100_000_000, 100_000_001, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**64 - 1]
WRONG = {
    what: raw(header, NUMBERS if header is TEXT else NUMBER) for what, header in HEADERS.items()
}
WRONG |= {f"a header length of {length}": raw(TEXT, NUMBER, length) for length in LENGTHS}
WRONG |= {f"{len(more)} bytes too many": small_file() + more for more in (b"\0", bytes(4096))}


@pytest.mark.parametrize("data", WRONG.values(), ids=WRONG)
def test_a_file_whose_header_is_wrong_is_refused(slicer, data):
    lora = write_bytes(slicer.folder / "wrong.safetensors", data)
    assert not opens(lora)
    assert read(lora) is None
    assert slicer.refuses(lora) == f"{lora} is not a whole safetensors file"


# Some of which the safetensors library takes.
@pytest.mark.parametrize("shape", [[0, 2**62], [0, 2**63], [2**40, 2**40, 0], [2**31] * 500_000])
def test_a_shape_that_numpy_refuses_is_refused_at_once(slicer, shape):
    header = {PART: tensor(), "a": tensor(shape=shape, offsets=[4, 4])}
    lora = write_bytes(slicer.folder / "shape.safetensors", raw(header, NUMBER))
    started = time.monotonic()
    assert slicer.refuses(lora) == f"{lora} is not a whole safetensors file"
    assert time.monotonic() - started < 5


ODD = {
    "a tensor twice, where the last counts": TEXT[:-1] + b"," + TEXT[1:].replace(b"F32", b"I32"),
    "a tensor twice, the first too large": TEXT[:-1].replace(b"[1280]", b"[9]") + b"," + TEXT[1:],
    "metadata that is null": b'{"__metadata__": null,' + TEXT[1:],
    "a metadata key twice": b'{"__metadata__": {"dtype": "1", "dtype": "2"},' + TEXT[1:],
    "a field more": TEXT.replace(b'"F32"', b'"F32", "extra": [1, {"a": null}]'),
    "a field more, twice": TEXT.replace(b'"F32"', b'"F32", "extra": 1, "extra": 2'),
    "blanks behind": TEXT + b" " * 5000,
    "blanks before": b" \t\r\n" + TEXT,
    "an escape in the key": TEXT.replace(b"lora_unet", b"lor\\u0061_unet"),
    "an escape in the type": TEXT.replace(b"F32", b"\\u004632"),
}


@pytest.mark.parametrize("header", ODD.values(), ids=ODD)
def test_a_header_that_is_odd_is_read_as_safetensors_reads_it(slicer, header):
    lora = write_bytes(slicer.folder / "odd.safetensors", raw(header, NUMBERS))
    assert read(lora) == library(lora)
    assert slicer(lora) == 0
    assert stored(slicer.output) == stored(lora)
    assert set(stored(lora)) == {PART}


def test_the_longest_header_that_safetensors_reads_is_the_longest_that_is_read(tmp_path):
    lora = tmp_path / "long.safetensors"
    for length, whole in ((100_000_000, True), (100_000_001, False)):
        write_bytes(lora, raw(TEXT.ljust(length), NUMBERS))
        assert (read(lora) is not None) == opens(lora) == whole


def test_a_file_of_a_header_near_1_mib_is_whole_whatever_has_room_in_it(tmp_path):
    short = {"ss_seed": "1", "modelspec.title": "t"}
    metadata = short | {key: "0" * digits for key, digits in HASHES.items()}
    free = (1 << 20) - len(header_bytes({"": Constant("U8", (1,), b"y")}, {}))
    kept = set()
    for length in range(free - 400, free, 8):
        tensors = {"a" * length: Constant("U8", (1,), b"y")}
        fitting, _ = tensorfile.shorten_metadata(tensors, metadata)
        tensorfile.write_file(tensors, fitting, tmp_path / "a.safetensors")
        _, found = library(tmp_path / "a.safetensors")
        assert found.keys() == fitting.keys()
        kept.add(frozenset(found))
    assert len(kept) > 2, "the sizes that are tried reach the limit"


NO_FILES: dict[str, Callable[[Path], object]] = {
    "a dangling link": lambda path: path.symlink_to("gone.safetensors"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a pipe": lambda path: os.mkfifo(path),
    "a device": lambda path: path.symlink_to("/dev/zero"),
}
EVERY = STRANGERS if sys.platform == "win32" else STRANGERS | NO_FILES


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
def test_what_is_no_safetensors_file_is_refused(slicer, make):
    lora = slicer.folder / "a.safetensors"
    make(lora)
    assert str(lora) in slicer.refuses(lora)


def test_a_path_to_nothing_is_refused(slicer):
    file = write_bytes(slicer.folder / "a.safetensors", small_file())
    for path in (file / "b.safetensors", slicer.folder / ("x" * 300), slicer.folder / "no/where"):
        slicer.refuses(path)


def library_types() -> list[str]:
    """Every type of the installed safetensors, which lists them where it refuses another."""
    with pytest.raises(SafetensorError) as refused:
        deserialize(raw({"a": tensor("none")}, bytes(4)))
    return re.findall(r"`([A-Z]\w+)`", str(refused.value))


TYPES = library_types()
BITS = {name: int(re.search(r"\d+", name)[0]) if name != "BOOL" else 8 for name in TYPES}
FIELDS = ["dtype", "shape", "data_offsets"]
LORA_KEYS = [PART, f"{NAME}.alpha", f"{NAME}.lokr_w1"]
names = st.sampled_from(LORA_KEYS) | st.sampled_from(["a", "", "\u2028", *FIELDS]) | st.text()
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
def sound_headers(draw) -> tuple[dict[str, object], int]:
    """A header that is right, in any order of its tensors, and how many bytes they take."""
    end, tensors = 0, []
    for name in draw(st.lists(names, max_size=4, unique=True)):
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
def files(draw) -> bytes:
    """A file of a sound header with up to three faults, of which some are none."""
    header, size = draw(sound_headers())
    tokens = TOKEN.findall(json.dumps(header, ensure_ascii=draw(st.booleans())))
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from(["other"] * 4 + ["any", "put in", "leave out"]))
        at = draw(st.integers(0, len(tokens) - 1))
        if kind == "put in":
            tokens.insert(at, draw(others))
        elif kind == "leave out":
            tokens[at] = ""
        elif tokens[at] not in list("[]{}:,"):  # a word for a word, a number for a number, or any
            same = words.map(json.dumps) if tokens[at].startswith('"') else numbers.map(str)
            tokens[at] = draw(same if kind == "other" else others)
    text = " ".join(tokens).encode(errors="surrogateescape")
    length = len(text) + draw(st.sampled_from([0] * 9 + [1, -1]))
    size += draw(st.sampled_from([0] * 9 + [1, -1]))
    return raw(text, bytes(at % 251 for at in range(max(0, size))), max(0, length))


@PROVE
@given(data=files())
def test_a_file_is_read_as_safetensors_reads_it_and_does_a_cut_no_harm(data):
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(StringIO()) as err:
        lora = write_bytes(Path(folder) / "a.safetensors", data)
        assert_agreed(lora)
        output = lora.with_name("slice.safetensors")
        code = slice_lora("--loras", lora, "--output_path", output)
        one_sentence(code, err.getvalue())
        assert output.exists() == (code == 0)
        assert code or opens(output) or too_new(output)


@pytest.mark.parametrize("dtype", TYPES)
def test_every_type_of_safetensors_is_read_and_copied(slicer, dtype):
    size = BITS[dtype] * 160
    numbers = bytes(at % 251 for at in range(size))
    data = raw({PART: tensor(dtype, OUTPUTS, [0, size])}, numbers)
    lora = write_bytes(slicer.folder / "a.safetensors", data)
    whole = {PART: (dtype, OUTPUTS, numbers)}
    assert read(lora) == (whole, {})
    assert slicer(lora) == 0
    assert stored(slicer.output) == whole


@pytest.mark.parametrize("dtype", ["F16_NEW", "BF8", "Q4"])
def test_a_type_that_is_not_known_yet_is_copied_and_comes_last(slicer, dtype):
    other = f"{NAME}.alpha"
    header = {PART: tensor(dtype, OUTPUTS, [0, 5]), other: tensor("U8", [1], [5, 6])}
    data = raw(header, b"newer!")
    lora = write_bytes(slicer.folder / "a.safetensors", data)
    assert slicer(lora) == 0
    header, data = header_of(slicer.output.read_bytes())
    assert header[PART] == tensor(dtype, OUTPUTS, [1, 6])
    assert header[other] == tensor("U8", [1], [0, 1])
    assert data == b"!newer"


def test_types_and_their_order_in_a_file_are_those_of_the_library():
    # It lists them in the order of its enum, and writes the last of them first.
    assert list(tensorfile.DTYPES.items()) == [(name, BITS[name]) for name in reversed(TYPES)]
