"""What --inspect shows of a LoRA: its blocks, the size of their changes, its training, problems."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np

from blora.sdxl import Trait, block_of
from blora.slicer.keys import ALPHA, LORA_DOWN, LORA_MID, LORA_UP, UP_BIAS
from blora.slicer.lbw import lbw_list
from blora.slicer.modules import SKIPPED, Lora, Module
from blora.slicer.strength import through_core, values
from blora.tensorfile import FLOAT8, FLOATS, json_object
from blora.text import file_size, listed, printable, progress_bar, span

BAR = 20  # characters for the whole change
COLUMNS = ("block", "trait", "modules", "algorithm", "rank", "alpha", "dtype", "size", "change")
TRIGGER_WORDS = 10
ROWS_AT_A_TIME = 64
Values = dict[str, np.ndarray]  # of a module's tensors, by suffix


def gram_norm(left: np.ndarray, right: np.ndarray) -> float:
    """The Frobenius norm of left [out, rank] @ right [rank, ...], from products [rank, rank]."""
    left, right = left.reshape(left.shape[0], -1), right.reshape(right.shape[0], -1)
    square = np.sum((left.T @ left) * (right @ right.T), dtype="f8")
    return math.sqrt(max(0.0, float(square)))


def lora_norm(t: Values) -> float:
    """Of up [out, rank] @ down [rank, in, ...].

    With a tucker core mid [rank, rank, ...] between them, down is [rank, in].
    """
    down = t[LORA_DOWN]
    if LORA_MID in t:
        down = through_core(t[LORA_MID], down)
    return gram_norm(t[LORA_UP], down)


def factors(t: Values, name: str, core: str) -> tuple[np.ndarray, np.ndarray]:
    """The factors a and b of a product, as matrices [out, rank] and [rank, in ...].

    Where they have a tucker core [rank, rank, ...], a is stored as [rank, out], b as [rank, in].
    """
    a, b = t[f"{name}_a"], t[f"{name}_b"]
    if core in t:
        a, b = a.T, through_core(t[core], b)
    return a, b.reshape(b.shape[0], -1)


def loha_norm(t: Values) -> float:
    """Of (w1_a @ w1_b) * (w2_a @ w2_b), some rows at a time."""
    square = 0.0
    a1, b1 = factors(t, "hada_w1", "hada_t1")
    a2, b2 = factors(t, "hada_w2", "hada_t2")
    for start in range(0, a1.shape[0], ROWS_AT_A_TIME):
        rows = slice(start, start + ROWS_AT_A_TIME)
        square += float(np.sum(np.square((a1[rows] @ b1) * (a2[rows] @ b2)), dtype="f8"))
    return math.sqrt(square)


def lokr_norm(t: Values) -> float:
    """Of kron(w1, w2), the product of their norms; each is whole or a product."""
    norms = []
    for i in (1, 2):
        if f"lokr_w{i}" in t:
            norms.append(float(np.linalg.norm(t[f"lokr_w{i}"].astype("f8"))))
        else:
            norms.append(gram_norm(*factors(t, f"lokr_w{i}", f"lokr_t{i}")))
    return norms[0] * norms[1]


def stored_norm(t: Values, suffixes: Iterable[str]) -> float:
    """Of changes that are stored as they are, of any shape."""
    parts = (t[suffix] for suffix in suffixes if suffix in t)
    return math.sqrt(sum(float(np.sum(np.square(part), dtype="f8")) for part in parts))


# The others change a weight in proportion to itself, so their size is not in the file.
NORMS: dict[str, Callable[[Values], float]] = {
    "LoRA": lora_norm, "LoHa": loha_norm, "LoKr": lokr_norm,
    **dict.fromkeys(("full", "norm", "bias"), partial(stored_norm, suffixes=("diff", "w_norm"))),
}  # fmt: skip


def measure(module: Module) -> tuple[float | None, list[str]]:
    """The Frobenius norm of a module's change, bias included, and its keys that hold NaN or inf.

    The change of a DoRA is that of its factors: what its scale adds depends on the base model.
    None where the size is not known: a factor is missing, unknown, without values, or misfits.
    """
    if module.unknown:
        return None, []
    read = {
        suffix: tensor
        for suffix, tensor in module.tensors.items()
        if suffix != ALPHA or module.alpha_is_read
    }
    known = {s: values(t) for s, t in read.items() if t.dtype in FLOATS or t.dtype in FLOAT8}
    broken = [f"{module.name}.{s}" for s, v in known.items() if not np.isfinite(v).all()]
    is_whole = module.fits and not module.is_incomplete
    change_norm = NORMS.get(module.algorithm.name)
    if broken or not is_whole or read.keys() - known.keys() - {ALPHA} or not change_norm:
        return None, broken
    try:
        with np.errstate(all="ignore"):
            bias = stored_norm(known, [UP_BIAS]) * module.scale
            added = stored_norm(known, ("diff_b", "b_norm"))
            norm = math.hypot(change_norm(known) * module.scale, bias, added)
    except ValueError:  # a factor has no numbers
        return None, []
    return (norm if math.isfinite(norm) else None), []


def table_row(
    block: str, trait: str, modules: list[Module], norms: dict[str, float | None], total: float
) -> dict[str, Any]:
    """One line of the table: the modules of a block that the same traits keep.

    `change` is the Frobenius norm of the weight change, `share` its part of the file's squared one.
    """
    tensors = [tensor for module in modules for tensor in module.tensors.values()]
    changes = [norms[module.name] for module in modules]
    change = math.hypot(*(c for c in changes if c is not None))
    is_known = None not in changes and math.isfinite(change)
    dtypes = [tensor.dtype for tensor in tensors if tensor.shape] or [t.dtype for t in tensors]
    return {
        "block": block,
        "trait": trait,
        "modules": len(modules),
        "algorithm": ", ".join(dict.fromkeys(module.label for module in modules)),
        "ranks": sorted({rank for module in modules if (rank := module.rank) is not None}),
        "alphas": sorted({a for m in modules if (a := m.alpha) is not None and math.isfinite(a)}),
        "dtype": ", ".join(dict.fromkeys(dtypes)),
        "bytes": sum(tensor.size for tensor in tensors),
        "change": change if is_known else None,
        "share": (change / total) ** 2 if is_known and total else None,
    }


def is_count(value: object) -> bool:
    """Whether it is a number of pictures; one of thousands of digits cannot be printed."""
    return type(value) is int and abs(value) < 1 << 63


def training_facts(metadata: dict[str, str]) -> dict[str, Any]:
    """What the metadata tell about the training."""
    words: Counter[str] = Counter()
    for counts in json_object(metadata.get("ss_tag_frequency")).values():
        if isinstance(counts, dict):
            words.update({str(w): n for w, n in counts.items() if is_count(n)})
    facts = {
        "base": metadata.get("ss_base_model_version"),
        "checkpoint": metadata.get("ss_sd_model_name"),
        "steps": metadata.get("ss_steps"),
        "images": metadata.get("ss_num_train_images"),
        "comment": metadata.get("ss_training_comment"),
        "trigger_words": dict(words.most_common(TRIGGER_WORDS)),
    }
    return {key: value for key, value in facts.items() if value and value != "None"}


def lbw_lists(lora: Lora, known: dict[str, Trait]) -> dict[str, dict[str, str]]:
    """For each trait that keeps something, LBW's list for its slice, and why there is none."""
    kept = {
        trait.name: dict.fromkeys(filter(trait.keeps, lora.modules), 1.0)
        for trait in known.values()
    }
    found = {name: lbw_list(lora, strengths) for name, strengths in kept.items() if strengths}
    return {name: {"list": weights, "reason": reason} for name, (weights, reason) in found.items()}


def inspect_lora(lora: Lora, known: dict[str, Trait]) -> dict[str, Any]:
    """All that --inspect shows of a file."""
    groups: dict[tuple[str, str], list[Module]] = {}
    norms, broken = {}, []
    with progress_bar(len(lora.modules), desc=printable(lora.path.name)) as advance:
        for name, module in lora.modules.items():
            traits = [trait.name for trait in known.values() if trait.keeps(name)]
            groups.setdefault((block_of(name), ", ".join(traits) or "-"), []).append(module)
            norms[name], not_finite = measure(module)
            broken += not_finite
            advance(1)
    total = math.hypot(*(norm for norm in norms.values() if norm))
    rows = [table_row(*key, modules, norms, total) for key, modules in groups.items()]
    return {
        "file": str(lora.path),
        "bytes": lora.path.stat().st_size,
        "modules": len(lora.modules),
        "naming": "; ".join(lora.namings),
        "blocks": rows,
        "lbw": lbw_lists(lora, known),
        "training": training_facts(lora.metadata),
        "not_finite": broken,
        "incomplete": [name for name, module in lora.modules.items() if module.is_incomplete],
        "misfits": [name for name, m in lora.modules.items() if not (m.fits or m.is_incomplete)],
        "unknown": [key for module in lora.modules.values() for key in module.unknown],
        "doubled": list(lora.copies),
        "fused": list(dict.fromkeys(m.fused for m in lora.modules.values() if m.fused)),
        "guessed": [name for name, module in lora.modules.items() if module.is_guess],
        **lora.skipped,
        "remarks": lora.remarks,
    }


def table(rows: list[list[str]]) -> list[str]:
    """Rows as aligned lines; numbers, from the third column on, to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column < 2 or column == len(widths) - 1 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


# What a slice leaves out or refuses, by the key of the facts.
PROBLEMS = {
    "not_finite": "tensors with NaN or inf",
    "incomplete": "incomplete modules",
    "misfits": "modules that do not fit SDXL's layers",
    "unknown": "unknown tensors",
    "doubled": "duplicate modules",
    "fused": "fused projections, which a cut splits",
    "guessed": "no alpha is stored, alpha = rank is assumed in modules",
    **SKIPPED,
}


def report(facts: dict[str, Any]) -> list[str]:
    """The facts of one file as lines of text, escaped."""
    rows = [[*COLUMNS, "share", ""]]
    for row in facts["blocks"]:
        names = [printable(str(row[key])) for key in ("block", "trait", "modules", "algorithm")]
        numbers = [span(row["ranks"]), span(row["alphas"]), row["dtype"], file_size(row["bytes"])]
        change = "-" if row["change"] is None else f"{row['change']:.4g}"
        share = "-" if row["share"] is None else f"{row['share']:.1%}"
        rows.append([*names, *numbers, change, share, "#" * round(BAR * (row["share"] or 0))])
    training = dict(facts["training"])
    words = training.pop("trigger_words", {})
    lines = [
        f"{facts['file']}: {facts['modules']} modules, {file_size(facts['bytes'])}",
        *table(rows),
        f"naming: {facts['naming']}",
    ]
    for trait, lbw in facts["lbw"].items():
        lines.append(f"LBW for {trait}: {lbw['list'] or 'none, because ' + lbw['reason']}")
    lines += [f"{key}: {value}" for key, value in training.items()]
    if words:
        lines.append("trigger words: " + ", ".join(f"{word} ({n})" for word, n in words.items()))
    lines += facts["remarks"]
    lines += [f"{problem} {listed(facts[key])}" for key, problem in PROBLEMS.items() if facts[key]]
    return [printable(line) for line in lines]
