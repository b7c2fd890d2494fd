"""LoRA files by chance: sound ones of any program's names, then twisted; and what is in them."""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from broken_files import header_of, raw
from lora_algebra import Module, rank_of
from lora_files import weight_shape
from lora_forms import FORMS, INPUT, OUTPUT, REFUSED, Form, make_module
from torch import Tensor

from blora.sdxl import layers_by_module

DTYPES = {
    torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.bool: "BOOL",
    torch.int8: "I8", torch.uint8: "U8", torch.int16: "I16", torch.int64: "I64",
}  # fmt: skip
FLOATS = list(DTYPES)[:3]


@dataclass
class Fuzzed:
    """A file, and what a cut of everything in it may keep."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    wanted: dict[str, Module]  # by kohya's name, with the alpha that its program applies
    keys: dict[str, list[str]]  # of each wanted module
    names: Names
    twists: list[str] = field(default_factory=list)
    doubtful: set[str] = field(default_factory=set)  # modules of which nobody can say what is right
    forbidden: set[str] = field(default_factory=set)  # modules that must not be cut at all
    damage: Callable[[bytes], bytes] = lambda data: data

    def data(self) -> bytes:
        """The bytes of the file."""
        header: dict[str, object] = {"__metadata__": self.metadata} if self.metadata else {}
        parts, end = [], 0
        for key, tensor in self.tensors.items():
            part = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            offsets = [end, end + len(part)]
            shape = list(tensor.shape)
            header[key] = {"dtype": DTYPES[tensor.dtype], "shape": shape, "data_offsets": offsets}
            parts.append(part)
            end += len(part)
        return self.damage(raw(header, b"".join(parts)))


# ---- Names ---------------------------------------------------------------------------------------

WRAPPERS = ("module.", "_orig_mod.", "base_model.model.")
# What a pipeline, a checkpoint and the programs put before each network's layers.
NETWORKS = {
    "unet": ("unet.", "diffusion_model.", "model.diffusion_model.", "unet.unet.", "lora_unet_", ""),
    "te1": ("text_encoder.", "clip_l.", "text_encoders.clip_l.transformer.", "lora_te1_"),
    "te2": ("text_encoder_2.", "clip_g.", "text_encoders.clip_g.transformer.", "lora_te2_"),
}
UPS_AND_DOWNS = [
    # how lora_up.weight, lora_down.weight and dora_scale are spelt; {} is an adapter's name
    ("lora_up.weight", "lora_down.weight", "dora_scale"),
    ("lora.up.weight", "lora.down.weight", "dora_scale"),
    ("lora_linear_layer.up.weight", "lora_linear_layer.down.weight", "dora_scale"),
    ("lora_B.weight", "lora_A.weight", "lora_magnitude_vector"),
    ("lora_B.{}.weight", "lora_A.{}.weight", "lora_magnitude_vector.{}"),
    ("lora_B.{}.weight", "lora_A.{}.weight", "lora_magnitude_vector.{}.weight"),
]
ADAPTERS = ("default", "my-adapter", "x1", "my_adapter", "Käthe", "日本", "a b", "0")


@dataclass
class Names:
    """A program's spelling of a file's keys, by chance."""

    is_plain: bool  # kohya's names as they are
    prefixes: dict[str, str]
    has_dots: bool
    is_diffusers: bool
    factors: tuple[str, str, str]
    adapter: str

    @property
    def is_peft(self) -> bool:
        return "lora_A" in self.factors[1] and not self.is_plain

    def layer(self, name: str) -> str:
        """A module's name as it stands in the file, up to the dot before its tensors."""
        layer = layers_by_module()[name]
        if self.is_plain:
            return name
        path = layer.diffusers if self.is_diffusers and layer.diffusers else layer.name
        whole = self.prefixes[layer.network] + path
        return whole if self.has_dots else whole.replace(".", "_")

    def suffix(self, suffix: str) -> str:
        """A tensor's name in the file."""
        ours = ("lora_up.weight", "lora_down.weight", "dora_scale")
        if suffix in ours and not self.is_plain:
            return self.factors[ours.index(suffix)].format(self.adapter)
        is_peft_too = suffix.startswith(("hada_", "lokr_"))
        return f"{suffix}.{self.adapter}" if is_peft_too and "{}" in self.factors[0] else suffix


def names_by_chance(chance: random.Random) -> Names:
    prefixes = {}
    before, after = (
        "".join(chance.choices(WRAPPERS, k=chance.choice((0, 0, 0, 0, 0, 1, 2)))) for _ in range(2)
    )
    has_dots = chance.random() < 0.7
    for network, starts in NETWORKS.items():
        start = chance.choice([s for s in starts if has_dots != s.startswith("lora_")])
        prefixes[network] = before + start + after
    factors, adapter = chance.choice(UPS_AND_DOWNS), chance.choice(ADAPTERS)
    is_plain = chance.random() < 0.25
    return Names(is_plain, prefixes, has_dots, chance.random() < 0.6, factors, adapter)


# ---- Sound files ---------------------------------------------------------------------------------

TEXT = {
    "linear": "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
    "attention": "lora_te2_text_model_encoder_layers_31_self_attn_out_proj",
}
EVERY = FORMS | REFUSED
# A layer's own "weight" may be meant where a name has dots; OFT's tensors have other names in PEFT.
KOHYA_ALONE = ("IA3", "OFT", "BOFT", "T-LoRA", "GLoRA")


def add_module(file: Fuzzed, name: str, module: Module) -> None:
    """Put a module into the file under its names."""
    keys = {s: f"{file.names.layer(name)}.{file.names.suffix(s)}" for s in module}
    tensors = dict(module)
    if "dora_scale" in module and "magnitude" in keys["dora_scale"]:
        tensors["dora_scale"] = module["dora_scale"].reshape(-1)
    file.tensors |= {keys[suffix]: tensor for suffix, tensor in tensors.items()}
    file.wanted[name], file.keys[name] = module, list(keys.values())


def form_by_chance(chance: random.Random, names: Names) -> Form:
    name = chance.choice([*EVERY, *["LoRA"] * 20])
    is_by_column = name == "DoRA, by column" and "magnitude" in names.factors[2]
    if not names.is_plain and (name.startswith(KOHYA_ALONE) or is_by_column):
        return EVERY["LoRA"]
    return EVERY[name]


def sound_file(chance: random.Random) -> Fuzzed:
    """One to three modules of real algorithms."""
    file = Fuzzed({}, {}, {}, {}, names_by_chance(chance))
    form, dtype = form_by_chance(chance, file.names), chance.choice(FLOATS)
    for _ in range(chance.randrange(1, 4)):
        every = [(layers, kind) for layers in (INPUT, OUTPUT, TEXT) for kind in layers]
        layers, kind = chance.choice(
            [(layers, kind) for layers, kind in every if kind in form.kinds]
        )
        alpha = chance.choice((None, None, 1.0, 0.5, 3.0, 0.0))
        seed, rank = chance.randrange(99), chance.randrange(1, 4)
        if layers[kind] not in file.wanted:
            module = make_module(layers[kind], form, rank, alpha, dtype, seed)
            add_module(file, layers[kind], module)
    return file


# ---- Twists --------------------------------------------------------------------------------------
# Each changes the file, and says in it what is right then.


def split_by_rows(module: Module, factors: list[float]) -> list[Module]:
    """Modules that share all that is on the side of the input."""
    [scaled] = {"lora_up.weight", "hada_w1_a", "lokr_w1", "diff"} & module.keys()
    return [module | {scaled: module[scaled] * factor} for factor in factors]


def fused(file: Fuzzed, chance: random.Random) -> None:
    """q, k and v, or k and v, of one attention in the tensors of one layer."""
    number, letters = chance.choice(((1, "qkv"), (2, "kv")))
    block = f"lora_unet_input_blocks_4_1_transformer_blocks_1_attn{number}_to_"
    form = EVERY[chance.choice(["LoRA"] * 5 + ["full", "LoHa", "LoKr, both whole", "DoRA"])]
    alpha, dtype = chance.choice((None, 1.0, 3.0)), chance.choice(FLOATS)
    whole = make_module(block + letters[-1], form, 2, alpha, dtype)
    parts = split_by_rows(whole, [1.0, -2.0, 0.5][: len(letters)])
    rows = {"lora_up.weight", "hada_w1_a", "hada_w2_a", "lokr_w1", "diff", "dora_scale"}
    together = {
        s: torch.cat([part[s] for part in parts]) if s in rows else t for s, t in whole.items()
    }
    stem = file.names.layer(block + letters[-1])[:-1] + letters
    add_module(file, block + letters[-1], together)
    for key in file.keys.pop(block + letters[-1]):
        end = key.removeprefix(stem[: -len(letters)] + letters[-1])
        file.tensors[stem + end] = file.tensors.pop(key)
    keys = [key for key in file.tensors if key.startswith(f"{stem}.")]
    for letter, part in zip(letters, parts, strict=True):
        file.wanted[block + letter], file.keys[block + letter] = part, keys


def twice(file: Fuzzed, chance: random.Random) -> None:
    """A module under kohya's names too: the same, or another."""
    name = chance.choice([*file.wanted])
    is_same = chance.random() < 0.5
    for suffix, tensor in file.wanted[name].items():
        key = f"{name}.{suffix}"
        if key not in file.tensors:
            file.tensors[key] = tensor if is_same or suffix == "alpha" else tensor + 1
            file.doubtful |= {name} if is_same else set()
            file.forbidden |= set() if is_same else {name}


def bias(file: Fuzzed, chance: random.Random) -> None:
    """A change of the layer's bias beside its factors."""
    name = chance.choice([*file.wanted])
    module = file.wanted[name]
    if {"lora_up.weight", "lokr_w1", "hada_w1_a"} & module.keys() and "diff_b" not in module:
        change = torch.linspace(-1, 1, weight_shape(name)[0]).half()
        key = f"{file.names.layer(name)}.{chance.choice(('diff_b', 'bias.diff'))}"
        file.tensors[key] = change
        file.keys[name].append(key)
        file.wanted[name] = module | {"diff_b": change}


STRANGE = (
    "strange", "lora_E", "lora_C.weight", "foo.bar", "hada_w3_a", "lokr_w9", "a\x1b[31m", "gate",
    "lora_up.weight.more", "scale", "lora_up.weightt", "oft_x", "mora_A.weight", "λ", "", "0",
)  # fmt: skip


def odd_suffix(file: Fuzzed, chance: random.Random) -> None:
    """A tensor of a module that is not of its algorithm."""
    name = chance.choice([*file.wanted])
    file.tensors[f"{file.names.layer(name)}.{chance.choice(STRANGE)}"] = torch.ones(2)
    file.forbidden.add(name)


def unknown_module(file: Fuzzed, chance: random.Random) -> None:
    """Unknown tensors alone at a layer."""
    name = "lora_unet_output_blocks_3_1_proj_in"
    for suffix in chance.sample(STRANGE, chance.randrange(1, 4)):
        file.tensors[f"{file.names.layer(name)}.{suffix}"] = torch.ones(chance.randrange(1, 9))
    file.forbidden.add(name)


def wrong_shape(file: Fuzzed, chance: random.Random) -> None:
    """A tensor of a shape that does not fit, or happens to."""
    key = chance.choice([key for key in file.tensors if not key.endswith("alpha")] or [""])
    if not key:
        return
    tensor = file.tensors[key]
    others = [
        tensor.reshape(-1), tensor[None], tensor[..., None], torch.cat([tensor.reshape(-1)] * 2),
        torch.zeros(0), torch.ones(1), torch.tensor(1.0), torch.ones(0, 640), torch.ones(7, 5),
        tensor.T.contiguous() if tensor.dim() == 2 else tensor,
    ]  # fmt: skip
    file.tensors[key] = chance.choice(others)
    file.doubtful |= {name for name, keys in file.keys.items() if key in keys}


def odd_dtype(file: Fuzzed, chance: random.Random) -> None:
    """A tensor of a type that is rare, or cannot be multiplied."""
    name = chance.choice([*file.wanted])
    at = chance.randrange(len(file.keys[name]))
    key, dtype = file.keys[name][at], chance.choice([*DTYPES])
    sharing = [n for n, keys in file.keys.items() if key in keys]
    file.tensors[key] = file.tensors[key].to(dtype)
    if len(sharing) > 1:
        file.doubtful |= {*sharing}
        return
    suffix = [*file.wanted[name]][at]
    file.wanted[name] = file.wanted[name] | {suffix: file.wanted[name][suffix].to(dtype)}


def settings(file: Fuzzed, chance: random.Random) -> None:
    """PEFT's settings in the metadata, as diffusers writes them, with an alpha of their own."""
    ranks = {rank_of(module) for module in file.wanted.values()}
    is_plain_lora = all({"lora_up.weight"} <= module.keys() for module in file.wanted.values())
    has_alpha = any("alpha" in module for module in file.wanted.values())
    if not file.names.is_peft or len(ranks) != 1 or has_alpha or not is_plain_lora:
        return
    alpha, root = chance.choice((1, 2.5, 16)), chance.random() < 0.3
    values = {"r": ranks.pop(), "lora_alpha": alpha, "use_rslora": root, "peft_type": "LORA"}
    prefixes = {network: file.names.prefixes[network] for network in NETWORKS}
    start = {"unet": "unet.", "te1": "text_encoder.", "te2": "text_encoder_2."}
    is_bare = not any(prefixes.values()) and all("_unet_" in name for name in file.wanted)
    entries: dict[str, object] = {}
    for network in NETWORKS:
        entries |= {("" if is_bare else start[network]) + k: v for k, v in values.items()}
    file.metadata["lora_adapter_metadata"] = json.dumps(entries)
    for name, module in file.wanted.items():
        scale = math.sqrt(rank_of(module) or 1) if root else 1
        file.wanted[name] = module | {"alpha": torch.tensor(float(alpha * scale))}


DEEP = "[" * 30_000 + "]" * 30_000
HOSTILE = [
    {"ss_tag_frequency": '{"a": {"b": ' + "9" * 4300 + ', "c": ' + "9" * 4300 + "}}"},
    {"ss_tag_frequency": '{"a": {"b": NaN, "c": -Infinity, "\\ud800": 1e999, "d": true}}'},
    {"ss_tag_frequency": DEEP}, {"ss_tag_frequency": '{"a":' * 5000 + "1" + "}" * 5000},
    {"ss_tag_frequency": "[1]"}, {"ss_tag_frequency": "\ud800"}, {"\ud800": "\udfff"},
    {"ss_training_comment": "\x1b[31m\n" * 100, "ss_steps": "\0", "": ""},
    {"ss_training_comment": "x" * 3_000_000},
    {"ss_network_dim": "nan", "ss_network_alpha": "1e999"},
    {"ss_base_model_version": "sd_v1"}, {"modelspec.architecture": "flux-1-dev/lora"},
    {"ss_base_model_version": "x" * 2_000_000}, {f"ss_{n}": "y" for n in range(20_000)},
]  # fmt: skip
ADAPTER_METADATA = [
    "", "null", "1", '"x"', "[]", "[[]]", "{", DEEP, '{"unet": 1}', '{"unet.r": "x"}', "NaN",
    '{"lora_alpha": 1e999, "r": 0}', '{"unet.lora_alpha": "16"}', '{"unet.lora_alpha": null}',
    '{"unet.lora_alpha": [1]}', '{"unet.lora_alpha": NaN}',
    '{"unet.lora_alpha": ' + "9" * 400 + "}",
    '{"unet.alpha_pattern": [1], "unet.lora_alpha": 1}', '{"unet.peft_type": {"a": 1}}',
    '{"unet.lora_alpha": 2, "unet.r": 0}', '{"r": 2, "lora_alpha": {"a": 1}}',
    '{"": 1, "unet.": 2}',
    '{"unet.init_lora_weights": ["pissa"]}', '{"r": 2, "lora_alpha": 8, "use_rslora": "no"}',
    '{"lora_alpha": -0.0}', '{"unet.rank_pattern": 7, "unet.lora_alpha": 1, "unet.r": true}',
]  # fmt: skip
PATTERNS = (
    "(.*)*x!", "(a+)+$", "(.*_)*(.*_)*(.*_)*to_z", "(", "[", "*", "\\", "(?R)", "^", "$", "", ".*",
    "a{99999}", "(?P<a>.)(?P=a)", "(.|..)*$", "((((((((((.*)*)*)*)*)*)*)*)*)*)*!", "x" * 100_000,
    "|" * 50_000, "(" * 5000 + ")" * 5000, ".*" * 2000 + "!", "\ud800",
)  # fmt: skip


def hostile_metadata(file: Fuzzed, chance: random.Random) -> None:
    """What no program writes; an alpha in it may or may not count."""
    kind = chance.randrange(3)
    if kind == 0:
        file.metadata |= chance.choice(HOSTILE)
        return
    file.doubtful |= file.wanted.keys()
    if kind == 1:
        file.metadata["lora_adapter_metadata"] = chance.choice(ADAPTER_METADATA)
        return
    start = chance.choice(("", "unet.", "text_encoder."))
    patterns = {chance.choice(PATTERNS): chance.choice((1, "x", None, 2.5)) for _ in range(3)}
    entries = {f"{start}{kind}_pattern": patterns for kind in ("alpha", "rank")}
    entries |= {f"{start}r": 2, f"{start}lora_alpha": 4}
    file.metadata["lora_adapter_metadata"] = json.dumps(entries)


LONG = [
    # keys of a megabyte, or some 100,000 of something
    "x" * 1_000_000, "." * 80_000, "_" * 80_000, "a." * 100_000, "unet." * 60_000,
    "_orig_mod." * 50_000, "module_" * 50_000, "lora_unet_" * 50_000, ".lora_up.weight" * 20_000,
    "base_model.model." * 30_000 + "lora_A.weight", "lora_A." * 50_000 + "weight",
    "unet." + "up_blocks.0.attentions.0." * 20_000 + "to_q.lora_A.weight", "0" * 900_000 + ".alpha",
    "lora_unet_input_blocks_4_1_" + "proj_in." * 50_000, "\x1b" * 100_000, "é" * 100_000,
    "unet.conv_in.lora_A." + "a-" * 50_000 + ".weight", "text_encoder." * 30_000 + "alpha",
]  # fmt: skip

MANY = (
    "a.b.c{}.weight", "unet.{}.lora_A.weight", "lora_unet_{}_x.alpha",
    "unet.conv_in.lora_A.x{}.weight",
    "_orig_mod.module.unet.x{}.lora_B.weight",
    "lora_te2_text_model_encoder_layers_{}_mlp_fc1.alpha",
)  # fmt: skip


def hostile_key(file: Fuzzed, chance: random.Random) -> None:
    """A key without an end, or thousands of foreign ones."""
    if chance.random() < 0.05:
        word, one = chance.choice(MANY), torch.ones(1)
        file.tensors |= {word.format(n): one for n in range(20_000)}
    else:
        file.tensors[chance.choice(LONG)] = torch.ones(1)


SHORT = (
    "", ".", "_", "..", "unet", "unet.", "lora_unet_", "alpha", ".alpha", "weight", "\0", "\ud800",
    "lora_unet_.alpha", "unet..lora_A.weight", "__metadata", "lora_A.weight", "x.lora_B.weight",
    "lora_te_x.alpha", "unet.conv_in.bias", "text_encoder.x.lora_A.weight", "\x1b[31m",
)  # fmt: skip


def odd_key(file: Fuzzed, chance: random.Random) -> None:
    """A short key of nothing in SDXL."""
    file.tensors[chance.choice(SHORT)] = torch.ones(2)


def damaged(file: Fuzzed, chance: random.Random) -> None:
    """Bytes of the header that are others, missing or new."""
    seed = chance.randrange(1 << 30)

    def damage(data: bytes) -> bytes:
        faults = random.Random(seed)
        header, tensors = data[8 : len(data) - len(header_of(data)[1])], header_of(data)[1]
        for _ in range(faults.randrange(1, 4)):
            at = faults.randrange(len(header) or 1)
            middle = faults.choice(
                (b"", faults.randbytes(1), faults.choice(b'"{}[],:09.').to_bytes())
            )
            header = header[:at] + middle + header[at + faults.randrange(2) :]
        length = len(header) + faults.choice((0, 0, 0, 0, 1, -1))
        tensors = tensors[: len(tensors) - faults.choice((0, 0, 0, 1))]
        return struct.pack("<Q", max(0, length)) + header + tensors

    file.damage = damage
    file.doubtful |= layers_by_module().keys()


TWISTS = (
    fused, twice, bias, odd_suffix, unknown_module, wrong_shape, odd_dtype, settings,
    hostile_metadata, hostile_key, odd_key, damaged,
)  # fmt: skip


def fuzzed_file(seed: int) -> Fuzzed:
    """The file of this number, which is always the same."""
    chance = random.Random(seed)
    file = sound_file(chance)
    for twist in chance.sample(TWISTS, chance.choice((0, 1, 1, 1, 2))):
        twist(file, chance)
        file.twists.append(twist.__name__)
    return file
