"""Every picture, opened once by sd-scripts' own code as the training will, and its caches.

Nothing is written.
"""

from __future__ import annotations

import copy
import glob
import io
import os
import threading
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import PIL
from PIL import Image
from tqdm import tqdm

from blora.preflight.captions import check_captions
from blora.preflight.dataset import (
    Epoch,
    Folder,
    caption_path,
    read_epoch,
    read_folders,
    with_strategies,
    without_augmentation,
)
from blora.preflight.folders import check_folders, check_skipped
from blora.preflight.rehearsal import Rehearsal
from blora.preflight.report import Report, attempt
from blora.preflight.trainer import own
from blora.preflight.trainer_errors import frames, in_english
from blora.sheet import make_thumbnail
from blora.text import MAX_LISTED, first_few

ORIENTATION = 0x0112  # the EXIF tag; 1 is upright, 5 to 8 are sideways
MOST_THREADS = 4  # each holds a whole picture


@dataclass(frozen=True)
class Opened:
    """A picture after sd-scripts has opened, resized and cropped it."""

    path: Path
    bucket: tuple[int, int]  # the width and height that it is trained in
    size: tuple[int, int]  # of the file; 0, 0 where it is no picture
    orientation: int = 1  # by EXIF; 1 is upright
    error: str = ""  # why it cannot be trained, in the words of whoever refused it
    needs_bucket: bool = False  # its size is wrong, and there are no buckets
    is_api_mismatch: bool = False  # not the picture's fault, but how sd-scripts was called
    thumbnail: bytes | None = None  # WebP, where one was asked for


# ---- Every picture, opened once ------------------------------------------------------------------


def open_pictures(
    datasets: Iterable[Any], cached: bool, file: TextIO | None, limit: int = 0
) -> list[Opened]:
    """Every picture as sd-scripts opens it, in the order of the datasets.

    `cached` as with --cache_latents, where sd-scripts resizes whatever it finds; else as its
    DataLoader does. A progress bar goes to `file` where it takes more than a second. With a
    `limit` each has a thumbnail of at most so many bytes.
    """
    jobs = [partial(open_one, *job, limit) for data in datasets for job in openers(data, cached)]
    with (
        warnings.catch_warnings(),
        ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool,
    ):
        warnings.simplefilter("ignore")  # PIL's on large pictures and odd EXIF
        opened: Iterator[Opened] = pool.map(lambda job: job(), jobs)
        bar = tqdm(
            opened, "opening pictures", len(jobs), leave=False, file=file, disable=not file, delay=1
        )
        pictures = list(bar)
    if pictures and all(picture.is_api_mismatch for picture in pictures):
        raise TypeError(pictures[0].error)
    return pictures


def openers(dataset: Any, cached: bool) -> Iterator[tuple[Any, bool, Callable[[], np.ndarray]]]:
    """Each picture's ImageInfo, whether it has buckets, and what opens it.

    That returns height x width x 3 in uint8, as it is trained.
    """
    if cached:
        for key, info in dataset.image_data.items():
            subset = dataset.image_to_subset[key]
            yield info, True, partial(open_for_cache, type(dataset), info, subset)
    else:
        single = one_by_one(dataset)
        for number, index in enumerate(single.buckets_indices):
            key = single.bucket_manager.buckets[index.bucket_index][index.batch_index]
            info, has_buckets = dataset.image_data[key], dataset.enable_bucket
            yield info, has_buckets, partial(open_for_step, single, number)


def open_for_cache(dataset: type, info: Any, subset: Any) -> np.ndarray:
    """What sd-scripts hands to the VAE when it caches latents, before it becomes a tensor."""
    image = own("load_image", dataset)(info.absolute_path, subset.alpha_mask)
    # Since 0.10 the way of resizing can be chosen.
    way = getattr(info, "resize_interpolation", None)
    chosen = {"resize_interpolation": way} if way else {}
    array: np.ndarray = own("trim_and_resize_if_required", dataset)(
        subset.random_crop, image, info.bucket_reso, info.resized_size, **chosen
    )[0]
    return array[:, :, :3]


def open_for_step(dataset: Any, number: int) -> np.ndarray:
    """The picture of a batch of one."""
    image = dataset[number]["images"][0]  # 3 x height x width, -1 to 1
    array: np.ndarray = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    return array


def one_by_one(dataset: Any) -> Any:
    """A copy of a dataset whose batches hold one picture each, and each once."""
    single = copy.copy(dataset)
    single.bucket_manager = copy.copy(dataset.bucket_manager)
    single.bucket_manager.buckets = [
        list(dict.fromkeys(bucket)) for bucket in dataset.bucket_manager.buckets
    ]
    batch_of = type(dataset.buckets_indices[0])
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


def open_one(info: Any, has_buckets: bool, opener: Callable[[], np.ndarray], limit: int) -> Opened:
    """Open a picture; whatever is wrong with it becomes its error."""
    path = Path(info.absolute_path)
    size, orientation = read_size(path)
    opened = Opened(path, tuple(info.bucket_reso), size, orientation)
    try:
        array = opener()
    except Exception as refusal:  # sd-scripts', PIL's or OpenCV's: each has its own
        return replace(
            opened,
            error=what_is_wrong(path, size, refusal),
            needs_bucket=isinstance(refusal, AssertionError) and not has_buckets,
            is_api_mismatch=isinstance(refusal, TypeError | AttributeError),
        )
    if not limit:
        return opened
    image = Image.fromarray(np.ascontiguousarray(array))
    return replace(opened, thumbnail=make_thumbnail(image, limit))


def read_size(path: Path) -> tuple[tuple[int, int], int]:
    """A picture's size and EXIF orientation, by its header; (0, 0) where it is no picture."""
    try:
        with Image.open(path) as image:
            # PIL would decode all of a PNG to find that it has no EXIF.
            if image.format == "PNG" and "exif" not in image.info:
                return image.size, 1
            return image.size, image.getexif().get(ORIENTATION, 1)
    except Exception:  # PIL raises all kinds for a broken file; opening it says what is wrong
        return (0, 0), 1


def what_is_wrong(path: Path, size: tuple[int, int], error: Exception) -> str:
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
    return f"{words}, it is {size[0]}x{size[1]}" if isinstance(error, AssertionError) else words


# ---- What is wrong with them ---------------------------------------------------------------------

RE_SAVE = "re-save or remove it"
BUCKETS = "add --enable_bucket, or save it at the size of the resolution"


def broken_pictures(opened: Iterable[Opened]) -> list[str]:
    """A sentence for each picture that cannot be trained; many are summed up."""
    broken = list({picture.path: picture for picture in opened if picture.error}.values())
    if len(broken) > MAX_LISTED:
        names = first_few(f'"{picture.path}" ({picture.error})' for picture in broken)
        return [f"cannot open {len(broken)} pictures, {names}: re-save or remove them"]
    return [
        f'cannot open the picture "{picture.path}" ({picture.error}): '
        + (BUCKETS if picture.needs_bucket else RE_SAVE)
        for picture in broken
    ]


def stumbled_over(error: BaseException) -> list[str]:
    """A sentence for each picture at which sd-scripts failed while making its buckets.

    0.10 divides by the height of 0 that it gives a file that is no picture, and some broken JPEGs
    stop its reader of sizes; neither names the file. Empty where the error is another one.
    """
    held = [getattr(frame.f_locals.get("self"), "image_data", {}) for frame in frames(error)]
    paths = [Path(info.absolute_path) for pictures in held for info in pictures.values()]
    nothing = (0, 0)
    return broken_pictures(
        Opened(
            path, nothing, nothing, error=what_is_wrong(path, nothing, PIL.UnidentifiedImageError())
        )
        for path in dict.fromkeys(paths)
        if read_size(path)[0] == nothing
    )


def turns_photos(dataset: Any) -> bool:
    """Whether this sd-scripts turns a photo upright: asked with one of 2 x 1 pixels, in memory."""
    photo, exif = io.BytesIO(), Image.Exif()
    exif[ORIENTATION] = 6
    Image.new("RGB", (2, 1)).save(photo, "JPEG", exif=exif)
    photo.seek(0)
    return bool(own("load_image", type(dataset))(photo).shape[:2] == (2, 1))


def check_upright(opened: Iterable[Opened], report: Report) -> None:
    """Photos that cameras store sideways, and that are trained as they are stored."""
    turned = dict.fromkeys(p.path for p in opened if p.orientation in range(2, 9) and not p.error)
    if turned:
        report.warnings.append(
            "photos are trained sideways, as the camera stored them, since sd-scripts does not "
            f"turn them by EXIF, {len(turned)} in all: "
            f"{first_few(path.name for path in turned)}: rotate them in an image editor and save"
        )


def check_sizes(
    folders: Iterable[Folder], opened: Iterable[Opened], leftover: set[Path], report: Report
) -> None:
    """Pictures whose size sd-scripts takes from the name of a .npz or from its own list."""
    sizes = {picture.path: picture.size for picture in opened if not picture.error}
    distorted = {
        picture.path: f"{picture.path.name} ({in_size(picture.size)}, is {in_size(size)})"
        for folder in folders
        for picture in folder.pictures
        if picture.path not in leftover
        and has_recorded_size(picture.path)
        and picture.size != (size := sizes.get(picture.path, picture.size))
    }
    if distorted:
        report.warnings.append(
            "pictures are trained distorted, since sd-scripts takes their size from an earlier "
            f"file, {len(distorted)} in all: {first_few(distorted.values())}: delete the .npz "
            "files (or metadata_cache.json) beside them"
        )


def has_recorded_size(picture: Path) -> bool:
    """Whether sd-scripts takes a picture's size from a file beside it."""
    of_its_name = picture.parent.glob(f"{glob.escape(picture.stem)}_*.npz")
    return (picture.parent / "metadata_cache.json").is_file() or any(of_its_name)


def in_size(size: tuple[int, int]) -> str:
    """Width and height in words: 768x1024."""
    return f"{size[0]}x{size[1]}"


# ---- Caches of earlier trainings -----------------------------------------------------------------


def cached_latents(dataset: Any) -> dict[Path, Path]:
    """The .npz on disk that --cache_latents_to_disk uses in place of a picture, by picture."""
    caches = {}
    strategy = getattr(dataset, "latents_caching_strategy", None)
    for key, info in dataset.image_data.items():
        subset, path = dataset.image_to_subset[key], info.absolute_path
        if strategy is not None:  # 0.10
            npz = strategy.get_latents_npz_path(path, info.image_size)
            expected = strategy.is_disk_cached_latents_expected
        else:
            npz = os.path.splitext(path)[0] + ".npz"  # noqa: PTH122
            expected = own("is_disk_cached_latents_is_expected", type(dataset))
        if expected(info.bucket_reso, npz, subset.flip_aug, subset.alpha_mask):
            caches[Path(path)] = Path(npz)
    return caches


def why_stale(picture: Path, npz: Path, size: tuple[int, int], bucket: tuple[int, int]) -> str:
    """Why the latents in a file are not those of a picture; empty where nothing shows it."""
    with np.load(npz) as latents:
        if tuple(latents["original_size"]) != size:
            return f"of a picture of {in_size(latents['original_size'])}, not {in_size(size)}"
        height, width = latents["latents"].shape[-2:]
    if (8 * width, 8 * height) != bucket:
        return f"of {8 * width}x{8 * height}, not {in_size(bucket)}"
    return "older than the picture" if picture.stat().st_mtime > npz.stat().st_mtime else ""


def check_cached_latents(
    dataset: Any, opened: Iterable[Opened], report: Report
) -> dict[Path, Path]:
    """The caches that are used, by picture, with a warning for those of another picture."""
    cached = cached_latents(dataset)
    sizes = {picture.path: picture.size for picture in opened}
    buckets = {
        Path(info.absolute_path): tuple(info.bucket_reso) for info in dataset.image_data.values()
    }
    stale = [
        f"{npz.name} ({why})"
        for path, npz in cached.items()
        if (why := why_stale(path, npz, sizes[path], buckets[path]))
    ]
    if stale:
        report.warnings.append(
            "stale cached latents will be used in place of pictures, "
            f"{len(stale)} in all: {first_few(stale)}: delete these files"
        )
    return cached


def check_cached_captions(folders: Iterable[Folder], report: Report) -> None:
    """Cached captions that are older than the captions."""
    stale = {}
    for folder in folders:
        for picture in folder.pictures:
            npz = picture.path.with_name(f"{picture.path.stem}_te_outputs.npz")
            caption = caption_path(picture.path, folder.caption_extension)
            both = folder.caption_extension and npz.is_file() and caption.is_file()
            if both and caption.stat().st_mtime > npz.stat().st_mtime:
                stale[npz] = npz.name
    if stale:
        report.warnings.append(
            "stale text encoder outputs, older than the captions, will be used in their place, "
            f"{len(stale)} in all: {first_few(stale.values())}: delete these files"
        )


# ---- The whole dataset ---------------------------------------------------------------------------


@dataclass
class Dataset:
    """What the trainer's datasets hold; what this sd-scripts does not offer stays empty."""

    folders: list[Folder] = field(default_factory=list)
    epoch: Epoch | None = None
    opened: list[Opened] = field(default_factory=list)


def check_dataset(
    rehearsal: Rehearsal,
    terminal: TextIO | None,
    limit_for: Callable[[int], int] | None,
    report: Report,
) -> Dataset:
    """Check all of it, once the trainer has built its datasets.

    A progress bar goes to `terminal`; `limit_for` gives the bytes of a thumbnail, by their
    number. Pictures for validation are opened too.
    """
    args, result, ask = rehearsal.args, Dataset(), partial(attempt, report)
    datasets = list(map(with_strategies, rehearsal.datasets))
    every = [*datasets, *map(with_strategies, rehearsal.validation)]
    cached = args.cache_latents or args.cache_latents_to_disk
    caches_text = args.cache_text_encoder_outputs or args.cache_text_encoder_outputs_to_disk
    result.folders = ask("read the folders", read_folders, datasets, caches_text) or []
    result.epoch = ask("count the batches", read_epoch, datasets, result.folders)
    ask("check the captions", check_captions, result.folders, report)
    ask("check the folders", check_folders, result.folders, report)
    trained = {folder.path for folder in result.folders}
    ask("check the dataset config", check_skipped, args, trained, report)
    limit = limit_for(sum(len(folder.pictures) for folder in result.folders)) if limit_for else 0
    result.opened = ask("open the pictures", open_pictures, every, cached, terminal, limit) or []
    ask("check the opened pictures", check_opened, args, every, result, report)
    return result


def check_opened(args: Namespace, datasets: list[Any], result: Dataset, report: Report) -> None:
    """Pictures that are broken, distorted or sideways, and caches that are used in their place."""
    cached: set[Path] = set()
    if args.cache_latents_to_disk:
        for dataset in datasets:
            cached |= check_cached_latents(dataset, result.opened, report).keys()
    if args.cache_text_encoder_outputs_to_disk:
        check_cached_captions(result.folders, report)
    report.errors += broken_pictures(p for p in result.opened if p.path not in cached)
    check_sizes(result.folders, result.opened, cached, report)
    if datasets and not turns_photos(datasets[0]):
        check_upright(result.opened, report)
