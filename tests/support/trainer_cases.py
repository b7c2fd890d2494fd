"""Trainings as people start them, and what pre-flight has to say of each.

A case is a folder, what is changed in it, and options behind those of a recipe.
sd-scripts' own train() is asked whether it trains (toy_training.py), pre-flight what it says, and
test_real_cases.py compares the two. `fails` means an error, `warns` a warning, because
something else is trained than was meant, and `trains` that pre-flight says nothing new. The second
text of the first two is a pattern that has to be in the sentence. What has a name and is no field
of a Case is what the trainer itself shows of the training.

What cannot be asked on a CPU, or not without a network, is not here: fp16, two GPUs, bitsandbytes,
DeepSpeed, Hugging Face, and diffusers folders, which are read whole. Nor are the launchers, which
begin before the trainer.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import numpy as np
from kohya_folder import ROOT
from make_dataset import main as make_dataset
from PIL import Image
from preset_modules import EXPECTED
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
    """A folder in which the trainer would train: presets, and four drawings with captions."""
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
    """As of a download that stopped."""
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
    noise.convert(mode).save(target, **options)
    target.with_suffix(".txt").write_text("a dog")


def captions(content: str | bytes, numbers: range = range(4)) -> tuple[Change, ...]:
    """The same caption for the drawings of these numbers."""
    return tuple(write(f"{IMAGES}/{number:03d}.txt", content) for number in numbers)


@change
def rename_captions(folder: Path, ending: str) -> None:
    for text in (folder / IMAGES).glob("*.txt"):
        text.rename(text.with_name(text.stem + ending))


def all_gif(folder: Path) -> None:
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


# ---- Cases ---------------------------------------------------------------------------------------

FAST, CLASSIC = "fast", "classic"
# Modules of the recipes' preset, of the attention of one of its blocks, of no preset; and of both
# text encoders.
CONTENT_STYLE, STYLE_ONLY, EVERY_LAYER, TEXT_ENCODERS = 160, 80, 788, 176
OLD_LYCORIS = "3.2.0.post2"  # what kohya_ss asks for
HTML = b"<html></html>"


@dataclass(frozen=True)
class Case:
    """A training, and what pre-flight says of it."""

    says: str  # error, warning or nothing
    name: str
    sentence: str = ""  # a pattern in it
    words: tuple[str, ...] = ()
    change: tuple[Change, ...] = ()
    less: str = ""  # the option of the recipe that is left out
    recipe: str = FAST
    truth: dict[str, Any] = field(default_factory=dict)
    before_0_10: str = ""  # a pattern in the error, where sd-scripts 0.9 fails and 0.10 trains
    without: dict[str, str] = field(default_factory=dict)  # the same, where it lacks this option
    lycoris: str = ""  # another release than the newest
    after: str = ""  # the case whose output is copied into the folder as "before"


def case(says: str, name: str, sentence: str, *given: str | Change, **named: Any) -> Case:
    """Of what is given, words are options, and the rest are changes in the folder."""
    words = tuple(item for item in given if isinstance(item, str))
    changes = tuple(item for item in given if not isinstance(item, str))
    fields = {key: named.pop(key) for key in named.keys() & Case.__annotations__.keys()}
    return Case(says, name, sentence, words, changes, truth=named, **fields)


fails, warns = partial(case, "error"), partial(case, "warning")


def trains(name: str, *given: str | Change, **named: Any) -> Case:
    return case("nothing", name, "", *given, **named)


RECIPES = [
    trains("the fast recipe", modules=CONTENT_STYLE, sizes=[[64, 64]], scale=1.0),
    trains("the classic recipe", recipe=CLASSIC, modules=CONTENT_STYLE),
    # The recipes' own 32; every other case has 64.
    trains("buckets in steps of 32", "--bucket_reso_steps=32", before_0_10="bucket_reso_steps"),
    trains("the sample config", sample_config),
]

YAML = f"{PROJECT}/config.yaml"
EMPTY_YAML = write(YAML, "datasets: []\n")
OVERRIDING = ("--resolution=768", "--train_batch_size=4")
OVERRIDDEN = "resolution.*batch_size|batch_size.*resolution|config"
LOW_MAXIMUM = resolution("128\nmax_bucket_reso = 64")
TINY = dataset("max_bucket_reso = 32\nmin_bucket_reso = 32")
CONFIGS = [
    trains("a config with CRLF", rewrite("utf-8", "\r\n")),
    fails("a config with a byte order mark", "config.toml", rewrite("utf-8-sig")),
    fails("a config in UTF-16", "config.toml", rewrite("utf-16")),
    trains("a config in JSON", f"--dataset_config={PROJECT}/config.json", config_as_json),
    fails("a config in YAML", "config.yaml", f"--dataset_config={YAML}", EMPTY_YAML),
    fails("no config", "config.toml", remove(CONFIG)),
    fails("a config that is no TOML", "config.toml", config("[[datasets]]", "[[datasets]")),
    fails("a config of nothing", "config.toml", write(CONFIG, "")),
    fails("one table of datasets", "datasets", config("[[datasets]]", "[datasets]")),
    fails("an unknown key", "num_repeat", config("num_repeats", "num_repeat")),
    fails("batch_size in a subset", "batch_size", add("batch_size = 1\n")),
    fails("resolution in a subset", "resolution", add("resolution = 64\n")),
    fails("image_dir in [general]", "image_dir", config("]", f']\nimage_dir = "{IMAGES}"')),
    trains("num_repeats in a dataset", config("  num_repeats = 2", ""), dataset("num_repeats = 3")),
    fails("a resolution in quotes", "resolution", resolution('"64,64"')),
    trains("a resolution of two", resolution("[64, 64]")),
    fails("half a repeat", "num_repeats", config("num_repeats = 2", "num_repeats = 1.5")),
    fails("no repeats", "no picture", config("num_repeats = 2", "num_repeats = 0")),
    fails("a subset without image_dir", "image_dir", config("image_dir", "# image_dir")),
    fails("true in quotes", "flip_aug", add('flip_aug = "true"\n')),
    fails("a resolution above max_bucket_reso", "max_bucket_reso", LOW_MAXIMUM),
    fails("buckets smaller than their step", "bucket_reso", TINY),
    fails("a resolution below min_bucket_reso", "min_bucket_reso", "--min_bucket_reso=128"),
    fails("bucket steps of 48", "bucket_reso_steps", "--bucket_reso_steps=48"),
    fails("a batch of none", "batch_size", config("batch_size = 1", "batch_size = 0")),
    trains("a batch of two", config("batch_size = 1", "batch_size = 2")),
    trains("no buckets", dataset("enable_bucket = false")),
    warns("options that the config overrides", OVERRIDDEN, *OVERRIDING, sizes=[[64, 64]]),
    warns("a folder of pictures beside a config", "train_data_dir", f"--train_data_dir={PROJECT}"),
    fails("two words for a resolution", "64", "--resolution=64", "64"),
]


def as_the_gui(folder: str) -> tuple[str | Change, ...]:
    """The pictures in a folder whose name is to tell its repeats."""
    return f"--train_data_dir={PROJECT}/train", move(IMAGES, f"{PROJECT}/train/{folder}")


OTHER, REG = f"{PROJECT}/other", f"{PROJECT}/reg"
NEVER = subset(OTHER, "num_repeats = 0")
ANOTHER = picture("../other/0.png")
REGULARIZATION = (picture("../reg/0.png"), subset(REG, "is_reg = true"))
ODD_FOLDERS = {"a folder with a space": "my images", "a folder with brackets": "[v] é"}
IDLE, UNNUMBERED = ("--max_train_steps=16", *REGULARIZATION), as_the_gui("dog")
OF_ANOTHER_PROJECT = (
    move(IMAGES, "_in/lora/sdxl/other/images"),
    write("_in/lora/sdxl/other/config.toml", ""),
    config("demo", "other"),
)
FOLDERS = [
    fails("a folder that is not there", "images", move(IMAGES, f"{PROJECT}/pictures")),
    fails("backslashes in quotes", "config.toml", config(IMAGES, IMAGES.replace("/", "\\"))),
    fails("an empty folder", "no picture", remove(f"{IMAGES}/*")),
    *(
        trains(name, move(IMAGES, f"{PROJECT}/{folder}"), config("demo/images", f"demo/{folder}"))
        for name, folder in ODD_FOLDERS.items()
    ),
    warns("a config that names another project's folder", "other", *OF_ANOTHER_PROJECT),
    warns("a second folder that is not there", "gone", subset("gone")),
    warns("a second folder without pictures", "nothing", make("nothing"), subset("nothing")),
    warns("the same folder twice", "images", subset(IMAGES)),
    warns("a second folder with no repeats", "num_repeats|other", ANOTHER, NEVER),
    trains("a second folder", ANOTHER, subset(OTHER)),
    warns("regularization pictures without a weight", "prior_loss_weight", *IDLE, idle=True),
    trains("regularization pictures with a weight", "--prior_loss_weight=1", *REGULARIZATION),
    trains("folders as the GUI names them", *as_the_gui("10_sks dog"), less="dataset_config"),
    fails("a folder without repeats in its name", "train", *UNNUMBERED, less="dataset_config"),
]

ODD_PICTURES = {
    "CMYK": picture("004.jpg", mode="CMYK"),
    "grey": picture("004.png", mode="L"),
    "palette": picture("004.png", mode="P"),
    "alpha": picture("004.png", mode="RGBA"),
    "two pixels": picture("004.png", (2, 2)),
    "long": picture("004.png", (640, 64)),
    "odd sizes": picture("004.webp", (131, 97)),
    "another format than its ending's": picture("004.png", format="JPEG"),
    "a space in its name": picture("my picture.png"),
}
ANIMATED = picture("004.webp", save_all=True, append_images=[Image.new("RGB", (64, 64), "blue")])
BROKEN = {
    "cut off": ("000.png", cut_off(f"{IMAGES}/000.png")),
    "empty": ("000.png", write(f"{IMAGES}/000.png", b"")),
    "a page in HTML": ("004.jpg", write(f"{IMAGES}/004.jpg", HTML)),
    "a folder": ("004.png", make(f"{IMAGES}/004.png")),
    "a link to nothing": ("004.png", link(f"{IMAGES}/004.png", "gone.png")),
}
WIDE_PHOTO = picture("000.jpg", (256, 64), exif=SIDEWAYS)
TURNED = remove(f"{IMAGES}/*.png"), resolution("128"), WIDE_PHOTO
LEFTOVER, UNCHECKED = leftover_cache(), "skip_cache_check"
TEN, ON_DISK = "--max_train_steps=10", "--cache_latents_to_disk"
NO_CHECK = ON_DISK, f"--{UNCHECKED}", leftover_cache((128, 64))
LINKS = [move(IMAGES, "elsewhere"), make(IMAGES)]
LINKS += [link(f"{IMAGES}/00{n}.png", f"elsewhere/00{n}.png", absolute=True) for n in (0, 1)]
BELOW = (move(IMAGES, f"{PROJECT}/below"), move(f"{PROJECT}/below", f"{IMAGES}/below"))
PICTURES = [
    *(
        warns(f"a picture of the ending {e}", rf"\{e}", write(f"{IMAGES}/004{e}", b"\xff\xd8"))
        for e in (".jfif", ".gif", ".heic", ".avif", ".Png")
    ),
    fails("pictures of the ending .gif alone", "no picture", all_gif),
    fails("pictures one folder below", "no picture", *BELOW),
    trains("files of macOS", write(f"{IMAGES}/._000.png", b"\x00\x05\x16\x07")),
    warns("a photo stored sideways", "EXIF|sideways|turn|orientation", *TURNED, sizes=[[256, 64]]),
    trains("a photo stored upright", picture("004.jpg")),
    *(trains(f"a picture: {n}", TEN, odd, recipe=CLASSIC) for n, odd in ODD_PICTURES.items()),
    trains("a picture: animated", ANIMATED),
    *(
        fails(f"a picture that is {name}{end}", number, *more, broken, recipe=recipe)
        for name, (number, broken) in BROKEN.items()
        for end, more, recipe in [("", (), FAST), (", with classic", (TEN,), CLASSIC)]
    ),
    trains("pictures that are links", *LINKS, *captions("a dog", range(2))),
    warns("a cache that an older picture left", "npz", ON_DISK, LEFTOVER, picture("000.png")),
    warns("a cache of another shape that is not checked", "npz", *NO_CHECK, before_0_10=UNCHECKED),
    trains("a cache that is not used", LEFTOVER),
    trains("alpha masks", picture("004.png", mode="RGBA"), add("alpha_mask = true\n")),
]

CLASS_TOKENS, NO_CAPTIONS = add('class_tokens = "A [v]"\n'), remove(f"{IMAGES}/*.txt")
RENAMED, FIRST, TOKENS = rename_captions(".caption"), range(1), {"captions": ["A [v]"]}
BESIDE, DOUBLE = (sample_config, RENAMED), (sample_config, rename_captions(".png.txt"))
CAPTIONS = [
    warns("captions of the ending .caption beside class_tokens", r"\.caption", *BESIDE, **TOKENS),
    warns("captions of the ending .png.txt beside class_tokens", r"\.png\.txt", *DOUBLE, **TOKENS),
    warns("captions of the ending .caption alone", "caption", RENAMED, captions=[""]),
    trains("captions of the ending that is asked for", RENAMED, config('".txt"', '".caption"')),
    trains("class_tokens and no captions", CLASS_TOKENS, NO_CAPTIONS, captions=["A [v]"]),
    warns("no captions at all", "caption", NO_CAPTIONS, captions=[""]),
    warns("one picture without a caption", "caption", remove(f"{IMAGES}/000.txt")),
    warns("captions that begin with an empty line", "line", *captions("\na dog\n"), captions=[""]),
    warns("captions of several lines", "line", *captions("a dog\nhere\n"), captions=["a dog"]),
    warns("a caption of 80 words", "75", *captions(", ".join(["dog"] * 80))),
    trains("a caption of 80 words, with room", "--max_token_length=225", *captions("dog " * 80)),
    fails("an empty caption", "000.txt", *captions("", FIRST)),
    warns("a caption of a space", "000.txt|caption", *captions(" \n", FIRST)),
    fails("a caption in cp1252", "000.txt", *captions("a café".encode("cp1252"), FIRST)),
    trains("a caption with CRLF", *captions("a dog\r\n"), captions=["a dog"]),
    trains("a caption with a byte order mark", *captions("\ufeffa dog\n")),
]


def taken(path: str) -> str:
    return f"--pretrained_model_name_or_path={path}"


THIS, UNET = taken(CHECKPOINT), "model.diffusion_model."
FIRST_TEXT, SECOND = "conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1."
LINK, SPACED = "models/x.safetensors", "my models/x.safetensors"
CKPT, MOVED = (taken("x.ckpt"), write("x.ckpt", HTML)), move(CHECKPOINT, SPACED)
V_PRED, IDS = {"v_pred": [0], "ztsnr": [0]}, {f"{FIRST_TEXT}embeddings.position_ids": [1, 77]}
EMA, EXTRA = {"model_ema.decay": [1], "denoiser.sigmas": [1000]}, {f"{UNET}extra": [1]}
LINKED, RELATIVE = link(LINK, CHECKPOINT, absolute=True), link(LINK, f"../{CHECKPOINT}")
HERE = taken("x.safetensors"), checkpoint(), link("x.safetensors", CHECKPOINT)
PAGE = write("x.safetensors", HTML)
MASKED = {f"{UNET}input_blocks.0.0.weight": [320, 9, 3, 3]}  # latents, a mask, and masked latents
# SSD-1B lacks the middle's transformer and many blocks of the others.
SSD = [f"{UNET}middle_block.1.", f"{UNET}middle_block.2."]
SSD += [f"{UNET}output_blocks.0.1.transformer_blocks.{n}." for n in range(4, 10)]
# SD 1.5 by its names: one text encoder, and no size conditioning.
NOT_SD15 = ("conditioner.", f"{UNET}label_emb.")
SD15 = {"cond_stage_model.transformer.text_model.final_layer_norm.weight": [768]}
NO_OUT, NO_NORM = checkpoint(f"{UNET}out.2.bias"), checkpoint(f"{FIRST_TEXT}final_layer_norm.b")
NO_CONV = checkpoint("first_stage_model.decoder.conv_out.bias")
CHECKPOINTS = [
    fails("no checkpoint", "sdxl", THIS),
    fails("an empty checkpoint", "sdxl", THIS, write(CHECKPOINT, b"")),
    fails("a page in HTML as a checkpoint", "sdxl", THIS, write(CHECKPOINT, HTML)),
    fails("a checkpoint that is cut off", "sdxl", THIS, checkpoint(), cut_off(CHECKPOINT)),
    fails("a checkpoint without VAE", "VAE", THIS, checkpoint("first_stage_model.")),
    fails("an inpainting checkpoint", "inpaint", THIS, checkpoint(more=MASKED)),
    fails("a distilled checkpoint", "SSD|distilled", THIS, checkpoint(*SSD)),
    fails("a checkpoint of SD 1.5", "SDXL", THIS, checkpoint(*NOT_SD15, more=SD15)),
    fails("a checkpoint without the second text encoder", "sdxl", THIS, checkpoint(SECOND)),
    fails("a checkpoint that lacks one tensor of the U-Net", "out.2.bias", THIS, NO_OUT),
    fails("a checkpoint that lacks one tensor of a text encoder", "sdxl", THIS, NO_NORM),
    fails("a checkpoint that lacks one tensor of the VAE", "sdxl", THIS, NO_CONV),
    fails("a checkpoint with a tensor too many in the U-Net", "sdxl", THIS, checkpoint(more=EXTRA)),
    fails("the U-Net alone", "sdxl", THIS, checkpoint("conditioner.", "first_stage")),
    fails("a LoRA as a checkpoint", "sdxl", THIS, checkpoint("", more={"lora_unet_x": [4, 4]})),
    trains("a checkpoint of v-prediction", THIS, "--v_parameterization", checkpoint(more=V_PRED)),
    trains("a checkpoint with the weights of EMA", THIS, checkpoint(more=EMA)),
    trains("a checkpoint with position ids", THIS, checkpoint(more=IDS)),
    trains("a checkpoint without logit scale", THIS, checkpoint(f"{SECOND}model.logit_scale")),
    trains("a checkpoint in bf16", THIS, checkpoint(dtype="BF16")),
    trains("a checkpoint in fp32", THIS, checkpoint(dtype="F32")),
    trains("a checkpoint that is an absolute link", taken(LINK), checkpoint(), LINKED),
    fails("a checkpoint that is a relative link", "link", taken(LINK), checkpoint(), RELATIVE),
    trains("a checkpoint that is a relative link in this folder", *HERE),
    fails("a folder that is no diffusers model", "models", taken("models"), make("models")),
    fails("a checkpoint of the ending .ckpt that is none", "x.ckpt", *CKPT),
    trains("a checkpoint with a space in its path", taken(SPACED), checkpoint(), MOVED),
    fails("a VAE that is not there", "vae", "--vae=gone.safetensors"),
    fails("a page in HTML as a VAE", "vae", "--vae=x.safetensors", PAGE),
]


def lycoris(*arguments: str) -> tuple[str, ...]:
    """LyCORIS' own network with these arguments."""
    return "--network_module=lycoris.kohya", "--network_args", *arguments


def own_preset(name: str) -> tuple[str | Change, ...]:
    return *lycoris(f"preset={name}"), preset(name)


NO_PRESET = ("--network_args", "conv_dim=4")
PRESETS = "lycoris_presets"
PRESET = f"preset={PRESETS}/blora_content_style.toml"
PLAIN, OWN = lycoris(PRESET), lycoris("preset=my.toml")
SPACE = lycoris(PRESET.replace("=", " = "))
UNCLOSED = write("my.toml", "unet_target_name = [\n")
DORA_WD = preset("my.toml", before="dora_wd = true\n")
EXCLUDED = preset("my.toml", more=r"exclude_name = ['.*attn2.*']")
UNET_ONLY, EQUALS = "network_train_unet_only", own_preset("my=preset.toml")
in_old_lycoris = partial(trains, lycoris=OLD_LYCORIS, modules=STYLE_ONLY)
OF_PRESETS = [
    *(trains(f"the preset {name}", *lycoris(f"preset={PRESETS}/{name}.toml")) for name in EXPECTED),
    trains("the recipe's preset in LyCORIS 3.4.0", *PLAIN, lycoris="3.4.0"),
    trains("the recipe's preset in LyCORIS 3.2.0.post2", *PLAIN, lycoris=OLD_LYCORIS),
    trains("text encoders too", less=UNET_ONLY, modules=CONTENT_STYLE + TEXT_ENCODERS),
    warns("network arguments without a preset", "preset", *NO_PRESET, modules=EVERY_LAYER),
    warns("a preset with a space before =", "preset", *SPACE, modules=EVERY_LAYER),
    trains("conv_dim=1, as the GUI has it", *PLAIN, "conv_dim=1", "conv_alpha=1", "algo=lora"),
    trains("a preset of LyCORIS' own", *lycoris("preset=attn-only")),
    fails("a preset that is not there", "gone.toml", *lycoris("preset=gone.toml")),
    trains("an own preset", *OWN, preset("my.toml"), modules=STYLE_ONLY),
    fails("a preset that fits nothing", "my.toml", *OWN, preset("my.toml", "no_such_block")),
    fails("a preset that is no TOML", "my.toml", *OWN, write("my.toml", "a preset")),
    # toml reads a list that is not closed as if it were not there.
    warns("a preset that is cut off", "my.toml", *OWN, UNCLOSED, modules=EVERY_LAYER),
    fails("a pattern that is none", "my.toml", *OWN, preset("my.toml", "attn[12")),
    fails("a preset with dora_wd at its top", "dora_wd", *OWN, DORA_WD),
    trains("a preset that excludes", *OWN, EXCLUDED, modules=STYLE_ONLY // 2),
    in_old_lycoris("a preset with dora_wd at its top, in LyCORIS 3.2.0", *OWN, DORA_WD),
    in_old_lycoris("a preset that excludes, in LyCORIS 3.2.0", *OWN, EXCLUDED),
    trains("a preset with = in its name", *EQUALS, before_0_10="network_args"),
    trains("a preset with a space in its name", *own_preset("my preset.toml")),
]

ALGOS = ("locon", "loha", "lokr", "dylora", "glora", "ia3", "diag-oft")
ARGS, BYPASS = ("--network_args", PRESET), "bypass_mode=True"
LORA = ("--network_module=networks.lora", *ARGS)
LARGE_ALPHA = ("--network_dim=8", "--network_alpha=1024")
NETWORKS = [
    *(trains(f"algo={algo}", *PLAIN, f"algo={algo}") for algo in (*ALGOS, "full")),
    *(trains(f"algo={algo} with bypass", *PLAIN, f"algo={algo}", BYPASS) for algo in ALGOS),
    fails("algo=full with bypass", "bypass", *PLAIN, "algo=full", BYPASS),
    fails("algo=boft of a rank that it cannot have", "boft", *PLAIN, "algo=boft"),
    fails("algo=dora", "algo", *PLAIN, "algo=dora"),
    fails("dora_wd without =", "dora_wd", *PLAIN, "dora_wd"),
    trains("DoRA", *PLAIN, "dora_wd=True", "wd_on_output=False"),
    fails("DoRA with bypass", "bypass_mode", *ARGS, "dora_wd=True", BYPASS),
    trains("use_tucker and rs_lora", *PLAIN, "use_tucker=True", "rs_lora=True"),
    trains("dropout", *PLAIN, "rank_dropout=0.1", "module_dropout=0.1"),
    trains("dropout in both ways", *PLAIN, "dropout=0.1", "--network_dropout=0.1"),
    warns("an argument that nobody knows", "such_a_thing", *PLAIN, "such_a_thing=1"),
    fails("an argument that is no number", "conv_dim=four", *PLAIN, "conv_dim=four"),
    fails("a rank of 0", "network_dim", "--network_dim=0"),
    fails("a rank with a comma", "network_dim", "--network_dim=4,5"),
    warns("a rank below the alpha", "alpha", *LARGE_ALPHA, scale=128.0),
    trains("an alpha of 1", "--network_alpha=1", scale=0.25),
    fails("a network module that is not there", "network_module", "--network_module=lycoris.koyha"),
    warns("sd-scripts' own LoRA with a preset", "network_module|preset", *LORA),
    fails("no network module", "network_module", less="network_module"),
]

WEIGHTS = "--network_weights=before/demo_1.safetensors"
OTHER_RANK, NO_WEIGHTS = (WEIGHTS, "--network_dim=8"), ("--network_weights=x.safetensors", PAGE)
RESUMED = "--resume=before/demo_1-state"
GOING_ON = [
    trains("going on", WEIGHTS, after="the fast recipe"),
    trains("going on from weights alone", WEIGHTS, "--dim_from_weights", after="the fast recipe"),
    fails("going on with another rank", "network_dim|rank", *OTHER_RANK, after="the fast recipe"),
    fails("going on from nothing", "network_weights", "--network_weights=gone.safetensors"),
    fails("going on from a page in HTML", "network_weights", *NO_WEIGHTS),
    fails("weights alone, of no file", "network_weights", "--dim_from_weights"),
    trains("a state at the end", "--save_state", "--max_train_steps=2"),
    trains("resuming", RESUMED, "--max_train_steps=4", after="a state at the end"),
    fails("resuming at the end", "max_train_steps|resume", RESUMED, after="a state at the end"),
    fails("resuming from nothing", "resume", "--resume=gone"),
    fails("resuming from an empty folder", "resume", "--resume=gone", make("gone")),
]

# ---- Base weights, merged before the training ----------------------------------------------------

LORA_OF = {"lora_down.weight": (2, 1280), "lora_up.weight": (1280, 2), "alpha": ()}
HALF = {"hada_w{}_a": (1280, 2), "hada_w{}_b": (2, 1280)}
LOHA_OF = {name.format(n): shape for n in (1, 2) for name, shape in HALF.items()} | {"alpha": ()}
LOKR_OF = {"lokr_w1": (4, 4), "lokr_w2": (320, 320), "alpha": ()}
BY_ROW, BY_COLUMN = {"dora_scale": (1280, 1)}, {"dora_scale": (1, 1280)}
NARROW = {"lora_down.weight": (2, 640), "lora_up.weight": (640, 2), "alpha": ()}
LINEAR = "transformer_blocks_0_attn1_to_q"
CONTENT, STYLE = (f"lora_unet_output_blocks_{n}_1_{LINEAR}" for n in (0, 1))
OF_DIFFUSERS = f"lora_unet_up_blocks_0_attentions_0_{LINEAR}"
OF_FLUX = "lora_unet_double_blocks_0_img_attn_proj"
OF_TEXT = "lora_te2_text_model_encoder_layers_0_self_attn_q_proj"
BASE, SECOND_BASE = "base.safetensors", "second.safetensors"


@change
def lora(folder: Path, *modules: str, parts: dict[str, Any] = LORA_OF, name: str = BASE) -> None:
    """A LoRA of these modules, whose numbers are all 0."""
    shapes = {f"{module}.{part}": shape for module in modules for part, shape in parts.items()}
    write_checkpoint(folder / name, shapes, dtype="F32")


@change
def as_pt(folder: Path, name: str) -> None:
    """The LoRA as torch saves it."""
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(folder / BASE), folder / name)


content = partial(lora, CONTENT)


def below(*given: str | Change, module: str = "blora_network") -> tuple[str | Change, ...]:
    """Style alone, or with sd-scripts' LoRA everything, trained on what is merged."""
    argument = "conv_dim=1" if module == SD else f"preset={PRESETS}/blora_style.toml"
    network = f"--network_module={module}", "--network_args", argument
    return "--base_weights", BASE, *network, *given


SD = "networks.lora"
NO_ALPHA = {part: shape for part, shape in LORA_OF.items() if part != "alpha"}
HALF_STRONG, MERGES_NONE = ("--base_weights_multiplier", "0.5"), "merges nothing of .*base"
AT_ONE = "at 1, not at 0.5: .*--alphas 0.5"
style_on, style_warns = partial(trains, modules=STYLE_ONLY), partial(warns, modules=STYLE_ONLY)
BASES = [
    style_on("style on a content", *below(content())),
    style_on("the same with LyCORIS' network", *below(content(), module="lycoris.kohya")),
    style_on("the same in LyCORIS 3.2.0", *below(content()), lycoris=OLD_LYCORIS),
    style_on("style on a LoHa", *below(content(parts=LOHA_OF))),
    style_on("style on a LoKr", *below(content(parts=LOKR_OF))),
    style_on("style on a DoRA by rows", *below(content(parts=LORA_OF | BY_ROW))),
    style_on("style on a content and a style", *below(lora(CONTENT, STYLE))),
    style_on("style on a content with its text encoder", *below(lora(CONTENT, OF_TEXT))),
    style_on("style on two files", *below(content(), lora(STYLE, name=SECOND_BASE)),
             "--base_weights", BASE, SECOND_BASE),
    fails("style on a DoRA by columns", "wd_on_output", *below(content(parts=LORA_OF | BY_COLUMN))),
    fails("base weights of another width", BASE, *below(content(parts=NARROW))),
    fails("the same for sd-scripts' LoRA", BASE, *below(content(parts=NARROW), module=SD)),
    fails("base weights without alpha", BASE, *below(content(parts=NO_ALPHA))),
    fails("base weights that are a page in HTML", BASE, *below(write(BASE, HTML))),
    fails("base weights that are a folder", BASE, *below(make(BASE))),
    fails("a base weight that is not there", "base_weights", "--base_weights", "gone.safetensors"),
    style_warns("base weights of diffusers' blocks", MERGES_NONE, *below(lora(OF_DIFFUSERS))),
    style_warns("base weights of Flux", MERGES_NONE, *below(lora(OF_FLUX))),
    style_warns("a checkpoint as base weights", MERGES_NONE,
                *below(lambda folder: write_checkpoint(folder / BASE, sdxl_shapes()))),
    style_warns("base weights of which a half fits", "1 of 2", *below(lora(CONTENT, OF_FLUX))),
    style_warns("base weights of a text encoder", "text encoders", *below(lora(OF_TEXT))),
    style_warns("a content at half its strength", AT_ONE, *below(content()), *HALF_STRONG),
    style_warns("the same in LyCORIS 3.4.0", AT_ONE, *below(content()), *HALF_STRONG,
                lycoris="3.4.0"),
    style_warns("more strengths than files", "2 numbers", *below(content()),
                "--base_weights_multiplier", "1", "1"),
    style_warns("base weights of no name", "names no file", *below(), "--base_weights"),
    warns("a strength without a file", "0 files", "--base_weights_multiplier", "1"),
    trains("a content for sd-scripts' LoRA", *below(content(), module=SD), *HALF_STRONG),
    trains("a .pt for sd-scripts' LoRA", *below(content(), as_pt("base.pt"), module=SD),
           "--base_weights", "base.pt"),
    warns("a LoHa for sd-scripts' LoRA", MERGES_NONE, *below(content(parts=LOHA_OF), module=SD)),
    warns("a DoRA for sd-scripts' LoRA", "dora_scale",
          *below(content(parts=LORA_OF | BY_ROW), module=SD)),
]  # fmt: skip


def optimizer(name: str, *words: str, rate: str = "1e-4") -> tuple[str, ...]:
    arguments = ("--optimizer_args", *words)
    return f"--optimizer_type={name}", f"--learning_rate={rate}", *arguments


FREE, DADAPT = optimizer("AdamWScheduleFree"), optimizer("DAdaptAdam")
PRODIGY = ("--optimizer_args", "decouple=True")
OPTIMIZERS = [
    fails("AdamW with Prodigy's arguments", "optimizer_args", "--optimizer_type=AdamW"),
    warns("AdamW at a rate of 1", "learning_rate|rate", *optimizer("AdamW", rate="1.0")),
    warns("Prodigy at 1e-4", "learning_rate|rate", "--learning_rate=1e-4"),
    trains("AdamW", *optimizer("AdamW", "weight_decay=1e-2", "betas=0.9,0.99")),
    trains("adamw in lower case", *optimizer("adamw")),
    trains("Lion", *optimizer("Lion")),
    trains("SGDNesterov", *optimizer("SGDNesterov")),
    trains("Adafactor", *optimizer("Adafactor", "relative_step=False", "scale_parameter=False")),
    trains("Adafactor with its own rate", *optimizer("Adafactor", "relative_step=True")),
    trains("an optimizer of torch by its path", *optimizer("torch.optim.RAdam")),
    trains("Prodigy by its path", "--optimizer_type=prodigyopt.Prodigy"),
    trains("an optimizer without a schedule", *FREE, before_0_10="optimizer_type"),
    fails("an optimizer of no name", "optimizer_type", "--optimizer_type=Prodgy"),
    fails("an optimizer without its package", "dadaptation|optimizer_type", *DADAPT),
    fails("8 bits without bitsandbytes", "bitsandbytes", *optimizer("AdamW8bit")),
    fails("a comma too many", "weight_decay", *PRODIGY, "weight_decay=0.5,"),
    fails("betas split at a space", "optimizer_args|betas", *PRODIGY, "betas=(0.9,", "0.999)"),
    fails("a word in place of a number", "weight_decay", *PRODIGY, "weight_decay=small"),
    fails("an argument of no optimizer", "weight_dekay", *PRODIGY, "weight_dekay=0.1"),
    fails("a rate that is no number", "learning_rate", "--learning_rate=1e-"),
    trains("rates for the parts", "--unet_lr=1", "--text_encoder_lr=1"),
]

COSINE, WARM = "--lr_scheduler=cosine_with_restarts", "--lr_warmup_steps=1"
ANNEALING, LEAST = "--lr_scheduler_type=CosineAnnealingLR", "--lr_scheduler=cosine_with_min_lr"
MISSPELT = "--lr_scheduler_type=CosinAnnealingLR"
AS_THEY_ARE = "linear constant cosine_with_restarts polynomial constant_with_warmup".split()
SCHEDULERS = [
    *(trains(f"the scheduler {name}", f"--lr_scheduler={name}") for name in AS_THEY_ARE),
    trains("restarts and warm-up", COSINE, "--lr_scheduler_num_cycles=2", WARM),
    trains("warm-up as a share", "--lr_warmup_steps=0.5"),
    fails("a scheduler misspelt", "lr_scheduler", "--lr_scheduler=cosin"),
    fails("constant after a warm-up", "lr_warmup_steps", "--lr_scheduler=constant", recipe=CLASSIC),
    trains("a scheduler of torch", ANNEALING, "--lr_scheduler_args", "T_max=10"),
    fails("a scheduler of torch misspelt", "lr_scheduler_type", MISSPELT),
    fails("a scheduler of torch without its argument", "lr_scheduler|T_max", ANNEALING),
    fails("a scheduler that needs a rate", "lr_scheduler", LEAST),
    trains("a scheduler with its least rate", LEAST, "--lr_scheduler_min_lr_ratio=0.1"),
    fails("rules without a word", "lr_scheduler", "--lr_scheduler=piecewise_constant"),
]

OUTPUT = "_out/lora/sdxl/demo_1/demo_1.safetensors"
OUTPUTS = [
    trains("an option cut short", "--max_train_step=2"),
    trains("epochs", "--max_train_epochs=1"),
    fails("no step", "max_train_steps", "--max_train_steps=0"),
    fails("no epoch", "max_train_epochs", "--max_train_epochs=0"),
    fails("an option misspelt", "max_train_stepss", "--max_train_stepss=2"),
    trains("a save each step", "--save_every_n_steps=1", "--save_last_n_steps=1"),
    fails("a save every 0 steps", "save_every_n_steps", "--save_every_n_steps=0"),
    fails("a save every 0 epochs", "save_every_n_epochs", "--save_every_n_epochs=0"),
    trains("the format .pt", "--save_model_as=pt"),
    fails("a format of none", "save_model_as", "--save_model_as=diffusers"),
    fails("a precision of none", "save_precision", "--save_precision=fp8"),
    fails("an output name with a folder", "output_name", "--output_name=a/b"),
    warns("an output name with :", "output_name", "--output_name=a:b"),
    warns("an output name with ?", "output_name", "--output_name=a?b"),
    trains("an output name with a space", "--output_name=my hero"),
    fails("an output name that is too long", "output_name", f"--output_name={'a' * 260}"),
    fails("no output folder", "output_dir", less="output_dir"),
    fails("an output folder that is a file", "output_dir", "--output_dir=x", write("x", b"")),
    fails("an output folder below a file", "output_dir", "--output_dir=x/y", write("x", b"")),
    fails("an output folder that cannot be made", "/proc", "--output_dir=/proc/blora"),
    warns("an output that is there already", "demo_1.safetensors", write(OUTPUT, b"old")),
    trains("states", "--save_state", "--save_every_n_steps=1"),
    trains("no metadata", "--no_metadata"),
]

ALONE, CACHED = "--max_data_loader_n_workers=0", "--cache_text_encoder_outputs"
SHUFFLED = add("shuffle_caption = true\n")
SCALED = "--scale_v_pred_loss_like_noise_pred"
OTHERS = [
    fails("no workers beside persistent ones", "max_data_loader_n_workers", ALONE),
    trains("no workers", ALONE, less="persistent_data_loader_workers"),
    fails("xformers without the package", "xformers", "--xformers"),
    fails("wandb without the package", "wandb", "--log_with=wandb", "--logging_dir=logs"),
    trains("tensorboard", "--log_with=tensorboard", "--logging_dir=logs"),
    fails("tensorboard without a folder", "logging_dir", "--log_with=tensorboard"),
    fails("a crop by chance beside a cache", "random_crop", "--random_crop"),
    fails("colours by chance beside a cache", "color_aug", add("color_aug = true\n")),
    trains("flips beside a cache", add("flip_aug = true\n")),
    trains("colours by chance", add("color_aug = true\n"), recipe=CLASSIC),
    trains("the text's cache", CACHED),
    fails("the text's cache beside shuffling", "shuffle_caption", CACHED, SHUFFLED),
    fails("the text's cache beside trained encoders", CACHED.strip("-"), CACHED, less=UNET_ONLY),
    trains("shuffling", add("shuffle_caption = true\nkeep_tokens = 1\n")),
    trains("the latents' cache on disk", ON_DISK),
    trains("v-prediction", "--v_parameterization", "--zero_terminal_snr"),
    fails("the loss of v-prediction without it", "scale_v_pred_loss", SCALED),
    fails("a model of version 2", "v2", "--v2"),
    trains("clip skip", "--clip_skip=2"),
    trains("noise", "--noise_offset=0.05", "--adaptive_noise_scale=0.01", "--min_snr_gamma=5"),
    fails("adaptive noise alone", "noise_offset", "--adaptive_noise_scale=0.01"),
    trains("the loss of Huber", "--loss_type=huber", "--huber_schedule=snr"),
    fails("a loss of none", "loss_type", "--loss_type=hubr"),
    trains("accumulation", "--gradient_accumulation_steps=2"),
    fails("full bf16 without bf16", "full_bf16", "--full_bf16"),
    fails("fp8 without mixed precision", "fp8_base", "--fp8_base"),
    trains("bf16", "--mixed_precision=bf16"),
    trains("validation", "--validation_split=0.25", before_0_10="validation_split"),
]


def sampled(name: str, content: str | bytes) -> tuple[str | Change, ...]:
    """Pictures are drawn at first, of a file of prompts."""
    return "--sample_at_first", f"--sample_prompts={name}", write(name, content)


text = partial(sampled, "p.txt")
in_json, in_toml = partial(sampled, "p.json"), partial(sampled, "p.toml")
OURS = sampled("blora_prompts.txt", (ROOT / "blora_prompts.txt").read_bytes())
SIZED, DRAWN = "a dog --w 64 --h 128 --s 1", [[64, 128]]
EACH_STEP, ODD_SIZE = "--sample_every_n_steps=1", text("a dog --w 71 --h 130 --s 1")
NO_FILE, DEFAULT = (EACH_STEP, "--sample_prompts=gone.txt"), {"samples": [[512, 512]]}
WIDE, SUBSET = "prompt.width = 64\n", '[[prompt.subset]]\nprompt = "a dog"\n'
STEPS, TWICE = "prompt.sample_steps = 1\n", in_toml(f"{WIDE}{SUBSET}width = 128\n")
SAMPLES = [
    trains("the bundle's prompts", *OURS, samples=[[1024, 1024]] * 3),
    trains("prompts", *text(f"# a comment --w abc\n\n{SIZED}\n"), EACH_STEP, samples=DRAWN * 3),
    trains("prompts of a size that is no multiple of 8", *ODD_SIZE, samples=DRAWN),
    trains("prompts in JSON", *in_json(f'["{SIZED}"]'), samples=DRAWN),
    trains("prompts in TOML", *in_toml(f"{WIDE}{STEPS}{SUBSET}height = 128\n"), samples=DRAWN),
    fails("prompts without a file", "sample_prompts", EACH_STEP),
    warns("prompts that are not there", "sample_prompts", *NO_FILE, samples=[]),
    fails("prompts in cp1252", "p.txt", *text("a café".encode("cp1252"))),
    warns("no prompt", "p.txt", *text("# a\n\n"), samples=[]),
    warns("no prompt in JSON", "p.json", *in_json("[]"), samples=[]),
    warns("a comment with ' ' before it", "comment", *text(f" # {SIZED}\n"), samples=DRAWN),
    warns(
        r"a comment with '\ufeff' before it", "comment", *text(f"\ufeff# {SIZED}\n"), samples=DRAWN
    ),
    *(
        warns(f"a prompt with --{part}", f'"--{part}"', *text(f"a dog --s 1 --{part}\n"), **DEFAULT)
        for part in ("w abc", "w=64", "width 64", "seed 1", "d -1", "l .")
    ),
    fails("prompts that are no JSON", "JSON", *in_json("a dog\n")),
    fails("prompts that are one in JSON", "p.json", *in_json('"a dog"')),
    fails("prompts in a table in JSON", "p.json", *in_json('{"a": "dog"}')),
    fails("prompts that are no TOML", "TOML", *in_toml("a dog\n")),
    fails("prompts in TOML without their table", "p.toml", *in_toml("")),
    fails("prompts in TOML with a number twice", "p.toml", *TWICE),
]

GUI = f"""\
dataset_config = "{CONFIG}"
network_dim = 8
optimizer_args = ["decouple=True", "weight_decay=0.01"]
network_args = ["{PRESET}"]
"""


def settings(content: str, name: str = "gui.toml") -> tuple[str | Change, ...]:
    return f"--config_file={name}", write("gui.toml", content)


BROKEN_SETTING = settings('lr_scheduler = "cosin"\n')
FILES = [
    trains("settings in a file", *settings(GUI), less="dataset_config"),
    trains("settings in a file without its ending", *settings(GUI, "gui"), less="dataset_config"),
    fails("a file of settings that is not there", "config_file", "--config_file=gui.toml"),
    fails("a file of settings that is no TOML", "gui.toml", *settings("no settings")),
    warns("a setting in a file that nobody knows", "such_a_thing", *settings("such_a_thing = 1\n")),
    trains("settings in a file in tables", *settings(f"[a]\n{GUI}"), less="dataset_config"),
    fails("a broken setting in a file", "lr_scheduler", *BROKEN_SETTING, less="lr_scheduler"),
]

INPAINTING, LEFT_OUT = "train_inpainting", "skip_image_resolution"
NINE_CHANNELS, AS_ONE = (THIS, checkpoint(more=MASKED)), f"--{INPAINTING}"
inpaints = partial(trains, recipe=CLASSIC, without={INPAINTING: f"inpaint|{INPAINTING}"})
leaves_out = partial(trains, without={LEFT_OUT: LEFT_OUT})
LARGE = picture("004.png", (128, 128))
OF_NEW_RELEASES = [
    fails("an inpainting checkpoint with classic", "inpaint", *NINE_CHANNELS, recipe=CLASSIC),
    inpaints("an inpainting checkpoint, trained as one", *NINE_CHANNELS, AS_ONE),
    inpaints("a usual checkpoint, trained for inpainting", AS_ONE),
    fails("training for inpainting beside a cache", f"cache_latents|{INPAINTING}", AS_ONE),
    leaves_out("no picture is small enough to be left out", f"--{LEFT_OUT}=32"),
    leaves_out("small pictures left out", f"--{LEFT_OUT}=64", LARGE),
    leaves_out("small pictures left out by the config", LARGE, dataset(f"{LEFT_OUT} = 64")),
    fails("every picture left out", f"no picture|{LEFT_OUT}", f"--{LEFT_OUT}=64"),
]

# ---- Masks, captions and pictures that are trained otherwise than meant --------------------------

MASKS, META = f"{PROJECT}/masks", f"{PROJECT}/meta.json"


@change
def mask(
    folder: Path,
    number: int,
    size: tuple[int, int] = (SIDE, SIDE),
    value: int | None = None,
    path: str = MASKS,
) -> None:
    """A mask of a drawing: black on the left and white on the right, or of one value."""
    image = Image.new("L", size, 0 if value is None else value)
    if value is None:
        image.paste(255, (size[0] // 2, 0, *size))
    target = folder / path / f"{number:03d}.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    image.save(target)


def masked(*others: str | Change, value: int | None = None) -> tuple[str | Change, ...]:
    """A mask for each drawing, and what is changed behind it."""
    named = add(f'conditioning_data_dir = "{MASKS}"\n')
    return "--masked_loss", named, *(mask(n, value=value) for n in range(4)), *others


@change
def metadata(folder: Path, number: int = 4, name: str = META, **entry: Any) -> None:
    """A metadata_file that gives the drawings the same entry; the config names it."""
    images = [str(folder / IMAGES / f"{n:03d}.png") for n in range(number)]
    (folder / name).write_text(json.dumps(dict.fromkeys(images, entry)))


@change
def see_through(folder: Path, name: str, colour: str, side: int = SIDE // 2) -> None:
    """A drawing with a transparent square in its corner, which hides this colour."""
    image = Image.open(folder / IMAGES / name).convert("RGBA")
    hidden = Image.new("RGBA", (side, side), colour)
    hidden.putalpha(0)
    image.paste(hidden, (0, 0))
    image.save(folder / IMAGES / name)


@change
def bright(folder: Path, name: str) -> None:
    """A grey drawing of 16 bits."""
    grey = np.asarray(Image.open(folder / IMAGES / name).convert("L")).astype(np.uint16) * 257
    Image.fromarray(grey).save(folder / IMAGES / name)


@change
def bomb(folder: Path, name: str) -> None:
    """A picture of 200 million pixels, which PIL refuses."""
    Image.new("1", (20_000, 10_000)).save(folder / IMAGES / name)


def second_dataset(size: int, image_dir: str = IMAGES) -> Change:
    return add(
        f'[[datasets]]\nresolution = {size}\n[[datasets.subsets]]\nimage_dir = "{image_dir}"\n'
    )


CROPPED, NO_MASKS = {"recipe": CLASSIC, "less": "random_crop"}, remove(f"{MASKS}/*")
STEP = ({}, ""), ({**CROPPED}, ", each step")
SMALL_MASK, CUT_MASK = mask(2, (SIDE // 2, SIDE)), cut_off(f"{MASKS}/001.png")
ALPHA = add("alpha_mask = true\n")
MASKED_LOSSES = [
    *(trains(f"masks{end}", TEN, *masked(), **how) for how, end in STEP),
    *(fails(f"a small mask{e}", r"002\.png", TEN, *masked(SMALL_MASK), **how) for how, e in STEP),
    *(fails(f"a broken mask{e}", r"001\.png", TEN, *masked(CUT_MASK), **how) for how, e in STEP),
    fails("masks beside random_crop", "random_crop", *masked(), recipe=CLASSIC),
    fails("a mask that is not there", "003", *masked(remove(f"{MASKS}/003.png"))),
    fails("masks in no folder", "masks", *masked(move(MASKS, "elsewhere"))),
    warns("masks that are white", "white", *masked(value=255)),
    *(warns(f"a black mask{e}", r"002", TEN, *masked(mask(2, value=0)), **how) for how, e in STEP),
    warns("masked loss without masks", "masked_loss", "--masked_loss"),
    warns("masks that only the command line names", "masked_loss", "--masked_loss",
          f"--conditioning_data_dir={MASKS}", *masked()[2:]),
    fails("masks without masked loss", "masked_loss", *masked()[1:]),
    fails("masks of one folder of two", "conditioning_data_dir", *masked(),
          ANOTHER, subset(OTHER)),
    *(trains(f"transparency as a mask{e}", see_through("000.png", "black"), ALPHA, **how)
      for how, e in STEP),
    warns("transparency as a mask, of pictures without", "alpha_mask", ALPHA),
    trains("masks of a second dataset", *masked(), ANOTHER, second_dataset(SIDE, OTHER)),
]  # fmt: skip


def sized(width: int, height: int = 0) -> dict[str, list[int]]:
    """A picture's size, as sd-scripts 0.10 calls it and as 0.9 does."""
    return {key: [width, height or width] for key in ("image_size", "train_resolution")}


@change
def remembered(folder: Path, number: int = 4, caption: str = "") -> None:
    """What sd-scripts keeps with cache_info."""
    known = {}
    for drawing in (f"{IMAGES}/{n:03d}.png" for n in range(number)):
        text = (folder / drawing).with_suffix(".txt").read_text().strip()
        known[drawing] = {"caption": caption or text, "resolution": [SIDE, SIDE]}
    (folder / IMAGES / "metadata_cache.json").write_text(json.dumps(known))


REMEMBERED = add("cache_info = true\n")
LISTED, WILD = add(f'metadata_file = "{META}"\n'), add("enable_wildcard = true\n")
ONE_TAG = captions("dog")
WEIGHED = captions("((dog:1.2)), " * 9 + "[cat]")
LOST = [
    trains("captions in a metadata file", LISTED, metadata(caption="a dog"), captions=["a dog"]),
    trains("tags in a metadata file", LISTED, metadata(tags="dog, cat"), captions=["dog, cat"]),
    trains("captions with tags and wildcards", LISTED, WILD, metadata(caption="a", tags="dog")),
    warns("nothing in a metadata file", "meta.json", LISTED, metadata(), captions=[""]),
    trains("sizes in a metadata file", LISTED, metadata(caption="a", **sized(SIDE))),
    trains("sizes of before in a metadata file", LISTED, metadata(caption="a", **sized(2 * SIDE))),
    warns("sizes of other pictures in a metadata file", "meta.json", LISTED,
          metadata(caption="a", **sized(2 * SIDE, SIDE))),
    warns("two metadata files of the same names", "meta.json", LISTED, metadata(caption="a"),
          metadata(caption="a dog", name=f"{PROJECT}/b.json"),
          subset(IMAGES, f'metadata_file = "{PROJECT}/b.json"'), captions=["a dog"]),
    trains("what sd-scripts kept", REMEMBERED, remembered()),
    warns("captions that changed since", "metadata_cache", REMEMBERED, remembered(caption="a cat"),
          captions=["a cat"]),
    warns("a picture that came since", "metadata_cache", REMEMBERED, remembered(3)),
    fails("what sd-scripts kept, broken", "metadata_cache", REMEMBERED,
          write(f"{IMAGES}/metadata_cache.json", "{")),
    fails("a metadata file that is not there", "meta.json", LISTED),
    fails("a metadata file that is broken", "meta.json", LISTED, write(META, "{")),
    fails("a metadata file that is a list", "meta.json", LISTED, write(META, "[1]")),
    fails("a metadata file of --in_json that is not there", "gone.json", "--in_json=gone.json",
          f"--train_data_dir={IMAGES}", less="dataset_config"),
    fails("a picture of a metadata file that is not there", "003.png", LISTED,
          metadata(caption="a dog"), remove(f"{IMAGES}/003.png")),
    warns("captions dropped at each epoch", "caption_dropout_every_n_epochs",
          add("caption_dropout_every_n_epochs = 1\n"), captions=[""]),
    warns("captions dropped at each step", "caption_dropout_rate", "--caption_dropout_rate=1",
          captions=[""]),
    warns("every tag dropped", "caption_tag_dropout_rate", add("caption_tag_dropout_rate = 1.0\n"),
          captions=[""]),
    trains("captions dropped at times", "--caption_dropout_rate=0.5", TEN),
    trains("captions dropped every second epoch", add("caption_dropout_every_n_epochs = 2\n")),
    trains("weights in captions", "--weighted_captions", *WEIGHED, before_0_10="weighted_captions"),
    warns("weights in captions that are too many", "75", "--weighted_captions",
          *captions("(dog:1.1), " * 60), before_0_10="weighted_captions"),
]  # fmt: skip

UNSCALED = dataset("bucket_no_upscale = true")
TWICE_LISTED = second_dataset(128)
OTHERWISE = [
    *(warns(f"16 bits{e}", r"000\.png", TEN, bright("000.png"), **how) for how, e in STEP),
    *(warns(f"a transparent drawing{e}", r"000\.png", TEN, see_through("000.png", "black"), **how)
      for how, e in STEP),
    trains("transparent, and white below", see_through("000.png", "white")),
    trains("transparent at a corner", see_through("000.png", "black", 4)),
    fails("a picture smaller than a step", r"004\.png", UNSCALED, picture("004.png", (24, 24))),
    fails("a picture narrower than a step", r"004\.png", UNSCALED, picture("004.png", (24, 64))),
    fails("a picture too long for a step", r"004\.png", UNSCALED, picture("004.png", (4000, 40))),
    trains("a picture that fits a step", UNSCALED, resolution("128"), "--resolution=128",
           picture("004.png", (80, 70))),
    *(fails(f"a bomb{e}", "smaller", TEN, bomb("004.png"), **how) for how, e in STEP),
    trains("one folder at two resolutions", TEN, TWICE_LISTED, sizes=[[64, 64], [128, 128]]),
    trains("one folder in two spellings", subset(f"./{IMAGES}/")),
    warns("regularization pictures too many", "reg", "--prior_loss_weight=1",
          *(picture(f"../reg/{n}.png") for n in range(12)), subset(REG, "is_reg = true")),
]  # fmt: skip

OF_DATA = [
    *MASKED_LOSSES,
    *LOST,
    *OTHERWISE,
    *RECIPES,
    *CONFIGS,
    *FOLDERS,
    *PICTURES,
    *CAPTIONS,
    *CHECKPOINTS,
]
OF_TRAINING = [*OF_PRESETS, *NETWORKS, *GOING_ON, *OPTIMIZERS, *SCHEDULERS, *OUTPUTS, *OTHERS]
OF_TRAINING += BASES
OF_USE = [*SAMPLES, *FILES, *OF_NEW_RELEASES]
CASES = {case.name: case for case in [*OF_DATA, *OF_TRAINING, *OF_USE]}

# ---- Options: names that nobody reads ------------------------------------------------------------

BLOCK_WISE = ("block_dims=4,4", "down_lr_weight=1,1")
OF_LOKR = ("algo=lokr", "factor=8", "decompose_both=True", "use_conv_cp=True")
# As kohya_ss asks for a LoCon, whatever LyCORIS reads of it.
OF_GUI = "conv_dim=4 conv_alpha=4 use_tucker=False use_tucker=False rank_dropout=0 algo=locon"
OF_GUI = (*OF_GUI.split(), "use_scalar=False", "rank_dropout_scale=False", "train_norm=False")
OWN_KEYS = 'epoch = 1\nnoise_offset_type = "Original"\nadditional_parameters = "--seed=0"\n'
SD_LORA = ("--network_module=networks.lora", "--network_args")
NAMES = [
    warns("blocks' ranks for LyCORIS", "block_dims, down_lr_weight", *PLAIN, *BLOCK_WISE),
    warns("an argument misspelt", r"block_size\?", *PLAIN, "blok_size=4"),
    warns("the same in LyCORIS 3.2.0", r"block_size\?", *PLAIN, "blok_size=4", lycoris=OLD_LYCORIS),
    trains("arguments of LoKr", *PLAIN, *OF_LOKR),
    trains("arguments as the GUI gives them", *PLAIN, *OF_GUI),
    trains("blocks' ranks for sd-scripts' LoRA", *SD_LORA, f"block_dims=4{',4' * 22}"),
    warns(
        "an algorithm for sd-scripts' LoRA", r"algo.*conv_dim\?", *SD_LORA, "algo=lora", "con_dim=4"
    ),
    warns("a setting misspelt in a file", r"network_dim\?", *settings("network_dimm = 8\n")),
    trains("the GUI's own settings", *settings(OWN_KEYS + GUI), less="dataset_config"),
]

# ---- Options: what the trainer itself warns of ---------------------------------------------------

DORA = "dora_wd=True"
SNR = "--zero_terminal_snr"
ATTN_AND_TYPO = (*OWN, preset("my.toml", f"{ATTENTION}', 'output_blok"))
TOO_MANY = "down_lr_weight=" + ",".join(["1"] * 9) + " mid_lr_weight=1,1,1,1"
WARNED = [
    warns("an SNR of zero without v-prediction", "sd-scripts warns: .*zero_terminal_snr", SNR),
    warns("the same in classic", "sd-scripts warns: .*zero_terminal_snr", SNR, recipe=CLASSIC),
    warns("a preset with a name that fits nothing", "LyCORIS warns: .*output_blok", *ATTN_AND_TYPO),
    warns("more rates than blocks", "sd-scripts warns: .*too long", *SD_LORA, *TOO_MANY.split()),
    warns("dropout for DoRA", "LyCORIS warns: .*dropout", *PLAIN, DORA, "--network_dropout=0.1"),
    trains("no upscaling", dataset("bucket_no_upscale = true")),
    trains("a clip skip of 1", "--clip_skip=1"),
]

# ---- Options: numbers that cancel each other -----------------------------------------------------

LONG_WARM_UP = ("--max_train_steps=4", "--lr_warmup_steps=5")
STABLE = ("--lr_scheduler=warmup_stable_decay", "--max_train_steps=4", "--lr_decay_steps=2")
SHARES = settings("lr_warmup_steps = 2.0\n")
BACKWARDS = ("--min_timestep=900", "--max_timestep=100")
LATE = ("--sample_every_n_steps=9", "--sample_prompts=p.txt", write("p.txt", "a dog --s 1\n"))
COUNTS = [
    warns("a warm-up longer than the training", "lr_warmup_steps=5 is too long", *LONG_WARM_UP),
    warns("a warm-up as long", "lr_warmup_steps", *LONG_WARM_UP[:1], "--lr_warmup_steps=4"),
    warns("a warm-up of twice the training", "warmup", *SHARES, less="lr_warmup_steps"),
    warns("a warm-up into the decay", "lr_warmup_steps", *STABLE, "--lr_warmup_steps=3"),
    trains("a warm-up, a pause, a decay", *STABLE, "--lr_warmup_steps=1"),
    trains("a warm-up without a schedule", *FREE, *LONG_WARM_UP, before_0_10="optimizer_type"),
    warns("accumulation above an epoch", "accumulation.*8", "--gradient_accumulation_steps=9"),
    trains("accumulation of an epoch", "--gradient_accumulation_steps=8"),
    warns("timesteps backwards", "min_timestep", *BACKWARDS, before_0_10="min_timestep"),
    trains("timesteps", "--min_timestep=100", "--max_timestep=900"),
    warns(
        "samples by steps and epochs", "ignored", EACH_STEP, "--sample_every_n_epochs=1", *LATE[1:]
    ),
    trains("samples after the end", *LATE, samples=[]),
]

# ---- Options: sentences that name the one that is wrong ------------------------------------------

PLUS = optimizer("prodigyplus.ProdigyPlusScheduleFree", rate="1")
TEN = ("--lr_scheduler_args", "T_max=ten")
NO_CAPTION = r"000\.txt.*\(caption file is empty: .*000\.txt\)"
SENTENCES = [
    fails("no rate for the U-Net", "^--unet_lr=0 ", "--unet_lr=0"),
    fails("no rate", "^--learning_rate=0 ", "--learning_rate=0"),
    fails("a step in the backward pass", "^--fused_backward_pass ", "--fused_backward_pass"),
    fails("true in small letters", "write.* True", *PRODIGY, "use_bias_correction=true"),
    fails("an optimizer whose package has another name", "install prodigy-plus", *PLUS),
    fails("an optimizer without its package's name", r"package\.Name", "--optimizer_type=CAME"),
    fails("two optimizers", "--use_8bit_adam and --optimizer_type", "--use_8bit_adam"),
    fails(
        "bucket steps of 48 need no newer release",
        "32.*config ",
        "--bucket_reso_steps=48",
        before_0_10="64",
    ),
    fails("a scheduler's argument that is no number", "T_max=ten", ANNEALING, *TEN),
    fails(
        "a scheduler's argument misspelt",
        "lr_scheduler_type.*lr_scheduler_args",
        ANNEALING,
        "--lr_scheduler_args",
        "T_mx=10",
    ),
    fails("an empty caption", NO_CAPTION, *captions("")),
]
CASES |= {case.name: case for case in [*NAMES, *WARNED, *COUNTS, *SENTENCES]}
