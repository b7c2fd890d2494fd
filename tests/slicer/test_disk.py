"""blora_slicer.py on disks that are full, folders it may not enter, and runs that are stopped.

Whatever happens: exit 0 with a whole file, or exit 1 with one sentence; never a traceback, never
a half file under the final name, never a touched input.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from broken_files import DOWN, UP, raw, small_file, small_lora, tensor
from lora_files import STYLE, write
from slicing import (
    CUTS,
    LOOKS,
    OLD,
    SMALL,
    cut,
    fingerprint,
    one_sentence,
    opens,
    refusal,
    refused,
)

import blora_slicer
from blora.tensorfile import CHUNK, read_header, write_file, write_hashed
from blora.text import BloraError

# A warning would be a line on stderr that tells the user nothing.
pytestmark = pytest.mark.filterwarnings("error")

SCRIPT = Path(blora_slicer.__file__)
OTHER = STYLE.format(0, 1, "q")
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such thing")


# ---- Outputs that cannot be written --------------------------------------------------------------


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    path = tmp_path / "a.safetensors"
    path.write_bytes(small_file())
    return path


@pytest.mark.parametrize("name", ["a.safetensors/b", "x" * 240, "x" * 300])
def test_an_output_with_an_impossible_name_is_refused(lora, capsys, name):
    refused(capsys, lora, "--output_path", f"{lora.parent}/{name}.safetensors")


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
    write(lora, small_lora() | small_lora(OTHER))
    args = [lora, *way, "--traits", "content", "style"]
    assert slicer(*args) == 0
    size = slicer.output.stat().st_size
    for limit in [0, 1, 7, 8, 9, *range(16, size - 8, 97), *range(size - 8, size)]:
        slicer.output.write_bytes(OLD)
        with largest_file(limit):
            # The old output is written before the limit, so the run may not write it again.
            sentence = refusal(slicer.capsys, "--output_path", slicer.output, "--loras", *args)
        assert sentence.startswith(f"cannot write {slicer.output} (")
        slicer.check_folder({lora.name, slicer.output.name}, wrote=False)


def test_the_bytes_are_on_the_disk_before_the_name(lora, slicer, monkeypatch):
    os_fsync, synced = os.fsync, []

    def fsync(file: int) -> None:
        synced.append((os.fstat(file).st_size, slicer.output.read_bytes() == OLD))
        os_fsync(file)

    monkeypatch.setattr("os.fsync", fsync)
    assert slicer(lora) == 0
    assert synced == [(slicer.output.stat().st_size, True)]


@POSIX
@pytest.mark.parametrize("target", ["there.safetensors", "new.safetensors"])
def test_an_output_that_is_a_link_stays_one_and_its_target_is_written(lora, tmp_path, target):
    output, elsewhere = tmp_path / "out.safetensors", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "there.safetensors").write_bytes(OLD)
    output.symlink_to(f"elsewhere/{target}")
    assert cut(lora).readlink() == Path("elsewhere", target)
    assert opens(elsewhere / target)
    assert {path.name for path in elsewhere.iterdir()} == {"there.safetensors", target}
    assert {path.name for path in tmp_path.iterdir()} == {lora.name, output.name, "elsewhere"}


@POSIX
def test_an_output_that_is_a_link_to_nowhere_is_refused_by_its_own_name(lora, tmp_path, capsys):
    output = tmp_path / "out.safetensors"
    output.symlink_to("gone/slice.safetensors")
    assert refused(capsys, lora).startswith(f"cannot write {output} (")
    assert output.is_symlink()


CHANGED = {
    # what becomes of a file that is being cut, and the sentence
    "removed": (Path.unlink, "cannot read {} ("),
    "cut off": (
        lambda path: os.truncate(path, 200),
        "{} became shorter while it was read: try again",
    ),
}


@pytest.mark.parametrize(("change", "sentence"), CHANGED.values(), ids=CHANGED)
def test_a_source_that_changes_while_it_is_cut_is_the_one_that_is_named(lora, change, sentence):
    tensors, metadata = read_header(lora)
    change(lora)
    with pytest.raises(BloraError, match=f"^{re.escape(sentence.format(lora))}"):
        write_file(tensors, metadata, lora.with_name("out.safetensors"))
    assert {path.name for path in lora.parent.iterdir()} <= {lora.name}


class Broken:
    """A digest that fails."""

    def update(self, chunk: bytes) -> None:
        raise MemoryError("no room to hash")


def test_an_error_of_the_thread_that_hashes_ends_the_cut():
    ended = threading.Event()

    def cut() -> None:
        with pytest.raises(MemoryError, match="no room to hash"):
            write_hashed(io.BytesIO(), iter([bytes(CHUNK)] * 9), Broken())
        ended.set()

    threading.Thread(target=cut, daemon=True).start()
    assert ended.wait(20), "it waits for ever, or hides the error"


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
@pytest.mark.parametrize(("name", "mode"), DENIALS.values(), ids=DENIALS)
def test_what_may_not_be_read_or_written_is_refused(tmp_path, name, mode):
    files = {"in/a.safetensors": small_file(), "warm.safetensors": small_file()}
    files["blora_traits.json"] = SCRIPT.with_name("blora_traits.json").read_bytes()
    for folder in ("in", "out"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder).chmod(0o777)
    for path, data in files.items():
        (tmp_path / path).write_bytes(data)
    tmp_path.chmod(0o755)
    (tmp_path / name).chmod(mode)
    args = ["--loras", "in/a.safetensors", "--traits_file", "blora_traits.json"]
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
    assert (tmp_path / "in/a.safetensors").read_bytes() == small_file()


@POSIX
@pytest.mark.parametrize("way", CUTS[:1] + LOOKS, ids=" ".join)
def test_an_end_for_what_is_said_that_takes_nothing_is_one_error(lora, way):
    reader, stdout = os.pipe()
    os.close(reader)
    output = lora.with_name("slice.safetensors")
    place = [] if way else ["--output_path", output]
    command = [sys.executable, SCRIPT, "--loras", lora, *way, *place]
    done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)
    os.close(stdout)
    assert (done.returncode, done.stderr) == (
        1,
        f"error: cannot write ([Errno {errno.EPIPE}] {os.strerror(errno.EPIPE)})\n",
    )
    assert way or opens(output)


# ---- Stopped half way ----------------------------------------------------------------------------


# A shell may have started the tests with Ctrl+C switched off, which a child would inherit.
STOPPABLE = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@POSIX
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_a_cut_stopped_half_way_leaves_what_there_was(tmp_path, name):
    half = 2 * 1280 * 100_000
    header = {
        DOWN: tensor("F16", [100_000, 1280], [0, half]),
        UP: tensor("F16", [1280, 100_000], [half, 2 * half]),
    }
    large, output = tmp_path / "large.safetensors", tmp_path / "out" / "slice.safetensors"
    large.write_bytes(raw(header))
    os.truncate(large, large.stat().st_size + 2 * half)  # zeros that take no disk
    output.parent.mkdir()
    output.write_bytes(OLD)
    before = fingerprint(large)
    child = subprocess.Popen(
        [sys.executable, "-c", STOPPABLE, SCRIPT, "--loras", large, "--output_path", output],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 20
    while child.poll() is None and time.monotonic() < deadline:
        if any(path.stat().st_size > SMALL for path in output.parent.glob(".*.part")):
            child.send_signal(getattr(signal, name))
            break
        time.sleep(0.0005)
    assert "Traceback" not in child.communicate(timeout=20)[1]
    assert child.returncode != 0, "it was done before it could be stopped"
    assert fingerprint(large) == before
    assert output.read_bytes() == OLD
    left = [path for path in output.parent.iterdir() if path != output]
    # Who kills it outright must throw the half file away, which has no LoRA's name.
    assert all(path.name.startswith(".") and path.suffix == ".part" for path in left)
    assert name != "SIGINT" or left == []
    for path in left:
        path.unlink()
