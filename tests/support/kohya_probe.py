"""Print as JSON what sd-scripts and LyCORIS make of command lines, and of LoRA files.

  echo '{"command_lines": {"NAME": [...]}, "continue": {"FILE": "NAME"}, "from_file": ["FILE"]}' |
    KOHYA_PYTHON kohya_probe.py KOHYA_ROOT

Run it in a kohya folder with the bundle. A command line is read by sd-scripts' own parser, and its
network is built by LyCORIS on sd-scripts' own SDXL, whose weights are not set. A file is loaded in
both ways that LyCORIS has, into the network of a command line and alone, and compared with what is
then held. "save" names a file for the network that was made of another, with every number moved.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from lora_algebra import read_modules, weight_change
from make_random_sdxl import import_models, models_on_meta
from safetensors.torch import load_file
from torch import nn

from blora.preflight.trainer import own


def parse(argv: list[str]) -> argparse.Namespace:
    """The options as sdxl_train_network.py has them when it begins to train."""
    import sdxl_train_network

    parser = sdxl_train_network.setup_parser()
    # It reads --config_file off the command line itself; own() looks where the script lies.
    sys.argv = [sdxl_train_network.__file__, *argv]
    args = parser.parse_args(argv)
    own("verify_command_line_training_args")(args)
    args = own("read_config_from_file")(args, parser)
    own("verify_training_args")(args)
    own("verify_sdxl_training_args")(args)
    return args


def fresh_lycoris() -> Any:
    """lycoris.kohya as a new process has it: presets of before must not show."""
    for name in [name for name in sys.modules if name.split(".")[0] == "lycoris"]:
        del sys.modules[name]
    return importlib.import_module("lycoris.kohya")


def unset_models(sdxl: Any) -> list[nn.Module]:
    """sd-scripts' own models with weights of any value, in memory that nobody writes to."""
    return [model.half().to_empty(device="cpu") for model in models_on_meta(sdxl)]


def modules_of(network: nn.Module) -> list[str]:
    """The modules a file of the network would hold."""
    return sorted({name.split(".")[0] for name in network.state_dict()})


def build(sdxl: Any, args: argparse.Namespace, device: str) -> nn.Module:
    """The network that sd-scripts trains with these options, applied to SDXL."""
    te1, te2, vae, unet = unset_models(sdxl)
    options = dict(item.split("=", 1) for item in args.network_args)
    options |= {"dropout": args.network_dropout, "neuron_dropout": args.network_dropout}
    with torch.device(device):
        network = fresh_lycoris().create_network(
            1.0, args.network_dim, args.network_alpha, vae, [te1, te2], unet, **options
        )
    network.apply_to([te1, te2], unet, not args.network_train_unet_only, True)
    return network


def load(sdxl: Any, path: str, args: argparse.Namespace | None) -> nn.Module:
    """As sd-scripts has --network_weights: into the network of options, or alone."""
    if args:
        network = build(sdxl, args, "cpu")
        network.load_weights(path)
        return network
    te1, te2, vae, unet = unset_models(sdxl)  # --dim_from_weights
    network, _ = fresh_lycoris().create_network_from_weights(1.0, path, vae, [te1, te2], unet)
    network.apply_to([te1, te2], unet, True, True)
    return network


def compared(network: nn.Module, path: Path) -> dict[str, Any]:
    """The network's modules, and the tensors of the file that it does not hold as they are."""
    held, tensors = network.state_dict(), load_file(path)
    differing = [
        name
        for name, tensor in tensors.items()
        if name not in held
        or held[name].numel() != tensor.numel()
        or not torch.equal(held[name].float().flatten(), tensor.float().flatten())
    ]
    return {"modules": modules_of(network), "differing": differing, "off": off(network, path)}


def off(network: nn.Module, path: Path) -> float:
    """How far the network's changes are from the file's: the largest relative error of a module.

    A module that the file does not have must change nothing, else it is off by infinity. Of each
    transformer its first block alone, which has every shape: a change in float64 takes its time.
    """
    modules = read_modules(path)
    errors = []
    for lora in (lora for lora in network.loras if "_transformer_blocks_0_" in lora.lora_name):
        held = lora.get_diff_weight()[0].double()
        expected = held * 0
        if lora.lora_name in modules:
            expected = weight_change(modules[lora.lora_name])
        apart = (held - expected).norm()
        errors.append((apart / expected.norm()).item() if apart else 0.0)
    return max(errors)


def tried(sdxl: Any, path: str, args: argparse.Namespace | None, save: str) -> dict[str, Any]:
    """What the network of a file holds, or why LyCORIS made none."""
    try:
        network = load(sdxl, path, args)
    except (RuntimeError, TypeError) as error:
        return {"refused": str(error)}
    answer = compared(network, Path(path))
    if save:
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        network.save_weights(save, torch.float32, {})
        answer["saved_off"] = off(network, Path(save))
    return answer


def main(kohya: str) -> None:
    """Answer the question on stdin; what the libraries say goes to stderr."""
    question = json.load(sys.stdin)
    save = question.get("save", {})
    with contextlib.redirect_stdout(sys.stderr):
        sdxl = import_models(Path(kohya))
        parsed = {name: parse(line) for name, line in question.get("command_lines", {}).items()}
        alone = dict.fromkeys(question.get("from_file", []))
        loaded = {file: parsed[name] for file, name in question.get("continue", {}).items()} | alone
        models = models_on_meta(sdxl)
        answer = {
            "options": {name: vars(args) for name, args in parsed.items()},
            "modules": {n: modules_of(build(sdxl, args, "meta")) for n, args in parsed.items()},
            "parameters": [sum(p.numel() for p in model.parameters()) for model in models],
            "loaded": {f: tried(sdxl, f, args, save.get(f, "")) for f, args in loaded.items()},
        }
    print(json.dumps(answer, default=str))


if __name__ == "__main__":
    main(sys.argv[1])
