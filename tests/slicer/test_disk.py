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
import shutil
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
from slicing import CUTS, LOOKS, OLD, SMALL, cut, fingerprint, opens, refusal, refused, slice_lora

import blora_slicer
from blora.tensorfile import CHUNK, read_header, with_progress, write_file, write_hashed
from blora.text import BloraError

SCRIPT = Path(blora_slicer.__file__)
OTHER = STYLE.format(0, 1, "q")
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such thing")


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
    assert slice_lora("--loras", lora, "--output_path", output) == 0
    assert output.readlink() == Path("elsewhere", target)
    assert opens(elsewhere / target)
    assert {path.name for path in elsewhere.iterdir()} == {"there.safetensors", target}
    assert {path.name for path in tmp_path.iterdir()} == {lora.name, output.name, "elsewhere"}


@POSIX
def test_an_output_that_is_a_link_to_nowhere_is_refused_by_its_own_name(lora, tmp_path, capsys):
    output = tmp_path / "out.safetensors"
    output.symlink_to("gone/slice.safetensors")
    assert refused(capsys, lora).startswith(f"cannot write {output} (")
    assert output.is_symlink()


def test_a_source_that_changes_while_it_is_cut_is_the_one_that_is_named(lora):
    tensors, metadata = read_header(lora)
    changes = {
        f"{lora} became shorter while it was read: try again": lambda: os.truncate(lora, 200),
        f"cannot read {lora} (": lora.unlink,
    }
    for sentence, change in changes.items():
        change()
        with pytest.raises(BloraError, match=f"^{re.escape(sentence)}"):
            write_file(tensors, metadata, lora.with_name("out.safetensors"))
        assert {path.name for path in lora.parent.iterdir()} <= {lora.name}


class Broken:
    """A digest that fails."""

    def update(self, chunk: bytes) -> None:
        raise MemoryError("no room to hash")


def test_an_error_of_the_thread_that_hashes_ends_the_cut():
    failed = []

    def cut() -> None:
        try:
            write_hashed(io.BytesIO(), iter([bytes(CHUNK)] * 9), Broken())
        except MemoryError as error:
            failed.append(str(error))

    thread = threading.Thread(target=cut, daemon=True)
    thread.start()
    thread.join(20)
    assert failed == ["no room to hash"], "it waits for ever, or hides the error"


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    """Not as root, who may do anything."""
    user = os.geteuid()
    os.seteuid(user or 65534)
    try:
        yield
    finally:
        os.seteuid(user)


DENIALS = {
    "a LoRA": ("in/a.safetensors", 0o000),
    "the LoRA's folder": ("in", 0o000),
    "the output's folder, to write": ("out", 0o555),
    "the output's folder, to enter": ("out", 0o000),
    "the traits": ("blora_traits.json", 0o000),
}


@POSIX
@pytest.mark.parametrize(("name", "mode"), DENIALS.values(), ids=DENIALS)
def test_what_may_not_be_read_or_written_is_refused(lora, monkeypatch, capsys, name, mode):
    # The paths are relative, as nobody may not enter the folders above, nor import from them.
    monkeypatch.chdir(lora.parent)
    lora.parent.chmod(0o755)
    cut(lora)
    capsys.readouterr()
    for folder in ("in", "out"):
        Path(folder).mkdir()
        Path(folder).chmod(0o777)
    source = shutil.copy(lora, "in")
    shutil.copy(SCRIPT.with_name("blora_traits.json"), ".")
    place = ("--output_path", "out/slice.safetensors", "--traits_file", "blora_traits.json")
    Path(name).chmod(mode)
    with nobody():
        refusal(capsys, "--loras", source, *place)
    Path(name).chmod(0o777)
    assert list(Path("out").iterdir()) == []
    assert Path(source).read_bytes() == small_file()


@POSIX
@pytest.mark.parametrize("way", CUTS[:1] + LOOKS, ids=" ".join)
def test_an_end_for_what_is_said_that_takes_nothing_is_one_error(lora, way):
    reader, stdout = os.pipe()
    os.close(reader)
    output = lora.with_name("slice.safetensors")
    command = [sys.executable, SCRIPT, "--loras", lora, *(way or ["--output_path", output])]
    done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)
    os.close(stdout)
    broken = f"[Errno {errno.EPIPE}] {os.strerror(errno.EPIPE)}"
    assert (done.returncode, done.stderr) == (1, f"error: cannot write ({broken})\n")
    assert way or opens(output)


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
    size = 4 * 1280 * 100_000
    header = {
        DOWN: tensor("F16", [100_000, 1280], [0, size // 2]),
        UP: tensor("F16", [1280, 100_000], [size // 2, size]),
    }
    large, output = tmp_path / "large.safetensors", tmp_path / "out" / "slice.safetensors"
    large.write_bytes(raw(header))
    os.truncate(large, large.stat().st_size + size)  # zeros that take no disk
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
    printed = child.communicate(timeout=20)[1]
    assert (printed.splitlines()[-1:] == ["error: interrupted"]) == (name == "SIGINT"), printed
    assert "Traceback" not in printed
    assert child.returncode != 0, "it was done before it could be stopped"
    assert fingerprint(large) == before
    assert output.read_bytes() == OLD
    left = [path for path in output.parent.iterdir() if path != output]
    # Who kills it outright must throw the half file away, which has no LoRA's name.
    assert all(path.name.startswith(".") and path.suffix == ".part" for path in left)
    assert name != "SIGINT" or left == []


def test_only_a_file_of_200_mb_and_more_loads_the_bar(monkeypatch):
    for total, is_loaded in ((199_999_999, False), (200_000_000, True)):
        monkeypatch.delitem(sys.modules, "tqdm", raising=False)
        assert list(with_progress([b"all"], total)) == [b"all"]
        assert ("tqdm" in sys.modules) == is_loaded
