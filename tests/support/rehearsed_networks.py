"""LyCORIS' own networks on SDXL, made on the meta device as in a rehearsal, and their memory."""

from __future__ import annotations

from argparse import Namespace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import prodigyopt
import toml
import torch
from kohya_folder import ROOT
from lycoris_modules import SDXL, make_tree
from reports import reported
from sdxl_train_network_options import build_parser
from torch import nn

from blora.preflight.plan import OUR_NETWORK, Built, backward_pass, plan_memory
from blora.preflight.rehearsal import parameters_of
from blora.preflight.weightless import on_meta

CONTENT_STYLE = "blora_content_style"
OPTIONS = (
    "--network_module=blora_network --network_dim=64 --network_alpha=64 --network_train_unet_only "
    "--mixed_precision=fp16 --gradient_checkpointing --cache_latents --optimizer_type=prodigy "
    "--output_dir=_out --output_name=hero_1"
).split()
OPTIONS += ["--network_args", f"preset=lycoris_presets/{CONTENT_STYLE}.toml"]


def options(*more: str, without: str = "") -> Namespace:
    """The trainer's options with sd-scripts' defaults: a launcher's, less one, and more."""
    words = [word for word in OPTIONS if not without or not word.startswith(f"--{without}")]
    return build_parser().parse_args([*words, *more])


@cache
def sdxl() -> tuple[nn.Module, nn.Module, nn.Module]:
    """The U-Net and both text encoders: names, classes and shapes."""
    with on_meta():
        return tuple(make_tree(SDXL[part]) for part in ("unet", "te1", "te2"))


@cache
def made(
    rank: int = 64,
    preset: str | tuple[str, ...] = CONTENT_STYLE,
    trains_text: bool = False,
    **args: str,
) -> nn.Module:
    """LyCORIS' network under a preset: of the bundle, of a file's path, or of these patterns."""
    from lycoris.kohya import create_network

    unet, *encoders = sdxl()
    path = Path(preset) if "." in preset else ROOT / f"lycoris_presets/{preset}.toml"
    with TemporaryDirectory() as folder, on_meta():
        if isinstance(preset, tuple):
            # LyCORIS keeps what an earlier preset said and this one does not.
            every_key = toml.load(ROOT / f"lycoris_presets/{CONTENT_STYLE}.toml")
            own = {"enable_conv": True, "unet_target_name": preset, "text_encoder_target_name": []}
            path = Path(folder, "own.toml")
            path.write_text(toml.dumps({**every_key, **own}))
        network = create_network(1.0, rank, rank, None, encoders, unet, preset=str(path), **args)
        network.apply_to(encoders, unet, trains_text, True)
    return network


def network(*args: object, **more: object) -> Built:
    """The same, as the plan reads it."""
    return Built(parameters_of(made(*args, **more)))


@cache
def prodigy_state() -> float:
    """Bytes that Prodigy keeps for each byte of a B-LoRA, whose lora_up begins at zero."""
    names = [(name, p.numel()) for name, p in made(1).named_parameters()]
    downs = sum(size for name, size in names if "lora_down" in name)
    ups = sum(size for _, size in names) - downs
    parameters = [nn.Parameter(torch.ones(downs)), nn.Parameter(torch.zeros(ups))]
    optimizer = prodigyopt.Prodigy(parameters)
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    kept = [value for state in optimizer.state.values() for value in state.values()]
    return sum(v.numel() for v in kept if isinstance(v, torch.Tensor) and v.ndim) / (downs + ups)


def told_memory(args: Namespace, found: Built, state: float | None, pixels: int = 1 << 20) -> str:
    """What the plan says of the card's memory; `state` is the optimizer's, beside the LoRA's."""
    backward = backward_pass(found, args, pixels, args.network_module == OUR_NETWORK)
    return reported(plan_memory, found, state, backward, args).plan["memory"]
