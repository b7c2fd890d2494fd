"""The command that starts a training: its words, its processes, and on what they compute."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path

from blora.preflight.report import Report
from blora.text import BloraError

OPTIONS = "accelerate's options (BLORA_ACCELERATE_ARGS in the launcher)"

# A line of the kohya_ss GUI, which quotes nothing: its paths may hold blanks. An option of
# accelerate has one value or none, and that is no path.
PRINTED = re.compile(
    r"(?P<accelerate>.+?) launch (?P<options>(?:--\S+ (?:(?!\w:)[^-/\s]\S* )?)*)"
    r"(?P<script>.+?\.py) --config_file (?P<config>.+?\.toml)(?: (?P<more>.*))?"
)


def printed_command(file: Path) -> list[str]:
    """The words of the last command in a file to which the kohya_ss GUI printed it."""
    try:
        lines = file.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    except OSError as error:
        raise BloraError(f'cannot read "{file}" ({error.strerror}): correct its path') from error
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    if not (found := PRINTED.fullmatch(last)):
        raise BloraError(
            f'the last line of "{file}" is no training command of the kohya_ss GUI: press Print '
            "training command there, and give its logs/print_command.txt"
        )
    accelerate = [found["accelerate"], "launch", *found["options"].split()]
    script = [found["script"], "--config_file", found["config"]]
    return [*accelerate, *script, *(found["more"] or "").split()]


@dataclass(frozen=True)
class Started:
    """The processes that accelerate will start, on all machines; machine 0 saves the LoRA."""

    processes: int = 1
    machines: int = 1
    machine: int = 0  # this one
    is_chosen: bool = True  # False where accelerate takes all cards by itself
    lacks_multi_gpu: bool = False  # more were wanted
    cpu_config: str = ""  # the file that sends them to the processor


def processes(accelerate: list[str], script: str) -> Started:
    """The processes that accelerate will start, by its own sum.

    `accelerate` is what stands between "accelerate" and the script: "launch", "--multi_gpu".
    BloraError where accelerate refuses that.
    """
    from accelerate.commands import launch

    parser = launch.launch_command_parser()
    words = accelerate[accelerate.index("launch") + 1 :] if "launch" in accelerate else accelerate
    printed = io.StringIO()  # it lists its defaults, as it will again
    try:
        with redirect_stderr(printed):
            args = parser.parse_args([*words, script])
            is_chosen = args.num_processes is not None or args.multi_gpu
            args, defaults, _ = launch._validate_launch_command(args)
    except (SystemExit, ValueError, OSError) as error:
        usage = printed.getvalue().rpartition(": error: ")[2].strip()
        raise BloraError(
            f"accelerate refuses its options: correct {OPTIONS} ({usage or error})"
        ) from error
    machines, wanted = args.num_machines or 1, args.num_processes or 1
    # As its launch_command chooses: anything else starts one process, whatever number is given.
    several = args.multi_gpu or args.use_deepspeed or args.use_fsdp or args.use_megatron_lm
    is_lone = args.cpu or not several
    return Started(
        1 if is_lone else max(1, wanted // machines) * machines,
        1 if is_lone else machines,
        0 if is_lone or machines == 1 else args.machine_rank or 0,
        is_chosen or defaults is not None,
        lacks_multi_gpu=is_lone and not (args.cpu or args.tpu) and max(wanted, machines) > 1,
        cpu_config=(args.config_file or launch.default_config_file)
        if not args.cpu and getattr(args, "use_cpu", False)
        else "",
    )


def check_processes(started: Started, report: Report) -> None:
    """More processes than were chosen, or fewer."""
    number = started.processes
    if number > 1 and not started.is_chosen:
        report.warnings.append(
            f"accelerate finds {number} graphics cards and will train on all of them, which takes "
            f"{number} times the pictures a step: for one, add --num_processes=1 to {OPTIONS}"
        )
    if started.lacks_multi_gpu:
        report.warnings.append(
            "without --multi_gpu accelerate starts one process on each machine, and each trains a "
            f"LoRA of its own: add it to {OPTIONS}"
        )


def check_device(device: str, accelerate: list[str], started: Started, report: Report) -> None:
    """A training on the processor that was not chosen; `device` is accelerate's."""
    if "--cpu" in accelerate:
        return
    if device == "cpu":
        report.warnings.append(
            "torch finds no graphics card, so the training would run on the processor: "
            "install torch with CUDA"
        )
    elif started.cpu_config:
        report.warnings.append(
            f'"{started.cpu_config}" has use_cpu: true, so accelerate would train on the processor '
            "and not on the graphics card: write use_cpu: false there, or run accelerate config"
        )
