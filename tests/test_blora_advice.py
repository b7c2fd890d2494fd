"""Warnings on options that the trainer would take without a word.

Networks, optimizers and accelerate are the real ones; only the graphics cards are not there.
"""

from __future__ import annotations

import io
import logging
from argparse import Namespace
from importlib import metadata
from pathlib import Path
from typing import Any

import prodigyopt
import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.commands import launch
from lycoris_releases import LYCORIS
from rehearsed_networks import made, network, options

from blora.preflight import option_warnings
from blora.preflight.option_warnings import (
    LYCORIS_TESTED,
    OPTIONS,
    check_device,
    check_network,
    check_processes,
    check_prompt_options,
    processes,
)
from blora.preflight.plan import Started
from blora.preflight.rehearsal import Rehearsal
from blora.preflight.report import Report
from blora.text import BloraError

SCRIPT = "sdxl_train_network.py"


def advised(found: Any, args: Namespace) -> list[str]:
    report = Report()
    check_network(found, args, report)
    assert report.errors == report.notes == []
    return report.warnings


# ---- The network ---------------------------------------------------------------------------------


def test_a_launchers_network_passes_without_a_word():
    assert advised(network(), options()) == []


@pytest.mark.parametrize("module", ["lycoris.kohya", "blora_network"])
@pytest.mark.parametrize("given", [[], ["--network_args", "conv_dim=1", "algo=lora"]])
def test_a_network_without_a_preset_is_a_warning(module, given):
    args = options(f"--network_module={module}", "--network_args", *given[1:])
    assert advised(network(), args) == [
        "there is no preset among --network_args, so LyCORIS takes all 160 modules that it can "
        "train: add preset=lycoris_presets/blora_content_style.toml"
    ]


def test_a_preset_of_ones_own_that_trains_all_layers_is_a_warning(tmp_path):
    preset = tmp_path / "all.toml"
    classes = '["Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"]'
    # LyCORIS keeps what an earlier preset said and this one does not.
    preset.write_text(
        f"enable_conv = true\nunet_target_module = {classes}\nunet_target_name = []\n"
    )
    everything = network(preset=str(preset))
    args = options("--network_args", f"preset={preset}")
    modules, blocks = len(everything.modules), len(everything.blocks)
    assert blocks > 30
    assert advised(everything, args) == [
        f'by the preset "{preset}" {modules} modules are trained, in {blocks} blocks of the U-Net: '
        "correct it, if two blocks are meant"
    ]
    assert advised(everything, options("--network_args", "preset=full")) == []


def test_a_preset_of_all_attention_blocks_passes(tmp_path):
    preset = tmp_path / "attention.toml"
    preset.write_text(
        'enable_conv = false\nunet_target_module = ["CrossAttention"]\nunet_target_name = []\n'
    )
    attention = network(preset=str(preset))
    assert len(attention.blocks) == 11
    assert advised(attention, options("--network_args", f"preset={preset}")) == []


def test_a_preset_that_the_network_does_not_know_is_a_warning():
    args = options("--network_module=networks.lora", "--network_args", "preset=a.toml")
    assert advised(network(), args) == [
        "--network_module=networks.lora takes no preset and trains 160 modules: use "
        "lycoris.kohya or blora_network for a B-LoRA"
    ]


@pytest.mark.parametrize("given", [["--network_module=networks.lora"], ["--dim_from_weights"]])
def test_a_network_that_needs_no_preset_passes(given):
    assert advised(network(), options(*given, "--network_args")) == []


@pytest.mark.parametrize(
    ("given", "times"),
    [
        (["--network_dim=8", "--network_alpha=64"], "8 times"),
        (["--network_dim=2", "--network_alpha=3"], "1.5 times"),
        (["--network_dim=64", "--network_alpha=64"], None),
        (["--network_dim=64", "--network_alpha=1"], None),
        (["--network_dim=64", "--network_alpha=0"], None),  # LyCORIS takes the rank for it
    ],
)
def test_an_alpha_above_the_rank_is_a_warning(given, times):
    told = advised(network(), options(*given))
    rank, alpha = (word.split("=")[1] for word in given)
    assert told == (
        [
            f"--network_alpha={alpha} with --network_dim={rank} makes the change {times} as "
            "strong: give both the same, as BLORA_RANK does"
        ]
        if times
        else []
    )


@pytest.mark.parametrize(
    ("args", "warned"),
    [
        ({"dora_wd": "True", "bypass_mode": "True"}, True),
        ({"dora_wd": "True", "bypass_mode": "False"}, False),
        ({"dora_wd": "True"}, False),
        ({"bypass_mode": "True"}, False),
    ],
)
def test_dora_that_lycoris_would_drop_is_a_warning(args, warned):
    report = Report()
    option_warnings.check_dora(made(**args), report)
    sentence = (
        "with bypass_mode=True LyCORIS trains no DoRA, although dora_wd=True asks for it: remove "
        "one of the two from --network_args"
    )
    assert report.warnings == ([sentence] if warned else [])


def test_the_tested_lycoris_releases_are_the_tested_ones():
    assert list(LYCORIS_TESTED) == LYCORIS


@pytest.mark.parametrize("version", ["1.0", None])
def test_a_lycoris_that_is_not_tested_is_a_warning(monkeypatch, tmp_path, version):
    # The first of the name that Python finds counts.
    info = tmp_path / "lycoris_lora-1.0.dist-info"
    if version:
        info.mkdir()
        (info / "METADATA").write_text(f"Name: lycoris_lora\nVersion: {version}\n")
        monkeypatch.syspath_prepend(tmp_path)
    else:
        monkeypatch.setattr("sys.path", [str(tmp_path)])
        with pytest.raises(metadata.PackageNotFoundError):
            metadata.version("lycoris_lora")
    tested = ", ".join(LYCORIS_TESTED)
    sentence = f"LyCORIS {version or 'unknown'} is not one of the tested ones, {tested}"
    assert advised(network(), options()) == [sentence]
    assert advised(network(), options("--network_module=networks.lora", "--network_args")) == []


# ---- The text encoders ---------------------------------------------------------------------------

LEFT_OUT = (
    "{} modules of the text encoders are not trained because of --network_train_unet_only, as "
    "the recipes intend"
)


def left_out(printed: str, *, trains_text: bool = False, without: str = "") -> str:
    found = network(trains_text=trains_text)
    return option_warnings.left_out_text(printed, found, options(without=without))


def test_the_text_encoders_modules_that_lycoris_made_in_vain_are_a_note():
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    logging.getLogger("LyCORIS").addHandler(handler)
    made.__wrapped__()  # which logs; the other tests share one
    logging.getLogger("LyCORIS").removeHandler(handler)
    assert left_out(log.getvalue()) == LEFT_OUT.format(176)


@pytest.mark.parametrize(
    ("printed", "number"),
    [
        # as networks/lora.py of sd-scripts 0.10.1 prints it
        (
            "create LoRA for Text Encoder 1:\ncreate LoRA for Text Encoder 2:\n"
            "create LoRA for Text Encoder 1: 72 modules.\n"
            "create LoRA for Text Encoder 2: 192 modules.\n",
            264,
        ),
        ("create LyCORIS for Text Encoder: 0 modules.\n", 0),
        ("create LyCORIS for U-Net: 160 modules.\n", 0),
    ],
)
def test_they_are_counted_as_sd_scripts_prints_them(printed, number):
    assert left_out(printed) == (LEFT_OUT.format(number) if number else "")


def test_text_encoders_that_are_trained_are_not_left_out():
    printed = "create LyCORIS for Text Encoder: 176 modules.\n"
    assert left_out(printed, trains_text=True) == ""
    assert left_out(printed, without="network_train_unet_only") == ""


# ---- The learning rate ---------------------------------------------------------------------------


def optimizer(name: str, rate: float | None) -> Any:
    """A real one, on one parameter."""
    parameters = [torch.nn.Parameter(torch.zeros(2, 2))]
    if name == "Prodigy":
        return prodigyopt.Prodigy(parameters, lr=rate)
    if name == "AdaFactor":
        own = {"relative_step": False, "scale_parameter": False} if rate else {}
        return transformers.Adafactor(parameters, lr=rate, **own)
    return torch.optim.AdamW(parameters, lr=rate)


TOO_LOW = (
    "--optimizer_type={} finds its own learning rate, and {} times that is next to nothing: give "
    "--learning_rate=1"
)
TOO_HIGH = (
    "a learning rate of {} is far too high for --optimizer_type={}: give --learning_rate=1e-4, for "
    "example"
)


@pytest.mark.parametrize(
    ("name", "rate", "sentence"),
    [
        ("Prodigy", 1.0, None),
        ("Prodigy", 0.5, None),
        ("Prodigy", 0.1, TOO_LOW.format("Prodigy", "0.1")),
        ("Prodigy", 1e-4, TOO_LOW.format("Prodigy", "0.0001")),
        ("AdamW", 1e-4, None),
        ("AdamW", 0.09, None),
        ("AdamW", 1.0, TOO_HIGH.format("1", "AdamW")),
        ("AdaFactor", 1e-4, None),
        ("AdaFactor", 1.0, TOO_HIGH.format("1", "AdaFactor")),
        ("AdaFactor", None, None),  # it finds its own
    ],
)
def test_a_learning_rate_for_another_kind_of_optimizer_is_a_warning(name, rate, sentence):
    report = Report()
    groups = optimizer(name, rate).param_groups
    option_warnings.check_rate(groups, options(f"--optimizer_type={name}"), report)
    assert report.warnings == ([sentence] if sentence else [])


def test_a_warm_up_that_begins_at_zero_does_not_hide_the_rate():
    adam = optimizer("AdamW", 1.0)
    transformers.get_constant_schedule_with_warmup(adam, 10)
    assert adam.param_groups[0]["lr"] == 0
    report = Report()
    option_warnings.check_rate(adam.param_groups, options(without="optimizer_type"), report)
    assert report.warnings == [TOO_HIGH.format("1", "AdamW")]


# ---- Devices and processes -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "accelerate", "warned"),
    [
        ("cpu", ["launch"], True),
        ("cpu", ["launch", "--cpu"], False),
        ("cuda", ["launch"], False),
        ("mps", [], False),
    ],
)
def test_a_training_on_the_processor_is_a_warning_unless_asked_for(device, accelerate, warned):
    report = Report()
    check_device(device, accelerate, report)
    sentence = (
        "torch finds no graphics card, so the training would run on the processor: install torch "
        "with CUDA"
    )
    assert report.warnings == ([sentence] if warned else [])


def test_samples_that_the_look_did_not_know_need_prompts_too():
    report = Report()
    check_prompt_options(options("--sample_at"), report)
    assert report.errors == ["samples are asked for without their prompts: add --sample_prompts"]


CONFIG = """\
compute_environment: LOCAL_MACHINE
distributed_type: 'NO'
num_machines: 1
num_processes: {}
use_cpu: true
"""


@pytest.fixture(autouse=True)
def no_config(tmp_path, monkeypatch) -> Path:
    """accelerate finds no config and no card; the working directory has two configs."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr(
        "accelerate.commands.launch.default_config_file", str(tmp_path / "default.yaml")
    )
    monkeypatch.chdir(tmp_path)
    for number in (1, 3):
        Path(f"{number}.yaml").write_text(CONFIG.format(number))
    return tmp_path


TWO = ["launch", "--multi_gpu", "--num_processes=2"]
MEET = ["--num_machines=2", "--main_process_ip=10.0.0.1"]
LONE = ["launch", "--num_processes=2"]


@pytest.mark.parametrize(
    ("accelerate", "expected"),
    [
        ([], Started(was_said=False)),
        (["launch"], Started(was_said=False)),
        (["accelerate", "launch", "--mixed_precision=bf16"], Started(was_said=False)),
        (["accelerate", "launch", "--multi_gpu", "--num_processes", "2"], Started(2)),
        (["launch", "--multi_gpu"], Started()),  # as many as there are cards: none
        (["launch", "--cpu", "--num_processes=1"], Started()),
        (["launch", "--cpu", "--num_processes=2"], Started()),
        (["launch", "--config_file", "1.yaml"], Started()),
        (["launch", "--config_file=3.yaml", *TWO[1:]], Started(2)),
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
        (
            ["launch", "--multi_gpu", "--num_processes=5", *MEET, "--machine_rank=1"],
            Started(4, 2, 1),
        ),
    ],
)
def test_accelerate_says_how_many_processes_it_will_start(
    capsys, monkeypatch, accelerate, expected
):
    found = processes(accelerate, SCRIPT)
    assert found == expected
    assert capsys.readouterr() == ("", "")
    # Its own choice of a way to start them is the same.
    chosen = []
    for name in ("simple_launcher", "multi_gpu_launcher"):
        monkeypatch.setattr(launch, name, lambda args, name=name: chosen.append(name))
    words = accelerate[accelerate.index("launch") + 1 :] if accelerate else []
    launch.launch_command(launch.launch_command_parser().parse_args([*words, SCRIPT]))
    assert chosen == ["multi_gpu_launcher" if "--multi_gpu" in words else "simple_launcher"]
    assert found.processes == 1 or chosen == ["multi_gpu_launcher"]


@pytest.mark.parametrize(
    ("accelerate", "sentence"),
    [
        (
            [*TWO, "--num_machines=2", "--machine_rank=0"],
            "--num_machines=2 needs --main_process_ip, the address of the first machine: add it to "
            f"{OPTIONS}",
        ),
        (
            [*TWO, *MEET],
            "--num_machines=2 needs --machine_rank, 0 on the first machine, 1 on the next: add it "
            f"to {OPTIONS}",
        ),
        (
            [*LONE, *MEET],
            "--num_machines=2 needs --main_process_port, a port that is free on the first machine: "
            f"add it to {OPTIONS}",
        ),
        (
            [*TWO, "--num_machines=2", "--main_process_ip=10.0.0.1", "--machine_rank=2"],
            "--machine_rank=2 is beyond --num_machines=2: count the machines from 0",
        ),
        (
            [*TWO, "--num_machines=3", "--main_process_ip=10.0.0.1", "--machine_rank=2"],
            "--num_processes=2 is too few for --num_machines=3: give the number of all machines "
            "together",
        ),
    ],
)
def test_machines_that_would_not_find_each_other_are_an_error(accelerate, sentence):
    with pytest.raises(BloraError) as raised:
        processes(accelerate, SCRIPT)
    assert str(raised.value) == sentence


@pytest.mark.parametrize(
    ("accelerate", "words"),
    [
        (["launch", "--num_processes=many"], "invalid int value: 'many'"),
        (
            ["launch", "--multi_gpu", "--num_processes=1"],
            "You need to use at least 2 processes to use `--multi_gpu`.",
        ),
        (["launch", "--config_file=gone.yaml"], "gone.yaml"),
    ],
)
def test_options_that_accelerate_refuses_are_an_error_in_its_words(capsys, accelerate, words):
    with pytest.raises(BloraError) as raised:
        processes(accelerate, SCRIPT)
    start, told = str(raised.value).split(f": correct {OPTIONS} (")
    assert start == "accelerate refuses what it is given"
    assert words in told
    assert capsys.readouterr() == ("", "")


def test_two_cards_that_are_both_used_unasked_are_a_warning(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    started = processes(["launch"], SCRIPT)
    assert started == Started(2, was_said=False)
    report = Report()
    check_processes(started, report)
    assert report.warnings == [
        "accelerate finds 2 graphics cards and will train on all of them, which takes 2 times the "
        f"pictures a step: for one, add --num_processes=1 to {OPTIONS}"
    ]
    assert processes(["launch", "--num_processes=2"], SCRIPT) == Started(2)


def test_several_processes_that_will_be_one_are_a_warning():
    report = Report()
    check_processes(Started(lacks_multi_gpu=True), report)
    assert report.warnings == [
        "without --multi_gpu accelerate starts one process on each machine, and each trains a LoRA "
        f"of its own: add it to {OPTIONS}"
    ]


@pytest.mark.parametrize("started", [Started(), Started(was_said=False), Started(2)])
def test_what_was_said_or_is_one_passes(started):
    report = Report()
    check_processes(started, report)
    assert report == Report()


# ---- All of it -----------------------------------------------------------------------------------


def rehearsed(rate: float, **more: object) -> Rehearsal:
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(optimizer("AdamW", rate))
    args = options("--optimizer_type=AdamW", "--network_alpha=128")
    return Rehearsal(args=args, accelerator=accelerator, **more)


def test_the_network_the_log_and_the_optimizer_are_all_looked_at():
    printed = io.StringIO("create LyCORIS for Text Encoder: 176 modules.\n")
    report = Report()
    dropped = made(dora_wd="True", bypass_mode="True")
    option_warnings.advise(rehearsed(1.0, network=dropped, printed=printed), report)
    starts = ["--network_alpha=128 ", "with bypass_mode=True ", "a learning rate of 1 "]
    told = zip(report.warnings, starts, strict=True)
    assert all(warning.startswith(start) for warning, start in told)
    assert report.notes == [LEFT_OUT.format(176)]


def test_without_a_network_the_learning_rate_is_looked_at():
    report = Report()
    option_warnings.advise(rehearsed(1.0), report)
    assert report.warnings == [TOO_HIGH.format("1", "AdamW")]
