"""What a key of a LoRA file means: a layer of SDXL, a tensor, and a program's naming scheme.

A key is a prefix, a layer and a suffix. The prefix is a product of words, which tell the network
and often the program. The layer has sgm's or diffusers' name, with dots or underscores. The suffix
is a tensor of some algorithm, after a dot or an underscore. Each part is looked up by itself, so
any mixture is read, and in a time that grows with the key's length alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache

from blora.sdxl import Layer, layers_by_module, layers_by_spelling

# The words of prefixes, which stand in any order and number: the network that each means, and the
# program that writes it. The last ones are wrappers of torch, accelerate, checkpoints, pipelines.
WORDS = {
    "lora": ("", "kohya"),
    "lycoris": ("", "LyCORIS' wrapper"),
    "oft": ("", "sd-scripts' OFT"),
    "unet": ("unet", "diffusers"),
    "te": ("te", ""),  # the one text encoder of Stable Diffusion 1 and 2
    "te1": ("te1", ""),
    "te2": ("te2", ""),
    "text_encoder": ("te1", "diffusers"),
    "text_encoder_1": ("te1", "diffusers"),
    "text_encoder_2": ("te2", "diffusers"),
    "diffusion_model": ("unet", "ComfyUI"),
    "text_encoders": ("", "ComfyUI"),
    "clip_l": ("te1", "OneTrainer"),
    "clip_g": ("te2", "OneTrainer"),
    "conditioner_embedders_0": ("te1", ""),
    "conditioner_embedders_1": ("te2", ""),
    "base_model": ("", "PEFT"),
    **dict.fromkeys(
        ("model", "module", "transformer", "pipe", "pipeline", "_orig_mod", "_fsdp_wrapped_module",
         "_checkpoint_wrapped_module"), ("", ""),
    ),
}  # fmt: skip
# Not "transformer_blocks", which is a layer of Flux.
WORD = re.compile(rf"({'|'.join(sorted(WORDS, key=len, reverse=True))})_(?!blocks)")
PREFIX = re.compile(f"(?:{WORD.pattern})*")
# What wrappers, and diffusers' attention processors, put into the middle of a layer's name.
INSIDE = re.compile(
    r"[._](_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|processor)(?=[._])"
)

LORA_UP, LORA_DOWN, LORA_MID = "lora_up.weight", "lora_down.weight", "lora_mid.weight"
UP_BIAS = "lora_up.bias"
ALPHA, DORA = "alpha", "dora_scale"

ADAPTER = r"(\.[^.]+)?"  # PEFT's name of an adapter, usually "default": any letters but a dot
UP, DOWN = (
    rf"(lora_{way}|lora[._]{way}|lora_linear_layer[._]{way})([._]weight)?|lora_{letter}|"
    rf"lora_{letter}{ADAPTER}[._]weight"
    for way, letter in (("up", "B"), ("down", "A"))
)
# Every tensor of every algorithm as kohya and LyCORIS spell it, and a pattern of all spellings.
SUFFIXES = {
    LORA_UP: UP,
    LORA_DOWN: DOWN,
    LORA_MID: r"lora_mid([._]weight)?",
    UP_BIAS: rf"(lora_up|lora[._]up|lora_linear_layer[._]up|lora_B{ADAPTER})[._]bias",
    DORA: rf"dora_scale|lora_magnitude_vector{ADAPTER}([._]weight)?|magnitude",
    ALPHA: r"(lora[._])?alpha",
    "diff": r"diff|lora[._]weight",  # the latter is ZipLoRA's
    "diff_b": r"diff_b|bias[._]diff(_b)?",
    "oft_R.weight": rf"oft_R{ADAPTER}[._]weight",
} | {
    suffix: suffix + ADAPTER
    for suffix in (
        "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
        "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
    )
} | {
    suffix: suffix.replace(".", "[._]")
    for suffix in (
        "a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight",
        "q_layer.weight", "p_layer.weight", "lambda_layer",
        "oft_blocks", "rescale", "oft_R.scaled_oft", "w_norm", "b_norm", "weight", "on_input",
        "bias_indices", "bias_values", "bias_size",
    )
}  # fmt: skip
BY_ROW = "magnitude"  # in a DoRA's key: one number per row, as PEFT and ai-toolkit store it


@cache
def suffix_pattern() -> re.Pattern[str]:
    """All suffixes; the n-th of them is the group "sN"."""
    return re.compile("|".join(f"(?P<s{n}>{spelt})" for n, spelt in enumerate(SUFFIXES.values())))


@dataclass(frozen=True)
class Spelling:
    """A layer as a file spells it, or fused projections, in the order of their rows."""

    layers: tuple[Layer, ...]
    prefix: str  # with underscores
    name: str  # without the prefix, as PEFT's patterns match it

    @cached_property
    def plain(self) -> str:
        """With underscores; keys of a file that share it belong to one module."""
        return self.prefix + self.name.replace(".", "_")

    @property
    def is_bare(self) -> bool:
        """Whether it is a text encoder's, and nothing says of which."""
        return self.layers[0].network != "unet" and not prefix_meaning(self.prefix)[0]

    @cached_property
    def words(self) -> str:
        """Whose name the layer has; text encoders have transformers' names everywhere."""
        if self.layers[0].network != "unet":
            return ""
        sgm = self.layers[0].name.replace(".", "_").removesuffix("_0")
        block = "_".join(sgm.split("_")[:3])
        return "sgm names" if self.name.replace(".", "_").startswith(block) else "diffusers names"


@dataclass(frozen=True)
class Key:
    """A key of a file: the layer, the tensor as kohya spells it, and as the file does."""

    spelling: Spelling
    suffix: str
    spelt: str
    text: str  # all of the key

    @property
    def is_peft(self) -> bool:
        """Whether its alpha is in PEFT's settings, rather than in a tensor."""
        has_peft_factor = self.spelt[1:].startswith(("lora_A", "lora_B"))
        return has_peft_factor or "base_model_" in self.spelling.prefix

    @property
    def naming(self) -> str:
        """The program that spells prefix and suffix so, and its layers: "kohya, sgm names"."""
        _, program = prefix_meaning(self.spelling.prefix)
        if program == "kohya" and "lora_magnitude_vector" in self.spelt:
            program = "diffusers' conversion to kohya"
        elif program == "kohya" and self.spelt.startswith("_"):
            program = "OneTrainer's legacy format"
        elif program == "diffusers" and ".processor." in self.text:
            program = "older diffusers"
        elif program == "diffusers" and self.is_peft:
            program = "diffusers with PEFT"
        elif program == "diffusers" and "lora" not in self.spelt:
            program = "OneTrainer"
        return ", ".join(filter(None, (program, self.spelling.words)))


@lru_cache(maxsize=64)  # a file has few, but a hostile one may have long ones
def prefix_meaning(prefix: str) -> tuple[str, str]:
    """The network that a prefix means ("" where any, or more than one), and who writes it."""
    meanings = [WORDS[word] for word in WORD.findall(prefix)]
    networks = {network for network, _ in meanings} - {""}
    programs = [program for _, program in meanings if program] or ["no prefix"]
    program = "SimpleTuner" if programs[:2] == ["diffusers", "PEFT"] else programs[0]
    return "several" if len(networks) > 1 else "".join(networks), program


@cache
def names_in(network: str, encoder: str) -> tuple[dict[str, tuple[Layer, ...]], int, set[str]]:
    """A network's layers by any name, the longest name's length, and how names begin.

    Where the network is not known these are the U-Net's and the text encoder's.
    """
    known = layers_by_spelling()
    names = known.get(network, {}) if network else known[encoder] | known["unet"]
    return names, max(map(len, names), default=0), {name[:3] for name in names}


def find_layer(stem: str, encoder: str = "te2") -> Spelling | None:
    """The layer that a key names, up to the end of the longest name that it begins with.

    `encoder` is the text encoder of a key that names no network.
    """
    plain = stem.replace(".", "_")
    match = PREFIX.match(plain)
    start = match.end() if match else 0
    names, longest, beginnings = names_in(prefix_meaning(plain[:start])[0], encoder)
    end = min(len(plain), start + longest)
    if plain[start : start + 3] not in beginnings:
        return None
    while end > start:
        if layers := names.get(plain[start:end]):
            return Spelling(layers, plain[:start], stem[start:end])
        end = plain.rfind("_", start, end)
    return None


@cache
def kohya_spelling(module: str) -> Spelling:
    """What find_layer gives for kohya's sgm name of a layer."""
    layer = layers_by_module()[module]
    prefix = f"lora_{layer.network}_"
    return Spelling((layer,), prefix, module.removeprefix(prefix))


def read_key(key: str, encoder: str = "te2") -> Key | None:
    """What a key means; None where it belongs to no layer of SDXL.

    An unknown suffix is what follows the longest name of a layer.
    """
    stem, _, suffix = key.partition(".")
    if suffix in SUFFIXES and stem in layers_by_module():  # most files have these keys alone
        return Key(kohya_spelling(stem), suffix, f".{suffix}", key)
    bare = INSIDE.sub("", key)
    spelling = find_layer(bare, encoder)
    spelt = bare[len(spelling.plain) :] if spelling else ""
    if not spelling or spelt[:1] not in (".", "_"):
        return None
    match = suffix_pattern().fullmatch(spelt[1:])
    suffix = spelt[1:]
    if match:
        suffix = next(s for n, s in enumerate(SUFFIXES) if match[f"s{n}"] is not None)
    return Key(spelling, suffix, spelt, key)
