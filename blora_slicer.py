#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy", "tqdm"]
# ///
"""Slice the content or the style out of a B-LoRA, as a smaller LoRA of its own.

  blora_slicer.py --loras my_project_1.safetensors
      keeps the content in model.safetensors, beside this script
  blora_slicer.py --loras my_project_1.safetensors --traits style --alphas 0.8 \\
      --output_path my_style.safetensors
      keeps the style, at 0.8 of its strength
  blora_slicer.py --loras a.safetensors b.safetensors --traits content style
      joins the content of a with the style of b
  blora_slicer.py --loras a.safetensors --traits content style --not_combined
      writes model_content.safetensors and model_style.safetensors
  blora_slicer.py --loras a.safetensors --inspect
      writes nothing, and shows what the file holds, block by block

--loras, --traits and --alphas are matched by position. If there are fewer LoRAs than traits,
the last LoRA is used again; a missing trait means content, a missing strength means 1.0.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

VERSION = "2.0.0"


def cannot_load(error: ImportError) -> str:
    """What to say where a file of the blora folder is missing, or of a different version."""
    return (
        f"error: blora_slicer.py {VERSION} cannot use the blora folder beside it ({error}): copy "
        "the whole bundle again"
    )


if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit("error: this Python is older than 3.10: activate kohya's venv, or use a newer one")
try:
    import blora

    if getattr(blora, "VERSION", "unknown") != VERSION:
        raise ImportError(f"it is version {getattr(blora, 'VERSION', 'unknown')}", name="blora")
    from blora.sdxl import load_traits
    from blora.slicer.cut import (
        DEFAULT_STRENGTH,
        DEFAULT_TRAIT,
        Slice,
        build_metadata,
        cut_slice,
        describe,
        join_slices,
        plan_cuts,
        plan_outputs,
        summarize,
    )
    from blora.slicer.modules import Lora, Module, file_tensors
    from blora.slicer.reader import lora_file, read_lora
    from blora.tensorfile import fp32_holds, shorten_metadata, write_file
    from blora.text import BloraError, file_size, first_few, printable, say
except ImportError as error:
    sys.exit(cannot_load(error))

PRECISIONS = {"float": "F32", "fp16": "F16", "bf16": "BF16"}


# ---- The output ----------------------------------------------------------------------------------


def check_output(output: Path, inputs: Iterable[Path]) -> None:
    """Refuse an output that cannot be written, or that is one of the inputs."""
    try:
        if output.suffix != ".safetensors":
            raise BloraError(f"the output {output} must end in .safetensors: change --output_path")
        if not output.parent.is_dir():
            raise BloraError(
                f"no folder {output.parent} to write to: make it or change --output_path"
            )
        if output.is_dir():
            raise BloraError(f"the output {output} is a folder: name a file in --output_path")
        same = output.exists() and any(is_same(output, path) for path in inputs)
    except OSError as error:
        raise BloraError(f"cannot write {output} ({error}): change --output_path") from error
    if same:
        raise BloraError(f"the output {output} is one of the inputs: change --output_path")


def is_same(output: Path, path: Path) -> bool:
    """Whether both are one file; an input that cannot be looked at is reported when it is read."""
    with suppress(OSError):
        return path.exists() and output.samefile(path)
    return False


# ---- Command line --------------------------------------------------------------------------------


def with_blanks(argv: list[str]) -> list[str]:
    """The arguments with a blank before each negative number: argparse takes "-1e-5" for an option.

    What does not begin with a dash is a value to it, and float() drops the blank.
    """

    def is_negative(word: str) -> bool:
        with suppress(ValueError):
            float(word)
            return word.startswith("-")
        return False

    known = r"-\d+|-\d*\.\d+"  # the negative numbers that argparse takes for values itself
    return [
        f" {word}" if is_negative(word) and not re.fullmatch(known, word) else word for word in argv
    ]


def strength(text: str) -> float:
    """A strength from the command line: a finite number, as fp32 too."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not fp32_holds(value):
        raise argparse.ArgumentTypeError(f"{text.strip()!r} is not a finite fp32 number")
    return value


def build_parser() -> argparse.ArgumentParser:
    """The options, the original's first."""
    parser = argparse.ArgumentParser(
        prog="blora_slicer.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--loras",
        type=Path,
        nargs="+",
        required=True,
        help="the LoRAs to cut from: files, or folders that PEFT or diffusers saved",
    )
    add(
        "--traits",
        nargs="+",
        default=[DEFAULT_TRAIT],
        help=f"what to keep of each (default: {DEFAULT_TRAIT})",
    )
    add(
        "--alphas",
        type=strength,
        nargs="+",
        default=[DEFAULT_STRENGTH],
        help=f"the strength of each: 0.5 is half, -1 the opposite (default: {DEFAULT_STRENGTH})",
    )
    add(
        "--output_path",
        type=Path,
        default=blora.ROOT / "model.safetensors",
        help="the file to write (default: model.safetensors beside this script)",
    )
    add("--debug", action="store_true", help="name every module that is kept")
    add("--not_combined", action="store_true", help="write one file for each LoRA and trait")
    add(
        "--traits_file",
        type=Path,
        default=blora.ROOT / "blora_traits.json",
        help="the traits to choose from (default: blora_traits.json beside this script)",
    )
    add(
        "--save_precision",
        choices=PRECISIONS,
        help="precision of the output (default: the input's)",
    )
    add("--base_model", type=Path, help="the SDXL checkpoint, to cut a DoRA at another strength")
    add("--no_metadata", action="store_true", help="write no metadata at all")
    add("--inspect", action="store_true", help="write nothing, show what the LoRAs hold")
    add("--json", action="store_true", help="with --inspect: show it as JSON")
    return parser


def check_usage(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse options that do not go together."""
    slices = max(len(args.loras), len(args.traits))
    if len(args.alphas) > slices:
        parser.error(f"--alphas: {len(args.alphas)} values for {slices} slice(s), leave some out")
    if args.json and not args.inspect:
        parser.error("--json: only --inspect has something to show as JSON, add it")
    looking = {"loras", "inspect", "json", "traits_file", "help"}
    for name, value in vars(args).items():
        if args.inspect and name not in looking and value != parser.get_default(name):
            parser.error(f"--inspect writes nothing: leave out --{name}")


def read_once(paths: Iterable[Path]) -> dict[Path, Lora]:
    """Each LoRA by its path, with a note on what of it cannot be placed."""
    loras = {path: read_lora(path) for path in dict.fromkeys(paths)}
    for path, lora in loras.items():
        if lora.unplaced:
            say(
                f"note: {len(lora.unplaced)} tensors of {path.name} do not belong to SDXL and were "
                f"skipped: {first_few(lora.unplaced)}"
            )
        if lora.own:
            say(
                f"note: layers' own weights in {path.name}, which are no LoRA's, were skipped "
                f"({len(lora.own)}): {first_few(lora.own)}"
            )
    return loras


def run_inspect(args: argparse.Namespace) -> None:
    """Show what each LoRA holds."""
    from blora.slicer.inspection import inspect_lora, report

    known = load_traits(args.traits_file)
    facts = [inspect_lora(read_lora(path), known) for path in dict.fromkeys(args.loras)]
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        print("\n\n".join("\n".join(report(fact)) for fact in facts))


def finish(
    slices: list[Slice], output: Path, args: argparse.Namespace
) -> tuple[list[Module], dict[str, str]]:
    """The modules and the metadata of a file to write."""
    modules = join_slices(slices)
    metadata = {} if args.no_metadata else build_metadata(slices, modules, output)
    if args.save_precision:
        from blora.slicer.strength import at_precision

        modules = [at_precision(m, PRECISIONS[args.save_precision]) for m in modules]
    metadata, dropped = shorten_metadata(file_tensors(modules), metadata)
    if dropped:
        say(f"note: left out, as the header would be too long: {first_few(dropped)}")
    return modules, metadata


def run_cut(args: argparse.Namespace) -> None:
    """Plan, check, cut, and only then write."""
    cuts = plan_cuts(args.loras, args.traits, args.alphas, load_traits(args.traits_file))
    plan = plan_outputs(cuts, args.output_path, combined=not args.not_combined)
    inputs = [*args.loras, *([args.base_model] if args.base_model else [])]
    for output in plan:
        check_output(output, inputs)
    loras = read_once(args.loras)
    if args.base_model:
        from blora.slicer.strength import read_base_model

        base = read_base_model(args.base_model)
    else:
        base = None
        # numpy's BLAS starts threads that spin for 50 ms, on the core that could hash meanwhile;
        # they are for products of matrices, and of all cuts only a DoRA's has any.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    dtype = PRECISIONS.get(args.save_precision)
    finished = []
    for output, planned in plan.items():
        slices = [cut_slice(loras[cut.lora], cut, base, dtype) for cut in planned]
        finished.append((output, slices, *finish(slices, output, args)))
    for remark in dict.fromkeys(r for _, slices, *_ in finished for s in slices for r in s.remarks):
        say(remark)
    for output, slices, modules, metadata in finished:
        write_file(file_tensors(modules), metadata, output)
        for piece in slices:
            for module in piece.modules if args.debug else ():
                say(f"{describe(piece.cut)}: {module.name}")
            print(f"{describe(piece.cut)} at {piece.cut.strength:g}: {summarize(piece.modules)}")
        size = file_size(output.stat().st_size)
        print(printable(f"-> {output}: {summarize(modules)}, {size}"))


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0 when done, 1 with one sentence on stderr when it cannot be."""
    # A console that lacks a letter of a path would otherwise end a finished cut in a traceback.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    parser = build_parser()
    args = parser.parse_args(with_blanks(sys.argv[1:] if argv is None else argv))
    check_usage(parser, args)
    args.loras = [lora_file(path) for path in args.loras]
    try:
        run_inspect(args) if args.inspect else run_cut(args)
        sys.stdout.flush()
    except BloraError as error:
        say(f"error: {error}")
        return 1
    except ImportError as error:
        name = error.name or ""
        if name.startswith("blora"):
            say(cannot_load(error))
        elif isinstance(error, ModuleNotFoundError):
            say(f"error: no {name} in this Python ({sys.executable}): activate kohya's venv")
        else:  # numpy raises one without a name where it is broken
            say(f"error: a package of this Python ({sys.executable}) cannot be loaded: {error}")
        return 1
    except OSError as error:  # the disk or the program behind stdout takes no more
        # Python would try to write what is left when it ends, and complain once more.
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        say(f"error: cannot go on ({error})")
        return 1
    except KeyboardInterrupt:
        say("error: stopped before it was done")
        return 1
    return 0


if __name__ == "__main__":
    # A cut is over before a cycle of objects is worth looking for: without numpy that saves 5 of
    # 100 ms, with it 18 of 170, of which half are the last look when Python ends.
    gc.disable()
    code = main()
    gc.freeze()
    sys.exit(code)
