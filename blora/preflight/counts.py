"""Numbers of options that cancel each other, which the trainer takes without a word."""

from __future__ import annotations

import math
from argparse import Namespace

from blora.preflight.plan import Length, length
from blora.preflight.processes import Started
from blora.preflight.rehearsal import Rehearsal
from blora.preflight.report import Report
from blora.preflight.trainer import own
from blora.text import counted

TIMESTEPS = 1000  # of SDXL


def check_warm_up(rehearsal: Rehearsal, training: Length, started: Started, report: Report) -> None:
    """A warm-up that is not over when the training is: the schedule itself is asked."""
    lambdas = [
        rate
        for schedule in rehearsal.accelerator._schedulers
        for rate in getattr(schedule.scheduler, "lr_lambdas", ())
    ]
    warm_up, steps = rehearsal.args.lr_warmup_steps, training.steps
    # Each process moves the schedule on at every step; that of the rehearsal is for one.
    is_over = started.processes > 1 and (warm_up or 0) < steps * started.processes
    if not lambdas or not warm_up or is_over or steps < 1:
        return
    if max(lambdas[0](step) for step in range(steps)) < 1 - 1e-9:
        report.warnings.append(
            f"the learning rate never reaches what is given, since --lr_warmup_steps={warm_up} is "
            "too long for this training: lower it (--lr_warmup_steps=0 is none)"
        )


def check_accumulation(batches: int, args: Namespace, report: Report) -> None:
    """More batches to gather than an epoch has, at whose end accelerate steps in any case."""
    wanted = args.gradient_accumulation_steps
    if batches < wanted:
        an_epoch = counted(batches, "batch", "batches")
        report.warnings.append(
            f"--gradient_accumulation_steps={wanted} gathers only the {an_epoch} of an epoch, "
            f"which ends with a step in any case: raise num_repeats, or lower it to {batches}"
        )


def check_timesteps(args: Namespace, report: Report) -> None:
    """Timesteps the wrong way round, or that there are not."""
    least, most = args.min_timestep or 0, args.max_timestep
    if most is None:
        return
    if least > most:
        try:
            own("get_timesteps")
            sentences, so = report.warnings, f", so every step trains timestep {most} alone"
        except AttributeError:  # 0.9 draws between them, which ends the training
            sentences, so = report.errors, ""
        sentences.append(
            f"--min_timestep={least} is above --max_timestep={most}{so}: exchange them"
        )
    if most > TIMESTEPS:
        report.warnings.append(
            f"--max_timestep={most} is above SDXL's {TIMESTEPS}, and the first step that draws "
            f"one of those ends the training: give {TIMESTEPS}"
        )


def check_sampling(training: Length, args: Namespace, report: Report) -> None:
    """Samples that are never drawn."""
    steps, epochs = args.sample_every_n_steps, args.sample_every_n_epochs
    if steps and epochs:
        report.warnings.append(
            f"--sample_every_n_steps={steps} is ignored, since --sample_every_n_epochs={epochs} is "
            "given as well: remove one of the two"
        )
    every, unit, total = steps, "steps", training.steps
    if epochs:
        every, unit, total = epochs, "epochs", training.epochs
    if every and every > total:
        option = f"--sample_every_n_{unit}={every}"
        report.notes.append(
            f"{option} draws no samples in {total} {unit}: lower it, if you want some"
        )


def check_counts(rehearsal: Rehearsal, started: Started, report: Report) -> None:
    """Every check of this file."""
    args, batches = rehearsal.args, len(rehearsal.group)
    training = length(args, batches, started.processes)
    check_warm_up(rehearsal, training, started, report)
    check_accumulation(math.ceil(batches / started.processes), args, report)
    check_timesteps(args, report)
    check_sampling(training, args, report)
