"""What a training step costs under each recipe: counted, and timed on a CPU or on a card.

  KOHYA_PYTHON tests/bench_blora_training.py --kohya KOHYA_ROOT
  KOHYA_PYTHON tests/bench_blora_training.py --kohya KOHYA_ROOT --time 512
  KOHYA_PYTHON tests/bench_blora_training.py --kohya KOHYA_ROOT --card
  KOHYA_PYTHON tests/bench_blora_training.py --kohya KOHYA_ROOT --card cpu --size 64 --ranks 4

The steps are those of sd-scripts' own U-Net, with LyCORIS' own network on it. The Python is that of
sd-scripts, or one with torch and `pip install --no-deps lycoris_lora prodigyopt einops toml
safetensors tqdm`; KOHYA_ROOT may be a folder with library/sdxl_original_unet.py and no other file.
Nothing is downloaded.

The first line counts on torch's meta device, at 1024 x 1024 and batch 1:

- TF, 10^12 floating point operations of one forward and one backward pass, as torch counts them.
- kept, the most bytes that autograd holds at a time. For this the step runs as on a card: CUDA's
  autocast rules for fp16, and attention that keeps no matrix, which is what --sdpa, --xformers and
  --mem_eff_attn have there. The weights are not among it.

The second also takes steps with random weights in bf16 on the CPU, the recipes in turns, and prints
medians as ratios. It needs 16 GB of memory and, at 512 pixels, some eight minutes on two cores.

The third trains on a card as the launchers' recipes do, in at most eight minutes: fp16 autocast and
weights, a gradient scaler, clipping, Prodigy. It prints the median of 20 steps and the most memory
that torch had in use and that it had taken of the card, beside the sum that pre-flight prints. The
text encoders and the VAE lie on the card and compute nothing. The fourth line tries it without one.
"""

from __future__ import annotations

import gc
import importlib.util
import logging
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from ast import literal_eval
from collections import Counter
from contextlib import redirect_stdout
from functools import partial
from importlib.metadata import version
from itertools import product
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent / "support"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from make_random_sdxl import fill
from sdxl_train_network_options import build_parser
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from blora import ROOT, launch
from blora.preflight import plan
from blora.preflight.rehearsal import parameters_of, state_per_byte, trial_parameters

CONTENT_STYLE = str(ROOT / "lycoris_presets/blora_content_style.toml")
LAYOUT = str(ROOT / "lycoris_presets/blora_content_layout_style.toml")
STYLE = str(ROOT / "lycoris_presets/blora_style.toml")


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
    "style with the content frozen, rank 64": (STYLE, 64),
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


# ---- On a card -----------------------------------------------------------------------------------

# A launcher, its settings, and the attention that takes the place of its own.
ON_A_CARD = {
    "classic": ("classic", {}, "--mem_eff_attn"),
    "classic with --sdpa": ("classic", {}, "--sdpa"),
    "fast": ("fast", {}, "--sdpa"),
    "fast, BLORA_SAVE_MEMORY=0": ("fast", {"BLORA_SAVE_MEMORY": "0"}, "--sdpa"),
}
WARM_UP, STEPS, MOST_SKIPPED = 3, 20, 20
# A CPU takes minutes for a step in fp16.
DTYPES = {"cuda": torch.float16, "cpu": torch.bfloat16}


def options_of(launcher: str, settings: dict[str, str], attention: str, rank: int) -> Namespace:
    """The options that a launcher gives sd-scripts."""
    text = launch.read_launcher(ROOT / f"sdxl_blora_{launcher}.sh")
    values = launch.chosen_settings(text, settings | {"BLORA_RANK": str(rank)})
    options = launch.chosen_options(text, values, [])
    return build_parser().parse_args(
        [attention if word in ("--mem_eff_attn", "--sdpa") else word for word in options]
    )


def make_optimizer(args: Namespace, parameters: Any) -> Any:
    """Prodigy, as sd-scripts makes it of the recipe."""
    import prodigyopt

    given = dict(argument.split("=", 1) for argument in args.optimizer_args)
    options = {name: literal_eval(value) for name, value in given.items()}
    with redirect_stdout(None):
        return prodigyopt.Prodigy(parameters, lr=args.learning_rate, **options)


def sum_of_preflight(sdxl: Any, recipe: Recipe, args: Namespace, size: int) -> float:
    """The bytes that pre-flight sums up for these options, at a batch of one picture."""
    network = add_network(make_unet(sdxl), recipe, CONTENT_STYLE, args.network_dim, "meta")
    built = plan.Built(parameters_of(network))
    parameters = list(trial_parameters(network, args.network_dim, "cpu").values())
    optimizer = make_optimizer(args, parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    early = args.network_module == plan.OUR_NETWORK
    backward = plan.backward_pass(built, args, size * size, early)
    parts = plan.memory_parts(built, state_per_byte([optimizer]), backward, args)
    return sum(bytes_ or 0 for bytes_ in parts.values())


def wait_for(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Training:
    """One recipe on the device, as sd-scripts' train() has it before its first step."""

    def __init__(
        self,
        sdxl: Any,
        weights: dict[str, Tensor],
        recipe: Recipe,
        args: Namespace,
        device: str,
    ) -> None:
        unet = make_unet(sdxl, weights)
        others = [n for part, n in plan.model_parts(args).items() if "U-Net" not in part]
        self.others = [torch.empty(int(n), dtype=torch.uint8, device=device) for n in others]
        unet.set_use_memory_efficient_attention(False, bool(args.mem_eff_attn))
        unet.set_use_sdpa(bool(args.sdpa))
        self.unet, self.recipe, self.args, self.device = unet, recipe, args, device
        self.network = add_network(unet, recipe, CONTENT_STYLE, args.network_dim, device)
        self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(args, self.parameters)
        self.scaler = torch.amp.GradScaler(device)

    def seconds(self, size: int) -> float:
        """One step, from the noisy latents on."""
        noisy, *others = inputs(size, self.recipe, self.device, DTYPES[self.device])
        noise = torch.randn_like(noisy, dtype=torch.float32)
        wait_for(self.device)
        start = time.perf_counter()
        with torch.autocast(self.device, DTYPES[self.device]):
            predicted = self.unet(noisy, *others)
        self.scaler.scale(F.mse_loss(predicted.float(), noise)).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.parameters, self.args.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        wait_for(self.device)
        return time.perf_counter() - start

    def times(self, size: int, deadline: float) -> list[float]:
        """Seconds of steps after the warm-up, in which the scaler skips those that overflow."""
        warm = 0
        while warm < WARM_UP or not self.optimizer.state:
            if warm == MOST_SKIPPED:
                raise FloatingPointError(f"the gradients overflow in {warm} steps")
            self.seconds(size)
            warm += 1
        times = [self.seconds(size)]
        while len(times) < STEPS and time.monotonic() < deadline:
            times.append(self.seconds(size))
        return times


def cells(make_training: Any, size: int, device: str, share: float) -> list[str]:
    """A row's seconds and memory, measured, or why they are not."""
    deadline = time.monotonic() + share
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        times = make_training().times(size, deadline)
    except FloatingPointError as error:
        return [str(error)] * 3
    except RuntimeError as error:  # torch's own OutOfMemoryError, and that of cuBLAS and cuDNN
        if not re.search("out of memory|ALLOC_FAILED", str(error)):
            raise
        return ["out of memory"] * 3
    took = f"{statistics.median(times):.3f}"
    if len(times) < STEPS:
        took += f" (median of {len(times)})"
    if device != "cuda":
        return [took, "not measured", "not measured"]
    most = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return [took, *(f"{size / 1e9:.2f} GB" for size in most)]


def machine(device: str) -> str:
    """The device and the versions that the numbers are of."""
    where = "CPU"
    if device == "cuda":
        query = ["--query-gpu=driver_version", "--format=csv,noheader"]
        smi = shutil.which("nvidia-smi")
        driver = subprocess.check_output([smi, *query], text=True).split()[0] if smi else "unknown"
        total = torch.cuda.get_device_properties(0).total_memory / 1e9
        where = f"{torch.cuda.get_device_name()}, {total:.1f} GB, driver {driver}"
        where += f", CUDA {torch.version.cuda}"
    packages = {"LyCORIS": "lycoris_lora", "Prodigy": "prodigyopt"}
    versions = ", ".join(f"{name} {version(package)}" for name, package in packages.items())
    return f"{where}, torch {torch.__version__}, {versions}"


def measure_on_a_card(sdxl: Any, size: int, ranks: list[int], device: str, end: float) -> None:
    """Each recipe at each rank: seconds a step and memory, beside pre-flight's sum."""
    columns = ("seconds a step", "memory in use", "memory taken", "pre-flight's sum")
    precision = "fp16" if device == "cuda" else "bf16"
    print(f"{machine(device)}\n\n| {size} x {size}, batch 1, {precision} | ", end="")
    print(f"{' | '.join(columns)} |\n|{' --- |' * 5}", flush=True)
    noise = make_unet(sdxl)
    fill(noise, device)
    weights = {name: p.detach().to(DTYPES[device]) for name, p in noise.named_parameters()}
    del noise
    cases = list(product(ranks, ON_A_CARD))
    for number, (rank, name) in enumerate(cases):
        args = options_of(*ON_A_CARD[name], rank)
        bypass = "bypass_mode=True" in args.network_args
        recipe = Recipe(name, args.network_module, bypass, args.gradient_checkpointing)
        total = sum_of_preflight(sdxl, recipe, args, size) / 1e9
        share = (end - time.monotonic()) / (len(cases) - number)
        training = partial(Training, sdxl, weights, recipe, args, device)
        measured = cells(training, size, device, share)
        print(f"| {name}, rank {rank} | {' | '.join(measured)} | {total:.2f} GB |", flush=True)


def import_unet(kohya: Path) -> Any:
    """sd-scripts' library/sdxl_original_unet.py, which wants nothing but a log of its library."""
    sys.modules["library.utils"] = SimpleNamespace(setup_logging=lambda: None)
    file = kohya / "library/sdxl_original_unet.py"
    if not file.is_file():
        sys.exit(f'error: no file "{file}": give --kohya the folder of sd-scripts')
    spec = importlib.util.spec_from_file_location(file.stem, file)
    unet = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(unet)
    return unet


def main() -> None:
    start = time.monotonic()
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--kohya", required=True, type=Path, help="a folder of sd-scripts")
    parser.add_argument("--size", type=int, default=1024, help="pixels (default: %(default)s)")
    parser.add_argument("--blocks", action="store_true", help="count by the first trained block")
    parser.add_argument("--time", type=int, metavar="SIZE", help="time steps of this size as well")
    parser.add_argument("--rank", type=int, default=64, help="when timed (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="timed rounds (default: %(default)s)")
    parser.add_argument(
        "--card", nargs="?", const="cuda", choices=("cuda", "cpu"), help="measure on a card alone"
    )
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[64, 1024], help="on a card (default: %(default)s)"
    )
    seconds = "after which it takes no more steps of a recipe than it must (default: %(default)s)"
    parser.add_argument("--seconds", type=float, default=420, help=seconds)
    args = parser.parse_args()
    if args.card == "cuda" and not torch.cuda.is_available():
        sys.exit("error: torch finds no card: add cpu --size 64 --ranks 4 to try it without one")
    logging.disable(logging.WARNING)  # sd-scripts and LyCORIS say much
    sdxl = import_unet(args.kohya)
    if args.card:
        measure_on_a_card(sdxl, args.size, args.ranks, args.card, start + args.seconds)
        return
    count(sdxl, args.size)
    if args.blocks:
        with tempfile.TemporaryDirectory() as folder:
            count_by_first_block(sdxl, args.size, Path(folder))
    if args.time:
        measure(sdxl, args.time, args.rank, args.runs)


if __name__ == "__main__":
    main()
