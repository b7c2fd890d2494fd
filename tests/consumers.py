"""What other programs make of slices: each one's own LoRA code, run on files of every kind.

  python tests/consumers.py --comfyui DIR --forge DIR --onetrainer DIR ...

DIR is a checkout of the program; what is not given is not in the table. diffusers with PEFT and,
without --lycoris, LyCORIS are read as this Python has them. The table goes into
docs/what_loads_where.md, between its comments.

Small LoRAs of SDXL's layers are cut by blora_slicer at strengths 1, 0.5 and -1, a DoRA with its
base model. Each slice is loaded at strength 1 by the program, in a process of its own, on a CPU. A
cell is the worst error in the change of a weight or bias, beside the change that the source and the
strength should make in float64: "exact" is an error below 1e-4, "nothing" a file that loads without
an error and changes nothing, "error" one that is refused. Reasons go to stderr.

Needs tests/requirements-check.txt, and of the programs' own requirements those that their LoRA code
imports: torchvision (ComfyUI, reForge, sd-scripts), gguf (Forge, OneTrainer), parse (OneTrainer),
opencv-python-headless (sd-scripts). A minute or two a program on two cores.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent / "support"))

import torch
from consumer_readers import INSTALLED, READERS, version
from consumer_rows import ROWS, base, cuts, slice_path, wanted_weights, write_slices

EXACT = 1e-4  # programs compute in fp32, and some with an epsilon
UNMOVED = 1e-6  # of the weight: what fp32 leaves of adding a bias and taking it off
Outcome = float | str
Outcomes = dict[str, list[Outcome]]  # by row, at each of its strengths


def outcome(reader: Any, title: str, strength: float, path: Path) -> Outcome:
    """The worst error in the change of a weight or bias, or what happened instead of a change."""
    row = ROWS[title]
    try:
        found = reader.load(path, row)
    except Exception as error:  # whatever a program stops with is what its users see
        return f"{type(error).__name__}: {error}"
    errors, moved = [], False
    for name, wanted in wanted_weights(row, strength).items():
        before, after = base(name).double(), found[name].detach().double()
        moved |= bool((after - before).norm() > UNMOVED * before.norm())
        errors.append(float((after - wanted).norm() / (wanted - before).norm()))
    return max(errors) if moved else "nothing"


def read_slices(name: str, folder: Path | None, slices: Path, titles: list[str]) -> Outcomes:
    if folder:
        sys.path.insert(0, str(folder))
    sys.argv = sys.argv[:1]  # some programs read it when they are imported
    reader = READERS[name](folder)
    return {
        title: [outcome(reader, *cut, slice_path(slices, *cut)) for cut in cuts([title])]
        for title in titles
    }


def cell(outcomes: list[Outcome]) -> str:
    """A row's outcomes at all strengths in a word or a number: the worst."""
    if words := {o for o in outcomes if isinstance(o, str)}:
        return "nothing" if words == {"nothing"} else "error"
    worst = max(outcomes)
    return "exact" if worst < EXACT else f"{worst:.2g}"


def table(found: dict[str, Outcomes]) -> str:
    titles = ["a slice of", *(READERS[name].title for name in found)]
    lines = [titles, ["---"] * len(titles)]
    lines += [[row, *(cell(rows[row]) for rows in found.values())] for row in ROWS]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def read_apart(name: str, folder: Path | None, slices: Path) -> Outcomes:
    """A program's outcomes, from a process of its own: the programs' modules share names."""
    place = [f"--{name}", str(folder)] if folder else []
    command = [sys.executable, __file__, "--one", name, "--slices", str(slices), *place]
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} does not run: {done.stderr.strip().splitlines()[-1]}")
    found = json.loads(done.stdout.splitlines()[-1])
    for title, outcomes in found.items():  # why files of a row were refused, once
        for reason in sorted({o for o in outcomes if isinstance(o, str)} - {"nothing"})[:1]:
            print(f"{name}: {title}: {' '.join(reason.split())[:200]}", file=sys.stderr)
    return found


def chosen(args: Namespace) -> dict[str, Path | None]:
    """The programs to run, and where each is; None is a package that this Python has."""
    found = {name: getattr(args, name, None) for name in READERS}
    # lycoris_lora is lycoris
    there = {n for n, of in INSTALLED.items() if all(find_spec(name.split("_")[0]) for name in of)}
    return {name: folder for name, folder in found.items() if folder or name in there}


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    for name, reader in READERS.items():
        if name != "diffusers":
            text = f"a checkout of {reader.title}"
            parser.add_argument(f"--{name}", metavar="DIR", type=Path, help=text)
    parser.add_argument("--one", choices=READERS, help="read --slices with one program, as JSON")
    parser.add_argument("--slices", type=Path, metavar="DIR", help="the folder with its files")
    return parser


def main() -> int:
    """The exit code: 1 where a program does not run."""
    args = build_parser().parse_args()
    if args.one:
        with contextlib.redirect_stdout(sys.stderr):  # whatever the program prints
            found = read_slices(args.one, getattr(args, args.one, None), args.slices, list(ROWS))
        print(json.dumps(found))
        return 0
    found, versions, chose = {}, [f"torch {torch.__version__}"], chosen(args)
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            write_slices(Path(folder), list(ROWS))
        for name, checkout in chose.items():
            try:
                found[name] = read_apart(name, checkout, Path(folder))
                versions.append(version(name, checkout))
            except RuntimeError as error:
                print(f"error: {error}", file=sys.stderr)
    print(f"{'; '.join(versions)}.\n\n{table(found)}")
    return int(len(found) < len(chose))


if __name__ == "__main__":
    sys.exit(main())
