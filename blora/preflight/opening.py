"""Every picture and its mask, opened once by sd-scripts' own code as the training will.

Nothing is written, and the datasets are left as they were.
"""

from __future__ import annotations

import copy
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import PIL
from PIL import Image
from tqdm import tqdm

from blora.preflight.dataset import holder, without_augmentation
from blora.preflight.trainer import own
from blora.preflight.trainer_errors import in_english
from blora.sheet import make_thumbnail

ORIENTATION = 0x0112  # the EXIF tag; 1 is upright, 5 to 8 are sideways
MOST_THREADS = 4  # each holds a whole picture
RE_SAVE = "re-save or remove it"
BUCKETS = "add --enable_bucket, or save it at the size of the resolution"
SMALLER = "make it smaller"
UPSCALE = "enlarge or remove it, or remove bucket_no_upscale"


class Header(NamedTuple):
    """What a picture's header says; (0, 0) is the size of what is no picture."""

    size: tuple[int, int] = (0, 0)
    orientation: int = 1  # by EXIF; 1 is upright
    mode: str = ""  # as PIL calls it; "I;16" has 16 bits
    has_alpha: bool = False


class Look(NamedTuple):
    """A picture as it is trained."""

    image: np.ndarray  # height x width x 3, in uint8
    weights: np.ndarray | None = None  # of a masked loss: height x width, from 0 to 1


@dataclass(frozen=True)
class Opened:
    """A picture after sd-scripts has opened, resized and cropped it."""

    path: Path
    bucket: tuple[int, int]  # the width and height that it is trained in
    size: tuple[int, int]  # of the file; 0, 0 where it is no picture
    orientation: int = 1  # by EXIF; 1 is upright
    error: str = ""  # why it cannot be trained, in the words of whoever refused it
    remedy: str = RE_SAVE
    mask: Path | None = None  # its mask, where that is what cannot be used
    is_api_mismatch: bool = False  # not the picture's fault, but how sd-scripts was called
    weights: tuple[float, float] | None = None  # the least and the greatest of its mask
    has_alpha: bool = False
    change: str = ""  # what is trained in place of what a viewer shows: one of CHANGES
    thumbnail: bytes | None = None  # WebP, where one was asked for


class MaskError(Exception):
    """What sd-scripts raised, its cause, is due to a picture's mask."""


@dataclass(frozen=True)
class Job:
    """A picture to open."""

    info: Any  # sd-scripts' ImageInfo
    open: Callable[[], Look]
    has_buckets: bool = True
    load: Callable[[Path, bool], np.ndarray] | None = None  # the file alone, with alpha or without
    is_alpha_trained: bool = False  # neither its transparency nor a picture masks it


def open_pictures(
    datasets: Iterable[Any], cached: bool, file: TextIO | None, limit: int = 0
) -> list[Opened]:
    """Every picture as sd-scripts opens it, in the order of the datasets.

    `cached` as with --cache_latents, where sd-scripts resizes whatever it finds; else as its
    DataLoader does. A progress bar goes to `file` where it takes more than a second. With a
    `limit` each has a thumbnail of at most so many bytes.
    """
    jobs = [partial(open_one, job, limit) for data in datasets for job in openers(data, cached)]
    with (
        warnings.catch_warnings(),
        ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool,
    ):
        warnings.simplefilter("ignore")  # PIL's on large pictures and odd EXIF
        logging.disable()  # sd-scripts' line on a picture that it cannot open
        try:
            opened: Iterator[Opened] = pool.map(lambda job: job(), jobs)
            bar = tqdm(
                opened, "opening pictures", len(jobs), leave=False, file=file, disable=not file,
                delay=1,
            )  # fmt: skip
            pictures = list(bar)
        finally:
            logging.disable(logging.NOTSET)
    if pictures and all(picture.is_api_mismatch for picture in pictures):
        raise TypeError(pictures[0].error)
    return pictures


def open_one(job: Job, limit: int) -> Opened:
    """Open a picture; whatever is wrong with it becomes its error."""
    path, bucket = Path(job.info.absolute_path), tuple(job.info.bucket_reso)
    header = read_header(path)
    opened = Opened(path, bucket, header.size, header.orientation, has_alpha=header.has_alpha)
    if 0 in bucket:
        return replace(opened, error=too_narrow(header.size), remedy=UPSCALE)
    try:
        look = job.open()
        change = change_of(path, header, job)
    except MaskError as wrong:
        return masked_wrongly(opened, Path(job.info.cond_img_path or ""), wrong.__cause__ or wrong)
    except Exception as refusal:  # sd-scripts', PIL's or OpenCV's: each has its own
        return replace(
            opened,
            error=what_is_wrong(path, header.size, refusal),
            remedy=remedy_for(refusal, job.has_buckets),
            is_api_mismatch=isinstance(refusal, TypeError | AttributeError),
        )
    if look.weights is not None:
        opened = replace(opened, weights=(float(look.weights.min()), float(look.weights.max())))
    opened = replace(opened, change=change)
    if not limit:
        return opened
    image = Image.fromarray(np.ascontiguousarray(look.image))
    return replace(opened, thumbnail=make_thumbnail(image, limit))


# ---- As sd-scripts opens it ----------------------------------------------------------------------


def openers(dataset: Any, cached: bool) -> Iterator[Job]:
    """What opens each picture of a dataset, but those whose latents it was given in their place."""
    held, single = holder(dataset), one_by_one(dataset)
    load = own("load_image", type(held))
    for number, index in enumerate(holder(single).buckets_indices):
        info, subset = held_picture(holder(single), index)
        if info.latents_npz is None:
            yield Job(
                info,
                partial(open_for_cache if cached else open_for_step, single, number),
                cached or held.enable_bucket,
                load,
                held is dataset and not subset.alpha_mask,
            )


def held_picture(dataset: Any, index: Any) -> tuple[Any, Any]:
    """The ImageInfo and the subset of a batch of one."""
    key = dataset.bucket_manager.buckets[index.bucket_index][index.batch_index]
    return dataset.image_data[key], dataset.image_to_subset[key]


def open_for_step(dataset: Any, number: int) -> Look:
    """The picture of a batch of one."""
    try:
        batch = dataset[number]
    except Exception as refusal:
        if holder(dataset) is dataset:
            raise
        holder(dataset)[number]  # where this raises, it is the picture's own fault
        raise MaskError from refusal
    image = batch["images"][0]  # 3 x height x width, -1 to 1
    array: np.ndarray = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    return Look(array, weights_of(batch))


def open_for_cache(dataset: Any, number: int) -> Look:
    """What sd-scripts hands to the VAE when it caches latents, before it becomes a tensor."""
    held = holder(dataset)
    info, subset = held_picture(held, held.buckets_indices[number])
    image = own("load_image", type(held))(info.absolute_path, subset.alpha_mask)
    # Since 0.10 the way of resizing can be chosen.
    way = getattr(info, "resize_interpolation", None)
    chosen = {"resize_interpolation": way} if way else {}
    image, size, crop = own("trim_and_resize_if_required", type(held))(
        subset.random_crop, image, info.bucket_reso, info.resized_size, **chosen
    )
    if held is not dataset:
        return Look(image[:, :, :3], mask_beside_latents(dataset, number, info, size, crop))
    has_weights = subset.alpha_mask and image.shape[2] == 4
    return Look(image[:, :, :3], image[:, :, 3] / 255 if has_weights else None)


def mask_beside_latents(
    dataset: Any, number: int, info: Any, size: tuple[int, int], crop: tuple[int, ...]
) -> np.ndarray | None:
    """The weights by a picture's mask, which is opened at each step, beside latents in a cache."""
    import torch

    width, height = info.bucket_reso
    info.latents = torch.zeros(()).expand(4, height // 8, width // 8)  # of no memory
    info.latents_original_size, info.latents_crop_ltrb = size, crop
    try:
        return weights_of(dataset[number])
    except Exception as refusal:
        raise MaskError from refusal


def weights_of(batch: dict[str, Any]) -> np.ndarray | None:
    """By what the loss of a batch of one is multiplied; None where it has no mask."""
    if "conditioning_images" in batch:
        mask: np.ndarray = (batch["conditioning_images"][0, 0].numpy() + 1) / 2  # its red
        return mask
    alpha = batch.get("alpha_masks")
    return None if alpha is None else alpha[0].numpy()


def one_by_one(dataset: Any) -> Any:
    """A copy of a dataset whose batches hold one picture each, and each once."""
    single = copy.copy(dataset)
    if holder(dataset) is not dataset:
        single.dreambooth_dataset_delegate = one_by_one(holder(dataset))
        return single
    single.image_data = {key: copy.copy(info) for key, info in dataset.image_data.items()}
    single.bucket_manager = copy.copy(dataset.bucket_manager)
    single.bucket_manager.buckets = [
        list(dict.fromkeys(bucket)) for bucket in dataset.bucket_manager.buckets
    ]
    batch_of = own("BucketBatchIndex", type(dataset))
    single.buckets_indices = [
        batch_of(bucket_index, 1, batch_index)
        for bucket_index, bucket in enumerate(single.bucket_manager.buckets)
        for batch_index in range(len(bucket))
    ]
    single.batch_size = 1
    copies = {
        id(subset): without_augmentation(subset) for subset in dataset.image_to_subset.values()
    }
    single.image_to_subset = {
        key: copies[id(subset)] for key, subset in dataset.image_to_subset.items()
    }
    # A tokenizer that is written in Rust refuses to be used by two threads at once.
    if getattr(single, "tokenize_strategy", None) is not None:
        single.tokenize_strategy = copy.copy(single.tokenize_strategy)
        single.tokenize_strategy.tokenize = one_at_a_time(single.tokenize_strategy.tokenize)
    else:
        single.get_input_ids = one_at_a_time(single.get_input_ids)
    return single


def one_at_a_time(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with other threads waiting for it."""
    lock = threading.Lock()

    def locked(*args: Any, **kwargs: Any) -> Any:
        with lock:
            return function(*args, **kwargs)

    return locked


# ---- The file itself -----------------------------------------------------------------------------


def read_header(path: Path) -> Header:
    """What a picture's header says."""
    try:
        with Image.open(path) as image:
            has_alpha = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
            # PIL would decode all of a PNG to find that it has no EXIF.
            is_plain = image.format == "PNG" and "exif" not in image.info
            orientation = 1 if is_plain else image.getexif().get(ORIENTATION, 1)
            return Header(image.size, orientation, image.mode, has_alpha)
    except Exception:  # PIL raises all kinds for a broken file; opening it says what is wrong
        return Header()


# What a viewer does not show of a picture.
TOO_BRIGHT, SEE_THROUGH = "its 16 bits are cut to 8", "what its transparent part hides is trained"
CUT_BITS = 16  # levels of 255, in the mean, by which a picture is too bright
MOST_HIDDEN = 0.01  # of the pixels: rounded corners are no mistake


def change_of(path: Path, header: Header, job: Job) -> str:
    """What of a picture is trained otherwise than a viewer shows it: a CHANGE, or nothing."""
    if job.load is None:
        return ""
    if header.mode.startswith("I"):
        with Image.open(path) as image:
            shown = np.asarray(image, np.float32) / 257
        return TOO_BRIGHT if np.mean(job.load(path, False)[:, :, 0] - shown) > CUT_BITS else ""
    if not (header.has_alpha and job.is_alpha_trained):
        return ""
    alpha = job.load(path, True)[:, :, 3] < 128
    if not alpha.any() or alpha.mean() < MOST_HIDDEN:
        return ""
    # White is what a viewer shows there, or nearly so.
    return SEE_THROUGH if job.load(path, False)[alpha].mean() < 240 else ""


def too_narrow(size: tuple[int, int]) -> str:
    """Why a picture has no bucket, which would have no width or no height."""
    return f"it is {in_size(size)}, less than bucket_reso_steps"


def masked_wrongly(opened: Opened, mask: Path, refusal: BaseException) -> Opened:
    """A picture whose mask cannot be used."""
    size = read_header(mask).size
    if isinstance(refusal, AssertionError) and size not in ((0, 0), opened.size):
        error = f"it is {in_size(size)}, and its picture {in_size(opened.size)}"
        return replace(opened, error=error, mask=mask, remedy="save both at one size")
    error = what_is_wrong(mask, size, refusal)
    return replace(opened, error=error, mask=mask, remedy=remedy_for(refusal, True))


def remedy_for(refusal: BaseException, has_buckets: bool) -> str:
    """What to do about a picture that is refused."""
    if isinstance(refusal, Image.DecompressionBombError):
        return SMALLER
    return BUCKETS if isinstance(refusal, AssertionError) and not has_buckets else RE_SAVE


def what_is_wrong(path: Path, size: tuple[int, int], error: BaseException) -> str:
    """Why a picture cannot be opened, in a few words."""
    try:
        with path.open("rb") as file:
            start = file.read(64).lstrip()
    except OSError as unreadable:
        return unreadable.strerror or str(unreadable)
    if not start:
        return "the file is empty"
    if start.startswith(b"<"):
        return "it is a web page, not a picture"
    if isinstance(error, PIL.UnidentifiedImageError):
        return "PIL cannot read it as a picture"
    words = in_english((str(error) or type(error).__name__).split("\n")[0])
    words = words.removesuffix(f": {path}")  # the sentence has it already
    return f"{words}, it is {in_size(size)}" if isinstance(error, AssertionError) else words


def in_size(size: tuple[int, int]) -> str:
    """Width and height in words: 768x1024."""
    return f"{size[0]}x{size[1]}"
