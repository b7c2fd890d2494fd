"""A DoRA cut at a strength with its base model makes a weight that lies so far on the way.

W being the base model's weight and W' the one that was trained, that is (1 - s) W + s W'.
A broken DoRA or base model is refused in a sentence.
"""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from broken_files import STRANGERS
from exact_strength import slice_all
from lora_algebra import Module, bias_change, final_weight, layer_change, read_modules, weight_at
from lora_files import SDXL, lora_module, weight_shape
from lora_forms import INPUT, REFUSED, Form, make_module, write_modules
from lycoris_files import DORA, base_weights, lycoris_file, reload_lycoris
from safetensors.torch import save, save_file
from slicing import everything, fingerprint, finite
from torch import Tensor

Modules = dict[str, Module]
Make = Callable[[Path], object]

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
        **{f"self_attn_{projection}_proj": "attn.in_proj_weight" for projection in "qkv"},
        "self_attn_out_proj": "attn.out_proj.weight",
        "mlp_fc1": "mlp.c_fc.weight",
        "mlp_fc2": "mlp.c_proj.weight",
    }.items()
}
PREFIXES = {"unet": "model.diffusion_model", "te1": "conditioner.embedders.0.transformer"}
KEYS = OPEN_CLIP | {
    f"lora_{part}_{layer.replace('.', '_')}": f"{prefix}.{layer}.weight"
    for part, prefix in PREFIXES.items()
    for layer in SDXL[part]
}


def random_weights(names: list[str], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    noise = torch.Generator().manual_seed(3)
    shapes = {name: weight_shape(name) for name in names}
    return {n: (0.1 * torch.randn(shape, generator=noise)).to(dtype) for n, shape in shapes.items()}


def write_checkpoint(path: Path, weights: dict[str, Tensor]) -> Path:
    """A checkpoint of these weights, and of 64 MiB that no cut needs.

    Weights under one key follow each other there, as open_clip has q, k and v.
    """
    of_key: dict[str, list[Tensor]] = {"unread": [torch.zeros(1 << 26, dtype=torch.uint8)]}
    for name, weight in weights.items():
        of_key.setdefault(KEYS[name], []).append(weight)
    save_file({key: torch.cat(parts) for key, parts in of_key.items()}, path)
    return path


def lengths(weight: Tensor, form: Form) -> Tensor:
    """The lengths of a weight's rows, or of its columns."""
    others = [0, 2, 3] if form is BY_COLUMN else [1, 2, 3]
    return weight.float().square().sum(others[: weight.dim() - 1], keepdim=True).sqrt()


def make_doras(form: Form, weights: dict[str, Tensor]) -> Modules:
    """A DoRA for each weight, its lengths a little off those it had before the training."""
    modules = {}
    for seed, (name, weight) in enumerate(weights.items()):
        module = make_module(name, form, 2, 1.0, torch.float32, seed)
        module["lora_up.weight"] *= 0.05
        noise = torch.randn(module["dora_scale"].shape, generator=torch.Generator().manual_seed(1))
        module["dora_scale"] = lengths(weight, form) * (1 + 0.2 * noise)
        modules[name] = module
    return modules


def write_both(folder: Path, modules: Modules, weights: dict[str, Tensor]) -> tuple[Path, Path]:
    lora = write_modules(folder / "in.safetensors", modules)
    return lora, write_checkpoint(folder / "xl.safetensors", weights)


def assert_on_the_way(
    folder: Path, modules: Modules, weights: dict[str, Tensor], strength: float
) -> Modules:
    """Each weight that a slice makes lies so far on the way; the slice's modules."""
    lora, checkpoint = write_both(folder, modules, weights)
    result = read_modules(slice_all(lora, strength, "--base_model", checkpoint))
    assert set(result) == set(modules)
    for name, source in modules.items():
        wanted = weight_at(source, weights[name], strength)
        error = (final_weight(result[name], weights[name]) - wanted).norm() / wanted.norm()
        assert error < 1e-5, name
    return result


F32 = torch.float32
FEWER_BITS = [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
WAYS = [(strength, F32) for strength in (0.5, 1.5, -0.5, 0.0, 1e-3)]
WAYS += [(0.5, dtype) for dtype in FEWER_BITS]


@pytest.mark.parametrize(("strength", "dtype"), WAYS, ids=str)
@AXES
def test_a_dora_on_a_base_model_of_any_type_has_the_interpolated_final_weight(
    tmp_path, form, strength, dtype
):
    weights = random_weights(SMALL, dtype)
    modules = make_doras(form, weights)
    result = assert_on_the_way(tmp_path, modules, weights, strength)
    for name, source in modules.items():
        types = {suffix: tensor.dtype for suffix, tensor in result[name].items()}
        assert types == {suffix: tensor.dtype for suffix, tensor in source.items()}


def test_the_second_text_encoders_weights_go_by_open_clips_names(tmp_path):
    weights = random_weights(OPEN_CLIP)
    assert_on_the_way(tmp_path, make_doras(BY_ROW, weights), weights, 0.5)


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
    result = assert_on_the_way(tmp_path, modules, weights, strength)
    assert torch.equal(result[ATTENTION]["dora_scale"] < 0, turned)


def test_a_bias_beside_it_is_multiplied_by_the_strength(tmp_path):
    weights = random_weights([ATTENTION])
    modules = make_doras(BY_ROW, weights)
    modules[ATTENTION]["diff_b"] = torch.rand(640)
    result = assert_on_the_way(tmp_path, modules, weights, -0.5)
    assert torch.equal(bias_change(result[ATTENTION]), -0.5 * bias_change(modules[ATTENTION]))


LYCORIS_AXES = pytest.mark.parametrize("axes", ["lora, by row", "lora, by column"])


@pytest.fixture(scope="module")
def lycoris_base(tmp_path_factory) -> Path:
    """A checkpoint of the weights that LyCORIS trained on."""
    unseen = random_weights([f"{TE2}self_attn_{projection}_proj" for projection in "kv"])
    path = tmp_path_factory.mktemp("base") / "xl.safetensors"
    return write_checkpoint(path, base_weights() | unseen)


@LYCORIS_AXES
def test_lycoris_reads_the_interpolated_weight(tmp_path, lycoris_base, axes):
    lora = lycoris_file(tmp_path / "in.safetensors", DORA[axes], torch.float32)
    source = reload_lycoris(lora, DORA[axes])
    result = reload_lycoris(slice_all(lora, 0.5, "--base_model", lycoris_base), DORA[axes])
    for name, module in source.items():
        old, new = (lora.get_merged_weight()[0] for lora in (module, result[name]))
        torch.testing.assert_close(new, (module.org_weight + old) / 2, rtol=1e-5, atol=1e-6)


# How far the change may be off, in parts of itself: about half of the last bit of the type.
PRECISE = {torch.float16: 5e-4, torch.bfloat16: 4e-3}


@pytest.mark.parametrize("strength", [0.5, 0.9, -1.0])
@pytest.mark.parametrize("dtype", PRECISE, ids=str)
@LYCORIS_AXES
def test_the_change_of_a_dora_in_16_bits_is_as_exact_as_its_type(
    tmp_path, lycoris_base, axes, dtype, strength
):
    # Trained so little, a weight is ten times as large as its change: an error of the lengths that
    # is small beside the weight is ten times larger beside the change.
    lora = lycoris_file(tmp_path / "in.safetensors", DORA[axes], dtype, moved=0.03)
    weights = base_weights()
    result = read_modules(slice_all(lora, strength, "--base_model", lycoris_base))
    for name, source in read_modules(lora).items():
        wanted = strength * layer_change(source, weights[name])
        error = layer_change(result[name], weights[name]) - wanted
        assert error.norm() < PRECISE[dtype] * wanted.norm(), name


def test_a_precision_rounds_what_was_solved_and_not_what_it_is_solved_from(tmp_path):
    module = make_module(ATTENTION, BY_ROW, 2, 1.0, torch.float64)
    lora, base = write_both(tmp_path, {ATTENTION: module}, random_weights([ATTENTION]))
    [exact] = read_modules(slice_all(lora, 0.5, "--base_model", base)).values()
    assert exact["dora_scale"].dtype is torch.float64
    options = ("--base_model", base, "--save_precision", "bf16")
    [rounded] = read_modules(slice_all(lora, 0.5, *options)).values()
    for suffix, number in exact.items():
        assert torch.equal(rounded[suffix], number.bfloat16())


FIRST = INPUT["3x3"]  # the smallest of SDXL's layers: 4 to 320 channels, a kernel of 3 x 3
SOUND = "sound"


def numbers(*shape: int, value: float = 0.5, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.full(shape, value).to(dtype)


def base(value: float = 0.5, dtype: torch.dtype = torch.float16, **others: Tensor) -> Make:
    return checkpoint(numbers(320, 4, 3, 3, value=value, dtype=dtype), **others)


def checkpoint(weight: Tensor, **others: Tensor) -> Make:
    """What makes a checkpoint with this weight of the layer, and with other tensors."""
    return lambda path: save_file({KEYS[FIRST]: weight, **others}, path)


NO_FILE = "no file at {base}: correct --base_model"
NOT_WHOLE = "{base} is not a whole safetensors file"
LACKS = (
    f"{{base}} holds no weight for {FIRST}: give the SDXL checkpoint, as one .safetensors file, "
    "that the LoRA was trained on"
)
STORED = (
    f"{FIRST} is stored as F8_E4M3, which can be copied but not changed: add --save_precision, or "
    "cut it at 1.0 and set the strength where the LoRA is used"
)
MISFIT = (
    f"{FIRST} does not fit its weight in {{base}}: give the checkpoint that the LoRA was trained "
    "on, or cut it at 1.0"
)
HALF = 'every "all" module in {lora} is incomplete'
CANNOT = f"{FIRST} is a DoRA that cannot be cut at 0.5: use 1.0"
UNSCALED = (
    f"cannot rescale {FIRST} in {{lora}}, because %s: cut it at 1.0 and set the strength where the "
    "LoRA is used"
)
A_BIAS = UNSCALED % "it is DoRA and has a bias among its factors"
IS_UNKNOWN = "{lora} holds unknown tensors beside those of DoRA"
# How it is made, and what a sound DoRA is refused with on it at 0.5.
BASES: dict[str, tuple[Make, str | None]] = {
    SOUND: (base(), None),
    **{what: (make, NOT_WHOLE) for what, make in STRANGERS.items()},
    "a pickle": (STRANGERS["a pickle"], "{base} is a PyTorch file"),
    "a page": (
        STRANGERS["a page"],
        "{base} is a web page, not safetensors: download the file again",
    ),
    "a folder": (STRANGERS["a folder"], NO_FILE),
    "nothing": (STRANGERS["nothing"], NO_FILE),
    "a truncated file": (lambda path: path.write_bytes(save({"a": numbers(9)})[:-1]), NOT_WHOLE),
    "no weight": (lambda path: save_file({"a": numbers(1)}, path), LACKS),
    "a LoRA": (lambda path: save_file(lora_module(FIRST), path), LACKS),
    "a weight of another shape": (checkpoint(numbers(320, 4, 1, 1)), MISFIT),
    "a weight of other outputs": (checkpoint(numbers(640, 4, 3, 3)), MISFIT),
    "a scalar": (checkpoint(numbers()), MISFIT),
    "a weight of no size": (checkpoint(numbers(0, 4, 3, 3)), MISFIT),
    "fp8": (base(dtype=torch.float8_e4m3fn), None),
    "integers": (base(3, torch.int8), None),
    "bool": (base(dtype=torch.bool), None),
    "zeros": (base(0), None),
    "the opposite of the change": (base(-0.5), CANNOT),  # so that the trained weight is 0
    "NaN": (base(math.nan), CANNOT),
    "inf": (base(math.inf), CANNOT),
    "the largest": (base(3e38, torch.float32), CANNOT),
    "an open_clip scalar": (base(**{OPEN_CLIP[f"{TE2}self_attn_q_proj"]: numbers()}), None),
}

# Each number of the change is 0.5, so that of the trained weight's rows each is 6 long.
FACTORS = {"lora_up.weight": numbers(320, 2, 1, 1), "lora_down.weight": numbers(2, 4, 3, 3)}
SCALE = {"dora_scale": numbers(320, 1, 1, 1, value=1)}
PLAIN = FACTORS | SCALE
# Its tensors, and what it is refused with at 0.5 on a sound base model.
DORAS: dict[str, tuple[Module, str | None]] = {
    SOUND: (PLAIN, None),
    "by input": (FACTORS | {"dora_scale": numbers(1, 4, 1, 1, value=1)}, None),
    "of zeros": (FACTORS | {"dora_scale": 0 * SCALE["dora_scale"]}, None),
    "of NaN": (FACTORS | {"dora_scale": math.nan * SCALE["dora_scale"]}, CANNOT),
    "of lengths that pass 0": (FACTORS | {"dora_scale": -6 * SCALE["dora_scale"]}, CANNOT),
    "of fp8": (FACTORS | {"dora_scale": SCALE["dora_scale"].to(torch.float8_e4m3fn)}, STORED),
    "of fp8 factors": ({s: t.to(torch.float8_e4m3fn) for s, t in FACTORS.items()} | SCALE, STORED),
    "of zero factors": ({key: t * 0 for key, t in PLAIN.items()}, None),
    "without down": ({"lora_up.weight": FACTORS["lora_up.weight"]} | SCALE, HALF),
    "with a bias of lora_up": (PLAIN | {"lora_up.bias": numbers(320)}, A_BIAS),
    "with a sparse bias": (PLAIN | {"bias_values": numbers(3)}, A_BIAS),
    "with an unknown tensor": (PLAIN | {"strange": numbers(3)}, IS_UNKNOWN),
}


@pytest.mark.parametrize("what", BASES)
@pytest.mark.parametrize("dora", DORAS)
def test_a_dora_and_its_base_model_can_be_broken_in_every_combination(slicer, dora, what):
    (module, of_dora), (make, of_base) = DORAS[dora], BASES[what]
    lora = write_modules(slicer.folder / "dora.safetensors", {FIRST: module})
    base = slicer.folder / "base.safetensors"
    make(base)
    before = fingerprint(base)
    for way in (["--alphas=-2", "--save_precision", "fp16"], ["--alphas", "0.5"]):
        code = slicer(lora, *everything(slicer.folder), *way, "--base_model", base)
        assert code or finite(slicer.output)
        assert fingerprint(base) == before
    if SOUND in (dora, what):
        wanted = of_base if dora == SOUND else of_dora
        # In brackets comes the reason, in the words of the reader.
        sentence = slicer.sentence.split(" (")[0] if code else None
        assert sentence == (wanted and wanted.format(base=base, lora=lora))
