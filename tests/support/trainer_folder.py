"""What a case of trainer_cases.py changes in a folder in which the trainer would train.

The folder has lycoris_presets, four drawings of 64 x 64 with captions in IMAGES, and their CONFIG.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import numpy as np
from kohya_folder import ROOT
from make_dataset import main as make_dataset
from PIL import Image
from sdxl_checkpoint import sdxl_shapes, write_checkpoint

Change = Callable[[Path], object]
Given = ParamSpec("Given")
PROJECT = "_in/lora/sdxl/demo"
CONFIG, IMAGES = f"{PROJECT}/config.toml", f"{PROJECT}/images"
CHECKPOINT = "sdxl.safetensors"
SIDE = 64


def change(function: Callable[Concatenate[Path, Given], object]) -> Callable[Given, Change]:
    """The function is called in a case without the folder, which is given when it is made."""
    return lambda *args, **options: lambda folder: function(folder, *args, **options)


def make_folder(path: Path) -> Path:
    """The folder that nothing is wrong with."""
    shutil.copytree(ROOT / "lycoris_presets", path / "lycoris_presets")
    make_dataset([str(path / PROJECT), "--images", "4", "--size", str(SIDE)])
    config((path / PROJECT).as_posix(), PROJECT)(path)
    return path


# ---- Files ---------------------------------------------------------------------------------------


@change
def write(folder: Path, name: str, content: str | bytes) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


@change
def move(folder: Path, old: str, new: str) -> None:
    (folder / new).parent.mkdir(parents=True, exist_ok=True)
    (folder / old).rename(folder / new)


@change
def remove(folder: Path, pattern: str) -> None:
    for path in list(folder.glob(pattern)):
        path.unlink()


@change
def make(folder: Path, name: str) -> None:
    (folder / name).mkdir(parents=True)


@change
def link(folder: Path, name: str, target: str, absolute: bool = False) -> None:
    """A link to what the target is seen from the folder, or from the link itself."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).symlink_to(folder / target if absolute else target)


@change
def cut_off(folder: Path, name: str) -> None:
    """Half of a file, as of a download that stopped."""
    os.truncate(folder / name, (folder / name).stat().st_size // 2)


# ---- The dataset config --------------------------------------------------------------------------


@change
def config(folder: Path, old: str, new: str) -> None:
    """Replace a text of the config."""
    text = (folder / CONFIG).read_text(encoding="utf-8")
    assert old in text, old
    (folder / CONFIG).write_text(text.replace(old, new, 1), encoding="utf-8")


def resolution(value: str) -> Change:
    return config(f"= {SIDE}", f"= {value}")


def dataset(text: str) -> Change:
    """Add to the config's table of its one dataset."""
    return config("batch_size", f"{text}\nbatch_size")


@change
def add(folder: Path, text: str) -> None:
    """Add to the config's end, which is in the table of its one subset."""
    with (folder / CONFIG).open("a", encoding="utf-8") as file:
        file.write(text)


def subset(image_dir: str, more: str = "") -> Change:
    return add(f'[[datasets.subsets]]\nimage_dir = "{image_dir}"\n{more}\n')


@change
def rewrite(folder: Path, encoding: str, newline: str = "\n") -> None:
    """The config in another encoding, or with other line ends."""
    text = (folder / CONFIG).read_text(encoding="utf-8")
    (folder / CONFIG).write_text(text, encoding, newline=newline)


def sample_config(folder: Path) -> None:
    """The config that the bundle ships, for these drawings."""
    text = (ROOT / "blora_dataset.toml").read_text(encoding="utf-8")
    text = text.replace("sdxl/my_project", "sdxl/demo").replace("= 1024", f"= {SIDE}")
    (folder / CONFIG).write_text(text, encoding="utf-8")


def config_as_json(folder: Path) -> None:
    table = {"subsets": [{"image_dir": IMAGES, "num_repeats": 2}]}
    table |= {"resolution": SIDE, "batch_size": 1}
    content = {"general": {"caption_extension": ".txt"}, "datasets": [table]}
    (folder / CONFIG).with_suffix(".json").write_text(json.dumps(content))


# ---- Pictures and captions -----------------------------------------------------------------------

SIDEWAYS = Image.Exif()
SIDEWAYS[0x0112] = 6  # orientation: it is to be turned by a quarter


@change
def picture(
    folder: Path, name: str, size: tuple[int, int] = (SIDE, SIDE), mode: str = "RGB", **options: Any
) -> None:
    """A picture of noise with a caption; its name is seen from IMAGES."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), np.uint8))
    target = folder / IMAGES / name
    target.parent.mkdir(parents=True, exist_ok=True)
    sixteen = mode == "I;16"
    image = Image.new("I;16", size, 40_000) if sixteen else noise.convert(mode)
    image.save(target, **options)
    target.with_suffix(".txt").write_text("a dog")


def captions(content: str | bytes, numbers: range = range(4)) -> tuple[Change, ...]:
    """The same caption for the drawings of these numbers."""
    return tuple(write(f"{IMAGES}/{number:03d}.txt", content) for number in numbers)


@change
def rename_captions(folder: Path, ending: str) -> None:
    for text in (folder / IMAGES).glob("*.txt"):
        text.rename(text.with_name(text.stem + ending))


def all_gif(folder: Path) -> None:
    """All four drawings in another format."""
    for drawing in list((folder / IMAGES).glob("*.png")):
        Image.open(drawing).save(drawing.with_suffix(".gif"))
        drawing.unlink()


def leftover_cache(size: tuple[int, int] = (SIDE, SIDE)) -> Change:
    """What --cache_latents_to_disk left of a first picture of this size."""
    latents = np.zeros((4, size[1] // 8, size[0] // 8), np.float32)
    buffer, crop = BytesIO(), np.array([0, 0, *size])
    np.savez(buffer, latents=latents, original_size=np.array(size), crop_ltrb=crop)
    return write(f"{IMAGES}/000.npz", buffer.getvalue())


# ---- Checkpoints and presets ---------------------------------------------------------------------


@change
def checkpoint(
    folder: Path, *lacking: str, more: dict[str, list[int]] | None = None, dtype: str = "F16"
) -> None:
    """CHECKPOINT of the names and shapes of SDXL, without what begins so, and with more."""
    shapes = {n: s for n, s in sdxl_shapes().items() if not n.startswith(lacking)}
    write_checkpoint(folder / CHECKPOINT, shapes | (more or {}), dtype=dtype)


ATTENTION = r"output_blocks\.1\.1\.transformer_blocks\.\d+\.attn[12]\.to_(q|k|v|out\.0)$"


def preset(name: str, unet: str = ATTENTION, more: str = "", before: str = "") -> Change:
    """A preset of one block's attention."""
    lists = ["unet_target_module", "text_encoder_target_module", "text_encoder_target_name"]
    empty = "".join(f"{key} = []\n" for key in lists)
    return write(
        name, f"{before}enable_conv = false\n{empty}unet_target_name = ['{unet}']\n{more}\n"
    )
