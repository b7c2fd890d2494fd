"""No text of a file, nor any name, reaches the terminal with what could drive it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lora_files import CONTENT, STYLE, blora_modules, write
from slicing import refusal, slice_lora


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return write(tmp_path / "parent.safetensors", blora_modules(CONTENT, STYLE))


def test_names_from_a_file_cannot_drive_the_terminal(tmp_path, output, capsys):
    lora = write(tmp_path / "bad.safetensors", {"\x1b[2J\n.weight": torch.zeros(1)})
    sentence = refusal(capsys, "--loras", lora, "--output_path", output)
    assert sentence.endswith("it holds \\x1b[2J\\n.weight")


ODD_TRAIT = "\x1b[2J\n"
SHOWN = r"\x1b[2J\n"
TRAIT_NAMES = [
    # the whitelist of the trait of this name, options, and where its name is shown
    ("lora_", ["--traits", ODD_TRAIT], "out"),
    ("lora_", ["--traits", ODD_TRAIT, "--not_combined"], "out"),
    ("lora_", ["--traits", ODD_TRAIT, "--debug"], "err"),
    ("lora_", ["--traits", ODD_TRAIT, ODD_TRAIT], "err"),  # both hold the same modules
    ("lora_", ["--traits", f"not {ODD_TRAIT}"], "err"),
    ("lora_", ["--traits", "unknown"], "err"),
    ("nothing", ["--traits", ODD_TRAIT], "err"),
    ("lora_", ["--inspect"], "out"),
]


@pytest.mark.parametrize(("whitelist", "options", "stream"), TRAIT_NAMES)
def test_names_from_a_traits_file_cannot_drive_the_terminal(
    lora, output, capsys, whitelist, options, stream
):
    traits = lora.with_name("traits.json")
    traits.write_text(json.dumps({ODD_TRAIT: {"whitelist": [whitelist]}}))
    place = [] if "--inspect" in options else ["--output_path", output]
    slice_lora("--loras", lora, "--traits_file", traits, *options, *place)
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    assert SHOWN in getattr(captured, stream)


def test_a_trait_of_another_form_is_named_without_what_drives_the_terminal(lora, output, capsys):
    traits = lora.with_name("traits.json")
    traits.write_text(json.dumps({ODD_TRAIT: 1}))
    sentence = refusal(capsys, "--loras", lora, "--traits_file", traits, "--output_path", output)
    assert sentence.startswith(f'trait "{SHOWN}" in {traits} is not of the form ')


# ---- All texts, in all that is said --------------------------------------------------------------

ESCAPE = "\x1b[31m"
CONTENT_Q = CONTENT.format(0, 1, "q")
PEFT_Q = "unet.up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def hostile(**changed: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """A LoRA of content, with other tensors, or without some, in one module."""
    tensors = blora_modules(CONTENT) | {f"{CONTENT_Q}.{s}": t for s, t in changed.items()}
    return {key: tensor for key, tensor in tensors.items() if tensor is not None}


ODD_SUFFIX = {f"odd{ESCAPE}": torch.zeros(1)}
NO_UP = {"lora_up.weight": None}
MISFIT = {"lora_up.weight": torch.zeros(7, 2), "lora_down.weight": torch.zeros(2, 7)}
OF_DORA = {"dora_scale": torch.ones(1280, 1)}
TOO_LARGE = {"lora_up.weight": torch.full((1280, 2), 1e6)}
TEXTS: dict[str, tuple[dict[str, torch.Tensor], dict[str, str]]] = {
    # what a file holds, and its metadata
    "nothing odd": (hostile(), {}),
    "a suffix": (hostile(**ODD_SUFFIX), {}),
    "a key of no layer": (hostile() | {f"odd{ESCAPE}.weight": torch.zeros(1)}, {}),
    "nothing but a key of no layer": ({f"odd{ESCAPE}.weight": torch.zeros(1)}, {}),
    "half a module": (hostile(**NO_UP, **ODD_SUFFIX), {}),
    "a module that does not fit": (hostile(**MISFIT, **ODD_SUFFIX), {}),
    "a DoRA": (hostile(**OF_DORA, **ODD_SUFFIX), {}),
    "numbers that overflow": (hostile(**TOO_LARGE), {}),
    "a type of its own": (hostile(**{f"odd{ESCAPE}": torch.zeros(1, dtype=torch.int8)}), {}),
    "two names of one module": (
        hostile(**ODD_SUFFIX)
        | {f"{PEFT_Q}.lora_B.weight": torch.zeros(1280, 2)}
        | {f"lora_unet_up_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.odd{ESCAPE}":
           torch.ones(1)},
        {},
    ),
    "another model": (hostile(), {"ss_base_model_version": f"sd_v1{ESCAPE}"}),
    "another architecture": (hostile(), {"modelspec.architecture": f"flux-1-dev{ESCAPE}/lora"}),
    "metadata that is shown": (
        hostile(),
        {
            "ss_sd_model_name": ESCAPE,
            "ss_steps": ESCAPE,
            "ss_num_train_images": ESCAPE,
            "ss_training_comment": ESCAPE,
            "ss_output_name": ESCAPE,
            "modelspec.title": ESCAPE,
            "ss_tag_frequency": json.dumps({ESCAPE: {ESCAPE: 3}}),
        },
    ),
    "metadata of a key that is left out": (hostile(), {f"ss_{ESCAPE}": "x" * 2_000_000}),
    "PEFT's settings that are none": (hostile(), {"lora_adapter_metadata": f"{{{ESCAPE}"}),
    "a pattern of PEFT's that is none": (
        {
            f"{PEFT_Q}.lora_B.weight": torch.zeros(1280, 2),
            f"{PEFT_Q}.lora_A.weight": torch.zeros(2, 1280),
        },
        {
            "lora_adapter_metadata": json.dumps(
                {"unet.lora_alpha": 1, "unet.alpha_pattern": {f"({ESCAPE}": 2}}
            )
        },
    ),
}  # fmt: skip
TEXT_WAYS = [
    [], ["--debug"], ["--not_combined"], ["--alphas", "0.5"], ["--save_precision", "fp16"],
    ["--inspect"], ["--inspect", "--json"], ["--traits", "style"],
    ["--traits", "content", "content"],
]  # fmt: skip


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such file names")
@pytest.mark.parametrize(("tensors", "metadata"), TEXTS.values(), ids=TEXTS)
def test_no_text_of_a_file_nor_its_name_reaches_the_terminal_unescaped(
    tmp_path, capsys, tensors, metadata
):
    lora = write(tmp_path / f"a{ESCAPE}.safetensors", tensors, metadata)
    output = tmp_path / f"b{ESCAPE}.safetensors"
    for way in TEXT_WAYS:
        place = [] if "--inspect" in way else ["--output_path", output]
        code = slice_lora("--loras", lora, *way, *place)
        assert code in (0, 1)
        captured = capsys.readouterr()
        said = captured.out + captured.err
        assert "\x1b" not in said, way
        if "--json" in way and captured.out:
            [facts] = json.loads(captured.out)
            assert facts["file"] == str(lora)
        elif code == 0:
            assert r"\x1b[31m" in captured.out, way  # it says what it made of which file


def bad_header(folder: Path) -> list[object]:
    path = folder / f"a{ESCAPE}.safetensors"
    path.write_bytes(b"\x1b[31m" * 10)
    return ["--loras", path]


def bad_settings(folder: Path) -> list[object]:
    path = write(
        folder / "adapter_model.safetensors",
        {
            f"base_model.model.{PEFT_Q.removeprefix('unet.')}.lora_B.weight": torch.zeros(1280, 2),
            f"base_model.model.{PEFT_Q.removeprefix('unet.')}.lora_A.weight": torch.zeros(2, 1280),
        },
        None,
    )
    (folder / "adapter_config.json").write_text(f'{{"r": 2, "lora_alpha": "{ESCAPE}"')
    return ["--loras", path]


def bad_traits(folder: Path) -> list[object]:
    path = folder / f"traits{ESCAPE}.json"
    path.write_text(f"{{{ESCAPE}")
    lora = write(folder / "a.safetensors", hostile())
    return ["--loras", lora, "--traits_file", path]


def as_option(option: str, name: str) -> Callable[[Path], list[object]]:
    """A path of this name, where there is nothing, as the option."""

    def options(folder: Path) -> list[object]:
        lora = write(folder / "a.safetensors", hostile())
        return ["--loras", lora, option, folder / name]

    return options


REFUSED_PATHS: dict[str, Callable[[Path], list[object]]] = {
    "a LoRA that is none": bad_header,
    "settings of PEFT that are none": bad_settings,
    "traits that are none": bad_traits,
    "no LoRA": lambda folder: ["--loras", folder / f"no{ESCAPE}.safetensors"],
    "no traits": as_option("--traits_file", f"no{ESCAPE}.json"),
    "no base model": as_option("--base_model", f"no{ESCAPE}.safetensors"),
    "an output of another kind": as_option("--output_path", f"out{ESCAPE}.ckpt"),
    "an output in no folder": as_option("--output_path", f"no{ESCAPE}/out.safetensors"),
}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such file names")
@pytest.mark.parametrize("make", REFUSED_PATHS.values(), ids=REFUSED_PATHS)
def test_no_path_reaches_the_terminal_unescaped_in_a_refusal(tmp_path, output, capsys, make):
    options = make(tmp_path)
    place = [] if "--output_path" in options else ["--output_path", output]
    assert "\x1b" not in refusal(capsys, *options, *place)
