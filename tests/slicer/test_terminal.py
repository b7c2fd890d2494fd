"""No text of a file, nor any name, reaches the terminal with what could drive it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from lora_files import CONTENT, blora_modules, write
from slicing import LOOKS, slice_lora

ESCAPE = "\x1b[31m"
SHOWN = r"\x1b[31m"
CONTENT_Q = CONTENT.format(0, 1, "q")
PEFT_Q = "unet.up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such file names")


def spoken(capsys: pytest.CaptureFixture[str], lora: Path, *options: object) -> tuple[str, str]:
    """What a run says on stdout and stderr, in which no line drives the terminal."""
    place = [] if "--inspect" in options else ["--output_path", lora.parent / "out.safetensors"]
    assert slice_lora(*place, "--loras", lora, *options) in (0, 1)
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err, options
    return out, err


ODD = f"{ESCAPE}\n"
ALL, NONE = {"whitelist": ["lora_"]}, {"whitelist": ["nothing"]}
TRAIT_NAMES = [
    # the trait of this name, options, and where its name is shown
    (ALL, ["--traits", ODD], "out"),
    (ALL, ["--traits", ODD, "--not_combined"], "out"),
    (ALL, ["--traits", ODD, "--debug"], "err"),
    (ALL, ["--traits", ODD, ODD], "err"),  # twice the modules
    (ALL, ["--traits", f"not {ODD}"], "err"),
    (ALL, ["--traits", "unknown"], "err"),
    (ALL, ["--inspect"], "out"),
    (NONE, ["--traits", ODD], "err"),
    (1, ["--traits", ODD], "err"),
]


@pytest.mark.parametrize(("trait", "options", "stream"), TRAIT_NAMES)
def test_names_from_a_traits_file_cannot_drive_the_terminal(
    tmp_path, capsys, trait, options, stream
):
    lora = write(tmp_path / "parent.safetensors", blora_modules(CONTENT))
    traits = tmp_path / "traits.json"
    traits.write_text(json.dumps({ODD: trait}))
    out, err = spoken(capsys, lora, "--traits_file", traits, *options)
    assert rf"{SHOWN}\n" in {"out": out, "err": err}[stream]


def hostile(**changed: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """A LoRA of content, with other tensors, or without some, in one module."""
    tensors = blora_modules(CONTENT) | {f"{CONTENT_Q}.{s}": t for s, t in changed.items()}
    return {key: tensor for key, tensor in tensors.items() if tensor is not None}


ONE = torch.ones(1)
ODD_SUFFIX = {f"odd{ESCAPE}": ONE}
NO_UP = {"lora_up.weight": None}
MISFIT = {"lora_up.weight": torch.zeros(7, 2), "lora_down.weight": torch.zeros(2, 7)}
TOO_LARGE = {"lora_up.weight": torch.full((1280, 2), 1e6)}
PEFT = {
    f"{PEFT_Q}.lora_B.weight": torch.zeros(1280, 2),
    f"{PEFT_Q}.lora_A.weight": torch.zeros(2, 1280),
}
TWO_NAMES = {f"{PEFT_Q}.lora_B.weight": torch.zeros(1280, 2), f"{PEFT_Q}.odd{ESCAPE}": 2 * ONE}
BAD_PATTERN = {"unet.lora_alpha": 1, "unet.alpha_pattern": {f"({ESCAPE}": 2}}
SHOWN_METADATA = ("sd_model_name", "steps", "num_train_images", "training_comment", "output_name")
TEXTS: dict[str, tuple[dict[str, torch.Tensor], dict[str, str]]] = {
    # what a file holds, and its metadata
    "nothing odd": (hostile(), {}),
    "a suffix": (hostile(**ODD_SUFFIX), {}),
    "a key of no layer": (hostile() | {f"odd{ESCAPE}.weight": ONE}, {}),
    "nothing but a key of no layer": ({f"odd{ESCAPE}\n.weight": ONE}, {}),
    "half a module": (hostile(**NO_UP, **ODD_SUFFIX), {}),
    "a module that does not fit": (hostile(**MISFIT, **ODD_SUFFIX), {}),
    "a DoRA": (hostile(dora_scale=torch.ones(1280, 1), **ODD_SUFFIX), {}),
    "numbers that overflow": (hostile(**TOO_LARGE), {}),
    "a type of its own": (hostile(**{f"odd{ESCAPE}": ONE.char()}), {}),
    "two names of one module": (hostile(**ODD_SUFFIX) | TWO_NAMES, {}),
    "another model": (hostile(), {"ss_base_model_version": f"sd_v1{ESCAPE}"}),
    "metadata that is shown": (
        hostile(),
        {f"ss_{key}": ESCAPE for key in SHOWN_METADATA}
        | {"modelspec.title": ESCAPE, "ss_tag_frequency": json.dumps({ESCAPE: {ESCAPE: 3}})},
    ),
    "metadata of a key that is left out": (hostile(), {f"ss_{ESCAPE}": "x" * 2_000_000}),
    "PEFT's settings that are none": (hostile(), {"lora_adapter_metadata": f"{{{ESCAPE}"}),
    "a pattern of PEFT's that is none": (PEFT, {"lora_adapter_metadata": json.dumps(BAD_PATTERN)}),
}
TEXT_WAYS = [
    *LOOKS, [], ["--debug"], ["--not_combined"], ["--alphas", "0.5"], ["--save_precision", "fp16"],
    ["--traits", "style"], ["--traits", "content", "content"],
]  # fmt: skip


@POSIX
@pytest.mark.parametrize(("tensors", "metadata"), TEXTS.values(), ids=TEXTS)
def test_no_text_of_a_file_nor_its_name_reaches_the_terminal_unescaped(
    tmp_path, capsys, tensors, metadata
):
    lora = write(tmp_path / f"a{ESCAPE}.safetensors", tensors, metadata)
    for way in TEXT_WAYS:
        out, err = spoken(capsys, lora, *way)
        if "--json" in way and out:
            [facts] = json.loads(out)
            assert facts["file"] == str(lora)
        elif "error: " not in err:
            assert SHOWN in out, way  # it says what it made of which file


REFUSED_PATHS = {
    # what follows --loras
    "a LoRA that is none": f"text{ESCAPE}",
    "traits that are none": f"a.safetensors --traits_file text{ESCAPE}",
    "no LoRA": f"no{ESCAPE}.safetensors",
    "no traits": f"a.safetensors --traits_file no{ESCAPE}.json",
    "no base model": f"a.safetensors --base_model no{ESCAPE}.safetensors",
    "an output of another kind": f"a.safetensors --output_path out{ESCAPE}.ckpt",
    "an output in no folder": f"a.safetensors --output_path no{ESCAPE}/out.safetensors",
}


@POSIX
@pytest.mark.parametrize("args", REFUSED_PATHS.values(), ids=REFUSED_PATHS)
def test_no_path_reaches_the_terminal_unescaped_in_a_refusal(tmp_path, capsys, monkeypatch, args):
    monkeypatch.chdir(tmp_path)
    Path(f"text{ESCAPE}").write_text(f"{{{ESCAPE * 10}")
    write(Path("a.safetensors"), hostile())
    lora, *options = args.split()
    out, err = spoken(capsys, Path(lora), *options)
    assert (out, err[:7], err.count("\n")) == ("", "error: ", 1)
    assert SHOWN in err
