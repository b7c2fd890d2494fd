"""Ask sd-scripts' own SDXL training, or pre-flight, about many trainings on a CPU.

  KOHYA_PYTHON toy_training.py SDXL_TRAIN_NETWORK.py trainer|preflight < trainings.json

stdin is a list of {"name", "folder", "words", "path"}: trainings, each in its folder, with a path
where Python looks first. Two at a time run in forks of a process that has imported sd-scripts,
which halves the time. Each answer is a line of JSON with the name; what was printed lies beside
the folder, in its name with .out and .err. Run it with the bundle on PYTHONPATH.

The trainer's parser, verification, datasets, loader of checkpoints, network module, optimizer,
DataLoader, scheduler, loop and saving run as they are, in sd-scripts 0.9, 0.10 and 0.11. What is a
toy: every weight of the checkpoint is 0, in memory that nobody writes to; the U-Net, the text
encoders and the VAE call no layer but the ones that are trained, each on a small input, so that a
backward pass reaches them, and the U-Net's first, which refuses latents of other channels than its
own; and the checkpoint is not hashed.

Its answer has "outcome" (trained or failed), "error", and what a training was about: whether a step
was "idle" with a loss of 0; "captions" and "sizes" of the pictures it was shown; "modules" and
"scale" of its network; and the sizes of the "samples" it drew. A training that ends without a step
has failed, although sd-scripts then exits with 0.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

from blora.preflight.trainer import own, own_modules


def replace(old: Any, new: Any) -> None:
    """Let every module of sd-scripts that has this very function or class have another."""
    for names in map(vars, own_modules()):
        names |= {name: new for name, held in names.items() if held is old}


def zeros_of(path: str, device: Any = None) -> dict[str, Tensor]:
    """The tensors of a file, all 0: calloc hands out memory that costs nothing until written to."""
    with safe_open(path, "pt"):  # refuses what the real loader refuses
        pass
    with Path(path).open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return {n: torch.from_numpy(np.zeros(h["shape"], np.float32)) for n, h in header.items()}


# ---- Toys for the three models -------------------------------------------------------------------


def trained_layers(model: nn.Module) -> list[nn.Module]:
    """One layer of each kind and width that a network has put itself into: given a forward."""
    kinds = {}
    for layer in model.modules():
        if layer is not model and "forward" in vars(layer):
            kind = type(getattr(layer.forward, "__self__", None)), small_input(layer).shape
            kinds.setdefault(kind, layer)
    return list(kinds.values())


def small_input(layer: nn.Module) -> Tensor:
    """What the layer takes, as small as it may be."""
    if isinstance(layer, nn.Conv2d):
        return torch.ones(1, layer.in_channels, 3, 3)
    if isinstance(layer, nn.GroupNorm):
        return torch.ones(1, layer.num_channels, 2, 2)
    linear = isinstance(layer, nn.Linear)
    return torch.ones(1, 1, layer.in_features if linear else layer.normalized_shape[-1])


def touch(model: nn.Module) -> Tensor | float:
    """A number that depends on what is trained in the model."""
    dtype = next(model.parameters()).dtype
    outputs = [layer(small_input(layer).to(dtype)) for layer in trained_layers(model)]
    return sum(output.float().sum() for output in outputs)


def make_toys(text_encoders: list[nn.Module], vae: nn.Module, unet: nn.Module) -> None:
    """Replace what the models compute, and nothing else of them."""

    def unet_forward(x: Tensor, timesteps: Tensor, context: Tensor, y: Tensor, **_: Any) -> Tensor:
        assert (context.shape[-1], y.shape[-1]) == (2048, 2816)
        with torch.no_grad():
            unet.input_blocks[0][0](x)
        return x[:, :4] * 0.1 + touch(unet)

    def toy_encoder(encoder: nn.Module) -> Any:
        def forward(input_ids: Tensor, **_: Any) -> dict[str, Any]:
            width = encoder.config.hidden_size
            hidden = torch.zeros(*input_ids.shape, width) + touch(encoder)
            layers = encoder.config.num_hidden_layers + 1
            return {"hidden_states": [hidden] * layers, "last_hidden_state": hidden}

        return forward

    def encode(images: Tensor) -> Any:
        means = nn.functional.avg_pool2d(images, 8).mean(1, keepdim=True)
        moments = argparse.Namespace(sample=lambda: means.repeat(1, 4, 1, 1))
        return argparse.Namespace(latent_dist=moments)

    def decode(latents: Tensor, **_: Any) -> Any:
        images = nn.functional.interpolate(latents[:, :3], scale_factor=8)
        return argparse.Namespace(sample=images)

    unet.forward = unet_forward
    for encoder in text_encoders:
        encoder.forward = toy_encoder(encoder)
    vae.encode, vae.decode = encode, decode


# ---- The training --------------------------------------------------------------------------------


@dataclass
class Seen:
    """What the training was about, as far as it came."""

    output_dir: str = ""
    losses: list[float] = field(default_factory=list)
    captions: set[str] = field(default_factory=set)
    sizes: set[tuple[int, int]] = field(default_factory=set)
    network: dict[str, Any] = field(default_factory=lambda: {"modules": None, "scale": None})

    def answer(self) -> dict[str, Any]:
        samples = sorted(Path(self.output_dir, "sample").glob("*.png"))  # in their order
        return {
            "idle": 0.0 in self.losses,
            "captions": sorted(self.captions),
            "sizes": sorted(self.sizes),
            "samples": [Image.open(path).size for path in samples],
            **self.network,
        }


def recorder(seen: Seen) -> Any:
    """sd-scripts' LossRecorder, which also tells `seen`."""

    class Recorder(own("LossRecorder")):
        def add(self, *, epoch: int, step: int, loss: float) -> None:
            seen.losses.append(loss)
            super().add(epoch=epoch, step=step, loss=loss)

    return Recorder


def toy_trainer(script: Any, seen: Seen) -> Any:
    """sd-scripts' trainer of SDXL LoRAs, with toy models."""

    class ToyTrainer(script.SdxlNetworkTrainer):
        def load_target_model(self, args: Any, dtype: torch.dtype, accelerator: Any) -> Any:
            replace(safetensors.torch.load_file, zeros_of)
            version, encoders, vae, unet = super().load_target_model(args, dtype, accelerator)
            make_toys(encoders, vae, unet)
            return version, encoders, vae, unet

        def call_unet(
            self, args: Any, accelerator: Any, unet: Any, noisy: Tensor, *more: Any, **kw
        ):
            batch = next(item for item in more if isinstance(item, dict))
            seen.captions |= set(batch["captions"])
            seen.sizes.add((noisy.shape[-1] * 8, noisy.shape[-2] * 8))
            return super().call_unet(args, accelerator, unet, noisy, *more, **kw)

        def all_reduce_network(self, accelerator: Any, network: nn.Module) -> None:
            held = accelerator.unwrap_model(network)
            modules = {name.split(".")[0] for name in held.state_dict()}
            scale = getattr(next(iter(getattr(held, "loras", [])), None), "scale", None)
            seen.network = {"modules": len(modules), "scale": scale}
            super().all_reduce_network(accelerator, network)

    return ToyTrainer()


def ask_trainer(script: str, words: list[str]) -> dict[str, Any]:
    """What the training was about, and how it ended."""
    seen = Seen()
    answer: dict[str, Any] = {"outcome": "trained", "error": ""}
    try:
        sys.argv = [script, *words]  # sd-scripts reads --config_file off the command line
        module = importlib.import_module(Path(script).stem)
        parser = module.setup_parser()  # as the script itself begins when it is run
        args = parser.parse_args()
        own("verify_command_line_training_args")(args)
        args = own("read_config_from_file")(args, parser)
        seen.output_dir = args.output_dir or ""
        replace(own("LossRecorder"), recorder(seen))
        replace(own("calculate_sha256"), lambda _path: "not hashed")
        torch.set_flush_denormal(True)  # a CPU is slow with the small gradients of toys
        toy_trainer(module, seen).train(args)
        if not seen.losses:
            answer |= {"outcome": "failed", "error": "it ended without a step"}
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        answer |= {"outcome": "failed", "error": f"{type(error).__name__}: {error}"}
    return answer | seen.answer()


def ask_preflight(script: str, words: list[str]) -> dict[str, Any]:
    import blora_preflight

    return {"code": blora_preflight.main(["--json", script, *words])}


def answer_in_fork(ask: Any, script: str, training: dict[str, Any]) -> None:
    """The child's part: everything but the answer goes to files beside the folder."""
    out = os.dup(1)
    for number, ending in ((1, "out"), (2, "err")):
        file = os.open(f"{training['folder']}.{ending}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(file, number)
    answer = {"name": training["name"]}
    try:
        os.chdir(training["folder"])
        sys.path[:0] = filter(None, [training["path"]])
        answer |= ask(script, training["words"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(out, json.dumps(answer).encode() + b"\n")
        os._exit(0)


def main(script: str, who: str) -> None:
    """Each training in a fork of this process, which has imported the trainer; two at a time."""
    ask = {"trainer": ask_trainer, "preflight": ask_preflight}[who]
    sys.path.insert(0, str(Path(script).parent))
    importlib.import_module(Path(script).stem)
    torch.set_num_threads(1)
    gc.freeze()  # sd-scripts collects garbage often, and need not look through what was imported
    sys.stdout.flush()
    trainings = json.load(sys.stdin)
    for number, training in enumerate(trainings):
        if number >= 2:
            os.wait()
        if not os.fork():
            answer_in_fork(ask, script, training)
    for _ in trainings[:2]:
        os.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
