#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy", "tqdm"]
# ///
"""Slice the content or the style out of a B-LoRA, as a smaller LoRA.

  blora_slicer.py --loras my_project_1.safetensors
      keeps the content in model.safetensors, beside this script
  blora_slicer.py --loras my_project_1.safetensors --traits style --alphas 0.8 \\
      --output_path my_style.safetensors
      keeps the style, at 0.8 of its strength
  blora_slicer.py --loras a.safetensors b.safetensors --traits content style
      joins the content of a with the style of b
  blora_slicer.py --loras a.safetensors --traits content style --not_combined
      writes model_content.safetensors and model_style.safetensors
  blora_slicer.py --loras a.safetensors --blocks OUT00=1 OUT01=0.3
      keeps two blocks whole, the second at 0.3 of its strength
  blora_slicer.py --loras a.safetensors --inspect
      writes nothing, and shows what the file holds, block by block; with --traits and the other
      options of a cut, also what would be written

--loras, --traits and --alphas are matched by position. If there are fewer LoRAs than traits,
the last LoRA is used again; a missing trait means content, a missing strength means 1.0.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

VERSION = "2.5.0"


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
    from blora.slicer.blocks import parse_blocks
    from blora.slicer.cut import (
        DEFAULT_STRENGTH,
        DEFAULT_TRAIT,
        lbw_lines,
        plan_cuts,
        plan_outputs,
        take_slice,
    )
    from blora.slicer.modules import SKIPPED, Lora
    from blora.slicer.output import Output, build_output, check_output
    from blora.slicer.reader import lora_file, read_base_model, read_lora
    from blora.tensorfile import fp32_number
    from blora.text import (
        BloraError,
        counted,
        escape_unencodable,
        listed,
        printable,
        say,
        shortened,
    )
except ImportError as error:
    sys.exit(cannot_load(error))

PRECISIONS = {"float": "F32", "fp16": "F16", "bf16": "BF16"}


# ---- Command line --------------------------------------------------------------------------------

EXAMPLES = {
    "--loras": "my_project_1.safetensors", "--traits": "content", "--alphas": "0.5",
    "--output_path": "my_content.safetensors", "--traits_file": "blora_traits.json",
    "--blocks": "OUT00=1", "--save_precision": "fp16", "--base_model": "sd_xl_base_1.0.safetensors",
}  # fmt: skip
DASHES = "-\u2010-\u2015\u2212"  # what a web page or a word processor makes of them


class Parser(argparse.ArgumentParser):
    """The options; a mistake is told in one sentence, without a list of them all."""

    def error(self, message: str) -> NoReturn:
        """Exit with 2, and what to do; `message` may be argparse's, of an option."""
        option, _, problem = message.removeprefix("argument ").partition(": ")
        if problem.startswith("expected "):
            message = f"{option} needs a value, such as {option} {EXAMPLES[option]}"
        elif problem.startswith("ignored explicit "):
            message = f"{option} takes no value: write {option} alone"
        elif option == "ambiguous option":
            message = f"{problem}: write one of them out"
        say(f"error: {message.removeprefix('argument ')}")
        sys.exit(2)


def shield_negatives(argv: list[str]) -> list[str]:
    """The arguments with a space before each that begins with a negative number, as lists can.

    argparse takes "-1e-5" for an option. What does not begin with a dash is a value to it, and
    float() drops the space.
    """
    negative = re.compile(r"-(\.?\d|(inf|infinity|nan)\b)", re.IGNORECASE)
    return [f" {word}" if negative.match(word) else word for word in argv]


def strength(text: str) -> float:
    """A strength from the command line: a number that fp32 holds."""
    value = fp32_number(text)
    if value is None:
        raise argparse.ArgumentTypeError(f"{text.strip()!r} is not a finite fp32 number")
    return value


def build_parser() -> Parser:
    """The options, the original's first."""
    raw = argparse.RawDescriptionHelpFormatter
    usage = "%(prog)s --loras LORA [LORA ...] [options]"
    parser = Parser("blora_slicer.py", usage, description=__doc__, formatter_class=raw)
    add = parser.add_argument
    # fmt: off
    add("--loras", type=Path, nargs="+",
        help="the LoRAs to cut from: files, or folders that PEFT or diffusers saved")
    add("--traits", nargs="+", default=[],
        help=f"what to keep of each (default: {DEFAULT_TRAIT}, or with --blocks everything)")
    add("--alphas", type=strength, nargs="+", default=[DEFAULT_STRENGTH],
        help=f"the strength of each: 0.5 is half, -1 the opposite (default: {DEFAULT_STRENGTH})")
    add("--blocks", nargs="+",
        help="keep these blocks at these weights: OUT00=1 OUT01=0.3, or LBW's list of 12 or 20")
    add("--output_path", type=Path, default=blora.ROOT / "model.safetensors",
        help="the file to write (default: model.safetensors beside this script)")
    add("--debug", action="store_true", help="name every module that is kept")
    add("--not_combined", action="store_true", help="write one file for each LoRA and trait")
    add("--traits_file", type=Path, default=blora.ROOT / "blora_traits.json",
        help="the traits to choose from (default: blora_traits.json beside this script)")
    add("--save_precision", choices=PRECISIONS,
        help="precision of the output (default: the input's)")
    add("--base_model", type=Path, help="the SDXL checkpoint, to cut a DoRA at another strength")
    add("--no_metadata", action="store_true", help="write no metadata at all")
    add("--inspect", action="store_true",
        help="write nothing, show what the LoRAs hold, and what other options would cut")
    add("--json", action="store_true", help="with --inspect: show it as JSON")
    add("--version", action="version", version=f"%(prog)s {VERSION}", help="print the version")
    # fmt: on
    return parser


def command_line(words: list[str]) -> str:
    """The slicer's command with these words, to be typed."""
    import shlex
    import subprocess

    join = subprocess.list2cmdline if os.name == "nt" else shlex.join
    return join(["python", "blora_slicer.py", *words])


def check_words(parser: Parser, args: argparse.Namespace, left: list[str], argv: list[str]) -> None:
    """Refuse words that no option takes, which are `left` of all, and a line without a LoRA."""
    from difflib import get_close_matches

    for word in left:
        if name := re.match(rf"[{DASHES}]+(\w+)", word):
            names = [option[2:] for option in parser._option_string_actions if option[:2] == "--"]
            near = [f"use --{other}" for other in get_close_matches(name[1], names, 1, cutoff=0.5)]
            advice, *_ = [*near, command_line(["--loras", EXAMPLES["--loras"]])]
            parser.error(f"there is no option {shortened(word)}: {advice}")
    if args.loras is None:
        files, options = left or [EXAMPLES["--loras"]], [word for word in argv if word not in left]
        example = command_line(["--loras", *files, *(options or ["--traits", "content"])])
        parser.error(
            f"LoRAs come after --loras: {example}" if left else f"no LoRA is given: {example}"
        )
    for word in left:
        parser.error(f"no option takes {shortened(word)}: put it after its option, such as --loras")


def check_usage(parser: Parser, args: argparse.Namespace) -> None:
    """Refuse options that do not go together."""
    slices = max(len(args.loras), len(args.traits))
    if len(args.alphas) > slices:
        number = counted(slices, "slice")
        parser.error(f"--alphas: {len(args.alphas)} values for {number}, leave some out")
    try:
        args.blocks = parse_blocks(args.blocks) if args.blocks else None
    except BloraError as error:
        parser.error(f"argument --blocks: {error}")
    if args.json and not args.inspect:
        parser.error("--json requires --inspect")


def asks_for_cut(parser: Parser, args: argparse.Namespace) -> bool:
    """Whether an option says what to cut, even if it says the default."""
    others = {"loras", "inspect", "json", "traits_file"}
    given = {name for name, value in vars(args).items() if value is not parser.get_default(name)}
    return bool(given - others)


# ---- Cutting -------------------------------------------------------------------------------------


def read_loras(paths: Iterable[Path]) -> dict[Path, Lora]:
    """Each LoRA by its path, with a note on what is skipped."""
    loras = {path: read_lora(path) for path in dict.fromkeys(paths)}
    for path, lora in loras.items():
        for remark in lora.remarks:
            say(remark)
        for why, keys in lora.skipped.items():
            if keys:
                level = "warning" if why == "biases" else "note"
                say(f"{level}: skipped in {path.name}: {SKIPPED[why]} {listed(keys)}")
    return loras


def prepare(args: argparse.Namespace) -> tuple[dict[Path, Lora], list[Output]]:
    """The LoRAs by path, and every file to write: planned and checked, with all notes said."""
    known = load_traits(args.traits_file)
    cuts = plan_cuts(args.loras, args.traits, args.alphas, known, args.blocks)
    plan = plan_outputs(cuts, args.output_path, combined=not args.not_combined)
    loras = read_loras(args.loras)
    base = read_base_model(args.base_model) if args.base_model else None
    for path in plan:
        check_output(path, [*args.loras, *filter(None, [args.base_model])])
    dtype, outputs = PRECISIONS.get(args.save_precision), []
    for path, planned in plan.items():
        slices = [take_slice(loras[cut.lora], cut) for cut in planned]
        outputs.append(build_output(path, slices, base, dtype, not args.no_metadata))
    remarks = (remark for output in outputs for piece in output.slices for remark in piece.remarks)
    for remark in dict.fromkeys(remarks):
        say(remark)
    for output in outputs if args.debug else ():
        output.name_modules()
    return loras, outputs


def run_cut(args: argparse.Namespace) -> None:
    """Plan, check and cut everything, and only then write."""
    _, outputs = prepare(args)
    for output in outputs:
        output.write()


def run_inspect(args: argparse.Namespace, with_cut: bool) -> None:
    """Show what each LoRA holds, and what a cut with these options would write."""
    from blora.slicer.inspection import inspect_lora, report

    known = load_traits(args.traits_file)
    if with_cut:
        loras, outputs = prepare(args)
    else:
        loras, outputs = {path: read_lora(path) for path in args.loras}, []
    for output in outputs:
        output.try_values()
    facts = [inspect_lora(lora, known) for lora in loras.values()]
    if args.json:
        cut = {"cut": [output.facts() for output in outputs]} if with_cut else {}
        print(json.dumps([fact | cut for fact in facts], indent=2))
        return
    print("\n\n".join("\n".join(report(fact)) for fact in facts))
    for output in outputs:
        print("\n".join([output.report(), *map(printable, lbw_lines(output.slices))]))


def import_problem(error: ImportError) -> str:
    """What to say where a package or a file of the blora folder cannot be imported."""
    name, python = error.name or "", f"this Python ({sys.executable})"
    if name.startswith("blora"):
        return cannot_load(error)
    if isinstance(error, ModuleNotFoundError):
        return f"error: no {name} in {python}: activate kohya's venv"
    # A broken numpy raises one without a name, and with a page of advice.
    reason = shortened(" ".join(str(error).split()))
    return f"error: a package of {python} cannot be imported: reinstall it ({reason})"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0 when done, 1 with one sentence on stderr when it fails."""
    escape_unencodable()
    parser = build_parser()
    argv = sys.argv[1:] if argv is None else argv
    args, left = parser.parse_known_args(shield_negatives(argv))
    if left or not args.loras:
        check_words(parser, args, [word.strip() for word in left], argv)
    check_usage(parser, args)
    if sentence := blora.leftovers():
        say(f"note: {sentence}")
    try:
        args.loras = [lora_file(path) for path in args.loras]
        run_inspect(args, asks_for_cut(parser, args)) if args.inspect else run_cut(args)
        print(end="", flush=True)
    except BloraError as error:
        say(f"error: {error}")
    except ImportError as error:
        say(import_problem(error))
    except KeyboardInterrupt:
        say("error: interrupted")
    except OSError as error:  # stdout is a full disk, or a pipe that was closed
        # Python would try to write the rest when it ends, and complain again.
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        say(f"error: cannot write ({error})")
    else:
        return 0
    return 1


if __name__ == "__main__":
    # A cut is over before a cycle of objects is worth a search: that takes 8 of 121 ms of CPU for a
    # cut of 28 MB at 1.0, and 22 of 204 ms at 0.5. freeze() spares the search when Python ends.
    gc.disable()
    code = main()
    gc.freeze()
    sys.exit(code)
