"""What a checkpoint is, by its name and its header: SDXL, or a model that sd-scripts cannot train.

Whether it has every tensor in its shape is asked of sd-scripts' own loader, in the rehearsal. What
the loader says of another kind of model does not name it; that is what this file is for.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Set
from pathlib import Path
from traceback import extract_tb

from blora.preflight.report import Report
from blora.sdxl import sdxl_layers
from blora.tensorfile import read_header
from blora.text import BloraError, file_size

PLACEHOLDER = "path/to/sd_xl_base_1.0.safetensors"  # what the launchers hold before they are edited
NOT_SET = (
    "no checkpoint is set yet: give your SDXL checkpoint as --pretrained_model_name_or_path "
    "(BLORA_CHECKPOINT in the launcher)"
)
Shape = tuple[int, ...]

# ---- Kinds of models -----------------------------------------------------------------------------

UNET, VAE = "model.diffusion_model.", "first_stage_model."
SDXL_PARTS = (UNET, VAE, "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.")
# Keys of which SDXL has both, and what a checkpoint without them may be.
SDXL_KEYS = {f"{UNET}label_emb.0.0.weight", "conditioner.embedders.1.model.ln_final.weight"}
OTHER_MODELS = (
    (r"(lora_|unet\.|text_encoder|base_model\.).*", "a LoRA"),
    (r"conditioner\.embedders\.0\.model\..*", "an SDXL refiner"),
    (r"cond_stage_model\.transformer\..*", "an SD 1.x checkpoint"),
    (r"cond_stage_model\.model\..*", "an SD 2.x checkpoint"),
    (r"(model\.diffusion_model\.)?double_blocks\..*", "a Flux checkpoint"),
    (r"(model\.diffusion_model\.)?joint_blocks\..*", "an SD3 checkpoint"),
    (r"down_blocks\..*", "a diffusers U-Net"),
    (r"(encoder|decoder)\..*", "a VAE"),
)
CONV_IN = f"{UNET}input_blocks.0.0.weight"


def other_model(keys: Set[str]) -> str | None:
    """What a file is that lacks a key of SDXL; None where it may be a part of SDXL."""
    if keys >= SDXL_KEYS:
        return None
    for pattern, kind in OTHER_MODELS:
        if any(re.fullmatch(pattern, key) for key in keys):
            return kind
    return None if any(key.startswith(SDXL_PARTS) for key in keys) else "something else"


def other_unet(shapes: dict[str, Shape]) -> str | None:
    """What a U-Net of SDXL's family is that is not SDXL's, in the words of a sentence."""
    shape = shapes.get(CONV_IN, ())
    if len(shape) == 4 and shape[1] != 4:
        kind = "an inpainting model" if shape[1] == 9 else "a model of its own"
        return f"{kind}, whose U-Net takes {shape[1]} channels, not SDXL's 4"
    # One tensor of each transformer block; a residual block has no norm1.
    blocks = [f"{UNET}{name}.weight" for name in sdxl_layers()["unet"] if name.endswith(".norm1")]
    present = sum(key in shapes for key in blocks)
    if 0 < present < len(blocks):
        return (
            f"a distilled model, as SSD-1B and Segmind Vega are: its U-Net has {present} of SDXL's "
            f"{len(blocks)} transformer blocks"
        )
    return None


def explain_model(args: Namespace, failure: BaseException) -> str:
    """A sentence on a U-Net that is not SDXL's, where sd-scripts' loader has refused it; or ""."""
    path = target_of(Path(getattr(args, "pretrained_model_name_or_path", None) or ""))
    is_loading = any(f.name == "load_target_model" for f in extract_tb(failure.__traceback__))
    if not is_loading or not path.is_file() or path.suffix.lower() != ".safetensors":
        return ""
    kind = other_unet({key: tensor.shape for key, tensor in read_header(path)[0].items()})
    return f'"{path}" is {kind}: give a checkpoint of SDXL itself' if kind else ""


def check_model(path: Path, predicts_v: bool, report: Report) -> None:
    """Whether a .safetensors file holds SDXL; BloraError where it holds another model."""
    shapes = {key: tensor.shape for key, tensor in read_header(path)[0].items()}
    if kind := other_model(shapes.keys()):
        raise BloraError(f'"{path}" is {kind}, not an SDXL checkpoint: give the one to train on')
    if not any(key.startswith(VAE) for key in shapes):
        raise BloraError(
            f'"{path}" has no VAE, and sd-scripts loads no checkpoint without one, not even with '
            "--vae: give one that has it"
        )
    report.plan["base"] += f" (SDXL, {file_size(path.stat().st_size)})"
    if "v_pred" in shapes and not predicts_v:
        report.warnings.append(
            f'"{path}" is a v-prediction model: add --v_parameterization --zero_terminal_snr'
        )


# ---- The file ------------------------------------------------------------------------------------


def looks_like_hub_id(name: str) -> bool:
    """Whether a name that is no file may be one of the Hugging Face hub: "owner/model-1.0"."""
    ending = Path(name).suffix[1:]
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not ending.isalpha()


def target_of(path: Path) -> Path:
    """What sd-scripts opens: where a link leads, a relative one from the working folder.

    It reads the link itself (os.readlink in library/sdxl_train_util.py, _load_target_model).
    """
    return path.readlink() if path.is_symlink() else path


def followed(path: Path) -> Path:
    """The same, where there is such a file; BloraError where only the link's own folder has it."""
    target = target_of(path)
    if path.exists() and not target.exists():
        raise BloraError(
            f'"{path}" is a link to "{target}", which sd-scripts looks for in the working folder: '
            f'give "{path.resolve()}" itself'
        )
    return target if target.exists() else path


def check_file(path: Path, predicts_v: bool, report: Report) -> None:
    """Whether sd-scripts can read a file as a checkpoint; by its name it knows how."""
    with path.open("rb") as file:
        start = file.read(9)
    if path.suffix.lower() == ".safetensors":
        check_model(path, predicts_v, report)
    elif start[8:] == b"{":  # 8 bytes of length, then JSON
        raise BloraError(
            f'"{path}" is a safetensors file, which sd-scripts recognizes by its name alone: '
            "give one whose name ends in .safetensors"
        )
    elif start.startswith((b"PK", b"\x80")):  # torch.save's zip, or its pickle before torch 1.6
        report.notes.append(f'"{path}" is not a .safetensors file, so it was not checked')
    else:
        raise BloraError(
            f'"{path}" is neither a safetensors file nor a torch file: download it again, or give '
            "another"
        )


def check_checkpoint(name: str, predicts_v: bool, report: Report) -> None:
    """Whether the base can be loaded; `predicts_v` is whether --v_parameterization is given.

    BloraError where it cannot.
    """
    if name in ("", PLACEHOLDER):
        raise BloraError(NOT_SET)
    report.plan["base"] = name
    path = followed(Path(name))
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise BloraError(
                f'"{name}" is a folder without a model_index.json, so it is not a diffusers '
                "model: give the .safetensors file itself"
            )
        report.notes.append(f'"{name}" is a folder, taken for a diffusers model and not checked')
    elif not path.exists() and looks_like_hub_id(name):
        report.notes.append(
            f'"{name}" is not a file here, so it is taken for a model of the Hugging Face hub'
        )
    elif not path.is_file():
        raise BloraError(
            f'no checkpoint at "{name}": correct --pretrained_model_name_or_path (BLORA_CHECKPOINT '
            "in the launcher)"
        )
    else:
        check_file(path, predicts_v, report)
