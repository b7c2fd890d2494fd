"""A DoRA cut at a strength with its base model makes a weight that lies so far on the way.

W being the base model's weight and W' the one that was trained, that is (1 - s) W + s W'.
"""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch
from exact_strength import digits, slice_all
from lora_algebra import (
    Module,
    bias_change,
    final_weight,
    layer_change,
    read_modules,
    weight_at,
)
from lora_files import SDXL, weight_shape
from lora_forms import INPUT, REFUSED, Form, make_module, write_modules
from lycoris_files import DORA, base_weights, lycoris_file, reload_lycoris
from slicing import all_traits, refusal
from torch import Tensor

BY_ROW, BY_COLUMN = REFUSED["DoRA"], REFUSED["DoRA, by column"]
AXES = pytest.mark.parametrize("form", [BY_ROW, BY_COLUMN], ids=["by row", "by column"])

ATTENTION = INPUT["attention"]
TE1 = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
TE2 = "lora_te2_text_model_encoder_layers_0_"
SMALL = [ATTENTION, INPUT["3x3"], INPUT["1x1"], TE1]
# The tensor in which an SDXL checkpoint has a module's weight.
OPEN_CLIP = {
    f"{TE2}{layer}": f"conditioner.embedders.1.model.transformer.resblocks.0.{key}"
    for layer, key in {
        "self_attn_q_proj": "attn.in_proj_weight",
        "self_attn_k_proj": "attn.in_proj_weight",
        "self_attn_v_proj": "attn.in_proj_weight",
        "self_attn_out_proj": "attn.out_proj.weight",
        "mlp_fc1": "mlp.c_fc.weight",
        "mlp_fc2": "mlp.c_proj.weight",
    }.items()
}
KEYS = OPEN_CLIP | {
    f"lora_{part}_{layer.replace('.', '_')}": f"{prefix}.{layer}.weight"
    for part, prefix in (
        ("unet", "model.diffusion_model"),
        ("te1", "conditioner.embedders.0.transformer"),
    )
    for layer in SDXL[part]
}
# As safetensors names them.
TYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
UNREAD = 1 << 30  # bytes of the tensors before and behind them that no one needs


def random_weights(names: list[str], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A weight for each of these layers."""
    noise = torch.Generator().manual_seed(3)
    shapes = {name: weight_shape(name) for name in names}
    return {n: (0.1 * torch.randn(shape, generator=noise)).to(dtype) for n, shape in shapes.items()}


def write_checkpoint(path: Path, weights: dict[str, Tensor]) -> Path:
    """A checkpoint whose other tensors are holes in the file, far larger than the memory used.

    Weights under one key follow each other there, as open_clip has q, k and v.
    """
    of_key: dict[str, list[Tensor]] = {}
    for name, weight in weights.items():
        of_key.setdefault(KEYS[name], []).append(weight)
    tensors = {key: torch.cat(parts) for key, parts in of_key.items()}
    header, end = {"first_stage_model.before": {"data_offsets": [0, UNREAD]}}, UNREAD
    for key, tensor in tensors.items():
        header[key] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape)}
        header[key]["data_offsets"] = [end, end + tensor.nbytes]
        end += tensor.nbytes
    header["first_stage_model.behind"] = {"data_offsets": [end, end + UNREAD]}
    for key in ("first_stage_model.before", "first_stage_model.behind"):
        header[key] |= {"dtype": "U8", "shape": [UNREAD]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.seek(UNREAD, 1)
        for tensor in tensors.values():
            file.write(tensor.view(torch.uint8).numpy().tobytes())
        file.truncate(file.tell() + UNREAD)
    return path


def lengths(weight: Tensor, form: Form) -> Tensor:
    """The lengths of a weight's rows, or of its columns."""
    axis = 1 if form is BY_COLUMN else 0
    others = [index for index in range(weight.dim()) if index != axis]
    return weight.float().square().sum(others, keepdim=True).sqrt()


def make_doras(form: Form, weights: dict[str, Tensor]) -> dict[str, Module]:
    """A DoRA for each weight, its lengths a little off those it had before the training."""
    modules = {}
    for seed, (name, weight) in enumerate(weights.items()):
        module = make_module(name, form, 2, 1.0, torch.float32, seed)
        module["lora_up.weight"] *= 0.05
        noise = torch.randn(module["dora_scale"].shape, generator=torch.Generator().manual_seed(1))
        module["dora_scale"] = lengths(weight, form) * (1 + 0.2 * noise)
        modules[name] = module
    return modules


def write_both(
    folder: Path, modules: dict[str, Module], weights: dict[str, Tensor]
) -> tuple[Path, Path]:
    """A LoRA file of the modules and a checkpoint of the weights."""
    lora = write_modules(folder / "in.safetensors", modules)
    return lora, write_checkpoint(folder / "xl.safetensors", weights)


def cut(
    folder: Path, modules: dict[str, Module], weights: dict[str, Tensor], strength: float
) -> dict[str, Module]:
    """The modules of a slice at this strength, made with a checkpoint of these weights."""
    lora, checkpoint = write_both(folder, modules, weights)
    return read_modules(slice_all(lora, strength, "--base_model", checkpoint))


def assert_on_the_way(
    result: dict[str, Module],
    modules: dict[str, Module],
    weights: dict[str, Tensor],
    strength: float,
) -> None:
    """Each weight that the slice makes lies so far on the way to the one that was trained."""
    assert set(result) == set(modules)
    for name, source in modules.items():
        wanted = weight_at(source, weights[name], strength)
        error = (final_weight(result[name], weights[name]) - wanted).norm() / wanted.norm()
        assert error < 1e-5, name


# ---- The weight that it makes --------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.5, 1.5, -0.5, 0.0, 1e-3])
@AXES
def test_a_dora_with_its_base_model_has_the_interpolated_final_weight(tmp_path, form, strength):
    weights = random_weights(SMALL)
    modules = make_doras(form, weights)
    result = cut(tmp_path, modules, weights, strength)
    assert_on_the_way(result, modules, weights, strength)
    for name, source in modules.items():
        types = {suffix: tensor.dtype for suffix, tensor in result[name].items()}
        assert types == {suffix: tensor.dtype for suffix, tensor in source.items()}


@pytest.mark.parametrize("dtype", list(TYPES)[1:], ids=str)
@AXES
def test_a_dora_on_a_base_model_of_fewer_bits_is_as_exact(tmp_path, form, dtype):
    weights = random_weights(SMALL, dtype)
    modules = make_doras(form, weights)
    assert_on_the_way(cut(tmp_path, modules, weights, 0.5), modules, weights, 0.5)


def test_the_second_text_encoders_weights_go_by_open_clips_names(tmp_path):
    weights = random_weights(OPEN_CLIP)
    modules = make_doras(BY_ROW, weights)
    assert_on_the_way(cut(tmp_path, modules, weights, 0.5), modules, weights, 0.5)


def test_what_it_takes_of_memory_is_a_few_of_its_weights(tmp_path):
    weights = random_weights(SMALL)
    lora, checkpoint = write_both(tmp_path, make_doras(BY_ROW, weights), weights)
    tracemalloc.start()
    slice_all(lora, 0.5, "--base_model", checkpoint)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * max(weight.nbytes for weight in weights.values())


@pytest.mark.parametrize(("strength", "length"), [(1.5, 0.1), (-0.5, 8.0), (2.0, 0.25)])
@AXES
def test_lengths_that_a_strength_takes_below_zero_turn_the_weight_around(
    tmp_path, form, strength, length
):
    weights = random_weights([ATTENTION])
    modules = make_doras(form, weights)
    scale = lengths(weights[ATTENTION], form)
    turned = torch.arange(scale.numel()).reshape(scale.shape) % 2 == 0
    modules[ATTENTION]["dora_scale"] = torch.where(turned, length * scale, scale)
    result = cut(tmp_path, modules, weights, strength)
    assert_on_the_way(result, modules, weights, strength)
    assert torch.equal(result[ATTENTION]["dora_scale"] < 0, turned)


def test_a_bias_beside_it_is_multiplied_by_the_strength(tmp_path):
    weights = random_weights([ATTENTION])
    modules = make_doras(BY_ROW, weights)
    modules[ATTENTION]["diff_b"] = torch.rand(640)
    result = cut(tmp_path, modules, weights, -0.5)
    assert_on_the_way(result, modules, weights, -0.5)
    assert torch.equal(bias_change(result[ATTENTION]), -0.5 * bias_change(modules[ATTENTION]))


LYCORIS_AXES = pytest.mark.parametrize("axes", ["lora, by row", "lora, by column"])


def lycoris_base(folder: Path) -> tuple[dict[str, Tensor], Path]:
    """The weights that LyCORIS trained on, and a checkpoint of them."""
    weights = base_weights()
    unseen = random_weights([f"{TE2}self_attn_{projection}_proj" for projection in "kv"])
    return weights, write_checkpoint(folder / "xl.safetensors", weights | unseen)


@LYCORIS_AXES
def test_lycoris_reads_the_interpolated_weight(tmp_path, axes):
    lora = lycoris_file(tmp_path / "in.safetensors", DORA[axes], torch.float32)
    _, checkpoint = lycoris_base(tmp_path)
    source = reload_lycoris(lora, DORA[axes])
    result = reload_lycoris(slice_all(lora, 0.5, "--base_model", checkpoint), DORA[axes])
    for name, module in source.items():
        wanted = 0.5 * module.org_weight + 0.5 * module.get_merged_weight()[0]
        torch.testing.assert_close(
            result[name].get_merged_weight()[0], wanted, rtol=1e-5, atol=1e-6
        )


# How far the change may be off, in parts of itself: about half of the last bit of the type.
PRECISE = {torch.float16: 5e-4, torch.bfloat16: 4e-3}


@pytest.mark.parametrize("strength", [0.5, 0.9, -1.0])
@pytest.mark.parametrize("dtype", PRECISE, ids=str)
@LYCORIS_AXES
def test_the_change_of_a_dora_in_16_bits_is_as_exact_as_its_type(tmp_path, axes, dtype, strength):
    # Trained so little, a weight is ten times as large as its change: an error of the lengths that
    # is small beside the weight is ten times larger beside the change.
    lora = lycoris_file(tmp_path / "in.safetensors", DORA[axes], dtype, moved=0.03)
    weights, checkpoint = lycoris_base(tmp_path)
    result = read_modules(slice_all(lora, strength, "--base_model", checkpoint))
    for name, source in read_modules(lora).items():
        wanted = strength * layer_change(source, weights[name])
        error = layer_change(result[name], weights[name]) - wanted
        assert error.norm() < PRECISE[dtype] * wanted.norm(), name


# ---- What is refused -----------------------------------------------------------------------------


def refused(
    capsys: pytest.CaptureFixture[str], lora: Path, checkpoint: Path, strength: float = 0.5
) -> str:
    """The sentence with which it is refused; nothing is left of the output then."""
    folder, output = lora.parent, lora.with_name("out.safetensors")
    args = ("--traits", "all", "--traits_file", all_traits(folder), "--alphas", digits(strength))
    args += ("--base_model", checkpoint, "--output_path", output)
    sentence = refusal(capsys, "--loras", lora, *args)
    assert not [path for path in folder.iterdir() if output.name in path.name]
    return sentence


# The weight and the lengths of a DoRA whose factors change nothing, and a strength.
NO_DIRECTION = {
    "that ends at length 0 on the way": (4 * torch.eye(640), torch.full((640, 1), 2.0), 2.0),
    "of a weight of length 0": (torch.zeros(640, 640), torch.ones(640, 1), 0.5),
    "of length inf": (torch.eye(640), torch.full((640, 1), torch.inf), 0.5),
    "of length NaN": (torch.eye(640), torch.full((640, 1), torch.nan), 0.5),
}


@pytest.mark.parametrize(("weight", "length", "strength"), NO_DIRECTION.values(), ids=NO_DIRECTION)
def test_a_row_without_a_direction_is_refused(tmp_path, capsys, weight, length, strength):
    module = make_module(ATTENTION, BY_ROW, 2, 1.0, torch.float32)
    module |= {"lora_up.weight": torch.zeros(640, 2), "dora_scale": length}
    files = write_both(tmp_path, {ATTENTION: module}, {ATTENTION: weight})
    assert refused(capsys, *files, strength) == (
        f"{ATTENTION} is a DoRA that cannot be cut at {strength:g}: use 1.0"
    )


def test_a_base_model_that_lacks_the_weight_is_refused(tmp_path, capsys):
    weights = random_weights(SMALL)
    modules = make_doras(BY_ROW, weights)
    del weights[TE1]
    lora, checkpoint = write_both(tmp_path, modules, weights)
    assert refused(capsys, lora, checkpoint) == (
        f"{checkpoint} holds no weight for {TE1}: give the SDXL checkpoint, as one .safetensors "
        "file, that the LoRA was trained on"
    )


def test_a_base_model_of_other_widths_is_refused(tmp_path, capsys):
    weights = random_weights(SMALL)
    modules = make_doras(BY_ROW, weights)
    weights[ATTENTION] = torch.ones(320, 320)
    lora, checkpoint = write_both(tmp_path, modules, weights)
    assert refused(capsys, lora, checkpoint) == (
        f"{ATTENTION} does not fit its weight in {checkpoint}: give the checkpoint that the LoRA "
        "was trained on, or cut it at 1.0"
    )


# ---- What cannot be baked ------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["lora_up.bias", "bias_values"])
def test_a_dora_with_a_bias_among_its_factors_is_refused(tmp_path, capsys, suffix):
    module = make_module(ATTENTION, BY_ROW, 2, 1.0, torch.float32) | {suffix: torch.ones(640)}
    lora = write_modules(tmp_path / "a.safetensors", {ATTENTION: module})
    base = write_checkpoint(tmp_path / "base.safetensors", random_weights([ATTENTION]))
    args = ("--traits", "all", "--traits_file", all_traits(tmp_path), "--alphas", "0.5")
    args += ("--output_path", tmp_path / "out.safetensors", "--base_model", base)
    assert refusal(capsys, "--loras", lora, *args) == (
        f"cannot rescale {ATTENTION} in {lora}, because it is DoRA and "
        "has a bias among its factors: cut it at 1.0 and set the strength where the LoRA is used"
    )


def test_a_precision_rounds_what_was_solved_and_not_what_it_is_solved_from(tmp_path):
    module = make_module(ATTENTION, BY_ROW, 2, 1.0, torch.float32)
    lora = write_modules(tmp_path / "a.safetensors", {ATTENTION: module})
    base = write_checkpoint(tmp_path / "base.safetensors", random_weights([ATTENTION]))
    [exact] = read_modules(slice_all(lora, 0.5, "--base_model", base)).values()
    options = ("--base_model", base, "--save_precision", "bf16")
    [rounded] = read_modules(slice_all(lora, 0.5, *options)).values()
    for suffix, tensor in exact.items():
        assert torch.equal(rounded[suffix], tensor.bfloat16())


def test_a_dora_beside_which_something_unknown_stands_is_refused(tmp_path, capsys):
    module = make_module(ATTENTION, BY_ROW, 2, 1.0, torch.float32) | {"strange": torch.ones(1)}
    lora = write_modules(tmp_path / "a.safetensors", {ATTENTION: module})
    base = write_checkpoint(tmp_path / "base.safetensors", random_weights([ATTENTION]))
    args = ("--traits", "all", "--traits_file", all_traits(tmp_path), "--alphas", "0.5")
    args += ("--output_path", tmp_path / "out.safetensors", "--base_model", base)
    sentence = refusal(capsys, "--loras", lora, *args)
    assert f"because what {ATTENTION}.strange does is unknown" in sentence


def test_the_scale_of_a_dora_in_64_bits_keeps_them(tmp_path):
    module = make_module(ATTENTION, BY_ROW, 2, 1.0, torch.float64)
    lora = write_modules(tmp_path / "a.safetensors", {ATTENTION: module})
    base = write_checkpoint(tmp_path / "base.safetensors", random_weights([ATTENTION]))
    [result] = read_modules(slice_all(lora, 0.5, "--base_model", base)).values()
    assert result["dora_scale"].dtype is torch.float64
