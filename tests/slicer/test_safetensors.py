"""A LoRA file as a safetensors file: the slicer reads what safetensors reads, and nothing else.

Held against the safetensors library, on files damaged byte by byte and on headers made up by
hypothesis. Through the command line: exit 0 with a whole file, or exit 1 with one sentence; never
a traceback, never a half file under the final name, never a touched input.
"""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from broken_files import (
    DOWN,
    NAME,
    STRANGERS,
    header_of,
    raw,
    small_file,
    small_lora,
    survey,
    tensor,
)  # fmt: skip
from header_faults import BITS, TYPES, files
from hypothesis import given, settings
from lora_files import STYLE, lora_module
from lora_files import write as write_lora
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from slicing import Stored, one_sentence, opens, stored, too_new

import blora_slicer
from blora.tensorfile import (
    DTYPES,
    HASHES,
    Constant,
    header_bytes,
    read_header,
    shorten_metadata,
    write_file,
)
from blora.text import BloraError

# A warning would be a line on stderr that tells the user nothing.
pytestmark = pytest.mark.filterwarnings("error")

# The same examples on every run.
PROVE = settings(derandomize=True, deadline=None, max_examples=1500)
SCRIPT = Path(blora_slicer.__file__)
PART = f"{NAME}.a"  # of no kind known here, so that it is copied alone
OTHER = STYLE.format(0, 1, "q")
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such thing")

Whole = tuple[Stored, dict[str, str]]  # the tensors of a file, and its metadata


def read(path: Path) -> Whole | None:
    """What the slicer's own reader finds in a file; None where it refuses it."""
    try:
        tensors, metadata = read_header(path)
    except BloraError:
        return None
    data = path.read_bytes()
    return {
        key: (t.dtype, list(t.shape), data[t.start : t.stop]) for key, t in tensors.items()
    }, metadata


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
    if found is not None:
        assert library(write_plainly(path)) == found


def write_plainly(path: Path) -> Path:
    """The file with its header as Python's own JSON, and only the fields that tensors have."""
    header, data = header_of(path.read_bytes())
    entries = {key: value for key, value in header.items() if key != "__metadata__"}
    plain = {key: {name: e[name] for name in tensor()} for key, e in entries.items()}
    if header.get("__metadata__"):
        plain["__metadata__"] = header["__metadata__"]
    return write_bytes(path.with_name("plain.safetensors"), raw(plain, data))


def write_bytes(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


# ---- Damaged files -------------------------------------------------------------------------------

SOME = 7  # every so many bytes a damage is also tried on the whole command


def with_byte(data: bytes, at: int, pattern: int) -> bytes:
    return data[:at] + bytes([data[at] ^ pattern]) + data[at + 1 :]


def data_start(data: bytes) -> int:
    return len(data) - len(header_of(data)[1])


def test_a_file_cut_off_anywhere_is_refused(slicer):
    data, lora = small_file(), slicer.folder / "cut.safetensors"
    for length in range(len(data)):
        assert read(write_bytes(lora, data[:length])) is None, length
    lengths = range(0, len(data), SOME)
    codes = survey(slicer, ((f"cut at {at}", data[:at]) for at in lengths))
    assert codes == {0: 0, 1: 2 * len(lengths)}


def test_a_file_with_bytes_too_many_is_refused(slicer):
    data = small_file()
    cases = [b"\0", b"\0" * 8, b"{}", b"\0" * 4096, data]
    assert survey(slicer, ((len(more), data + more) for more in cases)) == {0: 0, 1: 10}


@pytest.mark.parametrize("pattern", [0x01, 0x04, 0x20, 0xFF])
def test_a_flipped_byte_before_the_tensors_is_read_as_safetensors_reads_it(slicer, pattern):
    data, lora = small_file(), slicer.folder / "flipped.safetensors"
    start = data_start(data)
    refused = 0
    for at in range(start):
        assert_agreed(write_bytes(lora, with_byte(data, at, pattern)))
        refused += library(lora) is None
    assert start / 3 < refused <= start
    survey(slicer, ((at, with_byte(data, at, pattern)) for at in range(0, start, SOME)))


def test_flipped_bytes_in_the_tensors_are_not_a_matter_of_the_file(slicer):
    data = small_file()
    cases = [(at, with_byte(data, at, 0xFF)) for at in range(data_start(data), len(data))]
    # A flip can make a number that --save_precision or a strength cannot hold, but no other harm.
    assert survey(slicer, cases)[0] >= len(cases)


LENGTHS = [0, 1, 2, 7, 100_000_000, 100_000_001, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**64 - 1]


@pytest.mark.parametrize("length", LENGTHS)
def test_a_wrong_header_length_is_refused(slicer, length):
    lora = slicer.folder / "length.safetensors"
    lora.write_bytes(struct.pack("<Q", length) + small_file()[8:])
    assert "is not a whole safetensors file" in slicer.refuses(lora)


def test_a_header_length_off_by_some_is_refused(slicer):
    data = small_file()
    length = int.from_bytes(data[:8], "little")
    cases = ((by, struct.pack("<Q", length + by) + data[8:]) for by in range(-16, 17) if by)
    assert survey(slicer, cases)[0] == 0


# An alpha alone is the smallest LoRA: one number of any type.
TEXT = json.dumps({PART: tensor()}).encode()
NUMBER = b"\0\0\x80\x3f"
HEADERS: dict[str, object] = {
    "an empty object": {},
    "metadata alone": {"__metadata__": {"a": "b"}},
    "a list": [],
    "a list of tensors": [{PART: tensor()}],
    "a string": "lora",
    "a number": 1,
    "null": None,
    "true": True,
    "nothing": b"",
    "blanks": b" " * 64,
    "zeros": b"\0" * 64,
    "a brace": b"{",
    "two objects": TEXT + TEXT,
    "a comment": b"{/* */}" + b" " * 8,
    "a trailing comma": TEXT[:-1] + b",}",
    "single quotes": TEXT.replace(b'"', b"'"),
    "a byte order mark": b"\xef\xbb\xbf" + TEXT,
    "utf-16": TEXT.decode().encode("utf-16"),
    "utf-16 without a mark": TEXT.decode().encode("utf-16-le"),
    "utf-32": TEXT.decode().encode("utf-32-le"),
    "invalid utf-8 in a key": TEXT.replace(b"lora_unet", b"lora_\xff\xfe"),
    "half a character": TEXT.replace(b"lora_unet", b"lora_\xe2\x82"),
    "a surrogate in utf-8": TEXT.replace(b"lora_unet", b"lora_\xed\xa0\x80"),
    "a raw line break in a key": TEXT.replace(b"lora_unet", b"lora\n"),
    "a bad escape": TEXT.replace(b"lora_unet", b"lora\\x41"),
    "NaN": TEXT.replace(b"[1]", b"[NaN]"),
    "Infinity": TEXT.replace(b"[1]", b"[Infinity]"),
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a deep shape": {PART: tensor(shape=json.loads("[" * 100 + "]" * 100))},
    "a tensor that is null": {PART: None},
    "a tensor that is a short list": {PART: ["F32", [1]]},
    "a tensor that is a string": {PART: "F32"},
    "a tensor that is empty": {PART: {}},
    "no dtype": {PART: {"shape": [1], "data_offsets": [0, 4]}},
    "no shape": {PART: {"dtype": "F32", "data_offsets": [0, 4]}},
    "no offsets": {PART: {"dtype": "F32", "shape": [1]}},
    "one offset": {PART: tensor(offsets=[0])},
    "three offsets": {PART: tensor(offsets=[0, 4, 4])},
    "offsets that are no list": {PART: tensor(offsets=4)},
    "offsets that are strings": {PART: tensor(offsets=["0", "4"])},
    "offsets that are null": {PART: tensor(offsets=[None, None])},
    "a negative offset": {PART: tensor(offsets=[-4, 0])},
    "a float offset": {PART: tensor(offsets=[0, 4.5])},
    "a whole float offset": {PART: tensor(offsets=[0.0, 4.0])},
    "an exponent offset": TEXT.replace(b"[0, 4]", b"[0, 4e0]"),
    "a huge offset": {PART: tensor(offsets=[0, 2**63])},
    "the largest offset": {PART: tensor(offsets=[2**64 - 5, 2**64 - 1])},
    "an offset beyond 64 bits": {PART: tensor(offsets=[0, 2**64])},
    "an offset beyond floats": TEXT.replace(b"[0, 4]", b"[0, 4" + b"0" * 5000 + b"]"),
    "offsets turned round": {PART: tensor(offsets=[4, 0])},
    "an end beyond the file": {PART: tensor(shape=[2], offsets=[0, 8])},
    "a start beyond the file": {PART: tensor(offsets=[4, 8])},
    "a gap before": {PART: tensor("F16", [1], [2, 4])},
    "a gap after": {PART: tensor("F16", [1], [0, 2])},
    "a gap between": {PART: tensor("U8", [1], [0, 1]), DOWN: tensor("U8", [1], [3, 4])},
    "the same bytes twice": {PART: tensor(), DOWN: tensor()},
    "an overlap": {PART: tensor("U8", [3], [0, 3]), DOWN: tensor("U8", [2], [2, 4])},
    "a tensor within another": {PART: tensor(), DOWN: tensor("U8", [1], [1, 2])},
    "a shape too large": {PART: tensor(shape=[2])},
    "a shape too small": {PART: tensor(shape=[0])},
    "a shape of another type": {PART: tensor("F16", [1])},
    "a shape that is a number": {PART: tensor(shape=1)},
    "a shape that is null": {PART: tensor(shape=None)},
    "a shape of strings": {PART: tensor(shape=["1"])},
    "a negative shape": {PART: tensor(shape=[-1])},
    "two negative lengths": {PART: tensor(shape=[-1, -1])},
    "a float shape": {PART: tensor(shape=[1.0])},
    "a shape of true": {PART: tensor(shape=[True])},
    "a shape that overflows": {PART: tensor(shape=[2**32, 2**32])},
    "a shape that overflows on the way to nothing": {
        PART: tensor(),
        "a": tensor(shape=[2**40, 2**40, 0], offsets=[4, 4]),
    },
    "a shape that overflows to fit": {PART: tensor(shape=[2**62, 4], offsets=[0, 0])},
    "a length beyond 64 bits": {PART: tensor(shape=[2**64])},
    "an empty dtype": {PART: tensor("")},
    "a dtype in small letters": {PART: tensor("f32")},
    "a dtype that is a number": {PART: tensor(32)},
    "a dtype that is null": {PART: tensor(None)},
    "half a byte": {PART: tensor("F4", [1], [0, 1])},
    "metadata that is a list": {"__metadata__": [], PART: tensor()},
    "metadata that is a string": {"__metadata__": "a", PART: tensor()},
    "a metadata value that is a number": {"__metadata__": {"ss_steps": 1}, PART: tensor()},
    "a metadata value that is null": {"__metadata__": {"ss_steps": None}, PART: tensor()},
    "a metadata value that is an object": {"__metadata__": {"a": {"b": "c"}}, PART: tensor()},
    "a metadata value that is a list": {"__metadata__": {"a": ["b"]}, PART: tensor()},
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_header_that_is_wrong_is_refused(slicer, what):
    lora = write_bytes(slicer.folder / "header.safetensors", raw(HEADERS[what], NUMBER))
    assert not opens(lora)
    assert read(lora) is None
    slicer.refuses(lora)


@pytest.mark.parametrize("shape", [[0, 2**62], [0, 2**63], [0, 2**64], [2**31] * 500_000])
def test_a_shape_that_numpy_refuses_is_refused_at_once(slicer, shape):
    header = {PART: tensor(), f"{NAME}.lokr_w1": tensor(shape=shape, offsets=[4, 4])}
    lora = write_bytes(slicer.folder / "shape.safetensors", raw(header, NUMBER))
    started = time.monotonic()
    assert "is not a whole safetensors file" in slicer.refuses(lora)
    assert time.monotonic() - started < 5


ODD: dict[str, tuple[bytes, str]] = {
    # a header, and the type of the one tensor that it gives
    "a tensor twice, where the last counts": (
        TEXT[:-1] + b"," + TEXT[1:].replace(b'"F32"', b'"I32"'),
        "I32",
    ),
    "metadata that is null": (b'{"__metadata__": null,' + TEXT[1:], "F32"),
    "a metadata key twice": (
        b'{"__metadata__": {"ss_steps": "1", "ss_steps": "2"},' + TEXT[1:],
        "F32",
    ),
    "a metadata key by the name of a field, twice": (
        b'{"__metadata__": {"dtype": "1", "dtype": "2"},' + TEXT[1:],
        "F32",
    ),
    "a tensor twice, the first as large as no file": (
        TEXT[:-1].replace(b"[1]", b"[9]") + b"," + TEXT[1:],
        "F32",
    ),
    "a large number in a further field": (
        TEXT.replace(b'"F32"', b'"F32", "extra": ' + b"1" * 300),
        "F32",
    ),
    "a field more": (TEXT.replace(b'"F32"', b'"F32", "extra": [1, {"a": null}]'), "F32"),
    "a field more, twice": (TEXT.replace(b'"F32"', b'"F32", "extra": 1, "extra": 2'), "F32"),
    "blanks behind": (TEXT + b" " * 5000, "F32"),
    "blanks before": (b" \t\r\n" + TEXT, "F32"),
    "blanks between": (TEXT.replace(b": ", b"\n:\t"), "F32"),
    "an escape in the key": (TEXT.replace(b"alpha", b"\\u0061lpha"), "F32"),
    "an escape in the type": (TEXT.replace(b"F32", b"\\u004632"), "F32"),
}


@pytest.mark.parametrize(("header", "dtype"), ODD.values(), ids=ODD)
def test_a_header_that_is_odd_is_read_as_safetensors_reads_it(slicer, header, dtype):
    lora = write_bytes(slicer.folder / "odd.safetensors", raw(header, NUMBER))
    assert read(lora) == library(lora)
    assert slicer(lora) == 0
    assert stored(slicer.output) == {PART: (dtype, [1], NUMBER)}


def test_the_longest_header_that_safetensors_reads_is_the_longest_that_is_read(tmp_path):
    lora = tmp_path / "long.safetensors"
    for length, whole in ((100_000_000, True), (100_000_001, False)):
        write_bytes(lora, raw(TEXT.ljust(length), NUMBER))
        assert (read(lora) is not None) == opens(lora) == whole


def test_a_header_claimed_to_be_giant_is_refused_at_once(slicer):
    lora = slicer.folder / "giant.safetensors"
    for length in (99_999_999, 100_000_001, 2**32, 2**40):
        with lora.open("wb") as file:
            file.write(struct.pack("<Q", length) + b"{")
            file.truncate(200_000_000)  # sparse: takes no disk
        slicer.refuses(lora)


def test_a_header_that_is_giant_is_refused_at_once(slicer):
    lora = slicer.folder / "giant.safetensors"
    lora.write_bytes(raw({"__metadata__": {"ss_a": "x" * 120_000_000}, PART: tensor()}, b"\0" * 4))
    started = time.monotonic()
    assert "is not a whole safetensors file" in slicer.refuses(lora)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(("count", "length"), [(1, 20_000_000), (100, 100_000), (40_000, 60)])
def test_metadata_too_long_for_a_header_is_cut_down_in_seconds(tmp_path, count, length):
    lora, output = tmp_path / "long.safetensors", tmp_path / "slice.safetensors"
    write_lora(lora, small_lora(), {f"ss_setting_{n}": "x" * length for n in range(count)})
    args = [sys.executable, SCRIPT, "--loras", lora, "--output_path", output]
    done = subprocess.run(args, capture_output=True, text=True, check=False, timeout=10)
    one_sentence(done.returncode, done.stderr)
    assert done.returncode == 0
    assert done.stderr.count("\n") <= 100
    assert int.from_bytes(output.read_bytes()[:8], "little") < 1 << 20


def test_a_file_of_a_header_near_1_mib_is_whole_whatever_has_room_in_it(tmp_path):
    short = {"ss_seed": "1", "modelspec.title": "t"}
    metadata = short | {key: "0" * digits for key, digits in HASHES.items()}
    many = {f"{n:05}": Constant("U8", (1,), b"x") for n in range(15_000)}
    free = (1 << 20) - len(header_bytes(many, {}))
    kept = set()
    for length in range(free - 400, free, 8):
        tensors = many | {"a" * length: Constant("U8", (1,), b"y")}
        fitting, _ = shorten_metadata(tensors, metadata)
        write_file(tensors, fitting, tmp_path / "a.safetensors")
        _, found = library(tmp_path / "a.safetensors")
        assert found.keys() == fitting.keys()
        kept.add(frozenset(found))
    assert len(kept) > 2, "the sizes that are tried reach the limit"


# ---- Files that are something else ---------------------------------------------------------------


LINKS: dict[str, Callable[[Path], object]] = {
    "a dangling link": lambda path: path.symlink_to("gone.safetensors"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a pipe": lambda path: os.mkfifo(path),
    "a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("what", STRANGERS)
def test_what_is_no_safetensors_file_is_refused(slicer, what):
    lora = slicer.folder / "a.safetensors"
    STRANGERS[what](lora)
    assert str(lora) in slicer.refuses(lora)


@POSIX
@pytest.mark.parametrize("what", LINKS)
def test_what_is_no_file_is_refused(slicer, what):
    lora = slicer.folder / "a.safetensors"
    LINKS[what](lora)
    assert str(lora) in slicer.refuses(lora)


@pytest.mark.parametrize("name", ["a.safetensors/b.safetensors", "x" * 300, "no/where.safetensors"])
def test_a_path_to_nothing_is_refused(slicer, name):
    (slicer.folder / "a.safetensors").write_bytes(small_file())
    slicer.refuses(slicer.folder / name)


# ---- Headers made up by hypothesis ---------------------------------------------------------------


@PROVE
@given(data=files())
def test_a_file_is_read_as_safetensors_reads_it(data):
    with tempfile.TemporaryDirectory() as folder:
        assert_agreed(write_bytes(Path(folder) / "a.safetensors", data))


@pytest.mark.parametrize("dtype", TYPES)
def test_every_type_of_safetensors_is_read_and_copied(slicer, dtype):
    shape, size = [8], BITS[dtype]
    data = raw({PART: tensor(dtype, shape, [0, size])}, bytes(range(size)))
    lora = write_bytes(slicer.folder / "a.safetensors", data)
    whole = {PART: (dtype, shape, bytes(range(size)))}
    assert read(lora) == (whole, {})
    assert slicer(lora) == 0
    assert stored(slicer.output) == whole


@pytest.mark.parametrize("dtype", ["F16_NEW", "BF8", "Q4"])
def test_a_type_that_is_not_known_yet_is_copied_and_comes_last(slicer, dtype):
    other = f"{NAME}.part"
    data = raw({PART: tensor(dtype, [3], [0, 5]), other: tensor("U8", [1], [5, 6])}, b"newer!")
    lora = write_bytes(slicer.folder / "a.safetensors", data)
    assert slicer(lora) == 0
    header, data = header_of(slicer.output.read_bytes())
    assert header[PART] == tensor(dtype, [3], [1, 6])
    assert header[other] == tensor("U8", [1], [0, 1])
    assert data == b"!newer"


def test_a_type_that_is_not_known_yet_may_have_any_size_but_none_below_0(slicer):
    lora = slicer.folder / "a.safetensors"
    write_bytes(lora, raw({PART: tensor("Q4", [1], [4, 0])}, b"data"))
    assert "is not a whole safetensors file" in slicer.refuses(lora)


def test_types_and_their_order_in_a_file_are_those_of_the_library():
    # It lists them in the order of its enum, and writes the last of them first.
    assert list(DTYPES.items()) == [(name, BITS[name]) for name in reversed(TYPES)]


# ---- Mutations by chance -------------------------------------------------------------------------

ATOMS = [
    0, 1, -1, 2, 3, 4, 2**31, 2**63, 2**64, 1.5, True, None, "", "F16", "F32", "BF16", "F8_E4M3",
    "I64", "F4", "C64", [], {}, [0], [0, 0], [1, 1], "alpha", "lora_up.weight", "é\n\x1b[2J",
]  # fmt: skip


def mutate_bytes(data: bytes, chance: random.Random) -> bytes:
    """Bytes flipped, left out, put in, doubled, or exchanged with others."""
    at, other = sorted(chance.randrange(len(data)) for _ in range(2))
    return chance.choice(
        [
            data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :],
            data[:at] + data[at + 1 :],
            data[:at] + chance.randbytes(chance.randrange(1, 9)) + data[at:],
            data[:at] + data[other:],
            data[:other] + data[at:],
            data[:at] + bytes(other - at) + data[other:],
        ]
    )


def mutate_header(data: bytes, chance: random.Random) -> bytes:
    """A header that is JSON, with a part of it replaced, left out or renamed."""
    header, tensors = header_of(data)
    for _ in range(chance.randrange(1, 4)):
        holder, key = header, chance.choice(list(header) or ["a"])
        while isinstance(holder.get(key), dict) and holder[key] and chance.random() < 0.7:
            holder, key = holder[key], chance.choice(list(holder[key]))
        value = holder.pop(key, None)
        kind = chance.randrange(4)
        if kind == 0:
            holder[key] = chance.choice(ATOMS)
        elif kind == 1:
            holder[f"{chance.choice(ATOMS)}" if chance.random() < 0.5 else f"{key}x"] = value
        elif kind == 2 and isinstance(value, list) and value:
            value[chance.randrange(len(value))] = chance.choice(ATOMS)
            holder[key] = value
    return raw(header, tensors)


@pytest.mark.parametrize("mutate", [mutate_bytes, mutate_header])
def test_a_file_mutated_by_chance_does_no_harm(slicer, mutate):
    chance = random.Random(0)
    sound = [
        small_file(),
        save(small_lora() | lora_module(OTHER)),
        save(lora_module(NAME, alpha=None)),
    ]
    cases = [(index, mutate(chance.choice(sound), chance)) for index in range(300)]
    assert sum(survey(slicer, iter(cases)).values()) == 600
