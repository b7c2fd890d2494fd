"""The slicer's command line as tests run it, what must hold after a run, and what a file holds."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.torch import load_file

import blora_slicer
from blora.text import printable

OLD = b"what was there before"
SMALL = 1 << 20  # bytes; larger files are sparse, and compared by their dates alone
CUTS: list[list[str]] = [[], ["--alphas", "0.5"]]
LOOKS = [["--inspect"], ["--inspect", "--json"]]

Stored = dict[str, tuple[str, list[int], bytes]]


def slice_lora(*args: object) -> int:
    """Run the slicer with these arguments, in which a warning is an error; its exit code."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return blora_slicer.main([str(arg) for arg in args])


def refusal(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The one sentence with which the slicer refuses, and nothing else is said."""
    assert slice_lora(*args) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("error: ").rstrip("\n")


def cut(*args: object) -> Path:
    """Cut the LoRAs that come first into a new out.safetensors beside the first; its path."""
    output = Path(str(args[0])).with_name("out.safetensors")
    if not output.is_symlink():
        output.unlink(missing_ok=True)
    assert slice_lora("--output_path", output, "--loras", *args) == 0
    return output


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The one sentence with which such a cut is refused; nothing is written then."""
    folder = Path(str(args[0])).parent
    before = sorted(folder.iterdir())
    sentence = refusal(capsys, "--output_path", folder / "out.safetensors", "--loras", *args)
    assert sorted(folder.iterdir()) == before
    return sentence


def stored(path: Path) -> Stored:
    """Type, shape and bytes of each tensor, as safetensors' own reader hands them out."""
    return {
        key: (entry["dtype"], entry["shape"], bytes(entry["data"]))
        for key, entry in deserialize(path.read_bytes())
    }


def modules(path: Path) -> set[str]:
    """The names of the modules in a file, such as lora_unet_output_blocks_0_1_proj_in."""
    return {key.split(".")[0] for key in stored(path)}


def all_traits(folder: Path, **traits: str) -> Path:
    """A traits file in which each trait is what starts with a word; "all" is everything."""
    path = folder / "traits.json"
    words = {"all": "lora_"} | traits
    path.write_text(json.dumps({name: {"whitelist": [word]} for name, word in words.items()}))
    return path


def everything(folder: Path) -> tuple[object, ...]:
    return ("--traits", "all", "--traits_file", all_traits(folder))


def finite(path: Path) -> bool:
    wide = (t if t.is_complex() else t.double() for t in load_file(path).values())
    return all(bool(torch.isfinite(t).all()) for t in wide)


def opens(path: Path) -> bool:
    """Whether the safetensors library takes a file."""
    try:
        # Not "pt": that takes no path that is not UTF-8.
        with safe_open(path, "np"):
            return True
    except (SafetensorError, OSError):
        return False


def too_new(path: Path) -> bool:
    """Whether the safetensors library refuses a file for a type that it does not know."""
    try:
        deserialize(path.read_bytes())
    except SafetensorError as error:
        return "unknown variant" in str(error)
    return False


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


def one_sentence(code: int, err: str) -> None:
    """Exit 0 without an error, or 1 with one; notes and warnings may come before it."""
    assert code in (0, 1)
    assert err == "" or err.endswith("\n")
    lines = err.removesuffix("\n").split("\n") if err else []
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == code, err
    assert all(line.startswith(("error: ", "note: ", "warning: ")) for line in lines), err


class Slicer:
    """Runs the slicer in one folder, and checks after each run what must always hold.

    At every other run there is an output of an earlier one, which a failure must leave alone. That
    it was overwritten is said, and taken out of `err`.
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
        code = slice_lora("--loras", lora, *options, *place)
        self.out, self.err = self.capsys.readouterr()
        one_sentence(code, self.err)
        assert fingerprint(lora) == before
        wrote = code == 0 and "--inspect" not in options
        self.check_folder(names, wrote)
        note = f"note: overwrote {printable(str(self.output))}, which was there before\n"
        assert self.err.count(note) == (wrote and self.output.name in names)
        self.err = self.err.replace(note, "")
        return code

    @property
    def sentence(self) -> str:
        """What the last run was refused with."""
        [sentence] = [line for line in self.err.splitlines() if line.startswith("error: ")]
        return sentence.removeprefix("error: ")

    def check_folder(self, before: set[str], wrote: bool) -> None:
        """A whole output where one was written, else what there was; and nothing else."""
        if wrote:
            assert opens(self.output) or too_new(self.output)
            before = before | {self.output.name}
        elif self.output.name in before:
            assert self.output.read_bytes() == OLD
        assert {path.name for path in self.folder.iterdir()} == before

    def refuses(self, lora: Path, *options: object) -> str:
        """The sentence with which `lora` is refused, to cut and to look at alike."""
        sentences = []
        for way in (*CUTS, *LOOKS):
            assert self(lora, *way, *options) == 1
            # In brackets comes the reason, which may name any of two tensors.
            sentences.append(self.sentence.split(" (")[0])
        assert len(set(sentences)) == 1, sentences
        return sentences[0]
