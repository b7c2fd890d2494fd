"""LyCORIS' own networks on SDXL, made on the meta device as a rehearsal makes them."""

from __future__ import annotations

from functools import cache

from kohya_folder import ROOT
from lycoris_modules import SDXL, make_tree
from sdxl_train_network_options import build_parser
from torch import nn

from blora_plan import Built, built
from blora_rehearsal import on_meta

CONTENT_STYLE = "blora_content_style"
OPTIONS = (
    "--network_module=blora_network --network_dim=64 --network_alpha=64 --network_train_unet_only "
    "--mixed_precision=fp16 --gradient_checkpointing --cache_latents --optimizer_type=prodigy "
    "--output_dir=_out --output_name=hero_1"
).split()
OPTIONS += ["--network_args", f"preset=lycoris_presets/{CONTENT_STYLE}.toml"]


def options(*more: str, without: str = "") -> object:
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
    rank: int = 64, preset: str = CONTENT_STYLE, trains_text: bool = False, **args: str
) -> nn.Module:
    """LyCORIS' network under a preset of the bundle, or of a file's path."""
    from lycoris.kohya import create_network

    unet, *encoders = sdxl()
    path = preset if "." in preset else str(ROOT / f"lycoris_presets/{preset}.toml")
    with on_meta():
        network = create_network(1.0, rank, rank, None, encoders, unet, preset=path, **args)
        network.apply_to(encoders, unet, trains_text, True)
    return network


def network(*args: object, **more: object) -> Built:
    """The same, as the plan reads it."""
    return built(made(*args, **more))
