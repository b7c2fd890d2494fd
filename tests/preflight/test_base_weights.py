"""What --base_weights merge is noted as LyCORIS does it, and what is wrong with it is said."""

from __future__ import annotations

import importlib
from argparse import Namespace
from pathlib import Path

import lycoris.kohya
import pytest
import torch
from kohya_folder import ROOT
from lora_algebra import read_modules, weight_at
from lycoris_files import DORA, SCALED, base_weights, lycoris_file, models
from reports import reported
from safetensors.torch import load_file, save_file

from blora.preflight.base_weights import Merged, check_base_weights, watched
from blora.preflight.plan import plan_merged
from blora.preflight.report import Report
from blora.preflight.trainer_errors import refusal
from blora.sdxl import load_traits

ARGS = Namespace(
    network_module="lycoris.kohya",
    base_weights=["my.safetensors"],
    base_weights_multiplier=[1.0],
)


def train(
    weight_path: str, multiplier: float = 1.0
) -> tuple[list[Merged], dict[str, torch.Tensor]]:
    """Merge a file as sd-scripts does; what was noted, and the weights by LyCORIS' names."""
    record: list[Merged] = []
    unet, encoders = models()
    with watched(ARGS, record):
        module, weights = lycoris.kohya.create_network_from_weights(
            multiplier, weight_path, None, encoders, unet, for_inference=True
        )
        loras = [*module.unet_loras, *module.text_encoder_loras]
        module.merge_to(encoders, unet, weights, torch.float32, "cpu")
    return record, {lora.lora_name: lora.org_module[0].weight.detach() for lora in loras}


# LyCORIS reads no IA3, no DyLoRA and no tucker core of a LoKr that it wrote; of a norm the weights
# are not at hand.
NOT_READ = ("IA3", "DyLoRA", "LoKr, tucker", "norm")
FORMS = {name: arguments for name, arguments in SCALED.items() if name not in NOT_READ}
FORMS |= {name: DORA[name] for name in ("lora, by row", "loha, by row", "lokr, by row")}
# At the alpha of these files, 0.75 of the rank.
TWICE = ("LoHa", "LoHa, tucker", "LoKr, w2 factored", "LoKr, both factored")


@pytest.mark.parametrize("form", FORMS)
def test_the_strength_that_is_noted_is_the_one_at_which_lycoris_merges(tmp_path, form):
    file = lycoris_file(tmp_path / "a.safetensors", FORMS[form], torch.float32)
    modules, base = read_modules(file), base_weights()
    [merged], weights = train(str(file), multiplier=0.5)
    assert (merged.file, merged.multiplier, merged.left_out) == (str(file), 0.5, [])
    assert merged.modules.keys() == modules.keys() == weights.keys()
    for name, strength in merged.modules.items():
        if strength != 1 and "dora_scale" in modules[name]:
            continue  # the lengths have the last word
        expected = weight_at(modules[name], base[name], strength)
        assert torch.allclose(weights[name].double(), expected, atol=1e-5)
    if form not in DORA:
        assert set(merged.modules.values()) <= ({0.75, 1} if form in TWICE else {1})


def sentences(*record: Merged, trained: str = "", **options: object) -> Report:
    """What is said of files that are merged, where `trained` are names of modules."""
    args = Namespace(**vars(ARGS) | options)
    return reported(check_base_weights, list(record), trained.split(), args)


CONTENT = "lora_unet_output_blocks_0_1_transformer_blocks_0_attn1_to_q"
TEXT = "lora_te2_text_model_encoder_layers_1_mlp_fc1"
PARTS = ("lora_up.weight", "lora_down.weight", "alpha")


def merged(
    *modules: str, at: float = 1, asked: float = 1, left: str = "", part: str = ""
) -> Merged:
    """A file of which these modules are merged, and others are left."""
    names = [f"{module}.{end}" for module in (*modules, *left.split()) for end in PARTS]
    tensors = [*names, *(f"{module}.{part}" for module in modules if part)]
    return Merged("my.safetensors", asked, tensors, dict.fromkeys(modules, at))


MY = '--base_weights "my.safetensors"'
LEAVE = ", and leave --base_weights_multiplier out"
WARNINGS = {
    f"lycoris.kohya merges nothing of {MY}: give an SDXL LoRA that it reads, such as a slice "
    "(blora_slicer.py --inspect shows what a file is)": merged(left="lora_unet_double_blocks_0"),
    f"lycoris.kohya merges 1 of 3 modules of {MY}, and not a, b: give a file that it reads whole, "
    "such as a slice": merged(CONTENT, left="a b"),
    f"{MY} changes the text encoders alone, and nothing of the U-Net: give a slice of content, if "
    "content is meant": merged(TEXT),
    f"LyCORIS merges {MY} at 1, not at 0.5: cut it with blora_slicer.py --alphas 0.5{LEAVE}": (
        merged(CONTENT, asked=0.5)
    ),
    f"LyCORIS merges {MY} at 0.5, not at 1: cut it with blora_slicer.py --alphas 2{LEAVE}": (
        merged(CONTENT, at=0.5)
    ),
    f"LyCORIS merges {MY} at 1, not at 0: cut it at the strength that you want{LEAVE}": (
        merged(CONTENT, asked=0)
    ),
}


@pytest.mark.parametrize("sentence", WARNINGS)
def test_what_is_merged_otherwise_than_meant_is_a_warning(sentence):
    assert sentences(WARNINGS[sentence]) == Report(warnings=[sentence])


def test_sd_scripts_own_lora_reads_the_factors_of_a_lora_alone():
    dora = merged(CONTENT, part="dora_scale")
    assert sentences(dora).warnings == []
    assert sentences(dora, network_module="networks.lora").warnings == [
        f"networks.lora merges {MY} without its dora_scale, which is not what was trained: use "
        "--network_module=lycoris.kohya or blora_network"
    ]
    assert sentences(merged(CONTENT), network_module="networks.lora").warnings == []


@pytest.mark.parametrize(
    ("files", "numbers", "sentence"),
    [
        ([], None, "--base_weights names no file: name one, or remove it"),
        (None, [1], "--base_weights_multiplier has 1 number for 0 files of --base_weights: give "
         "one for each file"),
        (["a"], [1, 1], "--base_weights_multiplier has 2 numbers for 1 file of --base_weights: "
         "give one for each file"),
        (["a", "b"], [1], ""),
        (None, None, ""),
    ],
)  # fmt: skip
def test_numbers_without_a_file_are_a_warning(files, numbers, sentence):
    found = sentences(base_weights=files, base_weights_multiplier=numbers)
    assert found == Report(warnings=[sentence] if sentence else [])


def test_a_pt_file_is_merged_into_models_without_numbers(tmp_path):
    """sd-scripts' own LoRA adds the file's tensors; what is no tensor is left as it is."""
    given = {"a.alpha": torch.ones(1), "a.lora_up.weight": torch.ones(2, 2), "epoch": 3}
    network = Namespace(merge_to=lambda *_: None)
    network_module = Namespace(create_network_from_weights=lambda *_, **__: (network, given))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib, "import_module", lambda _: network_module)
        with watched(ARGS, []):
            _, weights = network_module.create_network_from_weights(1, "a.pt", for_inference=True)
    assert weights | {"a.lora_up.weight": None} == given | {"a.lora_up.weight": None}
    assert weights["a.lora_up.weight"].is_meta


def test_a_block_that_is_merged_and_trained_is_a_note():
    assert sentences(merged(CONTENT), merged(CONTENT), trained=f"{CONTENT} {TEXT}") == Report(
        notes=[
            "1 module that will be trained are merged from --base_weights too: the LoRA will hold "
            "what the training adds, not what is merged"
        ]
    )


def test_the_plan_says_what_is_merged_and_how_strongly():
    traits = load_traits(ROOT / "blora_traits.json")
    record = [merged(CONTENT), merged(), merged(TEXT, at=0.5)]
    assert reported(plan_merged, record, traits).plan == {
        "merged": "1: 1 content (output_blocks.0.1), at 1 from my.safetensors; "
        "1: 1 text (te2), at 0.5 from my.safetensors"
    }
    assert reported(plan_merged, [merged()], traits).plan == {}


def of_another_width(path: Path) -> None:
    """A LoRA whose layers take fewer inputs than SDXL's."""
    lycoris_file(path, SCALED["LoRA"], torch.float32)
    tensors = load_file(path).items()
    save_file({n: t[:, :2].clone() if "lora_down" in n else t for n, t in tensors}, path)


REFUSED = {
    "cannot be read: correct it": lambda path: path.write_text("<html>"),
    "is a DoRA with wd_on_output=False, which LyCORIS cannot merge: train the content without "
    "dora_wd=True, or with wd_on_output=True": lambda path: lycoris_file(
        path, DORA["lora, by column"], torch.float32
    ),
}
CANNOT_MERGE = f"lycoris.kohya cannot merge {MY}: give an SDXL LoRA that it reads"


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_cannot_be_merged_is_told_by_its_file(tmp_path, monkeypatch, sentence):
    monkeypatch.chdir(tmp_path)
    REFUSED[sentence](Path("my.safetensors"))
    with pytest.raises(Exception) as caught:
        train("my.safetensors")
    assert refusal(caught.value, ARGS, "") == f"{MY} {sentence} ({caught.value})"


@pytest.mark.parametrize(
    "make", [of_another_width, lambda path: lycoris_file(path, SCALED["IA3"], torch.float32)]
)
def test_what_does_not_fit_or_is_not_read_is_told_by_its_file(tmp_path, monkeypatch, make):
    monkeypatch.chdir(tmp_path)
    make(Path("my.safetensors"))
    with pytest.raises(Exception) as caught:
        train("my.safetensors")
    assert refusal(caught.value, ARGS, "") == f"{CANNOT_MERGE} ({caught.value})"
