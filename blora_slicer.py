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

--loras, --traits and --alphas go together by their order. Where there are fewer LoRAs than
traits the last LoRA is used again; a trait left out is content, a strength left out is 1.0.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blora_strength import BaseModel


def missing_file(name: str) -> str:
    """What to say where one of the bundle's own files is not there."""
    return (
        f"error: no {name}.py beside {Path(__file__).name}: copy all files of the bundle that have "
        "blora in their names into this folder"
    )


try:
    from blora_lora import (
        HASHES,
        Lora,
        Module,
        fp32_holds,
        json_object,
        read_lora,
        shorten_metadata,
        write_lora,
    )
    from blora_sdxl import Trait, block_of, load_traits
    from blora_words import BloraError, file_size, first_few, printable, say, span
except ModuleNotFoundError as missing:
    sys.exit(missing_file(missing.name))

HERE = Path(__file__).resolve().parent
DEFAULT_TRAIT = "content"
DEFAULT_STRENGTH = 1.0
PRECISIONS = {"float": "F32", "fp16": "F16", "bf16": "BF16"}


@dataclass(frozen=True)
class Cut:
    """One slice to make: which trait of which LoRA, at which strength."""

    lora: Path
    trait: Trait
    strength: float


@dataclass(frozen=True)
class Slice:
    """What a cut kept, at its strength, and the file it is from."""

    cut: Cut
    modules: tuple[Module, ...]
    lora: Lora


def describe(cut: Cut) -> str:
    """A cut in words: "content of a.safetensors"."""
    return f"{printable(cut.trait.name)} of {cut.lora.name}"


def summarize(modules: Iterable[Module]) -> str:
    """Counts of what a slice holds: "80 modules, 240 tensors, rank 1024"."""
    modules = list(modules)
    parts = [f"{len(modules)} modules", f"{sum(len(m.tensors) for m in modules)} tensors"]
    ranks = [module.rank for module in modules]
    return ", ".join(parts + ([f"rank {span(ranks)}"] if any(ranks) else []))


# ---- Pairing -------------------------------------------------------------------------------------


def plan_cuts(
    loras: list[Path], traits: list[str], alphas: list[float], known: dict[str, Trait]
) -> list[Cut]:
    """Pair LoRAs, traits and strengths by their order, filling up what was left out."""
    cuts = []
    for index in range(max(len(loras), len(traits))):
        name = traits[index] if index < len(traits) else DEFAULT_TRAIT
        if name not in known:
            names = ", ".join(printable(trait) for trait in known)
            raise BloraError(f'unknown trait "{printable(name)}": the traits are {names}')
        strength = alphas[index] if index < len(alphas) else DEFAULT_STRENGTH
        cuts.append(Cut(loras[min(index, len(loras) - 1)], known[name], strength))
    return cuts


def plan_outputs(cuts: list[Cut], output: Path, combined: bool) -> dict[Path, list[Cut]]:
    """Which file each cut goes to.

    One for all when combined. Otherwise one a cut, named after the output and the trait, and
    after the LoRA as well where several LoRAs give the same trait.
    """
    if combined:
        return {output: cuts}
    plan: dict[Path, list[Cut]] = {}
    names = [cut.trait.name for cut in cuts]
    for cut in cuts:
        parts = [output.stem, re.sub(r"[^\w.-]+", "_", cut.trait.name)]
        if names.count(cut.trait.name) > 1:
            parts.append(cut.lora.stem)
        path = output.with_name("_".join(parts) + output.suffix)
        if path in plan:
            raise BloraError(f"two slices would both be written to {path}: cut them one by one")
        plan[path] = [cut]
    return plan


# ---- Cutting and joining -------------------------------------------------------------------------


def check_fit(module: Module, lora: Path) -> None:
    """Refuse a module whose factors do not fit its layer: it would break where it is loaded."""
    if not module.fits:
        shapes = ", ".join(
            f"{printable(suffix)} {list(tensor.shape)}"
            for suffix, tensor in module.tensors.items()
            if tensor.shape
        )
        raise BloraError(
            f"{module.name} in {lora} does not fit SDXL, where the layer's weight is "
            f"{list(module.layer.shape)}: it has {shapes}; use a LoRA that was trained on SDXL"
        )


def cut_slice(lora: Lora, cut: Cut, base: BaseModel | None) -> Slice:
    """The modules the trait keeps, at the cut's strength; refused where there are none."""
    kept = [module for name, module in lora.modules.items() if cut.trait.keeps(name)]
    if not kept:
        blocks = ", ".join(dict.fromkeys(block_of(name) for name in lora.modules))
        raise BloraError(
            f'{cut.lora} holds nothing of the trait "{printable(cut.trait.name)}": '
            f"its blocks are {blocks}"
        )
    for module in kept:
        check_fit(module, cut.lora)
    if cut.strength != 1:
        from blora_strength import at_strength

        kept = [at_strength(module, cut.strength, cut.lora, base) for module in kept]
    return Slice(cut, tuple(kept), lora)


def join_slices(slices: list[Slice]) -> list[Module]:
    """The modules of all slices, by name; a module that two of them hold is refused."""
    owners: dict[str, Cut] = {}
    for piece in slices:
        for module in piece.modules:
            if module.name in owners:
                raise BloraError(
                    f"{module.name} would come from both {describe(owners[module.name])} and "
                    f"{describe(piece.cut)}: leave one out, or write them apart with --not_combined"
                )
            owners[module.name] = piece.cut
    modules = [module for piece in slices for module in piece.modules]
    alphas = {m.alpha for m in modules if m.algorithm.name == "LoRA" and m.rank}
    if len(slices) > 1 and len(alphas) > 1:
        from blora_strength import with_common_alpha

        return with_common_alpha(modules)
    return modules


# ---- Metadata ------------------------------------------------------------------------------------

KEPT_METADATA = ("ss_", "modelspec.")
# Of the source's own bytes: A1111 and Forge trust the hash they find, and would take the slice
# for its parent.
STALE_METADATA = "modelspec.hash_sha256"


def kept_metadata(lora: Lora) -> dict[str, str]:
    """What is still true of a slice of the LoRA."""
    return {
        key: value
        for key, value in lora.metadata.items()
        if key.startswith(KEPT_METADATA) and key != STALE_METADATA
    }


def metadata_number(numbers: set[float | None], before: str | None) -> str | None:
    """A number for the metadata: "Dynamic" where modules differ, as kohya's resize says it."""
    if len(numbers) > 1:
        return "Dynamic"
    [number] = numbers or {None}
    if number is None:
        return before
    try:
        return before if before and float(before) == number else f"{number:g}"
    except ValueError:
        return f"{number:g}"


def join_metadata(loras: list[Lora]) -> dict[str, str]:
    """What all sources say alike; what differs is told for each under ss_blora_sources.

    Tag frequencies are joined, their folders named after their LoRA: A1111 shows them all.
    """
    first, *others = [kept_metadata(lora) for lora in loras]
    agreed = {
        key: value for key, value in first.items() if all(o.get(key) == value for o in others)
    }
    if not others:
        return agreed
    differing = [
        {"file": lora.path.name}
        | {key: value for key, value in kept_metadata(lora).items() if key not in agreed}
        for lora in loras
    ]
    tags = {
        f"{lora.path.stem}/{folder}": counts
        for lora in loras
        for folder, counts in json_object(lora.metadata.get("ss_tag_frequency")).items()
    }
    if tags and "ss_tag_frequency" not in agreed:
        agreed["ss_tag_frequency"] = json.dumps(tags)
        for source in differing:
            source.pop("ss_tag_frequency", None)
    return agreed | {"ss_blora_sources": json.dumps(differing)}


def build_metadata(slices: list[Slice], modules: list[Module], output: Path) -> dict[str, str]:
    """The metadata of a file to write, with room for its hashes."""
    loras = list({piece.lora.path: piece.lora for piece in slices}.values())
    metadata = join_metadata(loras)
    cuts = ", ".join(f"{describe(piece.cut)} at {piece.cut.strength:g}" for piece in slices)
    comment = metadata.get("ss_training_comment", "None")  # sd-scripts' word for none
    ranked = [module for module in modules if module.rank]
    sizes = {
        "ss_network_dim": {float(module.rank) for module in ranked},
        "ss_network_alpha": {module.alpha or float(module.rank) for module in ranked},
    }
    for key, numbers in sizes.items():
        value = metadata_number(numbers, metadata.get(key))
        metadata |= {key: value} if value else {}
    titles = [lora.metadata.get("modelspec.title") or lora.path.stem for lora in loras]
    return {
        "ss_base_model_version": "sdxl_base_v1-0",  # without it A1111 takes it for SD1
        **metadata,
        "ss_output_name": output.stem,
        "ss_training_comment": cuts if comment in ("", "None") else f"{cuts}; {comment}",
        "modelspec.title": output.stem,
        "modelspec.date": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "modelspec.merged_from": ", ".join(titles),
        **{key: "0" * digits for key, digits in HASHES.items()},
    }


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
    """Whether both are one file; an input that cannot be looked at is told of when it is read."""
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
            return word.startswith("-") and math.isfinite(float(word))
        return False

    return [f" {word}" if is_negative(word) else word for word in argv]


def strength(text: str) -> float:
    """A strength from the command line: a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not fp32_holds(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def build_parser() -> argparse.ArgumentParser:
    """The options, the original's first."""
    parser = argparse.ArgumentParser(
        prog="blora_slicer.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--loras", type=Path, nargs="+", required=True, help="the LoRA files to cut from")
    add(
        "--traits",
        nargs="+",
        default=[DEFAULT_TRAIT],
        help="what to keep of each (default: %(default)s)",
    )
    add(
        "--alphas",
        type=strength,
        nargs="+",
        default=[DEFAULT_STRENGTH],
        help="the strength of each: 0.5 is half, -1 the opposite (default: %(default)s)",
    )
    add(
        "--output_path",
        type=Path,
        default=HERE / "model.safetensors",
        help="the file to write (default: model.safetensors beside this script)",
    )
    add("--debug", action="store_true", help="name every module that is kept")
    add("--not_combined", action="store_true", help="write one file for each LoRA and trait")
    add(
        "--traits_file",
        type=Path,
        default=HERE / "blora_traits.json",
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
    return loras


def run_inspect(args: argparse.Namespace) -> None:
    """Show what each LoRA holds."""
    from blora_inspect import inspect_lora, report

    known = load_traits(args.traits_file)
    facts = [inspect_lora(read_lora(path), known) for path in dict.fromkeys(args.loras)]
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        print("\n\n".join(report(fact) for fact in facts))


def finish(
    slices: list[Slice], output: Path, args: argparse.Namespace
) -> tuple[list[Module], dict[str, str]]:
    """The modules and the metadata of a file to write."""
    modules = join_slices(slices)
    metadata = {} if args.no_metadata else build_metadata(slices, modules, output)
    if args.save_precision:
        from blora_strength import at_precision

        modules = [at_precision(m, PRECISIONS[args.save_precision]) for m in modules]
    metadata, dropped = shorten_metadata(modules, metadata)
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
    base = None
    if args.base_model:
        from blora_strength import read_base_model

        base = read_base_model(args.base_model)
    finished = []
    for output, own in plan.items():
        slices = [cut_slice(loras[cut.lora], cut, base) for cut in own]
        finished.append((output, slices, *finish(slices, output, args)))
    for output, slices, modules, metadata in finished:
        write_lora(modules, metadata, output)
        for piece in slices:
            if args.debug:
                say("\n".join(f"{describe(piece.cut)}: {m.name}" for m in piece.modules))
            print(f"{describe(piece.cut)} at {piece.cut.strength:g}: {summarize(piece.modules)}")
        print(f"-> {output}: {summarize(modules)}, {file_size(output.stat().st_size)}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0 when done, 1 with one sentence on stderr when it cannot be."""
    # A console that lacks a letter of a path would otherwise end a finished cut in a traceback.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    parser = build_parser()
    args = parser.parse_args(with_blanks(sys.argv[1:] if argv is None else argv))
    check_usage(parser, args)
    try:
        run_inspect(args) if args.inspect else run_cut(args)
        sys.stdout.flush()
    except BloraError as error:
        say(f"error: {error}")
        return 1
    except ModuleNotFoundError as error:
        if error.name.startswith("blora_"):
            say(missing_file(error.name))
        else:
            say(f"error: no {error.name} in this Python ({sys.executable}): activate kohya's venv")
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
    sys.exit(main())
