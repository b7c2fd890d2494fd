"""What is wrong with the pictures, their masks and their caches, and all checks of the dataset.

Nothing is written.
"""

from __future__ import annotations

import glob
import os
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import PIL
from PIL import Image

from blora.preflight.captions import check_captions
from blora.preflight.dataset import (
    Epoch,
    Folder,
    caption_path,
    holder,
    read_epoch,
    read_folders,
    with_strategies,
)
from blora.preflight.folders import check_folders, check_skipped
from blora.preflight.opening import (
    ORIENTATION,
    SEE_THROUGH,
    TOO_BRIGHT,
    UPSCALE,
    Opened,
    in_size,
    open_pictures,
    read_header,
    remedy_for,
    too_narrow,
    what_is_wrong,
)
from blora.preflight.rehearsal import Rehearsal
from blora.preflight.report import Report, attempt
from blora.preflight.trainer import own
from blora.preflight.trainer_errors import frames
from blora.text import MAX_LISTED, first_few

# ---- What is wrong with them ---------------------------------------------------------------------


def broken_sentence(picture: Opened) -> str:
    """What to do about a picture that cannot be trained."""
    if picture.mask:
        return f'cannot use the mask "{picture.mask}" ({picture.error}): {picture.remedy}'
    if picture.remedy == UPSCALE:
        return f'cannot train the picture "{picture.path}" ({picture.error}): {picture.remedy}'
    return f'cannot open the picture "{picture.path}" ({picture.error}): {picture.remedy}'


def broken_pictures(opened: Iterable[Opened]) -> list[str]:
    """A sentence for each picture that cannot be trained; many of a kind are summed up."""
    kinds: dict[tuple[bool, str], dict[Path, Opened]] = {}
    for picture in (picture for picture in opened if picture.error):
        file, kind = picture.mask or picture.path, (bool(picture.mask), picture.remedy)
        kinds.setdefault(kind, {})[file] = picture
    sentences = []
    for (is_mask, remedy), pictures in kinds.items():
        if len(pictures) > MAX_LISTED:
            names = first_few(f'"{file}" ({picture.error})' for file, picture in pictures.items())
            many = f"{len(pictures)} {'masks' if is_mask else 'pictures'}, {names}"
            sentences.append(f"cannot open {many}: {remedy.replace(' it', ' them')}")
        else:
            sentences += map(broken_sentence, pictures.values())
    return sentences


def stumbled_over(error: BaseException) -> list[str]:
    """A sentence for each picture at which sd-scripts failed while making its buckets.

    0.10 divides by the height of 0 that it gives a file that is no picture, or a bucket to a
    picture that is narrower than its step, and some broken JPEGs stop its reader of sizes; none of
    these names the file. Empty where the error is another one.
    """
    held = [frame.f_locals.get("self") for frame in frames(error)]
    datasets = {id(each): each for each in held if hasattr(each, "image_data")}
    return broken_pictures(
        picture for dataset in datasets.values() for picture in without_bucket(holder(dataset))
    )


def why_unreadable(path: Path) -> Exception:
    """What PIL raises for a picture whose header says nothing."""
    try:
        with Image.open(path):
            return PIL.UnidentifiedImageError()
    except Exception as refusal:  # PIL raises all kinds
        return refusal


def without_bucket(dataset: Any) -> Iterator[Opened]:
    """The pictures of a dataset for which it can make no bucket."""
    nothing = (0, 0)
    manager: Any = getattr(dataset, "bucket_manager", None)
    for info in dataset.image_data.values():
        path = Path(info.absolute_path)
        if (size := read_header(path).size) == nothing:
            refusal = why_unreadable(path)
            error = what_is_wrong(path, nothing, refusal)
            yield Opened(path, nothing, nothing, error=error, remedy=remedy_for(refusal, True))
        elif manager is not None and manager.no_upscale and info.image_size:
            try:
                bucket = manager.select_bucket(*info.image_size)[0]
            except ZeroDivisionError:
                bucket = nothing
            if 0 in bucket:
                yield Opened(path, nothing, size, error=too_narrow(size), remedy=UPSCALE)


def check_changes(opened: Iterable[Opened], report: Report) -> None:
    """Pictures of which something else is trained than a viewer shows."""
    for change, sentence in CHANGES.items():
        names = dict.fromkeys(picture.path.name for picture in opened if picture.change == change)
        if names:
            report.warnings.append(sentence.format(count=len(names), names=first_few(names)))


CHANGES = {
    TOO_BRIGHT: "grey pictures of 16 bits are trained far too bright, almost white, since "
    "sd-scripts cuts off what 8 bits cannot hold, {count} in all: {names}: save them with 8 bits",
    SEE_THROUGH: "transparent parts of pictures are trained in the colour that is hidden in them, "
    "mostly black, since sd-scripts drops the transparency, {count} in all: {names}: put them on a "
    "background, or set alpha_mask = true to leave these parts out",
}


def check_masks(folder: Folder, opened: dict[Path, Opened], report: Report) -> None:
    """Masks of a folder that mask nothing, or all of a picture."""
    pictures = [opened[picture.path] for picture in folder.pictures if picture.path in opened]
    weights = {p.path.name: p.weights for p in pictures if p.weights}
    black = [name for name, (_, greatest) in weights.items() if greatest < DARKEST]
    if black:
        report.warnings.append(
            f'pictures of "{folder.name}" teach nothing, since their masks are black, '
            f"{len(black)} in all: {first_few(black)}: make white what is to be learned"
        )
    if folder.is_masked and weights and all(least > LIGHTEST for least, _ in weights.values()):
        report.warnings.append(
            f'the masks of "{folder.name}" are all white, so nothing is masked: make black what is '
            "not to be learned"
        )
    if folder.has_alpha_mask and pictures and not any(p.has_alpha for p in pictures):
        report.warnings.append(
            f'alpha_mask masks nothing in "{folder.name}", since no picture there has transparent '
            "parts: remove it, or save them as .png with transparency"
        )


def check_masked_loss(args: Namespace, folders: Iterable[Folder], report: Report) -> None:
    """A loss that is to be masked, without any mask."""
    has_masks = any(folder.is_masked or folder.has_alpha_mask for folder in folders)
    if getattr(args, "masked_loss", False) and not has_masks:
        report.warnings.append(
            "--masked_loss masks nothing, since the dataset has no masks: give their folder as "
            "conditioning_data_dir in the dataset config, or set alpha_mask = true there"
        )


DARKEST, LIGHTEST = 1 / 255, 254 / 255  # weights of the loss


def turns_photos(dataset: Any) -> bool:
    """Whether this sd-scripts turns a photo upright: asked with one of 2 x 1 pixels, in memory."""
    photo, exif = BytesIO(), Image.Exif()
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
    """Pictures whose size sd-scripts takes from the name of a .npz or from a list."""
    sizes = {picture.path: picture.size for picture in opened if not picture.error}
    distorted: dict[str, dict[Path, str]] = {}
    for folder in folders:
        remedy = "delete the .npz files (or metadata_cache.json) beside them"
        if folder.metadata:
            remedy = f'correct the sizes in "{folder.metadata}", or remove them'
        for picture in folder.pictures:
            size = sizes.get(picture.path, picture.size)
            is_squeezed = squeeze(picture.size, size) > LEAST_SQUEEZE if folder.metadata else (
                size != picture.size and has_recorded_size(picture.path)
            )  # fmt: skip
            if picture.path not in leftover and is_squeezed:
                name = f"{picture.path.name} ({in_size(picture.size)}, is {in_size(size)})"
                distorted.setdefault(remedy, {})[picture.path] = name
    for remedy, names in distorted.items():
        report.warnings.append(
            "pictures are trained distorted, since sd-scripts takes their size from an earlier "
            f"file, {len(names)} in all: {first_few(names.values())}: {remedy}"
        )


LEAST_SQUEEZE = 0.05  # the size of a bucket, which such a file may give, is nearly the picture's


def squeeze(size: tuple[int, int], other: tuple[int, int]) -> float:
    """By what share the widths of two sizes differ at the same height."""
    return abs(size[0] * other[1] / (size[1] * other[0]) - 1)


def has_recorded_size(picture: Path) -> bool:
    """Whether sd-scripts takes a picture's size from a file beside it."""
    of_its_name = picture.parent.glob(f"{glob.escape(picture.stem)}_*.npz")
    return (picture.parent / "metadata_cache.json").is_file() or any(of_its_name)


# ---- Latents on disk -----------------------------------------------------------------------------


def strategy_of(dataset: Any) -> Any:
    """What writes and reads latents on disk; sd-scripts 0.9 has None."""
    return getattr(dataset, "latents_caching_strategy", None)


def latents_file(dataset: Any, info: Any) -> str:
    """The .npz of a picture's latents."""
    if strategy := strategy_of(dataset):
        return str(strategy.get_latents_npz_path(info.absolute_path, info.image_size))
    return f"{os.path.splitext(info.absolute_path)[0]}.npz"  # noqa: PTH122


def load_latents(dataset: Any, npz: Path, bucket: tuple[int, int]) -> tuple[Any, ...]:
    """Latents, 4 x height x width, and the size of their picture, as sd-scripts reads them."""
    if strategy := strategy_of(dataset):
        return tuple(strategy.load_latents_from_disk(str(npz), bucket)[:2])
    return tuple(own("load_latents_from_disk", type(dataset))(str(npz))[:2])


def cached_latents(dataset: Any, report: Report) -> dict[Path, Path]:
    """The .npz on disk that --cache_latents_to_disk uses in place of a picture, by picture."""
    caches = {}
    if strategy := strategy_of(dataset):
        expected = strategy.is_disk_cached_latents_expected
    else:
        expected = own("is_disk_cached_latents_is_expected", type(dataset))
    for key, info in dataset.image_data.items():
        subset, npz = dataset.image_to_subset[key], latents_file(dataset, info)
        try:
            is_used = expected(info.bucket_reso, npz, subset.flip_aug, subset.alpha_mask)
        except Exception:  # NumPy's, of many kinds
            report.errors.append(f'the cached latents "{npz}" cannot be read: delete this file')
            continue
        if is_used:
            caches[Path(info.absolute_path)] = Path(npz)
    return caches


def why_stale(
    picture: Path, npz: Path, size: tuple[int, int], bucket: tuple[int, int], dataset: Any
) -> str:
    """Why the latents in a file are not those of a picture; empty where nothing shows it."""
    latents, original = load_latents(dataset, npz, bucket)
    if tuple(original) != size:
        return f"of a picture of {in_size((original[0], original[1]))}, not {in_size(size)}"
    height, width = latents.shape[-2:]
    if (8 * width, 8 * height) != bucket:
        return f"of {8 * width}x{8 * height}, not {in_size(bucket)}"
    return "older than the picture" if picture.stat().st_mtime > npz.stat().st_mtime else ""


def check_cached_latents(
    dataset: Any, opened: Iterable[Opened], report: Report
) -> dict[Path, Path]:
    """The caches that are used, by picture, with a warning for those of another picture."""
    cached = cached_latents(dataset, report)
    sizes = {picture.path: picture.size for picture in opened}
    buckets = {
        Path(info.absolute_path): tuple(info.bucket_reso) for info in dataset.image_data.values()
    }
    stale = [
        f"{npz.name} ({why})"
        for path, npz in cached.items()
        if path in sizes and (why := why_stale(path, npz, sizes[path], buckets[path], dataset))
    ]
    if stale:
        report.warnings.append(
            "stale cached latents will be used in place of pictures, "
            f"{len(stale)} in all: {first_few(stale)}: delete these files"
        )
    return cached


def check_shared_latents(datasets: Iterable[Any], report: Report) -> None:
    """Pictures that would be trained by the latents of another size or of another picture."""
    users: dict[str, dict[tuple[str, tuple[int, int]], Any]] = {}
    for dataset in datasets:
        for info in dataset.image_data.values():
            file = os.path.realpath(latents_file(dataset, info))
            user = os.path.realpath(info.absolute_path), tuple(info.bucket_reso)
            users.setdefault(file, {})[user] = dataset
    shared = {Path(file).name: list(uses) for file, uses in users.items() if len(uses) > 1}
    pictures, sizes = [], []
    for file, uses in shared.items():
        names = list(dict.fromkeys(Path(path).name for path, _ in uses))
        if len(names) > 1:
            pictures.append(f"{' and '.join(names)} ({file})")
        else:
            sizes.append(f"{names[0]} ({' and '.join(in_size(bucket) for _, bucket in uses)})")
    if sizes and not keeps_sizes(next(iter(datasets))):
        report.warnings.append(
            "pictures are trained at one of their sizes alone, since this sd-scripts keeps the "
            f"latents of all sizes in one file, {len(sizes)} in all: {first_few(sizes)}: remove "
            "--cache_latents_to_disk"
        )
    if pictures:
        report.warnings.append(
            "pictures are trained as another picture of the same name, since both have one file "
            f"of latents: {first_few(pictures)}: rename one of them"
        )


def keeps_sizes(dataset: Any) -> bool:
    """Whether a file holds a picture's latents of two sizes: asked with a blank picture."""
    import torch

    if (strategy := strategy_of(dataset)) is None:
        return False  # 0.9 has one array in a file

    def encode(images: Any) -> Any:
        latents = images[:, :1, ::8, ::8].repeat(1, 4, 1, 1)
        return SimpleNamespace(latent_dist=SimpleNamespace(sample=lambda: latents))

    vae = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, encode=encode)
    sizes = (64, 64), (128, 64)
    with tempfile.TemporaryDirectory() as folder:
        npz = str(Path(folder, "blank.npz"))
        for size in sizes:
            if not strategy.is_disk_cached_latents_expected(size, npz, False, False):
                info = own("ImageInfo", type(dataset))("", 1, "", False, "")
                info.image, info.latents_npz = Image.new("RGB", size), npz
                info.bucket_reso = info.resized_size = size
                strategy.cache_batch_latents(vae, [info], False, False, False)
        widths = [8 * load_latents(dataset, Path(npz), size)[0].shape[-1] for size in sizes]
    return widths == [width for width, _ in sizes]


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
    held = list(map(holder, datasets))
    cached = args.cache_latents or args.cache_latents_to_disk
    caches_text = args.cache_text_encoder_outputs or args.cache_text_encoder_outputs_to_disk
    weighs = bool(getattr(args, "weighted_captions", False))
    result.folders = ask("read the folders", read_folders, datasets, caches_text, weighs) or []
    result.epoch = ask("count the batches", read_epoch, held, result.folders)
    ask("check the captions", check_captions, result.folders, report)
    ask("check the folders", check_folders, result.folders, report)
    ask("check the dataset config", check_skipped, args, held, report)
    limit = limit_for(sum(len(folder.pictures) for folder in result.folders)) if limit_for else 0
    result.opened = ask("open the pictures", open_pictures, every, cached, terminal, limit) or []
    ask("check the opened pictures", check_opened, args, list(map(holder, every)), result, report)
    return result


def check_opened(args: Namespace, datasets: list[Any], result: Dataset, report: Report) -> None:
    """Pictures and masks that are broken or do other than meant, and caches in their place."""
    cached: set[Path] = set()
    if args.cache_latents_to_disk:
        for dataset in datasets:
            cached |= check_cached_latents(dataset, result.opened, report).keys()
        attempt(report, "check the latents on disk", check_shared_latents, datasets, report)
    if args.cache_text_encoder_outputs_to_disk:
        check_cached_captions(result.folders, report)
    read = [p for p in result.opened if p.mask or p.path not in cached]
    report.errors += broken_pictures(read)
    check_changes(read, report)
    check_masked_loss(args, result.folders, report)
    by_path = {p.path: p for p in sorted(result.opened, key=lambda p: p.weights is not None)}
    for folder in result.folders:
        check_masks(folder, by_path, report)
    check_sizes(result.folders, result.opened, cached, report)
    if datasets and not turns_photos(datasets[0]):
        check_upright(result.opened, report)
