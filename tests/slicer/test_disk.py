"""blora_slicer.py on disks that are full, folders it may not enter, and runs that are stopped.

Whatever happens: exit 0 with a whole file, or exit 1 with one sentence; never a traceback, never
a half file under the final name, never a touched input.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from broken_files import DOWN, UP, raw, small_file, small_lora, tensor
from lora_files import STYLE
from lora_files import write as write_lora
from slicing import CUTS, LOOKS, OLD, SMALL, fingerprint, one_sentence, opens, slice_lora

import blora_slicer
from blora.tensorfile import CHUNK, read_header, write_file, write_hashed
from blora.text import BloraError

# A warning would be a line on stderr that tells the user nothing.
pytestmark = pytest.mark.filterwarnings("error")

SCRIPT = Path(blora_slicer.__file__)
OTHER = STYLE.format(0, 1, "q")
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such thing")


# ---- Outputs that cannot be written --------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a.safetensors/b.safetensors", f"{'x' * 240}.safetensors", f"{'x' * 300}.safetensors"]
)
def test_an_output_with_an_impossible_name_is_refused(slicer, name):
    lora = slicer.folder / "a.safetensors"
    lora.write_bytes(small_file())
    code = slice_lora("--loras", lora, "--output_path", slicer.folder / name)
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
    write_lora(lora, small_lora() | small_lora(OTHER))
    both = ["--loras", lora, *way, "--traits", "content", "style"]
    assert slicer(lora, *both) == 0
    size = slicer.output.stat().st_size
    for limit in [0, 1, 7, 8, 9, *range(16, size - 8, 97), *range(size - 8, size)]:
        slicer.output.write_bytes(OLD)
        with largest_file(max(limit, 0)):
            # The old output is written before the limit, so the run may not write it again.
            code = slice_lora(*both, "--output_path", slicer.output)
        err = slicer.capsys.readouterr().err
        assert (code, err.count("\n")) == (1, 1)
        assert err.startswith(f"error: cannot write {slicer.output} (")
        slicer.check_folder({lora.name, slicer.output.name}, wrote=False)


def test_the_bytes_are_on_the_disk_before_the_name(slicer, monkeypatch):
    lora, synced = slicer.folder / "a.safetensors", []
    lora.write_bytes(small_file())

    def fsync(file: int) -> None:
        synced.append((os.fstat(file).st_size, slicer.output.read_bytes() == OLD))
        os_fsync(file)

    os_fsync = os.fsync
    monkeypatch.setattr("os.fsync", fsync)
    assert slicer(lora) == 0
    assert synced == [(slicer.output.stat().st_size, True)]


@POSIX
@pytest.mark.parametrize("target", ["there.safetensors", "new.safetensors"])
def test_an_output_that_is_a_link_stays_one_and_its_target_is_written(tmp_path, target):
    lora, output = tmp_path / "a.safetensors", tmp_path / "slice.safetensors"
    lora.write_bytes(small_file())
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "there.safetensors").write_bytes(OLD)
    output.symlink_to(f"elsewhere/{target}")
    assert slice_lora("--loras", lora, "--output_path", output) == 0
    assert output.readlink() == Path("elsewhere", target)
    assert opens(elsewhere / target)
    assert {path.name for path in elsewhere.iterdir()} == {"there.safetensors", target}
    assert {path.name for path in tmp_path.iterdir()} == {lora.name, output.name, "elsewhere"}


@POSIX
def test_an_output_that_is_a_link_to_nowhere_is_refused_by_its_own_name(tmp_path, capsys):
    lora, output = tmp_path / "a.safetensors", tmp_path / "slice.safetensors"
    lora.write_bytes(small_file())
    output.symlink_to("gone/slice.safetensors")
    assert slice_lora("--loras", lora, "--output_path", output) == 1
    assert capsys.readouterr().err.startswith(f"error: cannot write {output} (")
    assert output.is_symlink()


def test_a_source_that_cannot_be_read_any_more_is_the_one_that_is_named(tmp_path):
    lora, output = tmp_path / "a.safetensors", tmp_path / "slice.safetensors"
    lora.write_bytes(small_file())
    tensors, metadata = read_header(lora)
    lora.unlink()
    with pytest.raises(BloraError, match=re.escape(f"cannot read {lora} (")):
        write_file(tensors, metadata, output)
    assert list(tmp_path.iterdir()) == []


class Broken:
    """A digest that fails."""

    def update(self, chunk: bytes) -> None:
        raise MemoryError("no room to hash")


def test_an_error_of_the_thread_that_hashes_ends_the_cut():
    outcome: list[str] = []

    def cut() -> None:
        try:
            write_hashed(io.BytesIO(), iter([bytes(CHUNK)] * 9), Broken())
        except MemoryError as error:
            outcome.append(str(error))

    thread = threading.Thread(target=cut, daemon=True)
    thread.start()
    thread.join(20)
    assert outcome == ["no room to hash"], "it waits for ever"


@pytest.mark.parametrize("length", [1, 1000, CHUNK - 1, CHUNK, CHUNK + 1])
def test_all_chunks_are_written_in_order_and_hashed(length):
    chunks = [bytes([number]) * length for number in range(20)]
    file, digest = io.BytesIO(), hashlib.sha256()
    write_hashed(file, (memoryview(chunk) for chunk in chunks), digest)
    assert file.getvalue() == b"".join(chunks)
    assert digest.digest() == hashlib.sha256(b"".join(chunks)).digest()


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


def while_writing(
    command: list[object], folder: Path, act: Callable[[subprocess.Popen], object]
) -> tuple[int, str]:
    """Start the slicer and do something when it has begun to write; exit code and stderr."""
    child = subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 20
    while child.poll() is None and time.monotonic() < deadline:
        if any(path.stat().st_size > SMALL for path in folder.glob(".*.part")):
            act(child)
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
    number = getattr(signal, name)
    code, err = while_writing(command, out, lambda child: child.send_signal(number))
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


def test_a_source_that_shrinks_while_it_is_read_is_refused(tmp_path):
    lora, out = tmp_path / "large.safetensors", tmp_path / "out"
    out.mkdir()
    sparse_lora(lora, megabytes=500)
    command = [sys.executable, SCRIPT, "--loras", lora, "--output_path", out / "slice.safetensors"]
    code, err = while_writing(command, out, lambda child: os.truncate(lora, 10_000_000))
    assert (code, err) == (1, f"error: {lora} became shorter while it was read: try again\n")
    assert list(out.iterdir()) == []
