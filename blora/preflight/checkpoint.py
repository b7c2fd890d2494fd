"""Whether sd-scripts can load a checkpoint: every tensor that SDXL has, by name and shape.

sd-scripts' loader (load_models_from_sdxl_checkpoint in library/sdxl_model_util.py, 0.9.1 to 0.10.1)
leaves no tensor of the U-Net and the text encoders out, takes none more, and asks for a VAE even
where --vae gives another. Tensors outside of these four it passes over. All of that is read from
the header of the file, and files.py asks for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

from blora.preflight.report import Report
from blora.sdxl import Layer, checkpoint_weight, sdxl_layers
from blora.tensorfile import read_header
from blora.text import BloraError, file_size, first_few

PLACEHOLDER = "path/to/sd_xl_base_1.0.safetensors"  # what the launchers hold before they are edited
CORRECT = "correct --pretrained_model_name_or_path (BLORA_CHECKPOINT in the launcher)"
Shape = tuple[int, ...]

# ---- What SDXL has -------------------------------------------------------------------------------

TEXT_1 = "conditioner.embedders.0.transformer."
TEXT_2 = "conditioner.embedders.1.model."
VAE = "first_stage_model."
# What open_clip calls the parts of the second text encoder that are neither matrix nor block.
OPEN_CLIP = {
    "text_model.embeddings.token_embedding": "token_embedding.weight",
    "text_model.embeddings.position_embedding": "positional_embedding",
    "text_model.final_layer_norm": "ln_final.weight",
    "text_projection": "text_projection",
}


def has_bias(layer: Layer) -> bool:
    """Whether a layer has one, which is as long as its weight has rows."""
    if layer.kind == "Embedding" or layer.name == "text_projection":
        return False
    return not layer.name.endswith((".to_q", ".to_k", ".to_v"))


def open_clip_weight(layer: Layer) -> tuple[str, Shape]:
    """The tensor that holds a weight of the second text encoder; q, k and v share one."""
    if found := checkpoint_weight(layer):
        key, third = found
        return key, (layer.shape if third is None else (3 * layer.shape[0], *layer.shape[1:]))
    if layer.name in OPEN_CLIP:
        return TEXT_2 + OPEN_CLIP[layer.name], layer.shape
    number, norm = re.findall(r"layers\.(\d+)\.layer_norm(\d)", layer.name)[0]
    return f"{TEXT_2}transformer.resblocks.{number}.ln_{norm}.weight", layer.shape


def network_tensors(network: str) -> dict[str, Shape]:
    """{key: shape} of the U-Net or of a text encoder in a checkpoint."""
    tensors: dict[str, Shape] = {}
    for layer in sdxl_layers()[network].values():
        if not layer.shape:
            continue
        if network == "te2":
            key, shape = open_clip_weight(layer)
        else:
            key, shape = checkpoint_weight(layer)[0], layer.shape
        tensors[key] = shape
        if has_bias(layer):
            tensors[f"{key.removesuffix('weight')}bias"] = shape[:1]
    return tensors


def vae_resnet(name: str, inputs: int, outputs: int) -> Iterator[tuple[str, Shape]]:
    """(name, weight's shape) of the layers of a residual block of the VAE."""
    yield f"{name}.norm1", (inputs,)
    yield f"{name}.conv1", (outputs, inputs, 3, 3)
    yield f"{name}.norm2", (outputs,)
    yield f"{name}.conv2", (outputs, outputs, 3, 3)
    if inputs != outputs:
        yield f"{name}.nin_shortcut", (outputs, inputs, 1, 1)


def vae_layers() -> Iterator[tuple[str, Shape]]:
    """(name, weight's shape) of all layers of SDXL's VAE, which is built as SD 1.5's is."""
    levels = (128, 128, 256, 512, 512)  # the width before the first level, and that of each
    for part, sides in (("encoder", (3, 8)), ("decoder", (4, 3))):
        first, last = (128, 512) if part == "encoder" else (512, 128)
        yield f"{part}.conv_in", (first, sides[0], 3, 3)
        yield from vae_resnet(f"{part}.mid.block_1", 512, 512)
        yield from vae_resnet(f"{part}.mid.block_2", 512, 512)
        yield f"{part}.mid.attn_1.norm", (512,)
        for name in ("q", "k", "v", "proj_out"):
            yield f"{part}.mid.attn_1.{name}", (512, 512, 1, 1)
        yield f"{part}.norm_out", (last,)
        yield f"{part}.conv_out", (sides[1], last, 3, 3)
    for level, (inputs, outputs) in enumerate(pairwise(levels)):
        for block in range(2):
            width = inputs if block == 0 else outputs
            yield from vae_resnet(f"encoder.down.{level}.block.{block}", width, outputs)
        if level < 3:
            yield f"encoder.down.{level}.downsample.conv", (outputs, outputs, 3, 3)
        above = levels[min(level + 2, 4)]  # the decoder counts its levels from its end
        for block in range(3):
            width = above if block == 0 else outputs
            yield from vae_resnet(f"decoder.up.{level}.block.{block}", width, outputs)
        if level > 0:
            yield f"decoder.up.{level}.upsample.conv", (outputs, outputs, 3, 3)
    yield "quant_conv", (8, 8, 1, 1)
    yield "post_quant_conv", (4, 4, 1, 1)


def vae_tensors() -> dict[str, Shape]:
    """{key: shape} of the VAE in a checkpoint."""
    tensors: dict[str, Shape] = {}
    for name, shape in vae_layers():
        tensors |= {f"{VAE}{name}.weight": shape, f"{VAE}{name}.bias": shape[:1]}
    return tensors


# ---- How sd-scripts reads it ---------------------------------------------------------------------


def plain(key: str, shape: Shape) -> tuple[str, Shape]:
    """A tensor of the U-Net as the loader takes it: as it is."""
    return key, shape


def text_1(key: str, shape: Shape) -> tuple[str, Shape] | None:
    """A tensor of the first text encoder; older checkpoints number its positions in one."""
    return None if key == f"{TEXT_1}text_model.embeddings.position_ids" else (key, shape)


def text_2(key: str, shape: Shape) -> tuple[str, Shape] | None:
    """A tensor of the second text encoder, by convert_sdxl_text_encoder_2_checkpoint."""
    if ".resblocks." not in key and (".logit_scale" in key or ".embeddings.position_ids" in key):
        return None
    if key == f"{TEXT_2}text_projection.weight":  # Playground's name
        return f"{TEXT_2}text_projection", shape
    return key, shape


# The names of the VAE that its conversion knows a new name for, be they SDXL's or not.
VAE_BLOCKS = re.compile(
    r"(down|up)\.[0-3]|(encoder\.down|decoder\.up)\.|(en|de)coder\.mid\.(block_[12]|attn)"
)


def vae(key: str, shape: Shape) -> tuple[str, Shape] | None:
    """A tensor of the VAE, by convert_ldm_vae_checkpoint, which picks those it knows."""
    is_attention = re.search(r"\.mid\.attn_1\.(q|k|v|proj_out)\.weight", key)
    if is_attention and len(shape) in (2, 4):  # it takes matrices too, and of kernels the corner
        return key, (*shape[:2], 1, 1)
    return (key, shape) if key in sdxl_parts()[-1].tensors or VAE_BLOCKS.search(key) else None


@dataclass(frozen=True)
class Part:
    """A model in a checkpoint: the names its tensors begin with, what it needs, how it is read."""

    name: str
    prefix: str
    tensors: dict[str, Shape]
    read: Callable[[str, Shape], tuple[str, Shape] | None]


@cache
def sdxl_parts() -> tuple[Part, ...]:
    """The four models that an SDXL checkpoint is made of."""
    return (
        Part("U-Net", "model.diffusion_model.", network_tensors("unet"), plain),
        Part("first text encoder", TEXT_1, network_tensors("te1"), text_1),
        Part("second text encoder", TEXT_2, network_tensors("te2"), text_2),
        Part("VAE", VAE, vae_tensors(), vae),
    )


# ---- What is wrong with it -----------------------------------------------------------------------

# Keys of which SDXL has both, and what a checkpoint without them may be.
SDXL_KEYS = ("model.diffusion_model.label_emb.0.0.weight", f"{TEXT_2}ln_final.weight")
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
CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"


def dimensions(shape: Shape) -> str:
    """A shape as torch writes it."""
    return f"[{', '.join(map(str, shape))}]"


def unet_kind(shapes: dict[str, Shape]) -> str | None:
    """What a U-Net of the same family is that is not SDXL's, in the words of a sentence."""
    shape = shapes.get(CONV_IN, ())
    if len(shape) == 4 and shape[1] != 4:
        kind = "an inpainting model" if shape[1] == 9 else "a model of its own"
        return f"{kind}, whose U-Net takes {shape[1]} channels, not SDXL's 4"
    # One tensor of each transformer block; a residual block has no norm1.
    blocks = [key for key in sdxl_parts()[0].tensors if key.endswith(".norm1.weight")]
    left = sum(key in shapes for key in blocks)
    if 0 < left < len(blocks):
        return (
            f"a distilled model, as SSD-1B and Segmind Vega are: its U-Net has {left} of SDXL's "
            f"{len(blocks)} transformer blocks"
        )
    return None


def differences(part: Part, shapes: dict[str, Shape]) -> str:
    """How the tensors of one model differ from SDXL's; nothing where they do not."""
    missing = [key for key in part.tensors if key not in shapes]
    more = [key for key in shapes if key not in part.tensors]
    other = [
        f"{key} is {dimensions(shapes[key])}, not {dimensions(shape)}"
        for key, shape in part.tensors.items()
        if key in shapes and shapes[key] != shape
    ]
    told = []
    if missing:
        told.append(f"lacks {len(missing)} of its {len(part.tensors):,} tensors")
        told[-1] += f" ({first_few(missing)})"
    if more:
        told.append(f"has {len(more)} that SDXL does not have ({first_few(more)})")
    if other:
        told.append(f"has {len(other)} of another shape ({first_few(other)})")
    return " and ".join(told)


def check_parts(path: Path, tensors: dict[str, Shape], report: Report) -> bool:
    """Whether all four models are there and SDXL's; an error for each that is not."""
    parts: dict[str, dict[str, Shape]] = {}
    for part in sdxl_parts():
        read = [part.read(k, s) for k, s in tensors.items() if k.startswith(part.prefix)]
        parts[part.name] = dict(filter(None, read))
    if kind := unet_kind(parts["U-Net"]):
        report.errors.append(f'"{path}" is {kind}: give a checkpoint of SDXL itself')
        return False
    absent = [f"no {name}" for name, shapes in parts.items() if not shapes]
    if absent == ["no VAE"]:
        report.errors.append(
            f'"{path}" has no VAE, and sd-scripts loads no checkpoint without one, not even with '
            "--vae: give one that has it"
        )
    elif absent:
        *first, last = absent
        told = f"{', '.join(first)} and {last}" if first else last
        report.errors.append(f'"{path}" has {told}: give a checkpoint with all parts of SDXL')
    found = [
        (part.name, told)
        for part in sdxl_parts()
        if parts[part.name] and (told := differences(part, parts[part.name]))
    ]
    for name, told in found:
        report.errors.append(
            f'the {name} of "{path}" is not as sd-scripts needs it, it {told}: download it again, '
            "or give the checkpoint that it was made from"
        )
    return not absent and not found


def check_sdxl(path: Path, predicts_v: bool, report: Report) -> None:
    """Whether a .safetensors file is a whole SDXL checkpoint; another model is named."""
    tensors = {key: tensor.shape for key, tensor in read_header(path)[0].items()}
    if not all(key in tensors for key in SDXL_KEYS):
        kinds = [
            kind for pattern, kind in OTHER_MODELS if any(re.fullmatch(pattern, k) for k in tensors)
        ]
        if not any(key.startswith(part.prefix) for key in tensors for part in sdxl_parts()):
            kinds.append("something else")
        if kinds:
            raise BloraError(
                f'"{path}" is {kinds[0]}, not an SDXL checkpoint: give the one to train on'
            )
    if not check_parts(path, tensors, report):
        return
    report.plan["base"] += f" (SDXL, {file_size(path.stat().st_size)})"
    if "v_pred" in tensors and not predicts_v:
        report.warnings.append(
            f'"{path}" says it predicts v: add --v_parameterization --zero_terminal_snr'
        )


# ---- The file ------------------------------------------------------------------------------------


def is_of_the_hub(name: str) -> bool:
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


def begins_as_safetensors(path: Path) -> bool:
    """Whether it begins as such a file does, and no pickle or zip: 8 bytes of length, then JSON."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def is_of_torch(path: Path) -> bool:
    """Whether it begins as torch.save's files do: a zip, or a pickle as before torch 1.6."""
    with path.open("rb") as file:
        return file.read(2).startswith((b"PK", b"\x80"))


def check_file(path: Path, predicts_v: bool, report: Report) -> None:
    """Whether sd-scripts can read a file as a checkpoint, which it takes for what its name says."""
    if path.suffix.lower() == ".safetensors":
        check_sdxl(path, predicts_v, report)
    elif begins_as_safetensors(path):
        raise BloraError(
            f'"{path}" is a safetensors file, which sd-scripts recognizes by its name alone: '
            "give one whose name ends in .safetensors"
        )
    elif is_of_torch(path):
        report.notes.append(f'"{path}" is not a .safetensors file, so it was not checked')
    else:
        raise BloraError(
            f'"{path}" is neither a safetensors file nor a torch file: download it again, or give '
            "another"
        )


def check_checkpoint(name: str, predicts_v: bool, report: Report) -> None:
    """Whether the base can be loaded; of a .safetensors file the header is read.

    `predicts_v` is whether --v_parameterization is given. BloraError where there is no base.
    """
    if name in ("", PLACEHOLDER):
        raise BloraError(
            "no checkpoint is set yet: give your SDXL checkpoint as "
            "--pretrained_model_name_or_path (BLORA_CHECKPOINT in the launcher)"
        )
    report.plan["base"] = name
    path = followed(Path(name))
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise BloraError(
                f'"{name}" is a folder without a model_index.json, so it is not a diffusers '
                "model: give the .safetensors file itself"
            )
        report.notes.append(f'"{name}" is a folder, taken for a diffusers model and not checked')
    elif not path.exists() and is_of_the_hub(name):
        report.notes.append(
            f'"{name}" is not a file here, so it is taken for a model of the Hugging Face hub'
        )
    elif not path.is_file():
        raise BloraError(f'no checkpoint at "{name}": {CORRECT}')
    else:
        check_file(path, predicts_v, report)
