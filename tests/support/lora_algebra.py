"""The change a LoRA module makes to its layer, in float64, from the published formulas alone.

A module is a dict of its tensors by suffix. Formulas: LoRA (arXiv 2106.09685), LoHa (FedPara,
2108.06098), LoKr and LoCon (LyCORIS, 2309.14859), (IA)3 (2205.05638), GLoRA (2306.07967), OFT
(2306.07280, of inputs 2506.19847), BOFT (2311.06243), DoRA (2402.09353). A tucker core is a kernel
in the middle: out and in only meet its two ranks.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

Module = dict[str, Tensor]

# The tensors whose first axis is the rank, of which a module has one at least, or no rank.
RANK_FIRST = ("lora_down.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b", "a2.weight")


def read_modules(path: Path) -> dict[str, Module]:
    """The modules of a file in kohya's names, as they are stored."""
    modules: dict[str, Module] = {}
    for key, tensor in load_file(path).items():
        name, _, suffix = key.partition(".")
        modules.setdefault(name, {})[suffix] = tensor
    return modules


def rank_of(module: Module) -> int | None:
    """None where nothing in the module has one: then no program reads its alpha."""
    return next((len(module[suffix]) for suffix in RANK_FIRST if suffix in module), None)


def alpha_over_rank(module: Module) -> float:
    """1 where there is no rank; an alpha of 0, or none, means the rank."""
    rank = rank_of(module)
    if rank is None or "alpha" not in module:
        return 1.0
    return (float(module["alpha"]) or rank) / rank


def with_alpha(module: Module) -> Module:
    """The module as it comes out: one that has a rank and no alpha gets the rank as its alpha.

    A bias of lora_up comes out as the change of the bias that it means.
    A LoKr of two whole factors has no rank. It gets 1: LyCORIS loads none without an alpha.
    """
    rank = 1 if {"lokr_w1", "lokr_w2"} <= module.keys() else rank_of(module)
    if rank is not None and "alpha" not in module:
        module = module | {"alpha": torch.tensor(float(rank))}
    if "lora_up.bias" not in module or "dora_scale" in module or not module["alpha"]:
        return module
    bias = module["lora_up.bias"]
    scaled = bias.float() * torch.tensor(alpha_over_rank(module), dtype=torch.float32)
    kept = {suffix: tensor for suffix, tensor in module.items() if suffix != "lora_up.bias"}
    return kept | {"diff_b": scaled.to(bias.dtype)}


def tucker(core: Tensor, out_factor: Tensor, in_factor: Tensor) -> Tensor:
    """A core [r, s, kernel] between factors [r, out] and [s, in]."""
    return torch.einsum("rs...,ro,si->oi...", core, out_factor, in_factor)


def lora_change(m: Module) -> Tensor:
    """up @ mid @ down, and the numbers that LyCORIS' extraction found to be missing in that."""
    up, down = m["lora_up.weight"].flatten(1), m["lora_down.weight"]
    if "lora_mid.weight" in m:
        product = tucker(m["lora_mid.weight"], up.T, down.flatten(1))
    else:
        product = torch.einsum("or,r...->o...", up, down)
    if "bias_values" not in m:
        return product
    size = [int(length) for length in m["bias_size"]]
    missing = torch.zeros(size, dtype=product.dtype)
    missing[tuple(m["bias_indices"].long())] = m["bias_values"]
    return product + missing.reshape(product.shape)


def loha_change(m: Module) -> Tensor:
    factors = [(m[f"hada_w{i}_a"], m[f"hada_w{i}_b"], m.get(f"hada_t{i}")) for i in (1, 2)]
    halves = [a @ b if core is None else tucker(core, a, b) for a, b, core in factors]
    return halves[0] * halves[1]


def lokr_change(m: Module) -> Tensor:
    small = m["lokr_w1"] if "lokr_w1" in m else m["lokr_w1_a"] @ m["lokr_w1_b"]
    if "lokr_w2" in m:
        large = m["lokr_w2"]
    elif "lokr_t2" in m:
        large = tucker(m["lokr_t2"], m["lokr_w2_a"], m["lokr_w2_b"])
    else:
        large = torch.einsum("or,r...->o...", m["lokr_w2_a"], m["lokr_w2_b"])
    small = small.reshape(*small.shape, *[1] * (large.dim() - 2))
    return torch.kron(small, large.contiguous())


def glora_change(m: Module, base: Tensor) -> Tensor:
    """W A + B, where A = a1 a2 and B = b1 b2."""
    a = m["a1.weight"].flatten(1) @ m["a2.weight"].flatten(1)
    b = torch.einsum("or,r...->o...", m["b1.weight"].flatten(1), m["b2.weight"])
    return torch.einsum("oj...,ji->oi...", base, a) + b


def ia3_change(m: Module, base: Tensor) -> Tensor:
    """Each output, or each input, of W times a number."""
    axis = 1 if m["on_input"] else 0
    shape = [-1 if index == axis else 1 for index in range(base.dim())]
    return base * m["weight"].reshape(shape)


def turned(weight: Tensor, blocks: Tensor) -> Tensor:
    """Each run of b rows of a weight turned by its block: the Cayley transform of Q = B - B^T."""
    skew = blocks - blocks.mT
    one = torch.eye(len(skew[0]), dtype=skew.dtype)
    rotations = (one + skew) @ torch.linalg.inv(one - skew)
    runs = weight.reshape(len(blocks), len(one), -1)
    return (rotations @ runs).reshape(weight.shape)


def oft_change(m: Module, base: Tensor) -> Tensor:
    """Rows turned in [n, b, b] blocks; of BOFT, [m, n, b, b], in m ways of pairing far rows."""
    blocks = m["oft_blocks"]
    if blocks.dim() == 3:
        return m.get("rescale", 1) * turned(base, blocks.mT) - base
    weight = base
    for level, stage in enumerate(blocks):
        apart = 2**level * stage.shape[-1] // 2
        mixed = weight.unflatten(0, (-1, 2, apart)).transpose(1, 2)
        after = turned(mixed.reshape(weight.shape), stage).reshape(mixed.shape)
        weight = after.transpose(1, 2).reshape(weight.shape)
    return weight - base


def input_oft_change(m: Module, base: Tensor) -> Tensor:
    """Columns turned in blocks, each stored as the numbers above its diagonal."""
    above = m["oft_R.weight"]
    width = (1 + math.isqrt(1 + 8 * above.shape[1])) // 2
    blocks = above.new_zeros(len(above), width, width)
    rows, columns = torch.triu_indices(width, width, 1)
    blocks[:, rows, columns] = above
    return turned(base.flatten(1).T, blocks).T.reshape(base.shape) - base


def weight_change(module: Module, base: Tensor | None = None) -> Tensor:
    """What is added to the weight, a DoRA's scale left aside; five kinds depend on it."""
    m = {suffix: tensor.double() for suffix, tensor in module.items()}
    base = None if base is None else base.double()
    if "diff" in m or "w_norm" in m:
        return m["diff"] if "diff" in m else m["w_norm"]
    if "on_input" in m:
        return ia3_change(m, base)
    if "oft_blocks" in m:
        return oft_change(m, base)
    if "oft_R.weight" in m:
        return input_oft_change(m, base)
    if "b2.weight" in m:
        return alpha_over_rank(m) * glora_change(m, base)
    for marker, formula in (("lora_", lora_change), ("hada_", loha_change), ("lokr_", lokr_change)):
        if any(suffix.startswith(marker) for suffix in m):
            return alpha_over_rank(m) * formula(m)
    raise ValueError(f"no formula for {sorted(m)}")


def bias_change(module: Module) -> Tensor | None:
    """What is added to the bias, where the module changes it.

    ai-toolkit's lora_up has a bias of its own, which alpha / rank multiplies as its factors.
    """
    found = [module[suffix].double() for suffix in ("diff_b", "b_norm") if suffix in module]
    if "lora_up.bias" in module:
        found.append(alpha_over_rank(module) * module["lora_up.bias"].double())
    return sum(found[1:], found[0]) if found else None


def final_weight(module: Module, base: Tensor) -> Tensor:
    """The weight with its change; a DoRA gives each row, or column, the length it stores."""
    base = base.double()
    changed = base + weight_change(module, base).reshape(base.shape)
    if "dora_scale" not in module:
        return changed
    length = module["dora_scale"].double()
    axis = 0 if length.shape[0] != 1 else 1
    others = [index for index in range(base.dim()) if index != axis]
    return (
        changed
        / changed.square().sum(others, keepdim=True).sqrt()
        * length.reshape([-1 if index == axis else 1 for index in range(base.dim())])
    )


def layer_change(module: Module, base: Tensor) -> Tensor:
    """All that a module adds to the weight, with what a DoRA's lengths make of it."""
    return final_weight(module, base) - base.double()


def weight_at(module: Module, base: Tensor, strength: float) -> Tensor:
    """The weight that a module should make at this strength: base and so much of its change."""
    return base.double() + strength * layer_change(module, base)
