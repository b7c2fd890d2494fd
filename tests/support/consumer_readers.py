"""How each program of tests/consumers.py applies a LoRA file: its own code, on layers of SDXL.

A reader is made once, with the program's folder on sys.path, and its `load` gives the weight of
each layer under a file. Where a program's loader sits in a file that starts its user interface,
that one definition is taken from the file and run. What programs want beside LoRA code, such as a
checkpoint, is left out: the models are trees of layers.
"""

from __future__ import annotations

import ast
import importlib.metadata
import logging
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from consumer_rows import BIAS, PATHS, RANK, Row, base, shape
from lora_forms import INPUT_BLOCK
from lycoris_modules import make_tree
from safetensors.torch import load_file
from torch import Tensor, nn

Weights = dict[str, Tensor]
# As ComfyUI and its descendants detect SDXL: the map of names is made from these.
UNET_CONFIG = {"num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4]}
UNET_CONFIG |= {"transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10}
UNET_CONFIG |= {"transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10]}
# diffusers' names of the blocks in question.
DIFFUSERS = {
    "input_blocks.4.1.": "down_blocks.1.attentions.0.",
    "input_blocks.4.0.skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks.1.0.in_layers.2": "down_blocks.0.resnets.0.conv1",
}


def definition(path: Path, name: str, **names: Any) -> Any:
    """A function or class of a file that cannot be imported alone; `names` are what it uses."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    [node] = [n for n in body if getattr(n, "name", None) == name]
    # The folder of the program to run is the caller's choice.
    exec(compile(ast.Module([node], []), path, "exec"), names)  # noqa: S102
    return names[name]


def diffusers_path(path: str) -> str:
    [(ours, theirs)] = [pair for pair in DIFFUSERS.items() if path.startswith(pair[0])]
    return theirs + path.removeprefix(ours)


def submodule(model: nn.Module, path: str, diffusers: bool) -> nn.Module:
    """A layer of a model by the path in sd-scripts' models."""
    if diffusers:
        path = diffusers_path(path)
    elif not hasattr(model, "text_model"):  # which transformers 5.6 and later lack in the first
        path = path.removeprefix("text_model.")
    return model.get_submodule(path)


def set_weight(layer: nn.Module, name: str) -> None:
    """Give a layer the weight of the module of this name, and a bias of zeros if it has one."""
    layer.weight = nn.Parameter(base(name).clone(), requires_grad=False)
    if layer.bias is not None:
        layer.bias = nn.Parameter(torch.zeros(len(layer.weight)), requires_grad=False)


def tree(part: str, diffusers: bool = False) -> nn.Module:
    rename = diffusers_path if diffusers else str
    names = {name: rename(path) for name, (of, path) in PATHS.items() if of == part}
    kinds = {path: shape(name) for name, path in names.items()}
    with torch.device("meta"):  # no random numbers that are thrown away at once
        root = make_tree({path: kind for path, kind in kinds.items() if kind[0] != "LayerNorm"})
    for name, path in names.items():
        if kinds[path][0] == "LayerNorm":
            parent, _, leaf = path.rpartition(".")
            root.get_submodule(parent).add_module(leaf, nn.LayerNorm(kinds[path][1], eps=0))
        set_weight(root.get_submodule(path), name)
    return root


@torch.no_grad()
def acting_weight(layer: nn.Module, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """The weight and bias with which a layer acts, whatever hooks it has: from its outputs."""
    if len(shape) == 1:
        signs = torch.ones(shape)
        signs[::2] = -1  # of mean 0 and variance 1
        return (layer(signs) - layer(-signs)) / 2 * signs, (layer(signs) + layer(-signs)) / 2
    inputs = torch.eye(math.prod(shape[1:])).reshape(-1, *shape[1:])
    outputs, bias = layer(inputs), layer(torch.zeros_like(inputs[:1]))
    if len(shape) == 4:  # where the kernel sees the whole input
        outputs, bias = (x[:, :, x.shape[2] // 2, x.shape[3] // 2] for x in (outputs, bias))
    return (outputs - bias).T.reshape(shape), bias[0]


def acting_weights(models: dict[str, nn.Module], names: Iterable[str], diffusers=False) -> Weights:
    found = {}
    for name in names:
        part, path = PATHS[name]
        layer = submodule(models[part], path, diffusers and part == "unet")
        found[name], found[name + BIAS] = acting_weight(layer, base(name).shape)
    return found


def sgm_model() -> nn.Module:
    """What the loaders ask of a U-Net: its keys, and the configuration that tells SDXL."""
    model = nn.Module()
    model.diffusion_model = tree("unet")
    model.diffusion_model.config = UNET_CONFIG
    model.model_config = SimpleNamespace(unet_config=UNET_CONFIG)
    model.config = SimpleNamespace(huggingface_repo="stabilityai/stable-diffusion-xl-base-1.0")
    return model


def text_model() -> nn.Module:
    """Both text encoders, under the names that checkpoints are read into."""
    clip_l, clip_g = (nn.ModuleDict({"transformer": tree(part)}) for part in ("te1", "te2"))
    return nn.ModuleDict({"clip_l": clip_l, "clip_g": clip_g})


class Clip:
    """The text encoders as a loader has them: it clones them and adds patches."""

    def __init__(self, patcher: Any) -> None:
        self.patcher, self.cond_stage_model = patcher, patcher.model
        self.add_patches = patcher.add_patches
        self.clone = lambda: Clip(patcher.clone())


class ComfyReader:
    """ComfyUI: comfy.sd's load_lora_for_models, with its ModelPatcher on the CPU."""

    title = "ComfyUI"
    version = ("comfyui_version.py", r'__version__ = "(.+)"')

    def __init__(self, folder: Path) -> None:
        import comfy.cli_args

        comfy.cli_args.args.cpu = True
        import comfy.lora
        import comfy.lora_convert
        from comfy.model_patcher import ModelPatcher

        self.patcher = ModelPatcher
        # comfy/sd.py imports every model that ComfyUI has.
        self.apply = definition(folder / "comfy/sd.py", "load_lora_for_models", comfy=comfy)

    def patchers(self) -> tuple[Any, Any]:
        cpu = torch.device("cpu")
        return self.patcher(sgm_model(), cpu, cpu), Clip(self.patcher(text_model(), cpu, cpu))

    def patched(self, patcher: Any) -> nn.Module:
        return patcher.patch_model()

    def load(self, path: Path, row: Row) -> Weights:
        return self.weights(*self.apply(*self.patchers(), load_file(path), 1.0, 1.0), row)

    def weights(self, unet: Any, clip: Any, row: Row) -> Weights:
        text = self.patched(clip.patcher)
        models = {"unet": self.patched(unet).diffusion_model}
        models |= {"te1": text.clip_l.transformer, "te2": text.clip_g.transformer}
        layers = {n: models[PATHS[n][0]].get_submodule(PATHS[n][1]) for n in row.names}
        biases = {n + BIAS: layer.bias for n, layer in layers.items()}
        return biases | {n: layer.weight for n, layer in layers.items()}


FORGE_VERSION = ("modules_forge/forge_version.py", r"version = '(.+)'")
KEYS = ("model_lora_keys_unet", "model_lora_keys_clip")


class ForgeClassicReader(ComfyReader):
    """Forge Classic, which carries an older ComfyUI's code as ldm_patched."""

    title = "Forge Classic"
    version = ()

    def __init__(self, folder: Path) -> None:
        import ldm_patched.modules.args_parser

        ldm_patched.modules.args_parser.args.always_cpu = -1  # Fooocus: that many threads; -1, all
        import ldm_patched.modules.lora
        import ldm_patched.modules.model_patcher
        import ldm_patched.modules.utils

        self.patcher = ldm_patched.modules.model_patcher.ModelPatcher
        self.prepare(folder, ldm_patched)

    def prepare(self, folder: Path, ldm_patched: Any) -> None:
        """Take load_lora_for_models from a file that imports every model."""
        names = {"ldm_patched": ldm_patched, "logging": logging}
        file = folder / "ldm_patched/modules/sd.py"
        self.apply = definition(file, "load_lora_for_models", **names)


class ReforgeReader(ForgeClassicReader):
    """reForge, whose ldm_patched also has lora_convert."""

    title = "reForge"
    version = FORGE_VERSION

    def prepare(self, folder: Path, ldm_patched: Any) -> None:
        import ldm_patched.modules.lora_convert

        super().prepare(folder, ldm_patched)


class FooocusReader(ForgeClassicReader):
    """Fooocus: its StableDiffusionModel, and the calculate_weight that it puts into ldm_patched."""

    title = "Fooocus"
    version = ("fooocus_version.py", r"version = '(.+)'")

    def prepare(self, folder: Path, ldm_patched: Any) -> None:
        """Take what modules/core.py and modules/patch.py define: both start much else."""
        from ldm_patched.modules import lora
        from modules.lora import match_lora

        names = {"torch": torch, "ldm_patched": ldm_patched}
        calculate = definition(folder / "modules/patch.py", "calculate_weight_patched", **names)
        self.patcher.calculate_weight = calculate
        names |= {"os": os, "match_lora": match_lora} | {of: getattr(lora, of) for of in KEYS}
        self.model = definition(folder / "modules/core.py", "StableDiffusionModel", **names)

    def load(self, path: Path, row: Row) -> Weights:
        model = self.model(**dict(zip(("unet", "clip"), self.patchers(), strict=True)))
        model.refresh_loras([(str(path), 1.0)])
        return self.weights(model.unet_with_lora, model.clip_with_lora, row)


class ForgeReader(ComfyReader):
    """Forge: its LoRA extension's load_lora_for_models, and the backend's LoraLoader."""

    title = "Forge"
    version = FORGE_VERSION

    def __init__(self, folder: Path) -> None:
        sys.argv = [sys.argv[0], "--always-cpu"]  # which it reads when it is imported
        from backend.patcher import lora
        from backend.patcher.base import ModelPatcher

        self.patcher = ModelPatcher
        # which also reads the folder of LoRAs when it is imported
        file = folder / "extensions-builtin/sd_forge_lora/networks.py"
        names = {name: getattr(lora, name) for name in ("load_lora", *KEYS)}
        self.apply = definition(file, "load_lora_for_models", **names)

    def patched(self, patcher: Any) -> nn.Module:
        patcher.refresh_loras()
        return patcher.model


class LycorisReader:
    """LyCORIS' network made of the file alone, as sd-scripts has it for --dim_from_weights."""

    title = "LyCORIS"
    version = ("setup.py", r'version="(.+)"')

    def __init__(self, folder: Path | None) -> None:  # None is the installed package
        from lycoris.kohya import create_network_from_weights

        self.create = create_network_from_weights

    def models(self) -> dict[str, nn.Module]:
        return {part: tree(part) for part in ("unet", "te1", "te2")}

    def load(self, path: Path, row: Row) -> Weights:
        models = self.models()
        unet, *encoders = models.values()
        network, _ = self.create(1.0, str(path), None, encoders, unet, None, False)
        network.apply_to(encoders, unet, True, True)
        network.load_weights(str(path))
        return acting_weights(models, row.names)


class SdScriptsReader(LycorisReader):
    """sd-scripts' networks.lora, made of the file alone, on its own U-Net."""

    title = "sd-scripts"
    version = ("README.md", r"Version ([\d.]+)")

    def __init__(self, folder: Path) -> None:
        from library.sdxl_original_unet import SdxlUNet2DConditionModel
        from networks.lora import create_network_from_weights

        self.create = create_network_from_weights
        with torch.device("meta"):  # the widths of SDXL, without its gigabytes
            self.unet = SdxlUNet2DConditionModel()

    def models(self) -> dict[str, nn.Module]:
        """The untouched models: their layers are new, as a network changes them."""
        small = tree("unet")
        for path in (path for part, path in PATHS.values() if part == "unet"):
            self.unet.set_submodule(path, small.get_submodule(path))
        return {"unet": self.unet, "te1": tree("te1"), "te2": tree("te2")}


class OneTrainerReader:
    """OneTrainer, going on with a file of which it is told the algorithm, rank and layers."""

    title = "OneTrainer"
    version = ()

    def __init__(self, folder: Path) -> None:
        from modules.model.StableDiffusionXLModel import StableDiffusionXLModel
        from modules.modelLoader.stableDiffusionXL.StableDiffusionXLLoRALoader import (
            StableDiffusionXLLoRALoader,
        )
        from modules.module.LoRAModule import LoRAModuleWrapper
        from modules.util.config.TrainConfig import TrainConfig
        from modules.util.enum.ModelType import ModelType, PeftType
        from modules.util.ModelNames import ModelNames

        self.model = lambda: StableDiffusionXLModel(ModelType.STABLE_DIFFUSION_XL_10_BASE)
        self.loader, self.names = StableDiffusionXLLoRALoader(), ModelNames
        self.wrapper, self.config, self.peft = LoRAModuleWrapper, TrainConfig, PeftType

    def settings(self, row: Row) -> Any:
        axes, config = row.form.axes, self.config.default_values()
        kinds = {"hada_w1_a": self.peft.LOHA, "oft_blocks": self.peft.OFT_2}
        kinds["oft_R.weight"] = self.peft.OFT_2
        kinds |= dict.fromkeys(("lokr_w1", "lokr_w1_a"), self.peft.LOKR)
        config.peft_type = next((k for s, k in kinds.items() if s in axes), self.peft.LORA)
        config.lora_rank = config.lokr_dim = RANK
        config.lora_decompose = "dora_scale" in axes
        config.lora_decompose_output_axis = axes.get("dora_scale", "").startswith("o")
        config.oft_block_size = INPUT_BLOCK
        config.lokr_decompose_factor = -1
        config.lokr_decompose_both = "lokr_w1_a" in axes
        config.lokr_full_matrix = {"lokr_w1", "lokr_w2"} <= set(axes)
        config.lokr_use_tucker = "lokr_t2" in axes
        config.train_device = "cpu"
        return config

    def load(self, path: Path, row: Row) -> Weights:
        model, config = self.model(), self.settings(row)
        models = {part: tree(part, diffusers=part == "unet") for part in ("unet", "te1", "te2")}
        model.unet, model.text_encoder_1, model.text_encoder_2 = models.values()
        self.loader.load(model, self.names(lora=str(path)))
        prefixes = {"unet": "unet", "te1": "text_encoder", "te2": "text_encoder_2"}
        for part in {part for part, _ in row.layers}:
            filters = [diffusers_path(path) for of, path in row.layers if of == part == "unet"]
            wrapper = self.wrapper(models[part], prefixes[part], config, filters)
            wrapper.load_state_dict(model.lora_state_dict)
            wrapper.hook_to_module()
        return acting_weights(models, row.names, diffusers=True)


class DiffusersReader:
    title = "diffusers"

    def __init__(self, folder: None) -> None:
        from diffusers_sdxl import sdxl_pipeline

        made = self.pipeline = sdxl_pipeline((1, 2, 1))
        self.models = {"unet": made.unet, "te1": made.text_encoder, "te2": made.text_encoder_2}
        for name, (part, path) in PATHS.items():
            set_weight(submodule(self.models[part], path, part == "unet"), name)

    def load(self, path: Path, row: Row) -> Weights:
        self.pipeline.unload_lora_weights()
        self.pipeline.load_lora_weights(str(path))
        return acting_weights(self.models, row.names, diffusers=True)


READERS = {"comfyui": ComfyReader, "forge": ForgeReader, "reforge": ReforgeReader}
READERS |= {"forge_classic": ForgeClassicReader, "fooocus": FooocusReader}
READERS |= {"onetrainer": OneTrainerReader, "sd_scripts": SdScriptsReader}
READERS |= {"lycoris": LycorisReader, "diffusers": DiffusersReader}
# Read without a checkout, from the packages that this Python has.
INSTALLED = {"lycoris": ("lycoris_lora",), "diffusers": ("diffusers", "peft")}


def version(name: str, folder: Path | None) -> str:
    """What was run: the program with its version, and of a checkout its commit and date."""
    reader = READERS[name]
    if folder is None:
        first, *others = (f"{of} {importlib.metadata.version(of)}" for of in INSTALLED[name])
        return " with ".join([f"{reader.title} {first.split()[1]}", *others])
    git = ["git", "-C", folder, "log", "-1", "--format=(%h, %cs)"]
    commit = subprocess.check_output(git, text=True).strip()
    if not reader.version:
        return f"{reader.title} {commit}"
    file, pattern = reader.version
    return f"{reader.title} {re.search(pattern, (folder / file).read_text())[1]} {commit}"
