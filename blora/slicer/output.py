"""A file to write: slices joined, with their metadata; what a cut prints of it.

Values are computed as they are written, so what would not fit is known by try_values() alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blora.slicer.cut import Slice, check_doubles, common_alpha, describe, lbw_lines, summarize
from blora.slicer.keys import UP_BIAS
from blora.slicer.metadata import build_metadata
from blora.slicer.modules import Module
from blora.slicer.reader import BaseModel
from blora.tensorfile import Stored, Tensor, file_bytes, shorten_metadata, write_file
from blora.text import BloraError, file_size, listed, printable, say


@dataclass(frozen=True)
class Output:
    """A file to write: the slices in it, its tensors and its metadata."""

    path: Path
    slices: list[Slice]
    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    @property
    def modules(self) -> list[Module]:
        """Of all slices, before the strength."""
        return [module for piece in self.slices for module in piece.modules]

    def name_modules(self) -> None:
        """Say each module that is kept, for --debug."""
        for piece in self.slices:
            for module in piece.modules:
                say(f"{describe(piece.cut)}: {module.name}")

    def write(self) -> None:
        """Write the file, and print what it holds."""
        is_older = self.path.exists()
        write_file(self.tensors, self.metadata, self.path)
        if is_older:
            say(f"note: overwrote {self.path}, which was there before")
        for piece in self.slices:
            print(f"{describe(piece.cut)} at {piece.cut.strength:g}: {summarize(piece.modules)}")
        size = file_size(self.path.stat().st_size)
        print(printable(f"-> {self.path}: {summarize(self.modules)}, {size}"))
        for line in lbw_lines(self.slices):
            print(printable(line))

    def try_values(self) -> None:
        """Compute every value that changes, as writing would; BloraError where one overflows."""
        for tensor in self.tensors.values():
            for _ in () if isinstance(tensor, Stored) else tensor.chunks():
                pass

    def facts(self) -> dict[str, Any]:
        """What --inspect says of a file that was not written."""
        return {
            "file": str(self.path),
            "overwrites": self.path.exists(),
            "slices": [
                {
                    "lora": str(piece.cut.lora),
                    "keeps": piece.cut.kept,
                    "strength": piece.cut.strength,
                    "modules": len(piece.modules),
                }
                for piece in self.slices
            ],
            "modules": len(self.modules),
            "tensors": len(self.tensors),
            "ranks": sorted({rank for m in self.modules if (rank := m.rank) is not None}),
            "bytes": file_bytes(self.tensors, self.metadata),
        }

    def report(self) -> str:
        """The same as a line of text."""
        facts = self.facts()
        way = "overwrite" if facts["overwrites"] else "write"
        cuts = ", ".join(f"{describe(p.cut)} at {p.cut.strength:g}" for p in self.slices)
        keeps = f"{summarize(self.modules)}, {file_size(facts['bytes'])}"
        return printable(f"would {way} {self.path}: {cuts}: {keeps}")


def check_output(output: Path, inputs: Iterable[Path]) -> None:
    """Refuse an output that cannot be written, or that is one of the inputs."""
    try:
        if output.suffix != ".safetensors":
            raise BloraError(f"the output {output} must end in .safetensors: change --output_path")
        if not output.parent.is_dir():
            raise BloraError(f"no folder {output.parent}: create it, or change --output_path")
        if output.is_dir():
            raise BloraError(f"the output {output} is a folder: name a file in --output_path")
        if output.exists() and any(output.samefile(path) for path in inputs):
            raise BloraError(f"the output {output} is one of the inputs: change --output_path")
    except OSError as error:
        raise BloraError(f"cannot write {output} ({error}): change --output_path") from error


def build_output(
    path: Path,
    slices: list[Slice],
    base: BaseModel | None = None,
    dtype: str | None = None,
    has_metadata: bool = True,
) -> Output:
    """The slices joined, each at its strength; values are computed when they are written."""
    check_doubles(slices)
    alpha = common_alpha(slices)
    metadata = build_metadata(slices, alpha, path) if has_metadata else {}
    modules = [module for piece in slices for module in piece.modules]
    strengths = {
        piece.cut.strength_of(m.name) * m.factor for piece in slices for m in piece.modules
    }
    has_bias = any(UP_BIAS in module.tensors for module in modules)
    if dtype or alpha is not None or has_bias or strengths != {1}:
        if not base:
            # numpy's BLAS starts threads for products of matrices, of which only a DoRA has any.
            # They spin on the core that hashes: 0.235 s of CPU to cut 28 MB at 0.5, not 0.185.
            os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        from blora.slicer.strength import change_values

        modules = change_values(slices, base, dtype, alpha)
    tensors = {f"{m.name}.{suffix}": t for m in modules for suffix, t in m.tensors.items()}
    metadata, dropped = shorten_metadata(tensors, metadata)
    if dropped:
        say(f"note: left out metadata that makes the header too long {listed(dropped)}")
    return Output(path, slices, tensors, metadata)
