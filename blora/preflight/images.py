"""The pictures as sd-scripts itself reads them: its datasets in plain words, and every picture
opened once by its own code, as the training will open it.

Gets sd-scripts' datasets once they are made, with their buckets and captions (rehearsal.py
makes them). Nothing is written, and they are left as they were. Known to work with sd-scripts
0.9.0, 0.9.1 and 0.10.1.
"""

from __future__ import annotations

import copy
import glob
import inspect
import io
import os
import threading
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

import numpy as np
import PIL
from PIL import Image
from tqdm import tqdm

from blora.preflight.captions import (
    Folder,
    Picture,
    caption_path,
    check_folders,
    config_subsets,
    has_caption,
    letters_kept,
    overridden,
    passed_over,
    unnumbered,
)
from blora.preflight.report import Report, attempt
from blora.preflight.trainer_errors import frames, in_english
from blora.text import NAMED, first_few

ORIENTATION = 0x0112  # the EXIF tag; 1 is upright, 5 to 8 lie on their side
MOST_THREADS = 4  # each holds a whole picture


@dataclass(frozen=True)
class Epoch:
    """What an epoch of the training is made of; of all datasets together."""

    images: int
    captions: int
    repeated: int  # images with their repeats
    batches: int
    largest_batch: int  # pixels


@dataclass(frozen=True)
class Opened:
    """A picture after sd-scripts has opened, resized and cropped it."""

    path: Path
    bucket: tuple[int, int]  # the width and height that it is trained in
    size: tuple[int, int]  # of the file; 0, 0 where it is no picture
    orientation: int = 1  # by EXIF; 1 is upright
    error: str = ""  # why it cannot be trained, in the words of whoever refused it
    is_strange: bool = False  # what is wrong is no picture's fault, but how sd-scripts was called
    thumbnail: Image.Image | None = None  # where a side was asked for


# ---- sd-scripts' datasets in plain words ---------------------------------------------------------


def module_of(dataset: Any) -> ModuleType:
    """The module of sd-scripts that a dataset is from, and that reads its pictures."""
    return inspect.getmodule(type(dataset))


def settled(subset: Any) -> Any:
    """A copy of a subset whose captions and pictures are not drawn anew at each step."""
    subset = copy.copy(subset)
    subset.flip_aug = subset.shuffle_caption = False
    subset.caption_dropout_rate = subset.caption_tag_dropout_rate = 0
    subset.caption_dropout_every_n_epochs = subset.token_warmup_step = 0
    return subset


def token_counter(dataset: Any) -> tuple[Callable[[str], int], int] | None:
    """What counts the tokens of a prompt as the trainer does, and the most that it trains."""
    strategy = getattr(dataset, "tokenize_strategy", None)
    if strategy is not None:  # 0.10
        tokenizer, most = strategy.tokenizer1, strategy.max_length
    elif hasattr(dataset, "tokenizers"):  # 0.9
        tokenizer, most = dataset.tokenizers[0], dataset.tokenizer_max_length
    else:
        return None
    # Without the tokens that begin and end each prompt.
    return lambda text: len(tokenizer(text, verbose=False).input_ids) - 2, most - 2


def read_folders(datasets: Iterable[Any], caches_text: bool) -> list[Folder]:
    """The folders of sd-scripts' datasets with their pictures, in the order of the config."""
    return [
        read_folder(dataset, subset, caches_text)
        for dataset in datasets
        for subset in dataset.subsets
    ]


def with_strategies(dataset: Any) -> Any:
    """A copy of a dataset that knows the tokenizer, which 0.10 tells it later."""
    dataset = copy.copy(dataset)
    if hasattr(dataset, "set_current_strategies"):
        dataset.set_current_strategies()
    return dataset


def read_folder(dataset: Any, subset: Any, caches_text: bool) -> Folder:
    """One subset; captions that are cached are trained as they are read."""
    counter = token_counter(dataset)
    keys = [key for key, owner in dataset.image_to_subset.items() if owner is subset]
    pictures = []
    for info in (dataset.image_data[key] for key in keys):
        prompt = info.caption
        if not caches_text:
            prompt = dataset.process_caption(settled(subset), info.caption)
        count, most = counter or (lambda _: 0, 0)
        pictures.append(
            Picture(
                Path(info.absolute_path),
                tuple(info.image_size),
                tuple(info.bucket_reso),
                info.num_repeats,
                info.caption,
                prompt,
                count(prompt),
                letters_kept(prompt, count, most),
            )
        )
    return Folder(
        Path(subset.image_dir or ""),
        tuple(pictures),
        seen_files(dataset, subset) | {picture.path for picture in pictures},
        subset.num_repeats,
        getattr(subset, "class_tokens", None) or "",
        getattr(subset, "caption_extension", None) or "",
        subset.enable_wildcard,
        bool(subset.caption_prefix or subset.caption_suffix),
        getattr(subset, "is_reg", False),
        getattr(dataset, "prior_loss_weight", 1.0),
        counter[1] if counter else 0,
    )


def seen_files(dataset: Any, subset: Any) -> frozenset[Path]:
    """The files that sd-scripts takes for pictures, also those that it keeps for validation."""
    glob_images = getattr(module_of(dataset), "glob_images", None)
    if not glob_images or not subset.image_dir or getattr(subset, "cache_info", False):
        return frozenset()
    return frozenset(map(Path, glob_images(subset.image_dir, "*")))


def read_epoch(datasets: Iterable[Any], folders: Iterable[Folder]) -> Epoch:
    """Images, captions and batches, counted in sd-scripts' own buckets."""
    datasets = list(datasets)
    buckets = [
        (len(keys), width * height * min(len(keys), dataset.batch_size), dataset)
        for dataset in datasets
        for keys, (width, height) in zip(
            dataset.bucket_manager.buckets, dataset.bucket_manager.resos, strict=True
        )
    ]
    pictures = [(folder, picture) for folder in folders for picture in folder.pictures]
    return Epoch(
        len(pictures),
        sum(has_caption(picture, folder) for folder, picture in pictures),
        sum(count for count, _, _ in buckets),
        sum(len(dataset) for dataset in datasets),
        max((pixels for _, pixels, _ in buckets), default=0),
    )


# ---- Every picture, opened once ------------------------------------------------------------------


def open_pictures(
    datasets: Iterable[Any], cached: bool, stream: TextIO | None, side: int = 0
) -> list[Opened]:
    """Every picture as sd-scripts opens it, in the order of the datasets.

    `cached` as with --cache_latents, where sd-scripts resizes whatever it finds; else as its
    DataLoader does. A progress bar goes to `stream` where it takes more than a second. With a
    `side` each has a thumbnail of at most so many pixels a side.
    """
    jobs = [job for dataset in datasets for job in openers(dataset, cached)]
    with (
        warnings.catch_warnings(),
        ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool,
    ):
        warnings.simplefilter("ignore")  # PIL's on large pictures and odd EXIF
        opened = pool.map(lambda job: open_one(*job, side), jobs)
        bar = tqdm(
            opened,
            "opening pictures",
            len(jobs),
            leave=False,
            file=stream,
            disable=stream is None,
            delay=1,
        )
        found = list(bar)
    if found and all(picture.is_strange for picture in found):
        raise TypeError(found[0].error)
    return found


def openers(dataset: Any, cached: bool) -> Iterator[tuple[Any, Callable[[], np.ndarray]]]:
    """Each picture's ImageInfo with what opens it: height x width x 3, uint8, as it is trained."""
    if cached:
        for key, info in dataset.image_data.items():
            subset = dataset.image_to_subset[key]
            yield info, partial(open_for_cache, module_of(dataset), info, subset)
    else:
        single = one_by_one(dataset)
        for number, index in enumerate(single.buckets_indices):
            key = single.bucket_manager.buckets[index.bucket_index][index.batch_index]
            yield dataset.image_data[key], partial(open_for_step, single, number)


def open_for_cache(module: ModuleType, info: Any, subset: Any) -> np.ndarray:
    """What sd-scripts hands to the VAE when it caches latents, before it becomes a tensor."""
    image = module.load_image(info.absolute_path, subset.alpha_mask)
    # Since 0.10 the way of resizing can be chosen.
    way = getattr(info, "resize_interpolation", None)
    chosen = {"resize_interpolation": way} if way else {}
    return module.trim_and_resize_if_required(
        subset.random_crop, image, info.bucket_reso, info.resized_size, **chosen
    )[0][:, :, :3]


def open_for_step(dataset: Any, number: int) -> np.ndarray:
    """The picture of a batch of one."""
    image = dataset[number]["images"][0]  # 3 x height x width, -1 to 1
    return ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


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
    copies = {id(subset): settled(subset) for subset in dataset.image_to_subset.values()}
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


def open_one(info: Any, opener: Callable[[], np.ndarray], side: int) -> Opened:
    """Open a picture; whatever is wrong with it becomes its error."""
    path = Path(info.absolute_path)
    size, orientation = look_at(path)
    thumbnail, error, is_strange = None, "", False
    try:
        array = opener()
        if side:
            thumbnail = Image.fromarray(np.ascontiguousarray(array))
            thumbnail.thumbnail((side, side))
    except Exception as refusal:  # sd-scripts', PIL's or OpenCV's: each has its own
        error = what_is_wrong(path, size, refusal)
        is_strange = isinstance(refusal, (TypeError, AttributeError))
    return Opened(path, tuple(info.bucket_reso), size, orientation, error, is_strange, thumbnail)


def look_at(path: Path) -> tuple[tuple[int, int], int]:
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


# ---- What was found ------------------------------------------------------------------------------

ANEW = "save it anew, or take it out"
BUCKETS = "add --enable_bucket, or save it at the size of the resolution"


def refusals(opened: Iterable[Opened]) -> list[str]:
    """A sentence for each picture that cannot be trained; many are summed up."""
    broken = list({picture.path: picture for picture in opened if picture.error}.values())
    if len(broken) > NAMED:
        names = first_few(f'"{picture.path}" ({picture.error})' for picture in broken)
        return [f"cannot open {len(broken)} pictures, {names}: save them anew, or take them out"]
    return [
        f'cannot open the picture "{picture.path}" ({picture.error}): '
        + (BUCKETS if picture.error.startswith("image") and "it is" in picture.error else ANEW)
        for picture in broken
    ]


def stumbled_over(error: BaseException) -> list[str]:
    """A sentence for each picture over which sd-scripts stumbled in making its buckets.

    0.10 divides by the height of 0 that it gives a file that is no picture, and some broken JPEGs
    stop its reader of sizes; neither names the file. Empty where the error is another one.
    """
    owners = [frame.f_locals.get("self") for frame in frames(error)]
    datasets = [owner for owner in owners if hasattr(owner, "image_data")]
    paths = [Path(i.absolute_path) for dataset in datasets for i in dataset.image_data.values()]
    nothing = (0, 0)
    return refusals(
        Opened(
            path,
            nothing,
            nothing,
            error=what_is_wrong(path, nothing, PIL.UnidentifiedImageError()),
        )
        for path in dict.fromkeys(paths)
        if look_at(path)[0] == nothing
    )


def turns_photos(dataset: Any) -> bool:
    """Whether this sd-scripts turns a photo upright: asked with one of 2 x 1 pixels, in memory."""
    photo, exif = io.BytesIO(), Image.Exif()
    exif[ORIENTATION] = 6
    Image.new("RGB", (2, 1)).save(photo, "JPEG", exif=exif)
    photo.seek(0)
    return module_of(dataset).load_image(photo).shape[:2] == (2, 1)


def check_upright(opened: Iterable[Opened], report: Report) -> None:
    """Photos that cameras store turned, and that are trained as they are stored."""
    turned = dict.fromkeys(p.path for p in opened if p.orientation in range(2, 9) and not p.error)
    if turned:
        report.warnings.append(
            "photos are trained lying on their side, as the camera stored them, since sd-scripts "
            f"does not turn them by EXIF, {len(turned)} in all: "
            f"{first_few(path.name for path in turned)}: rotate them in an image editor and save"
        )


def check_sizes(
    folders: Iterable[Folder], opened: Iterable[Opened], leftover: set[Path], report: Report
) -> None:
    """Pictures that sd-scripts takes for others, by the name of a .npz or by its own list."""
    sizes = {picture.path: picture.size for picture in opened if not picture.error}
    squeezed = {
        picture.path: f"{picture.path.name} ({in_size(picture.size)}, is {in_size(size)})"
        for folder in folders
        for picture in folder.pictures
        if picture.path not in leftover
        and has_an_earlier_size(picture.path)
        and picture.size != (size := sizes.get(picture.path, picture.size))
    }
    if squeezed:
        report.warnings.append(
            "pictures are trained squeezed, since sd-scripts takes their size from an earlier "
            f"file, {len(squeezed)} in all: {first_few(squeezed.values())}: delete the .npz files "
            "(or metadata_cache.json) beside them"
        )


def has_an_earlier_size(picture: Path) -> bool:
    """Whether sd-scripts takes a picture's size from a file beside it."""
    of_its_name = picture.parent.glob(f"{glob.escape(picture.stem)}_*.npz")
    return (picture.parent / "metadata_cache.json").is_file() or any(of_its_name)


def in_size(size: tuple[int, int]) -> str:
    """Width and height in words: 768x1024."""
    return f"{size[0]}x{size[1]}"


# ---- Leftover caches -----------------------------------------------------------------------------


def cached_latents(dataset: Any) -> dict[Path, Path]:
    """The .npz on disk that --cache_latents_to_disk takes in place of a picture, by picture."""
    found = {}
    strategy = getattr(dataset, "latents_caching_strategy", None)
    for key, info in dataset.image_data.items():
        subset, path = dataset.image_to_subset[key], info.absolute_path
        if strategy is not None:  # 0.10
            npz = strategy.get_latents_npz_path(path, info.image_size)
            expected = strategy.is_disk_cached_latents_expected
        else:
            npz = os.path.splitext(path)[0] + ".npz"  # noqa: PTH122
            expected = module_of(dataset).is_disk_cached_latents_is_expected
        if expected(info.bucket_reso, npz, subset.flip_aug, subset.alpha_mask):
            found[Path(path)] = Path(npz)
    return found


def why_stale(picture: Path, npz: Path, size: tuple[int, int], bucket: tuple[int, int]) -> str:
    """Why the latents in a file are not those of a picture, as far as can be told; else empty."""
    with np.load(npz) as latents:
        if tuple(latents["original_size"]) != size:
            return f"of a picture of {in_size(latents['original_size'])}, not {in_size(size)}"
        height, width = latents["latents"].shape[-2:]
    if (8 * width, 8 * height) != bucket:
        return f"of {8 * width}x{8 * height}, not {in_size(bucket)}"
    newer = picture.stat().st_mtime > npz.stat().st_mtime
    return "older than the picture" if newer else ""


def check_cached_latents(
    dataset: Any, opened: Iterable[Opened], report: Report
) -> dict[Path, Path]:
    """The caches that are taken, by picture, with a warning for those of another picture."""
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
            "leftover latents are trained in place of pictures, "
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
            "leftover text encoder outputs, older than the captions, are trained in their place, "
            f"{len(stale)} in all: {first_few(stale.values())}: delete these files"
        )


# ---- All of it -----------------------------------------------------------------------------------


@dataclass
class Seen:
    """What the trainer's datasets hold; what this sd-scripts does not offer stays empty."""

    folders: list[Folder] = field(default_factory=list)
    epoch: Epoch | None = None
    opened: list[Opened] = field(default_factory=list)


def check_dataset(
    args: Namespace,
    given: Iterable[str],
    datasets: Iterable[Any],
    report: Report,
    stream: TextIO | None = None,
    side_for: Callable[[int], int] = lambda count: 0,
    kept_back: Iterable[Any] = (),
) -> Seen:
    """Everything that can be said of the pictures and captions, into the report.

    `args` and `datasets` are sd-scripts' own, once it has made its datasets; `given` names the
    options that stand on the command line; a progress bar goes to `stream`; `side_for` says how
    large thumbnails of so many pictures are to be; `kept_back` are datasets for validation, whose
    pictures are opened too.
    """
    datasets, seen = list(map(with_strategies, datasets)), Seen()
    every = [*datasets, *map(with_strategies, kept_back)]

    def ask(what: str, step: Callable[..., Any], *more: Any) -> Any:
        failed = f"this release of sd-scripts does not let us check {what}"
        return attempt(report, failed, step, *more)

    cached = args.cache_latents or args.cache_latents_to_disk
    caches_text = args.cache_text_encoder_outputs or args.cache_text_encoder_outputs_to_disk
    seen.folders = ask("the folders", read_folders, datasets, caches_text) or []
    seen.epoch = ask("the batches", read_epoch, datasets, seen.folders)
    ask("the captions", check_folders, seen.folders, report)
    ask("the dataset config", check_config, args, given, seen.folders, report)
    side = side_for(sum(len(folder.pictures) for folder in seen.folders))
    seen.opened = ask("the pictures", open_pictures, every, cached, stream, side) or []
    ask("the opened pictures", check_opened, args, every, seen, report)
    return seen


def check_opened(args: Namespace, datasets: list[Any], seen: Seen, report: Report) -> None:
    """What was found when the pictures were opened, and what is taken in their place."""
    cached: set[Path] = set()
    if args.cache_latents_to_disk:
        for dataset in datasets:
            cached |= check_cached_latents(dataset, seen.opened, report).keys()
    if args.cache_text_encoder_outputs_to_disk:
        check_cached_captions(seen.folders, report)
    report.errors += refusals(picture for picture in seen.opened if picture.path not in cached)
    check_sizes(seen.folders, seen.opened, cached, report)
    if datasets and not turns_photos(datasets[0]):
        check_upright(seen.opened, report)


def check_config(
    args: Namespace, given: Iterable[str], folders: list[Folder], report: Report
) -> None:
    """What the dataset config names and is not trained, and the options that it overrides."""
    from library import config_util  # sd-scripts' own

    trained = {folder.path for folder in folders}
    if args.dataset_config:
        config = config_util.load_user_config(args.dataset_config)
        options = {name: getattr(args, name) for name in given if hasattr(args, name)}
        report.warnings += passed_over(config_subsets(config), trained)
        report.warnings += overridden(options, config, args.dataset_config)
        for option in ("train_data_dir", "reg_data_dir", "in_json"):
            if getattr(args, option, None):
                report.warnings.append(
                    f"--{option} does nothing beside --dataset_config: leave one of the two out"
                )
    elif args.train_data_dir:
        report.warnings += unnumbered(Path(args.train_data_dir))
