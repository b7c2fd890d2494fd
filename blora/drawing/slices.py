"""The network module of blora_compare.py: slices merged into the model, other ones for each look.

gen_img.py imports it (--network_module blora.drawing.slices) and uses it as any network. The
multiplier that a prompt gives it (--am) is the number of a look, a list of cuts: they are made from
the LoRAs when they are needed. So any number of looks costs one load of the model and the memory of
one slice. Look 0 is the model itself, to the bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from blora.drawing.network import Network
from blora.sdxl import Trait
from blora.slicer.cut import Cut, take_slice
from blora.slicer.keys import ALPHA, DORA, LORA_DOWN, LORA_MID, LORA_UP
from blora.slicer.modules import Module
from blora.slicer.output import build_output
from blora.slicer.reader import BaseModel, read_base_model, read_lora
from blora.tensorfile import Tensor
from blora.text import BloraError, first_few

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64,
}  # fmt: skip
DRAWN = {
    ALPHA, DORA, LORA_UP, LORA_DOWN, LORA_MID, "diff", "w_norm", "b_norm",
    "hada_w1_a", "hada_w1_b", "hada_t1", "hada_w2_a", "hada_w2_b", "hada_t2",
    "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
}  # fmt: skip
Look = list[Cut]


# ---- Looks ---------------------------------------------------------------------------------------


def write_looks(path: Path, looks: Iterable[Look], checkpoint: Path | None) -> None:
    """The file that stands for the network's weights; the checkpoint is there for DoRAs."""
    cuts = [[asdict(cut) for cut in look] for look in looks]
    path.write_text(json.dumps({"checkpoint": checkpoint, "looks": cuts}, default=str), "utf-8")


def read_looks(path: Path) -> tuple[list[Look], BaseModel | None]:
    """What write_looks wrote."""
    facts = json.loads(path.read_text("utf-8"))
    looks = [
        [
            Cut(Path(cut["lora"]), Trait(**cut["trait"]), cut["strength"], cut["blocks"])
            for cut in look
        ]
        for look in facts["looks"]
    ]
    return looks, read_base_model(Path(facts["checkpoint"])) if facts["checkpoint"] else None


def look_modules(look: Look, base: BaseModel | None) -> Iterator[Module]:
    """The modules of a look, as a file of its slices would hold them."""
    loras = {path: read_lora(path) for path in {cut.lora for cut in look}}
    slices = [take_slice(loras[cut.lora], cut) for cut in look]
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in build_output(Path(), slices, base, has_metadata=False).tensors.items():
        name, _, suffix = key.partition(".")
        modules.setdefault(name, {})[suffix] = tensor
    yield from (Module(name, tensors) for name, tensors in modules.items())


def check_drawable(modules: Iterable[Module], lora: Path) -> None:
    """Refuse tensors that no formula below has: the picture would not be that of the LoRA."""
    for module in modules:
        if other := sorted(module.tensors.keys() - DRAWN):
            raise BloraError(
                f"{lora} cannot be drawn here: {module.name} is {module.label} "
                f"({first_few(other)}), and only LoRA, DoRA, LoHa, LoKr and whole changes can; "
                "compare it in a program that reads it"
            )


# ---- Merging -------------------------------------------------------------------------------------


def as_torch(tensor: Tensor) -> torch.Tensor:
    """The values of a tensor, in fp32."""
    data = bytearray(tensor.read())
    if not data:  # of a rank of 0, which frombuffer refuses
        return torch.empty(tensor.shape)
    return torch.frombuffer(data, dtype=DTYPES[tensor.dtype]).reshape(tensor.shape).float()


def product(up: torch.Tensor, down: torch.Tensor, core: torch.Tensor | None = None) -> torch.Tensor:
    """[out, in, ...] of [out, rank] and [rank, in, ...], or with a tucker core between them."""
    if core is None:
        return torch.einsum("or,r...->o...", up, down)
    return torch.einsum("rs...,or,si->oi...", core, up, down.flatten(1))


def lokr_factor(values: dict[str, torch.Tensor], name: str, core: str = "") -> torch.Tensor:
    """A factor of a LoKr, which is whole or a product itself."""
    if name in values:
        return values[name]
    a, b = values[f"{name}_a"], values[f"{name}_b"]
    return product(a.T, b, values[core]) if core in values else product(a, b)


def change(values: dict[str, torch.Tensor]) -> torch.Tensor | float:
    """What the factors make, before alpha / rank: LoRA (arXiv 2106.09685), LoHa (2108.06098), LoKr
    (2309.14859), and whole changes.
    """
    if LORA_UP in values:
        return product(values[LORA_UP].flatten(1), values[LORA_DOWN], values.get(LORA_MID))
    if "hada_w1_a" in values:
        halves = [(values[f"hada_w{n}_a"], values[f"hada_w{n}_b"], n) for n in (1, 2)]
        one, two = (
            product(a.T, b, values[f"hada_t{n}"]) if f"hada_t{n}" in values else product(a, b)
            for a, b, n in halves
        )
        return one * two
    if "lokr_w1" in values or "lokr_w1_a" in values:
        small, large = lokr_factor(values, "lokr_w1"), lokr_factor(values, "lokr_w2", "lokr_t2")
        return torch.kron(small.reshape(*small.shape, *[1] * (large.dim() - 2)), large.contiguous())
    return values.get("w_norm", 0.0)


def at_lengths(weight: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """A DoRA's weight (arXiv 2402.09353): rows have the lengths [out, 1], or columns [1, in]."""
    others = [axis for axis in range(weight.dim()) if axis != (lengths.shape[0] == 1)]
    current = weight.square().sum(others, keepdim=True).sqrt()
    return weight * (lengths.reshape(current.shape) / current)


def merged(layer: Any, module: Module) -> dict[str, torch.Tensor]:
    """The layer's weight, and bias where that changes, with a module's change: computed in fp32."""
    weight = layer.weight.float()
    values = {suffix: as_torch(t).to(weight.device) for suffix, t in module.tensors.items()}
    # An alpha of 0, which trainers read as the rank, is no change to every program that draws.
    scale = 0.0 if module.rank and module.alpha == 0 else module.scale
    added = change(values) * scale + values.get("diff", 0.0)
    if isinstance(added, torch.Tensor):
        weight = weight + added.reshape(weight.shape)
    state = {"weight": at_lengths(weight, values[DORA]) if DORA in values else weight}
    return state | ({"bias": layer.bias.float() + values["b_norm"]} if "b_norm" in values else {})


class Looks(Network):
    """The network that gen_img.py sees."""

    def __init__(self, looks: list[Look], base: BaseModel | None) -> None:
        self.looks, self.base, self.current = looks, base, 0
        self.layers: dict[str, Any] = {}
        self.own: dict[str, dict[str, torch.Tensor]] = {}  # the checkpoint's, of layers once merged

    def apply_to(self, text_encoders: list[torch.nn.Module], unet: torch.nn.Module) -> None:
        """Find the layers by kohya's names."""
        models = {"lora_unet": unet}
        models |= {f"lora_te{n}": model for n, model in enumerate(text_encoders, start=1)}
        for prefix, model in models.items():
            for name, layer in model.named_modules():
                self.layers[f"{prefix}_{name}".replace(".", "_")] = layer

    def set_multiplier(self, number: float) -> None:
        """Merge the look of this number, in place of the one that is."""
        if int(number) == self.current:
            return
        for name, state in self.own.items():
            self.layers[name].load_state_dict(state)
        self.current = int(number)
        with torch.no_grad():
            for module in look_modules(self.looks[self.current], self.base):
                self.merge(module)

    def merge(self, module: Module) -> None:
        """Write a module's change into its layer, whose own values are kept."""
        layer = self.layers[module.name]
        if module.name not in self.own:
            own = layer.state_dict().items()
            self.own[module.name] = {key: value.to("cpu", copy=True) for key, value in own}
        for key, value in merged(layer, module).items():
            getattr(layer, key).copy_(value)


def create_network_from_weights(
    multiplier: float, file: str, vae: object, text_encoder: object, unet: object, **kwargs: object
) -> tuple[Looks, dict[str, Any]]:
    """What gen_img.py asks a network module for; `file` is what write_looks wrote."""
    return Looks(*read_looks(Path(file))), {}
