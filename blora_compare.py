#!/usr/bin/env python3
"""Show what each save of a training learned: content, style and both, side by side.

  blora_compare.py --checkpoint models/sd_xl_base_1.0.safetensors \\
      --loras _out/lora/sdxl/my_project_1
      cuts content and style of every save in the folder, has sd-scripts draw the prompts of
      blora_prompts.txt without a LoRA, with content, with style and with both, and writes
      compare.html beside the saves
  blora_compare.py --checkpoint ... --loras one_1 one_2 one_3 --seeds 1 2 3 --strengths 0.6 1
      a row for each save of three trainings, three seeds, and each slice at two strengths
  blora_compare.py --checkpoint ... --loras ... -- --v_parameterization --zero_terminal_snr
      what stands behind -- goes to sd-scripts' gen_img.py

A picture that was drawn with the same files and options is kept, so the same command goes on where
it was stopped. In a prompt file each line is a prompt, with sd-scripts' own options behind it:
--w --h --s --l --d --n.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

VERSION = "2.5.0"


def cannot_load(error: ImportError) -> str:
    """What to say where a file of the blora folder is missing, or of a different version."""
    return (
        f"error: blora_compare.py {VERSION} cannot use the blora folder beside it ({error}): copy "
        "the whole bundle again"
    )


if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit("error: this Python is older than 3.10: activate kohya's venv, or use a newer one")
try:
    import blora

    if getattr(blora, "VERSION", "unknown") != VERSION:
        raise ImportError(f"it is version {getattr(blora, 'VERSION', 'unknown')}", name="blora")
    from blora.drawing.comparison import (
        Comparison,
        check_slices,
        plan_columns,
        plan_drawings,
        read_saves,
    )
    from blora.drawing.pictures import read_prompts
    from blora.drawing.program import (
        STEPS,
        check_checkpoint,
        check_generator,
        drawing_options,
        line_options,
        positive,
        run_program,
        seed,
        size,
    )
    from blora.sdxl import Trait, load_traits, named_trait
    from blora.sheet import check_page
    from blora.tensorfile import fp32_number
except ImportError as error:
    sys.exit(cannot_load(error))


def strength(text: str) -> float:
    """A strength: a number that fp32 holds."""
    value = fp32_number(text)
    if value is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite fp32 number")
    return value


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="blora_compare.py",
        usage="%(prog)s --checkpoint FILE --loras LORA [LORA ...] [options] [-- gen_img's options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    # fmt: off
    add("--checkpoint", type=Path, required=True, help="the SDXL checkpoint to draw with")
    add("--loras", nargs="+", required=True,
        help="the saves to compare: files, patterns, or folders, whose saves come in the order of "
             "their steps")
    add("--traits", nargs="+", default=["content", "style"],
        help="the slices to show, and together (default: content style)")
    add("--strengths", type=strength, nargs="+", default=[1.0],
        help="the strengths of each slice, a column each (default: 1)")
    add("--prompts", type=Path, default=blora.ROOT / "blora_prompts.txt",
        help="a text file of prompts (default: blora_prompts.txt beside this script)")
    add("--seeds", type=seed, nargs="+", default=[],
        help="the seeds of each prompt (default: its --d, or 1)")
    add("--steps", type=positive, help=f"for all prompts (default: their --s, or {STEPS})")
    add("--size", type=size,
        help="for all prompts, such as 768 or 768x1024 (default: their --w and --h, or 1024)")
    add("--output", type=Path,
        help="the page (default: compare.html beside the first LoRA); the pictures go to a folder "
             "of its name")
    add("--traits_file", type=Path, default=blora.ROOT / "blora_traits.json",
        help="the traits to choose from (default: blora_traits.json beside this script)")
    add("--version", action="version", version=f"%(prog)s {VERSION}", help="print the version")
    # fmt: on
    return parser


def chosen_traits(names: list[str], path: Path) -> list[Trait]:
    """The traits of these names; BloraError for one that there is not."""
    known = load_traits(path)
    return [named_trait(name, known) for name in dict.fromkeys(names)]


def compare(args: argparse.Namespace, words: list[str]) -> None:
    """Find all that can be wrong before a picture is drawn; then draw, and write the page."""
    check_generator(words)
    base = check_checkpoint(args.checkpoint)
    columns = plan_columns(chosen_traits(args.traits, args.traits_file), args.strengths)
    prompts = read_prompts(args.prompts, args.seeds, line_options(args))
    saves = read_saves(args.loras, columns)
    page = args.output or saves[0].path.with_name("compare.html")
    check_page(page, "--output")
    check_slices(saves, columns, base)
    options, common = drawing_options(args.checkpoint, words)
    drawings = plan_drawings(saves, columns, prompts, common)
    Comparison(page, args.checkpoint, drawings, options, base, saves, columns).run()


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0 when done, 1 with one sentence on stderr when it fails."""
    return run_program(build_parser, compare, argv, cannot_load)


if __name__ == "__main__":
    sys.exit(main())
