"""sd-scripts' datasets in plain words: folders, pictures, captions, and what an epoch holds.

Datasets are left as they were.
"""

from __future__ import annotations

import copy
import json
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

from blora.preflight.trainer import own


@dataclass(frozen=True)
class Picture:
    """A picture as the trainer holds it."""

    path: Path
    size: tuple[int, int]  # width and height that the trainer sorts it by
    bucket: tuple[int, int]  # width and height that it is trained in
    repeats: int
    caption: str  # what the trainer has read
    prompt: str  # what it trains: with prefix and suffix, one line of several
    tokens: int = 0
    kept: int = 0  # letters of the prompt that are within the limit of tokens


@dataclass(frozen=True)
class Folder:
    """One subset of a dataset, with the settings that decide on its captions."""

    path: Path
    pictures: tuple[Picture, ...]
    seen: frozenset[Path]  # every file that the trainer takes for a picture
    repeats: int = 1
    class_tokens: str = ""
    caption_extension: str = ""  # empty where a metadata_file lists pictures and captions
    has_wildcards: bool = False
    has_affix: bool = False  # caption_prefix or caption_suffix
    is_reg: bool = False
    loss_weight: float = 1.0  # prior_loss_weight, where is_reg
    most_tokens: int = 75
    metadata: Path | None = None  # the metadata_file
    dropped_by: tuple[str, ...] = ()  # settings by each of which no word is ever trained
    is_masked: bool = False  # by a picture for each
    has_alpha_mask: bool = False
    too_small: frozenset[Path] = frozenset()  # left out by skip_image_resolution
    replaced: int = 0  # pictures in whose place others of the same name are trained
    cache: Path | None = None  # where sd-scripts reads captions and sizes that it kept (cache_info)
    uncached: frozenset[Path] = frozenset()  # pictures that the cache does not list

    @property
    def name(self) -> str:
        """The file or folder that lists the pictures."""
        return str(self.metadata or self.path)


@dataclass(frozen=True)
class Epoch:
    """What an epoch of the training is made of; of all datasets together."""

    images: int
    captions: int
    repeated: int  # images with their repeats
    batches: int
    largest_batch: int  # pixels


# ---- Captions ------------------------------------------------------------------------------------


def caption_path(picture: Path, extension: str) -> Path:
    """The caption file of a picture; the extension is put behind its name as it is."""
    return picture.with_name(picture.stem + extension)


def has_caption(picture: Picture, folder: Folder) -> bool:
    """Whether a picture has a caption of its own."""
    if folder.caption_extension and caption_path(picture.path, folder.caption_extension).is_file():
        return True
    return picture.caption != folder.class_tokens


def letters_kept(text: str, count: Callable[[str], int], most: int) -> int:
    """How many letters of a text make no more than `most` tokens."""
    if count(text) <= most:
        return len(text)
    return bisect_right(range(len(text)), most, key=lambda letters: count(text[:letters])) - 1


# ---- As sd-scripts holds them --------------------------------------------------------------------


def without_augmentation(subset: Any) -> Any:
    """A copy of a subset whose captions and pictures are the same at each step."""
    subset = copy.copy(subset)
    subset.flip_aug = subset.shuffle_caption = False
    subset.caption_dropout_rate = subset.caption_tag_dropout_rate = 0
    subset.caption_dropout_every_n_epochs = subset.token_warmup_step = 0
    return subset


def holder(dataset: Any) -> Any:
    """The dataset that holds the pictures: sd-scripts wraps one with masks around it."""
    return getattr(dataset, "dreambooth_dataset_delegate", dataset)


DROPOUTS = ("caption_dropout_rate", "caption_dropout_every_n_epochs", "caption_tag_dropout_rate")


def dropped_by(dataset: Any, subset: Any) -> tuple[str, ...]:
    """The settings of a subset by each of which no word is ever trained, with their values."""
    first = copy.copy(dataset)
    first.current_epoch = 1  # whatever spares one epoch spares the first
    settings = []
    for name in DROPOUTS:
        alone, value = without_augmentation(subset), getattr(subset, name)
        setattr(alone, name, value)
        with mock.patch("random.random", lambda: 1 - 2**-53):  # the draw that spares the most
            if value and not first.process_caption(alone, "word"):
                settings.append(f"{name} = {value}")
    return tuple(settings)


def weighted_counter(strategy: Any) -> Callable[[str], int]:
    """Counts a prompt's tokens as --weighted_captions reads it, whose brackets are no words."""
    wide = copy.copy(strategy)
    wide.max_length = 2 + 75 * 40  # nothing is cut off
    tokenizer = wide.tokenizer1
    others = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    return lambda text: sum(
        token not in others for token in wide.tokenize_with_weights(text)[0][0].flatten().tolist()
    )


def token_counter(dataset: Any, is_weighted: bool) -> tuple[Callable[[str], int], int]:
    """A function that counts a prompt's tokens as the trainer does, and the trainer's limit."""
    strategy = getattr(dataset, "tokenize_strategy", None)
    if strategy is not None and is_weighted:
        return weighted_counter(strategy), strategy.max_length - 2
    if strategy is not None:  # 0.10
        tokenizer, most = strategy.tokenizer1, strategy.max_length
    else:  # 0.9
        tokenizer, most = dataset.tokenizers[0], dataset.tokenizer_max_length
    # Without the tokens that begin and end each prompt.
    return lambda text: len(tokenizer(text, verbose=False).input_ids) - 2, most - 2


def with_strategies(dataset: Any) -> Any:
    """A copy of a dataset that has the tokenizer, which 0.10 sets later."""
    dataset = copy.copy(dataset)
    if holder(dataset) is not dataset:
        dataset.dreambooth_dataset_delegate = with_strategies(holder(dataset))
    elif hasattr(dataset, "set_current_strategies"):
        dataset.set_current_strategies()
    return dataset


def read_folders(datasets: Iterable[Any], caches_text: bool, is_weighted: bool) -> list[Folder]:
    """The folders of sd-scripts' datasets with their pictures, in the order of the config.

    Captions that are cached are trained as they are read.
    """
    return [
        replace(read_folder(held, subset, caches_text, is_weighted), is_masked=held is not dataset)
        for dataset in datasets
        for held in [holder(dataset)]
        for subset in held.subsets
    ]


def read_folder(dataset: Any, subset: Any, caches_text: bool, is_weighted: bool) -> Folder:
    """One subset of a dataset."""
    count, most = token_counter(dataset, is_weighted)
    keys = [key for key, owner in dataset.image_to_subset.items() if owner is subset]
    pictures = []
    for info in (dataset.image_data[key] for key in keys):
        prompt = info.caption
        if not caches_text:
            prompt = dataset.process_caption(without_augmentation(subset), info.caption)
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
    metadata = getattr(subset, "metadata_file", None)
    seen, cache = seen_files(dataset, subset), info_cache(dataset, subset)
    small = too_small(dataset, seen)
    return Folder(
        Path(subset.image_dir or ""),
        tuple(pictures),
        seen | {picture.path for picture in pictures},
        subset.num_repeats,
        getattr(subset, "class_tokens", None) or "",
        getattr(subset, "caption_extension", None) or "",
        subset.enable_wildcard,
        bool(subset.caption_prefix or subset.caption_suffix),
        getattr(subset, "is_reg", False),
        getattr(dataset, "prior_loss_weight", 1.0),
        most,
        Path(metadata) if metadata else None,
        () if caches_text else dropped_by(dataset, subset),
        has_alpha_mask=subset.alpha_mask,
        too_small=small,
        replaced=subset.img_count - len(pictures) if metadata and not skips(dataset) else 0,
        cache=cache,
        uncached=unlisted(dataset, subset, cache) if cache else frozenset(),
    )


def info_cache(dataset: Any, subset: Any) -> Path | None:
    """The file of an earlier training that cache_info reads in place of the folder."""
    if not getattr(subset, "cache_info", False):
        return None
    path = Path(subset.image_dir, dataset.IMAGE_INFO_CACHE_FILE)
    return path if path.is_file() else None


def unlisted(dataset: Any, subset: Any, cache: Path) -> frozenset[Path]:
    """The pictures of a folder that are not in its cache."""
    there = own("glob_images", type(dataset))(subset.image_dir, "*")
    return frozenset(map(Path, set(there) - json.loads(cache.read_text("utf-8")).keys()))


def skips(dataset: Any) -> tuple[int, int] | None:
    """skip_image_resolution, a setting since 0.11: the largest size that is left out."""
    size: tuple[int, int] | None = getattr(dataset, "skip_image_resolution", None)
    return size


def too_small(dataset: Any, seen: Iterable[Path]) -> frozenset[Path]:
    """The files that skip_image_resolution leaves out."""
    if not (largest := skips(dataset)):
        return frozenset()
    most = math.prod(largest)
    return frozenset(p for p in seen if math.prod(dataset.get_image_size(str(p))) <= most)


def seen_files(dataset: Any, subset: Any) -> frozenset[Path]:
    """The files that sd-scripts takes for pictures, also those that it keeps for validation."""
    if not subset.image_dir or getattr(subset, "cache_info", False):
        return frozenset()
    return frozenset(map(Path, own("glob_images", type(dataset))(subset.image_dir, "*")))


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


def list_folders(folders: Iterable[Folder]) -> str:
    """The folders in words: `12 in "cats" (x3), 5 in "dogs"`."""
    return ", ".join(
        f'{len(folder.pictures)} in "{folder.name}"'
        + (f" (x{folder.repeats})" if folder.repeats != 1 else "")
        + (" (is_reg)" if folder.is_reg else "")
        for folder in folders
    )
