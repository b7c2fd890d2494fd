"""Print as JSON what a training step gives under one network module or another.

  echo '{"steps": {"A": {"module": "blora_network", "args": {"preset": "FILE"}}}, "layers": {}}' |
    PYTHONPATH=<a LyCORIS release>:<the bundle> python network_probe.py [KOHYA_ROOT]

A step is one forward and one backward pass through the stand-in's toy SDXL, prepared and called as
sd-scripts prepares and calls its own. With KOHYA_ROOT it is sd-scripts' own U-Net, a tenth as wide.
A layer is one layer of LyCORIS, in its default form and with bypass_mode, against float64.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import json
import logging
import sys
from contextlib import redirect_stdout
from logging.handlers import BufferingHandler
from typing import Any

import torch
from torch import Tensor, nn

TIME = torch.tensor([500])
CHANGE = 0.05  # how large a layer's up @ down is beside its weight


class Toy:
    """The stand-in's models, with prompts of two words."""

    def __init__(self) -> None:
        import toy_sdxl

        self.unet, self.text_encoders = toy_sdxl.make_unet(), toy_sdxl.make_text_encoders()
        self.tokens = torch.tensor([toy_sdxl.tokenize("sks circle")])
        self.sizes = torch.tensor([[64, 64, 0, 0, 64, 64]])

    def conditions(self) -> list[Tensor]:
        (context1, _), (context2, pooled) = (t(self.tokens) for t in self.text_encoders)
        return [context1, context2, pooled]

    def call(self, unet: nn.Module, noisy: Tensor, conditions: list[Tensor]) -> Tensor:
        *contexts, pooled = conditions
        return unet(noisy, TIME, torch.cat(contexts, dim=-1), pooled, self.sizes)


class Wrapped(nn.Module):
    """A U-Net whose blocks are not where sd-scripts has them."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.enable_gradient_checkpointing = inner.enable_gradient_checkpointing

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.inner(*inputs)


class Kohya:
    """sd-scripts' own U-Net with 32 channels where SDXL has 320; no text encoders."""

    text_encoders: tuple[nn.Module, ...] = ()

    def __init__(self) -> None:
        from library import sdxl_original_unet

        widths = {"MODEL_CHANNELS": 32, "TIME_EMBED_DIM": 128, "ADM_IN_CHANNELS": 96}
        vars(sdxl_original_unet).update(widths)
        self.unet = sdxl_original_unet.SdxlUNet2DConditionModel()
        self.unet.set_use_sdpa(True)

    def conditions(self) -> list[Tensor]:
        return [torch.randn(1, 77, 2048), torch.randn(1, 96)]

    def call(self, unet: nn.Module, noisy: Tensor, conditions: list[Tensor]) -> Tensor:
        return unet(noisy, TIME, *conditions)


def build_network(models: Toy | Kohya, case: dict[str, Any]) -> nn.Module:
    """The network as sd-scripts makes it, with every number of it set: lora_up begins at zero."""
    # As a new process has them: LyCORIS keeps the preset of before in its class.
    for name in dict.fromkeys(("lycoris.kohya", case["module"])):
        module = importlib.reload(importlib.import_module(name))
    encoders, unet = list(models.text_encoders), models.unet
    more = {"neuron_dropout": None, "dropout": None, **case.get("args", {})}
    network = module.create_network(1.0, 4, 2, None, encoders, unet, **more)
    network.apply_to(encoders, unet, case.get("text_encoders", False), True)
    torch.manual_seed(1)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.05)
    return network


def watch(unet: nn.Module) -> set[str]:
    """The layers whose output will require a gradient, by their place in the lists of blocks."""
    seen, names = set(), {module: name for name, module in unet.named_modules()}

    def note(layer: nn.Module, _inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            seen.add(names[layer])

    for block in (*unet.input_blocks, unet.middle_block, *unet.output_blocks, unet.out):
        for layer in block:
            layer.register_forward_hook(note)
    return seen


def step(models: Toy | Kohya, case: dict[str, Any]) -> dict[str, Any]:
    """One step of sd-scripts' train_network.py, from create_network to the backward pass."""
    unet, checkpointing = models.unet, case.get("checkpointing", False)
    network = build_network(models, case)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    for model in (unet, *models.text_encoders):
        model.requires_grad_(False)
    unet.train(checkpointing)
    called = torch.compile(unet, backend="eager") if case.get("compile") else unet
    network.prepare_grad_etc(list(models.text_encoders), called)
    network.train()
    reached = set() if case.get("compile") or case.get("wrapped") else watch(unet)
    torch.manual_seed(2)
    noisy = torch.randn(1, 4, 16, 16)
    with torch.set_grad_enabled(case.get("text_encoders", False)):
        conditions = models.conditions()
    if checkpointing:
        conditions = [condition.requires_grad_(True) for condition in conditions]
    if not case.get("compile"):  # which would compile all of it twice
        with torch.no_grad():  # as sampling does between two steps
            models.call(called, noisy, conditions)
    predicted = models.call(called, noisy.requires_grad_(True), conditions)
    predicted.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    return {
        "output": digest({"output": predicted}),
        "gradients": digest(gradients),
        "without_gradient": [name for name, grad in gradients.items() if grad is None],
        "zero": [n for n, grad in gradients.items() if grad is not None and not grad.any()],
        "reached": sorted(reached),
        "checkpointed": sum(getattr(m, "gradient_checkpointing", False) for m in unet.modules()),
        "modules": len(network.unet_loras) + len(network.text_encoder_loras),
    }


def digest(tensors: dict[str, Tensor | None]) -> str:
    summed = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        summed.update(name.encode())
        summed.update(b"" if tensor is None else tensor.detach().numpy().tobytes())
    return summed.hexdigest()


def told(case: dict[str, Any], make: type[Toy | Kohya]) -> dict[str, Any]:
    """A step on models of its own, and what the network logged; or how it was refused."""
    torch.manual_seed(0)
    models, log = make(), BufferingHandler(capacity=1000)
    if case.get("wrapped"):
        models.unet = Wrapped(models.unet)
    logging.getLogger("LyCORIS").handlers = [log]
    try:
        answer = step(models, case)
    except SystemExit as refused:
        answer = {"refused": refused.code}
    said = [record.getMessage() for record in log.buffer]
    return answer | {"log": [line for line in said if "early stop" in line]}


def layer(inputs: int, outputs: int, rank: int, alpha: float, dtype: str) -> dict[str, list[float]]:
    """Relative errors of a layer's output and of the gradients of lora_down, lora_up and its input.

    In 16 bits it runs as in a mixed-precision training: under autocast, with the LoRA in 32 bits.
    """
    from lycoris.modules.locon import LoConModule

    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    linear = nn.Linear(inputs, outputs, bias=False).requires_grad_(False)
    linear.weight.normal_(std=inputs**-0.5)
    linear.to(kind)
    x = torch.randn(64, inputs).to(kind)
    down, up = torch.randn(rank, inputs), torch.randn(outputs, rank)
    scale = alpha / rank
    up *= CHANGE * linear.weight.float().norm() / ((up @ down).norm() * scale)
    seed = torch.randn(64, outputs).to(kind)

    wide = [t.double().requires_grad_() for t in (down, up, x)]
    exact = wide[2] @ (linear.weight.double() + wide[1] @ wide[0] * scale).T
    exact.backward(seed.double())
    forms = []
    for bypass in (False, True):
        module = LoConModule("m", linear, 1.0, rank, alpha, bypass_mode=bypass)
        factors = module.lora_down.weight, module.lora_up.weight
        factors[0].data, factors[1].data = down.clone(), up.clone()
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", kind, enabled=dtype != "float32"):
            output = module(given)
        output.backward(seed.to(output.dtype))
        forms.append([output.detach(), *(factor.grad for factor in factors), given.grad])
    (default, bypass), true = forms, [exact.detach(), *(t.grad for t in wide)]
    found = {"default": errors(default, true), "bypass": errors(bypass, true)}
    return found | {"apart": errors(bypass, default)}


def errors(found: list[Tensor], true: list[Tensor]) -> list[float]:
    return [((f - t).norm() / t.norm()).item() for f, t in zip(found, true, strict=True)]


def main(argv: list[str]) -> None:
    question = json.load(sys.stdin)
    sys.path[:0] = argv
    torch.set_num_threads(1)  # the toy's matrices are too small to share
    gc.freeze()  # or what torch is made of is looked through with each model: half of the time
    with redirect_stdout(sys.stderr):  # LyCORIS and sd-scripts say much
        make = Kohya if argv else Toy
        steps = {name: told(case, make) for name, case in question["steps"].items()}
        layers = {name: layer(*numbers) for name, numbers in question["layers"].items()}
    print(json.dumps({"steps": steps, "layers": layers}))


if __name__ == "__main__":
    main(sys.argv[1:])
