#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy", "safetensors", "torch"]
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

--loras, --traits and --alphas go together by their order. Where there are fewer LoRAs than
traits the last LoRA is used again; a trait left out is content, a strength left out is 1.0.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

HERE = Path(__file__).resolve().parent
DEFAULT_TRAIT = "content"
DEFAULT_STRENGTH = 1.0
MODULE_PREFIXES = ("lora_unet_", "lora_te")
LORA_UP = ".lora_up.weight"
LORA_DOWN = ".lora_down.weight"
# A block is named by the first words of its modules: lora_unet_output_blocks_0_1.
BLOCK_WORDS = 6
# Hashes of the source's own bytes. A1111 and Forge trust sshs_model_hash, so a copy would make
# the slice an alias of its parent.
STALE_METADATA = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")


class SliceError(Exception):
    """A mistake the user can mend; the message is one sentence that says how."""


@dataclass(frozen=True)
class Trait:
    """A set of modules, chosen by parts of their names, as blora_traits.json states it."""

    name: str
    whitelist: tuple[str, ...]
    blacklist: tuple[str, ...]

    def keeps(self, module: str) -> bool:
        """Whether `module` (a kohya name, without tensor suffix) belongs to the trait."""
        return any(part in module for part in self.whitelist) and not any(
            part in module for part in self.blacklist
        )


@dataclass(frozen=True)
class Cut:
    """One slice to make: which trait of which LoRA, at which strength."""

    lora: Path
    trait: Trait
    strength: float


@dataclass(frozen=True)
class Slice:
    """What a cut kept: the tensors by key, and the metadata of the file they come from."""

    cut: Cut
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]


# ---- Traits and pairing --------------------------------------------------------------------------


def module_of(key: str) -> str:
    """The module a tensor belongs to: its key up to the first dot."""
    return key.split(".", 1)[0]


def printable(text: str) -> str:
    """`text` with everything that could move a terminal's cursor written as an escape."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def parse_trait(name: str, entry: object, source: Path) -> Trait:
    """The trait `name` from its JSON object; a missing blacklist excludes nothing."""
    lists = entry if isinstance(entry, dict) else {}
    whitelist, blacklist = lists.get("whitelist"), lists.get("blacklist", [])
    for part in (whitelist, blacklist):
        if not isinstance(part, list) or not all(isinstance(item, str) for item in part):
            raise SliceError(
                f'trait "{printable(name)}" in {source} is not of the form '
                '{"whitelist": ["..."], "blacklist": ["..."]}: correct it there'
            )
    return Trait(name, tuple(whitelist), tuple(blacklist))


def parse_traits(text: str, source: Path) -> dict[str, Trait]:
    """All traits of a traits file, by name."""
    try:
        entries = json.loads(text)
    except ValueError as error:
        raise SliceError(f"{source} is not valid JSON ({error}): correct it there") from error
    if not isinstance(entries, dict):
        raise SliceError(f"{source} holds no traits: its JSON must be one object of traits by name")
    return {name: parse_trait(name, entry, source) for name, entry in entries.items()}


def plan_cuts(
    loras: list[Path], traits: list[str], alphas: list[float], known: dict[str, Trait]
) -> list[Cut]:
    """Pair LoRAs, traits and strengths by their order, filling up what was left out."""
    cuts = []
    for index in range(max(len(loras), len(traits))):
        name = traits[index] if index < len(traits) else DEFAULT_TRAIT
        if name not in known:
            names = ", ".join(printable(trait) for trait in known)
            raise SliceError(f'unknown trait "{printable(name)}": the traits are {names}')
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
        parts = [output.stem, cut.trait.name]
        if names.count(cut.trait.name) > 1:
            parts.append(cut.lora.stem)
        path = output.with_name("_".join(parts) + output.suffix)
        if path in plan:
            raise SliceError(f"two slices would both be written to {path}: cut them one by one")
        plan[path] = [cut]
    return plan


# ---- Slicing -------------------------------------------------------------------------------------


def scale_module(tensors: dict[str, torch.Tensor], cut: Cut) -> dict[str, torch.Tensor]:
    """The tensors of one LoRA or LoCon module with its change multiplied by the cut's strength.

    The strength goes into lora_up alone: the change is lora_up @ lora_down * alpha / rank, so
    each further factor would bring it in once more. It is computed in fp32 or better.
    """
    import torch

    if cut.strength == 1:
        return tensors
    module = module_of(next(iter(tensors)))
    up = module + LORA_UP
    if up not in tensors or f"{module}.dora_scale" in tensors:
        raise SliceError(
            f"{cut.lora} is no plain LoRA (see {printable(module)}), so strength {cut.strength:g} "
            "cannot go into the file: cut it at 1.0 and set the strength where the LoRA is used"
        )
    weight = tensors[up]
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return tensors | {up: (exact * cut.strength).to(weight.dtype)}


def kept_modules(keys: list[str], cut: Cut) -> dict[str, list[str]]:
    """The keys of the modules the trait keeps, by module; refused where there are none."""
    modules: dict[str, list[str]] = {}
    for key in sorted(keys):
        modules.setdefault(module_of(key), []).append(key)
    known = [module for module in modules if module.startswith(MODULE_PREFIXES)]
    if not known:
        first = printable(min(keys, default="no tensor at all"))
        raise SliceError(f"{cut.lora} is no SDXL LoRA with kohya's names, but holds {first}")
    kept = {module: modules[module] for module in known if cut.trait.keeps(module)}
    if not kept:
        blocks = sorted({"_".join(module.split("_")[:BLOCK_WORDS]) for module in known})
        raise SliceError(
            f'{cut.lora} holds nothing of the trait "{printable(cut.trait.name)}": '
            f"its blocks are {printable(', '.join(blocks))}"
        )
    return kept


def join_tensors(slices: list[Slice]) -> dict[str, torch.Tensor]:
    """The tensors of all slices; a module that two of them hold is refused."""
    owners: dict[str, Cut] = {}
    for piece in slices:
        for module in {module_of(key) for key in piece.tensors}:
            if module in owners:
                raise SliceError(
                    f"{printable(module)} would come from both {describe(owners[module])} and "
                    f"{describe(piece.cut)}: leave one out, or write them apart with --not_combined"
                )
            owners[module] = piece.cut
    return {key: tensor for piece in slices for key, tensor in piece.tensors.items()}


def join_metadata(slices: list[Slice], output: Path) -> dict[str, str]:
    """What all sources say alike, without their hashes, under the output's own name."""
    first, *others = [piece.metadata for piece in slices]
    metadata = {
        key: value
        for key, value in first.items()
        if key not in STALE_METADATA and all(other.get(key) == value for other in others)
    }
    if metadata:
        metadata["ss_output_name"] = output.stem
        metadata["modelspec.title"] = output.stem
    return metadata


# ---- What is said --------------------------------------------------------------------------------


def describe(cut: Cut) -> str:
    """A cut in words: "content of a.safetensors"."""
    return f"{printable(cut.trait.name)} of {cut.lora.name}"


def summarize(tensors: dict[str, torch.Tensor]) -> str:
    """Counts of what a slice holds: "80 modules, 240 tensors, rank 1024"."""
    modules = {module_of(key) for key in tensors}
    ranks = sorted({t.shape[0] for key, t in tensors.items() if key.endswith(LORA_DOWN)})
    parts = [f"{len(modules)} modules", f"{len(tensors)} tensors"]
    if ranks:
        parts.append(f"rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else ""))
    return ", ".join(parts)


def debug(enabled: bool, text: str) -> None:
    """Diagnostics go to stderr, so that the results on stdout stay readable."""
    if enabled:
        print(f"debug: {text}", file=sys.stderr)


# ---- Files ---------------------------------------------------------------------------------------


def load_traits(path: Path) -> dict[str, Trait]:
    """Read a traits file. Notepad's byte order mark is accepted."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise SliceError(f"no traits file at {path}: copy blora_traits.json there") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SliceError(f"cannot read the traits file {path} ({error})") from error
    return parse_traits(text, path)


def read_slice(cut: Cut, verbose: bool) -> Slice:
    """Read the modules a cut keeps, at its strength, and nothing else of the file."""
    from safetensors import SafetensorError, safe_open

    if not cut.lora.is_file():
        raise SliceError(f"no LoRA file at {cut.lora}: correct --loras")
    tensors: dict[str, torch.Tensor] = {}
    try:
        with safe_open(cut.lora, framework="pt") as file:
            keys = list(file.keys())
            for module, module_keys in kept_modules(keys, cut).items():
                debug(verbose, f"{describe(cut)}: {printable(module)}")
                loaded = {key: file.get_tensor(key) for key in module_keys}
                tensors |= scale_module(loaded, cut)
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise SliceError(
            f"{cut.lora} is not a whole safetensors file ({printable(str(error))}): "
            "download it again, or train and save it as safetensors"
        ) from error
    except OSError as error:
        raise SliceError(f"cannot read {cut.lora} ({error})") from error
    debug(verbose, f"{describe(cut)}: kept {len(tensors)} of {len(keys)} tensors")
    return Slice(cut, tensors, metadata)


def check_output(output: Path, cuts: list[Cut]) -> None:
    """Refuse an output that cannot be written, or that is one of the inputs."""
    if output.suffix != ".safetensors":
        raise SliceError(f"the output {output} must end in .safetensors: change --output_path")
    if not output.parent.is_dir():
        raise SliceError(f"no folder {output.parent} to write to: make it or change --output_path")
    if output.is_dir():
        raise SliceError(f"the output {output} is a folder: name a file in --output_path")
    for cut in cuts:
        if output.exists() and cut.lora.exists() and output.samefile(cut.lora):
            raise SliceError(f"the output {output} is one of the LoRAs: change --output_path")


def write_lora(tensors: dict[str, torch.Tensor], metadata: dict[str, str], output: Path) -> None:
    """Write a LoRA beside its final name, then move it there: no half file under that name."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    part = output.with_name(f".{output.name}.{os.getpid()}.part")
    try:
        save_file(tensors, part, metadata or None)
        part.replace(output)
    except (OSError, SafetensorError) as error:
        raise SliceError(f"cannot write {output} ({error})") from error
    finally:
        part.unlink(missing_ok=True)


# ---- Command line --------------------------------------------------------------------------------


def strength(text: str) -> float:
    """A strength from the command line: a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def build_parser() -> argparse.ArgumentParser:
    """The options, in the order of the original's README."""
    parser = argparse.ArgumentParser(
        prog="blora_slicer.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--loras", type=Path, nargs="+", required=True, help="the LoRA files to cut from")
    add("--traits", nargs="+", default=[DEFAULT_TRAIT], help="what to keep of each (content)")
    add(
        "--alphas",
        type=strength,
        nargs="+",
        default=[DEFAULT_STRENGTH],
        help="the strength of each: 0.5 is half, -1 the opposite (1.0)",
    )
    add(
        "--output_path",
        type=Path,
        default=HERE / "model.safetensors",
        help="the file to write (model.safetensors beside this script)",
    )
    add("--debug", action="store_true", help="name every module that is kept")
    add("--not_combined", action="store_true", help="write one file for each LoRA and trait")
    add(
        "--traits_file",
        type=Path,
        default=HERE / "blora_traits.json",
        help="the traits to choose from (blora_traits.json beside this script)",
    )
    return parser


def run(args: argparse.Namespace) -> None:
    """Plan, check, cut, and only then write."""
    known = load_traits(args.traits_file)
    cuts = plan_cuts(args.loras, args.traits, args.alphas, known)
    plan = plan_outputs(cuts, args.output_path, combined=not args.not_combined)
    for output in plan:
        check_output(output, cuts)
    finished = []
    for output, own_cuts in plan.items():
        slices = [read_slice(cut, args.debug) for cut in own_cuts]
        finished.append((output, slices, join_tensors(slices), join_metadata(slices, output)))
    for output, slices, tensors, metadata in finished:
        write_lora(tensors, metadata, output)
        for piece in slices:
            print(f"{describe(piece.cut)} at {piece.cut.strength:g}: {summarize(piece.tensors)}")
        size = output.stat().st_size / 1e6
        print(f"-> {output}: {summarize(tensors)}, {size:.1f} MB")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0 when done, 1 with one sentence on stderr when it cannot be."""
    # A console that lacks a letter of a path would otherwise end a finished cut in a traceback.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    parser = build_parser()
    args = parser.parse_args(argv)
    slices = max(len(args.loras), len(args.traits))
    if len(args.alphas) > slices:
        parser.error(f"--alphas: {len(args.alphas)} values for {slices} slice(s), leave some out")
    try:
        run(args)
    except SliceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
