"""A toy in place of sd-scripts' gen_img.py: its way with options, networks, prompts and files.

A picture is what the toy U-Net makes of noise, of the prompt and of the networks. A prompt that
begins with "raise " ends it with an error of these words, "wait " with a minute of waiting.
"""

from __future__ import annotations

import argparse
import importlib
import re
import time
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import nn
from toy_sdxl import (
    REAL_CONTEXT,
    REAL_WIDTH,
    RealAttention,
    make_text_encoders,
    make_unet,
    tokenize,
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    for name in ("--ckpt", "--outdir", "--from_file", "--sampler"):
        parser.add_argument(name)
    for name in ("--network_module", "--network_weights"):
        parser.add_argument(name, nargs="*")
    for name, default in {"--W": 1024, "--H": 1024, "--steps": 50, "--batch_size": 1}.items():
        parser.add_argument(name, type=int, default=default)
    for name in ("--sdxl", "--fp16", "--bf16", "--no_half_vae", "--sdpa", "--v_parameterization"):
        parser.add_argument(name, action="store_true")
    return parser


def make_models() -> tuple[nn.Module, list[nn.Module]]:
    """The toys; the layers that a test merges into have SDXL's widths and share no weight."""
    torch.manual_seed(0)
    unet, encoders = make_unet(), make_text_encoders()
    for _, transformer, *_ in unet.output_blocks[:2]:
        block = transformer.transformer_blocks[0]
        block.attn1, block.attn2 = RealAttention(REAL_WIDTH), RealAttention(REAL_CONTEXT)
        for layer in block.modules():
            if isinstance(layer, nn.Linear):
                own = layer._parameters.items()
                layer._parameters = {k: p if p is None else nn.Parameter(p.clone()) for k, p in own}
    return unet.eval().requires_grad_(False), [e.eval().requires_grad_(False) for e in encoders]


def options_of(line: str, args: argparse.Namespace) -> tuple[str, dict[str, str]]:
    """The words of a prompt, and its options: the first seed, and the last of all others."""
    options = {"w": str(args.W), "h": str(args.H), "s": str(args.steps)}
    if seed := re.search(r" --d ([\d+,]+)", line, re.IGNORECASE):
        options["d"] = seed[1].split(",")[0]
        line = line[: seed.start()] + line[seed.end() :]
    text, *others = line.strip().split(" --")
    for other in others:
        name, _, value = other.partition(" ")
        options[name.lower()] = value
    return text, options


def encode(encoders: list[nn.Module], text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The U-Net's context and the pooled text of one prompt."""
    tokens = torch.tensor([tokenize(text)])
    (first, _), (second, pooled) = (encoder(tokens) for encoder in encoders)
    return torch.cat([first, second], -1), pooled


def draw(unet: nn.Module, encoders: list[nn.Module], text: str, options: dict[str, str]) -> Image:
    """As the real one, with guidance: the negative prompt's half of the batch comes first."""
    scale = float(options.get("l", 7.5))
    texts = [options.get("n", ""), text] if scale > 1 else [text]
    contexts, pooled = zip(*(encode(encoders, words) for words in texts), strict=True)
    height, width = int(options["h"]), int(options["w"])
    torch.manual_seed(int(options["d"]))
    latents = torch.randn(1, 4, height // 8, width // 8)
    sizes = torch.tensor([[height, width, 0, 0, height, width]])
    rows, times = len(texts), torch.tensor([500] * len(texts))
    several = latents.repeat(rows, 1, 1, 1), times, torch.cat(contexts), torch.cat(pooled)
    noise, *conditional = unet(*several, sizes.repeat(rows, 1)).chunk(rows)
    for other in conditional:
        noise = noise + scale * (other - noise)
    pixels = ((latents - noise)[0, :3].permute(1, 2, 0) * 40 + 128).clamp(0, 255).byte()
    return Image.fromarray(pixels.numpy()).resize((width, height), Image.Resampling.NEAREST)


def main() -> None:
    args = build_parser().parse_args()
    unet, encoders = make_models()
    networks = []
    for module, weights in zip(args.network_module, args.network_weights, strict=True):
        create = importlib.import_module(module).create_network_from_weights
        network, state = create(1.0, weights, None, encoders, unet, for_inference=True)
        assert not network.is_mergeable()
        network.apply_to(encoders, unet)
        network.load_state_dict(state, False)
        network.to(torch.float32).to("cpu")
        networks.append(network)
    Path(args.outdir).mkdir(exist_ok=True)
    for line in Path(args.from_file).read_text("utf-8").splitlines():
        text, options = options_of(line, args)
        print(f"prompt: {text} \u7d75", flush=True)  # which no console of Windows can print
        kind, _, words = text.partition(" ")
        if kind == "raise":
            raise RuntimeError(words)
        time.sleep(60 if kind == "wait" else 0)
        if args.sampler == "pndm" and int(options["s"]) < 4:
            raise ValueError("operands could not be broadcast together with shapes (2,) (8,)")
        for network, multiplier in zip(networks, options["am"].split(","), strict=True):
            network.set_multiplier(float(multiplier))
        info = PngInfo()
        for name, value in {"prompt": text, "seed": options["d"], "steps": options["s"]}.items():
            info.add_text(name, value)
        draw(unet, encoders, text, options).save(Path(args.outdir) / options["f"], pnginfo=info)


if __name__ == "__main__":
    main()
