"""What the programs that draw have in common: their options, the checkpoint, and how they end."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blora.drawing.generator import card_options, check_options, find_generator, has_card
from blora.drawing.pictures import digest, stamp
from blora.sdxl import checkpoint_weight, layers_by_module
from blora.slicer.reader import BaseModel, read_base_model
from blora.text import BloraError, escape_unencodable, say

STEPS = 25
DEFAULTS = ["--W", "1024", "--H", "1024", "--steps", str(STEPS)]  # for prompts without their own
# A layer whose weight no other model has in this shape under this name.
OF_SDXL = "lora_unet_output_blocks_1_1_transformer_blocks_0_attn2_to_k"


# ---- Options -------------------------------------------------------------------------------------


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


def line_options(args: argparse.Namespace) -> str:
    """What goes behind every prompt: there it counts, not the prompt's own."""
    steps = f" --s {args.steps}" if args.steps else ""
    return steps + (" --w {} --h {}".format(*args.size) if args.size else "")


# ---- What is drawn with --------------------------------------------------------------------------


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


def check_generator(words: list[str]) -> None:
    """BloraError where gen_img.py is not there, or is to get options that do not fit."""
    find_generator()
    check_options(words)


def drawing_options(checkpoint: Path, words: list[str]) -> tuple[list[str], dict[str, Any]]:
    """All options of gen_img.py, and what decides how all the pictures look."""
    options = [*DEFAULTS, *card_options(words, has_card()), *words]
    values = [word.rpartition("=")[2] for word in options]
    return options, {
        "checkpoint": stamp(checkpoint),
        "gen_img.py": digest(find_generator().read_bytes()),
        "options": options,
        "files": [stamp(file) for file in map(Path, values) if file.is_file()],
    }


# ---- How it ends ---------------------------------------------------------------------------------


def run_program(
    build_parser: Callable[[], argparse.ArgumentParser],
    act: Callable[[argparse.Namespace, list[str]], object],
    argv: list[str] | None,
    cannot_load: Callable[[ImportError], str],
) -> int:
    """Act on a command line, whose words behind -- are gen_img.py's; returns the exit code.

    0 when done, 1 with one sentence on stderr when it fails, 130 for Ctrl+C as a shell has it.
    """
    escape_unencodable()
    # What ends it ends gen_img.py too, which would go on alone, and leaves the page.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    argv = sys.argv[1:] if argv is None else argv
    end = argv.index("--") if "--" in argv else len(argv)
    try:
        parser = build_parser()
        args, unknown = parser.parse_known_args(argv[:end])
        if unknown:
            parser.error(f"unknown {' '.join(unknown)}: options of gen_img.py go behind --")
        act(args, argv[end + 1 :])
    except BloraError as error:
        say(f"error: {error}")
    except ImportError as error:
        is_ours = (error.name or "").startswith("blora")
        advice = f"no {error.name} in this Python ({sys.executable}): activate kohya's venv"
        say(cannot_load(error) if is_ours else f"error: {advice}")
    except KeyboardInterrupt:
        say("stopped: the same command goes on with what is left")
        return 130
    else:
        return 0
    return 1
