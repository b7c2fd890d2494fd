"""A stand-in for the sdxl_train_network.py of kohya-ss/sd-scripts, for demos and tests.

  accelerate launch sdxl_train_network.py --dataset_config=... ...
  accelerate launch --multi_gpu --num_processes=2 sdxl_train_network.py ...    two CPU processes

It trains a toy SDXL (toy_sdxl.py) in seconds on a CPU, with no checkpoint and no sd-scripts.

Real: every option of sd-scripts with its type (an unknown one is an error), the dataset config,
your images and captions, accelerate with any number of processes, the network module (LyCORIS,
called as sd-scripts calls it), going on from a file, gradient checkpointing of the U-Net, Prodigy,
warm-up and cosine, gradient clipping and accumulation, mixed precision, the names, tensors and
metadata of the files it saves, and when it saves them.

Not real: the U-Net, the text encoders, the tokens (hashed words) and the latents (the image
averaged over 8 x 8 pixels, and its luminance). The checkpoint is not read.

Ignored, with every option of theirs: buckets (each image is resized to the dataset's resolution,
rounded down to a multiple of 32), crops, flips and colour augmentation, caption shuffling and
dropout, regularisation and validation sets, the VAE, caches, kinds of attention, fp8 and full
fp16/bf16, noise offsets and loss variants, sample images, logs, saved states, removal of old files,
titles and authors, uploads. Refused, because they change what is trained or saved: the options in
REFUSED, other optimizers and other schedules.
"""

from __future__ import annotations

import ast
import datetime
import importlib
import json
import math
import os
import random
import sys
import time
from argparse import ArgumentParser, Namespace
from collections import ChainMap, Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import toy_sdxl
from accelerate import Accelerator
from accelerate.utils import set_seed
from library import config_util, train_util
from PIL import Image
from prodigyopt import Prodigy
from sdxl_train_network_options import build_parser
from torch import Tensor, nn
from tqdm import tqdm

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
POOL = 8  # pixels a side that become one latent, as in SDXL's VAE
MULTIPLE = 32  # the U-Net halves the latents twice
REFUSED = """
    config_file dataset_class base_weights resume initial_step initial_epoch deepspeed
    lr_scheduler_type save_n_epoch_ratio scale_weight_norms max_train_epochs save_every_n_epochs
    no_metadata network_train_text_encoder_only
""".split()
TOY_SEED = 0  # of the toy's weights: they are a checkpoint, so no option changes them
TIMESTEPS = 1000
SAVE_DTYPES = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Options that sd-scripts writes to the file as they are, with "ss_" before the name.
RECORDED = """
    output_name learning_rate unet_lr gradient_checkpointing gradient_accumulation_steps
    lr_warmup_steps lr_scheduler network_module network_dim network_alpha network_dropout
    mixed_precision v2 clip_skip max_token_length max_grad_norm prior_loss_weight loss_type
    training_comment resolution
""".split()


def pairs(items: list[str] | None) -> dict[str, str]:
    """["a=1", "b=x=y"] -> {"a": "1", "b": "x=y"}"""
    return dict(item.split("=", 1) for item in items or [])


# ---- dataset --------------------------------------------------------------------------------
@dataclass(frozen=True)
class Subset:
    image_dir: Path
    repeats: int
    resolution: tuple[int, int]  # width, height
    batch_size: int
    pairs: list[tuple[Path, str]]  # image, caption


def read_resolution(value: int | str | list[int]) -> tuple[int, int]:
    """Width and height from 1024, "1024", "832,1216" or [832, 1216]."""
    sides = value if isinstance(value, list) else str(value).split(",")
    return int(sides[0]), int(sides[-1])


def load_subset(table: ChainMap[str, Any], args: Namespace) -> Subset:
    folder, found = Path(table["image_dir"]), []
    for image in (p for p in sorted(folder.iterdir()) if p.suffix.lower() in IMAGE_SUFFIXES):
        file = image.with_suffix(table.get("caption_extension", args.caption_extension))
        default = table.get("class_tokens", "")
        text = file.read_text(encoding="utf-8").strip() if file.is_file() else default
        found.append((image, text))
    return Subset(
        image_dir=folder,
        repeats=table.get("num_repeats", args.dataset_repeats),
        resolution=read_resolution(table.get("resolution", args.resolution)),
        batch_size=table.get("batch_size", args.train_batch_size),
        pairs=found,
    )


def load_subsets(args: Namespace) -> list[Subset]:
    """Those of --dataset_config; what a table leaves out, the one around it gives."""
    config = config_util.load_user_config(args.dataset_config)
    return [
        load_subset(ChainMap(subset, dataset, config.get("general", {})), args)
        for dataset in config["datasets"]
        for subset in dataset["subsets"]
    ]


@cache
def image_to_latents(path: Path, width: int, height: int) -> Tensor:
    """[4, height / 8, width / 8] in -1..1: red, green, blue and luminance."""
    with Image.open(path) as image:
        small = image.convert("RGB").resize((width // POOL, height // POOL), Image.Resampling.BOX)
    rgb = torch.from_numpy(np.asarray(small, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)
    return torch.cat([rgb, rgb.mean(dim=0, keepdim=True)])


def make_batches(subset: Subset) -> Iterator[dict[str, Tensor]]:
    width, height = (max(MULTIPLE, side // MULTIPLE * MULTIPLE) for side in subset.resolution)
    size = [height, width, 0, 0, height, width]  # original, crop corner, target
    repeated = [pair for pair in subset.pairs for _ in range(subset.repeats)]
    for start in range(0, len(repeated), subset.batch_size):
        images, captions = zip(*repeated[start : start + subset.batch_size], strict=True)
        yield {
            "latents": torch.stack([image_to_latents(i, width, height) for i in images]),
            "tokens": torch.tensor([toy_sdxl.tokenize(caption) for caption in captions]),
            "sizes": torch.tensor([size] * len(images)),
        }


def build_loader(subsets: list[Subset], args: Namespace):
    """Of whole batches, so that different resolutions can be mixed."""
    workers = min(args.max_data_loader_n_workers, os.cpu_count() or 1)
    batches = [batch for subset in subsets for batch in make_batches(subset)]
    # torch refuses persistent workers where there are none
    how = {"persistent_workers": args.persistent_data_loader_workers and workers > 0}
    how |= {"shuffle": True, "collate_fn": itemgetter(0), "num_workers": workers}
    return torch.utils.data.DataLoader(batches, **how)


# ---- network and optimizer ------------------------------------------------------------------
Models = tuple[nn.Module, list[nn.Module]]  # U-Net, text encoders


def load_models(device: torch.device) -> Models:
    """The toy in place of the checkpoint: frozen, and the same whatever --seed says."""
    with torch.random.fork_rng():
        torch.manual_seed(TOY_SEED)
        unet, text_encoders = toy_sdxl.make_unet(), toy_sdxl.make_text_encoders()
    for model in (unet, *text_encoders):
        model.requires_grad_(False).eval().to(device)
    return unet, text_encoders


def build_network(models: Models, args: Namespace) -> nn.Module:
    module, (unet, text_encoders) = importlib.import_module(args.network_module), models
    trained, given = (None, text_encoders, unet), pairs(args.network_args)  # None is the VAE
    if args.dim_from_weights:
        network, _ = module.create_network_from_weights(1, args.network_weights, *trained, **given)
    else:
        rank, alpha, dropout = args.network_dim, args.network_alpha, args.network_dropout
        given = {"neuron_dropout": dropout, "dropout": dropout, **given}
        network = module.create_network(1.0, rank, alpha, *trained, **given)
    network.apply_to(text_encoders, unet, not args.network_train_unet_only, True)
    if args.network_weights:
        network.load_weights(args.network_weights)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        network.enable_gradient_checkpointing()
    return network


def optimizer_kwargs(args: Namespace) -> dict[str, Any]:
    return {key: ast.literal_eval(text) for key, text in pairs(args.optimizer_args).items()}


def build_optimizer(network: nn.Module, args: Namespace) -> torch.optim.Optimizer:
    if (args.optimizer_type or "").lower() != "prodigy":
        sys.exit(f"error: --optimizer_type={args.optimizer_type}: the stand-in knows prodigy")
    text_lr = args.text_encoder_lr[0] if args.text_encoder_lr else None
    found = network.prepare_optimizer_params(text_lr, args.unet_lr, args.learning_rate)
    groups = found[0] if isinstance(found, tuple) else found
    return Prodigy(groups, lr=args.learning_rate, **optimizer_kwargs(args))


def build_scheduler(optimizer: torch.optim.Optimizer, args: Namespace, total: int):
    if args.lr_scheduler != "cosine":
        sys.exit(f"error: --lr_scheduler={args.lr_scheduler}: the stand-in knows cosine")
    given = args.lr_warmup_steps
    warmup = int(given * total) if isinstance(given, float) else given

    def rate(step: int) -> float:
        if step < warmup:
            return step / warmup
        done = (step - warmup) / max(1, total - warmup)
        return max(0.0, 0.5 * (1 + math.cos(math.pi * done)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


# ---- training -------------------------------------------------------------------------------
@dataclass(frozen=True)
class Run:
    args: Namespace
    accelerator: Accelerator
    models: Models
    network: nn.Module  # as accelerate wrapped it, like the next three
    optimizer: torch.optim.Optimizer
    loader: torch.utils.data.DataLoader
    scheduler: torch.optim.lr_scheduler.LRScheduler
    epochs: int
    metadata: dict[str, str]


# What is left of the image at each of SDXL's timesteps.
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, TIMESTEPS, dtype=torch.float64) ** 2
SIGNAL_SHARE = torch.cumprod(1 - BETAS, dim=0).float()


def predict_noise(run: Run, batch: dict[str, Tensor], noisy: Tensor, times: Tensor) -> Tensor:
    """The answer of the U-Net, whose inputs require gradients wherever sd-scripts' do."""
    unet, text_encoders = run.models
    with torch.set_grad_enabled(not run.args.network_train_unet_only):
        (context1, _), (context2, pooled) = (encode(batch["tokens"]) for encode in text_encoders)
    if run.args.gradient_checkpointing:
        for tensor in (*noisy, context1, context2, pooled):
            tensor.requires_grad_(True)
    context = torch.cat([context1, context2], dim=-1)
    return unet(noisy.requires_grad_(True), times, context, pooled, batch["sizes"])


def batch_loss(run: Run, batch: dict[str, Tensor]) -> Tensor:
    noise = torch.randn_like(latents := batch["latents"])
    times = torch.randint(0, TIMESTEPS, (len(latents),), device=latents.device)
    share = SIGNAL_SHARE.to(latents.device)[times][:, None, None, None]
    noisy = share.sqrt() * latents + (1 - share).sqrt() * noise
    with run.accelerator.autocast():
        predicted = predict_noise(run, batch, noisy, times)
    return nn.functional.mse_loss(predicted.float(), noise)


def train_batch(run: Run, batch: dict[str, Tensor]) -> float:
    """One batch forward and back; the loss. Ends an optimizer step if it is the last to gather."""
    with run.accelerator.accumulate(run.network):
        loss = batch_loss(run, batch)
        run.accelerator.backward(loss)
        if run.accelerator.sync_gradients:
            # The network's layers run inside the U-Net, never through the wrapper that accelerate
            # put around the network, so the wrapper does not average over the processes.
            for parameter in filter(lambda p: p.grad is not None, run.network.parameters()):
                parameter.grad = run.accelerator.reduce(parameter.grad, reduction="mean")
            if run.args.max_grad_norm:
                run.accelerator.clip_grad_norm_(run.network.parameters(), run.args.max_grad_norm)
        run.optimizer.step()
        run.scheduler.step()
        run.optimizer.zero_grad(set_to_none=True)
    return loss.item()


def train(run: Run) -> None:
    bare, (unet, text_encoders) = run.accelerator.unwrap_model(run.network), run.models
    unet.train(run.args.gradient_checkpointing)  # else it stays in eval mode
    bare.prepare_grad_etc(text_encoders, unet)
    steps, every = run.args.max_train_steps, run.args.save_every_n_steps
    here = run.accelerator.is_local_main_process
    progress, step = tqdm(total=steps, desc="steps", disable=not here), 0
    losses: deque[float] = deque(maxlen=len(run.loader))  # averaged over an epoch
    for epoch in range(run.epochs):
        run.accelerator.print(f"\nepoch {epoch + 1}/{run.epochs}")
        bare.on_epoch_start(text_encoders, unet)
        for batch in run.loader:
            losses.append(train_batch(run, batch))
            if run.accelerator.sync_gradients:
                step += 1
                progress.update(1)
                if every and step % every == 0:
                    # the epoch that is not over yet does not count, as in sd-scripts
                    save(run, f"-step{step:08d}", step, epoch)
            progress.set_postfix(avr_loss=sum(losses) / len(losses))
            if step >= steps:
                break
    progress.close()
    save(run, "", step, run.epochs)


# ---- files ----------------------------------------------------------------------------------
def save(run: Run, suffix: str, step: int, epoch: int) -> None:
    """Write the network; only the main process does, the others wait for it."""
    args = run.args
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        file = Path(args.output_dir, f"{args.output_name}{suffix}.{args.save_model_as}")
        file.parent.mkdir(parents=True, exist_ok=True)
        run.accelerator.print(f"\nsaving checkpoint: {file.as_posix()}")
        metadata = {**run.metadata, "ss_steps": str(step), "ss_epoch": str(epoch)}
        metadata["ss_training_finished_at"] = str(time.time())
        metadata["modelspec.date"] = datetime.datetime.now().isoformat(timespec="seconds")
        network = run.accelerator.unwrap_model(run.network)
        network.save_weights(str(file), SAVE_DTYPES.get(args.save_precision), metadata)
    run.accelerator.wait_for_everyone()


def dataset_metadata(subsets: list[Subset]) -> dict[str, str]:
    tags: dict[str, Counter[str]] = {}
    described, folders = [], {}
    for s in subsets:
        name, count, images = s.image_dir.name, len(s.pairs), s.repeats * len(s.pairs)
        found = (tag.strip().lower() for _, text in s.pairs for tag in text.split(","))
        tags.setdefault(name, Counter()).update(filter(None, found))
        folders[name] = {"n_repeats": s.repeats, "img_count": count}
        subset = {"img_count": count, "num_repeats": s.repeats, "image_dir": name}
        dataset = {"batch_size_per_device": s.batch_size, "num_train_images": images}
        described.append(dataset | {"resolution": s.resolution, "subsets": [subset]})
    return {
        "ss_num_train_images": str(sum(s.repeats * len(s.pairs) for s in subsets)),
        "ss_datasets": json.dumps(described),
        "ss_tag_frequency": json.dumps(tags),
        "ss_dataset_dirs": json.dumps(folders),
    }


def run_metadata(args: Namespace, **known: Any) -> dict[str, str]:
    width, height = read_resolution(args.resolution)
    given = ",".join(f"{key}={value}" for key, value in optimizer_kwargs(args).items())
    fields = {name: getattr(args, name) for name in RECORDED} | known
    fields |= {
        "optimizer": f"{Prodigy.__module__}.{Prodigy.__name__}({given})",
        "base_model_version": "sdxl_base_v1-0",
        "sd_model_name": Path(args.pretrained_model_name_or_path).name,
        "session_id": random.randrange(2**32),
        "text_encoder_lr": args.text_encoder_lr[0] if args.text_encoder_lr else None,
        "max_train_steps": args.max_train_steps,
    }
    if args.network_args:
        known = {"dropout": args.network_dropout, **pairs(args.network_args)}
        fields["network_args"] = json.dumps(known)
    return {f"ss_{key}": str(value) for key, value in fields.items()} | {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": args.output_name,
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.prediction_type": "v" if args.v_parameterization else "epsilon",
    }


# ---- main -----------------------------------------------------------------------------------
def prepare(args: Namespace) -> Run:
    started = time.time()
    # The toy's matrices are too small to share between threads, and a launcher may ask for more
    # threads than there are cores: then they mostly wait for each other.
    torch.set_num_threads(1)
    seed = random.randrange(2**32) if args.seed is None else args.seed
    set_seed(seed)
    subsets = load_subsets(args)
    # said aloud, or the processes that --multi_gpu starts on a CPU do not find each other
    how = {"cpu": not torch.cuda.is_available(), "mixed_precision": args.mixed_precision}
    gathered = args.gradient_accumulation_steps
    accelerator = Accelerator(gradient_accumulation_steps=gathered, **how)
    models = load_models(accelerator.device)
    network = build_network(models, args)
    optimizer = build_optimizer(network, args)
    loader = build_loader(subsets, args)
    # accelerate turns the schedule once for each process at every step
    scheduler = build_scheduler(optimizer, args, args.max_train_steps * accelerator.num_processes)
    prepared = accelerator.prepare(network, optimizer, loader, scheduler)
    loader = prepared[2]
    epochs = math.ceil(args.max_train_steps / math.ceil(len(loader) / gathered))
    known = {"training_started_at": started, "seed": seed, "num_epochs": epochs}
    metadata = run_metadata(args, num_batches_per_epoch=len(loader), **known)
    metadata |= dataset_metadata(subsets)
    images = sum(len(subset.pairs) for subset in subsets)
    accelerator.print(
        "running training (stand-in: toy model)\n"
        f"  images: {images}, with repeats: {metadata['ss_num_train_images']}\n"
        f"  processes: {accelerator.num_processes}, batches per epoch: {len(loader)}\n"
        f"  epochs: {epochs}, steps: {args.max_train_steps}"
    )
    return Run(args, accelerator, models, *prepared, epochs, metadata)


def setup_parser() -> ArgumentParser:  # as pre-flight asks sd-scripts for it
    return build_parser(__doc__)


def main(argv: list[str] | None = None) -> None:
    parser = setup_parser()
    args = parser.parse_args(argv)
    train_util.verify_command_line_training_args(args)
    args = train_util.read_config_from_file(args, parser)
    for name in REFUSED:
        if getattr(args, name):
            sys.exit(f"error: the stand-in does not do --{name}")
    train(run := prepare(args))
    run.accelerator.end_training()


if __name__ == "__main__":
    main()
