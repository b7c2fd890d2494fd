#!/usr/bin/env python3
"""Show what each block of a checkpoint does, to choose which ones to train for content and style.

  blora_blocks.py --checkpoint models/sd_xl_base_1.0.safetensors
      has sd-scripts draw a prompt, another one, and the first while one block after another hears
      the second, and writes sd_xl_base_1.0_blocks.html: a column a block
  blora_blocks.py --checkpoint ... --prompt "a photo of a fox" --other "a drawing of a teapot"
      two prompts of your own; sd-scripts' options behind the first hold for both: --n --l --w --h
  blora_blocks.py --checkpoint ... --pairs portrait anime --seeds 1 2 3
      --blocks OUT00 OUT01 OUT00+OUT01
      pairs of prompts by name, a row for each of three seeds, and a column for each of two blocks
      and for both together
  blora_blocks.py --checkpoint ... -- --v_parameterization --zero_terminal_snr
      what stands behind -- goes to sd-scripts' gen_img.py
  blora_blocks.py --write my --content OUT00 --style OUT01+OUT02
      writes a preset that trains these blocks, and the traits that cut them

A picture that was drawn with the same files and options is kept, so the same command goes on where
it was stopped. The page is written anew each time, and shows what the command names.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

VERSION = "2.5.0"


def cannot_load(error: ImportError) -> str:
    """What to say where a file of the blora folder is missing, or of a different version."""
    return (
        f"error: blora_blocks.py {VERSION} cannot use the blora folder beside it ({error}): copy "
        "the whole bundle again"
    )


if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit("error: this Python is older than 3.10: activate kohya's venv, or use a newer one")
try:
    import blora

    if getattr(blora, "VERSION", "unknown") != VERSION:
        raise ImportError(f"it is version {getattr(blora, 'VERSION', 'unknown')}", name="blora")
    from blora.blocks import POOLED, Block
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
    from blora.drawing.survey import (
        Pair,
        Survey,
        make_pair,
        plan_columns,
        plan_drawings,
    )
    from blora.preset import attention_layers, trained_by, write_own
    from blora.sdxl import load_traits
    from blora.sheet import check_page
    from blora.text import BloraError, listed, printable, say, shortened
except ImportError as error:
    sys.exit(cannot_load(error))

PAIRS = blora.ROOT / "blora/drawing/pairs.json"


# ---- Command line --------------------------------------------------------------------------------


def load_pairs() -> dict[str, dict[str, str]]:
    """The pairs of prompts by name: {"prompt", "other", "why"}; the first is the default."""
    return dict(json.loads(PAIRS.read_text(encoding="utf-8")))


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    pairs = (
        f"  {name:<10}{p['prompt']}\n{'':<12}{p['other']}\n{'':<12}({p['why']})"
        for name, p in load_pairs().items()
    )
    parser = argparse.ArgumentParser(
        prog="blora_blocks.py",
        usage="%(prog)s --checkpoint FILE [options] [-- gen_img's options]\n"
        "       %(prog)s --write NAME --content BLOCK ... --style BLOCK ...",
        description=__doc__,
        epilog="pairs of prompts:\n" + "\n".join(pairs),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    # fmt: off
    add("--checkpoint", type=Path, help="the SDXL checkpoint to draw with")
    add("--pairs", nargs="+", metavar="NAME",
        help="ready pairs of prompts, listed below (default: fox)")
    add("--prompt", help="the prompt that is drawn, in place of a pair")
    add("--other", help="the prompt that the blocks hear instead")
    add("--blocks", nargs="+", default=[], metavar="BLOCK",
        help="the columns: blocks by any of their names, several together as OUT00+OUT01, and "
             "POOLED, the text that reaches all of them (default: each of the eleven, and "
             "OUT00+OUT01)")
    add("--seeds", type=seed, nargs="+", default=[],
        help="a row each (default: the prompt's --d, or 1)")
    add("--steps", type=positive, help=f"(default: the prompt's --s, or {STEPS})")
    add("--size", type=size,
        help="such as 768 or 768x1024 (default: the prompt's --w and --h, or 1024)")
    add("--output", type=Path,
        help="the page (default: the checkpoint's name with _blocks.html, in this folder); the "
             "pictures go to a folder of its name")
    add("--write", metavar="NAME",
        help="write a preset and traits for the blocks below: NAME_content_style.toml in "
             "lycoris_presets, and NAME_traits.json")
    add("--content", nargs="+", default=[], metavar="BLOCK", help="such as OUT00")
    add("--style", nargs="+", default=[], metavar="BLOCK", help="such as OUT01+OUT02")
    add("--version", action="version", version=f"%(prog)s {VERSION}", help="print the version")
    # fmt: on
    return parser


def chosen_pairs(args: argparse.Namespace) -> list[Pair]:
    """The pairs of prompts to draw; BloraError for a name that there is not."""
    if args.prompt is not None:
        return [make_pair("own", args.prompt, args.other, args.seeds, line_options(args))]
    known = load_pairs()
    pairs = []
    for name in dict.fromkeys(args.pairs or [next(iter(known))]):
        if name not in known:
            raise BloraError(
                f'no pair of prompts "{shortened(name)}": choose one of {", ".join(known)}'
            )
        texts = known[name]["prompt"], known[name]["other"]
        pairs.append(make_pair(name, *texts, args.seeds, line_options(args)))
    return pairs


def misfit(args: argparse.Namespace) -> str:
    """Which options do not go together; "" where all do."""
    is_drawn = args.prompt is not None or args.pairs or args.blocks
    if not args.checkpoint and (is_drawn or not args.write):
        return "give --checkpoint to draw with, or --write with the blocks that you chose"
    if (args.prompt is None) != (args.other is None):
        return "--prompt and --other go together: give both"
    if args.prompt is not None and args.pairs:
        return "--pairs brings its own prompts: leave it out, or --prompt and --other"
    if (args.content or args.style) and not args.write:
        return "--content and --style are for --write: give it a name"
    return ""


# ---- What it does --------------------------------------------------------------------------------


def chosen_blocks(args: argparse.Namespace) -> dict[str, tuple[Block, ...]]:
    """The blocks for --write, by the trait that is to keep them."""
    chosen = {"content": args.content, "style": args.style}
    return {
        name: tuple(block for column in plan_columns(words) for block in column.blocks)
        for name, words in chosen.items()
        if words
    }


def write(args: argparse.Namespace) -> None:
    """Write the preset and the traits of the chosen blocks, and ask LyCORIS what they train."""
    groups = chosen_blocks(args)
    if any(POOLED in group for group in groups.values()):
        raise BloraError("POOLED is no block, so no preset trains it: give blocks to --write")
    preset, traits = write_own(args.write, groups, blora.ROOT)
    for path in (preset, traits):
        print(printable(f"-> {path}"))
    expected = {
        name: {layer.module for layer in attention_layers(blocks)}
        for name, blocks in groups.items()
    }
    try:
        odd = set().union(*expected.values()) ^ set(trained_by(preset))
    except ImportError as error:
        say(f"note: no {error.name} in this Python, so nobody checked what the preset trains")
        return
    if odd:
        raise BloraError(
            f"by {preset} LyCORIS does not train exactly the attention of these blocks, but "
            f"differs in modules {listed(sorted(odd))}: do not train with it"
        )
    counts = (f"{len(modules)} modules of {name}" for name, modules in expected.items())
    print(f"LyCORIS trains {' and '.join(counts)}")


def survey(args: argparse.Namespace, words: list[str]) -> None:
    """Find all that can be wrong before a picture is drawn; then draw, and write the page."""
    check_generator(words)
    check_checkpoint(args.checkpoint)
    columns = plan_columns(args.blocks)
    pairs = chosen_pairs(args)
    traits = [*load_traits(blora.ROOT / "blora_traits.json").values()]
    page = args.output or Path(f"{args.checkpoint.stem}_blocks.html")
    check_page(page, "--output")
    options, common = drawing_options(args.checkpoint, words)
    drawings = plan_drawings(pairs, columns, common)
    Survey(page, args.checkpoint, drawings, options, pairs, columns, traits).run()


def act(args: argparse.Namespace, words: list[str]) -> None:
    """Write what was chosen, draw what is to be seen; exit with 2 where options do not fit."""
    if problem := misfit(args):
        build_parser().error(problem)
    if args.write:
        write(args)
    if args.checkpoint:
        survey(args, words)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0 when done, 1 with one sentence on stderr when it fails."""
    return run_program(build_parser, act, argv, cannot_load)


if __name__ == "__main__":
    sys.exit(main())
