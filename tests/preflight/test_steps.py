"""Two steps of a training, rehearsed with real accelerate, LyCORIS and optimizers.

The trainer here calls what sd-scripts' train() calls, in its order; sd-scripts itself is rehearsed
by test_real_kohya.py and test_real_cases.py.
"""

from __future__ import annotations

import itertools
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import prodigyopt
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from lycoris.kohya import create_network
from reports import reported
from torch import nn
from torch.optim import SGD, Adafactor, Adamax, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset

from blora.preflight import rehearsal as rehearsals
from blora.preflight.rehearsal import Rehearsal, Resumed
from blora.preflight.report import Report
from blora.preflight.steps import check_steps, is_unknown, is_without_weights, other_optimizer

RANK = 8
OPTIONS: dict[str, Any] = {
    "output_dir": "_out",
    "output_name": "hero",
    "vae": None,
    "base_weights": None,
    "debug_dataset": False,
    "disable_mmap_load_safetensors": False,
    "pretrained_model_name_or_path": "x.ckpt",
    "max_data_loader_n_workers": 2,
    "persistent_data_loader_workers": True,
    "gradient_accumulation_steps": 1,
    "mixed_precision": "no",
    "full_fp16": False,
    "full_bf16": False,
    "optimizer_type": "Prodigy",
    "optimizer": lambda parameters: prodigyopt.Prodigy(parameters, lr=1.0),
    "network_dim": RANK,
    "algo": "lora",
    "warmup": 0,
    "resume": None,
    "save_state": False,
    "save_every_n_steps": None,
    "epochs": 100,
}


class Transformer2DModel(nn.ModuleDict):
    """A class that LyCORIS trains, as wide as in SDXL."""

    def __init__(self) -> None:
        super().__init__({name: nn.Linear(1280, 1280) for name in ("to_q", "to_k")})


class Pictures(Dataset):
    """A DatasetGroup of five batches."""

    def __init__(self) -> None:
        self.datasets = [Namespace(image_data={})]

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> int:
        return index


class Trainer:
    """sd-scripts' trainer, in brief."""

    def assert_extra_args(self, args: Namespace, *groups: Any) -> None:
        args.completed = True

    def load_target_model(self, *_: Any) -> tuple[str, list[Any], Any, Any]:
        unet = nn.ModuleDict({"first": nn.Conv2d(4, 320, 3), "block": Transformer2DModel()})
        return "sdxl", [nn.Module(), nn.Module()], Namespace(), unet

    def batches(self, loader: DataLoader) -> Any:
        """What an epoch goes through."""
        return loader

    def loss(self, unet: nn.Module) -> torch.Tensor:
        noise = torch.randn(1, 4, 8, 8)
        return (unet(noise, 0, None, None) - noise).square().mean()

    def train(self, args: Namespace) -> None:
        group = Pictures()
        self.assert_extra_args(args, group, None)
        AcceleratorState._reset_state(reset_partial_state=True)
        given = {name: getattr(args, name) for name in ("gradient_accumulation_steps",)}
        accelerator = Accelerator(cpu=True, mixed_precision=args.mixed_precision, **given)
        _, encoders, vae, unet = self.load_target_model(args, torch.float32, accelerator)
        group.new_cache_latents(vae, accelerator)
        network = create_network(1.0, args.network_dim, RANK, vae, encoders, unet, algo=args.algo)
        network.apply_to(encoders, unet, False, True)
        optimizer = args.optimizer(network.parameters())
        loader = DataLoader(group, shuffle=True)
        scheduler = LambdaLR(optimizer, lambda step: min(1, step / max(1, args.warmup)))
        if args.full_fp16:
            network.half()
        unet = accelerator.prepare(unet)
        prepared = accelerator.prepare(network, optimizer, loader, scheduler)
        network, optimizer, loader, scheduler = prepared
        if args.full_fp16:  # torch refuses gradients in fp16, and sd-scripts does not
            unscale = accelerator.scaler._unscale_grads_
            accelerator.scaler._unscale_grads_ = lambda *given: unscale(*given[:3], True)
        accelerator.register_save_state_pre_hook(lambda models, weights, _: weights.pop(0))
        accelerator.register_load_state_pre_hook(lambda models, _: models.pop(0))
        if args.resume:
            accelerator.load_state(args.resume)
        accelerator.init_trackers("network_train")
        self.steps(args, accelerator, unet, *prepared)

    def steps(
        self,
        args: Namespace,
        accelerator: Accelerator,
        unet: nn.Module,
        network: Any,
        optimizer: Any,
        loader: Any,
        scheduler: Any,
    ) -> None:
        step = 0
        for _ in range(args.epochs):
            for _ in self.batches(loader):
                with accelerator.accumulate(network):
                    accelerator.backward(self.loss(unet))
                    accelerator.clip_grad_norm_(network.parameters(), 1.0)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad(set_to_none=True)
                step += accelerator.sync_gradients
                if args.save_every_n_steps and step % args.save_every_n_steps == 0:
                    network.save_weights(Path(args.output_dir, f"{step}.safetensors"), None, {})
                    if args.save_state:
                        accelerator.save_state(str(Path(args.output_dir, f"{step}-state")))


def rehearsed(trainer: type = Trainer, **options: Any) -> Rehearsal:
    """The rehearsal of a training with these options."""
    rehearsal = Rehearsal(trainer, Namespace(**OPTIONS | options))
    rehearsals.rehearse(Path("sdxl_train_network.py"), rehearsal)
    return rehearsal


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch) -> Path:
    """Where temporary folders are made; the working directory is another."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


# ---- Through two steps ---------------------------------------------------------------------------


def test_a_rehearsal_takes_two_steps_and_leaves_nothing(scratch):
    saved: list[str] = []

    class Saving(Trainer):
        def batches(self, loader: DataLoader) -> Iterator[Any]:
            for batch in loader:
                yield batch
                saved.extend(path.name for path in scratch.glob("*/*.safetensors"))

    rehearsal = rehearsed(Saving)
    assert rehearsal.failure is None
    assert (rehearsal.ready, rehearsal.predictions) == (True, 2)
    assert {"1.safetensors", "2.safetensors"} <= set(saved)
    assert list(scratch.iterdir()) == []
    assert [path.name for path in Path().iterdir()] == ["temporary"]
    assert reported(check_steps, rehearsal) == Report()


def test_the_options_come_back_as_they_were_given_and_completed():
    rehearsal = rehearsed()
    assert vars(rehearsal.args) == OPTIONS | {"completed": True}


@pytest.mark.parametrize("rank", [2, 512])
def test_the_networks_own_parameters_are_counted_whatever_the_rank(rank):
    rehearsal = rehearsed(network_dim=rank)
    assert rehearsal.modules == {f"lora_unet_block_to_{layer}": 2560 * rank for layer in "qk"}
    sizes = {parameter.shape for parameter in rehearsal.network.parameters()}
    assert sizes == {(min(rank, 4), 1280), (1280, min(rank, 4))}


OPTIMIZERS: dict[str, tuple[Callable[[Any], Optimizer], float]] = {
    "SGD": (lambda p: SGD(p, 1e-3), 0),
    "AdamW": (lambda p: AdamW(p, 1e-4), 2),  # and its count of steps, which is a number
    "Adafactor": (lambda p: Adafactor(p, 1e-3), (4 + 1280) / (4 * 1280)),  # a row and a column
    "Prodigy": (OPTIONS["optimizer"], 3.5),  # no p0 of zeros
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_an_optimizer_keeps_is_counted_after_its_steps(name):
    optimizer, expected = OPTIMIZERS[name]
    rehearsal = rehearsed(optimizer=optimizer)
    assert rehearsal.optimizer_state == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("algo", "lora loha lokr dylora full ia3 glora diag-oft".split())
def test_every_algorithm_takes_its_steps(algo):
    rehearsal = rehearsed(algo=algo)
    assert rehearsal.predictions
    # It saves how far it is from the weights, which are not there.
    assert is_without_weights(rehearsal) == (algo == "full")
    assert reported(check_steps, rehearsal) == Report()


# ---- What they show ------------------------------------------------------------------------------

FULL_FP16 = {"full_fp16": True, "mixed_precision": "fp16"}
LOST = "2 of 2 modules {} in two rehearsed steps, with --optimizer_type={}: {}"


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"mixed_precision": "fp16"}, ""),
        ({"warmup": 1000}, ""),
        ({"gradient_accumulation_steps": 4}, ""),
        (
            FULL_FP16,
            LOST.format(
                "learn nothing",
                "Prodigy at a learning rate of 1 in --full_fp16",
                "remove --full_fp16",
            ),
        ),
        (
            {**FULL_FP16, "optimizer": OPTIMIZERS["AdamW"][0], "optimizer_type": None},
            LOST.format(
                "become NaN or infinite",
                "AdamW at a learning rate of 0.0001 in --full_fp16",
                "remove --full_fp16",
            ),
        ),
        (
            {"optimizer": lambda p: SGD(p, 0.0), "optimizer_type": "SGD"},
            LOST.format(
                "learn nothing",
                "SGD at a learning rate of 0",
                "correct the optimizer or its rates",
            ),
        ),
    ],
    ids=["fp16", "warm-up", "accumulation", "full fp16", "full fp16, AdamW", "no rate"],
)
def test_what_learns_nothing_is_told(options, sentence):
    rehearsal = rehearsed(**options)
    assert rehearsal.failure is None
    assert reported(check_steps, rehearsal).warnings == [sentence] * bool(sentence)


# ---- A state to resume from ----------------------------------------------------------------------


@pytest.fixture
def state(scratch) -> str:
    """A state that AdamW left at a rate of 1e-4."""
    args = OPTIONS | {"optimizer": OPTIMIZERS["AdamW"][0], "save_every_n_steps": 1, "epochs": 1}

    class Saved(Trainer):
        def batches(self, loader: DataLoader) -> list[Any]:
            return list(loader)[:1]

        def loss(self, unet: Any) -> torch.Tensor:
            network = unet.network
            return sum(parameter.float().sum() for parameter in network.parameters())

        def steps(self, args: Any, accelerator: Any, unet: Any, network: Any, *more: Any) -> None:
            unet.network = network
            super().steps(args, accelerator, unet, network, *more)

    Path("_out").mkdir()
    Pictures.new_cache_latents = lambda *_: None
    try:
        Saved().train(Namespace(**args | {"save_state": True}))
    finally:
        del Pictures.new_cache_latents
    return "_out/1-state"


def test_a_state_is_loaded_at_its_own_rank_and_compared_with_the_options(state):
    adamw = {"optimizer": OPTIMIZERS["AdamW"][0], "optimizer_type": "AdamW", "resume": state}
    assert reported(check_steps, rehearsed(**adamw)) == Report()
    other_rate = {"optimizer": lambda p: AdamW(p, 5e-4)}
    assert reported(check_steps, rehearsed(**adamw | other_rate)).warnings == [
        f'the state in "{state}" goes on at its own learning rate of 0.0001, not 0.0005: leave the '
        "rate, or go on from its LoRA with --network_weights"
    ]
    other_rank = rehearsed(**adamw, network_dim=4)
    assert isinstance(other_rank.failure, RuntimeError)
    assert "size mismatch" in str(other_rank.failure)
    assert not is_unknown(other_rank)


def test_a_state_of_another_optimizer_is_told_whether_it_goes_on_or_not(state):
    of_adamw = (
        f'the state in "{state}" is of another optimizer than --optimizer_type={{}}: give the '
        "optimizer that it was saved with, or go on from its LoRA with --network_weights"
    )
    prodigy = rehearsed(resume=state)
    assert isinstance(prodigy.failure, KeyError)
    assert other_optimizer(prodigy) == of_adamw.format("Prodigy")
    adamax = rehearsed(resume=state, optimizer=lambda p: Adamax(p, 1e-4), optimizer_type="Adamax")
    assert adamax.failure is None  # in the training it has the state, which lacks exp_inf
    assert reported(check_steps, adamax).errors == [of_adamw.format("Adamax")]


def test_a_state_of_another_optimizer_that_has_all_it_needs_is_a_warning(state):
    """As AdamW goes on from Prodigy's, at a loss of 6e12."""
    rehearsal = rehearsed(optimizer=OPTIMIZERS["AdamW"][0], optimizer_type=None, resume=state)
    [resumed] = rehearsal.resumed
    rehearsal.resumed = [replace(resumed, kept=resumed.kept | {"s", "p0"})]
    assert reported(check_steps, rehearsal).warnings == [
        f'the state in "{state}" is of another optimizer than --optimizer_type=AdamW: give the '
        "optimizer that it was saved with, or go on from its LoRA with --network_weights"
    ]


@pytest.mark.parametrize("lost", ["optimizer.bin", "scheduler.bin", "model.safetensors"])
@pytest.mark.parametrize("is_cut", [True, False], ids=["cut off", "missing"])
def test_a_state_that_is_not_whole_fails_as_it_would_in_the_training(state, lost, is_cut):
    path = Path(state, lost)
    content = path.read_bytes()
    path.unlink()
    if is_cut:
        path.write_bytes(content[: len(content) // 2])
    rehearsal = rehearsed(optimizer=OPTIMIZERS["AdamW"][0], resume=state)
    assert rehearsal.failure
    assert not rehearsal.predictions
    assert not is_unknown(rehearsal)


# ---- The brakes ----------------------------------------------------------------------------------


def test_each_brake_alone_ends_a_training_that_goes_on():
    class WithoutLoader(Trainer):
        def batches(self, loader: DataLoader) -> Any:
            return itertools.cycle(list(loader))

    class WithoutUnet(Trainer):
        def loss(self, unet: nn.Module) -> torch.Tensor:
            return torch.zeros(1, requires_grad=True).sum()

    assert rehearsed(WithoutLoader).predictions == rehearsals.MOST_PREDICTIONS + 1
    assert rehearsed(WithoutUnet).predictions == 0
    for trainer in (WithoutLoader, WithoutUnet):
        assert rehearsed(trainer).failure is None


def test_what_only_the_steps_lack_is_unknown_and_what_an_optimizer_raises_is_not():
    class Newer(Trainer):
        def loss(self, unet: nn.Module) -> torch.Tensor:
            return unet.such_a_thing

    def refusing(parameters: Any) -> Optimizer:
        return AdamW(parameters, betas=(0.9, nn.Identity()))

    assert is_unknown(rehearsed(Newer))
    refused = rehearsed(optimizer=refusing)
    assert isinstance(refused.failure, TypeError)
    assert reported(check_steps, refused) == Report()
    assert not is_unknown(refused)
    assert reported(check_steps, Rehearsal()) == Report()


def test_rates_are_compared_by_group():
    resumed = Resumed(([1e-4, 1e-5], [1e-4, 1e-4]), (set(), set()), set())
    args = Namespace(**OPTIONS | {"resume": "a"})
    network = nn.Linear(1, 1)
    rehearsal = Rehearsal(args=args, predictions=1, resumed=[resumed], network=network)
    nn.init.ones_(network.bias)
    assert len(reported(check_steps, rehearsal).warnings) == 1
