"""What a case of trainer_cases.py changes in a folder in which the trainer would train.

The folder has lycoris_presets, four drawings of 64 x 64 with captions in IMAGES, and their CONFIG.
Each function hands back a change: a function of the folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from kohya_folder import ROOT
from make_dataset import main as make_dataset
from PIL import Image
from sdxl_checkpoint import write_checkpoint

Change = Callable[[Path], None]
PROJECT = "_in/lora/sdxl/demo"
CONFIG, IMAGES = f"{PROJECT}/config.toml", f"{PROJECT}/images"
CHECKPOINT = "sdxl.safetensors"
UNET = "model.diffusion_model."
SIDE = 64


def make_folder(path: Path) -> Path:
    """The folder that nothing is wrong with."""
    shutil.copytree(ROOT / "lycoris_presets", path / "lycoris_presets")
    make_dataset([str(path / PROJECT), "--images", "4", "--size", str(SIDE)])
    config = path / CONFIG
    text = config.read_text(encoding="utf-8").replace((path / PROJECT).as_posix(), PROJECT)
    config.write_text(text, encoding="utf-8")
    return path


# ---- Files ---------------------------------------------------------------------------------------


def write(name: str, content: str | bytes) -> Change:
    def change(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def move(old: str, new: str) -> Change:
    def change(folder: Path) -> None:
        (folder / new).parent.mkdir(parents=True, exist_ok=True)
        (folder / old).rename(folder / new)

    return change


def remove(pattern: str) -> Change:
    def change(folder: Path) -> None:
        for path in list(folder.glob(pattern)):
            path.unlink()

    return change


def folder(name: str) -> Change:
    return lambda path: (path / name).mkdir(parents=True)


def link(name: str, target: str, absolute: bool = False) -> Change:
    """A link to what the target is seen from the folder, or from the link itself."""

    def change(path: Path) -> None:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).symlink_to(path / target if absolute else target)

    return change


def truncate(name: str, part: float = 0.5) -> Change:
    """Keep the first part of a file."""

    def change(path: Path) -> None:
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[: int(len(content) * part)])

    return change


# ---- The dataset config --------------------------------------------------------------------------


def config(old: str, new: str) -> Change:
    """Replace a text of the config."""

    def change(path: Path) -> None:
        text = (path / CONFIG).read_text(encoding="utf-8")
        assert old in text, old
        (path / CONFIG).write_text(text.replace(old, new, 1), encoding="utf-8")

    return change


def add(text: str) -> Change:
    """Add to the config's end, which is in the table of its one subset."""

    def change(path: Path) -> None:
        with (path / CONFIG).open("a", encoding="utf-8") as file:
            file.write(text)

    return change


def subset(image_dir: str, more: str = "") -> Change:
    return add(f'[[datasets.subsets]]\nimage_dir = "{image_dir}"\n{more}\n')


def encode(encoding: str) -> Change:
    """Write the config in another encoding."""

    def change(path: Path) -> None:
        text = (path / CONFIG).read_text(encoding="utf-8")
        (path / CONFIG).write_bytes(text.encode(encoding))

    return change


def crlf(name: str) -> Change:
    def change(path: Path) -> None:
        content = (path / name).read_bytes()
        (path / name).write_bytes(content.replace(b"\n", b"\r\n"))

    return change


def sample_config(path: Path) -> None:
    """The config that the bundle ships, for these drawings."""
    text = (ROOT / "blora_dataset.toml").read_text(encoding="utf-8")
    text = text.replace("sdxl/my_project", "sdxl/demo").replace("= 1024", f"= {SIDE}")
    (path / CONFIG).write_text(text, encoding="utf-8")


def config_as_json(path: Path) -> None:
    dataset = {"subsets": [{"image_dir": IMAGES, "num_repeats": 2}]}
    dataset |= {"resolution": SIDE, "batch_size": 1}
    content = {"general": {"caption_extension": ".txt"}, "datasets": [dataset]}
    (path / CONFIG).with_suffix(".json").write_text(json.dumps(content))


# ---- Pictures and captions -----------------------------------------------------------------------


def picture(
    name: str, size: tuple[int, int] = (SIDE, SIDE), mode: str = "RGB", kind: str = "", **save: Any
) -> Change:
    """A picture of noise with a caption; its name is seen from IMAGES."""

    def change(path: Path) -> None:
        rng = np.random.default_rng(0)
        noise = Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), np.uint8))
        target = path / IMAGES / name
        target.parent.mkdir(parents=True, exist_ok=True)
        options = {"format": kind or None, **save}
        sixteen = mode == "I;16"
        image = Image.new("I;16", size, 40_000) if sixteen else noise.convert(mode)
        image.save(target, **options)
        target.with_suffix(".txt").write_text("a dog")

    return change


def sideways(name: str, size: tuple[int, int]) -> Change:
    """A photo whose EXIF orientation says that it is to be turned by a quarter."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture(name, size, exif=exif)


def animated(name: str) -> Change:
    def change(path: Path) -> None:
        frames = [Image.new("RGB", (SIDE, SIDE), colour) for colour in ("red", "blue")]
        target = path / IMAGES / name
        frames[0].save(target, save_all=True, append_images=frames[1:])
        target.with_suffix(".txt").write_text("a dog")

    return change


def caption(number: int, content: str | bytes) -> Change:
    return write(f"{IMAGES}/{number:03d}.txt", content)


def captions(content: str | bytes) -> Change:
    """The same caption for all four drawings."""

    def change(path: Path) -> None:
        for number in range(4):
            caption(number, content)(path)

    return change


def rename_captions(ending: str) -> Change:
    """Captions under another ending; {} stands for the drawing's own."""

    def change(path: Path) -> None:
        for text in (path / IMAGES).glob("*.txt"):
            text.rename(text.with_name(text.stem + ending))

    return change


def only_pictures(kind: str) -> Change:
    """All four drawings in another format."""

    def change(path: Path) -> None:
        for drawing in list((path / IMAGES).glob("*.png")):
            Image.open(drawing).save(drawing.with_suffix(kind))
            drawing.unlink()

    return change


def leftover_cache(name: str, size: tuple[int, int] = (SIDE, SIDE)) -> Change:
    """What --cache_latents_to_disk left of a picture of this size."""
    buffer = BytesIO()
    np.savez(
        buffer,
        latents=np.zeros((4, size[1] // 8, size[0] // 8), np.float32),
        original_size=np.array(size),
        crop_ltrb=np.array([0, 0, *size]),
    )
    return write(f"{IMAGES}/{name}", buffer.getvalue())


# ---- Checkpoints ---------------------------------------------------------------------------------


def checkpoint(edit: Callable[[dict[str, list[int]]], dict[str, list[int]]], dtype: str = "F16"):
    """CHECKPOINT made of the names and shapes of the one that trains, as edited."""

    def change(path: Path) -> None:
        shapes = json.loads((path / "shapes.json").read_text())
        write_checkpoint(path / CHECKPOINT, edit(shapes), dtype=dtype)

    return change


def without(*prefixes: str) -> Callable[[dict[str, list[int]]], dict[str, list[int]]]:
    return lambda shapes: {n: s for n, s in shapes.items() if not n.startswith(prefixes)}


def with_tensors(**more: list[int]) -> Callable[[dict[str, list[int]]], dict[str, list[int]]]:
    return lambda shapes: shapes | {name.replace("__", "."): more[name] for name in more}


def inpainting(shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    """Nine input channels: latents, a mask, and the masked latents."""
    return shapes | {f"{UNET}input_blocks.0.0.weight": [320, 9, 3, 3]}


def distilled(shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    """SSD-1B lacks the middle's transformer and many blocks of the others."""
    gone = [f"{UNET}middle_block.1.", f"{UNET}middle_block.2."]
    gone += [f"{UNET}output_blocks.0.1.transformer_blocks.{n}." for n in range(4, 10)]
    return without(*gone)(shapes)


def sd15(shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    """By its names: one text encoder, and no size conditioning."""
    names = without("conditioner.", f"{UNET}label_emb.")(shapes)
    return names | {"cond_stage_model.transformer.text_model.final_layer_norm.weight": [768]}


def cut_hole(path: Path) -> None:
    """Half of CHECKPOINT, as a download that stopped."""
    with (path / CHECKPOINT).open("r+b") as file:
        file.truncate((path / CHECKPOINT).stat().st_size // 2)


# ---- Presets -------------------------------------------------------------------------------------

ATTENTION = r"output_blocks\.1\.1\.transformer_blocks\.\d+\.attn[12]\.to_(q|k|v|out\.0)$"


def preset(name: str, unet: str = ATTENTION, more: str = "", before: str = "") -> Change:
    """A preset of one block's attention."""
    lists = ["unet_target_module", "text_encoder_target_module", "text_encoder_target_name"]
    empty = "".join(f"{key} = []\n" for key in lists)
    return write(
        name, f"{before}enable_conv = false\n{empty}unet_target_name = ['{unet}']\n{more}\n"
    )
