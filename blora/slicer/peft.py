"""PEFT's settings, from a config file or metadata: the alpha of each module, what cannot be cut."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from blora.slicer.modules import Module, with_alpha
from blora.tensorfile import as_fp32
from blora.text import BloraError, shortened

# ---- Patterns ------------------------------------------------------------------------------------

# What patterns are made of: letters, dots, sets of letters, and at most three repeated sets.
SET = r"(\\[dw]|\[\^?[\w.-]+\])"
PIECE = rf"([\w.-]|\\[.-]|{SET})*({SET}[+*]([\w.-]|\\[.-]|{SET})*){{0,3}}"
NAME = r"\^?([\w.-]|\\[.-])*\$?"
GROUP = r"\(([^()]*)\)"
MOST = 100  # patterns that are no names, each of which is tried on each layer


@dataclass(frozen=True)
class Wild:
    """A pattern with sets of letters, or with ".*" between its pieces."""

    is_anchored: bool
    pieces: list[re.Pattern[str]]

    def matches(self, name: str) -> bool:
        """Whether it matches the end of a name, from its start or after a dot.

        Each piece is taken where it is first, which is as good as any other place.
        """
        dots = [] if self.is_anchored else re.finditer(r"\.", name)
        starts = [0, *(dot.end() for dot in dots)]
        match = next(filter(None, (self.pieces[0].match(name, start) for start in starts)), None)
        for piece in self.pieces[1:]:
            match = match and piece.search(name, match.end())
        return bool(match)


@dataclass(frozen=True)
class Patterns:
    r"""Values by patterns of layers' names, of which the first that matches counts.

    PEFT matches with re.match(rf"(.*\.)?({pattern})$", name) (get_pattern_key in utils/other.py).
    A file's pattern may take that for ever, so those that may are not read.
    """

    exact: dict[str, tuple[int, Any]]  # by "name", or "^name" where no more may stand before it
    wild: list[tuple[Wild, tuple[int, Any]]]

    def value(self, layer: str, default: Any) -> Any:
        """The value of a layer, by its name with dots."""
        names = layer.split(".")
        ends = [".".join(names[n:]) for n in range(len(names))]
        values = [self.exact[end] for end in (f"^{layer}", *ends) if end in self.exact]
        values += [value for pattern, value in self.wild if pattern.matches(layer)]
        return min(values, key=lambda value: value[0], default=(0, default))[1]


def without_groups(pattern: str) -> list[str]:
    """The alternatives of a pattern: "a(b|c)|d" is ab, ac and d; ValueError for too many."""
    waiting, alternatives = [pattern], []
    while waiting:
        text = waiting.pop()
        group = re.search(GROUP, text)
        if not group:
            alternatives += text.split("|")
            continue
        waiting += [text[: group.start()] + of + text[group.end() :] for of in group[1].split("|")]
        if len(waiting) + len(alternatives) > MOST:
            raise ValueError
    return alternatives


def read_wild(text: str) -> Wild:
    """A pattern without groups; ValueError where it is not read."""
    pieces = text.removeprefix("^").removesuffix("$").replace(".+", "..*").split(".*")
    if not all(re.fullmatch(PIECE, piece) for piece in pieces):
        raise ValueError
    pieces[-1] += "$"  # and a repeated set takes as few letters as it can
    lazy = [re.sub(r"(?<=[\]dw])([+*])", r"\1?", piece) for piece in pieces]
    return Wild(text.startswith("^"), [re.compile(piece) for piece in lazy])


def read_patterns(entries: object, where: str) -> Patterns:
    """PEFT's rank_pattern or alpha_pattern; BloraError where one is not read."""
    patterns = Patterns({}, [])
    for order, (pattern, value) in enumerate(entries.items() if isinstance(entries, dict) else ()):
        try:
            for text in without_groups(pattern):
                if re.fullmatch(NAME, text):
                    name = text.replace("\\", "").removesuffix("$")
                    patterns.exact.setdefault(name, (order, value))
                else:
                    patterns.wild.append((read_wild(text), (order, value)))
            if len(patterns.wild) > MOST:
                raise ValueError
        except (ValueError, re.error) as error:
            raise BloraError(
                f'{where} has the pattern "{shortened(pattern)}", which is not read: '
                "write the layers' names"
            ) from error
    return patterns


# ---- Settings -----------------------------------------------------------------------------------

# Where they are: in the metadata, as diffusers writes them, or in a file beside the LoRA, as PEFT
# does. A pipeline's metadata have a prefix for each network, a single model's have none.
METADATA, PEFT_CONFIG = "lora_adapter_metadata", "adapter_config.json"
PEFT_NETWORKS = {"unet.": "unet", "text_encoder.": "te1", "text_encoder_2.": "te2"}


@dataclass(frozen=True)
class Settings:
    """PEFT's settings of one network, and where they were read."""

    where: str
    values: dict[str, Any]
    by_layer: dict[str, Patterns] = field(default_factory=dict)

    def patterns(self, name: str) -> Patterns:
        """The values by layer of rank_pattern or alpha_pattern; BloraError where not read."""
        if name not in self.by_layer:
            self.by_layer[name] = read_patterns(self.values.get(name), f"{name} in {self.where}")
        return self.by_layer[name]

    @property
    def has_alpha(self) -> bool:
        """Whether an alpha is among them."""
        return not {"alpha", "lora_alpha"}.isdisjoint(self.values)


def network_settings(entries: dict[str, Any]) -> dict[str, Settings]:
    """The metadata's settings by network: those without a prefix are for each."""
    common = {k: v for k, v in entries.items() if not k.startswith((*PEFT_NETWORKS,))}
    settings = {}
    for prefix, network in PEFT_NETWORKS.items():
        own = {k.removeprefix(prefix): v for k, v in entries.items() if k.startswith(prefix)}
        settings[network] = Settings(METADATA, common | own)
    return settings


def peft_settings(metadata: dict[str, str], path: Path, is_peft: bool) -> dict[str, Settings]:
    """By network: from the metadata, or, for PEFT's names, from the file beside the LoRA.

    BloraError where they cannot be read.
    """
    where = f"{METADATA} of {path}"
    try:
        settings = network_settings(dict(json.loads(metadata.get(METADATA, "{}")).items()))
        config = path.with_name(PEFT_CONFIG)
        if is_peft and config.is_file():
            where = str(config)
            beside = Settings(PEFT_CONFIG, dict(json.loads(config.read_text("utf-8")).items()))
            settings = {name: s if s.has_alpha else beside for name, s in settings.items()}
        return settings
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise BloraError(
            f"cannot read {where} ({shortened(str(error))}): save the LoRA again with its program"
        ) from error


# ---- Alpha ---------------------------------------------------------------------------------------


def peft_number(settings: Settings, layer: str, patterns: str, *names: str) -> float:
    """A setting of a layer: by a pattern, or the one for all.

    TypeError or ValueError where it is not a number.
    """
    default = next((settings.values[name] for name in names if name in settings.values), None)
    return float(settings.patterns(patterns).value(layer, default))


def with_peft_alpha(module: Module, layer: str, settings: Settings) -> Module:
    """The module with the alpha that PEFT's settings give it, where its tensors have none.

    PEFT multiplies a LoKr of two whole factors by alpha / r too, which no other program does
    (tuners/lokr/layer.py): that becomes the module's `factor`.
    """
    if not settings.has_alpha or not module.algorithm.rank or module.alpha is not None:
        return module
    try:
        alpha = peft_number(settings, layer, "alpha_pattern", "alpha", "lora_alpha")
        if settings.where == PEFT_CONFIG or module.rank is None:
            rank = peft_number(settings, layer, "rank_pattern", "r")
            if module.rank is None:
                return replace(module, factor=alpha / rank)
            if rank != module.rank:  # the settings of a different LoRA in the same folder
                return module
        root = math.sqrt(module.rank) if settings.values.get("use_rslora") else 1
        alpha = as_fp32(alpha * root)
    except (TypeError, ValueError, OverflowError, ZeroDivisionError):
        alpha = math.nan
    if not math.isfinite(alpha):
        raise BloraError(f"{settings.where} gives {module.name} an alpha that is not a number")
    return with_alpha(module, alpha)


# Initializations that move a part of the base model into the factors (tuners/lora/layer.py), so
# that these are not a change of that model.
TAKEN_FROM_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# PEFT's algorithms that other programs have too, and the settings that make its LoRA another one.
COMMON_TYPES = ("LORA", "LOHA", "LOKR", "OFT")
VARIANTS = {
    "kasa_config": "KaSA", "use_bdlora": "BD-LoRA", "arrow_config": "Arrow",
    "alora_invocation_tokens": "aLoRA",
}  # fmt: skip


def check_settings(settings: Settings, path: Path) -> None:
    """Refuse what only PEFT can load, and factors that hold a part of the base model."""
    kind = str(settings.values.get("peft_type") or "LORA").upper()
    kind = next((of for name, of in VARIANTS.items() if settings.values.get(name)), kind)
    if kind not in COMMON_TYPES:
        raise BloraError(
            f"{path} is PEFT's {shortened(kind)}, which kohya's names cannot express: use it "
            "with PEFT"
        )
    start = str(settings.values.get("init_lora_weights", ""))
    if start.lower().startswith(TAKEN_FROM_BASE):
        raise BloraError(
            f"{path} was trained with init_lora_weights={shortened(start)}, so its factors hold a "
            "part of the base model: save it with PEFT's path_initial_model_for_weight_conversion"
        )
