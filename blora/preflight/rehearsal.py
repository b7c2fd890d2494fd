"""A rehearsal of a training: sd-scripts' own train(), up to its first step, without the weights.

blora_preflight.py asks it. Whatever sd-scripts, LyCORIS, accelerate and the optimizer say to these
options is asked of them, in the release that is here, and not known by heart: reading and checking
of arguments, the dataset and its buckets, the network on SDXL, the optimizer, the scheduler, the
DataLoader. The checkpoint is read as far as its header, and its tensors are torch's meta tensors,
which have a shape and no numbers. Nothing is computed, cached or written, but that SDXL's
tokenizers are fetched where they are not yet, as the training would.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import io
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from blora import ROOT
from blora.preflight.checkpoint import target_of


class Ready(BaseException):
    """The trainer is about to train. It is no Exception, so that nobody on the way catches it."""


@dataclass
class Rehearsal:
    """How far it came, and what the trainer had made by then; None is what it did not come to."""

    args: argparse.Namespace | None = None  # after all of sd-scripts' own checks
    group: Any = None  # the DatasetGroup
    validation: list[Any] = field(default_factory=list)  # datasets of pictures kept back
    accelerator: Any = None
    network: Any = None
    optimizer_state: float | None = None  # bytes that it keeps for each byte of a parameter
    ready: bool = False
    failure: BaseException | None = None
    missing: str = ""  # what sd-scripts lacks for a rehearsal
    printed: io.StringIO = field(default_factory=io.StringIO)

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups, with their learning rates."""
        optimizers = getattr(self.accelerator, "_optimizers", [])
        return [group for optimizer in optimizers for group in optimizer.param_groups]

    @property
    def datasets(self) -> list[Any]:
        """sd-scripts' datasets, with their pictures in buckets."""
        return list(getattr(self.group, "datasets", []))


# ---- Tensors without numbers ---------------------------------------------------------------------


def header_tensors(path: str | os.PathLike, *_args: Any, **_options: Any) -> dict[str, Any]:
    """A .safetensors file's tensors on the meta device, in place of safetensors' load_file.

    A single number, such as an alpha, is read: LyCORIS asks for its value.
    """
    import torch
    from safetensors import safe_open

    tensors = {}
    # Amid meta tensors, what is read would become one.
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
    """New tensors are meta tensors, and no move to another device makes them anything else."""
    import torch
    from torch.overrides import TorchFunctionMode

    def stays(value: Any) -> Any:
        is_device = isinstance(value, (str, torch.device)) or type(value) is int
        return "meta" if is_device else value

    class Staying(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            # Made of a number that is there: an alpha, whose value is asked for.
            if func is torch.tensor:
                kwargs.setdefault("device", "cpu")
            if func in (torch.Tensor.cpu, torch.Tensor.cuda) and args[0].is_meta:
                return args[0]
            if func is torch.Tensor.to and args[0].is_meta:
                args = (args[0], *map(stays, args[1:]))
                kwargs = {name: stays(value) for name, value in kwargs.items()}
            return func(*args, **kwargs)

    stack = contextlib.ExitStack()
    stack.enter_context(torch.device("meta"))
    stack.enter_context(Staying())
    return stack


# ---- The trainer's own modules -------------------------------------------------------------------


@contextlib.contextmanager
def as_started(script: Path, words: list[str]) -> Iterator[None]:
    """sys.argv and sys.path as accelerate's process has them, which runs the script as a file."""
    argv, path = sys.argv, list(sys.path)
    entries = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    # The kohya_ss GUI puts its own folder there.
    is_on_path = ROOT in (script.resolve().parent.parent, *(Path(e).resolve() for e in entries))
    sys.argv = [str(script), *words]
    # Python puts the folder of the program first: ours, where the training may not look.
    if sys.path and Path(sys.path[0]).resolve() == ROOT and not is_on_path:
        del sys.path[0]
    sys.path.insert(0, str(script.resolve().parent))
    try:
        yield
    finally:
        sys.argv, sys.path[:] = argv, path


@contextlib.contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Attributes of a module or class, for as long as it takes."""
    kept = {name: owner.__dict__[name] for name in values if name in owner.__dict__}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name in values:
            if name in kept:
                setattr(owner, name, kept[name])
            else:
                delattr(owner, name)


def open_to_read(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
    """Python's open(), but what is written is lost: `cache_info` writes beside the pictures."""
    if set(mode) & set("wax+"):
        file, mode = os.devnull, mode.replace("x", "w")
    return Path(file).open(mode, *args, **options)


def say_ready(*_args: Any, **_options: Any) -> None:
    """In place of the last that train() calls before it reads a state or computes."""
    raise Ready


def nothing(*_args: Any, **_options: Any) -> None:
    """In place of caching."""


def blank_models(sdxl: ModuleType) -> Callable[..., Any]:
    """sd-scripts' loader for a checkpoint that is no .safetensors file: nothing is filled in."""

    def load(name: str, vae: Any, version: str, *_args: Any, **_options: Any) -> tuple[Any, ...]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(
                replaced(
                    sdxl,
                    load_file=lambda *_args, **_options: {},
                    _load_state_dict_on_device=nothing,
                    convert_sdxl_text_encoder_2_checkpoint=lambda *_args, **_options: ({}, None),
                )
            )
            stack.enter_context(
                replaced(sdxl.model_util, convert_ldm_vae_checkpoint=lambda *_args: {})
            )
            models = sdxl.load_models_from_sdxl_checkpoint(version, "blank.safetensors", "meta")
        return (True, *models)

    return load


def is_safetensors(name: str) -> bool:
    """Whether sd-scripts will read it as one, by its name."""
    target = target_of(Path(name))
    return target.is_file() and target.suffix.lower() == ".safetensors"


def rehearsing(script: ModuleType, rehearsal: Rehearsal, stack: contextlib.ExitStack) -> Any:
    """sd-scripts' SDXL trainer, which notes what it is handed and loads no weights."""

    class Rehearsing(script.SdxlNetworkTrainer):
        def assert_extra_args(self, args, group, *others):
            for each in (group, *others):
                for name in ("cache_latents", "new_cache_latents"):
                    if each is not None:
                        setattr(each, name, nothing)
            rehearsal.group = group
            rehearsal.validation = [d for each in others if each for d in each.datasets]
            super().assert_extra_args(args, group, *others)

        def load_target_model(self, args, weight_dtype, accelerator):
            rehearsal.accelerator = accelerator
            stack.enter_context(on_meta())
            return super().load_target_model(args, weight_dtype, accelerator)

        def cache_text_encoder_outputs_if_needed(self, *args, **options):
            """They would be computed here."""

    return Rehearsing()


def parse(script: ModuleType, words: list[str]) -> argparse.Namespace:
    """The options as sd-scripts reads and checks them."""
    from library import train_util

    parser = script.setup_parser()
    args = parser.parse_args(words)
    args.output_config = False  # it would write one and end
    train_util.verify_command_line_training_args(args)
    return train_util.read_config_from_file(args, parser)


def harmless(args: argparse.Namespace, folder: str) -> None:
    """What would be written or told to others is not."""
    if getattr(args, "logging_dir", None) is not None:
        args.logging_dir = folder
    for name in ("wandb_api_key", "console_log_file"):
        if hasattr(args, name):
            setattr(args, name, None)
    # Read at once, the file would be read to its end.
    args.disable_mmap_load_safetensors = False
    args.debug_dataset = False  # it shows pictures until somebody presses a key
    if args.vae and not is_safetensors(args.vae):
        args.vae = None  # it would be read to its end, or fetched
    # sd-scripts fills an empty one.
    cache = getattr(args, "tokenizer_cache_dir", None)
    if cache and not (Path(cache).is_dir() and any(Path(cache).iterdir())):
        args.tokenizer_cache_dir = None


# ---- The rehearsal -------------------------------------------------------------------------------


def train(script: ModuleType, rehearsal: Rehearsal, words: list[str]) -> None:
    """sd-scripts' train() up to its first step; raises whatever it raises."""
    import safetensors.torch
    from accelerate import Accelerator
    from library import model_util, sdxl_model_util, sdxl_train_util, train_util

    rehearsal.args = args = parse(script, words)
    dataset_module = inspect.getmodule(train_util.DreamBoothDataset)
    with contextlib.ExitStack() as stack:
        harmless(args, stack.enter_context(tempfile.TemporaryDirectory(prefix="blora-")))
        for owner, values in (
            (Accelerator, {"register_load_state_pre_hook": say_ready}),
            (safetensors.torch, {"load_file": header_tensors}),
            (sdxl_model_util, {"load_file": header_tensors}),
            (model_util, {"load_file": header_tensors}),
            (dataset_module, {"open": open_to_read}),
        ):
            stack.enter_context(replaced(owner, **values))
        if not is_safetensors(args.pretrained_model_name_or_path or ""):
            loader = blank_models(sdxl_model_util)
            stack.enter_context(replaced(sdxl_train_util, _load_target_model=loader))
        try:
            rehearsing(script, rehearsal, stack).train(args)
            return  # it came back without training
        except Ready:
            rehearsal.ready = True
    models = [rehearsal.accelerator.unwrap_model(m) for m in rehearsal.accelerator._models]
    rehearsal.network = next((m for m in reversed(models) if hasattr(m, "apply_to")), None)


def try_optimizer(args: argparse.Namespace) -> float:
    """One step of the optimizer on two matrices; the bytes it then keeps for each of theirs."""
    import torch
    from library import train_util

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if args.full_bf16 else torch.float16 if args.full_fp16 else torch.float32
    # As a LoRA begins: lora_down is not zero, lora_up is, and Prodigy keeps less of what is.
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
    return size / sum(p.numel() * p.element_size() for p in parameters)


def rehearse(script: Path, words: list[str]) -> Rehearsal:
    """Let sd-scripts come as far as its first step with these options.

    Catches whatever it raises; what it prints is kept and not shown.
    """
    rehearsal = Rehearsal()
    if not (script.parent / "library" / "train_util.py").is_file():
        rehearsal.missing = f'"{script}" is not sd-scripts\' own'
        return rehearsal
    printed = rehearsal.printed
    os.environ.setdefault("COLUMNS", "1000")  # sd-scripts' log would be wrapped, and is searched
    with (
        as_started(script, words),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        try:
            module = importlib.import_module(script.stem)
            if not hasattr(module, "SdxlNetworkTrainer"):
                rehearsal.missing = f'"{script}" does not train a LoRA of SDXL'
                return rehearsal
            train(module, rehearsal, words)
            if rehearsal.ready and not rehearsal.args.deepspeed:
                rehearsal.optimizer_state = try_optimizer(rehearsal.args)
        except (Exception, SystemExit) as failure:
            rehearsal.failure = failure
    return rehearsal
