"""How long pre-flight takes: its start, and with a real sd-scripts the files and the rehearsal.

  python tests/bench_blora_preflight.py [--runs 9]
  KOHYA_PYTHON tests/bench_blora_preflight.py --kohya <sd-scripts> [OPTIONS OF THE TRAINER]

Its start, which ends where no checkpoint is set, is timed against Python's own and `import torch`,
the rest against the import of the trainer, which a training does again. The folder has the header
of an SDXL checkpoint before a hole of its 6.9 GB, six pictures of 1024 x 1024, and the fast
launcher's options in bf16, which a CPU can do. Prints medians of whole processes, alternated, and
their ratios: the time on the clock, and the work of the processor, which other programs on the
machine hardly change.

With --kohya give the Python that trains there. It needs the tokenizers that sd-scripts downloads;
offline add --tokenizer_cache_dir=FOLDER at the end. The checkout is only read.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

TESTS = Path(__file__).resolve().parent
SCRIPT = "sdxl_train_network.py"
UNSET = "--pretrained_model_name_or_path=path/to/sd_xl_base_1.0.safetensors"
IMAGES = 6
OPTIONS = (
    "--pretrained_model_name_or_path=sdxl.safetensors --dataset_config=data/config.toml "
    "--output_dir=_out --output_name=hero_1 --network_module=blora_network --network_dim=64 "
    "--network_alpha=64 --network_train_unet_only --resolution=1024,1024 --enable_bucket "
    "--min_bucket_reso=512 --bucket_reso_steps=64 --cache_latents --caption_extension=.txt "
    "--mixed_precision=bf16 --gradient_checkpointing --sdpa --learning_rate=1.0 "
    "--optimizer_type=prodigy --save_every_n_steps=1000 --max_train_steps=3000 "
    "--network_args preset=lycoris_presets/blora_content_style.toml bypass_mode=True"
).split()


def make_folder(folder: Path) -> None:
    sys.path[:0] = [str(TESTS / "support"), str(TESTS / "standin")]
    from kohya_folder import install
    from make_dataset import make_dataset
    from sdxl_checkpoint import sdxl_shapes, write_checkpoint

    install(folder)
    write_checkpoint(folder / "sdxl.safetensors", sdxl_shapes())
    (folder / SCRIPT).touch()
    make_dataset(folder / "data", IMAGES, size=1024, repeats=2)


def programs(kohya: Path | None, more: list[str]) -> dict[str, list[str]]:
    """What is timed, by name; each row of the table is compared with "import torch"."""
    found = {
        "Python alone": ["-c", "pass"],
        "no checkpoint is set": ["blora_preflight.py", SCRIPT, UNSET],
        "import torch": ["-c", "import torch"],
    }
    if kohya:
        script = kohya.resolve() / SCRIPT
        code = f"import sys; sys.path.insert(0, {str(script.parent)!r}); import {script.stem}"
        line = ["launch", "--cpu", str(script), *OPTIONS, *more]
        found |= {
            "import the trainer": ["-c", code],
            "files only": ["blora_preflight.py", "--no_rehearsal", *line],
            "files and rehearsal": ["blora_preflight.py", *line],
        }
    return found


def seconds(command: list[str], folder: Path) -> tuple[float, float]:
    """One whole process: its wall time, and its work on all cores (0 on Windows)."""
    env = {**os.environ, "PYTHONPATH": str(folder)}  # as the launchers set it
    before, start = os.times(), time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, env=env)
    end, after = time.perf_counter(), os.times()
    assert done.returncode == (UNSET in command), done.stderr
    return end - start, sum(after[2:4]) - sum(before[2:4])  # of children: user and system


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9, help="rounds (default: %(default)s)")
    parser.add_argument("--kohya", type=Path, help="a folder with sd-scripts, to rehearse there")
    args, more = parser.parse_known_args()
    timed = programs(args.kohya, more)
    with tempfile.TemporaryDirectory() as name:
        make_folder(folder := Path(name))
        rounds = [
            [seconds([sys.executable, *words], folder) for words in timed.values()]
            for _ in range(args.runs + 1)
        ]
    del rounds[0]  # which fills the disk cache
    taken = dict(zip(timed, zip(*rounds, strict=True), strict=True))
    medians = {name: [*map(statistics.median, zip(*t, strict=True))] for name, t in taken.items()}
    torch_wall, torch_work = medians["import torch"]
    print("| | seconds | of `import torch` | work | of `import torch` |")
    print("| --- | --- | --- | --- | --- |")
    for program, (wall, work) in medians.items():
        shares = wall / torch_wall, work / (torch_work or 1)
        print(f"| {program} | {wall:.2f} | {shares[0]:.2f} | {work:.2f} | {shares[1]:.2f} |")


if __name__ == "__main__":
    main()
