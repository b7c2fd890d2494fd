"""Numbers that cancel each other: one row for each that is wrong, and beside it one that is not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from rehearsed_networks import options
from reports import reported
from torch.optim import SGD
from transformers import get_scheduler

from blora.preflight.counts import check_counts
from blora.preflight.processes import Started
from blora.preflight.rehearsal import Rehearsal
from blora.preflight.report import Report

BATCHES = 8


def said(*given: str, processes: int = 1, schedule: str = "cosine", warm_up: int = 0) -> Report:
    args = options("--max_train_steps=400", *given)
    optimizer = SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = get_scheduler(schedule, optimizer, warm_up, args.max_train_steps)
    accelerator = SimpleNamespace(_schedulers=[SimpleNamespace(scheduler=scheduler)])
    rehearsal = Rehearsal(args=args, accelerator=accelerator, group=range(BATCHES))
    return reported(check_counts, rehearsal, Started(processes))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "polynomial", "constant_with_warmup"])
def test_a_warm_up_has_to_end_before_the_training(schedule):
    [warning] = said("--lr_warmup_steps=500", schedule=schedule, warm_up=500).warnings
    assert warning == (
        "the learning rate never reaches what is given, since --lr_warmup_steps=500 is too long "
        "for this training: lower it (--lr_warmup_steps=0 is none)"
    )
    assert said("--lr_warmup_steps=500", schedule=schedule, warm_up=500, processes=2) == Report()
    assert said("--lr_warmup_steps=399", schedule=schedule, warm_up=399) == Report()
    assert said(schedule=schedule) == Report()


def test_an_epoch_has_to_have_what_is_gathered():
    gathers = "--gradient_accumulation_steps={}".format
    assert said(gathers(BATCHES)) == Report()
    sentence = (
        "{} gathers only the {} of an epoch, which ends with a step in any case: raise "
        "num_repeats, or lower it to {}"
    )
    assert said(gathers(9)).warnings == [sentence.format(gathers(9), "8 batches", 8)]
    expected = sentence.format(gathers(3), "1 batch", 1)
    assert said(gathers(3), processes=8).warnings == [expected]


def test_timesteps_go_up_to_a_thousand():
    assert said("--min_timestep=0", "--max_timestep=1000") == Report()
    backwards = "--min_timestep=900", "--max_timestep=100"
    sentence = "--min_timestep=900 is above --max_timestep=100{}: exchange them"
    # 0.9 has no function that allows for it.
    assert said(*backwards).errors == [sentence.format("")]
    [warning] = said("--max_timestep=1001").warnings
    assert warning.startswith("--max_timestep=1001 is above SDXL's 1000, ")


def test_samples_are_drawn_by_epochs_or_by_steps():
    both = said("--sample_every_n_steps=5", "--sample_every_n_epochs=1").warnings
    assert both == [
        "--sample_every_n_steps=5 is ignored, since --sample_every_n_epochs=1 is given as well: "
        "remove one of the two"
    ]
    for name, total in {"steps": 400, "epochs": 50}.items():
        assert said(f"--sample_every_n_{name}={total}") == Report()
        assert said(f"--sample_every_n_{name}={total + 1}").notes == [
            f"--sample_every_n_{name}={total + 1} draws no samples in {total} {name}: lower it, if "
            "you want some"
        ]
