"""The numbers of a slice: rounded as torch rounds, read as torch reads, and never made inf."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from lora_files import CONTENT, SHAPES, blora_modules, lora_module, write
from safetensors.torch import load_file
from slicing import all_traits, refusal, slice_lora, stored

NAME = CONTENT.format(0, 1, "q")
UP = f"{NAME}.lora_up.weight"
HALF, BF, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = {"F16": HALF, "BF16": BF, "F32": F32}
FLOAT_8 = [torch.float8_e4m3fn, torch.float8_e5m2]


# ---- Precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("float", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)],
)
@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_save_precision_rounds_as_torch_does(tmp_path, output, source, precision, dtype):
    tensors = blora_modules(CONTENT, dtype=source)
    lora = write(tmp_path / "a.safetensors", tensors)
    args = ("--save_precision", precision, "--output_path", output)
    assert slice_lora("--loras", lora, *args) == 0
    kept = load_file(output)
    assert all(torch.equal(kept[key], tensors[key].to(dtype)) for key in tensors)


def test_inf_and_nan_of_the_source_are_kept(tmp_path, output):
    tensors = blora_modules(CONTENT, dtype=torch.float32)
    tensors[UP][0] = torch.tensor([math.inf, math.nan])
    lora = write(tmp_path / "a.safetensors", tensors)
    for precision in ("fp16", "bf16"):
        args = ("--alphas", "0.5", "--save_precision", precision, "--output_path", output)
        assert slice_lora("--loras", lora, *args) == 0
        kept = load_file(output)[UP]
        assert kept[0, 0] == math.inf
        assert kept[0, 1].isnan()


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
    tmp_path, output, sign, number, dtype, strength, precision, saved
):
    lora = one_number(tmp_path, sign * number, dtype)
    args = (*options(strength, precision), "--output_path", output)
    assert slice_lora("--loras", lora, *args) == 0
    kept = load_file(output)[UP]
    assert (kept.dtype, float(kept[7, 1])) == (DTYPES[saved], sign * LARGEST[saved])


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("number", "dtype", "strength", "precision", "saved"), OVERFLOWS)
def test_the_first_number_that_overflows_is_refused_with_its_module(
    tmp_path, output, capsys, sign, number, dtype, strength, precision, saved
):
    lora = one_number(tmp_path, sign * number, dtype)
    args = (*options(strength, precision), "--output_path", output)
    assert refusal(capsys, "--loras", lora, *args) == (
        f"{UP} overflows {saved}: lower --alphas, or use --save_precision float"
    )
    assert not output.exists()


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


@pytest.mark.parametrize("dtype", FLOAT_8, ids=str)
def test_a_base_model_in_fp8_is_the_weight_that_torch_reads(tmp_path, dtype):
    name = "lora_unet_input_blocks_0_0"  # 4 to 320 channels
    finite = every_number(dtype)[every_number(dtype).float().isfinite()]
    weight = finite[torch.arange(320 * 4 * 9) % len(finite)].reshape(320, 4, 3, 3)
    dora = lora_module(name, dtype=F32) | {f"{name}.dora_scale": torch.ones(320, 1, 1, 1)}
    lora = write(tmp_path / "dora.safetensors", dora)
    made = {}
    for kind, base in {"fp8": weight, "fp32": weight.float()}.items():
        key = "model.diffusion_model.input_blocks.0.0.weight"
        checkpoint = write(tmp_path / f"base_{kind}.safetensors", {key: base})
        output = tmp_path / f"{kind}.safetensors"
        args = ("--traits", "all", "--traits_file", all_traits(tmp_path), "--alphas", "0.5")
        args += ("--base_model", checkpoint, "--output_path", output)
        assert slice_lora("--loras", lora, *args) == 0
        made[kind] = load_file(output)
    assert all(torch.equal(made["fp8"][key], made["fp32"][key]) for key in dora)
    assert not torch.equal(made["fp8"][f"{name}.lora_up.weight"], dora[f"{name}.lora_up.weight"])


def in_fp8(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Modules whose factors hold every number of the type, with an alpha that it holds too."""
    every = every_number(dtype)
    tensors = {}
    for key, tensor in blora_modules(CONTENT, alpha=1.5).items():
        whole = every[torch.arange(tensor.numel()) % 256].reshape(tensor.shape)
        tensors[key] = tensor.to(dtype) if key.endswith(".alpha") else whole
    return tensors


def assert_same_numbers(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Of the same type, and each number the same; NaN is NaN."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("precision", "saved"), [("fp16", HALF), ("bf16", BF), ("float", F32)])
@pytest.mark.parametrize("dtype", FLOAT_8, ids=str)
def test_save_precision_keeps_every_number_of_fp8(tmp_path, output, dtype, precision, saved):
    tensors = in_fp8(dtype)
    lora = write(tmp_path / "a.safetensors", tensors)
    args = ("--save_precision", precision, "--output_path", output)
    assert slice_lora("--loras", lora, *args) == 0
    kept = load_file(output)
    assert set(kept) == set(tensors)
    for key, tensor in tensors.items():
        assert_same_numbers(kept[key], tensor.to(saved))
        assert_same_numbers(kept[key].float(), tensor.float())


@pytest.mark.parametrize(("precision", "saved"), [("fp16", HALF), ("bf16", BF), ("float", F32)])
@pytest.mark.parametrize("strength", [0.5, -1.0, 0.3])
@pytest.mark.parametrize("dtype", FLOAT_8, ids=str)
def test_a_strength_and_a_precision_change_fp8_once(
    tmp_path, output, dtype, precision, saved, strength
):
    tensors = in_fp8(dtype)
    lora = write(tmp_path / "a.safetensors", tensors)
    args = ("--alphas", strength, "--save_precision", precision, "--output_path", output)
    assert slice_lora("--loras", lora, *args) == 0
    kept = load_file(output)
    for key, tensor in tensors.items():
        factor = strength if key.endswith(".lora_up.weight") else 1
        assert_same_numbers(kept[key], (tensor.float() * factor).to(saved))


STRANGE_8 = [torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]


@pytest.mark.parametrize("dtype", STRANGE_8, ids=str)
@pytest.mark.parametrize("strength", ["1", "0.5"])
def test_a_type_whose_numbers_are_not_known_is_refused_where_they_would_change(
    tmp_path, output, capsys, dtype, strength
):
    tensors = {key: tensor.to(dtype) for key, tensor in blora_modules(CONTENT).items()}
    lora = write(tmp_path / "a.safetensors", tensors)
    args = ("--save_precision", "fp16", "--alphas", strength, "--output_path", output)
    sentence = refusal(capsys, "--loras", lora, *args)
    assert "FNUZ" in sentence
    assert not output.exists()


@pytest.mark.parametrize("dtype", STRANGE_8, ids=str)
def test_a_type_whose_numbers_are_not_known_is_copied(tmp_path, output, dtype):
    tensors = {key: tensor.to(dtype) for key, tensor in blora_modules(CONTENT).items()}
    lora = write(tmp_path / "a.safetensors", tensors)
    assert slice_lora("--loras", lora, "--output_path", output) == 0
    assert stored(output) == stored(lora)
