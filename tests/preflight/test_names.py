"""Names that nobody reads, of LyCORIS' own networks and of the stand-in's options."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from rehearsed_networks import CONTENT_STYLE, ROOT, made, sdxl
from reports import reported
from sdxl_train_network_options import build_parser

from blora.preflight.names import Item, check_file, check_network_args, watch_names, with_nearest
from blora.preflight.rehearsal import Rehearsal, on_meta

PRESET = f"preset={ROOT}/lycoris_presets/{CONTENT_STYLE}.toml"


def unread(read: Callable[..., object], *given: str) -> list[str]:
    """The warnings, where sd-scripts hands these arguments to a function."""
    args = Namespace(network_args=list(given), network_module="lycoris.kohya")
    rehearsal = Rehearsal(args=args, network=made())
    watch_names(rehearsal)
    handed = {}
    for item in args.network_args:  # as sd-scripts reads them
        key, value = item.split("=", 1)
        handed[key] = value
    read(**handed)
    return reported(check_network_args, rehearsal).warnings


def taken(conv_dim: int = 4, **others: object) -> object:
    return others.get("algo"), "factor" in others, {"use_cp": 1}.keys() & others.keys()


def test_what_is_looked_up_or_taken_by_name_is_read():
    assert unread(taken, "conv_dim=8", "algo=lora", "factor=4", "use_cp=1") == []
    sentence = (
        "--network_args has names that lycoris.kohya does not read: {}: correct or remove them"
    )
    assert unread(taken, "conv_dim=8", "algos=1") == [sentence.format("algos (for algo?)")]
    assert unread(taken, "a=1", "a=2", "b=1") == [sentence.format("a, b")]


def test_what_asks_for_nothing_need_not_be_read():
    assert unread(taken, "a=False", "b=0", "c=", "d=None") == []


def test_lycoris_reads_its_own_and_no_others():
    def create(**given: str) -> None:
        from lycoris.kohya import create_network

        unet, *encoders = sdxl()
        with on_meta():
            create_network(1.0, 4, 4, None, encoders, unet, **given)

    assert unread(create, PRESET, "algo=lokr", "factor=8", "use_cp=True", "block_size=4") == []
    [warning] = unread(create, PRESET, "conv_dims=8", "block_dims=1")
    assert ": conv_dims (for conv_dim?), block_dims: " in warning


def test_an_item_is_split_and_joined_as_a_text():
    assert " ".join([Item("a=b")]) == "a=b"
    assert Item("dora_wd").split("=", 1) == ["dora_wd"]


def test_only_a_near_name_is_suggested():
    assert with_nearest(["--Network-Dim", "x\x1b"], ["network_dim"]) == (
        r"--Network-Dim (for network_dim?), x\x1b"
    )


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, []),
        ({"epoch": 1, "noise_offset_type": "Original"}, []),
        ({"network_dimm": 8}, ["network_dimm (for network_dim?)"]),
    ],
)
def test_a_setting_of_a_file_that_is_no_option_is_a_warning(monkeypatch, settings, told):
    script = SimpleNamespace(setup_parser=build_parser)
    monkeypatch.setitem(sys.modules, "train", script)
    monkeypatch.setattr(sys, "argv", ["there/train.py"])
    args = build_parser().parse_args(["--config_file=my"], Namespace(**settings))
    assert reported(check_file, Rehearsal(args=args)).warnings == [
        f'"my.toml" has settings that train.py does not know: {names}: correct or remove them'
        for names in told
    ]
    args.config_file = None
    assert reported(check_file, Rehearsal(args=args)).warnings == []
