"""Modules that are odd or of extreme numbers: what cuts, joins and looks make of them.

Each row of the table says which tensors a strength multiplies, or why it is refused. What the
numbers become is computed here, with torch.
"""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from broken_files import survey
from lora_files import CONTENT, STYLE, change, lora_module, write
from lora_files import SHAPES as LAYERS
from safetensors import safe_open
from safetensors.torch import load_file, save
from slicing import Slicer, cut, stored
from torch import Tensor

from blora.slicer.keys import SUFFIXES

NAME, OTHER = CONTENT.format(0, 1, "q"), STYLE.format(0, 1, "q")
UP, DOWN = "lora_up.weight", "lora_down.weight"
F8, F8B, HALF, BF = torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16
F32, F64 = torch.float32, torch.float64
WHOLE_NUMBERS = [getattr(torch, f"{u}int{bits}") for bits in (8, 16, 32, 64) for u in ("", "u")]
FLOATS = {HALF: "F16", BF: "BF16", F32: "F32", F64: "F64"}
PRECISIONS = {"float": F32, "fp16": HALF, "bf16": BF}


USE_1 = "cut it at 1.0 and set the strength where the LoRA is used"


def no_strength(because: str, advice: str = "") -> str:
    return f"cannot rescale {NAME} in {{lora}}, because {because}: {advice}{USE_1}"


def stored_as(dtype: str) -> str:
    precision = "add --save_precision, or " if dtype.startswith("F8") else ""
    return f"{NAME} is stored as {dtype}, which can be copied but not changed: {precision}{USE_1}"


def cannot_hold(suffix: str, dtype: str) -> str:
    return f"{NAME}.{suffix} overflows {dtype}: lower --alphas, or use --save_precision float"


def unknown(*suffixes: str, more: str = "") -> str:
    return (
        f'the kind of every "content" module in {{lora}} is unknown '
        f"({', '.join(f'{NAME}.{s}' for s in suffixes)}{more}): use the LoRA whole, in the program "
        "that trained it"
    )


TOO_LARGE = cannot_hold(UP, "F16")
OFT = no_strength("it is OFT and a rotation cannot be multiplied")
ITS_WEIGHTS = "it is DoRA and it needs the weights it was trained on"
DORA = no_strength(ITS_WEIGHTS, "give the checkpoint as --base_model, or ")
OTHER_PARTS = (
    f"{{lora}} holds unknown tensors beside those of LoRA ({NAME}.hada_w1_a, {NAME}.lambda_layer, "
    f"{NAME}.lokr_w1), so what a slice would do is not known: exclude the module with a trait's "
    "blacklist"
)
NO_FP32 = (
    f"the alpha of {NAME} is not a finite fp32 number: write separate files with --not_combined"
)
NO_FACTOR = (
    f"{OTHER} would be multiplied by 1.42725e+45, which overflows fp32: correct --alphas, or the "
    "LoRA's alpha"
)


@dataclass(frozen=True)
class Case:
    """A module, and what is made of it."""

    tensors: dict[str, Tensor]
    scaled: set[str] | str  # what a strength multiplies, or the sentence that refuses it
    change: float | None = None  # its size, as --inspect shows it
    joined: set[str] | str = frozenset()  # what a join with an alpha of 2 alters, or the refusal
    not_finite: tuple[str, ...] = ()
    converted: bool = False  # whether a strength goes in once --save_precision makes it a float

    def copied(self) -> dict[str, Tensor]:
        """What a cut at 1.0 makes of it: an alpha is added where a LoRA has none."""
        alpha = self.tensors.get("alpha")
        has_rank = UP in self.tensors and self.tensors[UP].shape[1]
        if not has_rank or (alpha is not None and alpha.numel()):
            return self.tensors
        return self.tensors | {"alpha": torch.tensor(2.0)}


def numbers(*shape: int, value: float = 0.5, dtype: torch.dtype = HALF) -> Tensor:
    return torch.full(shape, value).to(dtype)


PLAIN = {UP: numbers(1280, 2), DOWN: numbers(2, 1280)}  # on a layer of 1280 x 1280


def lora(
    tensors: dict[str, Tensor],
    change: float | None = 640.0,
    joined: set[str] | str = frozenset({"alpha"}),
    not_finite: tuple[str, ...] = (),
) -> Case:
    """A LoRA of rank 2, which becomes its alpha where it has none."""
    return Case(PLAIN | tensors, {UP}, change, joined, not_finite)


def with_alpha(alpha: Tensor, change: float | None, joined: set[str] | str = frozenset()) -> Case:
    whole = alpha.is_complex() or bool(torch.isfinite(alpha.double()).all())
    return lora({"alpha": alpha}, change, joined, () if whole else ("alpha",))


def large(value: float, dtype: torch.dtype, change: float | None = None) -> Case:
    """A LoRA of numbers as large, or as small, as the type has them."""
    ones = numbers(1280, 2, value=1, dtype=dtype)
    return lora({UP: ones * value, DOWN: ones.T * value, "alpha": ones[0, 0]}, change, frozenset())


def odd(dtype: torch.dtype) -> Case:
    """NaN, inf, and the ends of fp16."""
    up = torch.ones(1280, 2)
    up[:3] = torch.tensor([[math.nan, math.inf], [-math.inf, 65504.0], [6e-8, -0.0]])
    return lora({UP: up.to(dtype)}, None, not_finite=(UP,))


def of_type(dtype: torch.dtype, name: str, tensors: dict[str, Tensor] = PLAIN) -> Case:
    """A LoRA whose factors, or some of them, are of a type that is copied and never changed."""
    factors = PLAIN | {key: value.to(dtype) for key, value in tensors.items()}
    is_float = dtype in (F8, F8B)
    return Case(factors, stored_as(name), 640 if is_float else None, {"alpha"}, converted=is_float)


EVERY_TYPE = (F64, BF, HALF, F8, F8B, torch.int8, torch.uint8, torch.int16, torch.int64)
RANK_0 = {UP: numbers(1280, 0), DOWN: numbers(0, 1280)}
NAN = numbers(value=math.nan)
PARTS = {"hada_w1_a": numbers(1280, 2), "lokr_w1": numbers(1, 1), "lambda_layer": numbers(2)}
LOKR_0 = {"lokr_w1": numbers(2, 2), "lokr_w2_a": numbers(640, 0), "lokr_w2_b": numbers(0, 640)}
CASES: dict[str, Case] = {
    "rank 0": Case(RANK_0, {UP}),
    "rank 0 with alpha": Case(RANK_0 | {"alpha": numbers()}, {UP}),
    "alpha of one element": with_alpha(numbers(1), 160),
    "alpha of 1 x 1": with_alpha(numbers(1, 1), 160),
    "alpha of two elements": with_alpha(numbers(2), 160),
    "alpha of no elements": with_alpha(numbers(0), 640, {"alpha"}),
    "alpha 0": with_alpha(numbers(value=0), 640),
    "alpha -0": with_alpha(numbers(value=-0.0), 640),
    "alpha -1": with_alpha(numbers(value=-1), 320),
    "alpha NaN": with_alpha(NAN, None, NO_FP32),
    "alpha inf": with_alpha(numbers(value=math.inf), None, NO_FP32),
    "alpha tiny": with_alpha(torch.tensor(1e-45), 320 * 2**-149, NO_FACTOR),
    "alpha huge": with_alpha(torch.tensor(3e38), 320 * 3e38, TOO_LARGE),
    "alpha beyond fp32": with_alpha(torch.tensor(1e300, dtype=F64), 320 * 1e300, NO_FP32),
    **{f"alpha as {t}": with_alpha(numbers(dtype=t), 160) for t in (BF, F64, F8, F8B)},
    **{f"alpha as {t}": with_alpha(torch.tensor(2, dtype=t), 640) for t in WHOLE_NUMBERS},
    "alpha as the largest int64": with_alpha(torch.tensor(2**63 - 1), 320 * 2**63, TOO_LARGE),
    "alpha as bool": with_alpha(torch.tensor(True), 320),
    "alpha as complex": with_alpha(torch.tensor(1 + 2j), None, NO_FP32),
    **{
        name: of_type(dtype, name)
        for name, dtype in {
            "F8_E4M3": F8, "F8_E5M2": F8B, "I8": torch.int8, "I64": torch.int64,
            "BOOL": torch.bool, "C64": torch.complex64,
        }.items()
    },
    "F8_E4M3 up alone": of_type(F8, "F8_E4M3", {UP: PLAIN[UP]}),
    **{f"NaN and inf in {dtype}": odd(dtype) for dtype in FLOATS},
    "a signalling NaN": lora(
        {UP: torch.full((1280, 2), 0x7C01, dtype=torch.int16).view(HALF)}, None, not_finite=(UP,)
    ),
    "the largest fp16": large(65504.0, HALF, 65504.0**2 * 1280),
    "the largest bf16": large(3.38e38, BF),
    "the largest fp32": large(3.4e38, F32),
    "the largest fp64": large(1e308, F64),
    "large fp64": large(1e100, F64),
    "the smallest fp32": large(1e-45, F32, 0.0),
    "a LoKr of rank 0": Case(LOKR_0 | {"alpha": numbers()}, {"lokr_w1"}),
    "a bias alone": Case({"diff_b": numbers(1280)}, {"diff_b"}, 0.5 * 1280**0.5),
    "OFT without alpha": Case({"oft_blocks": numbers(640, 2, 2)}, OFT),
    "OFT with alpha NaN": Case(
        {"oft_blocks": numbers(640, 2, 2), "alpha": NAN}, OFT, not_finite=("alpha",)
    ),
}  # fmt: skip
# Tensors that are refused at any strength, and the sentence.
UNKNOWN: dict[str, tuple[dict[str, Tensor], str]] = {
    "a LoRA with parts of others": (PLAIN | PARTS | {"alpha": numbers(value=4)}, OTHER_PARTS),
    "unknown suffixes": (
        {f"part{index}": numbers(3, dtype=dtype) for index, dtype in enumerate(EVERY_TYPE)},
        unknown("part8", "part0", "part1", more=" and 6 more"),
    ),
    "dots in it": ({"a.b.c": numbers(2)}, unknown("a.b.c")),
    "escapes": ({"\x1b[2J\n": numbers(2)}, unknown(r"\x1b[2J\n")),
}
WAYS = [
    # strength, precision
    *((strength, None) for strength in ("0.5", "0", "-3", "1e-300", "1e38")),
    *(("1", precision) for precision in PRECISIONS),
    ("1e6", "fp16"),
]


def named(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{NAME}.{suffix}": t.contiguous().clone() for suffix, t in tensors.items()}


def assert_same_numbers(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Of the same types, and not by their bits, as there are many NaN."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture
def strange(slicer: Slicer, case: Case) -> Path:
    return write(slicer.folder / "strange.safetensors", named(case.tensors))


def expected(case: Case, strength: float, precision: str | None) -> dict[str, Tensor]:
    """Each tensor as it is, or multiplied in fp32 (fp64 where it is that) and rounded once."""
    made = {}
    for suffix, value in case.copied().items():
        made[suffix] = value
        if value.dtype in FLOATS or (precision and value.dtype in (F8, F8B)):
            wide = value.to(F64 if value.dtype is F64 else F32)
            if suffix in ({UP} if case.converted else case.scaled) and strength != 1:
                wide = wide * torch.tensor(strength, dtype=wide.dtype)
            made[suffix] = wide.to(PRECISIONS[precision] if precision else value.dtype)
    return made


def refusals(case: Case, strength: float, precision: str | None) -> set[str]:
    """The sentences that a cut may be refused with: none where it must not be."""
    is_plain = strength == 1 or (case.converted and precision)
    if isinstance(case.scaled, str) and not is_plain:
        return {case.scaled}
    return {
        cannot_hold(suffix, FLOATS[made.dtype])
        for suffix, made in expected(case, strength, precision).items()
        if made.dtype in FLOATS
        and (made.isinf() & case.copied()[suffix].double().isfinite()).any()
    }  # fmt: skip


def test_at_strength_1_a_strange_module_is_copied_to_the_byte(slicer, case, strange):
    wanted = write(slicer.folder / "wanted.safetensors", named(case.copied()))
    for way in (["--no_metadata"], []):
        assert slicer(strange, *way) == 0
        assert stored(slicer.output) == stored(wanted)
    warning = f"warning: alpha is NaN or inf in modules of {strange.name} (1): {NAME}\n"
    is_no_number = "alpha" in case.not_finite or case is CASES["alpha as complex"]
    assert (slicer.err == warning) == is_no_number
    if is_no_number and case.scaled != OFT:
        with safe_open(slicer.output, "pt") as file:
            assert "ss_network_alpha" not in file.metadata()


def test_a_strange_module_is_multiplied_where_it_says_or_refused_with_its_sentence(
    slicer, case, strange
):
    for strength, precision in WAYS:
        way = [f"--alphas={strength}", *(["--save_precision", precision] if precision else [])]
        sentences = refusals(case, float(strength), precision)
        assert slicer(strange, *way) == bool(sentences), way
        if sentences:
            assert slicer.sentence in {text.format(lora=strange) for text in sentences}
        else:
            wanted = named(expected(case, float(strength), precision))
            assert_same_numbers(load_file(slicer.output), wanted)


def test_a_strange_module_is_shown_with_the_size_of_its_change(slicer, case, strange):
    assert slicer(strange, "--inspect") == 0
    assert "\x1b" not in slicer.out
    assert slicer(strange, "--inspect", "--json") == 0
    assert not re.search("NaN|Infinity", slicer.out)  # which are not JSON
    [facts] = json.loads(slicer.out)
    [row] = facts["blocks"]
    size = None if case.change is None else pytest.approx(case.change, rel=1e-3)
    assert (facts["modules"], row["change"]) == (1, size)
    assert facts["not_finite"] == [f"{NAME}.{suffix}" for suffix in case.not_finite]


@pytest.mark.parametrize(("tensors", "sentence"), UNKNOWN.values(), ids=UNKNOWN)
def test_a_module_of_unknown_tensors_is_refused_and_left_out_beside_others(
    slicer, tensors, sentence
):
    lora = write(slicer.folder / "strange.safetensors", named(tensors))
    for strength, precision in [("1", None), *WAYS]:
        way = [f"--alphas={strength}", *(["--save_precision", precision] if precision else [])]
        assert slicer(lora, *way) == 1
        assert slicer.sentence == sentence.format(lora=lora)
    assert slicer(lora, "--inspect") == 0
    assert "unknown tensors (" in slicer.out and "\x1b" not in slicer.out
    if UP not in tensors:
        sound = lora_module(CONTENT.format(1, 1, "q"))
        write(lora, named(tensors) | sound)
        assert slicer(lora) == 0
        assert slicer.err.startswith(
            f"note: left out modules of an unknown kind in strange.safetensors ({len(tensors)}): "
        )
        assert stored(slicer.output) == stored(write(slicer.folder / "sound.safetensors", sound))


def altered(before: Path, after: Path) -> set[str]:
    """The suffixes of the module whose bytes are others, or new, in the second file."""
    old, new = stored(before), stored(after)
    keys = {key for key in new if key.startswith(NAME) and new[key] != old.get(key)}
    return {key.removeprefix(f"{NAME}.") for key in keys}


@pytest.mark.parametrize("strength", ["1", "0.5"])
def test_a_strange_module_is_joined_with_a_sound_one_or_refused(slicer, case, strange, strength):
    sound = slicer.folder / "sound.safetensors"
    write(sound, lora_module(OTHER, alpha=2.0, dtype=F32))
    outcome, scaled = case.joined, set()
    if strength != "1":
        outcome = case.scaled if isinstance(case.scaled, str) else case.joined
        scaled = {suffix for suffix in case.tensors if suffix in case.scaled}
    way = ("--traits", "content", "style", f"--alphas={strength}")
    assert slicer(strange, sound, *way) == isinstance(outcome, str)
    if isinstance(outcome, str):
        assert slicer.sentence == outcome.format(lora=strange)
        return
    assert altered(strange, slicer.output) == outcome | {
        s for s in scaled if case.tensors[s].numel()
    }
    error = change(slicer.output, OTHER) - change(sound, OTHER)
    assert error.norm() < 1e-6 * change(sound, OTHER).norm()


SHAPES = [(1280, 2), (2, 1280), (1280,), (1280, 1), (), (2,), (0, 1280), (1280, 0), (2, 2, 3, 3)]
TYPES = [HALF, BF, F32, F64, F8, torch.int64, torch.uint8, torch.bool]


def module_by_chance(chance: random.Random) -> bytes:
    """A sound file of one module with some tensors of any kinds, shapes, types and numbers."""
    tensors = {}
    for suffix in chance.sample(["strange", *SUFFIXES], chance.randrange(1, 5)):
        shape, dtype = chance.choice(SHAPES), chance.choice(TYPES)
        data = np.frombuffer(chance.randbytes(math.prod(shape) * dtype.itemsize), np.uint8)
        tensors[suffix] = torch.tensor(data).view(dtype).reshape(shape)
    return save(named(tensors))


def test_a_module_by_chance_does_no_harm(slicer):
    chance = random.Random(0)
    cases = [(index, module_by_chance(chance)) for index in range(300)]
    assert sum(survey(slicer, cases).values()) == 600


# ---- Rounding and overflow -----------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("source", FLOATS, ids=str)
def test_save_precision_rounds_as_torch_does(tmp_path, source, precision):
    tensors = lora_module(NAME, dtype=source)
    kept = load_file(cut(write(tmp_path / "a.safetensors", tensors), "--save_precision", precision))
    assert_same_numbers(kept, {key: t.to(PRECISIONS[precision]) for key, t in tensors.items()})


def below(number: float, dtype: torch.dtype = F32) -> float:
    """The largest number of the type that is less."""
    wide = torch.tensor(number, dtype=dtype)
    return float(torch.nextafter(wide, torch.tensor(0, dtype=dtype)))


# The smallest numbers that round to inf: half a last bit above the largest.
L16, LB16, L32 = 65520.0, (2 - 2**-8) * 2.0**127, (2 - 2**-24) * 2.0**127
LIMITS = [
    # a number and a strength, the next that overflow, their type, the precision
    ((below(L16), "1"), (L16, "1"), F32, "fp16"),
    ((below(LB16), "1"), (LB16, "1"), F32, "bf16"),
    ((below(L32, F64), "1"), (L32, "1"), F64, "float"),
    ((below(L16 / 2), "2"), (L16 / 2, "2"), F32, "fp16"),
    ((32752.0, "2"), (32768.0, "2"), HALF, None),
    ((65504.0, "1.000244"), (65504.0, "1.00025"), HALF, None),  # 65519.98 and 65520.4
    ((1.0, "65519.99"), (1.0, "65520"), HALF, None),
    ((1.0, "3.396177e38"), (1.0, "3.3961775e38"), BF, None),
    ((1.0, "3.4028234663852886e38"), (2.0, "3.4028234e38"), F32, None),
]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("last", "over", "dtype", "precision"), LIMITS)
def test_the_last_number_becomes_the_largest_of_the_type_and_the_next_is_refused(
    slicer, sign, last, over, dtype, precision
):
    saved = PRECISIONS.get(precision, dtype)
    lora = slicer.folder / "a.safetensors"
    for (number, strength), overflows in ((last, False), (over, True)):
        tensors = {key: value * 0 for key, value in lora_module(NAME, dtype=dtype).items()}
        tensors[f"{NAME}.{UP}"][7, 1] = sign * number
        write(lora, tensors)
        way = ["--alphas", strength, *(["--save_precision", precision] if precision else [])]
        assert slicer(lora, *way) == overflows
        if overflows:
            assert slicer.sentence == cannot_hold(UP, FLOATS[saved])
        else:
            kept = load_file(slicer.output)[f"{NAME}.{UP}"]
            assert (kept.dtype, float(kept[7, 1])) == (saved, sign * torch.finfo(saved).max)


def every_number(dtype: torch.dtype) -> Tensor:
    """All 256 numbers of an 8-bit type, NaN and inf among them."""
    return torch.arange(256, dtype=torch.uint8).view(dtype)


@pytest.mark.parametrize("dtype", [F8, F8B], ids=str)
def test_an_alpha_stored_as_fp8_is_the_number_that_torch_reads(slicer, dtype):
    alphas = dict(zip(LAYERS, every_number(dtype), strict=False))
    tensors = {f"{name}.alpha": alpha.clone() for name, alpha in alphas.items()}
    lora = write(slicer.folder / "a.safetensors", tensors)
    assert slicer(lora, "--inspect", "--json") == 0
    [facts] = json.loads(slicer.out)
    numbers = {name: float(alpha) for name, alpha in alphas.items()}
    shown = {alpha for row in facts["blocks"] for alpha in row["alphas"]}
    assert shown == {number for number in numbers.values() if math.isfinite(number)}
    assert set(facts["not_finite"]) == {
        f"{name}.alpha" for name, number in numbers.items() if not math.isfinite(number)
    }


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("strength", [1.0, 0.5, -1.0, 0.3])
@pytest.mark.parametrize("dtype", [F8, F8B], ids=str)
def test_a_strength_and_a_precision_change_fp8_once(tmp_path, dtype, precision, strength):
    numbers = every_number(dtype).repeat(10)
    tensors = {UP: numbers.reshape(1280, 2), DOWN: numbers.reshape(2, 1280)}
    tensors["alpha"] = torch.tensor(1.5).to(dtype)
    lora = write(tmp_path / "a.safetensors", named(tensors))
    kept = load_file(cut(lora, "--alphas", strength, "--save_precision", precision))
    scaled = {s: t.float() * (strength if s == UP else 1) for s, t in tensors.items()}
    wanted = {suffix: tensor.to(PRECISIONS[precision]) for suffix, tensor in scaled.items()}
    assert_same_numbers(kept, named(wanted))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fnuz, torch.float8_e5m2fnuz], ids=str)
def test_a_type_whose_numbers_are_not_known_is_copied_and_refused_where_they_would_change(
    slicer, dtype
):
    tensors = {key: tensor.to(dtype) for key, tensor in lora_module(NAME).items()}
    lora = write(slicer.folder / "a.safetensors", tensors)
    assert slicer(lora) == 0
    assert stored(slicer.output) == stored(lora)
    (name, *_), *_ = stored(lora).values()
    assert slicer(lora, "--save_precision", "fp16") == 1
    assert slicer.sentence == (
        f"{NAME} is stored as {name}, which can be copied but not converted: leave out "
        "--save_precision"
    )
    assert slicer(lora, "--save_precision", "fp16", "--alphas", "0.5") == 1
    assert slicer.sentence == (
        f"{NAME} is stored as {name}, which can be copied but not changed: {USE_1}"
    )
