"""A rehearsal of a training: sd-scripts' own train(), through two steps, without the weights.

Whatever sd-scripts, LyCORIS, accelerate and the optimizer say to these options is asked of them, in
the release that is here: reading and checking of options, the dataset and its buckets, the network
on SDXL, the optimizer, the scheduler, the DataLoader, the state to resume from, two steps, and the
saves. The checkpoint is read as far as its header. The models compute nothing, and before the first
step each parameter of the network becomes a small one. What is saved goes to a scratch folder that
is gone afterwards; SDXL's tokenizers are downloaded where they are missing, as the training would.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import itertools
import math
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from blora import ROOT
from blora.preflight.base_weights import Merged, watched
from blora.preflight.checkpoint import target_of
from blora.preflight.trainer import own, own_modules
from blora.preflight.weightless import (
    BLANK,
    blank_latents,
    header_tensors,
    kept_apart,
    on_meta,
    silence_encoder,
    silence_unet,
    silence_vae,
)


class Ended(BaseException):
    """Two steps are done. A BaseException, so `except Exception` misses it."""


# The two brakes, each of which would do: the DataLoader gives so many batches once, and the U-Net
# is asked so often: two steps with accumulation, and a validation at four timesteps.
MOST_BATCHES = 8
MOST_PREDICTIONS = 40
# The rank in the steps, whatever it is in the training: 160 modules with Prodigy's state take 45
# MB. What is larger still, as the matrices of algo=full, is cut to a square.
RANK, LARGEST, SIDE = 4, 2**17, 64
# Of each number, and of the size that training has: fp16 underflows where it would.
GRADIENT = 1e-5


@dataclass
class Rehearsal:
    """How far the trainer came, and what it had built by then. None: not reached."""

    trainer: Any = None  # the script's SdxlNetworkTrainer
    args: argparse.Namespace = field(default_factory=argparse.Namespace)  # empty: not yet read
    given: dict[str, Any] = field(default_factory=dict)  # options of the command line alone
    group: Any = None  # the DatasetGroup
    validation: list[Any] = field(default_factory=list)  # datasets of the validation split
    accelerator: Any = None
    network: Any = None  # with small parameters
    modules: dict[str, int] = field(default_factory=dict)  # the network's own parameters, by module
    merged: list[Merged] = field(default_factory=list)  # of --base_weights, in their order
    optimizer_state: float | None = None  # bytes that it keeps for each byte of a parameter
    resumed: list[Resumed] = field(default_factory=list)  # of each optimizer
    ready: bool = False  # before the first batch
    predictions: int = 0  # that the U-Net was asked for
    failure: BaseException | None = None
    missing: str = ""  # what the script lacks for a rehearsal
    printed: io.StringIO = field(default_factory=io.StringIO)

    @property
    def datasets(self) -> list[Any]:
        """sd-scripts' datasets, with their pictures in buckets."""
        return list(getattr(self.group, "datasets", []))

    @property
    def optimizers(self) -> list[Any]:
        return list(getattr(self.accelerator, "_optimizers", []))


@dataclass(frozen=True)
class Resumed:
    """What a state to resume from changes of an optimizer."""

    rates: tuple[list[float], list[float]]  # of its groups, before and after
    groups: tuple[set[str], set[str]]  # names of their settings, before and after
    kept: set[str]  # names of what the state keeps of a parameter


# ---- The trainer's own modules -------------------------------------------------------------------


def as_started(script: Path, words: list[str]) -> Any:
    """A context with sys.argv and sys.path as in accelerate's process, which runs the script."""
    folder, path = script.resolve().parent, list(sys.path)
    entries = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    # The kohya_ss GUI puts its own folder there.
    is_on_path = ROOT in (folder.parent, *(Path(entry).resolve() for entry in entries))
    # Python puts the folder of this program first, where the training may not look.
    if path and Path(path[0]).resolve() == ROOT and not is_on_path:
        del path[0]
    return mock.patch.multiple(sys, argv=[str(script), *words], path=[str(folder), *path])


def scratch_open(scratch: Path) -> Callable[..., Any]:
    """Python's open(), but what is written elsewhere is discarded, as cache_info's files are."""

    def open_there(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        if set(mode) & set("wax+") and scratch not in Path(file).resolve().parents:
            file, mode = os.devnull, mode.replace("x", "w")
        return Path(file).open(mode, *args, **options)

    return open_there


def mapped_load(load: Callable[..., Any]) -> Callable[..., Any]:
    """torch.load, but tensors of a file stay there until they are used: a state may have 10 GB."""

    def load_mapped(file: Any, *args: Any, **options: Any) -> Any:
        try:
            return load(os.fspath(file), *args, **options | {"mmap": True})
        except (TypeError, RuntimeError):  # not a file's name, or no zip
            return load(file, *args, **options)

    return load_mapped


def is_safetensors(name: str) -> bool:
    """Whether sd-scripts will read the file as one, by its name."""
    target = target_of(Path(name))
    return target.is_file() and target.suffix.lower() == ".safetensors"


def keep_to(scratch: Path, args: argparse.Namespace) -> None:
    """Let the options write into `scratch` alone, upload nothing, and read no file whole.

    Pictures are read in this process: others would import torch each.
    """
    args.output_dir, args.output_name = str(scratch), Path(args.output_name or "last").name
    if getattr(args, "logging_dir", None) is not None:
        args.logging_dir = str(scratch)
    uploads = "wandb_api_key", "huggingface_repo_id", "save_state_to_huggingface"
    for name in (*uploads, "console_log_file"):
        if hasattr(args, name):
            setattr(args, name, None)
    if getattr(args, "resume_from_huggingface", False):
        args.resume = None  # it would be downloaded
    args.disable_mmap_load_safetensors = False  # it would read the whole file
    args.debug_dataset = False  # it shows pictures until a key is pressed
    if args.vae and not is_safetensors(args.vae):
        args.vae = None  # it would be read whole, or downloaded
    # sd-scripts fills an empty one.
    cache = getattr(args, "tokenizer_cache_dir", None)
    if cache and not (Path(cache).is_dir() and any(Path(cache).iterdir())):
        args.tokenizer_cache_dir = None
    if args.max_data_loader_n_workers > 0:
        args.max_data_loader_n_workers, args.persistent_data_loader_workers = 0, False


# ---- The steps -----------------------------------------------------------------------------------


def parameters_of(network: Any) -> dict[str, int]:
    """How many parameters each module of a network trains, by the module's name."""
    modules: Counter[str] = Counter()
    for name, parameter in network.named_parameters():
        modules[name.split(".")[0]] += parameter.numel()
    return dict(modules)


def trial_shape(shape: Iterable[int], rank: int | None) -> list[int]:
    """A parameter's shape at a small rank."""
    sides = [min(side, RANK) if side == rank else side for side in shape]
    return sides if math.prod(sides) <= LARGEST else [min(side, SIDE) for side in sides]


def trial_parameters(network: Any, rank: int | None, device: Any) -> dict[Any, Any]:
    """Put small parameters into a network of a rank; returns them by those that they replace.

    Of each module every second one is zero, as lora_up begins, and its only one; the others are 1.
    """
    import torch

    places: Counter[str] = Counter()
    lengths = Counter(name.split(".")[0] for name, _ in network.named_parameters())
    trials = {}
    for name, parameter in list(network.named_parameters()):
        module, (path, _, leaf) = name.split(".")[0], name.rpartition(".")
        places[module] += 1
        value = float(places[module] % 2 and lengths[module] > 1)
        shape = trial_shape(parameter.shape, rank)
        trial = torch.full(shape, value, dtype=parameter.dtype, device=device)
        trials[parameter] = torch.nn.Parameter(trial, parameter.requires_grad)
        network.get_submodule(path).register_parameter(leaf, trials[parameter])
    for name, buffer in list(network.named_buffers()):
        if buffer.is_meta:
            owner = network.get_submodule(name.rpartition(".")[0])
            zeros = torch.zeros(buffer.shape, dtype=buffer.dtype, device=device)
            setattr(owner, name.rpartition(".")[2], zeros)
    return trials


def begin_steps(rehearsal: Rehearsal, args: argparse.Namespace) -> None:
    """Before the first batch: the network and its optimizer get small parameters.

    Each step saves, at the full learning rate: a warm-up begins with none.
    """
    accelerator, rehearsal.ready = rehearsal.accelerator, True
    models = [accelerator.unwrap_model(model) for model in accelerator._models]
    rehearsal.network = next((m for m in reversed(models) if hasattr(m, "apply_to")), None)
    if rehearsal.network is None:  # deepspeed wraps it
        raise Ended
    rehearsal.modules = parameters_of(rehearsal.network)
    trials = trial_parameters(rehearsal.network, args.network_dim, accelerator.device)
    for optimizer in rehearsal.optimizers:
        optimizer.state.clear()
        for group in optimizer.param_groups:
            group["params"] = [trials.get(parameter, parameter) for parameter in group["params"]]
            group["lr"] = group.get("initial_lr", group["lr"])
    if args.save_every_n_steps != 0:  # by which the training would end
        args.save_every_n_steps = 1
    args.save_state = args.save_state or getattr(args, "save_state_on_train_end", False)
    if getattr(args, "max_validation_steps", 0) is None:
        args.max_validation_steps = 1


def prediction(rehearsal: Rehearsal) -> Any:
    """0 with a gradient for every parameter, or the end where the U-Net is asked too often.

    The loss is the squared distance from noise, so that what is predicted, 1, has a gradient of 2.
    """
    rehearsal.predictions += 1
    if rehearsal.predictions > MOST_PREDICTIONS:
        raise Ended
    total = sum(p.float().sum() for p in rehearsal.network.parameters() if p.requires_grad)
    return GRADIENT / 2 * (total - total.detach())


def state_per_byte(optimizers: Iterable[Any]) -> float:
    """Bytes that optimizers keep for each byte of a parameter."""
    import torch

    def size(tensors: Iterable[Any]) -> int:
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))

    optimizers = list(optimizers)
    trained = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    states = [state.values() for optimizer in optimizers for state in optimizer.state.values()]
    kept = [value for state in states for value in state if getattr(value, "ndim", 0)]
    return size(kept) / size(trained)


def resume(rehearsal: Rehearsal, load_state: Callable[..., Any]) -> Callable[..., Any]:
    """accelerate's load_state, which records what becomes of each optimizer."""

    def rates(optimizer: Any) -> list[float]:
        return [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]

    def names(tables: Iterable[dict[str, Any]]) -> set[str]:
        return {name for table in tables for name in table}

    def load(accelerator: Any, *args: Any, **options: Any) -> None:
        before = [(rates(o), names(o.param_groups)) for o in accelerator._optimizers]
        load_state(accelerator, *args, **options)
        for optimizer, (rate, group) in zip(accelerator._optimizers, before, strict=True):
            groups = group, names(optimizer.param_groups)
            kept = names(optimizer.state.values())
            rehearsal.resumed.append(Resumed((rate, rates(optimizer)), groups, kept))

    return load


def give_scaler(accelerator: Any) -> None:
    """fp16 has a scaler of gradients on a card; without a card accelerate makes none."""
    import torch

    if accelerator.mixed_precision == "fp16" and accelerator.scaler is None:
        accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu"), True


def rehearsing(
    rehearsal: Rehearsal, scratch: Path, kept: dict[str, Any], building: contextlib.ExitStack
) -> Any:
    """sd-scripts' SDXL trainer, which records what it is given and computes nothing.

    `kept` are the options that only the rehearsal has otherwise. What is created from its models on
    is on the meta device until `building` is closed.
    """

    trainer: Any = rehearsal.trainer

    class Rehearsing(trainer):
        def assert_extra_args(self, args: argparse.Namespace, group: Any, *others: Any) -> None:
            rehearsal.group = group
            rehearsal.validation = [d for each in others if each for d in each.datasets]
            for each in (item for item in (group, *others) if item is not None):
                each.cache_latents = each.new_cache_latents = partial(blank_latents, each)
            super().assert_extra_args(args, group, *others)
            rehearsal.args = argparse.Namespace(**vars(args) | kept)

        def load_target_model(self, args: Any, *others: Any) -> Any:
            accelerator = rehearsal.accelerator = others[-1]
            give_scaler(accelerator)
            blank = scratch / BLANK
            blank.touch()
            if not is_safetensors(args.pretrained_model_name_or_path or ""):
                args.pretrained_model_name_or_path = str(blank)
            building.enter_context(on_meta())
            version, encoders, vae, unet = super().load_target_model(args, *others)
            # For the metadata they would be read whole.
            args.pretrained_model_name_or_path, args.vae = str(blank), None
            silence_unet(unet, partial(prediction, rehearsal))
            silence_vae(vae)
            for encoder in encoders:
                silence_encoder(encoder)
            return version, encoders, vae, unet

        def cache_text_encoder_outputs_if_needed(self, *args: Any, **options: Any) -> None:
            """They would be computed here."""

        def sample_images(self, *args: Any, **options: Any) -> None:
            """They would be drawn here."""

    return Rehearsing()


def brakes(
    rehearsal: Rehearsal, args: argparse.Namespace, end_building: Callable[[], None]
) -> dict[Any, dict[str, Any]]:
    """What stands in place of methods of accelerate and torch, by their class.

    The optimizer is the last that is created of what the network's parameters are in. The
    DataLoader gives two batches a step, and once.
    """
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    prepare, iterate, used = Accelerator.prepare, DataLoader.__iter__, set()
    number = min(2 * args.gradient_accumulation_steps, MOST_BATCHES)
    number += getattr(args, "skip_until_initial_step", False)

    def prepare_built(accelerator: Any, *items: Any, **options: Any) -> Any:
        prepared = prepare(accelerator, *items, **options)
        if accelerator._optimizers:
            end_building()
        return prepared

    def begin(*_args: Any, **_options: Any) -> None:
        if not rehearsal.ready:
            begin_steps(rehearsal, args)

    def two_steps(loader: Any) -> Iterator[Any]:
        begin()
        if loader.dataset is rehearsal.group and id(loader) in used:
            raise Ended
        used.add(id(loader))
        yield from itertools.islice(iterate(loader), number)

    load_state = resume(rehearsal, Accelerator.load_state)
    methods = {"prepare": prepare_built, "load_state": load_state, "init_trackers": begin}
    return {Accelerator: methods, DataLoader: {"__iter__": two_steps}}


def uncompiled(model: Any = None, *_args: Any, **_options: Any) -> Any:
    """torch.compile, also as a decorator: two steps of nothing need none."""
    return (lambda function: function) if model is None else model


def train(rehearsal: Rehearsal) -> None:
    """sd-scripts' train() through two steps; raises whatever it raises."""
    import safetensors.torch
    import torch

    args = argparse.Namespace(**vars(rehearsal.args))
    with contextlib.ExitStack() as stack:
        temporary = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        scratch = Path(stack.enter_context(temporary)).resolve()
        building = stack.enter_context(contextlib.ExitStack())
        keep_to(scratch, args)
        kept = {n: given for n, given in vars(rehearsal.args).items() if getattr(args, n) != given}

        def end_building() -> None:
            building.close()
            stack.enter_context(kept_apart())

        replaced = list(brakes(rehearsal, args, end_building).items())
        replaced += [(module, {"open": scratch_open(scratch)}) for module in own_modules()]
        replaced += [
            (module, {"load_file": header_tensors})
            for module in list(sys.modules.values())
            if getattr(module, "__dict__", {}).get("load_file") is safetensors.torch.load_file
        ]
        if args.base_weights:
            stack.enter_context(watched(args, rehearsal.merged))
        replaced.append((torch, {"load": mapped_load(torch.load), "compile": uncompiled}))
        for owner, values in replaced:
            stack.enter_context(mock.patch.multiple(owner, create=True, **values))
        try:
            rehearsing(rehearsal, scratch, kept, building).train(args)
        except Ended:
            pass
        finally:
            if rehearsal.predictions:
                rehearsal.optimizer_state = state_per_byte(rehearsal.optimizers)


@contextlib.contextmanager
def trainer_environment(path: Path, words: list[str]) -> Iterator[Rehearsal]:
    """Where a rehearsal runs: as accelerate starts the script, with its output kept, not shown."""
    rehearsal = Rehearsal()
    os.environ.setdefault("COLUMNS", "1000")  # sd-scripts' log would be wrapped, and is searched
    with (
        as_started(path, words),
        contextlib.redirect_stdout(rehearsal.printed),
        contextlib.redirect_stderr(rehearsal.printed),
    ):
        yield rehearsal


def read_options(path: Path, words: list[str], rehearsal: Rehearsal) -> None:
    """Import the training script, and read the options as it reads and checks them itself.

    What it raises becomes the rehearsal's failure.
    """
    if not (path.parent / "library").is_dir():
        rehearsal.missing = f'"{path}" is not part of sd-scripts'
        return
    try:
        script = importlib.import_module(path.stem)
        if not hasattr(script, "setup_parser"):
            rehearsal.missing = f'"{path}" is not a training script of sd-scripts'
            return
        rehearsal.trainer = getattr(script, "SdxlNetworkTrainer", None)
        verify = own("verify_command_line_training_args", script)
        read_file = own("read_config_from_file", script)
    except AttributeError as lacking:  # of a later release
        rehearsal.missing = str(lacking)
        return
    except (Exception, SystemExit) as failure:
        rehearsal.failure = failure
        return
    try:
        parser = script.setup_parser()
        args = parser.parse_args(words)
        args.output_config = False  # it would write a config and exit
        verify(args)
        rehearsal.args = read_file(args, parser)
        for action in parser._actions:
            action.default = argparse.SUPPRESS
        rehearsal.given = vars(parser.parse_args(words))
    except (Exception, SystemExit) as failure:
        rehearsal.failure = failure


def rehearse(path: Path, rehearsal: Rehearsal) -> None:
    """Let sd-scripts train with the options, two steps.

    What it raises becomes the rehearsal's failure.
    """
    if rehearsal.trainer is None:
        rehearsal.missing = f'"{path.absolute()}" does not train a LoRA of SDXL'
        return
    try:
        train(rehearsal)
    except (Exception, SystemExit) as failure:
        rehearsal.failure = failure
