"""A DoRA cut at another strength on a base model: broken DoRAs, broken checkpoints, and both."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from broken_files import STRANGERS
from lora_files import lora_module, write
from safetensors.torch import save
from slicing import all_traits, fingerprint, finite

# A warning would be a line on stderr that tells the user nothing.
pytestmark = pytest.mark.filterwarnings("error")

# The smallest of SDXL's layers: 4 to 320 channels, a kernel of 3 x 3.
NAME = "lora_unet_input_blocks_0_0"
WEIGHT = "model.diffusion_model.input_blocks.0.0.weight"
SOUND = "sound"


def numbers(*shape: int, value: float = 0.5, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.full(shape, value).to(dtype)


def weight(value: float = 0.5, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return numbers(320, 4, 3, 3, value=value, dtype=dtype)


def checkpoint(*weights: torch.Tensor, **others: torch.Tensor) -> Callable[[Path], object]:
    return lambda path: write(path, {WEIGHT: weights[0]} | others if weights else others)


# ---- Base models ---------------------------------------------------------------------------------

OPEN_CLIP = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
NO_FILE = "no file at {base}: correct --base_model"
NOT_WHOLE = "{base} is not a whole safetensors file"
LACKS = (
    f"{{base}} holds no weight for {NAME}: give the SDXL checkpoint, as one .safetensors file, "
    "that the LoRA was trained on"
)
STORED = (
    f"{NAME} is stored as F8_E4M3, which can be copied but not changed: add --save_precision, or "
    "cut it at 1.0 and set the strength where the LoRA is used"
)
MISFIT = (
    f"{NAME} does not fit its weight in {{base}}: give the checkpoint that the LoRA was trained "
    "on, or cut it at 1.0"
)
HALF = 'every "all" module in {lora} is incomplete'
CANNOT = f"{NAME} is a DoRA that cannot be cut at 0.5: use 1.0"
# How it is made, and what a sound DoRA is refused with on it at 0.5.
BASES: dict[str, tuple[Callable[[Path], object], str | None]] = {
    SOUND: (checkpoint(weight()), None),
    **{what: (make, NOT_WHOLE) for what, make in STRANGERS.items()},
    "a folder": (STRANGERS["a folder"], NO_FILE),
    "nothing": (STRANGERS["nothing"], NO_FILE),
    "a truncated file": (lambda path: path.write_bytes(save({WEIGHT: weight()})[:-1]), NOT_WHOLE),
    "no weight": (checkpoint(a=numbers(1)), LACKS),
    "a LoRA": (lambda path: write(path, lora_module(NAME)), LACKS),
    "a weight of another shape": (checkpoint(numbers(320, 4, 1, 1)), MISFIT),
    "a weight of other outputs": (checkpoint(numbers(640, 4, 3, 3)), MISFIT),
    "a scalar": (checkpoint(numbers()), MISFIT),
    "a weight of no size": (checkpoint(numbers(0, 4, 3, 3)), MISFIT),
    "fp8": (checkpoint(weight(dtype=torch.float8_e4m3fn)), None),
    "integers": (checkpoint(weight(3, dtype=torch.int8)), None),
    "bool": (checkpoint(weight(dtype=torch.bool)), None),
    "zeros": (checkpoint(weight(0)), None),
    "NaN": (checkpoint(weight(math.nan)), CANNOT),
    "inf": (checkpoint(weight(math.inf)), CANNOT),
    "the largest": (checkpoint(weight(3e38, torch.float32)), CANNOT),
    "an open_clip scalar": (checkpoint(weight(), **{OPEN_CLIP: numbers()}), None),
}

# ---- DoRAs ---------------------------------------------------------------------------------------

PLAIN = {"lora_up.weight": numbers(320, 2, 1, 1), "lora_down.weight": numbers(2, 4, 3, 3)}
BY_ROW = {"dora_scale": numbers(320, 1, 1, 1, value=1)}
# Its tensors, and what it is refused with at 0.5 on a sound base model.
DORAS: dict[str, tuple[dict[str, torch.Tensor], str | None]] = {
    SOUND: (PLAIN | BY_ROW, None),
    "by input": (PLAIN | {"dora_scale": numbers(1, 4, 1, 1, value=1)}, None),
    "of zeros": (PLAIN | {"dora_scale": numbers(320, 1, 1, 1, value=0)}, None),
    "of NaN": (PLAIN | {"dora_scale": numbers(320, 1, 1, 1, value=math.nan)}, CANNOT),
    "of fp8": (PLAIN | {"dora_scale": BY_ROW["dora_scale"].to(torch.float8_e4m3fn)}, STORED),
    "of fp8 factors": ({s: t.to(torch.float8_e4m3fn) for s, t in PLAIN.items()} | BY_ROW, STORED),
    "of zero factors": ({key: t * 0 for key, t in (PLAIN | BY_ROW).items()}, None),
    "without down": ({"lora_up.weight": PLAIN["lora_up.weight"]} | BY_ROW, HALF),
}


@pytest.mark.parametrize("what", BASES)
@pytest.mark.parametrize("dora", DORAS)
def test_a_dora_and_its_base_model_can_be_broken_in_every_combination(slicer, dora, what):
    (tensors, of_dora), (make, of_base) = DORAS[dora], BASES[what]
    lora, base = slicer.folder / "dora.safetensors", slicer.folder / "base.safetensors"
    write(lora, {f"{NAME}.{suffix}": tensor.clone() for suffix, tensor in tensors.items()})
    make(base)
    before = fingerprint(base)
    everything = ("--traits", "all", "--traits_file", all_traits(slicer.folder))
    for way in (["--alphas=-2", "--save_precision", "fp16"], ["--alphas", "0.5"]):
        code = slicer(lora, *everything, *way, "--base_model", base)
        assert code or finite(slicer.output)
        assert fingerprint(base) == before
    if SOUND in (dora, what):
        wanted = of_base if dora == SOUND else of_dora
        # In brackets comes the reason, in the words of the reader.
        sentence = slicer.sentence.split(" (")[0] if code else None
        assert sentence == (wanted and wanted.format(base=base, lora=lora))
