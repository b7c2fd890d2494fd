"""What the rehearsed steps showed: what learns nothing, and what a state to resume from changes."""

from __future__ import annotations

from typing import Any

from blora.preflight.rehearsal import Rehearsal
from blora.preflight.report import Report
from blora.preflight.trainer_errors import frames, is_of_the_rehearsal
from blora.text import span


def is_without_weights(rehearsal: Rehearsal) -> bool:
    """Whether it failed since the models have no numbers, or the network's are not its own.

    The latter is so in the network's own methods, as where algo=full subtracts the weights to save.
    """
    failure = rehearsal.failure
    if failure is None or is_of_the_rehearsal(failure):
        return failure is not None
    own = {id(module) for module in rehearsal.network.modules()} if rehearsal.network else set()
    return any(id(frame.f_locals.get("self")) in own for frame in frames(failure))


def is_unknown(rehearsal: Rehearsal) -> bool:
    """Whether it failed in the steps at what only a rehearsal has; an optimizer's is its own."""
    if not rehearsal.ready or not isinstance(rehearsal.failure, TypeError | AttributeError):
        return False
    steps = [frame for frame in frames(rehearsal.failure) if frame.f_code.co_name == "step"]
    kinds = [kind for frame in steps for kind in type(frame.f_locals.get("self")).__mro__]
    return all(kind.__name__ != "Optimizer" for kind in kinds)  # torch's


def optimizer_settings(rehearsal: Rehearsal) -> str:
    """The options on which it depends whether an update is lost in rounding."""
    args, groups = rehearsal.args, [g for o in rehearsal.optimizers for g in o.param_groups]
    rates = span(group.get("initial_lr", group["lr"]) for group in groups)
    precision = " in --full_fp16" if args.full_fp16 else " in --full_bf16" if args.full_bf16 else ""
    optimizer = args.optimizer_type or "AdamW"
    return f"with --optimizer_type={optimizer} at a learning rate of {rates}{precision}"


def check_learning(rehearsal: Rehearsal, report: Report) -> None:
    """Modules of which a parameter stays zero, as lora_up begins, or is no longer a number."""
    import torch

    parameters = list(rehearsal.network.named_parameters())
    trained = [(name.split(".")[0], p.detach()) for name, p in parameters if p.requires_grad]
    still = {module for module, parameter in trained if not parameter.any()}
    broken = {module for module, p in trained if not torch.isfinite(p).all()}
    remedy = "correct the optimizer or its rates"
    if rehearsal.args.full_fp16 or rehearsal.args.full_bf16:
        remedy = "remove --full_fp16" if rehearsal.args.full_fp16 else "remove --full_bf16"
    for modules, what in ((still, "learn nothing"), (broken, "become NaN or infinite")):
        if modules:
            report.warnings.append(
                f"{len(modules)} of {len(rehearsal.modules)} modules {what} in two rehearsed "
                f"steps, {optimizer_settings(rehearsal)}: {remedy}"
            )


def other_optimizer(rehearsal: Rehearsal) -> str:
    """A sentence on a state of another optimizer, which is loaded all the same; "" if it is not."""
    for optimizer, resumed in zip(rehearsal.optimizers, rehearsal.resumed, strict=False):
        (before, after), kept = resumed.groups, kept_by(optimizer)
        if before - after or (kept and resumed.kept and kept != resumed.kept):
            return (
                f'the state in "{rehearsal.args.resume}" is of another optimizer than '
                f"--optimizer_type={rehearsal.args.optimizer_type or 'AdamW'}: give the optimizer "
                "that it was saved with, or go on from its LoRA with --network_weights"
            )
    return ""


def kept_by(optimizer: Any) -> set[str]:
    """Names of what an optimizer has kept of its parameters since its first step."""
    return {name for state in optimizer.state.values() for name in state}


def check_resumed(rehearsal: Rehearsal, report: Report) -> None:
    """Learning rates that the state replaces."""
    for resumed in rehearsal.resumed:
        given, kept = resumed.rates
        if given != kept:
            report.warnings.append(
                f'the state in "{rehearsal.args.resume}" goes on at its own learning rate of '
                f"{span(kept)}, not {span(given)}: leave the rate, or go on from its LoRA with "
                "--network_weights"
            )


def check_steps(rehearsal: Rehearsal, report: Report) -> None:
    """Every warning that two steps give cause for, unless they were not taken."""
    if rehearsal.failure or not rehearsal.predictions:
        return
    check_learning(rehearsal, report)
    if sentence := other_optimizer(rehearsal):
        # In the training it has the state that was loaded, which may lack what its step reads.
        lacks = any(
            kept_by(optimizer) - resumed.kept
            for optimizer, resumed in zip(rehearsal.optimizers, rehearsal.resumed, strict=True)
        )
        (report.errors if lacks else report.warnings).append(sentence)
    else:
        check_resumed(rehearsal, report)
