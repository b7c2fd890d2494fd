"""Cached latents and text encoder outputs of earlier trainings, which sd-scripts uses again."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from blora.preflight.dataset import Folder, caption_path, module_of
from blora.preflight.images import Opened, in_size
from blora.preflight.report import Report
from blora.text import first_few


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
            expected = module_of(dataset).is_disk_cached_latents_is_expected
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
    newer = picture.stat().st_mtime > npz.stat().st_mtime
    return "older than the picture" if newer else ""


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
