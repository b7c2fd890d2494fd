#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["toml"]
# ///
"""Check a training before it begins, and say what it will be.

  blora_preflight.py sdxl_train_network.py --pretrained_model_name_or_path=... --dataset_config=...
      takes the command line of the training, as the launchers pass it and the kohya_ss GUI
      prints it, and looks at everything that would otherwise fail once the models have loaded
  blora_preflight.py --json sdxl_train_network.py ...
      says the same as JSON

Exit code 1 where the training would fail. Warnings never stop it.
"""

from __future__ import annotations

import argparse
import glob
import importlib.util
import json
import math
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

try:
    import blora_memory
    from blora_options import (
        Options,
        as_whole,
        load_toml,
        matching,
        parse_options,
        with_config_file,
    )
    from blora_preset import BUILT_IN_PRESETS, load_preset, trained_layers
    from blora_safetensors import read_header
    from blora_sdxl import Layer, Trait, block_of, load_traits
    from blora_words import BloraError, file_size, first_few, printable
except ImportError as missing:
    sys.exit(
        f"error: {missing.name}.py beside {Path(__file__).name} is missing, or of another version: "
        "copy all files of the bundle that have blora in their names into this folder"
    )

HERE = Path(__file__).resolve().parent
PLACEHOLDER = "path/to/sd_xl_base_1.0.safetensors"  # what the launchers hold before they are edited
OUR_NETWORK = "blora_network"  # LyCORIS' own, with a backward pass that ends early
LYCORIS_TESTED = ("3.2.0.post2", "3.4.0", "4.1.3")
# The package an optimizer is in, by the name that sd-scripts knows it by; AdamW is torch's.
OPTIMIZER_PACKAGES = (
    (r"prodigy", "prodigyopt"),
    (r"dadapt.*", "dadaptation"),
    (r"lion", "lion_pytorch"),
    (r".*8bit|paged.*", "bitsandbytes"),
    (r".*schedulefree", "schedulefree"),
    (r"adafactor", "transformers"),
)
INSTALLED_AS = {"lycoris": "lycoris_lora", "lion_pytorch": "lion-pytorch"}
IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl"}
DEFAULT_STEPS = 1600  # of sd-scripts, where neither steps nor epochs are given


# ---- The report ---------------------------------------------------------------------------------


@dataclass
class Report:
    """Sentences in the order they were found, the plan line by line, the modules by name."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    plan: dict[str, str] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)


# ---- Packages ------------------------------------------------------------------------------------


def check_script(script: Path, report: Report) -> None:
    """Whether the training script is there."""
    if not script.is_file():
        report.errors.append(
            f'no training script at "{script}": run this in a kohya sd-scripts or kohya_ss folder'
        )


def check_packages(options: Options, report: Report) -> None:
    """Whether this Python has what the training imports, found without importing it."""
    optimizer = options.text("optimizer_type", "AdamW")
    package = (
        optimizer.split(".")[0] if "." in optimizer else matching(OPTIMIZER_PACKAGES, optimizer)
    )
    network = options.text("network_module").split(".")[0]
    if network == OUR_NETWORK:
        network = "lycoris"
        if not (HERE / f"{OUR_NETWORK}.py").is_file():
            report.errors.append(
                f'no {OUR_NETWORK}.py in "{HERE}": copy it there, from this bundle'
            )
    needed = ["torch", "accelerate", *([network] if network not in ("", "networks") else [])]
    for name in dict.fromkeys([*needed, *([package] if package else [])]):
        if importlib.util.find_spec(name) is None:
            report.errors.append(
                f"this Python ({sys.executable}) has no {printable(name)}: "
                f"pip install {printable(INSTALLED_AS.get(name, name))}"
            )
        elif name == "lycoris":
            check_lycoris(report)


def check_lycoris(report: Report) -> None:
    """A warning for a release of LyCORIS that nothing here was run with."""
    try:
        version = metadata.version("lycoris_lora")
    except metadata.PackageNotFoundError:
        version = "unknown"
    if version not in LYCORIS_TESTED:
        tested = ", ".join(LYCORIS_TESTED)
        report.warnings.append(f"LyCORIS {version} is not one of the tested ones, {tested}")


# ---- The checkpoint ------------------------------------------------------------------------------

# Keys by which a checkpoint is known, and what it then is.
SDXL_KEYS = (
    "model.diffusion_model.label_emb.0.0.weight",
    "conditioner.embedders.1.model.ln_final.weight",
)
OTHER_MODELS = (
    (r"(lora_|unet\.|text_encoder|base_model\.).*", "a LoRA"),
    (r"conditioner\.embedders\.0\.model\..*", "an SDXL refiner"),
    (r"cond_stage_model\.transformer\..*", "an SD 1.x checkpoint"),
    (r"cond_stage_model\.model\..*", "an SD 2.x checkpoint"),
    (r"(model\.diffusion_model\.)?double_blocks\..*", "a Flux checkpoint"),
    (r"(model\.diffusion_model\.)?joint_blocks\..*", "an SD3 checkpoint"),
)


def check_checkpoint(options: Options, report: Report) -> None:
    """Whether the base is an SDXL checkpoint, and whole; its data is not read."""
    name = options.text("pretrained_model_name_or_path")
    path = Path(name)
    if name in ("", PLACEHOLDER):
        raise BloraError(
            "the settings are not edited yet: set BLORA_CHECKPOINT at the top of the launcher to "
            "your SDXL checkpoint"
        )
    report.plan["base"] = name
    if path.is_dir():
        report.notes.append(
            f'"{name}" is a folder, taken for a diffusers model and not looked into'
        )
    elif (
        not path.exists()
        and re.fullmatch(r"[\w.-]+/[\w.-]+", name)
        and not path.suffix[1:].isalpha()
    ):
        report.notes.append(f'"{name}" is no file here, taken for a model of the Hugging Face hub')
    elif not path.is_file():
        raise BloraError(
            f'no checkpoint at "{name}": correct BLORA_CHECKPOINT at the top of the launcher'
        )
    elif path.suffix != ".safetensors":
        report.notes.append(f'"{name}" is no .safetensors file and was not looked into')
    else:
        check_sdxl(path, options, report)


def check_sdxl(path: Path, options: Options, report: Report) -> None:
    """Whether a .safetensors file is a whole SDXL checkpoint; another model is named."""
    keys = read_header(path)[0].keys()
    if not all(key in keys for key in SDXL_KEYS):
        kinds = (
            kind for pattern, kind in OTHER_MODELS if any(re.fullmatch(pattern, k) for k in keys)
        )
        raise BloraError(
            f'"{path}" is {next(kinds, "something else")}, not an SDXL checkpoint: give the one to '
            "train on"
        )
    report.plan["base"] += f" (SDXL, {file_size(path.stat().st_size)})"
    if "v_pred" in keys and not options.has("v_parameterization"):
        report.warnings.append(
            f'"{path}" says it predicts v: add --v_parameterization --zero_terminal_snr'
        )


# ---- The dataset ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subset:
    """A folder of images, with the settings that hold for it."""

    folder: Path
    settings: dict[str, Any]
    repeats: int
    batch_size: int
    images: tuple[Path, ...]


def load_subsets(options: Options, report: Report) -> list[Subset]:
    """The image folders, by --dataset_config or, as the GUI passes them, --train_data_dir.

    A folder that is missing or empty is passed over, as sd-scripts does, while others have images.
    """
    if any(options.has(name) for name in ("in_json", "dataset_class")):
        report.notes.append("the images are not given by folders, and were not looked into")
        return []
    if options.has("dataset_config"):
        path = Path(options.text("dataset_config"))
        config = load_config(path)
    elif options.has("train_data_dir"):
        path = Path(options.text("train_data_dir"))
        config = {"datasets": [{"subsets": folders_with_repeats(path)}]}
    else:
        raise BloraError("there are no images: give --dataset_config")
    tables = [
        {**config.get("general", {}), **dataset, **subset}
        for dataset in config.get("datasets", [])
        for subset in dataset.get("subsets", [])
    ]
    if any("resolution" not in table for table in tables) and not options.has("resolution"):
        report.errors.append(f'"{path}" has a dataset without a resolution: add one')
    looked_into = [table for table in tables if "metadata_file" not in table]
    if len(looked_into) < len(tables):
        report.notes.append("subsets with a metadata_file were not looked into")
    loaded = [load_subset(settings, options, path) for settings in looked_into]
    subsets = [subset for subset in loaded if isinstance(subset, Subset)]
    problems = [subset for subset in loaded if isinstance(subset, str)]
    (report.warnings if subsets else report.errors).extend(problems)
    if not tables:
        raise BloraError(f'"{path}" names no folder of images: add one')
    return subsets


def load_config(path: Path) -> dict[str, Any]:
    """A dataset config, refused unless its tables are tables."""
    if path.suffix == ".json" and path.is_file():
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BloraError(
                f'the dataset config "{path}" is not valid JSON: correct it'
            ) from error
    else:
        config = load_toml(path, "dataset config")
    tables = config.get("datasets", []) if isinstance(config, dict) else None
    fine = isinstance(tables, list) and all(
        isinstance(table, dict)
        and isinstance(table.get("subsets", []), list)
        and all(isinstance(subset, dict) for subset in table.get("subsets", []))
        for table in tables
    )
    if not fine or not isinstance(config.get("general", {}), dict):
        raise BloraError(
            f'the dataset config "{path}" is not of the form [[datasets]], [[datasets.subsets]]: '
            "correct it"
        )
    return config


def folders_with_repeats(path: Path) -> list[dict[str, Any]]:
    """Folders named N_words in a folder, as --train_data_dir has them."""
    if not path.is_dir():
        raise BloraError(f'no folder of images at "{path}": correct --train_data_dir')
    named = [(re.fullmatch(r"(\d+)(_.*)?", folder.name), folder) for folder in path.iterdir()]
    return [
        {"image_dir": str(folder), "num_repeats": int(name[1]), "class_tokens": name[2] or ""}
        for name, folder in sorted(named, key=lambda item: item[1])
        if name and int(name[1]) and folder.is_dir()
    ]


def load_subset(settings: dict[str, Any], options: Options, path: Path) -> Subset | str:
    """One folder and its images, or a sentence on why there are none."""
    if "image_dir" not in settings:
        return f'"{path}" has a subset without an image_dir: add one'
    folder = Path(str(settings["image_dir"]))
    if not folder.is_dir():
        return f'no folder of images at "{folder}": correct image_dir in "{path}"'
    images = tuple(file for file in sorted(folder.iterdir()) if file.suffix.lower() in IMAGES)
    if not images:
        return f'"{folder}" holds no images: put some there, or correct image_dir'
    repeats = as_whole("num_repeats", settings.get("num_repeats", 1), least=0)
    if not repeats:
        return f'"{folder}" has num_repeats = 0 and is passed over: give it 1'
    batch_size = settings.get("batch_size", options.text("train_batch_size", "1"))
    return Subset(folder, settings, repeats, as_whole("batch_size", batch_size), images)


def caption_of(image: Path, extension: str) -> Path:
    """The caption file of an image; the extension is put behind its name as it is."""
    return Path(str(image.parent / image.stem) + extension)


def check_captions(subsets: list[Subset], options: Options, report: Report) -> int:
    """How many images have a caption; a warning where some have none and no words instead."""
    default = options.text("caption_extension", ".caption")
    total = 0
    for subset in subsets:
        extension = str(subset.settings.get("caption_extension", default))
        missing = [i for i in subset.images if not caption_of(i, extension).is_file()]
        total += len(subset.images) - len(missing)
        if missing and not subset.settings.get("class_tokens"):
            report.warnings.append(
                f'{len(missing)} of {len(subset.images)} images in "{subset.folder}" have no '
                f"{extension} caption: {first_few(image.name for image in missing)}"
            )
    return total


# What cannot be cached, since it differs from epoch to epoch: option, then settings that change it.
CACHES = {
    "cache_latents": ("random_crop", "color_aug"),
    "cache_latents_to_disk": ("random_crop", "color_aug"),
    "cache_text_encoder_outputs": (
        "shuffle_caption",
        "caption_dropout_rate",
        "caption_tag_dropout_rate",
        "token_warmup_step",
    ),
}


def check_caches(subsets: list[Subset], options: Options, report: Report) -> None:
    """Settings that contradict a cache, with where they stand."""
    for cache, changing in CACHES.items():
        if not options.has(cache):
            continue
        for name in changing:
            # What the config says of a subset goes before the command line.
            silent = any(name not in subset.settings for subset in subsets)
            if silent and options.is_on(name):
                report.errors.append(f"--{cache} does not go with --{name}: leave one of them out")
            if any(subset.settings.get(name) for subset in subsets):
                report.errors.append(
                    f"--{cache} does not go with {name} in {config_line(name, options)}: "
                    "change that line, or leave the option out"
                )
    if options.has("cache_text_encoder_outputs") and not options.has("network_train_unet_only"):
        report.errors.append("--cache_text_encoder_outputs needs --network_train_unet_only: add it")


def config_line(name: str, options: Options) -> str:
    """Where a setting stands in the dataset config: "config.toml line 3"."""
    path = Path(options.text("dataset_config"))
    lines = path.read_text(encoding="utf-8").splitlines()
    off = r"\s*(false|0(\.0*)?)\s*([,#}]|$)"
    setting = re.compile(rf"\s*\"?{name}\"?\s*[=:](?!{off})")
    numbers = [str(i) for i, line in enumerate(lines, 1) if setting.match(line)]
    return f'"{path}"' + (f" line {' and '.join(numbers)}" if numbers else "")


# ---- The preset ----------------------------------------------------------------------------------


def count_by_trait(modules: list[str], known: dict[str, Trait]) -> str:
    """Modules in words: "80 content (output_blocks.0.1), 80 style (output_blocks.1.1)"."""
    groups: Counter[tuple[str, str]] = Counter()
    for module in modules:
        traits = [trait.name for trait in known.values() if trait.keeps(module)]
        groups[printable(" and ".join(traits)), block_of(module)] += 1
    return ", ".join(f"{n} {t} ({b})" if t else f"{n} in {b}" for (t, b), n in groups.items())


def check_network_args(options: Options) -> None:
    """Refuse arguments of which LyCORIS would drop one without a word."""
    if options.asks_lycoris("bypass_mode") and options.asks_lycoris("dora_wd"):
        raise BloraError(
            "with bypass_mode=True LyCORIS trains no DoRA, although dora_wd=True asks for it: "
            "remove one of the two from --network_args"
        )


def check_preset(options: Options, report: Report) -> dict[str, Layer]:
    """The modules the training will train; none is an error."""
    if options.text("network_module") not in ("lycoris.kohya", OUR_NETWORK):
        report.notes.append("no LyCORIS network, so there is no preset to look at")
        return {}
    name = options.pairs("network_args").get("preset", "full")
    if name in BUILT_IN_PRESETS:
        report.notes.append(f'"{name}" is a preset of LyCORIS itself and was not looked into')
        return {}
    preset = load_preset(Path(name))
    modules = trained_layers(preset)
    if options.has("network_train_text_encoder_only"):
        modules = {name: layer for name, layer in modules.items() if name.startswith("lora_te")}
    text = [module for module in modules if module.startswith("lora_te")]
    if text and options.has("network_train_unet_only"):
        report.warnings.append(
            f"the preset's {len(text)} text-encoder modules are left out, by "
            "--network_train_unet_only"
        )
        modules = {name: layer for name, layer in modules.items() if name not in text}
    if not modules:
        raise BloraError(f'the preset "{name}" selects no module of SDXL: correct its names')
    report.modules = list(modules)
    try:
        known = load_traits(HERE / "blora_traits.json")
    except BloraError as error:  # the training does without
        report.warnings.append(str(error))
        known = {}
    report.plan["modules"] = f"{len(modules)}: {count_by_trait(list(modules), known)}"
    if any(preset.get(key) for key in ("module_algo_map", "name_algo_map")):
        report.notes.append("the preset gives modules settings of their own: size unknown")
        return {}
    return modules


# ---- The plan ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Length:
    """How long the training is, in steps of one process."""

    steps: int
    epochs: int


def saved_files(length: Length, options: Options) -> int:
    """Files that will be there at the end: by steps, by epochs, and the last one."""

    def count(option: str, total: int) -> int:
        every = int(options.number(option, 0))
        return total // every if every > 0 else 0

    by_step = count("save_every_n_steps", length.steps)
    by_epoch = count("save_every_n_epochs", length.epochs - 1)
    if options.has("save_last_n_steps"):  # sd-scripts keeps those within this distance
        by_step = min(
            by_step, count("save_every_n_steps", int(options.number("save_last_n_steps", 0))) + 1
        )
    if options.has("save_last_n_epochs"):
        by_epoch = min(by_epoch, int(options.number("save_last_n_epochs", 0)))
    return by_step + by_epoch + 1


def plan_length(subsets: list[Subset], options: Options, report: Report) -> Length:
    """Images, steps and epochs of one process, as if each folder filled its own batches.

    sd-scripts sorts images into buckets by shape first, so its epochs can be somewhat longer.
    """
    images = sum(len(subset.images) for subset in subsets)
    repeated = sum(len(subset.images) * subset.repeats for subset in subsets)
    captions = check_captions(subsets, options, report)
    report.plan["images"] = f"{images} with {captions} captions, {repeated} an epoch with repeats"
    batches = sum(math.ceil(len(s.images) * s.repeats / s.batch_size) for s in subsets)
    accumulation = options.whole("gradient_accumulation_steps", 1)
    per_epoch = max(1, math.ceil(batches / accumulation))
    if options.has("max_train_epochs"):
        steps = options.whole("max_train_epochs", 1) * per_epoch
    else:
        steps = options.whole("max_train_steps", DEFAULT_STEPS)
    length = Length(steps, math.ceil(steps / per_epoch))
    batch = "/".join(str(size) for size in sorted({subset.batch_size for subset in subsets}))
    report.plan["training"] = (
        f"{steps} steps, {length.epochs} epochs, batch {batch}, "
        f"{options.text('mixed_precision', 'no')} mixed precision"
    )
    return length


def largest_batch(subsets: list[Subset], options: Options) -> int:
    """Pixels of a batch where it is largest; buckets keep to the area of the resolution."""
    largest = 0
    for subset in subsets:
        resolution = subset.settings.get("resolution", options.text("resolution"))
        if resolution == "":  # load_subsets has reported it
            continue
        sides = str(resolution).strip("[]()").split(",")
        width, height = (as_whole("resolution", side) for side in (sides[0], sides[-1]))
        largest = max(largest, width * height * subset.batch_size)
    return largest


def model_parts(options: Options) -> dict[str, float]:
    """Bytes of the models that stay on the card, each in its precision."""
    each = 4 if options.text("mixed_precision", "no") == "no" else 2
    unet_each = 1 if options.has("fp8_base") or options.has("fp8_base_unet") else each
    text_each = 1 if options.has("fp8_base") and not options.has("fp8_base_unet") else each
    parts = {f"U-Net in {8 * unet_each} bits": unet_each * blora_memory.UNET}
    if not options.caches("text_encoder_outputs"):
        parts["text encoders"] = text_each * blora_memory.TEXT_ENCODERS
    if not options.caches("latents"):
        parts["VAE"] = (4 if options.has("no_half_vae") else each) * blora_memory.VAE
    return parts


def plan_memory(
    lora: float, backward: blora_memory.Backward, options: Options, report: Report
) -> None:
    """The card's memory as a sum of its parts; what is not known is named, and not in the sum."""
    parts = {**model_parts(options), "LoRA": lora, "gradients": lora}
    unknown = []
    optimizer = options.text("optimizer_type", "AdamW")
    state = blora_memory.optimizer_state(optimizer)
    if state is None:
        unknown.append(f"{printable(optimizer)} state")
    else:
        parts[f"{printable(optimizer)} state"] = lora * state
    hint = ""
    if options.text("mixed_precision", "no") == "no" or not backward.pixels:
        unknown.append("activations")
    else:
        parts["activations"] = kept = blora_memory.activations(backward)
        if backward.checkpointing and backward.stops_early:
            more = blora_memory.activations(replace(backward, checkpointing=False)) - kept
            hint = (
                " (BLORA_SAVE_MEMORY=0, which is without --gradient_checkpointing: "
                f"{file_size(more)} more)"
            )
    summands = [f"{file_size(size)} {part}" for part, size in parts.items()]
    summands += [f"{part} of unknown size" for part in unknown]
    total = file_size(sum(parts.values()))
    report.plan["memory"] = f"{total} at least, computed: {', '.join(summands)}{hint}"
    check_card(parts, backward, options, report)


def check_card(
    parts: dict[str, float], backward: blora_memory.Backward, options: Options, report: Report
) -> None:
    """A warning where the card has less memory than the sum."""
    card, total = blora_memory.card(), sum(parts.values())
    if card is not None and total > card:
        room = card - total + parts.get("activations", 0)
        report.warnings.append(
            f"the card has {file_size(card)} of memory, and this training takes at least "
            f"{file_size(total)} (computed): {memory_advice(room, backward, options)}"
        )


def memory_advice(room: float, backward: blora_memory.Backward, options: Options) -> str:
    """What to change, the cheapest first; `room` is what the card has for activations."""
    advice = {
        "set BLORA_SAVE_MEMORY to 1, or add --gradient_checkpointing": not backward.checkpointing,
        "lower BLORA_RANK": options.whole("network_dim", 4) > 64,
        "add --cache_text_encoder_outputs": options.has("network_train_unet_only")
        and not options.caches("text_encoder_outputs"),
        "lower batch_size or resolution": room > 0 and backward.pixels > 512 * 512,
    }
    return ", or ".join([text for text, helps in advice.items() if helps] or ["use a larger card"])


def plan_size(
    modules: dict[str, Layer], subsets: list[Subset], options: Options, report: Report
) -> float | None:
    """Rank, parameters and memory; the size of a saved file, or None where that is unknown."""
    rank = options.whole("network_dim", 4)
    alpha = options.number("network_alpha", 1)
    network = options.pairs("network_args")
    report.plan["rank"] = f"{rank}, alpha {alpha:g}"
    plain = network.get("algo", "lora").lower() in ("lora", "locon", "dylora")
    conv = "conv_dim" in network and any(layer.is_kernel for layer in modules.values())
    if not plain or conv:
        return None
    parameters = sum(layer.parameters(rank) for layer in modules.values())
    if options.asks_lycoris("dora_wd"):
        axis = 0 if options.asks_lycoris("wd_on_output", "true") else 1
        parameters += sum(layer.shape[axis] for layer in modules.values())
    trained = 2 if options.has("full_fp16") or options.has("full_bf16") else 4  # bytes a number
    size = parameters * blora_memory.BYTES.get(options.text("save_precision"), trained)
    report.plan["rank"] += f": {parameters:,} parameters, {file_size(size)} a file"
    backward = blora_memory.Backward(
        frozenset(block_of(module) for module in modules if module.startswith("lora_unet")),
        options.text("network_module") == OUR_NETWORK
        and not any(module.startswith("lora_te") for module in modules),
        options.has("gradient_checkpointing"),
        largest_batch(subsets, options),
        2 * parameters if trained == 4 else 0,
    )
    plan_memory(trained * parameters, backward, options, report)
    # Where rank (in + out) passes in x out, full matrices would be smaller and could do more.
    outgrown = [m for m in modules.values() if m.parameters(rank) > math.prod(m.shape)]
    if outgrown:
        report.notes.append(
            f"at rank {rank} the LoRA is larger than the matrix it changes in {len(outgrown)} of "
            f"{len(modules)} modules"
        )
    return size


def check_disk(length: Length, size: float, options: Options, report: Report) -> None:
    """The saves to come against the free space of the output folder."""
    output = Path(options.text("output_dir", "."))
    folder = next(
        parent for parent in (output.absolute(), *output.absolute().parents) if parent.is_dir()
    )
    free, saves = shutil.disk_usage(folder).free, saved_files(length, options)
    report.plan["saves"] = f"{saves} of {file_size(size)} in {output} ({file_size(free)} free)"
    earlier = output.glob(f"{glob.escape(options.text('output_name', 'last'))}*.safetensors")
    overwritten = sum(file.stat().st_size for file in earlier)
    if saves * size > free + overwritten:
        report.errors.append(
            f"{saves} saves of {file_size(size)} do not fit into the {file_size(free)} free at "
            f'"{folder}": make room, or raise --save_every_n_steps'
        )


# ---- All of it -----------------------------------------------------------------------------------


def check(script: Path, words: list[str]) -> Report:
    """Everything that can be known before the training starts, each thing by itself."""
    report = Report()

    def attempt(step: Callable[..., Any], *args: Any) -> Any:
        try:
            return step(*args)
        except BloraError as error:
            report.errors.append(str(error))
        except OSError as error:
            report.errors.append(f"cannot look at everything ({printable(str(error))}): correct it")
        return None

    check_script(script, report)
    options = attempt(with_config_file, parse_options(words))
    if options is None:
        return report
    attempt(check_packages, options, report)
    attempt(check_checkpoint, options, report)
    subsets = attempt(load_subsets, options, report)
    length = None
    if subsets:
        attempt(check_caches, subsets, options, report)
        length = attempt(plan_length, subsets, options, report)
    attempt(check_network_args, options)
    modules = attempt(check_preset, options, report)
    size = attempt(plan_size, modules, subsets or [], options, report) if modules else None
    if length and size:
        attempt(check_disk, length, size, options, report)
    return report


def print_report(report: Report) -> None:
    """What is wrong on stderr; on stdout the plan, unless the training cannot begin."""
    for kind, sentences in (("error", report.errors), ("warning", report.warnings)):
        for sentence in sentences:
            print(f"{kind}: {sentence}", file=sys.stderr)
    if not report.errors:
        print("This training:")
        for name, text in report.plan.items():
            print(f"  {name:<9} {text}")
        for sentence in report.notes:
            print(f"note: {sentence}")


def build_parser() -> argparse.ArgumentParser:
    """The training script, and its options behind it."""
    parser = argparse.ArgumentParser(
        prog="blora_preflight.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="say it as JSON")
    parser.add_argument("script", type=Path, help="the training script")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="the options it will get")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 1 where the training would fail."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    args = build_parser().parse_args(argv)
    words = [str(args.script), *args.options]
    # The GUI prints the whole line, with accelerate and its options before the script.
    start = next((i for i, word in enumerate(words) if word.endswith(".py")), 0)
    report = check(Path(words[start]), words[start + 1 :])
    if args.json:
        print(json.dumps(asdict(report), indent=2))
    else:
        print_report(report)
    return 1 if report.errors else 0


if __name__ == "__main__":
    sys.exit(main())
