"""What tests/consumers.py gives to programs: slices of each kind, and what each must change."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import torch
from lora_algebra import Module, bias_change, weight_at, weight_change
from lora_files import SDXL, weight_shape
from lora_forms import FORMS, REFUSED, WITH_UP_BIAS, Form, base_weight, make_module, write_modules
from safetensors.torch import save_file
from slicing import all_traits, slice_lora
from torch import Tensor

RANK, ALPHA = 4, 2.0
CHANGE = 0.1  # the size of a change beside its weight
# More than 12 modules: Forge and Fooocus skip a whole file for more than 12 unknown tensors.
TRANSFORMER = "input_blocks.4.1.transformer_blocks"
Layers = tuple[tuple[str, str], ...]  # part and path
# The k of attn2 is no square: 640 of 2048.
PROJECTIONS = {"0.attn1": "q k v out.0", "0.attn2": "q k out.0"}
PROJECTIONS |= {"1.attn1": "q k v out.0", "1.attn2": "q out.0"}
ATTENTION: Layers = tuple(
    ("unet", f"{TRANSFORMER}.{attention}.to_{projection}")
    for attention, projections in PROJECTIONS.items()
    for projection in projections.split()
)
KERNEL: Layers = (("unet", "input_blocks.1.0.in_layers.2"),)  # 3 x 3
CONVOLUTIONS: Layers = (*KERNEL, ("unet", "input_blocks.4.0.skip_connection"))
NORM: Layers = (("unet", f"{TRANSFORMER}.0.norm1"),)
TEXT: Layers = tuple(
    (part, f"text_model.encoder.layers.0.self_attn.{projection}_proj")
    for part in ("te1", "te2")
    for projection in ("q", "out")
)
# Layers that have a bias in SDXL.
BIASED: Layers = (
    *(layer for layer in ATTENTION if layer[1].endswith("out.0")),
    *(("unet", f"{TRANSFORMER}.{block}.ff.net.{end}") for block in "01" for end in ("0.proj", "2")),
    *(("unet", f"input_blocks.4.1.proj_{end}") for end in ("in", "out")),
    *TEXT,
)
PATHS = {
    f"lora_{part}_{path.replace('.', '_')}": (part, path)
    for part, path in (*ATTENTION, *CONVOLUTIONS, *NORM, *BIASED)
}
BIAS = ".bias"  # after a layer's name
Modules = dict[str, Module]


@dataclass(frozen=True, eq=False)
class Row:
    """A line of the table: a form on some layers, and the strengths at which it is cut."""

    form: Form
    layers: Layers
    strengths: tuple[float, ...] = (1.0, 0.5, -1.0)
    alpha: float | None = ALPHA
    half: bool = False  # the factors as fp16; a DoRA's scale stays fp32
    fused: bool = False  # q, k and v are one module in the source, with one lora_down
    flat: bool = False  # a DoRA's scale has one axis in the source

    @property
    def names(self) -> list[str]:
        return [name for name, layer in PATHS.items() if layer in self.layers]


COLUMNS, OUTPUTS = REFUSED["DoRA, by column"], REFUSED["DoRA"]
ROWS = {
    "LoRA": Row(FORMS["LoRA"], ATTENTION),
    "LoRA without alpha in its source": Row(FORMS["LoRA"], ATTENTION, alpha=None),
    "LoRA with an alpha of 0": Row(FORMS["LoRA"], ATTENTION, alpha=0.0),
    "LoRA whose q, k, v were one": Row(FORMS["LoRA"], ATTENTION, fused=True),
    "LoRA with a bias, `diff_b`": Row(FORMS["LoRA, with bias"], BIASED),
    "LoRA with a bias, `lora_up.bias`": Row(WITH_UP_BIAS, BIASED),
    "LoCon: convolutions": Row(FORMS["LoRA"], CONVOLUTIONS),
    "LoCon with tucker": Row(FORMS["LoCon, tucker"], KERNEL),
    "LoRA of the text encoders": Row(FORMS["LoRA"], TEXT),
    "LoHa": Row(FORMS["LoHa"], ATTENTION),
    "LoHa with tucker": Row(FORMS["LoHa, tucker"], KERNEL),
    "LoKr, whole": Row(FORMS["LoKr, both whole"], ATTENTION),
    "LoKr, factored": Row(FORMS["LoKr, w2 factored"], ATTENTION),
    "LoKr, both factored": Row(FORMS["LoKr, both factored"], ATTENTION),
    "LoKr with tucker": Row(FORMS["LoKr, tucker"], KERNEL),
    "full": Row(FORMS["full"], ATTENTION),
    "full with a bias, `diff_b`": Row(FORMS["full, with bias"], BIASED),
    "norm": Row(FORMS["norm, without bias"], NORM),
    "norm with a bias, `b_norm`": Row(FORMS["norm"], NORM),
    "IA3": Row(FORMS["IA3"], ATTENTION),
    "GLoRA": Row(FORMS["GLoRA"], ATTENTION),
    "OFT, at 1": Row(REFUSED["OFT"], ATTENTION, (1.0,)),
    "OFT with `rescale`, at 1": Row(REFUSED["OFT, rescaled"], ATTENTION, (1.0,)),
    "OFT of inputs, `oft_R`, at 1": Row(REFUSED["OFT, of inputs"], ATTENTION, (1.0,)),
    "BOFT, at 1": Row(REFUSED["BOFT"], ATTENTION, (1.0,)),
    "DoRA `[1, in]`, at 1": Row(COLUMNS, ATTENTION, (1.0,)),
    "DoRA `[1, in]`, at 0.5": Row(COLUMNS, ATTENTION, (0.5,)),
    "DoRA `[1, in]`, fp16 with its scale in fp32": Row(COLUMNS, ATTENTION, (1.0,), half=True),
    "DoRA `[out, 1]`, at 1": Row(OUTPUTS, ATTENTION, (1.0,)),
    "DoRA `[out, 1]`, at 0.5": Row(OUTPUTS, ATTENTION, (0.5,)),
    "DoRA `[out, 1]`, fp16 with its scale in fp32": Row(OUTPUTS, ATTENTION, (1.0,), half=True),
    "DoRA whose scale had one axis, at 1": Row(OUTPUTS, ATTENTION, (1.0,), flat=True),
    "DoRA of convolutions `[out, 1, 1, 1]`, at 1": Row(OUTPUTS, CONVOLUTIONS, (1.0,)),
}


@cache
def base(name: str) -> Tensor:
    """The weight or bias of this name before any LoRA, the same in every process."""
    weight = base_weight(name.removesuffix(BIAS))
    return torch.zeros(len(weight)) if name.endswith(BIAS) else weight


def shape(name: str) -> tuple[str, list[int]]:
    """The kind of a layer, Linear, Conv2d or LayerNorm, and its weight's shape."""
    part, path = PATHS[name]
    return SDXL[part].get(path) or ("LayerNorm", weight_shape(name))


def tamed(name: str, module: Module, form: Form) -> Module:
    """The module as a training leaves one: a change far smaller than the weight."""
    weight = base(name)
    if "oft_blocks" in module:  # of which an alpha is not a scale, but a bound; 0 is none
        bound = {"alpha": torch.tensor(0.0)}
        length = {"rescale": 1 + 0.05 * module["rescale"]} if "rescale" in module else {}
        return {"oft_blocks": 0.01 * module["oft_blocks"]} | bound | length
    if "oft_R.weight" in module:
        return {"oft_R.weight": 0.01 * module["oft_R.weight"]}
    size = CHANGE * float(weight.norm() / weight_change(module, weight).norm())
    for suffix in form.scaled or ("lora_up.weight",):
        module[suffix] = size * module[suffix]
    if {"lokr_w1", "lokr_w2"} <= set(module):  # LyCORIS writes one that changes nothing
        module["alpha"] = torch.tensor(float(RANK))
    if "dora_scale" in module:
        others = [n for n, size in enumerate(module["dora_scale"].shape) if size == 1]
        lengths = weight.square().sum(others, keepdim=True).sqrt()
        module["dora_scale"] = lengths * (1 + 0.05 * module["dora_scale"])
    return module


@lru_cache(maxsize=1)
def source_modules(row: Row) -> Modules:
    made: Modules = {}
    for seed, name in enumerate(row.names):
        module = make_module(name, row.form, RANK, row.alpha, torch.float32, seed)
        if row.fused and (first := made.get(re.sub("attn1_to_[kv]$", "attn1_to_q", name))):
            module["lora_down.weight"] = first["lora_down.weight"]
        module = made[name] = tamed(name, module, row.form)
        if row.half:
            module |= {s: t.half() for s, t in module.items() if s != "dora_scale"}
    return made


def in_file(row: Row, modules: Modules) -> Modules:
    """The modules as the source has them."""
    if row.flat:
        scales = {name: {"dora_scale": m["dora_scale"].flatten()} for name, m in modules.items()}
        return {name: m | scales[name] for name, m in modules.items()}
    if not row.fused:
        return modules
    fused = {}
    for name, module in modules.items():
        three = [modules.get(f"{name[:-1]}{letter}") for letter in "qkv"]
        if None in three:
            fused[name] = module
        elif name.endswith("q"):
            up = torch.cat([m["lora_up.weight"] for m in three])
            fused[f"{name}kv"] = module | {"lora_up.weight": up}
    return fused


def wanted_weights(row: Row, strength: float) -> dict[str, Tensor]:
    """The weight of each layer, and a bias that changes, under the row's LoRA, in float64."""
    wanted = {}
    for name, module in source_modules(row).items():
        wanted[name] = weight_at(module, base(name), strength)
        if (change := bias_change(module)) is not None:
            wanted[name + BIAS] = strength * change
    return wanted


def write_slices(folder: Path, titles: list[str]) -> None:
    """Make the LoRA of each of these rows and cut all of it at each strength, with blora_slicer."""
    checkpoint = folder / "base.safetensors"
    attention = {name: path for name, (_, path) in PATHS.items() if PATHS[name] in ATTENTION}
    # As an SDXL checkpoint has the layers of the U-Net.
    keys = {f"model.diffusion_model.{path}.weight": base(n) for n, path in attention.items()}
    save_file(keys, checkpoint)
    traits = ("--traits", "all", "--traits_file", all_traits(folder))
    for title, strength in cuts(titles):
        row = ROWS[title]
        lora = write_modules(folder / "source.safetensors", in_file(row, source_modules(row)))
        options = ["--alphas", strength, "--output_path", slice_path(folder, title, strength)]
        if "dora_scale" in row.form.axes:
            options += ["--base_model", checkpoint]
        if slice_lora("--loras", lora, *traits, *options):
            raise RuntimeError(f"blora_slicer refuses {title} at {strength}")


def cuts(titles: list[str]) -> Iterator[tuple[str, float]]:
    return ((title, strength) for title in titles for strength in ROWS[title].strengths)


def slice_path(folder: Path, title: str, strength: float) -> Path:
    return folder / f"{list(ROWS).index(title)} at {strength}.safetensors"
