"""The processes that accelerate starts, by its own sum; only the graphics cards are not there."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands import launch

from blora.preflight.processes import Started, check_device, check_processes, processes
from blora.preflight.report import Report
from blora.text import BloraError

SCRIPT = "sdxl_train_network.py"
CONFIG = """\
compute_environment: LOCAL_MACHINE
distributed_type: 'NO'
num_machines: 1
num_processes: {}
use_cpu: true
"""


@pytest.fixture(autouse=True)
def no_config(tmp_path, monkeypatch) -> None:
    """accelerate finds no config and no card; the working directory has two configs."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr(launch, "default_config_file", str(tmp_path / "default.yaml"))
    monkeypatch.chdir(tmp_path)
    for number in (1, 3):
        Path(f"{number}.yaml").write_text(CONFIG.format(number))


LONE = ["launch", "--num_processes=2"]
TWO = [*LONE, "--multi_gpu"]
MEET = ["--num_machines=2", "--main_process_ip=10.0.0.1"]


@pytest.mark.parametrize(
    ("accelerate", "expected"),
    [
        ([], Started(is_chosen=False)),
        (["launch"], Started(is_chosen=False)),
        (["accelerate", "launch", "--mixed_precision=bf16"], Started(is_chosen=False)),
        (["accelerate", "launch", "--multi_gpu", "--num_processes", "2"], Started(2)),
        (["launch", "--multi_gpu"], Started()),  # as many as there are cards: none
        (["launch", "--cpu", "--num_processes=1"], Started()),
        (["launch", "--cpu", "--num_processes=2"], Started()),
        (["launch", "--config_file", "1.yaml"], Started()),
        ([*TWO, "--config_file=3.yaml"], Started(2)),
        (["launch", "--config_file=3.yaml", "--multi_gpu"], Started(3)),
        # Whatever number is asked for, accelerate starts one.
        (LONE, Started(lacks_multi_gpu=True)),
        (["launch", "--config_file=3.yaml"], Started(lacks_multi_gpu=True)),
        ([*LONE, *MEET, "--main_process_port=29500"], Started(lacks_multi_gpu=True)),
        # A rank means nothing where there is one machine.
        ([*TWO, "--num_machines=1", "--machine_rank=1"], Started(2)),
        # --num_processes is that of all machines.
        ([*TWO, *MEET, "--machine_rank=0"], Started(2, 2)),
        ([*TWO, *MEET, "--machine_rank=1"], Started(2, 2, 1)),
        ([*TWO, *MEET, "--num_processes=5", "--machine_rank=1"], Started(4, 2, 1)),
    ],
)
def test_accelerate_says_how_many_processes_it_will_start(
    capsys, monkeypatch, accelerate, expected
):
    assert processes(accelerate, SCRIPT) == expected
    assert capsys.readouterr() == ("", "")
    # Its own choice of a way to start them is the same.
    chosen = []
    for name in ("simple_launcher", "multi_gpu_launcher"):
        monkeypatch.setattr(launch, name, lambda args, name=name: chosen.append(name))
    words = accelerate[accelerate.index("launch") + 1 :] if accelerate else []
    launch.launch_command(launch.launch_command_parser().parse_args([*words, SCRIPT]))
    assert chosen == ["multi_gpu_launcher" if "--multi_gpu" in words else "simple_launcher"]
    assert expected.processes == 1 or chosen == ["multi_gpu_launcher"]


def test_accelerate_takes_all_cards_unless_a_number_is_chosen(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert processes(["launch"], SCRIPT) == Started(2, is_chosen=False)
    assert processes(LONE, SCRIPT) == Started(2)


WHERE = "accelerate's options (BLORA_ACCELERATE_ARGS in the launcher)"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--num_processes=many"], "invalid int value: 'many'"),
        (["--multi_gpu", "--num_processes=1"], "You need to use at least 2 processes to use `--m"),
        (["--config_file=gone.yaml"], "gone.yaml"),
    ],
)
def test_options_that_accelerate_refuses_are_an_error_in_its_words(capsys, options, words):
    with pytest.raises(BloraError) as raised:
        processes(["launch", *options], SCRIPT)
    start, told = str(raised.value).split(f": correct {WHERE} (")
    assert start == "accelerate refuses its options"
    assert words in told
    assert capsys.readouterr() == ("", "")


NO_CARD = (
    "torch finds no graphics card, so the training would run on the processor: install torch with "
    "CUDA"
)
ALL_CARDS = (
    "accelerate finds 2 graphics cards and will train on all of them, which takes 2 times the "
    f"pictures a step: for one, add --num_processes=1 to {WHERE}"
)
NOT_TOGETHER = (
    "without --multi_gpu accelerate starts one process on each machine, and each trains a LoRA of "
    f"its own: add it to {WHERE}"
)


@pytest.mark.parametrize(
    ("check", "given", "warnings"),
    [
        (check_device, ("cpu", ["launch"]), [NO_CARD]),
        (check_device, ("cpu", ["launch", "--cpu"]), []),
        (check_device, ("cuda", ["launch"]), []),
        (check_device, ("mps", []), []),
        (check_processes, (Started(2, is_chosen=False),), [ALL_CARDS]),
        (check_processes, (Started(lacks_multi_gpu=True),), [NOT_TOGETHER]),
        (check_processes, (Started(),), []),
        (check_processes, (Started(is_chosen=False),), []),
        (check_processes, (Started(2),), []),
    ],
)
def test_a_device_or_a_number_that_nobody_chose_is_a_warning(check, given, warnings):
    report = Report()
    check(*given, report)
    assert report == Report(warnings=warnings)
