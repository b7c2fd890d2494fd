"""blora_network: LyCORIS' own network and gradients, with a backward pass that ends early.

The steps are those of tests/support/network_probe.py: the stand-in's U-Net, prepared and called as
sd-scripts prepares and calls its own, with real LyCORIS of three releases. What is equal here is
equal bit for bit. tests/real/test_real_kohya.py asks the same of sd-scripts' own U-Net.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from kohya_folder import ROOT
from lycoris_releases import LYCORIS, NEWEST, RELEASES
from network_cases import MODULES, MORE, PLAIN, REFUSED, STOPS, asked, preset_files

from blora.preflight.plan import position

pytestmark = pytest.mark.slow
Answers = dict[str, dict[str, Any]]
# Inputs and outputs of SDXL's attention, rank and alpha.
FULL = {
    f"{inputs} to {outputs}, rank {rank}, alpha {alpha}": (inputs, outputs, rank, alpha, "float32")
    for inputs, outputs in [(640, 640), (1280, 1280), (2048, 1280)]
    for rank, alpha in [(1, 1), (16, 1), (64, 64), (256, 128)]
}
SMALL = {name: layer for name, layer in FULL.items() if layer[0] == 640}
HALF = {f"{name}, {d}": (*of[:4], d) for name, of in SMALL.items() for d in ("float16", "bfloat16")}


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> Answers:
    """Of network_probe.py with each LyCORIS, which answer at the same time."""
    files = preset_files(tmp_path_factory.mktemp("presets"))

    def ask(release: str) -> dict[str, Any]:
        # The newest has no such folder: it is in the environment.
        path = map(str, (RELEASES / release, ROOT, ROOT / "tests/standin"))
        printed = subprocess.check_output(
            [sys.executable, ROOT / "tests/support/network_probe.py"],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
            input=json.dumps({"steps": asked(files, release), "layers": FULL | HALF}),
            text=True,
        )
        return json.loads(printed)

    with ThreadPoolExecutor() as pool:
        return dict(zip(LYCORIS, pool.map(ask, LYCORIS), strict=True))


def both(answers: Answers, release: str, name: str) -> list[dict[str, Any]]:
    return [answers[release]["steps"][f"{name}|{module}"] for module in MODULES]


RUNS = [(r, name) for r in LYCORIS for name in PLAIN] + [(NEWEST, name) for name in MORE]


@pytest.mark.parametrize(("release", "name"), RUNS)
def test_output_and_gradients_are_those_of_lycoris_bit_for_bit(answers, release, name):
    theirs, ours = both(answers, release, name)
    same = ("output", "gradients", "modules")
    assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}
    # Equal would be easy if there were none.
    assert theirs["zero"] == []
    assert len(theirs["without_gradient"]) == (8 if name == "text encoders" else 0)


@pytest.mark.parametrize("checkpointing", ["checkpointing", "all kept"])
@pytest.mark.parametrize("preset", STOPS)
@pytest.mark.parametrize("release", LYCORIS)
def test_the_backward_pass_ends_at_the_first_trained_layer(answers, release, preset, checkpointing):
    theirs, ours = both(answers, release, f"{preset}, {checkpointing}")
    stop, spared = STOPS[preset]
    assert len(theirs["reached"]) == 36
    assert ours["reached"] == [n for n in theirs["reached"] if position(n) >= position(stop)]
    ends = f"the backward pass ends at {stop} and spares {spared} of the U-Net's 794 layers"
    assert ours["log"] == [f"early stop: {ends}"]
    assert theirs["log"] == []


def test_what_is_spared_is_not_computed_twice(answers):
    for preset, kept in {"blora_content_style": 46, "blora_layout_style": 69}.items():
        theirs, ours = both(answers, NEWEST, f"{preset}, checkpointing")
        assert (theirs["checkpointed"], ours["checkpointed"]) == (91, kept)


WHY_NOT = {
    "text encoders": "text encoders are trained, and their gradients pass through the whole U-Net",
    "first layer": "the first layer of the U-Net is trained",
    "no layer": "no layer of the U-Net is trained",
    "time": "a layer is trained that lies outside the blocks of the U-Net",
    "another U-Net": "Wrapped is not built as sd-scripts' SDXL U-Net",
}


@pytest.mark.parametrize("name", WHY_NOT)
def test_where_it_may_not_stop_it_trains_as_lycoris_does_and_says_why(answers, name):
    theirs, ours = both(answers, NEWEST, name)
    assert ours["log"] == [f"no early stop: {WHY_NOT[name]}"]
    assert ours["reached"] == theirs["reached"]
    assert ours["checkpointed"] == theirs["checkpointed"] == 91


def test_a_preset_without_text_encoders_stops_although_they_could_be_trained(answers):
    _, ours = both(answers, NEWEST, "no text encoders in the preset")
    assert ours["log"][0].startswith("early stop: the backward pass ends at middle_block.1 ")


def test_torch_compile_changes_no_gradient(answers):
    theirs, _ = both(answers, NEWEST, "blora_content_style, checkpointing")
    found = answers[NEWEST]["steps"]["compiled"]
    assert found["gradients"] == theirs["gradients"]
    assert found["log"][0].startswith("early stop: the backward pass ends at output_blocks.0.1 ")


@pytest.mark.parametrize("algo", REFUSED)
@pytest.mark.parametrize("release", LYCORIS)
def test_dora_that_lycoris_would_drop_is_refused(answers, release, algo):
    assert answers[release]["steps"][algo]["refused"] == (
        "error: with bypass_mode=True LyCORIS trains no DoRA, although dora_wd=True asks for it: "
        "remove one of the two from --network_args"
    )


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("release", LYCORIS)
def test_bypass_mode_is_lycoris_default_within_a_millionth(answers, release, name):
    assert max(answers[release]["layers"][name]["apart"]) < 1e-6


@pytest.mark.parametrize("name", HALF)
@pytest.mark.parametrize("release", LYCORIS)
def test_in_16_bits_bypass_mode_is_not_the_less_exact_form(answers, release, name):
    """Of what a layer hands on, forward and back; of the factors' gradients to within 10 %."""
    found = answers[release]["layers"][name]
    pairs = zip(found["bypass"], found["default"], strict=True)
    output, down, up, given = (mine / theirs for mine, theirs in pairs)
    # LyCORIS 3.2 adds the change to the weight in 32 bits: there both forms are equally good.
    assert max(output, given) < (1.02 if release == "3.2.0.post2" else 0.9)
    assert max(down, up) < 1.1
