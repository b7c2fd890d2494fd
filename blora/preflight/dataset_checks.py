"""Every check of a dataset: its folders, captions, pictures and caches."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TextIO

from blora.preflight.captions import check_captions
from blora.preflight.dataset import Epoch, Folder, read_epoch, read_folders, with_strategies
from blora.preflight.folders import check_folders, check_skipped
from blora.preflight.images import (
    Opened,
    broken_pictures,
    check_cached_captions,
    check_cached_latents,
    check_sizes,
    check_upright,
    open_pictures,
    turns_photos,
)
from blora.preflight.rehearsal import Rehearsal
from blora.preflight.report import Report, attempt


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
    args, result = rehearsal.args, Dataset()
    datasets = list(map(with_strategies, rehearsal.datasets))
    every = [*datasets, *map(with_strategies, rehearsal.validation)]

    def ask(what: str, step: Callable[..., Any], *more: Any) -> Any:
        return attempt(report, what, step, *more)

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
    cached = set()
    if args.cache_latents_to_disk:
        for dataset in datasets:
            cached |= check_cached_latents(dataset, result.opened, report).keys()
    if args.cache_text_encoder_outputs_to_disk:
        check_cached_captions(result.folders, report)
    report.errors += broken_pictures(p for p in result.opened if p.path not in cached)
    check_sizes(result.folders, result.opened, cached, report)
    if datasets and not turns_photos(datasets[0]):
        check_upright(result.opened, report)
