"""What a key of a LoRA file means: a layer of SDXL, a tensor, and a program's naming scheme.

A key is a prefix, a layer and a suffix. The prefix tells the network and often the program. The
layer has sgm's or diffusers' name, with dots or underscores. The suffix is a tensor of some
algorithm, after a dot or an underscore. Each part is looked up by itself, so any mixture is read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, cached_property

from blora.sdxl import Layer, layers_by_module, layers_by_spelling

# The network that a prefix means, and who writes it. PEFT's comes before or after diffusers'.
PEFT = "base_model.model."
PREFIXES = {
    "lora_unet_": ("unet", "kohya"),
    "lora_te1_": ("te1", "kohya"),
    "lora_te2_": ("te2", "kohya"),
    "lycoris_": ("unet", "LyCORIS' wrapper"),
    "oft_unet_": ("unet", "sd-scripts' OFT"),
    "diffusion_model.": ("unet", "ComfyUI"),
    "text_encoders.clip_l.transformer.": ("te1", "ComfyUI"),
    "text_encoders.clip_g.transformer.": ("te2", "ComfyUI"),
    "clip_l.": ("te1", "OneTrainer"),
    "clip_g.": ("te2", "OneTrainer"),
    "unet.": ("unet", "diffusers"),
    "unet.unet.": ("unet", "diffusers"),
    "text_encoder.": ("te1", "diffusers"),
    "text_encoder_2.": ("te2", "diffusers"),
    PEFT: ("unet", "PEFT"),
    f"unet.{PEFT}": ("unet", "SimpleTuner"),
    f"text_encoder.{PEFT}": ("te1", "SimpleTuner"),
    f"text_encoder_2.{PEFT}": ("te2", "SimpleTuner"),
    f"{PEFT}unet.": ("unet", "PEFT"),
    f"{PEFT}text_encoder.": ("te1", "PEFT"),
    f"{PEFT}text_encoder_2.": ("te2", "PEFT"),
    "": ("unet", "no prefix"),
}


# With underscores, and the longer ones first.
PLAIN_PREFIXES = {p.replace(".", "_"): PREFIXES[p] for p in sorted(PREFIXES, key=len, reverse=True)}

LORA_UP, LORA_DOWN, LORA_MID = "lora_up.weight", "lora_down.weight", "lora_mid.weight"
UP_BIAS = "lora_up.bias"
ALPHA, DORA = "alpha", "dora_scale"

ADAPTER = r"(\.(?!weight\b|bias\b)[\w-]+)?"  # PEFT's name of an adapter, usually "default"
UP = rf"(lora_up|lora[._]up|lora_linear_layer[._]up|lora_B{ADAPTER})"
DOWN = rf"(lora_down|lora[._]down|lora_linear_layer[._]down|lora_A{ADAPTER})"
# Every tensor of every algorithm as kohya and LyCORIS spell it, and a pattern of all spellings.
SUFFIXES = {
    LORA_UP: rf"{UP}([._]weight)?",
    LORA_DOWN: rf"{DOWN}([._]weight)?",
    LORA_MID: r"lora_mid([._]weight)?",
    UP_BIAS: rf"{UP}[._]bias",
    DORA: r"dora_scale|lora_magnitude_vector(\.\w+)*|magnitude",
    ALPHA: r"(lora[._])?alpha",
} | {
    suffix: suffix.replace(".", "[._]") + r"(\.default)?"
    for suffix in (
        "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
        "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
        "a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight",
        "q_layer.weight", "p_layer.weight", "lambda_layer",
        "oft_blocks", "rescale", "oft_R.weight", "oft_R.scaled_oft",
        "diff", "diff_b", "w_norm", "b_norm", "weight", "on_input",
        "bias_indices", "bias_values", "bias_size",
    )
}  # fmt: skip
BY_ROW = "magnitude"  # in a DoRA's key: one number per row, as PEFT and ai-toolkit store it


@cache
def suffix_pattern() -> re.Pattern[str]:
    """All suffixes after a dot or underscore; the n-th of them is the group "sN"."""
    every = "|".join(f"(?P<s{n}>{spelt})" for n, spelt in enumerate(SUFFIXES.values()))
    return re.compile(rf"[._](?:{every})\Z")


@dataclass(frozen=True)
class Spelling:
    """A layer as a file spells it."""

    layer: Layer
    prefix: str  # with underscores
    name: str  # without the prefix, as PEFT's patterns match it

    @cached_property
    def plain(self) -> str:
        """With underscores; keys of a file that share it belong to one module."""
        return self.prefix + plain_name(self.name)

    @cached_property
    def words(self) -> str:
        """Whose name the layer has; text encoders have transformers' names everywhere."""
        if self.layer.network != "unet":
            return ""
        sgm = self.layer.name.replace(".", "_").removesuffix("_0")
        return "sgm names" if plain_name(self.name).removesuffix("_0") == sgm else "diffusers names"


@dataclass(frozen=True)
class Key:
    """A key of a file: the layer, the tensor as kohya spells it, and as the file does."""

    spelling: Spelling
    suffix: str
    spelt: str

    @property
    def is_peft(self) -> bool:
        """Whether its alpha is in PEFT's settings, rather than in a tensor."""
        has_peft_factor = "lora_A" in self.spelt or "lora_B" in self.spelt
        return has_peft_factor or "base_model_" in self.spelling.prefix

    @property
    def naming(self) -> str:
        """The program that spells prefix and suffix so, and its layers: "kohya, sgm names"."""
        _, program = PLAIN_PREFIXES[self.spelling.prefix]
        if program == "kohya" and "lora_magnitude_vector" in self.spelt:
            program = "diffusers' conversion to kohya"
        elif program == "kohya" and self.spelt.startswith("_"):
            program = "OneTrainer's legacy format"
        elif program == "diffusers" and ".processor." in self.spelling.name:
            program = "older diffusers"
        elif program == "diffusers" and self.is_peft:
            program = "diffusers with PEFT"
        elif program == "diffusers" and "lora" not in self.spelt:
            program = "OneTrainer"
        return ", ".join(filter(None, (program, self.spelling.words)))


def plain_name(text: str) -> str:
    """A layer's name with underscores, and without diffusers' attention processors."""
    return text.replace(".", "_").replace("_processor_", "_")


def find_layer(stem: str) -> Spelling | None:
    """The layer that a key without its suffix names; None where SDXL has no such layer."""
    plain = plain_name(stem)
    for prefix, (network, _) in PLAIN_PREFIXES.items():
        if plain.startswith(prefix):
            layer = layers_by_spelling()[network].get(plain[len(prefix) :])
            if layer:
                return Spelling(layer, prefix, stem[len(prefix) :])
    return None


@cache
def kohya_spelling(module: str) -> Spelling:
    """What find_layer gives for kohya's sgm name of a layer."""
    layer = layers_by_module()[module]
    prefix = f"lora_{layer.network}_"
    return Spelling(layer, prefix, module.removeprefix(prefix))


def read_key(key: str) -> Key | None:
    """What a key means; None where it belongs to no layer of SDXL.

    An unknown suffix is what follows the longest name of a layer.
    """
    stem, _, suffix = key.partition(".")
    if suffix in SUFFIXES and stem in layers_by_module():  # most files have these keys alone
        return Key(kohya_spelling(stem), suffix, f".{suffix}")
    match = suffix_pattern().search(key)
    if match and (spelling := find_layer(key[: match.start()])):
        suffix = next(s for n, s in enumerate(SUFFIXES) if match[f"s{n}"] is not None)
        return Key(spelling, suffix, match[0])
    for separator in reversed([*re.finditer("[._]", key)]):
        if spelling := find_layer(key[: separator.start()]):
            return Key(spelling, key[separator.end() :], key[separator.start() :])
    return None
