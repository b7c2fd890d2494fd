"""The numbers of a slice: rounded as torch rounds, read as torch reads, and never made inf."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from lora_files import CONTENT, SHAPES, blora_modules, lora_module, write
from safetensors.torch import load_file
from slicing import cut, refused, slice_lora, stored

NAME = CONTENT.format(0, 1, "q")
UP = f"{NAME}.lora_up.weight"
FIRST = min(blora_modules(CONTENT)).split(".")[0]
HALF, BF, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = {"F16": HALF, "BF16": BF, "F32": F32}
FLOAT_8 = [torch.float8_e4m3fn, torch.float8_e5m2]


PRECISIONS = {"fp16": HALF, "bf16": BF, "float": F32}


def assert_same_numbers(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Of the same type, and each number the same; NaN is NaN."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


# ---- Precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("source", [F32, HALF, BF, F64], ids=str)
def test_save_precision_rounds_as_torch_does(tmp_path, source, precision):
    tensors = blora_modules(CONTENT, dtype=source)
    tensors[UP][0] = torch.tensor([math.inf, math.nan])
    kept = load_file(cut(write(tmp_path / "a.safetensors", tensors), "--save_precision", precision))
    for key, tensor in tensors.items():
        assert_same_numbers(kept[key], tensor.to(PRECISIONS[precision]))


# ---- Overflow ------------------------------------------------------------------------------------


def below(number: float, dtype: torch.dtype = F32) -> float:
    """The largest number of the type that is less."""
    wide = torch.tensor(number, dtype=dtype)
    return float(torch.nextafter(wide, torch.tensor(0, dtype=dtype)))


# The smallest numbers that round to inf: half a last bit above the largest.
LIMITS = {"F16": 65520.0, "BF16": (2 - 2**-8) * 2.0**127, "F32": (2 - 2**-24) * 2.0**127}
LARGEST = {"F16": 65504.0, "BF16": (2 - 2**-7) * 2.0**127, "F32": (2 - 2**-23) * 2.0**127}
SOUND = [
    # a number, its type, the strength, the precision, the type it is saved as
    (below(LIMITS["F16"]), F32, "1", "fp16", "F16"),
    (below(LIMITS["BF16"]), F32, "1", "bf16", "BF16"),
    (below(LIMITS["F32"], F64), F64, "1", "float", "F32"),
    (below(LIMITS["F16"] / 2), F32, "2", "fp16", "F16"),
    (32752.0, HALF, "2", None, "F16"),
    (65504.0, HALF, "1.000244", None, "F16"),  # 65519.98
    (1.0, HALF, "65519.99", None, "F16"),
    (1.0, BF, "3.396177e38", None, "BF16"),
    (1.0, F32, "3.4028234663852886e38", None, "F32"),
]
OVERFLOWS = [
    (LIMITS["F16"], F32, "1", "fp16", "F16"),
    (LIMITS["BF16"], F32, "1", "bf16", "BF16"),
    (LIMITS["F32"], F64, "1", "float", "F32"),
    (LIMITS["F16"] / 2, F32, "2", "fp16", "F16"),
    (32768.0, HALF, "2", None, "F16"),
    (65504.0, HALF, "1.00025", None, "F16"),  # 65520.4
    (1.0, HALF, "65520", None, "F16"),
    (1.0, BF, "3.3961775e38", None, "BF16"),
    (2.0, F32, "3.4028234e38", None, "F32"),
    (1e5, F32, "1", "fp16", "F16"),
]


def one_number(folder: Path, number: float, dtype: torch.dtype) -> Path:
    """A LoRA that is zero but for one number of lora_up."""
    tensors = {key: value * 0 for key, value in lora_module(NAME, dtype=dtype).items()}
    tensors[UP][7, 1] = number
    return write(folder / "a.safetensors", tensors)


def options(strength: str, precision: str | None) -> list[str]:
    return ["--alphas", strength, *(["--save_precision", precision] if precision else [])]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("number", "dtype", "strength", "precision", "saved"), SOUND)
def test_the_last_number_before_an_overflow_becomes_the_largest_of_the_type(
    tmp_path, sign, number, dtype, strength, precision, saved
):
    lora = one_number(tmp_path, sign * number, dtype)
    kept = load_file(cut(lora, *options(strength, precision)))[UP]
    assert (kept.dtype, float(kept[7, 1])) == (DTYPES[saved], sign * LARGEST[saved])


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("number", "dtype", "strength", "precision", "saved"), OVERFLOWS)
def test_the_first_number_that_overflows_is_refused_with_its_module(
    tmp_path, capsys, sign, number, dtype, strength, precision, saved
):
    lora = one_number(tmp_path, sign * number, dtype)
    assert refused(capsys, lora, *options(strength, precision)) == (
        f"{UP} overflows {saved}: lower --alphas, or use --save_precision float"
    )


# ---- fp8 -----------------------------------------------------------------------------------------


def every_number(dtype: torch.dtype) -> torch.Tensor:
    """All 256 numbers of an 8-bit type, NaN and inf among them."""
    return torch.arange(256, dtype=torch.uint8).view(dtype)


@pytest.mark.parametrize("dtype", FLOAT_8, ids=str)
def test_an_alpha_stored_as_fp8_is_the_number_that_torch_reads(tmp_path, capsys, dtype):
    alphas = dict(zip(SHAPES, every_number(dtype), strict=False))
    tensors = {f"{name}.alpha": alpha.clone() for name, alpha in alphas.items()}
    lora = write(tmp_path / "a.safetensors", tensors)
    assert slice_lora("--loras", lora, "--inspect", "--json") == 0
    [facts] = json.loads(capsys.readouterr().out)
    numbers = {name: float(alpha) for name, alpha in alphas.items()}
    shown = {alpha for row in facts["blocks"] for alpha in row["alphas"]}
    assert shown == {number for number in numbers.values() if math.isfinite(number)}
    assert set(facts["not_finite"]) == {
        f"{name}.alpha" for name, number in numbers.items() if not math.isfinite(number)
    }


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("strength", [1.0, 0.5, -1.0, 0.3])
@pytest.mark.parametrize("dtype", FLOAT_8, ids=str)
def test_a_strength_and_a_precision_change_fp8_once(tmp_path, dtype, precision, strength):
    every, tensors = every_number(dtype), {}
    for key, tensor in blora_modules(CONTENT, alpha=1.5).items():
        whole = every[torch.arange(tensor.numel()) % 256].reshape(tensor.shape)
        tensors[key] = tensor.to(dtype) if key.endswith(".alpha") else whole
    lora = write(tmp_path / "a.safetensors", tensors)
    kept = load_file(cut(lora, "--alphas", strength, "--save_precision", precision))
    assert set(kept) == set(tensors)
    for key, tensor in tensors.items():
        factor = strength if key.endswith(".lora_up.weight") else 1
        assert_same_numbers(kept[key], (tensor.float() * factor).to(PRECISIONS[precision]))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fnuz, torch.float8_e5m2fnuz], ids=str)
def test_a_type_whose_numbers_are_not_known_is_copied_and_refused_where_they_would_change(
    tmp_path, capsys, dtype
):
    tensors = {key: tensor.to(dtype) for key, tensor in blora_modules(CONTENT).items()}
    lora = write(tmp_path / "a.safetensors", tensors)
    output = cut(lora)
    assert stored(output) == stored(lora)
    output.unlink()
    capsys.readouterr()
    (name, *_), *_ = stored(lora).values()
    assert refused(capsys, lora, "--save_precision", "fp16") == (
        f"{FIRST} is stored as {name}, which can be copied but not converted: leave out "
        "--save_precision"
    )
    assert refused(capsys, lora, "--save_precision", "fp16", "--alphas", "0.5") == (
        f"{FIRST} is stored as {name}, which can be copied but not changed: cut it at 1.0 and "
        "set the strength where the LoRA is used"
    )
