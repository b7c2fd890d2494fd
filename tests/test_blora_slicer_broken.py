"""blora_slicer.py on broken and strange files, by the hundred.

Whatever it is given: exit 0 with a whole file, or exit 1 with one sentence; never a traceback,
never a half file under the final name, never a touched input.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from lora_files import CONTENT, STYLE, lora_module
from lora_files import write as write_lora
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

import blora_slicer

# A warning would be a line on stderr that tells the user nothing.
pytestmark = pytest.mark.filterwarnings("error")

SCRIPT = Path(blora_slicer.__file__)
NAME = CONTENT.format(0, 1, "q")
OTHER = STYLE.format(0, 1, "q")
OLD = b"what was there before"
SMALL = 1 << 20  # bytes; larger files are sparse, and compared by their dates alone
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such thing")
CUTS: list[list[str]] = [[], ["--alphas", "0.5"]]
LOOKS = [["--inspect"], ["--inspect", "--json"]]


# ---- What every run must keep to -----------------------------------------------------------------


def fingerprint(path: Path) -> object:
    """What would change if a program wrote to `path`."""
    try:
        stat = path.stat()
    except OSError as error:
        return error.errno
    if not path.is_file():
        return stat.st_mode
    data = path.read_bytes() if stat.st_size < SMALL else b""
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, data


def opens(path: Path) -> bool:
    """Whether the safetensors library takes a file."""
    try:
        # Not "pt": that takes no path that is not UTF-8.
        with safe_open(path, "np"):
            return True
    except (SafetensorError, OSError):
        return False


def stored(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Type, shape and bytes of each tensor, of any type."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    return {
        key: (v["dtype"], v["shape"], data[slice(*(start + o for o in v["data_offsets"]))])
        for key, v in header.items()
    }


def one_sentence(code: int, err: str) -> None:
    """Exit 0 without an error, or 1 with one; notes may come before it."""
    assert code in (0, 1)
    assert err == "" or err.endswith("\n")
    lines = err.removesuffix("\n").split("\n") if err else []
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == code, err
    assert all(line.startswith(("error: ", "note: ")) for line in lines), err


class Slicer:
    """Runs the slicer in one folder, and checks after each run what must always hold.

    At every other run there is an output of an earlier one, which a failure must leave alone.
    """

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.output = folder / "slice.safetensors"
        self.capsys = capsys
        self.runs = 0
        self.out = self.err = ""

    def __call__(self, lora: Path, *options: object) -> int:
        """The exit code of a run on `lora`, after all that every run must keep to."""
        self.runs += 1
        self.output.unlink(missing_ok=True)
        if self.runs % 2:
            self.output.write_bytes(OLD)
        before = fingerprint(lora)
        names = {path.name for path in self.folder.iterdir()}
        place = [] if "--inspect" in options else ["--output_path", self.output]
        args = ["--loras", lora, *options, *place]
        code = blora_slicer.main([str(arg) for arg in args])
        self.out, self.err = self.capsys.readouterr()
        one_sentence(code, self.err)
        assert fingerprint(lora) == before
        self.check_folder(names, wrote=code == 0 and "--inspect" not in options)
        return code

    def check_folder(self, before: set[str], wrote: bool) -> None:
        """A whole output where one was written, else what there was; and nothing else."""
        if wrote:
            assert opens(self.output)
            before = before | {self.output.name}
        elif self.output.name in before:
            assert self.output.read_bytes() == OLD
        assert {path.name for path in self.folder.iterdir()} == before

    def refuses(self, lora: Path, *options: object) -> str:
        """The sentence with which `lora` is refused, to cut and to look at alike."""
        sentences = []
        for way in (*CUTS, *LOOKS):
            assert self(lora, *way, *options) == 1
            # In brackets comes the system's reason, in which safetensors names any of two tensors.
            sentences.append(self.err.splitlines()[-1].split(" (")[0])
        assert len(set(sentences)) == 1, sentences
        return sentences[0].removeprefix("error: ")


@pytest.fixture
def slicer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Slicer:
    return Slicer(tmp_path, capsys)


def small_lora() -> dict[str, torch.Tensor]:
    """One module of content, with tensors of two types."""
    tensors = lora_module(NAME)
    return tensors | {f"{NAME}.alpha": tensors[f"{NAME}.alpha"].float()}


def small_file() -> bytes:
    """The same as a file, with metadata: one entry, as their order changes from save to save."""
    return save(small_lora(), {"ss_network_dim": "2"})


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of any header, whether or not that makes sense."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def header_of(data: bytes) -> tuple[dict[str, object], bytes]:
    """The header of a whole file, and the bytes after it."""
    start = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:start]), data[start:]


def survey(slicer: Slicer, cases: Iterator[tuple[object, bytes]]) -> dict[int, int]:
    """Run many damaged files, each cut and done otherwise in turn; how often each exit code came.

    What safetensors itself refuses must be refused, with all failures told at once.
    """
    ways = [["--alphas", "0.5"], *LOOKS, ["--save_precision", "float"]]
    lora = slicer.folder / "damaged.safetensors"
    failures, codes = [], {0: 0, 1: 0}
    for index, (what, data) in enumerate(cases):
        lora.write_bytes(data)
        whole = opens(lora)
        for way in ([], ways[index % len(ways)]):
            try:
                code = slicer(lora, *way)
                assert whole or code == 1, "taken, though safetensors refuses it"
            except (Exception, AssertionError) as error:
                failures.append(f"{what} {' '.join(way)}: {type(error).__name__} {error}")
                slicer.capsys.readouterr()
                continue
            codes[code] += 1
    assert failures == []
    return codes


# ---- Damaged files -------------------------------------------------------------------------------


def test_a_file_cut_off_anywhere_is_refused(slicer):
    data = small_file()
    start = len(data) - len(header_of(data)[1])
    codes = survey(slicer, ((f"cut at {at}", data[:at]) for at in range(len(data))))
    assert start > 300
    assert codes == {0: 0, 1: 2 * len(data)}


def test_a_file_with_bytes_too_many_is_refused(slicer):
    data = small_file()
    cases = [b"\0", b"\0" * 8, b"{}", b"\0" * 4096, data]
    assert survey(slicer, ((len(more), data + more) for more in cases))[0] == 0


@pytest.mark.parametrize("pattern", [0x01, 0x04, 0x20, 0xFF])
def test_a_flipped_byte_before_the_tensors_is_refused_or_harmless(slicer, pattern):
    data = small_file()
    start = len(data) - len(header_of(data)[1])

    def flipped() -> Iterator[tuple[str, bytes]]:
        for at in range(start):
            yield (
                f"byte {at} ^ {pattern:#x}",
                data[:at] + bytes([data[at] ^ pattern]) + data[at + 1 :],
            )

    codes = survey(slicer, flipped())
    assert sum(codes.values()) == 2 * start
    assert codes[1] > 400


def test_flipped_bytes_in_the_tensors_are_not_a_matter_of_the_file(slicer):
    data = small_file()
    start = len(data) - len(header_of(data)[1])
    cases = (
        (f"byte {at}", data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        for at in range(start, len(data))
    )
    # A flip can make a number that --save_precision or a strength cannot hold, but no other harm.
    assert survey(slicer, cases)[0] >= len(data) - start


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


def tensor(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


UP, DOWN, ALPHA = f"{NAME}.lora_up.weight", f"{NAME}.lora_down.weight", f"{NAME}.alpha"
TEXT = json.dumps({UP: tensor()}).encode()
HEADERS: dict[str, object] = {
    "an empty object": {},
    "metadata alone": {"__metadata__": {"a": "b"}},
    "a list": [],
    "a list of tensors": [{UP: tensor()}],
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
    "a lone surrogate": TEXT.replace(b"lora_unet", b"lora_\\ud800"),
    "a surrogate in utf-8": TEXT.replace(b"lora_unet", b"lora_\xed\xa0\x80"),
    "a raw line break in a key": TEXT.replace(b"lora_unet", b"lora\n"),
    "a bad escape": TEXT.replace(b"lora_unet", b"lora\\x41"),
    "NaN": TEXT.replace(b"[1]", b"[NaN]"),
    "Infinity": TEXT.replace(b"[1]", b"[Infinity]"),
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a deep shape": {UP: tensor(shape=json.loads("[" * 100 + "]" * 100))},
    "a tensor that is null": {UP: None},
    "a tensor that is a short list": {UP: ["F32", [1]]},
    "a tensor that is a string": {UP: "F32"},
    "a tensor that is empty": {UP: {}},
    "no dtype": {UP: {"shape": [1], "data_offsets": [0, 4]}},
    "no shape": {UP: {"dtype": "F32", "data_offsets": [0, 4]}},
    "no offsets": {UP: {"dtype": "F32", "shape": [1]}},
    "one offset": {UP: tensor(offsets=[0])},
    "three offsets": {UP: tensor(offsets=[0, 4, 4])},
    "offsets that are no list": {UP: tensor(offsets=4)},
    "offsets that are strings": {UP: tensor(offsets=["0", "4"])},
    "offsets that are null": {UP: tensor(offsets=[None, None])},
    "a negative offset": {UP: tensor(offsets=[-4, 0])},
    "a float offset": {UP: tensor(offsets=[0, 4.5])},
    "a whole float offset": {UP: tensor(offsets=[0.0, 4.0])},
    "an exponent offset": TEXT.replace(b"[0, 4]", b"[0, 4e0]"),
    "a huge offset": {UP: tensor(offsets=[0, 2**63])},
    "the largest offset": {UP: tensor(offsets=[2**64 - 5, 2**64 - 1])},
    "an offset beyond 64 bits": {UP: tensor(offsets=[0, 2**64])},
    "an offset beyond floats": TEXT.replace(b"[0, 4]", b"[0, 4" + b"0" * 5000 + b"]"),
    "offsets turned round": {UP: tensor(offsets=[4, 0])},
    "an end beyond the file": {UP: tensor(shape=[2], offsets=[0, 8])},
    "a start beyond the file": {UP: tensor(offsets=[4, 8])},
    "a gap before": {UP: tensor("F16", [1], [2, 4])},
    "a gap after": {UP: tensor("F16", [1], [0, 2])},
    "a gap between": {UP: tensor("U8", [1], [0, 1]), DOWN: tensor("U8", [1], [3, 4])},
    "the same bytes twice": {UP: tensor(), DOWN: tensor()},
    "an overlap": {UP: tensor("U8", [3], [0, 3]), DOWN: tensor("U8", [2], [2, 4])},
    "a tensor within another": {UP: tensor(), DOWN: tensor("U8", [1], [1, 2])},
    "a shape too large": {UP: tensor(shape=[2])},
    "a shape too small": {UP: tensor(shape=[0])},
    "a shape of another type": {UP: tensor("F16", [1])},
    "a shape that is a number": {UP: tensor(shape=1)},
    "a shape that is null": {UP: tensor(shape=None)},
    "a shape of strings": {UP: tensor(shape=["1"])},
    "a negative shape": {UP: tensor(shape=[-1])},
    "two negative lengths": {UP: tensor(shape=[-1, -1])},
    "a float shape": {UP: tensor(shape=[1.0])},
    "a shape of true": {UP: tensor(shape=[True])},
    "a shape that overflows": {UP: tensor(shape=[2**32, 2**32])},
    "a shape that overflows to fit": {UP: tensor(shape=[2**62, 4], offsets=[0, 0])},
    "a length beyond 64 bits": {UP: tensor(shape=[2**64])},
    "an unknown dtype": {UP: tensor("F31")},
    "an empty dtype": {UP: tensor("")},
    "a dtype in small letters": {UP: tensor("f32")},
    "a dtype that is a number": {UP: tensor(32)},
    "a dtype that is null": {UP: tensor(None)},
    "half a byte": {UP: tensor("F4", [1], [0, 1])},
    "metadata that is a list": {"__metadata__": [], UP: tensor()},
    "metadata that is a string": {"__metadata__": "a", UP: tensor()},
    "a metadata value that is a number": {"__metadata__": {"ss_steps": 1}, UP: tensor()},
    "a metadata value that is null": {"__metadata__": {"ss_steps": None}, UP: tensor()},
    "a metadata value that is an object": {"__metadata__": {"a": {"b": "c"}}, UP: tensor()},
    "a metadata value that is a list": {"__metadata__": {"a": ["b"]}, UP: tensor()},
    "metadata twice": b'{"__metadata__": {"a": "b"}, "__metadata__": {"a": "c"},' + TEXT[1:],
    "a field twice": TEXT.replace(b'"shape": [1]', b'"shape": [1], "shape": [1]'),
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_header_that_is_wrong_is_refused(slicer, what):
    lora = slicer.folder / "header.safetensors"
    lora.write_bytes(raw(HEADERS[what], b"\0\0\x80\x3f"))
    slicer.refuses(lora)


@pytest.mark.parametrize(
    "header",
    [
        TEXT[:-1] + b"," + TEXT[1:],
        TEXT[:-1] + b"," + TEXT[1:].replace(b'"F32"', b'"I32"'),
        b'{"__metadata__": null,' + TEXT[1:],
        b'{"__metadata__": {"ss_steps": "1", "ss_steps": "2"},' + TEXT[1:],
        TEXT.replace(b'"F32"', b'"F32", "extra": [1, {"a": null}]'),
        TEXT + b" " * 5000,
        b" " + TEXT,
        # The safetensors library takes a tensor's fields as a list, too.
        json.dumps({UP: ["F32", [1], [0, 4]]}).encode(),
        TEXT.replace(b"lora_up", b"lora\\u005fup"),
    ],
)
def test_a_header_that_is_odd_is_refused_or_read_as_safetensors_reads_it(slicer, header):
    lora = slicer.folder / "odd.safetensors"
    lora.write_bytes(raw(header, b"\0\0\x80\x3f"))
    if not opens(lora):
        slicer.refuses(lora)
        return
    with safe_open(lora, "pt") as file:
        dtype = file.get_slice(UP).get_dtype()
    assert slicer(lora) == 0
    assert stored(slicer.output) == {UP: (dtype, [1], b"\0\0\x80\x3f")}


def test_a_header_claimed_to_be_giant_is_refused_at_once(slicer):
    lora = slicer.folder / "giant.safetensors"
    for length in (99_999_999, 100_000_001, 2**32, 2**40):
        with lora.open("wb") as file:
            file.write(struct.pack("<Q", length) + b"{")
            file.truncate(200_000_000)  # sparse: takes no disk
        slicer.refuses(lora)


def test_a_header_that_is_giant_is_refused_at_once(slicer):
    lora = slicer.folder / "giant.safetensors"
    lora.write_bytes(raw({"__metadata__": {"ss_a": "x" * 120_000_000}, UP: tensor()}, b"\0" * 4))
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


# ---- Files that are something else ---------------------------------------------------------------


def pickled(path: Path) -> None:
    torch.save(small_lora(), path)


def old_pickled(path: Path) -> None:
    torch.save(small_lora(), path, _use_new_zipfile_serialization=False)


STRANGERS: dict[str, Callable[[Path], object]] = {
    "an empty file": lambda path: path.write_bytes(b""),
    "a text": lambda path: path.write_text("404: Not Found\n"),
    "a page": lambda path: path.write_text("<!DOCTYPE html><html>" + "a" * 5000),
    "a pointer of git lfs": lambda path: path.write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    ),
    "zeros": lambda path: path.write_bytes(b"\0" * 100_000),
    "ones": lambda path: path.write_bytes(b"\xff" * 100_000),
    "noise": lambda path: path.write_bytes(random.Random(0).randbytes(100_000)),
    "a zip": lambda path: path.write_bytes(b"PK\x05\x06" + b"\0" * 18),
    "a pickle": pickled,
    "an old pickle": old_pickled,
    "a folder": lambda path: path.mkdir(),
    "nothing": lambda path: None,
}
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


# ---- Outputs that cannot be written --------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a.safetensors/b.safetensors", f"{'x' * 240}.safetensors", f"{'x' * 300}.safetensors"]
)
def test_an_output_with_an_impossible_name_is_refused(slicer, name):
    lora = slicer.folder / "a.safetensors"
    lora.write_bytes(small_file())
    code = blora_slicer.main(["--loras", str(lora), "--output_path", str(slicer.folder / name)])
    assert code == 1
    one_sentence(code, slicer.capsys.readouterr().err)
    slicer.check_folder({lora.name}, wrote=False)
    assert lora.read_bytes() == small_file()


@POSIX
def test_a_name_that_is_no_text_is_cut_all_the_same(slicer):
    lora = slicer.folder / os.fsdecode(b"a\xff.safetensors")
    lora.write_bytes(small_file())
    slicer.output = slicer.folder / os.fsdecode(b"slice\xff.safetensors")
    assert slicer(lora) == 0
    assert slicer(lora, "--inspect", "--json") == 0


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file can grow beyond this many bytes, as on a disk that is full."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@POSIX
@pytest.mark.parametrize("way", [*CUTS, ["--no_metadata"]])
def test_a_disk_that_is_full_at_any_byte_leaves_what_there_was(slicer, way):
    lora = slicer.folder / "a.safetensors"
    write_lora(lora, small_lora() | lora_module(OTHER, rank=64))
    both = ["--loras", lora, *way, "--traits", "content", "style"]
    assert slicer(lora, *both) == 0
    size = slicer.output.stat().st_size
    for limit in [0, 1, 7, 8, 9, *range(16, size - 8, 97), *range(size - 8, size)]:
        slicer.output.write_bytes(OLD)
        with largest_file(max(limit, 0)):
            # The old output is written before the limit, so the run may not write it again.
            args = [str(a) for a in (*both, "--output_path", slicer.output)]
            code = blora_slicer.main(args)
        err = slicer.capsys.readouterr().err
        assert (code, err.count("\n")) == (1, 1)
        assert err.startswith(f"error: cannot write {slicer.output} (")
        slicer.check_folder({lora.name, slicer.output.name}, wrote=False)


# Root may do anything, so the run goes on as nobody; the paths are relative, as nobody may not
# enter the folders above. Nor could it import anything more: a first cut does that.
AS_NOBODY = """
import os, sys, blora_slicer
assert blora_slicer.main(["--loras", "warm.safetensors", "--output_path", "up.safetensors"]) == 0
if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
sys.exit(blora_slicer.main())
"""
DENIALS = {
    "a LoRA": ("in/a.safetensors", 0o000),
    "the LoRA's folder": ("in", 0o000),
    "the output's folder, to write": ("out", 0o555),
    "the output's folder, to enter": ("out", 0o000),
    "the traits": ("blora_traits.json", 0o000),
}


@POSIX
@pytest.mark.parametrize("what", DENIALS)
def test_what_may_not_be_read_or_written_is_refused(tmp_path, what):
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(0o777)
    lora, traits = tmp_path / "in" / "a.safetensors", tmp_path / "blora_traits.json"
    lora.write_bytes(small_file())
    (tmp_path / "warm.safetensors").write_bytes(small_file())
    traits.write_bytes(SCRIPT.with_name(traits.name).read_bytes())
    tmp_path.chmod(0o755)
    name, mode = DENIALS[what]
    (tmp_path / name).chmod(mode)
    args = ["--loras", "in/a.safetensors", "--traits_file", traits.name]
    done = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, *args, "--output_path", "out/slice.safetensors"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parent), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    (tmp_path / name).chmod(0o777)
    one_sentence(done.returncode, done.stderr)
    assert done.returncode == 1
    assert list((tmp_path / "out").iterdir()) == []
    assert lora.read_bytes() == small_file()


@POSIX
@pytest.mark.parametrize("way", [[], *LOOKS], ids=" ".join)
@pytest.mark.parametrize("end", ["full", "closed"])
def test_an_end_for_what_is_said_that_takes_nothing_gives_no_traceback(tmp_path, way, end):
    lora, output = tmp_path / "a.safetensors", tmp_path / "slice.safetensors"
    lora.write_bytes(small_file())
    place = [] if way else ["--output_path", output]
    if end == "full":
        stdout = os.open("/dev/full", os.O_WRONLY) if Path("/dev/full").exists() else -1
    else:
        reader, stdout = os.pipe()
        os.close(reader)
    if stdout < 0:
        pytest.skip("no /dev/full here")
    done = subprocess.run(
        [sys.executable, SCRIPT, "--loras", lora, *way, *place],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(stdout)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
    assert done.stderr.count("\n") <= 1
    assert way or opens(output)


# ---- Stopped half way ----------------------------------------------------------------------------


def sparse_lora(path: Path, megabytes: int) -> None:
    """A whole file of one large module, of zeros that take no disk."""
    rank = megabytes * 1_000_000 // (2 * 2560)
    up, down = [1280, rank], [rank, 1280]
    half = 2 * 1280 * rank
    header = {DOWN: tensor("F16", down, [0, half]), UP: tensor("F16", up, [half, 2 * half])}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(raw(text))
        file.truncate(8 + len(text) + 2 * half)


# A shell may have started the tests with Ctrl+C switched off, which a child would inherit.
STOPPABLE = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def stop_while_writing(command: list[object], folder: Path, number: int) -> tuple[int, str]:
    """Start the slicer and send it a signal when it has begun to write; exit code and stderr."""
    child = subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 20
    while child.poll() is None and time.monotonic() < deadline:
        if any(path.stat().st_size > SMALL for path in folder.glob(".*.part")):
            child.send_signal(number)
            break
        time.sleep(0.0005)
    return child.wait(20), child.communicate()[1]


@POSIX
@pytest.mark.parametrize("old", [None, OLD], ids=["no old file", "an old file"])
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_a_cut_stopped_half_way_leaves_what_there_was(tmp_path, name, old):
    lora, out = tmp_path / "large.safetensors", tmp_path / "out"
    out.mkdir()
    sparse_lora(lora, megabytes=500)
    before, output = fingerprint(lora), out / "slice.safetensors"
    if old:
        output.write_bytes(old)
    command = [sys.executable, "-c", STOPPABLE, SCRIPT, "--loras", lora, "--output_path", output]
    code, err = stop_while_writing(command, out, getattr(signal, name))
    assert code != 0, "it was done before it could be stopped"
    assert "Traceback" not in err
    assert fingerprint(lora) == before
    assert (output.read_bytes() if output.exists() else None) == old
    left = [path.name for path in out.iterdir() if path != output]
    # Who kills it outright must throw the half file away, which has no LoRA's name.
    assert all(part.startswith(".") and part.endswith(".part") for part in left)
    assert name != "SIGINT" or left == []
    for part in left:
        (out / part).unlink()


def test_a_source_that_shrinks_while_it_is_read_is_refused(slicer):
    lora = slicer.folder / "a.safetensors"
    lora.write_bytes(small_file())
    read = blora_slicer.read_lora(lora)
    lora.write_bytes(small_file()[:-10])
    with pytest.raises(blora_slicer.SliceError, match="shorter"):
        blora_slicer.write_lora(list(read.modules.values()), {}, slicer.output)
    slicer.check_folder({lora.name}, wrote=False)


# ---- Whole files of strange content --------------------------------------------------------------


def numbers(*shape: int, value: float = 0.5, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.full(shape, value).to(dtype)


def large(value: float, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A LoRA of numbers as large as the type has them."""
    full = {"value": 1.0, "dtype": dtype}
    return {
        "lora_up.weight": numbers(5, 2, **full) * value,
        "lora_down.weight": numbers(2, 6, **full) * value,
        "alpha": numbers(**full),
    }


F8, F8B, HALF, BF, F64 = (
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float64,
)  # fmt: skip
PLAIN = {"lora_up.weight": numbers(5, 2), "lora_down.weight": numbers(2, 6)}
ODD_NUMBERS = torch.tensor(
    [[math.nan, math.inf], [-math.inf, 65504.0], [6e-8, -0.0], [1, 2], [3, 4]]
)
MODULES: dict[str, dict[str, torch.Tensor]] = {
    "rank 0": {"lora_up.weight": numbers(5, 0), "lora_down.weight": numbers(0, 6)},
    "rank 0 with alpha": {
        "lora_up.weight": numbers(5, 0),
        "lora_down.weight": numbers(0, 6),
        "alpha": numbers(),
    },
    "no outputs": {"lora_up.weight": numbers(0, 2), "lora_down.weight": numbers(2, 6)},
    "no inputs": {"lora_up.weight": numbers(5, 2), "lora_down.weight": numbers(2, 0)},
    "scalars": {"lora_up.weight": numbers(), "lora_down.weight": numbers()},
    "vectors": {"lora_up.weight": numbers(5), "lora_down.weight": numbers(6)},
    "five dimensions": {
        "lora_up.weight": numbers(5, 2, 1, 1, 1),
        "lora_down.weight": numbers(2, 6, 3, 3, 3),
    },
    "two ranks": {"lora_up.weight": numbers(5, 2), "lora_down.weight": numbers(3, 6)},
    "up alone": {"lora_up.weight": numbers(5, 2)},
    "up and alpha": {"lora_up.weight": numbers(5, 2), "alpha": numbers()},
    "down alone": {"lora_down.weight": numbers(2, 6)},
    "mid alone": {"lora_mid.weight": numbers(2, 2, 3, 3)},
    "a mid that does not fit": PLAIN | {"lora_mid.weight": numbers(3, 4)},
    "a scalar mid": PLAIN | {"lora_mid.weight": numbers()},
    "alpha alone": {"alpha": numbers()},
    "alpha of one element": PLAIN | {"alpha": numbers(1)},
    "alpha of 1 x 1": PLAIN | {"alpha": numbers(1, 1)},
    "alpha of two elements": PLAIN | {"alpha": numbers(2)},
    "alpha of no elements": PLAIN | {"alpha": numbers(0)},
    "alpha 0": PLAIN | {"alpha": numbers(value=0)},
    "alpha -0": PLAIN | {"alpha": numbers(value=-0.0)},
    "alpha -1": PLAIN | {"alpha": numbers(value=-1)},
    "alpha NaN": PLAIN | {"alpha": numbers(value=math.nan)},
    "alpha inf": PLAIN | {"alpha": numbers(value=math.inf)},
    "alpha tiny": PLAIN | {"alpha": torch.tensor(1e-45)},
    "alpha huge": PLAIN | {"alpha": torch.tensor(3e38)},
    "alpha beyond fp32": PLAIN | {"alpha": torch.tensor(1e300, dtype=F64)},
    "alpha as bf16": PLAIN | {"alpha": numbers(dtype=BF)},
    "alpha as fp64": PLAIN | {"alpha": numbers(dtype=F64)},
    "alpha as int64": PLAIN | {"alpha": torch.tensor(2)},
    "alpha as the largest int64": PLAIN | {"alpha": torch.tensor(2**63 - 1)},
    "alpha as uint8": PLAIN | {"alpha": torch.tensor(2, dtype=torch.uint8)},
    "alpha as bool": PLAIN | {"alpha": torch.tensor(True)},
    "alpha as fp8": PLAIN | {"alpha": numbers(dtype=F8)},
    "alpha as complex": PLAIN | {"alpha": torch.tensor(1 + 2j)},
    "fp8": {key: value.to(F8) for key, value in PLAIN.items()},
    "fp8 of the other kind": {key: value.to(F8B) for key, value in PLAIN.items()},
    "fp8 up alone": PLAIN | {"lora_up.weight": numbers(5, 2, dtype=F8)},
    "int8": {key: value.to(torch.int8) for key, value in PLAIN.items()},
    "bool": {key: value.bool() for key, value in PLAIN.items()},
    "complex": {key: value.to(torch.complex64) for key, value in PLAIN.items()},
    "int64": {key: value.long() for key, value in PLAIN.items()},
    "all types": {
        f"part{index}": numbers(3, dtype=dtype)
        for index, dtype in enumerate(
            (F64, BF, HALF, F8, F8B, torch.int8, torch.uint8, torch.int16, torch.int64, torch.bool)
        )
    },
    "NaN and inf in fp16": PLAIN | {"lora_up.weight": ODD_NUMBERS.half()},
    "NaN and inf in bf16": PLAIN | {"lora_up.weight": ODD_NUMBERS.bfloat16()},
    "NaN and inf in fp32": PLAIN | {"lora_up.weight": ODD_NUMBERS},
    "NaN and inf in fp64": PLAIN | {"lora_up.weight": ODD_NUMBERS.double()},
    "a signalling NaN": PLAIN
    | {"lora_up.weight": torch.full((5, 2), 0x7C01, dtype=torch.int16).view(HALF)},
    "the largest fp16": large(65504.0, HALF),
    "the largest bf16": large(3.38e38, BF),
    "the largest fp32": large(3.4e38, torch.float32),
    "the largest fp64": large(1e308, F64),
    "large fp64": large(1e100, F64),
    "the smallest fp32": large(1e-45, torch.float32),
    "DoRA of no length": PLAIN | {"dora_scale": numbers(0, 1)},
    "DoRA of a scalar": PLAIN | {"dora_scale": numbers()},
    "DoRA of a vector": PLAIN | {"dora_scale": numbers(5)},
    "DoRA of another length": PLAIN | {"dora_scale": numbers(7, 1)},
    "DoRA alone": {"dora_scale": numbers(5, 1)},
    "half a LoHa": {"hada_w1_a": numbers(5, 2)},
    "a LoHa that does not fit": {
        "hada_w1_a": numbers(5, 2),
        "hada_w1_b": numbers(3, 6),
        "hada_w2_a": numbers(4, 2),
        "hada_w2_b": numbers(2, 7),
    },
    "a LoHa of scalars": {f"hada_w{i}_{x}": numbers() for i in (1, 2) for x in "ab"},
    "a LoHa with half a core": {
        **{f"hada_w{i}_a": numbers(2, 5) for i in (1, 2)},
        **{f"hada_w{i}_b": numbers(2, 6) for i in (1, 2)},
        "hada_t1": numbers(2, 2, 3, 3),
    },
    "half a LoKr": {"lokr_w1": numbers(2, 2)},
    "half a factored LoKr": {"lokr_w1_a": numbers(2, 2)},
    "a LoKr of scalars": {"lokr_w1": numbers(), "lokr_w2": numbers()},
    "a LoKr with a core alone": {"lokr_w1": numbers(2, 2), "lokr_t2": numbers(2, 2, 3, 3)},
    "a LoKr of rank 0": {
        "lokr_w1": numbers(2, 2),
        "lokr_w2_a": numbers(3, 0),
        "lokr_w2_b": numbers(0, 3),
        "alpha": numbers(),
    },
    "full without numbers": {"diff": numbers(0, 6)},
    "a bias alone": {"diff_b": numbers(5)},
    "a norm of a scalar": {"w_norm": numbers()},
    "IA3 of no length": {"weight": numbers(0), "on_input": torch.tensor(True)},
    "IA3 without a side": {"weight": numbers(5)},
    "half a GLoRA": {"a2.weight": numbers(5, 2)},
    "a GLoRA of scalars": {f"{x}{i}.weight": numbers() for x in "ab" for i in (1, 2)},
    "OFT of a scalar": {"oft_blocks": numbers()},
    "OFT of no blocks": {"oft_blocks": numbers(0, 2, 2)},
    "T-LoRA alone": {"lambda_layer": numbers(2)},
    "everything at once": PLAIN
    | {key: numbers(1) for key in ("hada_w1_a", "lokr_w1", "diff", "oft_blocks")},
    "an unknown suffix": {"a.b.c": numbers(2)},
    "an empty suffix's tensor": {"\x1b[2J\n": numbers(2)},
}  # fmt: skip
WAYS: list[list[str]] = [
    *([f"--alphas={strength}"] for strength in (0.5, 0, -3, 1e-300, 1e38)),
    *(["--save_precision", precision] for precision in ("float", "fp16", "bf16")),
    ["--save_precision", "fp16", "--alphas=1e6"],
    ["--no_metadata", "--debug"],
]


def finite(path: Path) -> bool:
    """Whether a file holds neither NaN nor inf."""
    wide = (t if t.is_complex() else t.double() for t in load_file(path).values())
    return all(bool(torch.isfinite(t).all()) for t in wide)


def strange(slicer: Slicer, what: str) -> Path:
    """One of the modules above as a file."""
    tensors = {f"{NAME}.{suffix}": value.clone() for suffix, value in MODULES[what].items()}
    return write_lora(slicer.folder / "strange.safetensors", tensors)


def without_shapes(path: Path) -> dict[str, tuple[str, bytes]]:
    """Type and bytes of each tensor: PEFT's dora_scale gets the shape that others expect."""
    return {key: (dtype, data) for key, (dtype, _, data) in stored(path).items()}


@pytest.mark.parametrize("what", MODULES)
def test_a_strange_module_is_copied_to_the_byte(slicer, what):
    lora = strange(slicer, what)
    for way in ([], ["--no_metadata"], ["--save_precision", "fp16", "--no_metadata"]):
        code = slicer(lora, *way)
        assert code == 0 or "--save_precision" in way, slicer.err
        if "--save_precision" not in way:
            assert without_shapes(slicer.output) == without_shapes(lora)


@pytest.mark.parametrize("what", MODULES)
def test_a_strange_module_is_changed_or_refused_and_never_becomes_inf(slicer, what):
    lora = strange(slicer, what)
    whole = finite(lora)
    for way in WAYS:
        quiet = [part for part in way if part != "--debug"]
        code = slicer(lora, *quiet)
        assert code or not whole or finite(slicer.output), f"{way}: became inf"


@pytest.mark.parametrize("strength", ["1e39", "-1e300", "3.5e38"])
@pytest.mark.parametrize("dtype", [HALF, BF, torch.float32, F64])
def test_a_strength_that_fp32_cannot_hold_is_refused(slicer, strength, dtype):
    # The zeros would become NaN, and all else inf.
    tensors = {key: value.to(dtype) for key, value in small_lora().items()}
    tensors[UP][0] = 0
    lora = write_lora(slicer.folder / "a.safetensors", tensors)
    with contextlib.suppress(SystemExit):
        assert slicer(lora, f"--alphas={strength}") == 1
    assert not slicer.output.exists() or slicer.output.read_bytes() == OLD


@pytest.mark.parametrize("what", MODULES)
def test_a_strange_module_is_shown(slicer, what):
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lora = strange(slicer, what)
    assert slicer(lora, "--inspect") == 0
    assert "\x1b" not in slicer.out
    assert slicer(lora, "--inspect", "--json") == 0
    [facts] = json.loads(slicer.out, parse_constant=refuse)
    assert facts["modules"] == 1


@pytest.mark.parametrize("what", MODULES)
def test_a_strange_module_is_joined_with_a_sound_one_or_refused(slicer, what):
    lora = strange(slicer, what)
    sound = write_lora(slicer.folder / "sound.safetensors", lora_module(OTHER, alpha=2.0))
    whole = finite(lora)
    for way in ([], ["--alphas", "0.5", "2"]):
        code = slicer(lora, sound, "--traits", "content", "style", *way)
        assert code or not whole or finite(slicer.output), f"{way}: became inf"


# ---- Metadata that is not what it should be ------------------------------------------------------

DEEP = "[" * 100_000
VALUES = [
    "", "null", "1", "[]", "{}", "{", "x", "NaN", "1e999", '"a"', "1" * 5000, DEEP,
    '{"a":' * 100_000, '{"a": null}', '{"a": {"b": null}}', '{"a": {"b": 1e999}}',
    '{"a": {"b": 5' + "0" * 4000 + "}}", '{"a": {"b": -1}}', '{"a": {"\\ud800": 1}}', "\u2028",
    '{"unet.lora_alpha": null}', '{"unet.lora_alpha": "8"}', '{"unet.lora_alpha": []}',
    '{"unet.lora_alpha": NaN}', '{"unet.lora_alpha": 1e999}', '{"unet.lora_alpha": 1e39}',
    '{"unet.lora_alpha": 1' + "0" * 400 + "}", '{"unet.lora_alpha": 0}',
    '{"unet.lora_alpha": true}',
    '{"unet.lora_alpha": 4, "unet.alpha_pattern": 4}',
    '{"unet.lora_alpha": 4, "unet.alpha_pattern": [4]}',
    '{"unet.lora_alpha": 4, "unet.alpha_pattern": {"to_q": null}}',
    '{"unet.lora_alpha": 4, "unet.alpha_pattern": {"to_q": "x"}}',
    '{"unet.lora_alpha": 4, "unet.alpha_pattern": {"": 2}}',
    '{"unet.lora_alpha": 4, "unet.use_rslora": "x"}',
]  # fmt: skip
KEYS = [
    "lora_adapter_metadata", "ss_tag_frequency", "ss_network_dim", "ss_network_alpha",
    "ss_training_comment", "ss_base_model_version", "modelspec.title", "ss_steps",
]  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_metadata_that_is_not_what_it_should_be_does_no_harm(slicer, key):
    tensors = {f"{NAME}.{suffix}": value for suffix, value in PLAIN.items()}
    sound = write_lora(slicer.folder / "sound.safetensors", lora_module(OTHER))
    both = [sound, "--traits", "content", "style"]
    failures = []
    for value in VALUES:
        lora = write_lora(slicer.folder / "metadata.safetensors", tensors, {key: value})
        for way in ([], ["--alphas", "0.5"], both, *LOOKS):
            try:
                slicer(lora, *way)
            except (Exception, AssertionError) as error:
                text = f"{value[:60]} {way}: {type(error).__name__} {str(error)[:200]}"
                failures.append(text)
                slicer.capsys.readouterr()
    assert failures == []


# ---- Broken base models --------------------------------------------------------------------------

WEIGHT = "model.diffusion_model.output_blocks.0.1.transformer_blocks.0.attn1.to_q.weight"
BASES: dict[str, Callable[[Path], object]] = {
    **STRANGERS,
    "a truncated file": lambda path: path.write_bytes(save({WEIGHT: numbers(5, 6)})[:-1]),
    "no weight": lambda path: write_lora(path, {"a": numbers(1)}),
    "a LoRA": lambda path: write_lora(path, lora_module(NAME)),
    "a weight of another shape": lambda path: write_lora(path, {WEIGHT: numbers(4, 6)}),
    "a weight of another size": lambda path: write_lora(path, {WEIGHT: numbers(6, 5)}),
    "a scalar": lambda path: write_lora(path, {WEIGHT: numbers()}),
    "a weight of no size": lambda path: write_lora(path, {WEIGHT: numbers(0, 6)}),
    "fp8": lambda path: write_lora(path, {WEIGHT: numbers(5, 6, dtype=F8)}),
    "integers": lambda path: write_lora(path, {WEIGHT: numbers(5, 6, dtype=torch.int8)}),
    "bool": lambda path: write_lora(path, {WEIGHT: numbers(5, 6, dtype=torch.bool)}),
    "zeros in the weight": lambda path: write_lora(path, {WEIGHT: numbers(5, 6, value=0)}),
    "NaN": lambda path: write_lora(path, {WEIGHT: numbers(5, 6, value=math.nan)}),
    "inf": lambda path: write_lora(path, {WEIGHT: numbers(5, 6, value=math.inf)}),
    "the largest": lambda path: write_lora(
        path, {WEIGHT: numbers(5, 6, value=3e38, dtype=torch.float32)}
    ),
    "an open_clip scalar": lambda path: write_lora(
        path,
        {
            "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight": numbers(),
            WEIGHT: numbers(5, 6),
        },
    ),
}
DORAS = {
    "by output": PLAIN | {"dora_scale": numbers(5, 1, value=1)},
    "by input": PLAIN | {"dora_scale": numbers(1, 6, value=1)},
    "of zeros": PLAIN | {"dora_scale": numbers(5, 1, value=0)},
    "of NaN": PLAIN | {"dora_scale": numbers(5, 1, value=math.nan)},
    "of a scalar": PLAIN | {"dora_scale": numbers()},
    "of another length": PLAIN | {"dora_scale": numbers(7, 1)},
    "of no length": PLAIN | {"dora_scale": numbers(0, 1)},
    "of fp8": PLAIN | {"dora_scale": numbers(5, 1, dtype=F8)},
    "of zero factors": {
        "lora_up.weight": numbers(5, 2, value=0),
        "lora_down.weight": numbers(2, 6, value=0),
        "dora_scale": numbers(5, 1, value=0),
    },
    "without down": {"lora_up.weight": numbers(5, 2), "dora_scale": numbers(5, 1)},
    "of two ranks": PLAIN | {"lora_down.weight": numbers(3, 6), "dora_scale": numbers(5, 1)},
    "of scalars": {
        "lora_up.weight": numbers(), "lora_down.weight": numbers(), "dora_scale": numbers(5, 1),
    },
}  # fmt: skip


@pytest.mark.parametrize("dora", DORAS)
def test_a_dora_and_its_base_model_can_be_broken_in_every_combination(slicer, dora):
    tensors = {f"{NAME}.{suffix}": value.clone() for suffix, value in DORAS[dora].items()}
    lora = write_lora(slicer.folder / "dora.safetensors", tensors)
    failures = []
    for index, (what, make) in enumerate(BASES.items()):
        base = slicer.folder / f"base{index}.safetensors"
        make(base)
        for way in (["--alphas", "0.5"], ["--alphas=-2", "--save_precision", "fp16"]):
            before = fingerprint(base)
            try:
                code = slicer(lora, *way, "--base_model", base)
                assert code or finite(slicer.output), "became NaN or inf"
                assert fingerprint(base) == before
            except (Exception, AssertionError) as error:
                failures.append(f"{what} {way[0]}: {type(error).__name__} {str(error)[:200]}")
                slicer.capsys.readouterr()
    assert failures == []


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


def mutate_tensors(data: bytes, chance: random.Random) -> bytes:
    """A sound file of other shapes, types, names and values."""
    header, _ = header_of(data)
    sizes = {"F16": 2, "BF16": 2, "F32": 4, "I64": 8, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F64": 8}
    offset, fresh = 0, {}
    suffixes = [suffix for module in MODULES.values() for suffix in module]
    for key in header:
        if key == "__metadata__":
            continue
        shape = [chance.randrange(4) for _ in range(chance.randrange(4))]
        dtype = chance.choice(list(sizes))
        stop = offset + math.prod(shape) * sizes[dtype]
        if chance.random() < 0.5:
            key = f"{NAME}.{chance.choice(suffixes)}"
        if key not in fresh:
            fresh[key] = tensor(dtype, shape, [offset, stop])
            offset = stop
    return raw(fresh, chance.randbytes(offset))


@pytest.mark.parametrize("mutate", [mutate_bytes, mutate_header, mutate_tensors])
def test_a_file_mutated_by_chance_does_no_harm(slicer, mutate):
    chance = random.Random(0)
    sound = [
        small_file(),
        save(small_lora() | lora_module(OTHER)),
        save(lora_module(NAME, alpha=None)),
    ]
    cases = [(index, mutate(chance.choice(sound), chance)) for index in range(300)]
    assert sum(survey(slicer, iter(cases)).values()) == 600
