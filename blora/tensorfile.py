"""What a safetensors file is: types, the one reader of headers, the writer with kohya's hashes.

modules.py reads LoRAs with it, blora_preflight.py looks at checkpoints, blora_slicer.py writes.
Values are not its concern: a tensor is bytes to copy, and one whose values change (Changed, in
strength.py) brings what makes its bytes. So nothing but the standard library is loaded.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
import queue
import re
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

from blora.text import BloraError, printable, written_whole

# ---- Types ---------------------------------------------------------------------------------------

# Bits of each type, in the order of tensors in a file: wide types first, so that each is aligned
# (enum Dtype of safetensors 0.8.0, from its end: github.com/huggingface/safetensors,
# safetensors/src/tensor.rs).
DTYPES = {
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F32": 32, "U32": 32, "I32": 32,
    "BF16": 16, "F16": 16, "U16": 16, "I16": 16, "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8,
    "F8_E8M0": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I8": 8, "U8": 8, "F6_E3M2": 6, "F6_E2M3": 6,
    "F4": 4, "BOOL": 8,
}  # fmt: skip
FLOATS = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}  # bytes of those whose values can be changed
FLOAT8 = ("F8_E4M3", "F8_E5M2")  # whose values can be read, and stored as one of FLOATS
# How struct unpacks a number; the types below them are the upper half of a wider one.
FORMATS = {
    "F16": "<e", "F32": "<f", "F64": "<d", "BOOL": "<?", "U8": "<B", "I8": "<b", "I16": "<h",
    "U16": "<H", "I32": "<i", "U32": "<I", "I64": "<q", "U64": "<Q",
}  # fmt: skip
UPPER_HALVES = {"BF16": "<f", "F8_E5M2": "<e"}
NUMBERS = {*FORMATS, *UPPER_HALVES, "F8_E4M3"}  # the types that number() reads


def number(dtype: str, data: bytes) -> float:
    """The one number that these bytes are; NaN where they cannot be read as one."""
    if dtype in UPPER_HALVES:
        return struct.unpack(UPPER_HALVES[dtype], bytes(len(data)) + data)[0]
    if dtype == "F8_E4M3":
        return float8_e4m3(data[0])
    return float(struct.unpack(FORMATS[dtype], data)[0]) if dtype in FORMATS else math.nan


def float8_e4m3(bits: int) -> float:
    """A sign, 4 bits of exponent with a bias of 7, 3 of mantissa, no inf (arXiv 2209.05433)."""
    exponent, mantissa = bits >> 3 & 0xF, bits & 7
    if bits & 0x7F == 0x7F:
        return math.nan
    size = (mantissa / 8 + (exponent > 0)) * 2.0 ** (max(exponent, 1) - 7)
    return -size if bits & 0x80 else size


def as_fp32(value: float) -> float:
    """The nearest number that fp32 holds; inf where it is too large."""
    try:
        return struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return math.inf


def fp32_holds(value: float) -> bool:
    """Whether a number is finite, as fp32 too."""
    return math.isfinite(as_fp32(value))


# ---- Tensors and their bytes ---------------------------------------------------------------------

CHUNK = 1 << 20  # bytes read, hashed and written at a time


@dataclass(frozen=True)
class Span:
    """Bytes of a file, from `start` to before `stop`."""

    path: Path
    start: int
    stop: int


class Files:
    """The files that a LoRA is written from, each opened once; a context that closes them."""

    def __init__(self) -> None:
        self.opened: dict[Path, BinaryIO] = {}

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self.opened.values():
            file.close()

    def chunks(self, span: Span, size: int = CHUNK) -> Iterator[bytes]:
        """The span's bytes, `size` at a time; BloraError where the file has become shorter."""
        if span.path not in self.opened:
            self.opened[span.path] = span.path.open("rb")
        file, left = self.opened[span.path], span.stop - span.start
        file.seek(span.start)
        while left:
            chunk = file.read(min(left, size))
            if len(chunk) < min(left, size):
                raise BloraError(f"{span.path} became shorter while it was read: try again")
            left -= len(chunk)
            yield chunk


@dataclass(frozen=True)
class Tensor:
    """A tensor as it is stored: its type, its shape, and its bytes, in a file or at hand."""

    dtype: str
    shape: tuple[int, ...]
    source: Span | bytes

    @property
    def size(self) -> int:
        """Bytes that chunks() gives in all."""
        if isinstance(self.source, bytes):
            return len(self.source)
        return self.source.stop - self.source.start

    def read(self) -> bytes:
        """All of its bytes."""
        with Files() as files:
            return b"".join(self.chunks(files))

    def chunks(self, files: Files) -> Iterator[bytes]:
        """The bytes to write."""
        if isinstance(self.source, bytes):
            yield self.source
        else:
            yield from files.chunks(self.source)


# ---- The header ----------------------------------------------------------------------------------

LONGEST = 100_000_000  # bytes of a header; safetensors reads no longer one
DEEPEST = 125  # lists in lists in a field; safetensors reads no deeper ones
FIELDS = ("dtype", "shape", "data_offsets")


def finite(text: str) -> float:
    """A number of the header's JSON; NaN and inf are none, as for safetensors."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is not a JSON number")
    return value


def whole(text: str) -> float:
    """A number without a fraction; safetensors reads -0 as a float."""
    value = finite(text)
    return value if text == "-0" else int(text)


def parse_json(text: bytes) -> tuple[tuple[str, Any], ...]:
    """The header's JSON by the rules of safetensors' own parser; ValueError where it has none.

    Objects are tuples of their pairs, so that duplicate keys are noticed.
    """
    header = json.loads(
        text.decode("utf-8"),
        object_pairs_hook=tuple,
        parse_int=whole,
        parse_float=finite,
        parse_constant=finite,
    )
    if b"\\u" in text:  # an escape may be half of a letter, which no UTF-8 can hold
        json.dumps(header, ensure_ascii=False).encode("utf-8")
    if not isinstance(header, tuple):
        raise ValueError("its header is not a JSON object")
    return header


def depth(value: object) -> int:
    """How many lists and objects lie in each other."""
    return 1 + max(map(depth, value), default=0) if isinstance(value, list | tuple) else 0


def is_counts(value: object) -> bool:
    """Whether it is a list of numbers that 64 bits hold, none of them negative."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 64 for n in value)


def parse_tensor(key: str, value: object, path: Path, data: int) -> Tensor:
    """A tensor of the header; `data` is where the tensors begin. ValueError where it is none."""
    # safetensors also takes the three fields as a list.
    pairs = tuple(zip(FIELDS, value, strict=True)) if isinstance(value, list) else value
    names = [name for name, _ in pairs] if isinstance(pairs, tuple) else []
    if any(names.count(field) != 1 for field in FIELDS):
        raise ValueError(f"{key} is not a tensor")
    if len(names) > len(FIELDS) and depth(pairs) > DEEPEST + 2:
        raise ValueError(f"{key} is nested too deep")
    dtype, shape, offsets = (dict(pairs)[field] for field in FIELDS)
    fine = isinstance(dtype, str) and re.fullmatch("[A-Z][A-Z0-9_]*", dtype)
    fine = fine and is_counts(shape) and is_counts(offsets) and len(offsets) == 2
    if not fine or offsets[0] > offsets[1]:
        raise ValueError(f"{key} has no type, shape or offsets")
    return Tensor(dtype, tuple(shape), Span(path, data + offsets[0], data + offsets[1]))


def has_its_size(tensor: Tensor) -> bool:
    """Whether a tensor is as large as its shape and type say; of a type not known here, any is."""
    bits = DTYPES.get(tensor.dtype)
    elements = list(accumulate(tensor.shape, operator.mul, initial=1))
    if max(elements) * (bits or 1) >= 1 << 64:
        return False
    return bits is None or elements[-1] * bits == 8 * tensor.size


def check_layout(tensors: dict[str, Tensor], data: int, size: int) -> None:
    """Refuse wrong sizes, gaps, overlaps, and a file that is shorter or longer (ValueError)."""
    end = data
    for key, tensor in sorted(
        tensors.items(), key=lambda item: (item[1].source.start, item[1].source.stop)
    ):
        if tensor.source.start != end:
            raise ValueError(f"{key} does not begin where the tensor before it ends")
        if not has_its_size(tensor):
            raise ValueError(f"{key} is not as large as its shape and type say")
        end = tensor.source.stop
    if end != size:
        count = f"{abs(end - size):,} byte{'' if abs(end - size) == 1 else 's'}"
        than = "shorter" if end > size else "longer"
        raise ValueError(f"it is {count} {than} than its header says")


def parse_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file's tensors and metadata from its header; ValueError where it is not whole."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError("it ends before its header does")
        if length > LONGEST:
            raise ValueError("its header is too long")
        header = parse_json(file.read(length))
    [metadata, *more] = [value for key, value in header if key == "__metadata__"] or [None]
    pairs = () if metadata is None else metadata
    if more or not isinstance(pairs, tuple) or not all(isinstance(v, str) for _, v in pairs):
        raise ValueError("its metadata has values that are not text")
    data = 8 + length
    tensors = {
        key: parse_tensor(key, value, path, data) for key, value in header if key != "__metadata__"
    }
    check_layout(tensors, data, size)
    return tensors, dict(pairs)


def read_header(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file and its metadata; the tensors' bytes are not read.

    It accepts every file that the safetensors library accepts, and types newer than the library; a
    type that is written as an object is refused. BloraError where the file cannot be read or is
    not whole.
    """
    try:
        return parse_file(path)
    except (ValueError, RecursionError) as error:
        raise BloraError(
            f"{path} is not a whole safetensors file ({printable(str(error))}): "
            "download it again, or save it as safetensors"
        ) from error
    except OSError as error:
        raise BloraError(f"cannot read {path} ({printable(str(error))})") from error


def json_object(text: str | None) -> dict[str, Any]:
    """A metadata value that should be a JSON object; anything else is an empty one."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


# ---- Writing -------------------------------------------------------------------------------------

HASHES = {"sshs_model_hash": 64, "sshs_legacy_hash": 8}  # hex digits
LEGACY_HASH = (0x100000, 0x110000)  # the bytes of a file that kohya's older hash is of
# ComfyUI shows no header that is longer.
LONGEST_HEADER = 1 << 20
SHOW_PROGRESS = 200_000_000  # bytes; less is written within a second


def in_order(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by type and key; a type that is not known here comes last."""
    order = {dtype: index for index, dtype in enumerate(DTYPES)}
    return dict(sorted(tensors.items(), key=lambda i: (order.get(i[1].dtype, len(order)), i[0])))


def header_bytes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A file's start: the header's length, and the header padded to a multiple of 8."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for key, tensor in tensors.items():
        offsets = [offset, offset + tensor.size]
        header[key] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
        offset += tensor.size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode(errors="replace")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def shorten_metadata(
    tensors: dict[str, Tensor], metadata: dict[str, str]
) -> tuple[dict[str, str], list[str]]:
    """The metadata less its longest entries, until programs read the header; and those entries."""
    sizes = {key: len(header_bytes({}, {key: value})) for key, value in metadata.items()}
    over = len(header_bytes(tensors, metadata)) - LONGEST_HEADER
    dropped: list[str] = []
    for key in sorted(sizes, key=lambda key: -sizes[key]):
        if over < 0:
            break
        dropped.append(key)
        over -= sizes[key] - len(header_bytes({}, {"": ""}))
    left_out = set(dropped)
    return {key: value for key, value in metadata.items() if key not in left_out}, dropped


def file_chunks(tensors: dict[str, Tensor]) -> Iterator[bytes]:
    """The bytes of all tensors; copies that stand one behind the other are read as one."""
    run: Span | None = None
    with Files() as files:
        for tensor in tensors.values():
            span = tensor.source if type(tensor) is Tensor else None
            if run and isinstance(span, Span) and (span.path, span.start) == (run.path, run.stop):
                run = replace(run, stop=span.stop)
                continue
            if run:
                yield from files.chunks(run)
            run = span if isinstance(span, Span) else None
            if run is None:
                yield from tensor.chunks(files)
        if run:
            yield from files.chunks(run)


WAITING = 2  # chunks in memory that are still to be hashed


class Hashes:
    """kohya's two hashes, computed in a thread beside the writing: hashlib needs no GIL.

    As precalculate_safetensors_hashes in kohya's sd-scripts does: the model hash is of all bytes
    after the header, the legacy hash of 64 KiB of a file that carries the ss_ metadata alone.
    """

    def __init__(self, shift: int) -> None:
        """`shift` is the length of the header with the ss_ metadata alone, in bytes."""
        self.start, self.stop = (at - shift for at in LEGACY_HASH)
        self.model, self.legacy = hashlib.sha256(), hashlib.sha256()
        self.chunks: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.room: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(WAITING):
            self.room.put(None)
        self.thread = threading.Thread(target=self.run, daemon=True)

    def run(self) -> None:
        """Hash what add() hands over, until there is no more."""
        position = 0
        while (chunk := self.chunks.get()) is not None:
            self.model.update(chunk)
            self.legacy.update(chunk[max(0, self.start - position) : max(0, self.stop - position)])
            position += len(chunk)
            self.room.put(None)

    def add(self, chunk: bytes) -> None:
        """Hand a chunk over; waits while too many are in memory."""
        self.room.get()
        self.chunks.put(chunk)

    def __enter__(self) -> Hashes:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.chunks.put(None)
        self.thread.join()

    def digests(self) -> dict[str, str]:
        """Both as metadata, once all is added."""
        both = zip(HASHES.items(), (self.model, self.legacy), strict=True)
        return {key: digest.hexdigest()[:digits] for (key, digits), digest in both}


def with_progress(chunks: Iterator[bytes], total: int) -> Iterator[bytes]:
    """The chunks, behind a bar on stderr once that takes more than a second."""
    if total < SHOW_PROGRESS:
        yield from chunks
        return
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:  # the bar is all that it is for
        yield from chunks
        return
    with tqdm(total=total, unit="B", unit_scale=True, delay=1, leave=False) as bar:
        for chunk in chunks:
            yield chunk
            bar.update(len(chunk))


def write_tensors(file: BinaryIO, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a whole file; its hashes go into the room that the metadata has for them."""
    total = sum(tensor.size for tensor in tensors.values())
    file.write(header_bytes(tensors, metadata))
    if not HASHES.keys() & metadata.keys():
        file.writelines(with_progress(file_chunks(tensors), total))
        return
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    with Hashes(len(header_bytes(tensors, training))) as hashes:
        for chunk in with_progress(file_chunks(tensors), total):
            hashes.add(chunk)
            file.write(chunk)
    digests = {key: digest for key, digest in hashes.digests().items() if key in metadata}
    file.seek(0)
    file.write(header_bytes(tensors, metadata | digests))


def write_file(tensors: dict[str, Tensor], metadata: dict[str, str], output: Path) -> None:
    """Write a file, which is there whole or not at all.

    Tensors stand in it as safetensors orders them. BloraError where it cannot be written.
    """
    with written_whole(output) as part, part.open("wb") as file:
        write_tensors(file, in_order(tensors), metadata)
