"""A stand-in for the sdxl_train_network.py of kohya-ss/sd-scripts, for demos and tests.

  accelerate launch sdxl_train_network.py --dataset_config=... ...
  accelerate launch --multi_gpu --num_processes=2 sdxl_train_network.py ...    two CPU processes

It trains a toy SDXL (toy_sdxl.py: the real module names, 8 to 32 channels, random weights) in
seconds on a CPU, with no checkpoint and no sd-scripts. Its own code throughout.

Real: every option of sd-scripts with its type (an unknown one is an error), the dataset config,
your images and captions, accelerate with any number of processes, the network module (LyCORIS,
called as sd-scripts calls it), going on from a file, gradient checkpointing of the U-Net, Prodigy
and AdamW, warm-up and cosine, gradient clipping and accumulation, mixed precision, the names,
tensors and metadata of the files it saves. A step is saved whenever save_every_n_steps divides it,
the last one included, as sd-scripts does.

Not real: the U-Net, the text encoders, the tokens (hashed words) and the latents (the image
averaged over 8 x 8 pixels, and its luminance). The checkpoint named must exist; it is not read.

Ignored, with every option of theirs: buckets (each image is resized to the dataset's resolution,
rounded down to a multiple of 32), crops, flips and colour augmentation, caption shuffling and
dropout, regularisation and validation sets, the VAE, caches, kinds of attention, fp8 and full
fp16/bf16, noise offsets and loss variants, sample images, logs, saved states, removal of old files,
uploads. Refused, because they change what is trained: the options in REFUSED.

Its options are those of sdxl_train_network_options.py.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import importlib
import json
import math
import os
import random
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import toml
import torch
import toy_sdxl
from accelerate import Accelerator
from accelerate.utils import set_seed
from PIL import Image
from sdxl_train_network_options import build_parser
from torch import Tensor, nn
from tqdm import tqdm

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
POOL = 8  # pixels a side that become one latent, as in SDXL's VAE
MULTIPLE = 32  # the U-Net halves the latents twice

REFUSED = (
    "config_file", "dataset_class", "base_weights", "resume", "initial_step", "initial_epoch",
    "deepspeed", "lr_scheduler_type", "save_n_epoch_ratio", "scale_weight_norms",
)  # fmt: skip

TOY_SEED = 0  # of the toy's weights: they are a checkpoint, so no option changes them
TIMESTEPS = 1000
OPTIMIZERS = {"adamw": ("torch.optim", "AdamW"), "prodigy": ("prodigyopt", "Prodigy")}
SAVE_DTYPES = {
    None: None, "float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16,
}  # fmt: skip

# Options that sd-scripts writes to the file as they are, with "ss_" before the name.
RECORDED = (
    "output_name", "learning_rate", "unet_lr", "gradient_checkpointing",
    "gradient_accumulation_steps", "lr_warmup_steps", "lr_scheduler", "network_module",
    "network_dim", "network_alpha", "network_dropout", "mixed_precision", "v2", "clip_skip",
    "max_token_length", "max_grad_norm", "prior_loss_weight", "loss_type", "training_comment",
)  # fmt: skip
NO_METADATA_KEEPS = {
    "ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha",
    "ss_network_args",
}  # fmt: skip


class StandInError(Exception):
    """A mistake the user can fix; the message says what is wrong."""


# ---- options --------------------------------------------------------------------------------


def check_options(args: argparse.Namespace) -> None:
    for name in REFUSED:
        if getattr(args, name) not in (None, False, "", 0):
            raise StandInError(f"the stand-in does not do --{name}")
    for name in ("pretrained_model_name_or_path", "dataset_config", "output_dir", "network_module"):
        if getattr(args, name) is None:
            raise StandInError(f"--{name} is missing")
    checkpoint = args.pretrained_model_name_or_path
    if not Path(checkpoint).exists():
        raise StandInError(f"--pretrained_model_name_or_path: no such file: {checkpoint}")
    if args.resolution is not None:
        read_resolution(args.resolution)  # the file's metadata needs it at the first save


def split_pairs(option: str, items: list[str] | None) -> dict[str, str]:
    """["a=1", "b=x=y"] -> {"a": "1", "b": "x=y"}"""
    pairs = {}
    for item in items or []:
        key, equals, value = item.partition("=")
        if not equals:
            raise StandInError(f"--{option}: not NAME=VALUE: {item}")
        pairs[key] = value
    return pairs


# ---- dataset --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subset:
    image_dir: Path
    repeats: int
    pairs: tuple[tuple[Path, str], ...]  # image, caption


@dataclass(frozen=True)
class Dataset:
    resolution: tuple[int, int]  # width, height
    batch_size: int
    subsets: tuple[Subset, ...]

    @property
    def image_count(self) -> int:
        return sum(subset.repeats * len(subset.pairs) for subset in self.subsets)


def first_of(key: str, tables: tuple[dict[str, Any], ...], default: Any) -> Any:
    return next((table[key] for table in tables if key in table), default)


def read_resolution(value: int | str | list[int] | None) -> tuple[int, int]:
    """Width and height from 1024, "1024", "832,1216" or [832, 1216]."""
    if value is None:
        raise StandInError("no resolution: give one in the dataset config or as --resolution")
    sides = value.split(",") if isinstance(value, str) else value
    try:
        numbers = [int(side) for side in (sides if isinstance(sides, list) else [sides])]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise StandInError(f"resolution: not a size or a width and a height: {value}")
    return numbers[0], numbers[-1]


def read_pair(image: Path, extension: str, class_tokens: str) -> tuple[Path, str]:
    text = image.with_suffix(extension)
    return image, text.read_text(encoding="utf-8").strip() if text.is_file() else class_tokens


def load_subset(tables: tuple[dict[str, Any], ...], args: argparse.Namespace) -> Subset:
    if "image_dir" not in tables[0]:
        raise StandInError(f"{args.dataset_config}: a subset has no image_dir")
    folder = Path(tables[0]["image_dir"])
    if not folder.is_dir():
        raise StandInError(f"{args.dataset_config}: no such image_dir: {folder.as_posix()}")
    images = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    extension = args.caption_extention or args.caption_extension  # sd-scripts has both spellings
    extension = first_of("caption_extension", tables, extension)
    class_tokens = first_of("class_tokens", tables, "")
    return Subset(
        image_dir=folder,
        repeats=first_of("num_repeats", tables, args.dataset_repeats),
        pairs=tuple(read_pair(image, extension, class_tokens) for image in images),
    )


def load_datasets(args: argparse.Namespace) -> tuple[Dataset, ...]:
    """The datasets of --dataset_config; what a table leaves out, the one around it gives."""
    if not args.dataset_config.is_file():
        raise StandInError(f"--dataset_config: no such file: {args.dataset_config.as_posix()}")
    try:
        config = toml.loads(args.dataset_config.read_text(encoding="utf-8"))
    except toml.TomlDecodeError as error:
        raise StandInError(f"{args.dataset_config}: {error}") from error
    general = config.get("general", {})
    datasets = []
    for table in config.get("datasets", []):
        outer = (table, general)
        subsets = tuple(load_subset((subset, *outer), args) for subset in table.get("subsets", []))
        datasets.append(
            Dataset(
                resolution=read_resolution(first_of("resolution", outer, args.resolution)),
                batch_size=first_of("batch_size", outer, args.train_batch_size),
                subsets=subsets,
            )
        )
    if sum(dataset.image_count for dataset in datasets) == 0:
        raise StandInError(f"{args.dataset_config}: its folders hold no images")
    return tuple(datasets)


@dataclass(frozen=True)
class Batch:
    resolution: tuple[int, int]
    pairs: tuple[tuple[Path, str], ...]


def make_batches(datasets: tuple[Dataset, ...]) -> Iterator[Batch]:
    for dataset in datasets:
        pairs = [pair for s in dataset.subsets for pair in s.pairs for _ in range(s.repeats)]
        for start in range(0, len(pairs), dataset.batch_size):
            yield Batch(dataset.resolution, tuple(pairs[start : start + dataset.batch_size]))


def image_to_latents(path: Path, width: int, height: int) -> Tensor:
    """[4, height / 8, width / 8] in -1..1: red, green, blue and luminance."""
    with Image.open(path) as image:
        small = image.convert("RGB").resize((width // POOL, height // POOL), Image.Resampling.BOX)
    rgb = torch.from_numpy(np.asarray(small, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)
    return torch.cat([rgb, rgb.mean(dim=0, keepdim=True)])


@dataclass(frozen=True)
class BatchLoader(torch.utils.data.Dataset):
    """Whole batches as items, so that datasets of different resolutions can be mixed."""

    batches: tuple[Batch, ...]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        batch = self.batches[index]
        width, height = (max(MULTIPLE, side // MULTIPLE * MULTIPLE) for side in batch.resolution)
        size = [height, width, 0, 0, height, width]  # original, crop corner, target
        return {
            "latents": torch.stack([image_to_latents(p, width, height) for p, _ in batch.pairs]),
            "tokens": torch.tensor([toy_sdxl.tokenize(caption) for _, caption in batch.pairs]),
            "sizes": torch.tensor([size] * len(batch.pairs)),
        }


def only_item(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return items[0]


def build_loader(batches: tuple[Batch, ...], args: argparse.Namespace):
    workers = min(args.max_data_loader_n_workers, os.cpu_count() or 1)
    return torch.utils.data.DataLoader(
        BatchLoader(batches),
        shuffle=True,
        collate_fn=only_item,
        num_workers=workers,
        # torch refuses persistent workers where there are none
        persistent_workers=args.persistent_data_loader_workers and workers > 0,
    )


# ---- network and optimizer ------------------------------------------------------------------


@dataclass(frozen=True)
class Models:
    unet: nn.Module
    text_encoders: list[nn.Module]


def load_models(device: torch.device) -> Models:
    """The toy in place of the checkpoint: frozen, and the same whatever --seed says."""
    with torch.random.fork_rng():
        torch.manual_seed(TOY_SEED)
        unet, text_encoders = toy_sdxl.make_unet(), toy_sdxl.make_text_encoders()
    for model in (unet, *text_encoders):
        model.requires_grad_(False).eval().to(device)
    return Models(unet, text_encoders)


def network_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    return {"dropout": args.network_dropout, **split_pairs("network_args", args.network_args)}


def build_network(models: Models, args: argparse.Namespace) -> nn.Module:
    try:
        module = importlib.import_module(args.network_module)
    except ImportError as error:
        raise StandInError(f"--network_module={args.network_module}: {error}") from error
    trained = (None, models.text_encoders, models.unet)  # None is the VAE
    if args.dim_from_weights:
        given = split_pairs("network_args", args.network_args)
        network, _ = module.create_network_from_weights(1, args.network_weights, *trained, **given)
    else:
        rank, alpha, dropout = args.network_dim, args.network_alpha, args.network_dropout
        network = module.create_network(
            1.0, rank, alpha, *trained, neuron_dropout=dropout, **network_kwargs(args)
        )
    train_text_encoders = not args.network_train_unet_only
    network.apply_to(models.text_encoders, models.unet, train_text_encoders, trains_unet(args))
    if args.network_weights:
        network.load_weights(args.network_weights)
    if args.gradient_checkpointing:
        models.unet.enable_gradient_checkpointing()
        network.enable_gradient_checkpointing()
    return network


def trains_unet(args: argparse.Namespace) -> bool:
    return not args.network_train_text_encoder_only


def trained_parameters(network: nn.Module, args: argparse.Namespace) -> list[dict[str, Any]]:
    text_encoder_lr = args.text_encoder_lr[0] if args.text_encoder_lr else None
    found = network.prepare_optimizer_params(text_encoder_lr, args.unet_lr, args.learning_rate)
    groups = found[0] if isinstance(found, tuple) else found
    if not groups:
        raise StandInError("there is nothing to train: no module was selected, or the rate is 0")
    return groups


def optimizer_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    kwargs = {}
    for key, value in split_pairs("optimizer_args", args.optimizer_args).items():
        try:
            kwargs[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise StandInError(f"--optimizer_args: not a Python value: {key}={value}") from None
    return kwargs


def build_optimizer(
    groups: list[dict[str, Any]], args: argparse.Namespace
) -> torch.optim.Optimizer:
    name = args.optimizer_type or "AdamW"
    if name.lower() not in OPTIMIZERS:
        raise StandInError(f"--optimizer_type={name}: the stand-in knows {', '.join(OPTIMIZERS)}")
    package, class_name = OPTIMIZERS[name.lower()]
    try:
        optimizer_class = getattr(importlib.import_module(package), class_name)
    except ImportError as error:
        raise StandInError(f"--optimizer_type={name}: {error}") from error
    kwargs = optimizer_kwargs(args)
    try:
        return optimizer_class(groups, lr=args.learning_rate, **kwargs)
    except (TypeError, ValueError) as error:
        raise StandInError(f"--optimizer_args: {error}") from error


def rate_factor(name: str, step: int, warmup: int, total: int) -> float:
    if step < warmup:
        return step / warmup
    if name != "cosine":
        return 1.0
    done = (step - warmup) / max(1, total - warmup)
    return max(0.0, 0.5 * (1 + math.cos(math.pi * done)))


def build_scheduler(optimizer: torch.optim.Optimizer, args: argparse.Namespace, total: int):
    name, warmup = args.lr_scheduler, args.lr_warmup_steps
    if name not in ("constant", "constant_with_warmup", "cosine"):
        raise StandInError(
            f"--lr_scheduler={name}: the stand-in knows constant, constant_with_warmup, cosine"
        )
    if name == "constant" and warmup:
        raise StandInError("--lr_scheduler=constant has no warm-up: use constant_with_warmup")
    warmup = int(warmup * total) if isinstance(warmup, float) else warmup
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_factor(name, step, warmup, total)
    )


# ---- training -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    args: argparse.Namespace
    datasets: tuple[Dataset, ...]
    accelerator: Accelerator
    models: Models
    network: nn.Module  # as accelerate wrapped it, like the next three
    optimizer: torch.optim.Optimizer
    loader: torch.utils.data.DataLoader
    scheduler: torch.optim.lr_scheduler.LRScheduler
    steps: int
    epochs: int
    metadata: dict[str, str]


def signal_share() -> Tensor:
    """What is left of the image at each of SDXL's 1000 timesteps."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, TIMESTEPS, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, dim=0).float()


def predict_noise(run: Run, batch: dict[str, Tensor], noisy: Tensor, times: Tensor) -> Tensor:
    """The answer of the U-Net, whose inputs require gradients wherever sd-scripts' do."""
    train_text_encoders = not run.args.network_train_unet_only
    with torch.set_grad_enabled(train_text_encoders):
        encoded = (encode(batch["tokens"]) for encode in run.models.text_encoders)
        (context1, _), (context2, pooled) = encoded
    if run.args.gradient_checkpointing:
        for tensor in (*noisy, context1, context2, pooled):
            tensor.requires_grad_(True)
    noisy.requires_grad_(trains_unet(run.args))
    context = torch.cat([context1, context2], dim=-1)
    return run.models.unet(noisy, times, context, pooled, batch["sizes"])


def batch_loss(run: Run, batch: dict[str, Tensor]) -> Tensor:
    latents = batch["latents"]
    noise = torch.randn_like(latents)
    times = torch.randint(0, TIMESTEPS, (len(latents),), device=latents.device)
    share = signal_share().to(latents.device)[times][:, None, None, None]
    noisy = share.sqrt() * latents + (1 - share).sqrt() * noise
    with run.accelerator.autocast():
        predicted = predict_noise(run, batch, noisy, times)
    return nn.functional.mse_loss(predicted.float(), noise)


def average_gradients(run: Run) -> None:
    """Over the processes. The network's layers run inside the U-Net, never through the wrapper
    that accelerate put around the network, so the wrapper does not do it."""
    for parameter in run.network.parameters():
        if parameter.grad is not None:
            parameter.grad = run.accelerator.reduce(parameter.grad, reduction="mean")


def train_batch(run: Run, batch: dict[str, Tensor]) -> float:
    """One batch forward and back; the loss. Ends an optimizer step if it is the last to gather."""
    with run.accelerator.accumulate(run.network):
        loss = batch_loss(run, batch)
        run.accelerator.backward(loss)
        if run.accelerator.sync_gradients:
            average_gradients(run)
            if run.args.max_grad_norm:
                run.accelerator.clip_grad_norm_(run.network.parameters(), run.args.max_grad_norm)
        run.optimizer.step()
        run.scheduler.step()
        run.optimizer.zero_grad(set_to_none=True)
    return loss.item()


def train(run: Run) -> None:
    bare = run.accelerator.unwrap_model(run.network)
    run.models.unet.train(run.args.gradient_checkpointing)  # else it stays in eval mode
    bare.prepare_grad_etc(run.models.text_encoders, run.models.unet)
    hidden = not run.accelerator.is_local_main_process
    progress = tqdm(total=run.steps, desc="steps", disable=hidden)
    losses: deque[float] = deque(maxlen=len(run.loader))  # averaged over an epoch
    step = 0
    for epoch in range(run.epochs):
        run.accelerator.print(f"\nepoch {epoch + 1}/{run.epochs}")
        bare.on_epoch_start(run.models.text_encoders, run.models.unet)
        for batch in run.loader:
            losses.append(train_batch(run, batch))
            if run.accelerator.sync_gradients:
                step += 1
                progress.update(1)
                if due(run.args.save_every_n_steps, step):
                    # the epoch that is not over yet does not count, as in sd-scripts
                    save(run, f"-step{step:08d}", step, epoch)
            progress.set_postfix(avr_loss=sum(losses) / len(losses))
            if step >= run.steps:
                break
        if due(run.args.save_every_n_epochs, epoch + 1) and epoch + 1 < run.epochs:
            save(run, f"-{epoch + 1:06d}", step, epoch + 1)
    progress.close()
    save(run, "", step, run.epochs)


# ---- files ----------------------------------------------------------------------------------


def due(every: int | None, count: int) -> bool:
    return bool(every) and count % every == 0


def save(run: Run, suffix: str, step: int, epoch: int) -> None:
    """Write the network; only the main process does, the others wait for it."""
    args = run.args
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        default = "at" if "step" in suffix else "epoch" if suffix else "last"
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{args.output_name or default}{suffix}.{args.save_model_as or 'safetensors'}"
        file = folder / name
        run.accelerator.print(f"\nsaving checkpoint: {file.as_posix()}")
        metadata = {**run.metadata, "ss_steps": str(step), "ss_epoch": str(epoch)}
        metadata["ss_training_finished_at"] = str(time.time())
        if args.no_metadata:
            metadata = {key: metadata[key] for key in NO_METADATA_KEEPS if key in metadata}
        metadata |= model_spec(args)
        network = run.accelerator.unwrap_model(run.network)
        network.save_weights(str(file), SAVE_DTYPES[args.save_precision], metadata)
    run.accelerator.wait_for_everyone()


def model_spec(args: argparse.Namespace) -> dict[str, str]:
    width, height = read_resolution(args.resolution or 1024)
    prefix = "metadata_"
    given = {
        key.removeprefix(prefix): value
        for key, value in vars(args).items()
        if key.startswith(prefix) and value is not None
    }
    fields = {
        "sai_model_spec": "1.0.1",
        "architecture": "stable-diffusion-xl-v1-base/lora",
        "implementation": "https://github.com/Stability-AI/generative-models",
        "title": args.output_name or "LoRA",
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "resolution": f"{width}x{height}",
        "prediction_type": "v" if args.v_parameterization else "epsilon",
        **given,
    }
    return {f"modelspec.{key}": str(value) for key, value in fields.items()}


def tag_frequency(subsets: list[Subset]) -> dict[str, dict[str, int]]:
    counts: dict[str, Counter[str]] = {}
    for subset in subsets:
        tags = (tag.strip().lower() for _, text in subset.pairs for tag in text.split(","))
        counts.setdefault(subset.image_dir.name, Counter()).update(filter(None, tags))
    return {name: dict(count) for name, count in counts.items()}


def dataset_metadata(datasets: tuple[Dataset, ...]) -> dict[str, str]:
    subsets = [subset for dataset in datasets for subset in dataset.subsets]
    described = [
        {
            "batch_size_per_device": dataset.batch_size,
            "num_train_images": dataset.image_count,
            "resolution": dataset.resolution,
            "subsets": [
                {"img_count": len(s.pairs), "num_repeats": s.repeats, "image_dir": s.image_dir.name}
                for s in dataset.subsets
            ],
        }
        for dataset in datasets
    ]
    folders = {
        s.image_dir.name: {"n_repeats": s.repeats, "img_count": len(s.pairs)} for s in subsets
    }
    return {
        "ss_num_train_images": str(sum(dataset.image_count for dataset in datasets)),
        "ss_datasets": json.dumps(described),
        "ss_tag_frequency": json.dumps(tag_frequency(subsets)),
        "ss_dataset_dirs": json.dumps(folders),
    }


def optimizer_name(optimizer: torch.optim.Optimizer, args: argparse.Namespace) -> str:
    kind = type(optimizer)
    given = ",".join(f"{key}={value}" for key, value in optimizer_kwargs(args).items())
    return f"{kind.__module__}.{kind.__name__}" + (f"({given})" if given else "")


def run_metadata(args: argparse.Namespace, **known: Any) -> dict[str, str]:
    """What the file will say of this run, less what only the save knows."""
    fields = {f"ss_{name}": getattr(args, name) for name in RECORDED}
    fields |= {f"ss_{name}": value for name, value in known.items()}
    fields |= {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_sd_model_name": Path(args.pretrained_model_name_or_path).name,
        "ss_session_id": random.randrange(2**32),
        "ss_text_encoder_lr": args.text_encoder_lr[0] if args.text_encoder_lr else None,
        "ss_resolution": args.resolution,
    }
    if args.network_args:
        fields["ss_network_args"] = json.dumps(network_kwargs(args))
    return {key: str(value) for key, value in fields.items()}


# ---- main -----------------------------------------------------------------------------------


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    try:
        return Accelerator(
            # said aloud, or the processes that --multi_gpu starts on a CPU do not find each other
            cpu=not torch.cuda.is_available(),
            mixed_precision=args.mixed_precision,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
        )
    except ValueError as error:  # some versions refuse fp16 without a GPU; 1.15 trains in fp32
        raise StandInError(f"--mixed_precision={args.mixed_precision}: {error}") from error


def planned_steps(args: argparse.Namespace, batches: int, processes: int) -> int:
    if args.max_train_epochs is None:
        return args.max_train_steps
    per_epoch = math.ceil(batches / processes / args.gradient_accumulation_steps)
    return args.max_train_epochs * per_epoch


def prepare(args: argparse.Namespace) -> Run:
    started = time.time()
    # The toy's matrices are too small to share between threads, and a launcher may ask for more
    # threads than there are cores: then they mostly wait for each other.
    torch.set_num_threads(1)
    seed = random.randrange(2**32) if args.seed is None else args.seed
    set_seed(seed)
    datasets = load_datasets(args)
    accelerator = make_accelerator(args)
    models = load_models(accelerator.device)
    network = build_network(models, args)
    optimizer = build_optimizer(trained_parameters(network, args), args)
    loader = build_loader(tuple(make_batches(datasets)), args)
    steps = planned_steps(args, len(loader), accelerator.num_processes)
    # accelerate turns the schedule once for each process at every step
    scheduler = build_scheduler(optimizer, args, steps * accelerator.num_processes)
    name = optimizer_name(optimizer, args)
    network, optimizer, loader, scheduler = accelerator.prepare(
        network, optimizer, loader, scheduler
    )
    epochs = math.ceil(steps / math.ceil(len(loader) / args.gradient_accumulation_steps))
    metadata = run_metadata(
        args,
        training_started_at=started,
        seed=seed,
        optimizer=name,
        max_train_steps=steps,
        num_epochs=epochs,
        num_batches_per_epoch=len(loader),
    )
    return Run(
        args=args,
        datasets=datasets,
        accelerator=accelerator,
        models=models,
        network=network,
        optimizer=optimizer,
        loader=loader,
        scheduler=scheduler,
        steps=steps,
        epochs=epochs,
        metadata=metadata | dataset_metadata(datasets),
    )


def plan(run: Run) -> str:
    images = sum(len(subset.pairs) for dataset in run.datasets for subset in dataset.subsets)
    return (
        "running training (stand-in: toy model)\n"
        f"  images: {images}, with repeats: {run.metadata['ss_num_train_images']}\n"
        f"  processes: {run.accelerator.num_processes}, batches per epoch: {len(run.loader)}\n"
        f"  epochs: {run.epochs}, steps: {run.steps}"
    )


def setup_parser() -> argparse.ArgumentParser:
    """The options, as pre-flight asks sd-scripts for them."""
    return build_parser(__doc__)


def main(argv: list[str] | None = None) -> int:
    args = setup_parser().parse_args(argv)
    try:
        check_options(args)
        run = prepare(args)
    except StandInError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    run.accelerator.print(plan(run))
    train(run)
    run.accelerator.end_training()
    return 0


if __name__ == "__main__":
    sys.exit(main())
