"""Make an SDXL checkpoint of full size with random weights, and the two tokenizers of SDXL.

  KOHYA_PYTHON make_random_sdxl.py KOHYA_ROOT FOLDER [--no_checkpoint]

Run it with the Python that sd-scripts runs with: the models are sd-scripts' own, and so is the code
that saves them. Writes FOLDER/random_sdxl.safetensors (2,514 tensors in fp16, 6.9 GB) and
FOLDER/tokenizers, for --tokenizer_cache_dir. On two CPU cores it takes a minute or two and 14 GB of
memory. The tokenizers are made of the CLIP vocabulary that open_clip_torch carries.

No picture comes of such a checkpoint. It is what a real one is to the trainer: every tensor has its
name, shape and precision, and the noise is scaled so that nothing overflows.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "standin"))

import torch
from sdxl_checkpoint import sdxl_shapes
from torch import nn

CHECKPOINT = "random_sdxl.safetensors"
# The folders that sd-scripts looks for, and what each pads with.
PADDING = {
    "openai_clip-vit-large-patch14": "<|endoftext|>",
    "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k": "!",
}
# Of CLIP's list of merges this many make the vocabulary of 49,408: 2 x 256 bytes, 2 marks, merges.
MERGES = 49_408 - 2 * 256 - 2


def import_models(kohya: Path) -> ModuleType:
    """library.sdxl_model_util of the checkout."""
    sys.path.insert(0, str(kohya.resolve()))
    from library import sdxl_model_util

    return sdxl_model_util


def models_on_meta(sdxl: ModuleType) -> list[nn.Module]:
    """sd-scripts' own text encoders, VAE and U-Net, of a checkpoint that has no numbers."""
    shapes = sdxl_shapes().items()
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes}
    with patch.object(sdxl, "load_file", return_value=tensors):
        return list(sdxl.load_models_from_sdxl_checkpoint(None, CHECKPOINT, "meta")[:4])


def fill(model: nn.Module, device: str = "cpu") -> None:
    """fp16 noise of 0.5 / sqrt(inputs) for matrices and kernels, 1 for norms, 0 for biases."""
    filled = {}
    for name, parameter in model.named_parameters():
        tensor = torch.zeros(parameter.shape, dtype=torch.float16, device=device)
        if tensor.ndim > 1:
            tensor.normal_(std=0.5 / tensor[0].numel() ** 0.5)
        elif name.endswith("weight"):
            tensor.fill_(1)
        filled[name] = tensor
    model.load_state_dict(filled, strict=False, assign=True)


def make_checkpoint(kohya: Path, path: Path) -> None:
    """Save random models as one checkpoint."""
    torch.manual_seed(0)
    sdxl = import_models(kohya)
    te1, te2, vae, unet = models = models_on_meta(sdxl)
    for model in models:
        fill(model)
    logit_scale = torch.tensor(1.0, dtype=torch.float16)
    sdxl.save_stable_diffusion_checkpoint(
        str(path), te1, te2, unet, 0, 0, None, vae, logit_scale, None
    )


def make_tokenizers(folder: Path) -> None:
    """Both, where sd-scripts looks for them, of the merges that open_clip carries."""
    from transformers import CLIPTokenizer
    from transformers.models.clip.tokenization_clip import bytes_to_unicode

    if not (package := importlib.util.find_spec("open_clip")):
        sys.exit("No open_clip in this Python: pip install --no-deps open_clip_torch")
    packed = Path(package.origin).with_name("bpe_simple_vocab_16e6.txt.gz").read_bytes()
    merges = gzip.decompress(packed).decode("utf-8").split("\n")[1 : MERGES + 1]
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    words += [merge.replace(" ", "") for merge in merges] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, rules = folder / "vocab.json", folder / "merges.txt"
    numbers = {word: number for number, word in enumerate(words)}
    vocabulary.write_text(json.dumps(numbers, ensure_ascii=False), encoding="utf-8")
    rules.write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    for name, padding in PADDING.items():
        files, options = map(str, (vocabulary, rules)), {"model_max_length": 77}
        CLIPTokenizer(*files, pad_token=padding, **options).save_pretrained(folder / name)


def main(kohya: str, out: str, *options: str) -> None:
    make_tokenizers(Path(out, "tokenizers"))
    if "--no_checkpoint" not in options:
        make_checkpoint(Path(kohya), Path(out, CHECKPOINT))


if __name__ == "__main__":
    main(*sys.argv[1:])
