"""How fast blora_slicer.py is: beside the usual way with torch, and beside a plain copy.

    python tests/bench_blora_slicer.py [--runs 5] [--folder DIR]

Makes B-LoRAs of real shapes (two blocks, fp16), keeps the content of each in three ways, and prints
the ratios as a Markdown table. Exits 1 where a target is missed. Each measurement is of a whole
process; the ways take turns, and medians are compared. Where others use the disk, a --folder in
memory (/dev/shm) gives steadier numbers.

Needs 3 GB of disk, and Linux or macOS: other systems do not tell a child's peak memory.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).resolve().parent
# Linux counts in KiB, macOS in bytes.
MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024
MIB = 1 << 20

# This process must stay small, because what it has in memory when it starts a child is counted as
# the child's. So all that needs torch, and all that is measured, is a script of its own.

# MAKE RANK FILE: both blocks of a B-LoRA, as kohya's train_network.py saves them.
MAKE = f"""
import json, sys
sys.path[:0] = [{str(TESTS / "support")!r}, {str(TESTS.parent)!r}]
from lora_files import lora_module, write
from preset_modules import CONTENT, STYLE, block_modules

rank, tensors = int(sys.argv[1]), {{}}
for name in block_modules(CONTENT) | block_modules(STYLE):
    tensors |= lora_module(name, rank, float(rank))
metadata = {{f"ss_setting_{{number}}": "None" for number in range(60)}} | {{
    "ss_base_model_version": "sdxl_base_v1-0", "ss_network_module": "networks.lora",
    "ss_network_dim": str(rank), "ss_network_alpha": str(float(rank)), "ss_output_name": "bench",
    "ss_tag_frequency": json.dumps({{"1_images": {{f"tag {{n}}": n for n in range(200)}}}}),
    "ss_bucket_info": json.dumps({{"buckets": {{str(n): {{"count": n}} for n in range(40)}}}}),
    "modelspec.architecture": "stable-diffusion-xl-v1-base/lora", "modelspec.title": "bench",
    "sshs_model_hash": "0" * 64, "sshs_legacy_hash": "0" * 8,
}}
write(sys.argv[2], tensors, metadata)
"""

# USUAL STRENGTH FILE OUTPUT: what scripts that cut LoRAs do.
USUAL = """
import sys
from safetensors.torch import load_file, save_file

strength, path, output = float(sys.argv[1]), sys.argv[2], sys.argv[3]
kept = {key: t for key, t in load_file(path).items() if "output_blocks_0_1_" in key}
if strength != 1:
    kept = {key: t * strength if "lora_up" in key else t for key, t in kept.items()}
save_file(kept, output)
"""

# COPY FILE OUTPUT: the least that writing and hashing these bytes can take in Python.
COPY = """
import hashlib, sys

digest = hashlib.sha256()
with open(sys.argv[1], "rb", buffering=0) as source, open(sys.argv[2], "wb") as output:
    while chunk := source.read(1 << 20):
        digest.update(chunk)
        output.write(chunk)
print(digest.hexdigest())
"""

# SAME A B: whether two files hold the same tensors, to the bit.
SAME = """
import sys
from safetensors.torch import load_file

a, b = (load_file(path) for path in sys.argv[1:])
sys.exit(a.keys() != b.keys() or not all(a[key].equal(b[key]) for key in a))
"""

# Times faster than the usual way, at least; times a plain copy, and MiB at its peak, at most.
TARGETS = {
    (64, 1.0): (8, 2.3, 50),
    (64, 0.5): (3, 3.2, 75),
    (1024, 1.0): (2.5, 1.1, 50),
    (1024, 0.5): (2.2, 1.4, 75),
}


class Run(NamedTuple):
    seconds: float
    peak: float  # MiB


def measure(command: list[object]) -> Run:
    """Run a command to its end; its output is not shown unless it fails."""
    os.sync()  # what is left to write would slow this one down
    # As for users, Python compiles modules once and keeps the result.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryFile() as said:
        start = time.perf_counter()
        child = subprocess.Popen(list(map(str, command)), stdout=said, stderr=said, env=env)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        # Popen need not wait for what wait4 has collected.
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            said.seek(0)
            sys.exit(f"failed: {' '.join(map(str, command))}\n{said.read().decode()}")
    return Run(seconds, usage.ru_maxrss * MAXRSS_UNIT / MIB)


RUN = (sys.executable, "-c")


def commands(lora: Path, strength: float, folder: Path) -> dict[str, list[object]]:
    """The ways to be compared, by name; each writes the file of its name."""
    slicer = [sys.executable, TESTS.parent / "blora_slicer.py", "--loras", lora]
    cut = ["--traits", "content", *(["--alphas", strength] if strength != 1 else [])]
    return {
        "ours": [*slicer, *cut, "--output_path", folder / "ours.safetensors"],
        "usual": [*RUN, USUAL, strength, lora, folder / "usual.safetensors"],
        "copy": [*RUN, COPY, folder / "slice.safetensors", folder / "copy.safetensors"],
    }


def compare(lora: Path, strength: float, folder: Path, runs: int) -> dict[str, Run]:
    """The median time and the highest peak of each way; both slices have the same tensors."""
    ways = commands(lora, strength, folder)
    measure(ways["ours"])
    (folder / "ours.safetensors").replace(folder / "slice.safetensors")
    measure(ways["usual"])
    measure([*RUN, SAME, folder / "slice.safetensors", folder / "usual.safetensors"])
    (folder / "usual.safetensors").unlink()
    found: dict[str, list[Run]] = {way: [] for way in ways}
    for _ in range(runs + 1):  # the first warms the caches
        for way, command in ways.items():
            found[way].append(measure(command))
            # At once, so that it is not written to the disk while the next one is measured.
            (folder / f"{way}.safetensors").unlink()
    return {
        way: Run(statistics.median(run.seconds for run in all_[1:]), max(run.peak for run in all_))
        for way, all_ in found.items()
    }


def bench(folder: Path, runs: int) -> bool:
    """Measure everything, a line of the table at a time; True when all targets are reached."""
    on = f"{os.cpu_count()} cores ({platform.machine()}), {platform.system()}, "
    on += f"Python {platform.python_version()}, torch {version('torch')}, "
    on += f"safetensors {version('safetensors')}"
    print(f"Content of a B-LoRA of two blocks, fp16; medians of {runs} runs on {on}.\n")
    head = ["rank", "strength", "faster than the usual way", "time of a plain copy"]
    head += ["peak memory", "the usual way's", ""]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    results, lora = [], folder / "lora.safetensors"
    for rank, strength in TARGETS:
        measure([*RUN, MAKE, rank, lora])
        found = compare(lora, strength, folder, runs)
        (least, most, highest), (ours, usual, copy) = TARGETS[rank, strength], found.values()
        faster, copies = usual.seconds / ours.seconds, ours.seconds / copy.seconds
        reached = faster >= least and copies <= most and ours.peak <= highest
        cells = [f"{rank}", f"{strength:g}", f"{faster:.1f} times (at least {least:g})"]
        cells += [f"{copies:.1f} times (at most {most:g})"]
        cells += [f"{ours.peak:.0f} MiB (at most {highest:g})", f"{usual.peak:.0f} MiB"]
        cells += ["pass" if reached else "miss"]
        print(f"| {' | '.join(cells)} |", flush=True)
        seconds = ", ".join(f"{way} {run.seconds:.3f} s" for way, run in found.items())
        print(f"rank {rank} at {strength:g}: {seconds}", file=sys.stderr)
        results.append(reached)
    return all(results)


def main() -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="rounds (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="for the files (default: the system's)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench_blora_", dir=args.folder) as folder:
        return 0 if bench(Path(folder), args.runs) else 1


if __name__ == "__main__":
    sys.exit(main())
