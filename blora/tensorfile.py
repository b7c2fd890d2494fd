"""What a safetensors file is: types, the one reader of headers, the writer with kohya's hashes.

The slicer reads LoRAs with it and writes slices, pre-flight reads checkpoints. A tensor is bytes to
copy here; values are changed in slicer/strength.py. So only the standard library is imported.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from queue import SimpleQueue
from threading import Semaphore, Thread
from typing import Any, BinaryIO

from blora.text import BloraError, progress_bar, shortened, written_whole

# ---- Types ---------------------------------------------------------------------------------------

# Bits of each type, in the order that tensors have in a file: wide types first, to be aligned
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


def number(dtype: str, data: bytes) -> float:
    """The number that these bytes store; NaN for a type that cannot be read."""
    if dtype in UPPER_HALVES:
        return float(struct.unpack(UPPER_HALVES[dtype], bytes(len(data)) + data)[0])
    # 1 bit of sign, 4 of exponent with a bias of 7, 3 of mantissa, no inf (arXiv 2209.05433)
    if dtype == "F8_E4M3" and data[0] & 0x7F != 0x7F:
        exponent, mantissa = data[0] >> 3 & 0xF, data[0] & 7
        size = (mantissa / 8 + (exponent > 0)) * 2.0 ** (max(exponent, 1) - 7)
        return -size if data[0] & 0x80 else size
    return float(struct.unpack(FORMATS[dtype], data)[0]) if dtype in FORMATS else math.nan


def as_fp32(value: float) -> float:
    """The nearest number that fp32 holds; inf where it is too large."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return math.inf


def fp32_holds(value: float) -> bool:
    """Whether a number is finite, as fp32 too."""
    return math.isfinite(as_fp32(value))


def fp32_number(text: str) -> float | None:
    """The number that a text gives; None where it is none, or fp32 does not hold it."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if fp32_holds(value) else None


# ---- Tensors and their bytes ---------------------------------------------------------------------

CHUNK = 1 << 20  # bytes read, hashed and written at a time


@dataclass(frozen=True)
class Tensor(ABC):
    """A tensor to read or write: its type, its shape, and, by subclass, where its bytes are."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Its length in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype] // 8

    @abstractmethod
    def chunks(self) -> Iterator[bytes | memoryview]:
        """Its bytes, some at a time."""

    def read(self) -> bytes:
        """All of its bytes."""
        return b"".join(self.chunks())


@dataclass(frozen=True)
class Constant(Tensor):
    """A tensor whose bytes are in memory."""

    data: bytes

    def chunks(self) -> Iterator[bytes | memoryview]:
        yield self.data


@dataclass(frozen=True)
class Stored(Tensor):
    """A tensor in a file: the bytes from `start` to before `stop`."""

    path: Path
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def rows(self, index: int, number: int) -> Stored:
        """One of so many equal parts along the first axis, the rest of a division left out."""
        shape = tuple(length // number for length in self.shape[:1]) + self.shape[1:]
        start = self.start + index * (self.size // number)
        return replace(self, shape=shape, start=start, stop=start + self.size // number)

    def chunks(self, length: int = CHUNK) -> Iterator[bytes | memoryview]:
        """The bytes, `length` at a time; BloraError where the file cannot be read any more."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.start)
                for position in range(self.start, self.stop, length):
                    chunk = file.read(min(length, self.stop - position))
                    if len(chunk) < min(length, self.stop - position):
                        raise BloraError(f"{self.path} became shorter while it was read: try again")
                    yield chunk
        except OSError as error:
            raise BloraError(f"cannot read {self.path} ({error})") from error


# ---- The header ----------------------------------------------------------------------------------

LONGEST = 100_000_000  # bytes of a header: safetensors refuses a longer one
# How files begin that are renamed, or came in place of a LoRA, and what to do then.
RESAVE = "save it as safetensors with the program that made it"
OTHER_FORMATS = {
    b"PK\x03\x04": ("a PyTorch file (.pt, .bin, .ckpt) or another zip archive", RESAVE),
    b"\x80\x02\x8a\x0al\xfc\x9c": ("an old PyTorch file (.pt, .bin, .ckpt)", RESAVE),
    b"\x80\x02}": ("a Python pickle", RESAVE),
    b"\x80\x04\x95": ("a Python pickle", RESAVE),
    b"\x80\x05\x95": ("a Python pickle", RESAVE),
    b"GGUF": ("a GGUF file", "use the safetensors file that it was made from"),
    b"version https://git-lfs": ("a Git LFS pointer", "download the file that it points to"),
    b"<": ("a web page", "download the file again"),
}


def is_counts(value: object) -> bool:
    """Whether it is a list of whole numbers, none of them negative."""
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def parse_tensor(key: str, value: Any, path: Path, data: int) -> Stored:
    """A tensor of the header; `data` is where the tensors begin. ValueError where it is not one."""
    fields: Any = value if isinstance(value, dict) else {}
    dtype, shape, offsets = map(fields.get, ("dtype", "shape", "data_offsets"))
    is_typed = isinstance(dtype, str) and dtype.isidentifier() and dtype.isupper()
    if not (is_typed and is_counts(shape) and is_counts(offsets) and len(offsets) == 2):
        raise ValueError(f"{key} has no type, shape or offsets")
    return Stored(dtype, tuple(shape), path, data + offsets[0], data + offsets[1])


def has_its_size(tensor: Tensor) -> bool:
    """Whether a tensor is as large as its shape and type say; of an unknown type, any size will do.

    No shape may overflow 63 bits, not even with a 0 in it: numpy refuses it.
    """
    bits = DTYPES.get(tensor.dtype)
    numbers = bits or 1
    for length in tensor.shape:
        numbers *= max(length, 1)
        if numbers >= 1 << 63:
            return False
    return bits is None or 8 * tensor.size == (0 if 0 in tensor.shape else numbers)


def check_layout(tensors: dict[str, Stored], data: int, size: int) -> None:
    """Refuse wrong sizes, gaps, overlaps, and a file that is shorter or longer (ValueError)."""
    end = data
    for key, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.start != end or tensor.stop < end:
            raise ValueError(f"{key} does not begin where the tensor before it ends")
        if not has_its_size(tensor):
            raise ValueError(f"{key} is not as large as its shape and type say")
        end = tensor.stop
    if end != size:
        than = "shorter" if end > size else "longer"
        difference = f"{abs(end - size):,} byte{'' if abs(end - size) == 1 else 's'}"
        raise ValueError(f"it is {difference} {than} than its header says")


def parse_file(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """A file's tensors and metadata from its header; ValueError where it is not whole."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError("it ends before its header does")
        if length > LONGEST:
            raise ValueError("its header is too long")
        header = json.loads(file.read(length).decode("utf-8"))
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its metadata has values that are not text")
    data = 8 + length
    tensors = {key: parse_tensor(key, value, path, data) for key, value in header.items()}
    check_layout(tensors, data, size)
    return tensors, metadata


def other_format(path: Path) -> tuple[str, str] | None:
    """What a file is that does not begin as safetensors do, and what to do about it."""
    with path.open("rb") as file:
        start = file.read(64)
    is_safetensors = start[8:9] == b"{"
    signs = (about for sign, about in OTHER_FORMATS.items() if start.lstrip().startswith(sign))
    return None if is_safetensors else next(signs, None)


def read_header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a safetensors file and its metadata; the tensors' bytes are not read.

    It accepts every tensor that the safetensors library accepts, written as an object, and types
    newer than the library. BloraError where the file cannot be read or is not whole.
    """
    try:
        return parse_file(path)
    except (ValueError, RecursionError) as error:
        if other := other_format(path):
            what, advice = other
            raise BloraError(f"{path} is {what}, not safetensors: {advice}") from error
        raise BloraError(
            f"{path} is not a whole safetensors file ({shortened(str(error))}): "
            "download it again, or save it as safetensors"
        ) from error
    except OSError as error:
        raise BloraError(f"cannot read {path} ({error})") from error


def json_object(text: str | None) -> dict[str, Any]:
    """A metadata value that should be a JSON object; anything else is an empty one."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


# ---- Writing -------------------------------------------------------------------------------------

HASHES = {"sshs_model_hash": 64, "sshs_legacy_hash": 8}  # hex digits
LONGEST_HEADER = 1 << 20  # bytes: ComfyUI shows no metadata of a longer one
SHOW_PROGRESS = 200_000_000  # bytes; less is written within a second


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
    """The metadata without its longest entries where the header is too long; and those entries."""
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


def file_chunks(tensors: Iterable[Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of all tensors; those that follow each other in a file are read as one."""
    runs: list[Tensor] = []
    for tensor in tensors:
        last = runs[-1] if runs else None
        if (
            isinstance(tensor, Stored)
            and isinstance(last, Stored)
            and (tensor.path, tensor.start) == (last.path, last.stop)
        ):
            runs[-1] = Stored(last.dtype, last.shape, last.path, last.start, tensor.stop)
        else:
            runs.append(tensor)
    return chain.from_iterable(run.chunks() for run in runs)


def with_progress(chunks: Iterable[bytes | memoryview], total: int) -> Iterator[bytes | memoryview]:
    """The chunks, behind a bar on stderr once that takes more than a second."""
    if total < SHOW_PROGRESS:
        yield from chunks
        return
    with progress_bar(total, unit="B", unit_scale=True) as advance:
        for chunk in chunks:
            yield chunk
            advance(len(chunk))


def write_hashed(
    file: BinaryIO, chunks: Iterable[bytes | memoryview], digest: hashlib._Hash
) -> None:
    """Write all chunks, and hash them in a thread beside the writing: hashlib needs no GIL.

    An error of the thread is raised here. An executor takes 5 ms to import, and 50 microseconds for
    each chunk: a cut of 450 MB at 0.5 took 0.63 s with one, not 0.55. With queue.Queue for the two
    below, Ctrl-C while writing could hang.
    """
    waiting: SimpleQueue[bytes | memoryview | None] = SimpleQueue()
    room = Semaphore(2)  # chunks in memory
    errors: list[BaseException] = []

    def hash_chunks() -> None:
        while (chunk := waiting.get()) is not None:
            try:
                digest.update(chunk)
            except BaseException as error:
                errors.append(error)
            room.release()

    thread = Thread(target=hash_chunks)
    thread.start()
    try:
        for chunk in chunks:
            room.acquire()
            waiting.put(chunk)
            file.write(chunk)
    finally:
        waiting.put(None)
        thread.join()
    if errors:
        raise errors[0]


def in_order(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As safetensors writes them: by type and key, those of a type unknown here last."""
    order = {dtype: index for index, dtype in enumerate(DTYPES)}
    return dict(sorted(tensors.items(), key=lambda i: (order.get(i[1].dtype, len(order)), i[0])))


def file_bytes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> int:
    """The length of the file that write_file writes."""
    sizes = (tensor.size for tensor in tensors.values())
    return len(header_bytes(in_order(tensors), metadata)) + sum(sizes)


def write_file(tensors: dict[str, Tensor], metadata: dict[str, str], output: Path) -> None:
    """Write a file, whole or not at all, with kohya's two hashes where the metadata has their keys.

    As precalculate_safetensors_hashes in kohya's sd-scripts has it, the model hash is of all bytes
    after the header, the legacy hash of 64 KiB of a file that has the ss_ metadata alone.
    BloraError where it cannot be written.
    """
    tensors = in_order(tensors)
    total = sum(tensor.size for tensor in tensors.values())
    with written_whole(output) as part, part.open("w+b") as file:
        start = file.write(header_bytes(tensors, metadata))
        chunks = with_progress(file_chunks(tensors.values()), total)
        if not HASHES.keys() & metadata.keys():
            file.writelines(chunks)
            return
        model = hashlib.sha256()
        write_hashed(file, chunks, model)
        training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
        file.seek(start - len(header_bytes(tensors, training)) + 0x100000)
        both = zip(HASHES.items(), (model, hashlib.sha256(file.read(0x10000))), strict=True)
        digests = {key: h.hexdigest()[:digits] for (key, digits), h in both if key in metadata}
        file.seek(0)
        file.write(header_bytes(tensors, metadata | digests))
