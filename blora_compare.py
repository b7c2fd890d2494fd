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
import signal
import sys
from pathlib import Path

VERSION = "2.4.0"


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
    from blora.drawing.generator import card_options, check_options, draw, find_generator
    from blora.drawing.pictures import digest, read_prompts, stamp
    from blora.sdxl import Trait, checkpoint_weight, layers_by_module, load_traits, named_trait
    from blora.sheet import check_page
    from blora.slicer.reader import BaseModel, read_base_model
    from blora.tensorfile import fp32_number
    from blora.text import BloraError, counted, escape_unencodable, printable, say
except ImportError as error:
    sys.exit(cannot_load(error))

STEPS = 25
DEFAULTS = ["--W", "1024", "--H", "1024", "--steps", str(STEPS)]  # for prompts without their own
# A layer whose weight no other model has in this shape under this name.
OF_SDXL = "lora_unet_output_blocks_1_1_transformer_blocks_0_attn2_to_k"


# ---- Command line --------------------------------------------------------------------------------


def size(text: str) -> tuple[int, int]:
    """Pixels: "768", or "768x1024", which SDXL's U-Net can halve five times."""
    parts = text.lower().split("x")
    if not (len(parts) < 3 and all(part.isdecimal() and len(part) < 6 for part in parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 768, or 768x1024")
    width, height = int(parts[0]), int(parts[-1])
    if not width or not height or width % 32 or height % 32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a multiple of 32, from 32 on")
    return width, height


def positive(text: str) -> int:
    """A number of steps."""
    if not (text.isdecimal() and len(text) < 6 and 0 < int(text) <= 1000):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 1000")
    return int(text)


def seed(text: str) -> int:
    """A seed."""
    if not (text.isdecimal() and len(text) < 20):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


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


def check_checkpoint(path: Path) -> BaseModel | None:
    """The checkpoint by its header, where it is one file; BloraError where it is not SDXL's."""
    if not path.exists():
        raise BloraError(f'no checkpoint at "{path}": correct --checkpoint')
    if path.is_dir() or path.suffix != ".safetensors":
        return None  # a folder of diffusers, or a .ckpt, which gen_img.py reads or refuses
    base, layer = read_base_model(path), layers_by_module()[OF_SDXL]
    key, _ = checkpoint_weight(layer) or ("", None)
    tensor = base.tensors.get(key)
    if tensor is None or tensor.shape != layer.shape:
        raise BloraError(f'"{path}" is no SDXL checkpoint: correct --checkpoint')
    return base


def line_options(args: argparse.Namespace) -> str:
    """What goes behind every prompt: there it counts, not the prompt's own."""
    steps = f" --s {args.steps}" if args.steps else ""
    return steps + (" --w {} --h {}".format(*args.size) if args.size else "")


# ---- Drawing -------------------------------------------------------------------------------------


def has_card() -> bool:
    """Whether torch finds the kind of card that gen_img.py draws on."""
    import torch

    return bool(torch.cuda.is_available())


def plan(args: argparse.Namespace, words: list[str]) -> Comparison:
    """Everything that can be wrong before a picture is drawn, and what there is to draw."""
    check_options(words)
    script = find_generator()
    base = check_checkpoint(args.checkpoint)
    columns = plan_columns(chosen_traits(args.traits, args.traits_file), args.strengths)
    prompts = read_prompts(args.prompts, args.seeds, line_options(args))
    saves = read_saves(args.loras, columns)
    page = args.output or saves[0].path.with_name("compare.html")
    check_page(page, "--output")
    check_slices(saves, columns, base)
    words = [*DEFAULTS, *card_options(words, has_card()), *words]
    values = [word.rpartition("=")[2] for word in words]
    common = {
        "checkpoint": stamp(args.checkpoint),
        "gen_img.py": digest(script.read_bytes()),
        "options": words,
        "files": [stamp(file) for file in map(Path, values) if file.is_file()],
    }
    drawings = plan_drawings(saves, columns, prompts, common)
    return Comparison(page, args.checkpoint, base, saves, columns, drawings, words)


def announce(missing: int, number: int) -> None:
    """Say what is going to be drawn, and on what."""
    if missing and not has_card():
        say(
            "warning: torch finds no graphics card, so the pictures are drawn on the processor: "
            "install torch with CUDA"
        )
    if missing == number:
        say(f"drawing {counted(number, 'picture')}, once the model is loaded")
    elif missing:
        say(f"drawing {missing} of {counted(number, 'picture')}, the others are there already")
    else:
        say(f"nothing to draw: {counted(number, 'picture')} are there already")


def run(comparison: Comparison) -> None:
    """Draw what is missing, and write the page of what there is, whatever happens."""
    missing, number = comparison.missing(), len(comparison.drawings)
    announce(len(missing), number)
    try:
        if missing:
            draw(missing, comparison.folder, comparison.words, comparison.network)
    finally:
        if (left := len(comparison.missing())) < number:
            comparison.write()
            print(printable(f"-> {comparison.page}: {comparison.summary()}"))
        if left:
            say(f"note: {left} of {number} pictures are left")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0 when done, 1 with one sentence on stderr when it fails."""
    escape_unencodable()
    # What ends it ends gen_img.py too, which would go on alone, and leaves the page.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    argv = sys.argv[1:] if argv is None else argv
    end = argv.index("--") if "--" in argv else len(argv)
    args = build_parser().parse_args(argv[:end])
    try:
        run(plan(args, argv[end + 1 :]))
    except BloraError as error:
        say(f"error: {error}")
    except ImportError as error:
        is_ours = (error.name or "").startswith("blora")
        advice = f"no {error.name} in this Python ({sys.executable}): activate kohya's venv"
        say(cannot_load(error) if is_ours else f"error: {advice}")
    except KeyboardInterrupt:
        say("stopped: the same command goes on with what is left")
        return 130  # as a shell counts Ctrl+C
    else:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
