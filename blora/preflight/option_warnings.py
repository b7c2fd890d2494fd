"""What the trainer would train without a word, although it is most likely not what was meant.

Of the options; images.py has the same of the dataset. blora_preflight.py prints it as
warnings, which stop nothing.
"""

from __future__ import annotations

import argparse
import io
import re
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from blora.preflight.files import read_prompts
from blora.preflight.options import pairs
from blora.preflight.plan import MANY_BLOCKS, Built, Started, built
from blora.preflight.rehearsal import Rehearsal
from blora.preflight.report import Report
from blora.text import BloraError

LYCORIS_NETWORKS = ("lycoris.kohya", "blora_network")
LYCORIS_TESTED = ("3.2.0.post2", "3.4.0", "4.1.3")
FITTING_PRESET = "preset=lycoris_presets/blora_content_style.toml"
# An optimizer that finds its own rate takes this as a factor, and 1 is meant. sd-scripts itself
# calls 0.1 and less too low for one; the others' usual rates are 1e-3 and less.
LOWEST_FACTOR, HIGHEST_RATE = 0.1, 0.1


def check_network(network: Built, args: argparse.Namespace, report: Report) -> None:
    """A preset that is not there or chooses nothing, and a change larger than was meant."""
    if args.network_module in LYCORIS_NETWORKS and not args.dim_from_weights:
        check_preset(network, pairs(args.network_args).get("preset"), report)
        check_lycoris(report)
    elif args.network_module.startswith("networks.") and "preset" in pairs(args.network_args):
        report.warnings.append(
            f"--network_module={args.network_module} takes no preset and trains "
            f"{len(network.modules)} modules: use lycoris.kohya or blora_network for a B-LoRA"
        )
    rank, alpha = args.network_dim, args.network_alpha
    if rank and alpha and alpha > rank:
        report.warnings.append(
            f"--network_alpha={alpha:g} with --network_dim={rank} makes the change "
            f"{alpha / rank:g} times as strong: give both the same, as BLORA_RANK does"
        )


def check_preset(network: Built, preset: str | None, report: Report) -> None:
    """All layers are trained where two blocks were meant; LyCORIS' own "full" says so itself."""
    if preset is None:
        report.warnings.append(
            "there is no preset among --network_args, so LyCORIS takes all "
            f"{len(network.modules)} modules that it can train: add {FITTING_PRESET}"
        )
    elif preset.endswith(".toml") and len(network.blocks) > MANY_BLOCKS:
        report.warnings.append(
            f'by the preset "{preset}" {len(network.modules)} modules are trained, in '
            f"{len(network.blocks)} blocks of the U-Net: correct it, if two blocks are meant"
        )


def check_dora(network: Any, report: Report) -> None:
    """Modules whose DoRA LyCORIS makes and saves, and leaves out of its short form of the sum."""
    if any(getattr(m, "bypass_mode", False) and getattr(m, "wd", False) for m in network.modules()):
        report.warnings.append(
            "with bypass_mode=True LyCORIS trains no DoRA, although dora_wd=True asks for it: "
            "remove one of the two from --network_args"
        )


def check_lycoris(report: Report) -> None:
    """A release of LyCORIS that nothing here was run with."""
    # It imports email and zipfile, which would be half of what the look imports.
    from importlib import metadata

    try:
        version = metadata.version("lycoris_lora")
    except metadata.PackageNotFoundError:
        version = "unknown"
    if version not in LYCORIS_TESTED:
        tested = ", ".join(LYCORIS_TESTED)
        report.warnings.append(f"LyCORIS {version} is not one of the tested ones, {tested}")


def left_out_text(printed: str, network: Built, args: argparse.Namespace) -> str:
    """The text encoders' modules that the preset names and --network_train_unet_only leaves out.

    LyCORIS and sd-scripts' networks print how many they made.
    """
    made = sum(map(int, re.findall(r"for Text Encoder(?: \d)?: (\d+) modules", printed)))
    if not made or network.trains_text or not args.network_train_unet_only:
        return ""
    return (
        f"{made} modules of the text encoders are not trained because of "
        "--network_train_unet_only, as the recipes intend"
    )


def check_rate(groups: list[dict[str, Any]], args: argparse.Namespace, report: Report) -> None:
    """A learning rate for another kind of optimizer; `groups` are the optimizer's own."""
    rates = [group.get("initial_lr", group["lr"]) for group in groups]
    rates = [rate for rate in rates if rate is not None]  # Adafactor may find its own
    if not rates:
        return
    optimizer = f"--optimizer_type={args.optimizer_type or 'AdamW'}"
    if any("d" in group for group in groups):  # its estimate of the rate, as Prodigy's are called
        if max(rates) <= LOWEST_FACTOR:
            report.warnings.append(
                f"{optimizer} finds its own learning rate, and {max(rates):g} times that is next "
                "to nothing: give --learning_rate=1"
            )
    elif max(rates) >= HIGHEST_RATE:
        report.warnings.append(
            f"a learning rate of {max(rates):g} is far too high for {optimizer}: give "
            "--learning_rate=1e-4, for example"
        )


def check_prompt_options(args: argparse.Namespace, report: Report) -> None:
    """Options of sample prompts that sd-scripts ignores without a word."""
    asked = args.sample_every_n_steps or args.sample_every_n_epochs or args.sample_at_first
    if asked and not args.sample_prompts:  # where the look knew the option by its beginning alone
        report.errors.append("samples are asked for without their prompts: add --sample_prompts")
    if not asked or not Path(args.sample_prompts or "").is_file():
        return
    from library.train_util import line_to_prompt_dict  # sd-scripts' own, which the rehearsal found

    prompts = read_prompts(Path(args.sample_prompts))
    parts = [part for line in prompts if isinstance(line, str) for part in line.split(" --")[1:]]
    with redirect_stderr(io.StringIO()):  # it may say what is wrong with a number
        read = {part: line_to_prompt_dict(f" --{part}") for part in parts}
    unread = [f'"--{part.strip()}"' for part, found in read.items() if found.keys() == {"prompt"}]
    if unread:
        report.warnings.append(
            f'sd-scripts ignores what stands after the prompts in "{args.sample_prompts}", '
            f"{', '.join(unread)}: write --w 1024, --h 1024, --s 25, --l 7, --d 1 or --n and a text"
        )


def check_device(device: str, accelerate: list[str], report: Report) -> None:
    """A training on the processor that nobody asked for; `device` is accelerate's."""
    if device == "cpu" and "--cpu" not in accelerate:
        report.warnings.append(
            "torch finds no graphics card, so the training would run on the processor: "
            "install torch with CUDA"
        )


# ---- Processes -----------------------------------------------------------------------------------

OPTIONS = "accelerate's options (BLORA_ACCELERATE_ARGS in the launcher)"


def processes(accelerate: list[str], script: str) -> Started:
    """The processes that accelerate will start, by its own sum.

    `accelerate` is what stands between "accelerate" and the script: "launch", "--multi_gpu".
    BloraError where accelerate refuses that, or waits for machines that cannot find each other.
    """
    from accelerate.commands import launch

    parser = launch.launch_command_parser()
    words = accelerate[accelerate.index("launch") + 1 :] if "launch" in accelerate else accelerate
    printed = io.StringIO()  # it lists its defaults, as it will again
    try:
        with redirect_stderr(printed):
            args = parser.parse_args([*words, script])
            said = args.num_processes is not None or args.multi_gpu
            args, defaults, _ = launch._validate_launch_command(args)
    except (SystemExit, ValueError, OSError) as error:
        usage = printed.getvalue().rpartition(": error: ")[2].strip()
        raise BloraError(
            f"accelerate refuses what it is given: correct {OPTIONS} ({usage or error})"
        ) from error
    return started(args, said or defaults is not None)


def started(args: argparse.Namespace, was_said: bool) -> Started:
    """What becomes of accelerate's options, which it has filled in."""
    machines, asked = args.num_machines or 1, max(1, args.num_processes or 1)
    # As its launch_command chooses: anything else starts one process, whatever number is asked for.
    several = args.multi_gpu or args.use_deepspeed or args.use_fsdp or args.use_megatron_lm
    is_lone = args.cpu or not several
    if machines > 1 and not args.use_deepspeed:  # which may have a file of its machines
        check_meeting(args, is_lone)
    return Started(
        1 if is_lone else max(1, asked // machines) * machines,
        1 if is_lone else machines,
        0 if is_lone or machines == 1 else args.machine_rank or 0,
        was_said,
        lacks_multi_gpu=is_lone and not (args.cpu or args.tpu) and max(asked, machines) > 1,
    )


def check_meeting(args: argparse.Namespace, is_lone: bool) -> None:
    """BloraError where several machines would end, or wait for each other for ten minutes."""
    needed = {"main_process_ip": "the address of the first machine"}
    if is_lone:
        needed["main_process_port"] = "a port that is free on the first machine"
    else:
        needed["machine_rank"] = "0 on the first machine, 1 on the next"
    for name, what in needed.items():
        if getattr(args, name) is None:
            raise BloraError(
                f"--num_machines={args.num_machines} needs --{name}, {what}: add it to {OPTIONS}"
            )
    if not is_lone and args.num_processes < args.num_machines:
        raise BloraError(
            f"--num_processes={args.num_processes} is too few for --num_machines="
            f"{args.num_machines}: give the number of all machines together"
        )
    if not is_lone and args.machine_rank >= args.num_machines:
        raise BloraError(
            f"--machine_rank={args.machine_rank} is beyond --num_machines={args.num_machines}: "
            "count the machines from 0"
        )


def check_processes(started: Started, report: Report) -> None:
    """More processes than anybody asked for, or fewer."""
    number = started.processes
    # Two GPUs are used, which doubles the pictures a step, although nobody asked for both.
    if number > 1 and not started.was_said:
        report.warnings.append(
            f"accelerate finds {number} graphics cards and will train on all of them, which takes "
            f"{number} times the pictures a step: for one, add --num_processes=1 to {OPTIONS}"
        )
    if started.lacks_multi_gpu:
        report.warnings.append(
            "without --multi_gpu accelerate starts one process on each machine, and each trains a "
            f"LoRA of its own: add it to {OPTIONS}"
        )


def advise(rehearsal: Rehearsal, report: Report) -> None:
    """All of it that the options, the network and the optimizer show."""
    args, printed = rehearsal.args, rehearsal.printed.getvalue()
    if rehearsal.network:
        network = built(rehearsal.network)
        check_network(network, args, report)
        check_dora(rehearsal.network, report)
        if note := left_out_text(printed, network, args):
            report.notes.append(note)
    check_rate(rehearsal.groups, args, report)
    check_prompt_options(args, report)
