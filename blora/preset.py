"""A preset and traits for chosen blocks, and what LyCORIS trains by a preset.

This is the file form of docs/own_blocks.md: attention alone, and no text encoder.
"""

from __future__ import annotations

import json
import logging
import re
import textwrap
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from blora.blocks import Block
from blora.sdxl import Layer, sdxl_layers
from blora.text import BloraError, shortened, written_whole

Groups = dict[str, tuple[Block, ...]]  # of blocks, by the trait that is to keep them
PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,59}")
OURS = ("blora", "bdora")  # beginnings of the bundle's own presets and traits
ATTENTION = r"\.transformer_blocks\.\d+\.attn[12]\.to_(q|k|v|out\.0)$"
BLACKLIST = ["ff_net", "proj_in", "proj_out"]  # what LoRAs that are no B-LoRAs have in a block


# ---- Files ---------------------------------------------------------------------------------------


def write_own(name: str, groups: Groups, folder: Path) -> tuple[Path, Path]:
    """Write the preset and the traits of some blocks into a kohya folder, and say where.

    BloraError where that cannot be; then neither file is new.
    """
    groups = {group: tuple(dict.fromkeys(blocks)) for group, blocks in groups.items() if blocks}
    check_choice(name, groups)
    presets = folder / "lycoris_presets"
    if not presets.is_dir():
        raise BloraError(
            f"no folder {presets}: copy the bundle into a kohya sd-scripts or kohya_ss folder"
        )
    preset, traits = presets / f"{'_'.join((name, *groups))}.toml", folder / f"{name}_traits.json"
    write_both({preset: preset_text(groups, traits.name), traits: traits_text(groups)})
    return preset, traits


def check_choice(name: str, groups: Groups) -> None:
    """BloraError where there is no block, one is in two groups, or the name is none for files."""
    if not PLAIN_NAME.fullmatch(name):
        raise BloraError(
            f'"{shortened(name)}" is not a plain file name: give --write up to 60 letters (a to '
            "z), digits, - and _, a letter or digit first"
        )
    if name.lower().startswith(OURS):
        raise BloraError(
            f'"{name}" begins like a file of the bundle, which an update may overwrite: give '
            "--write another name"
        )
    if not groups:
        raise BloraError(
            "--write has no blocks to write: give it some, such as --content OUT00 --style OUT01"
        )
    owners: dict[Block, str] = {}
    for group, blocks in groups.items():
        for block in blocks:
            if owner := owners.get(block):
                raise BloraError(f"{block.lbw} is in --{owner} and --{group}: leave it in one")
            owners[block] = group


def write_both(texts: dict[Path, str]) -> None:
    """Write files that belong together: where one cannot be written, none of them is new."""
    new = [path for path, text in texts.items() if not is_there(path, text)]
    try:
        with ExitStack() as parts:
            for path in new:
                part = parts.enter_context(written_whole(path))
                part.write_text(texts[path], encoding="utf-8")
    except BaseException:
        for path in new:
            path.unlink(missing_ok=True)
        raise


def is_there(path: Path, text: str) -> bool:
    """Whether a file has this text already; BloraError where it has another."""
    try:
        old = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    except (IsADirectoryError, UnicodeDecodeError):
        old = ""
    except OSError as error:
        raise BloraError(f"cannot read {path} ({error})") from error
    if old != text:
        raise BloraError(f"{path} is there already: give --write another name, or delete it")
    return True


def preset_text(groups: Groups, traits: str) -> str:
    """A preset for LyCORIS that trains the attention of these blocks; `traits` cut it apart."""
    blocks = [block for each in groups.values() for block in each]
    chosen = [f"{group} ({', '.join(b.kohya for b in each)})" for group, each in groups.items()]
    cost = sum(sum(layer.shape) for layer in attention_layers(blocks))
    comment = (
        f"{' and '.join(chosen).capitalize()}, attention only, chosen with blora_blocks.py. For "
        f"either launcher; {traits} has the traits to slice with. Costs {cost:,} parameters per "
        "rank."
    )
    names = [f"  '{re.escape(block.kohya)}{ATTENTION}'," for block in blocks]
    lines = [
        textwrap.fill(comment, 100, initial_indent="# ", subsequent_indent="# "),
        "enable_conv = false",
        "unet_target_module = []",
        "unet_target_name = [",
        *names,
        "]",
        "text_encoder_target_module = []",
        "text_encoder_target_name = []",
    ]
    return "\n".join(lines) + "\n"


def traits_text(groups: Groups) -> str:
    """The traits file, laid out as blora_traits.json."""
    entries = []
    for group, blocks in groups.items():
        lists = {"whitelist": [block.prefix for block in blocks], "blacklist": BLACKLIST}
        lines = ",\n".join(f'    "{key}": {json.dumps(words)}' for key, words in lists.items())
        entries.append(f'  "{group}": {{\n{lines}\n  }}')
    return "{\n" + ",\n".join(entries) + "\n}\n"


# ---- What is trained -----------------------------------------------------------------------------


def attention_layers(blocks: Iterable[Block]) -> list[Layer]:
    """The layers of blocks that a B-LoRA trains: all [out, in], so that rank 1 has out + in."""
    starts = tuple(f"{block.kohya}.transformer_blocks." for block in blocks)
    unet = sdxl_layers()["unet"].values()
    return [layer for layer in unet if layer.name.startswith(starts) and ".attn" in layer.name]


def trained_by(preset: Path) -> list[str]:
    """kohya's names of the modules that LyCORIS would train of SDXL by a preset of write_own.

    ImportError where this Python has no LyCORIS or no torch; BloraError where LyCORIS fails.
    """
    import torch
    from lycoris.kohya import create_network
    from torch import nn

    def skeleton(network: str) -> Any:
        """A tree of SDXL's linear layers without weights: LyCORIS goes by their names."""
        root = nn.Module()
        for layer in sdxl_layers()[network].values():
            *parents, last = layer.name.split(".")
            place = root
            for part in parents:
                if not hasattr(place, part):
                    place.add_module(part, nn.Module())
                place = getattr(place, part)
            if len(layer.shape) == 2:
                place.add_module(last, nn.Linear(layer.shape[1], layer.shape[0]))
        return root

    log = logging.getLogger("LyCORIS")
    log.disabled = True
    try:
        with torch.device("meta"):
            unet, *encoders = map(skeleton, ("unet", "te1", "te2"))
            network = create_network(1.0, 1, 1, None, encoders, unet, preset=str(preset))
    except Exception as error:
        reason = shortened(f"{type(error).__name__}: {error}")
        raise BloraError(f"LyCORIS builds no network by {preset} ({reason})") from error
    finally:
        log.disabled = False
    return [lora.lora_name for lora in (*network.unet_loras, *network.text_encoder_loras)]
