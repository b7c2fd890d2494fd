"""What a training step costs under each recipe: counted, and timed on this machine.

  KOHYA_PYTHON tests/bench_blora_training.py --kohya KOHYA_ROOT
  KOHYA_PYTHON tests/bench_blora_training.py --kohya KOHYA_ROOT --time 512

Run it with the Python that sd-scripts runs with: the steps are those of sd-scripts' own U-Net, with
LyCORIS' own network on it. The first counts on torch's meta device, at 1024 x 1024 and batch 1, and
prints the table of docs/speed.md:

- TF, 10^12 floating point operations of one forward and one backward pass, as torch counts them.
- kept, the most bytes that autograd holds at a time. For this the step runs as on a card: CUDA's
  autocast rules for fp16, and attention that keeps no matrix, which is what --sdpa, --xformers and
  --mem_eff_attn have there. The weights are not among it.

The second also takes steps with random weights in bf16 on the CPU, the recipes in turns, and prints
medians as ratios. It needs 16 GB of memory and, at 512 pixels, some eight minutes on two cores.
"""

from __future__ import annotations

import importlib
import logging
import statistics
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from functools import partial
from itertools import product
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent / "support"))

import torch
from make_random_sdxl import fill
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
CONTENT_STYLE = str(ROOT / "lycoris_presets/blora_content_style.toml")
LAYOUT = str(ROOT / "lycoris_presets/blora_content_layout_style.toml")


class Recipe(NamedTuple):
    name: str
    module: str
    bypass: bool
    checkpointing: bool


RECIPES = (
    Recipe("classic", "lycoris.kohya", False, True),
    Recipe("classic with blora_network", "blora_network", False, True),
    Recipe("fast", "blora_network", True, True),
    Recipe("fast, BLORA_SAVE_MEMORY=0", "blora_network", True, False),
)
# The columns of that table, and the attention blocks that a preset can begin with.
COLUMNS = {
    "content and style, rank 64": (CONTENT_STYLE, 64),
    "content and style, rank 1024": (CONTENT_STYLE, 1024),
    "content, layout and style, rank 64": (LAYOUT, 64),
}
BLOCKS = [*(f"input_blocks.{n}.1" for n in (4, 5, 7, 8)), "middle_block.1"]
BLOCKS += [f"output_blocks.{n}.1" for n in range(6)]


def make_unet(sdxl: Any, weights: dict[str, Tensor] | None = None) -> nn.Module:
    """sd-scripts' own U-Net without weights, or with these, which it does not copy."""
    with torch.device("meta"):
        unet = sdxl.SdxlUNet2DConditionModel().half()
    if weights:
        unet.load_state_dict(weights, assign=True)
    unet.set_use_sdpa(True)
    return unet


def add_network(unet: nn.Module, recipe: Recipe, preset: str, rank: int, device: str) -> nn.Module:
    """The network of a recipe on the U-Net, in fp32, as sd-scripts has it before a step."""
    module = importlib.import_module(recipe.module)
    args = {"preset": preset, "bypass_mode": str(recipe.bypass)}
    args |= dict.fromkeys(("neuron_dropout", "dropout"))
    with torch.device(device):
        network = module.create_network(1.0, rank, rank, None, [], unet, **args)
    network.apply_to([], unet, False, True)
    if recipe.checkpointing:
        unet.enable_gradient_checkpointing()
    unet.requires_grad_(False)
    unet.train(recipe.checkpointing)
    network.prepare_grad_etc([], unet)
    network.train()
    return network


def inputs(size: int, recipe: Recipe, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Latents, time, text and size conditioning, which require gradients where sd-scripts' do."""
    like = {"device": device, "dtype": dtype}
    noisy = torch.randn(1, 4, size // 8, size // 8, **like).requires_grad_(True)
    text, label = torch.randn(1, 77, 2048, **like), torch.randn(1, 2816, **like)
    for condition in (text, label):
        condition.requires_grad_(recipe.checkpointing)
    return [noisy, torch.full((1,), 500, device=device), text, label]


IN_16_BITS = (F.linear, F.conv2d, torch.matmul, torch.bmm, torch.mm, Tensor.matmul)
IN_32_BITS = (F.layer_norm, F.group_norm)


class OnACard(TorchFunctionMode):
    """CUDA's autocast for fp16 and its attention, which the meta device does not have.

    The rules: https://docs.pytorch.org/docs/stable/amp.html, as far as SDXL and LyCORIS go.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k, v = (tensor.half() for tensor in args[:3])
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False)[0]
        for functions, dtype in ((IN_16_BITS, torch.float16), (IN_32_BITS, torch.float32)):
            if func in functions:
                args = [in_dtype(value, dtype) for value in args]
                kwargs = {name: in_dtype(value, dtype) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def in_dtype(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


class Kept:
    """The bytes that autograd holds for the backward pass: now, and at most."""

    def __init__(self, weights: list[nn.Module]) -> None:
        self.own = {p.untyped_storage()._cdata for module in weights for p in module.parameters()}
        self.holders: Counter[int] = Counter()
        self.now = self.most = 0

    def add(self, tensor: Tensor, holders: int) -> None:
        """One holder more or less; a storage counts once, however many tensors share it."""
        storage = tensor.untyped_storage()
        if storage._cdata in self.own:
            return
        before = self.holders[storage._cdata]
        self.holders[storage._cdata] += holders
        if 0 in (before, before + holders):
            self.now += holders * storage.nbytes()
            self.most = max(self.most, self.now)


class Held:
    """A tensor that autograd saved; it ends when autograd lets go of it."""

    def __init__(self, kept: Kept, tensor: Tensor) -> None:
        self.kept, self.tensor = kept, tensor
        kept.add(tensor, 1)

    def __del__(self) -> None:
        self.kept.add(self.tensor, -1)


def step_on_meta(sdxl: Any, recipe: Recipe, preset: str, rank: int, size: int) -> tuple[float, int]:
    unet = make_unet(sdxl)
    network = add_network(unet, recipe, preset, rank, "meta")
    kept, given = Kept([unet, network]), (size, recipe, "meta", torch.float16)
    hooks = torch.autograd.graph.saved_tensors_hooks(partial(Held, kept), attrgetter("tensor"))
    with OnACard(), hooks:
        unet(*inputs(*given)).float().mean().backward()
    network.half()
    # In a step of its own, with attention as the plain products that it is made of.
    with FlopCounterMode(display=False) as counter:
        unet(*inputs(*given)).float().mean().backward()
    return counter.get_total_flops() / 1e12, kept.most


def count(sdxl: Any, size: int) -> None:
    """The table of docs/speed.md: TF and GB of each recipe."""
    print(f"| {size} x {size}, batch 1 | {' | '.join(COLUMNS)} |\n|{' --- |' * (len(COLUMNS) + 1)}")
    for recipe in RECIPES:
        found = (step_on_meta(sdxl, recipe, *column, size) for column in COLUMNS.values())
        cells = [f"{operations:.1f} TF, {kept / 1e9:.2f} GB" for operations, kept in found]
        print(f"| {recipe.name} | {' | '.join(cells)} |", flush=True)


def count_by_first_block(sdxl: Any, size: int, folder: Path) -> None:
    """The figures of plan.py: GB kept where the backward pass ends at each block."""
    print("\n| first trained | lycoris.kohya | | blora_network | |\n|" + " --- |" * 5)
    print("| checkpointing | on | off | on | off |")
    for block in BLOCKS:
        preset = folder / f"{block}.toml"
        preset.write_text(
            "enable_conv = false\nunet_target_module = []\ntext_encoder_target_module = []\n"
            f"unet_target_name = ['{block}.*attn2.to_k$']\ntext_encoder_target_name = []\n"
        )
        ways = product(("lycoris.kohya", "blora_network"), (True, False))
        recipes = (Recipe("", module, True, checkpointing) for module, checkpointing in ways)
        kept = (step_on_meta(sdxl, recipe, str(preset), 1, size)[1] for recipe in recipes)
        print(f"| {block} | {' | '.join(f'{n / 1e9:.3f}' for n in kept)} |", flush=True)


def seconds(unet: nn.Module, network: nn.Module, given: list[Tensor]) -> float:
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        unet(*given).float().square().mean().backward()
    network.zero_grad(set_to_none=True)
    return time.perf_counter() - start


def measure(sdxl: Any, size: int, rank: int, runs: int) -> None:
    """Each recipe's median, and how many times faster it is than the first."""
    noise, trained, rounds = make_unet(sdxl), [], []
    fill(noise)
    weights = {name: p.detach().bfloat16() for name, p in noise.named_parameters()}
    for recipe in RECIPES:
        unet = make_unet(sdxl, weights)
        network = add_network(unet, recipe, CONTENT_STYLE, rank, "cpu")
        trained.append((unet, network, inputs(size, recipe, "cpu", torch.bfloat16)))
    for run in range(runs + 1):  # the first warms up
        rounds.append([seconds(*step) for step in trained])
        print(f"round {run}: {', '.join(f'{t:.2f} s' for t in rounds[-1])}", file=sys.stderr)
    medians = [statistics.median(found) for found in zip(*rounds[1:], strict=True)]
    print(f"\n| {size} x {size}, rank {rank}, CPU | seconds a step | times faster |")
    print("|" + " --- |" * 3)
    for recipe, median in zip(RECIPES, medians, strict=True):
        print(f"| {recipe.name} | {median:.2f} | {medians[0] / median:.2f} |")


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--kohya", required=True, type=Path, help="a folder of sd-scripts")
    parser.add_argument("--size", type=int, default=1024, help="pixels (default: %(default)s)")
    parser.add_argument("--blocks", action="store_true", help="count by the first trained block")
    parser.add_argument("--time", type=int, metavar="SIZE", help="time steps of this size as well")
    parser.add_argument("--rank", type=int, default=64, help="when timed (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="timed rounds (default: %(default)s)")
    args = parser.parse_args()
    sys.path[:0] = [str(args.kohya.resolve()), str(ROOT)]
    logging.disable(logging.WARNING)  # sd-scripts and LyCORIS say much
    from library import sdxl_original_unet as sdxl

    count(sdxl, args.size)
    if args.blocks:
        with tempfile.TemporaryDirectory() as folder:
            count_by_first_block(sdxl, args.size, Path(folder))
    if args.time:
        measure(sdxl, args.time, args.rank, args.runs)


if __name__ == "__main__":
    main()
