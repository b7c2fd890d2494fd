"""A rehearsal of a training: sd-scripts' own train(), up to its first step, without the weights.

Whatever sd-scripts, LyCORIS, accelerate and the optimizer say to these options is asked of them, in
the release that is here: reading and checking of options, the dataset and its buckets, the network
on SDXL, the optimizer, the scheduler, the DataLoader. The checkpoint is read as far as its header,
and its tensors are torch's meta tensors, which have a shape and no numbers. Nothing is computed,
cached or written, but that SDXL's tokenizers are downloaded where they are missing, as the training
would.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from blora import ROOT
from blora.preflight.checkpoint import target_of


class Ready(BaseException):
    """The trainer is about to train. A BaseException, so `except Exception` misses it."""


# What train() calls of accelerate's Accelerator before it reads the first batch, and the batch: a
# release that drops one of them is stopped at the next.
BRAKES = ("register_load_state_pre_hook", "init_trackers")
FIRST_BATCH = "__iter__"  # of torch's DataLoader


@dataclass
class Rehearsal:
    """How far the trainer came, and what it had built by then. None: not reached."""

    trainer: Any = None  # the script's SdxlNetworkTrainer
    args: argparse.Namespace = field(default_factory=argparse.Namespace)  # empty: not yet read
    given: dict[str, Any] = field(default_factory=dict)  # options of the command line alone
    group: Any = None  # the DatasetGroup
    validation: list[Any] = field(default_factory=list)  # datasets of the validation split
    accelerator: Any = None
    network: Any = None
    optimizer_state: float | None = None  # bytes that it keeps for each byte of a parameter
    ready: bool = False
    failure: BaseException | None = None
    missing: str = ""  # what the script lacks for a rehearsal
    printed: io.StringIO = field(default_factory=io.StringIO)

    @property
    def datasets(self) -> list[Any]:
        """sd-scripts' datasets, with their pictures in buckets."""
        return list(getattr(self.group, "datasets", []))


# ---- Tensors without numbers ---------------------------------------------------------------------


def header_tensors(path: str | os.PathLike[str], *_args: Any, **_options: Any) -> dict[str, Any]:
    """A .safetensors file's tensors on the meta device, in place of safetensors' load_file.

    A single number, such as an alpha, is read: LyCORIS uses its value.
    """
    import torch
    from safetensors import safe_open

    tensors = {}
    # In on_meta(), a tensor that is read would become a meta tensor.
    with safe_open(path, framework="pt") as file, torch.device("cpu"):
        for name in file.keys():  # noqa: SIM118
            part = file.get_slice(name)
            shape = part.get_shape()
            if all(side == 1 for side in shape):
                tensors[name] = file.get_tensor(name)
            else:
                tensors[name] = torch.empty(shape, dtype=part[:0].dtype, device="meta")
    return tensors


def on_meta() -> contextlib.ExitStack:
    """New tensors are meta tensors, and stay so when they are moved to another device."""
    import torch
    from torch.overrides import TorchFunctionMode

    def no_device(value: Any) -> Any:
        is_device = isinstance(value, (str, torch.device)) or type(value) is int
        return "meta" if is_device else value

    class KeepOnMeta(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            kwargs = kwargs or {}
            # Of a number: an alpha, whose value LyCORIS reads.
            if func is torch.tensor:
                kwargs.setdefault("device", "cpu")
            if func in (torch.Tensor.cpu, torch.Tensor.cuda) and args[0].is_meta:
                return args[0]
            if func is torch.Tensor.to and args[0].is_meta:
                args = (args[0], *map(no_device, args[1:]))
                kwargs = {name: no_device(value) for name, value in kwargs.items()}
            return func(*args, **kwargs)

    stack = contextlib.ExitStack()
    stack.enter_context(torch.device("meta"))
    stack.enter_context(KeepOnMeta())
    return stack


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


def open_to_read(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
    """Python's open(), but writes are discarded: `cache_info` writes beside the pictures."""
    if set(mode) & set("wax+"):
        file, mode = os.devnull, mode.replace("x", "w")
    return Path(file).open(mode, *args, **options)


def raise_ready(*_args: Any, **_options: Any) -> None:
    """In place of each of BRAKES, and of FIRST_BATCH."""
    raise Ready


def nothing(*_args: Any, **_options: Any) -> None:
    """In place of caching."""


def blank_models(sdxl: ModuleType) -> Callable[..., Any]:
    """sd-scripts' loader for a checkpoint that is no .safetensors file: weights stay empty."""

    def load(name: str, vae: Any, version: str, *_args: Any, **_options: Any) -> tuple[Any, ...]:
        with (
            mock.patch.multiple(
                sdxl,
                load_file=lambda *_args, **_options: {},
                _load_state_dict_on_device=nothing,
                convert_sdxl_text_encoder_2_checkpoint=lambda *_args, **_options: ({}, None),
            ),
            mock.patch.object(sdxl.model_util, "convert_ldm_vae_checkpoint", lambda *_args: {}),
        ):
            return True, *sdxl.load_models_from_sdxl_checkpoint(
                version, "blank.safetensors", "meta"
            )

    return load


def is_safetensors(name: str) -> bool:
    """Whether sd-scripts will read the file as one, by its name."""
    target = target_of(Path(name))
    return target.is_file() and target.suffix.lower() == ".safetensors"


def rehearsing(trainer: Any, rehearsal: Rehearsal, stack: contextlib.ExitStack) -> Any:
    """sd-scripts' SDXL trainer, which records what it is given and loads no weights."""

    class Rehearsing(trainer):
        def assert_extra_args(self, args: argparse.Namespace, group: Any, *others: Any) -> None:
            for each in (group, *others):
                for name in ("cache_latents", "new_cache_latents"):
                    if each is not None:
                        setattr(each, name, nothing)
            rehearsal.group = group
            rehearsal.validation = [d for each in others if each for d in each.datasets]
            super().assert_extra_args(args, group, *others)

        def load_target_model(self, args: Any, weight_dtype: Any, accelerator: Any) -> Any:
            rehearsal.accelerator = accelerator
            stack.enter_context(on_meta())
            return super().load_target_model(args, weight_dtype, accelerator)

        def cache_text_encoder_outputs_if_needed(self, *args: Any, **options: Any) -> None:
            """They would be computed here."""

    return Rehearsing()


def disable_side_effects(args: argparse.Namespace, folder: str) -> None:
    """Turn off writes and uploads, and what reads whole files; logs go to `folder`."""
    if getattr(args, "logging_dir", None) is not None:
        args.logging_dir = folder
    for name in ("wandb_api_key", "console_log_file"):
        if hasattr(args, name):
            setattr(args, name, None)
    args.disable_mmap_load_safetensors = False  # it would read the whole file
    args.debug_dataset = False  # it shows pictures until a key is pressed
    if args.vae and not is_safetensors(args.vae):
        args.vae = None  # it would be read whole, or downloaded
    # sd-scripts fills an empty one.
    cache = getattr(args, "tokenizer_cache_dir", None)
    if cache and not (Path(cache).is_dir() and any(Path(cache).iterdir())):
        args.tokenizer_cache_dir = None


def train(rehearsal: Rehearsal) -> None:
    """sd-scripts' train() up to its first step; raises whatever it raises."""
    import safetensors.torch
    from accelerate import Accelerator
    from library import model_util, sdxl_model_util, sdxl_train_util, train_util
    from torch.utils.data import DataLoader

    args = rehearsal.args
    with contextlib.ExitStack() as stack:
        disable_side_effects(args, stack.enter_context(tempfile.TemporaryDirectory()))
        for owner, values in (
            (Accelerator, dict.fromkeys(BRAKES, raise_ready)),
            (DataLoader, {FIRST_BATCH: raise_ready}),
            (safetensors.torch, {"load_file": header_tensors}),
            (sdxl_model_util, {"load_file": header_tensors}),
            (model_util, {"load_file": header_tensors}),
            (sys.modules[train_util.DreamBoothDataset.__module__], {"open": open_to_read}),
        ):
            stack.enter_context(mock.patch.multiple(owner, create=True, **values))
        if not is_safetensors(args.pretrained_model_name_or_path or ""):
            loader = blank_models(sdxl_model_util)
            stack.enter_context(mock.patch.object(sdxl_train_util, "_load_target_model", loader))
        try:
            rehearsing(rehearsal.trainer, rehearsal, stack).train(args)
            return  # it came back without training
        except Ready:
            rehearsal.ready = True
    models = [rehearsal.accelerator.unwrap_model(m) for m in rehearsal.accelerator._models]
    rehearsal.network = next((m for m in reversed(models) if hasattr(m, "apply_to")), None)


def state_per_byte(args: argparse.Namespace) -> float:
    """Bytes that the optimizer keeps for each byte of a LoRA, counted after a step on two matrices.

    TypeError or ValueError where it refuses --optimizer_args only now, as it would in the training.
    """
    import torch
    from library import train_util

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if args.full_bf16 else torch.float16 if args.full_fp16 else torch.float32
    # As a LoRA begins: lora_down is not zero, lora_up is, and Prodigy keeps less for zeros.
    start = torch.ones(256, 256, device=device, dtype=dtype)
    parameters = [torch.nn.Parameter(start), torch.nn.Parameter(start * 0)]
    optimizer = train_util.get_optimizer(args, parameters)[2]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    if hasattr(optimizer, "train"):  # schedule-free ones refuse a step without
        optimizer.train()
    optimizer.step()
    kept = [value for state in optimizer.state.values() for value in state.values()]
    size = sum(v.numel() * v.element_size() for v in kept if isinstance(v, torch.Tensor) and v.ndim)
    ratio: float = size / sum(p.numel() * p.element_size() for p in parameters)
    return ratio


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
    if not (path.parent / "library" / "train_util.py").is_file():
        rehearsal.missing = f'"{path}" is not part of sd-scripts'
        return
    try:
        script = importlib.import_module(path.stem)
        if not hasattr(script, "setup_parser"):
            rehearsal.missing = f'"{path}" is not a training script of sd-scripts'
            return
        from library import train_util

        rehearsal.trainer = getattr(script, "SdxlNetworkTrainer", None)
        parser = script.setup_parser()
        args = parser.parse_args(words)
        args.output_config = False  # it would write a config and exit
        train_util.verify_command_line_training_args(args)
        rehearsal.args = train_util.read_config_from_file(args, parser)
        for action in parser._actions:
            action.default = argparse.SUPPRESS
        rehearsal.given = vars(parser.parse_args(words))
    except (Exception, SystemExit) as failure:
        rehearsal.failure = failure


def rehearse(path: Path, rehearsal: Rehearsal) -> None:
    """Let sd-scripts train with the options as far as its first step.

    What it raises becomes the rehearsal's failure.
    """
    if rehearsal.trainer is None:
        rehearsal.missing = f'"{path.absolute()}" does not train a LoRA of SDXL'
        return
    try:
        train(rehearsal)
    except (Exception, SystemExit) as failure:
        rehearsal.failure = failure
