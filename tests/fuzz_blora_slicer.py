"""Files made by chance, cut at 1, 0.5 and -1 and looked at: no traceback, hang or wrong success.

    python tests/fuzz_blora_slicer.py [--files 20000] [--seed 0]

Each file is a number, from --seed on, and always the same. What a cut keeps is held against what
was put into the file: bit for bit at 1, by the tests' own algebra in float64 at another strength.
Prints what is wrong, with the file's number, and how many of each kind were cut; exits 1 where
something is wrong. 20,000 files take some 15 minutes of one core.
"""

from __future__ import annotations

import re
import signal
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS / "support"), str(TESTS.parent)]

import torch  # noqa: E402
from exact_strength import assert_scaled  # noqa: E402
from fuzzed_files import Fuzzed, fuzzed_file  # noqa: E402
from lora_algebra import Module, bias_change, read_modules, weight_change, with_alpha  # noqa: E402
from lora_files import weight_shape  # noqa: E402
from lora_forms import FORMS, base_weight  # noqa: E402
from slicing import one_sentence, opens, slice_lora, too_new  # noqa: E402

from blora.slicer.keys import SUFFIXES  # noqa: E402

STRENGTHS = (1.0, 0.5, -1.0)
LOOKS = (["--inspect"], ["--inspect", "--json"], ["--inspect", "--alphas", "0.5"])
LIMIT, HANG = 2.0, 6  # seconds of CPU that a call may take, and until it is stopped
SCALED = set().union(*(form.scaled for form in FORMS.values()))


class HangError(BaseException):
    """A call that does not end."""


def stop(*_: object) -> None:
    raise HangError


def call(arguments: list[str]) -> tuple[int, str, list[str]]:
    """The exit code, stderr, and what is wrong with how a call ended."""
    out, err, wrong, code = StringIO(), StringIO(), [], 1
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANG)
    started = time.process_time()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code = slice_lora(*arguments)
        signal.alarm(0)
        one_sentence(code, re.sub("\r[^\n]*\r", "", err.getvalue()))  # without a bar
    except (Exception, SystemExit, HangError) as error:
        signal.alarm(0)
        wrong.append(f"{type(error).__name__}: {str(error)[:300]}")
    if (seconds := time.process_time() - started) > LIMIT:
        wrong.append(f"took {seconds:.1f} s")
    if "\x1b" in out.getvalue() + err.getvalue():
        wrong.append("a text of the file drives the terminal")
    return code, err.getvalue(), wrong


def same_bits(one: torch.Tensor, two: torch.Tensor) -> bool:
    flat = (t.contiguous().reshape(-1).view(torch.uint8) for t in (one, two))
    return one.dtype == two.dtype and one.shape == two.shape and torch.equal(*flat)


def wrong_at_1(name: str, kept: Module, source: Module) -> Iterator[str]:
    """What a copy differs in: nothing but an alpha that was not there, as fp32."""
    source = with_alpha(source)
    if kept.keys() != source.keys():
        yield f"{name} has {sorted(kept)}, not {sorted(source)}"
        return
    for suffix in kept:
        is_same = same_bits(kept[suffix], source[suffix])
        if suffix == "alpha" and not is_same:
            is_same = abs(float(kept[suffix]) - float(source[suffix])) < 1e-6 * kept[suffix].abs()
        if not is_same:
            yield f"{name}.{suffix} is another"


def wrong_at(name: str, kept: Module, source: Module, strength: float) -> Iterator[str]:
    """What a strength was not multiplied into, as far as a stored number can tell."""
    if {"dora_scale", "oft_blocks", "lambda_layer"} & kept.keys():
        yield f"{name} cannot be cut at {strength:g}"
        return
    try:
        assert_scaled(name, kept, with_alpha(source), strength)
    except Exception as error:
        yield f"{name} is not {strength:g} of its change ({type(error).__name__})"


def misfit(name: str, kept: Module) -> str | None:
    """Why what was kept is no change of its layer."""
    if not {"lora_up.weight", "hada_w1_a", "lokr_w1", "lokr_w1_a", "diff", "w_norm"} & kept.keys():
        return None  # of the others no size can be told from the file
    wide, shape = base_weight(name), weight_shape(name)
    try:
        change, bias = weight_change(kept, wide), bias_change(kept)
    except Exception as error:
        return f"no change can be computed ({type(error).__name__}: {str(error)[:100]})"
    if change.numel() != wide.numel() or (bias is not None and bias.numel() != shape[0]):
        return f"its change has {list(change.shape)}, its weight {shape}"
    return None


def wrong_module(name: str, kept: Module, strength: float, file: Fuzzed) -> Iterator[str]:
    if name in file.forbidden and "damaged" not in file.twists:
        yield f"{name} was cut, with {sorted(kept)}"
    elif unknown := kept.keys() - SUFFIXES.keys():
        yield f"{name} keeps {sorted(unknown)}"
    elif name in file.doubtful:
        if problem := misfit(name, kept):
            yield f"{name}: {problem}"
    elif name not in file.wanted:
        yield f"{name} is not in the file"
    elif strength == 1:
        yield from wrong_at_1(name, kept, file.wanted[name])
    else:
        yield from wrong_at(name, kept, file.wanted[name], strength)


def wrong_slice(path: Path, strength: float, file: Fuzzed, err: str) -> Iterator[str]:
    """What is wrong with a slice that was written."""
    if too_new(path):
        return
    if not opens(path):
        yield "the slice cannot be read"
        return
    kept = read_modules(path)
    for name, module in kept.items():
        yield from wrong_module(name, module, strength, file)
    if (lost := file.wanted.keys() - kept.keys() - file.doubtful) and "note: " not in err:
        yield f"nothing says that {sorted(lost)} were left out"


def judge(number: int, folder: Path, traits: Path) -> tuple[Fuzzed, list[str], str]:
    """The file of this number, what is wrong with what is made of it, and its refusal at 1."""
    file = fuzzed_file(number)
    lora, slice_path = folder / "fuzzed.safetensors", folder / "slice.safetensors"
    lora.write_bytes(file.data())
    common = ["--loras", str(lora), "--traits_file", str(traits)]
    cut = ["--traits", "all", "--output_path", str(slice_path)]
    wrong, refusal = [], ""
    for strength in STRENGTHS:
        if any("HangError" in problem for problem in wrong):
            return file, wrong, "it hangs"
        slice_path.unlink(missing_ok=True)
        code, err, problems = call([*common, *cut, f"--alphas={strength}"])
        if slice_path.exists() != (code == 0):
            problems.append("a slice and the exit code disagree")
        elif code == 0:
            problems += wrong_slice(slice_path, strength, file, err)
        if strength == 1 and code:
            refusal = err.rpartition("error: ")[2].strip()
        wrong += [f"at {strength:g}: {problem}" for problem in problems]
    slice_path.unlink(missing_ok=True)
    for look in LOOKS:
        _, _, problems = call([*common, *look, *(cut if "--alphas" in look else [])])
        wrong += [f"{' '.join(look)}: {problem}" for problem in problems]
    if {path.name for path in folder.iterdir()} != {lora.name, traits.name}:
        wrong.append("a file was left behind")
    return file, wrong, refusal


def judge_all(numbers: range) -> Iterator[tuple[int, Fuzzed, list[str], str]]:
    with tempfile.TemporaryDirectory() as name:
        traits = Path(name) / "traits.json"
        traits.write_text('{"all": {"whitelist": ["lora_"]}}')
        for number in numbers:
            yield number, *judge(number, Path(name), traits)


def main() -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--refused", action="store_true", help="show why sound files are refused")
    args = parser.parse_args()
    made, cut, findings = Counter[str](), Counter[str](), 0
    for number, file, wrong, refusal in judge_all(range(args.seed, args.seed + args.files)):
        kind = " + ".join(file.twists) or "sound"
        made[kind] += 1
        cut[kind] += not refusal
        findings += bool(wrong)
        for problem in wrong:
            print(f"file {number} ({kind}): {problem}", flush=True)
        if refusal and args.refused and kind in ("sound", "fused", "settings", "odd_dtype"):
            print(f"file {number} ({kind}) refused: {refusal[:300]}")
    for kind, number in made.most_common():
        print(f"{number:6} {kind}: {cut[kind]} cut")
    print(f"{findings} of {made.total()} files with something wrong")
    return 1 if findings else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
