"""Every algorithm and form that LyCORIS 4.1 writes, made by hand on layers of SDXL."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from lora_algebra import Module
from lora_files import weight_shape
from safetensors.torch import save_file
from torch import Tensor

# The smallest layers of each kind, one group for each of two traits.
INPUT = {
    "3x3": "lora_unet_input_blocks_0_0",
    "1x1": "lora_unet_input_blocks_4_0_skip_connection",
    "linear": "lora_unet_input_blocks_1_0_emb_layers_1",
    "attention": "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    "norm": "lora_unet_input_blocks_4_1_transformer_blocks_0_norm1",
}
OUTPUT = {
    "3x3": "lora_unet_out_2",
    "1x1": "lora_unet_output_blocks_6_0_skip_connection",
    "linear": "lora_unet_output_blocks_6_0_emb_layers_1",
    "attention": "lora_unet_output_blocks_3_1_transformer_blocks_0_attn1_to_q",
    "norm": "lora_unet_output_blocks_3_1_norm",
}
TRAITS = {"input": "lora_unet_input_", "output": "lora_unet_out"}
WEIGHTS = ("3x3", "1x1", "linear", "attention")
CONVOLUTIONS, LINEAR = WEIGHTS[:2], WEIGHTS[2:]


@dataclass(frozen=True)
class Form:
    """The tensors' shapes, those that carry a strength, and the kinds of layer that have it.

    A letter is an axis: out is o = a * b, in is i = c * d, r is the rank. K is the kernel, J a
    kernel of 1, and I and D are in and d with the kernel in one axis; a Linear has neither K nor J.
    """

    axes: dict[str, str]
    scaled: Collection[str] = ()
    kinds: tuple[str, ...] = WEIGHTS


INPUT_BLOCK = 4
UP_BIAS = "lora_up.bias"
LORA = {"lora_up.weight": "orJ", "lora_down.weight": "riK"}
TUCKER = {"lora_up.weight": "orJ", "lora_mid.weight": "rrK", "lora_down.weight": "riJ"}
LOHA = {"hada_w1_a": "or", "hada_w1_b": "rI", "hada_w2_a": "or", "hada_w2_b": "rI"}
LOHA_TUCKER = {"hada_t1": "rrK", "hada_w1_a": "ro", "hada_w1_b": "ri"}
LOHA_TUCKER |= {"hada_t2": "rrK", "hada_w2_a": "ro", "hada_w2_b": "ri"}
GLORA = {"a1.weight": "irJ", "a2.weight": "riJ", "b1.weight": "orJ", "b2.weight": "riK"}
W1_FACTORS = {"lokr_w1_a": "ar", "lokr_w1_b": "rc"}
W2_FACTORS = {"lokr_w2_a": "br", "lokr_w2_b": "rD"}
W2_TUCKER = {"lokr_t2": "rrK", "lokr_w2_a": "rb", "lokr_w2_b": "rd"}
FORMS = {
    "LoRA": Form(LORA, {"lora_up.weight"}),
    "LoRA, with bias": Form(LORA | {"diff_b": "o"}, {"lora_up.weight", "diff_b"}),
    "LoCon, tucker": Form(TUCKER, {"lora_up.weight"}, ("3x3",)),
    "DyLoRA": Form(LORA | {"lora_up.weight": "or"}, {"lora_up.weight"}, CONVOLUTIONS),
    "LoHa": Form(LOHA, {"hada_w1_a"}),
    "LoHa, tucker": Form(LOHA_TUCKER, {"hada_w1_a"}, ("3x3",)),
    "LoKr, both whole": Form({"lokr_w1": "ac", "lokr_w2": "bdK"}, {"lokr_w1"}),
    "LoKr, w2 factored": Form({"lokr_w1": "ac"} | W2_FACTORS, {"lokr_w1"}),
    "LoKr, w1 factored": Form(W1_FACTORS | {"lokr_w2": "bdK"}, {"lokr_w1_a"}),
    "LoKr, both factored": Form(W1_FACTORS | W2_FACTORS, {"lokr_w1_a"}),
    "LoKr, tucker": Form({"lokr_w1": "ac"} | W2_TUCKER, {"lokr_w1"}, ("3x3",)),
    "LoKr, w1 factored, tucker": Form(W1_FACTORS | W2_TUCKER, {"lokr_w1_a"}, ("3x3",)),
    "full": Form({"diff": "oiK"}, {"diff"}),
    "full, with bias": Form({"diff": "oiK", "diff_b": "o"}, {"diff", "diff_b"}),
    "norm": Form({"w_norm": "o", "b_norm": "o"}, {"w_norm", "b_norm"}, ("norm",)),
    "norm, without bias": Form({"w_norm": "o"}, {"w_norm"}, ("norm",)),
    "IA3": Form({"weight": "o", "on_input": ""}, {"weight"}, LINEAR),
    "IA3, on the input": Form({"weight": "i", "on_input": ""}, {"weight"}, LINEAR),
    "IA3, conv": Form({"weight": "1oJ", "on_input": ""}, {"weight"}, CONVOLUTIONS),
    "IA3, conv, on the input": Form({"weight": "1iJ", "on_input": ""}, {"weight"}, CONVOLUTIONS),
    "GLoRA": Form(GLORA, {"a2.weight", "b2.weight"}),
}
# Whose bias comes out as the change of the bias that it means.
WITH_UP_BIAS = Form(LORA | {UP_BIAS: "o"}, {"lora_up.weight", UP_BIAS})
# Of OFT h blocks of 2 numbers, of inputs q of 4 (6 above the diagonal), of BOFT m times n of 10.
REFUSED = {
    "OFT": Form({"oft_blocks": "h22", "alpha": ""}),
    "OFT, rescaled": Form({"oft_blocks": "h22", "rescale": "o1J", "alpha": ""}),
    "OFT, of inputs": Form({"oft_R.weight": "q6"}),
    "BOFT": Form({"oft_blocks": "mnxx", "alpha": ""}, kinds=("attention",)),
    "T-LoRA": Form({"q_layer.weight": "riJ", "p_layer.weight": "orJ", "lambda_layer": "1r"}),
    "DoRA": Form(LORA | {"dora_scale": "o1J"}),
    "DoRA, by column": Form(LORA | {"dora_scale": "1iJ"}),
    "LoHa with DoRA": Form(LOHA | {"dora_scale": "o1J"}),
    "LoKr with DoRA": Form({"lokr_w1": "ac", "lokr_w2": "bdK", "dora_scale": "o1J"}),
}


def split(width: int) -> tuple[int, int]:
    """Two factors of a width, as near to each other as can be, the smaller one first."""
    small = max(n for n in range(1, math.isqrt(width) + 1) if width % n == 0)
    return small, width // small


def axis_lengths(name: str, rank: int) -> dict[str, list[int]]:
    """What each letter of a form stands for on the layer of this name."""
    shape = weight_shape(name)
    outputs, inputs, *kernel = shape if len(shape) > 1 else [*shape, 1]
    lengths = {"r": rank, "o": outputs, "i": inputs, "x": 10, "h": outputs // 2}
    lengths["a"], lengths["b"] = split(outputs)
    lengths["c"], lengths["d"] = split(inputs)
    lengths["I"], lengths["D"] = (n * math.prod(kernel) for n in (inputs, lengths["d"]))
    lengths["n"] = outputs // 10
    lengths["q"] = lengths["I"] // INPUT_BLOCK
    lengths["m"] = (lengths["n"] - 1).bit_count() + 1
    return {letter: [length] for letter, length in lengths.items()} | {
        "K": kernel,
        "J": [1 for _ in kernel],
        **{digit: [int(digit)] for digit in "126"},
    }


def make_module(
    name: str, form: Form, rank: int, alpha: float | None, dtype: torch.dtype, seed: int = 0
) -> Module:
    """Random tensors of the form on the layer; the same arguments give the same numbers."""
    noise = torch.Generator().manual_seed(seed)
    lengths = axis_lengths(name, rank)
    shapes = {s: [n for axis in axes for n in lengths[axis]] for s, axes in form.axes.items()}
    module = {s: torch.randn(shape, generator=noise).to(dtype) for s, shape in shapes.items()}
    if "on_input" in form.axes:
        module["on_input"] = torch.tensor(int("i" in form.axes["weight"]))
    if alpha is not None and any("r" in axes for axes in form.axes.values()):
        module["alpha"] = torch.tensor(alpha, dtype=dtype)
    return module


def on_each_layer(form: Form, alpha: float | None, dtype: torch.dtype) -> dict[str, Module]:
    """The form on a layer of each kind that has it."""
    return {INPUT[kind]: make_module(INPUT[kind], form, 2, alpha, dtype) for kind in form.kinds}


def base_weight(name: str) -> Tensor:
    """The weight that the layer of this name had before the training, always the same."""
    return torch.randn(weight_shape(name), generator=torch.Generator().manual_seed(1))


def write_modules(
    path: Path, modules: dict[str, Module], metadata: dict[str, str] | None = None
) -> Path:
    """Save modules by name; safetensors refuses one tensor under two names, so each is copied."""
    tensors = {f"{name}.{suffix}": t for name, m in modules.items() for suffix, t in m.items()}
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, path, metadata)
    return path
