"""The plan of a training, and warnings on options that the trainer would take without a word.

All is real, on SDXL's names and shapes with sd-scripts' defaults, but the graphics cards.
"""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers_sdxl import sdxl_unet_without_weights
from lycoris_releases import LYCORIS
from prodigyopt import Prodigy
from rehearsed_networks import CONTENT_STYLE, made, network, options, told_memory
from reports import reported
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer
from torch.utils.data import ConcatDataset, TensorDataset
from transformers import Adafactor, get_constant_schedule_with_warmup

from blora.preflight import option_warnings, plan
from blora.preflight.plan import Length, length, saves
from blora.preflight.processes import Started
from blora.preflight.rehearsal import Rehearsal, parameters_of
from blora.preflight.report import Report
from blora.text import file_size

PRODIGY = 4.0  # bytes that it keeps for each byte of a parameter
MEGAPIXEL = 1024 * 1024


def put_cards(monkeypatch: pytest.MonkeyPatch, *megabytes: int) -> None:
    """What torch says of cards with so much memory."""
    cards = [SimpleNamespace(total_memory=size * 2**20) for size in megabytes]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_properties", cards.__getitem__)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """An empty working directory, on a machine without a graphics card."""
    monkeypatch.chdir(tmp_path)
    put_cards(monkeypatch)
    return tmp_path


def planned(*given: str, machine: int | None = None, without: str = "", **more: object) -> Report:
    """The plan of what a rehearsal hands on: options, datasets, a network and its optimizer."""
    group = ConcatDataset([TensorDataset(torch.zeros(batches)) for batches in (8, 4)])
    for dataset, batch_size in zip(group.datasets, (1, 2), strict=True):
        dataset.batch_size = batch_size
    args = options("--max_train_epochs=250", *given, without=without)
    modules = parameters_of(more["network"]) if "network" in more else {}
    rehearsal = Rehearsal(args=args, group=group, optimizer_state=PRODIGY, modules=modules, **more)
    started = Started() if machine is None else Started(2, 2, machine)
    return reported(plan.plan, rehearsal, started, MEGAPIXEL)


@pytest.mark.parametrize(
    ("without", "given", "args", "part"),
    [
        ("", "--network_alpha=1", {}, "rank 64, alpha 1: 28,180,480 parameters, 112.7 MB a file"),
        ("", "--save_precision=fp16", {}, "28,180,480 parameters, 56.4 MB a file"),
        ("", "--save_precision=bf16", {}, "28,180,480 parameters, 56.4 MB a file"),
        ("", "--full_fp16 --save_precision=float", {}, "28,180,480 parameters, 112.7 MB a file"),
        ("", "", {"dora_wd": "True"}, "28,385,280 parameters, 113.5 MB"),  # 1280 a module more
        ("", "--dim_from_weights --network_weights=a.pt", {"rank": 8}, "as in a.pt: 3,522,560 "),
        ("network_dim", "", {"rank": 8}, "rank blora_network's default: 3,522,560 parameters, "),
        ("", "--network_module=lycoris.kohya", {}, "1.20 GB working memory of a step"),
        (
            "",
            "",
            {"trains_text": True},
            "1.20 GB working memory of a step",
        ),  # then it cannot stop early
        ("", "", {"preset": "blora_layout_style"}, "1.07 GB working memory of a step"),
        ("", "", {"preset": ("time_embed.0$",)}, "1.20 GB working memory of a step"),
        ("", "", {"preset": ("input_blocks.0.0$",)}, "1.20 GB working memory of a step"),
        ("", "", {"preset": ("input_blocks.4.1.proj_in$",)}, "1.15 GB working memory of a step"),
        ("", "", {"preset": ("out.2$",)}, " 0.0 MB working memory of a step"),
        ("", "--mixed_precision=no", {}, "10.27 GB U-Net in 32 bits, 3.27 GB text encoders, "),
        ("", "--mixed_precision=no", {}, "working memory of a step of unknown size"),
        ("", "--fp8_base_unet", {}, "2.57 GB U-Net in 8 bits, 1.64 GB text encoders, "),
        ("", "--fp8_base", {}, "2.57 GB U-Net in 8 bits, 817.7 MB text encoders, "),
        ("", "--cache_text_encoder_outputs", {}, "5.13 GB U-Net in 16 bits, 112.7 MB LoRA, "),
        (
            "",
            "--full_bf16",
            {},
            "56.4 MB LoRA, 56.4 MB its gradients, 225.4 MB the optimizer's memory",
        ),
        ("cache_latents", "", {}, "167.3 MB VAE, "),
        ("cache_latents", "--no_half_vae", {}, "334.6 MB VAE, "),
        ("gradient_checkpointing", "", {}, "3.79 GB working memory of a step"),
        ("gradient_checkpointing", "", {"rank": 1024}, "4.64 GB working memory of a step"),
        # the copies in 16 bits are the LoRA itself
        ("gradient_checkpointing", "--full_fp16", {}, "3.73 GB working memory of a step"),
        ("", "--output_dir=a/b", {}, f"saves 1 of 112.7 MB in {Path('a/b')} ("),
        # a state: the LoRA in 32 bits, and four times as much of the optimizer's
        ("", "--save_every_n_steps=999 --save_state", {}, "4 of 112.7 MB and 4 states of 563.6 MB"),
        ("", "--save_state_on_train_end", {}, "1 of 112.7 MB and 1 states of 563.6 MB in _out ("),
        ("", "--full_fp16 --save_state", {}, "1 of 56.4 MB and 1 states of 281.8 MB in _out ("),
    ],
)
def test_each_part_of_the_plan_follows_the_options_and_the_network(without, given, args, part):
    lines = planned(*given.split(), without=without, network=made(**args)).plan
    assert part in "\n".join(f"{name} {text}" for name, text in lines.items())
    sizes = re.findall(r"([\d.]+) ([GM])B", lines["memory"].split(" (")[0])
    total, *parts = (float(size) * {"M": 1e6, "G": 1e9}[unit] for size, unit in sizes)
    assert abs(total - sum(parts)) < 0.03e9


def test_a_plan_has_a_line_for_each():
    report = planned(network=made())
    assert list(report.plan) == ["training", "network", "modules", "rank", "memory", "saves"]
    assert (
        report.plan["training"]
        == "3000 steps, 250 epochs, batches of 1 to 2, 1.3 on average, fp16 mixed precision"
    )
    assert report.plan["network"] == "blora_network"
    assert re.fullmatch(r"1 of 112.7 MB in _out \([\d.]+ [GM]B free\)", report.plan["saves"])
    assert len(report.modules) == 160
    assert report.errors == report.warnings == report.notes == []
    assert list(planned().plan) == ["training"]  # of a network that is wrapped


def test_a_training_is_so_long():
    for (given, batches, processes), (steps, epochs) in {
        ("", 12, 1): (1600, 134),
        ("--max_train_steps=3000", 12, 1): (3000, 250),
        ("--max_train_steps=10", 12, 1): (10, 1),
        ("--max_train_epochs=2 --max_train_steps=5", 12, 1): (24, 2),
        ("--max_train_epochs=2 --gradient_accumulation_steps=5", 12, 1): (6, 2),
        ("--max_train_epochs=2", 13, 2): (14, 2),
        ("--max_train_epochs=2 --gradient_accumulation_steps=4", 13, 2): (4, 2),
        ("--max_train_epochs=2", 0, 1): (2, 2),
    }.items():
        found = length(options(*given.split()), batches, processes)
        assert found == Length(steps, epochs), given


def test_its_length_is_told_with_what_a_step_takes():
    for duration, batches, started, told in (
        (Length(1, 1), [1], Started(), "1 step, 1 epoch, batch 1"),
        (
            Length(24, 2),
            [8, 1, 8],
            Started(),
            "24 steps, 2 epochs, batches of 1 to 8, 5.7 on average",
        ),
        (Length(24, 2), [4], Started(2), "24 steps, 2 epochs, batch 4 in each of 2 processes"),
    ):
        report = reported(plan.plan_length, duration, batches, started, options())
        assert report == Report(plan={"training": f"{told}, fp16 mixed precision"})
    for option in ("--max_train_steps=0", "--max_train_epochs=0"):
        args = options(option)
        report = reported(plan.plan_length, length(args, 12, 1), [1], Started(), args)
        assert report.errors == [f"{option} means zero steps: raise it"]


def test_the_batches_are_those_of_the_buckets():
    manager = SimpleNamespace(buckets=[["a"] * 9, ["b"], []])
    for batch_size, sizes in {4: [4, 4, 1, 1], 1: [1] * 10, 16: [9, 1]}.items():
        dataset = SimpleNamespace(batch_size=batch_size, bucket_manager=manager)
        assert plan.batch_sizes(dataset) == sizes


def test_modules_are_told_by_trait_and_block():
    for told, preset in {
        "160: 80 content (output_blocks.0.1), 80 style (output_blocks.1.1)": CONTENT_STYLE,
        "240: 80 layout (input_blocks.8.1), 80 content (output_blocks.0.1), "
        "80 style (output_blocks.1.1)": "blora_content_layout_style",
        "2: 1 in input_blocks.0.0, 1 in out": ("input_blocks.0.0$", "out.2$"),
        "10: 10 content_block (output_blocks.0.1)": (r"output_blocks.0.1.*ff.net.2$",),
        "71 in 12 blocks": (".*attn1.to_q$", "out.2$"),
    }.items():
        assert planned(network=made(preset=preset)).plan["modules"] == told


def test_a_broken_traits_file_is_a_warning_and_modules_are_told_without_it(monkeypatch, folder):
    monkeypatch.setattr(plan, "ROOT", folder)
    Path("blora_traits.json").write_text("{")
    report = planned(network=made())
    assert report.plan["modules"] == "160: 80 in output_blocks.0.1, 80 in output_blocks.1.1"
    [warning] = report.warnings
    assert warning.startswith(f"{folder / 'blora_traits.json'} is not valid JSON (")


def test_from_a_gigabyte_on_a_size_is_told_in_gigabytes():
    assert [file_size(10**9 - 10**5), file_size(10**9)] == ["999.9 MB", "1.00 GB"]


def test_above_rank_640_it_notes_that_the_lora_outgrows_its_matrices():
    outgrown = "the LoRA is larger than the matrix it changes in 120 of 160 modules"
    assert planned("--network_dim=640", network=made(640)).notes == []
    assert planned("--network_dim=641", network=made(641)).notes == [f"at rank 641 {outgrown}"]
    assert planned("--dim_from_weights", network=made(641)).notes == [outgrown]


def test_the_unet_it_speaks_of_has_as_many_parameters_as_diffusers_own():
    assert sum(p.numel() for p in sdxl_unet_without_weights().parameters()) == plan.UNET


def test_the_cards_memory_is_a_sum_of_parts():
    assert told_memory(options(), network(), PRODIGY) == (
        "8.44 GB at least, computed: 5.13 GB U-Net in 16 bits, 1.64 GB text encoders, 112.7 MB "
        "LoRA, 112.7 MB its gradients, 450.9 MB the optimizer's memory, 993.0 MB working memory "
        "of a step (without --gradient_checkpointing, which is BLORA_SAVE_MEMORY=0: 2.80 GB more)"
    )
    without = told_memory(options("--optimizer_type=Came"), network(), None)
    assert without.split(" its gradients, ")[1].startswith(
        "993.0 MB working memory of a step, the optimizer's memory of unkno"
    )


def test_activations_grow_with_the_pixels_of_a_batch():
    for pixels, size in {2 * MEGAPIXEL: "1.99 GB", MEGAPIXEL // 4: "248.2 MB"}.items():
        assert f"{size} working memory of a step" in told_memory(
            options(), network(), PRODIGY, pixels
        )
    # Of a dataset that does not tell its sizes.
    assert "working memory of a step of unknown size" in told_memory(
        options(), network(), PRODIGY, 0
    )


def test_so_many_files_and_states_are_there_before_the_last():
    training = Length(3000, 250)
    for given, numbers in {
        "--save_every_n_steps=1000": (3, 3),  # the last step's is one of its own
        "--save_every_n_steps=100 --save_last_n_steps=1000": (11, 11),
        "--save_every_n_steps=1000 --save_last_n_steps=9000": (3, 3),
        "--save_every_n_epochs=125": (1, 1),  # not the last epoch
        "--save_every_n_epochs=100 --save_last_n_epochs=9": (2, 2),
        "--save_every_n_epochs=1 --save_last_n_epochs=2": (2, 2),
        "--save_every_n_steps=1000 --save_every_n_epochs=100": (5, 5),
        "--save_n_epoch_ratio=5": (4, 4),
        "--save_n_epoch_ratio=999": (249, 249),
        "--save_every_n_epochs=1 --save_last_n_epochs_state=3": (249, 3),
        "--save_every_n_epochs=1 --save_last_n_epochs=2 --save_last_n_epochs_state=3": (2, 3),
        "--save_every_n_steps=100 --save_last_n_steps_state=200": (30, 3),
    }.items():
        args = options(*given.split())
        assert (saves(training, args), saves(training, args, "_state")) == numbers, given


def test_an_option_that_a_release_does_not_have_is_off():
    args = options("--output_dir=.")
    del args.save_state_on_train_end
    training = Length(3000, 250)
    report = reported(plan.plan_saves, training, network(), 1.0, args)
    assert report.plan["saves"].startswith("1 of 112.7 MB in . (")


@pytest.fixture
def little_room(monkeypatch) -> None:
    """A disk with 200 MB free."""
    free = shutil.disk_usage(".")._replace(free=200_000_000)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda folder: free)


@pytest.mark.usefixtures("little_room")
def test_saves_that_do_not_fit_beside_those_they_replace_are_an_error(folder):
    given = "--output_name=cat[1]", "--save_every_n_steps=1000", "--save_precision=fp16"
    sentence = (
        'do not fit into the 200.0 MB free at "{}": free some space, or raise --save_every_n_steps'
    )
    assert planned(*given, network=made()).errors == [f"4 of 56.4 MB {sentence.format(folder)}"]
    Path("_out").mkdir()
    with Path("_out/cat[1]-step00001000.safetensors").open("wb") as file:
        file.truncate(56_000_000)
    assert planned(*given, network=made()).errors == []
    assert planned(*given, "--save_state", network=made()).errors == [
        f"4 of 56.4 MB and 4 states of 563.6 MB {sentence.format(folder / '_out')}"
    ]


@pytest.mark.usefixtures("little_room")
def test_the_first_of_several_machines_saves_and_the_others_need_no_room():
    first, second = (planned(machine=machine, network=made(640)) for machine in (0, 1))
    assert first.plan["training"] == second.plan["training"]
    assert second.plan["training"].startswith(
        "1500 steps, 250 epochs, batches of 1 to 2, 1.3 on average in each of 2 processes on 2 "
        "machines, fp16 "
    )
    assert first.plan["saves"].startswith("1 of 1.13 GB in _out ")
    assert second.plan["saves"] == "only on the first machine (--machine_rank=0)"
    assert (len(first.errors), len(second.errors)) == (1, 0)


def test_a_card_that_is_too_small_is_a_warning(monkeypatch):
    cached, checkpointed = "--cache_text_encoder_outputs", "gradient_checkpointing"
    save = f"set BLORA_SAVE_MEMORY to 1, or add --{checkpointed}, or lower batch_size or resolution"
    sentence = "the card has {} GB of memory, and this training takes at least {} GB (computed): {}"
    for cards, rank, given, without, told in (
        ([10240], 64, [], "", []),
        ([4096, 24576], 1024, [], "", []),  # the larger of two cards
        ([12288], 1024, [], "", [("12.88", "18.58", f"lower BLORA_RANK, or add {cached}")]),
        ([4096], 64, [cached], "", [("4.29", "6.80", "use a larger card")]),
        ([6144], 64, [cached], checkpointed, [("6.44", "9.60", save)]),
    ):
        put_cards(monkeypatch, *cards)
        report = planned(f"--network_dim={rank}", *given, without=without, network=made(rank))
        assert report.warnings == [sentence.format(*words) for words in told]


# ---- Warnings on options -------------------------------------------------------------------------

EVERYWHERE = ".*attn1.to_q$"  # in each of the 11 blocks with attention
LYCORIS_PRINTS = "create LyCORIS for Text Encoder: 176 modules."
# as networks/lora.py of sd-scripts 0.10.1 prints it
SD_SCRIPTS_PRINTS = (
    "create LoRA for Text Encoder 1:\ncreate LoRA for Text Encoder 2:\n"
    "create LoRA for Text Encoder 1: 72 modules.\ncreate LoRA for Text Encoder 2: 192 modules.\n"
)
LEFT_OUT = (
    "note: {} modules of the text encoders are not trained because of --network_train_unet_only, "
    "as the recipes intend"
)
TOO_HIGH = (
    "a learning rate of {} is far too high for --optimizer_type=AdamW: give --learning_rate=1e-4, "
    "for example"
)
SAID = {
    "--network_args have no preset, so LyCORIS trains all 160 modules that it can: "
    "add preset=lycoris_presets/blora_content_style.toml": [
        {"given": "--network_args"},
        {"given": "--network_args conv_dim=1 algo=lora"},
        {"given": "--network_module=lycoris.kohya --network_args"},
    ],
    'the preset "own.toml" trains 71 modules in 12 blocks of the U-Net: correct it, if two blocks '
    "are meant": [{"given": "--network_args preset=own.toml", "preset": (EVERYWHERE, "out.2$")}],
    "--network_module=networks.lora takes no preset and trains 160 modules: use lycoris.kohya or "
    "blora_network for a B-LoRA": [{"given": "--network_module=networks.lora"}],
    "--network_alpha=64 with --network_dim=8 makes the change 8 times as strong: give both the "
    "same, as BLORA_RANK does": [{"given": "--network_dim=8"}],
    "--network_alpha=3 with --network_dim=2 makes the change 1.5 times as strong: give both the "
    "same, as BLORA_RANK does": [{"given": "--network_dim=2 --network_alpha=3"}],
    "with bypass_mode=True LyCORIS trains no DoRA, although dora_wd=True asks for it: remove one "
    "of the two from --network_args": [{"dora_wd": "True", "bypass_mode": "True"}],
    LEFT_OUT.format(176): [{"printed": LYCORIS_PRINTS}],
    LEFT_OUT.format(264): [{"printed": SD_SCRIPTS_PRINTS}],
    **{
        f"--optimizer_type=Prodigy finds its own learning rate, and {rate} times that is far too "
        "low: give --learning_rate=1": [{"optimizer": (Prodigy, float(rate))}]
        for rate in ("0.1", "0.0001")
    },
    **{TOO_HIGH.format(rate): [{"optimizer": (AdamW, float(rate))}] for rate in ("0.1", "1")},
    "": [
        {},
        {"given": "--network_alpha=1", "dora_wd": "True", "optimizer": (Prodigy, 0.11)},
        # LyCORIS takes the rank for it
        {"given": "--network_alpha=0", "bypass_mode": "True", "optimizer": (AdamW, 0.09)},
        {"given": "--dim_from_weights --network_args"},
        {"given": "--network_module=networks.lora --network_args"},
        {"given": "--network_args preset=own.toml", "preset": (EVERYWHERE,)},
        {"given": "--network_args preset=full", "preset": (EVERYWHERE, "out.2$")},
        {"bypass_mode": "True", "algo": "dylora"},  # which knows no DoRA
        {"printed": "create LyCORIS for Text Encoder: 0 modules."},
        {"printed": "create LyCORIS for U-Net: 160 modules."},
        {"printed": LYCORIS_PRINTS, "trains_text": True},
        {"printed": LYCORIS_PRINTS, "without": "network_train_unet_only"},
        {"optimizer": (Adafactor, None)},  # it finds its own
    ],
}


def check(
    given: str = "",
    without: str = "",
    printed: str = "",
    optimizer: tuple[type[Optimizer], float | None] = (AdamW, 1e-4),
    **network: object,
) -> Report:
    """What is said of a rehearsal with a real network, optimizer and accelerator."""
    kind, rate = optimizer
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(kind([Parameter(torch.zeros(2, 2))], lr=rate))
    rehearsal = Rehearsal(
        args=options(f"--optimizer_type={kind.__name__}", *given.split(), without=without),
        accelerator=accelerator,
        printed=io.StringIO(printed),
        network=made(**network),
        modules=parameters_of(made(**network)),
    )
    return reported(option_warnings.check_options, rehearsal)


@pytest.mark.parametrize("sentence", SAID)
def test_options_that_are_most_likely_mistakes_are_named(sentence):
    for case in SAID[sentence]:
        report = check(**case)
        found = [*report.warnings, *(f"note: {note}" for note in report.notes)]
        assert found == [sentence] * bool(sentence), case


def test_lycoris_prints_how_many_modules_it_makes(caplog):
    with caplog.at_level("INFO", "LyCORIS"):
        made.__wrapped__()  # which logs; the other tests share one
    assert LYCORIS_PRINTS in caplog.messages


def test_without_a_network_the_rate_is_looked_at_that_a_warm_up_from_zero_hides():
    accelerator = Accelerator(cpu=True)
    adam = accelerator.prepare(AdamW([Parameter(torch.zeros(2, 2))], lr=1.0))
    get_constant_schedule_with_warmup(adam, 10)
    assert adam.param_groups[0]["lr"] == 0
    rehearsal = Rehearsal(args=options(without="optimizer_type"), accelerator=accelerator)
    assert reported(option_warnings.check_options, rehearsal).warnings == [TOO_HIGH.format("1")]


def test_a_lycoris_that_is_not_tested_is_a_note(monkeypatch, tmp_path):
    assert list(option_warnings.LYCORIS_TESTED) == LYCORIS
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    for version in ("unknown", "1.0"):
        assert check().notes == [
            f"LyCORIS {version} was not tested with this bundle; {', '.join(LYCORIS)} were"
        ]
        assert check("--network_module=networks.lora --network_args").notes == []
        info = tmp_path / "lycoris_lora-1.0.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text("Name: lycoris_lora\nVersion: 1.0\n")
