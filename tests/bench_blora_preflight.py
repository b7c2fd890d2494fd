"""How long pre-flight takes: its start, and with a real sd-scripts the files and the rehearsal.

  python tests/bench_blora_preflight.py [--runs 9]
  KOHYA_PYTHON tests/bench_blora_preflight.py --kohya <sd-scripts> [--images 12] [--photos 300]
      [--before <another version of the bundle>] [OPTIONS OF THE TRAINER]

Its start, which ends where no checkpoint is set, is timed against Python's own and `import torch`,
the rest against the import of the trainer, which a training does again. The folder has the header
of an SDXL checkpoint before a hole of its 6.9 GB, pictures of 1024 x 1024 or photos of 2000 x 3000,
and the fast launcher's options in bf16, which a CPU can do. Prints medians of whole processes,
alternated, and their ratios: the time on the clock, and the work of the processor, which other
programs on the machine hardly change; and the most memory that one of them had. Not on Windows.

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
OPTIONS = (
    "--pretrained_model_name_or_path=sdxl.safetensors --dataset_config=data/config.toml "
    "--output_dir=_out --output_name=hero_1 --network_module=blora_network --network_dim=64 "
    "--network_alpha=64 --network_train_unet_only --resolution=1024,1024 --enable_bucket "
    "--min_bucket_reso=512 --bucket_reso_steps=64 --cache_latents --caption_extension=.txt "
    "--mixed_precision=bf16 --gradient_checkpointing --sdpa --learning_rate=1.0 "
    "--optimizer_type=prodigy --save_every_n_steps=1000 --max_train_steps=3000 "
    "--network_args preset=lycoris_presets/blora_content_style.toml bypass_mode=True"
).split()


def make_folder(folder: Path, images: int, photos: int) -> None:
    sys.path[:0] = [str(TESTS / "support"), str(TESTS / "standin")]
    from kohya_folder import install
    from make_dataset import draw, make_dataset
    from sdxl_checkpoint import sdxl_shapes, write_checkpoint

    install(folder)
    write_checkpoint(folder / "sdxl.safetensors", sdxl_shapes())
    (folder / SCRIPT).touch()
    make_dataset(folder / "data", images, size=1024, repeats=2)
    if photos:
        draw(0, 2000).resize((2000, 3000)).save(photo := folder / "data/images/photo.jpg")
        for number in range(photos - 1):
            photo.with_name(f"photo{number}.jpg").write_bytes(photo.read_bytes())


def programs(kohya: Path | None, before: Path | None, more: list[str]) -> dict[str, list[str]]:
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
        if before:
            earlier = str(before.resolve() / "blora_preflight.py")
            found["files and rehearsal, before"] = [earlier, *line]
    return found


def measured(command: list[str], folder: Path) -> tuple[float, float, float]:
    """One whole process: its wall time, its work on all cores, and its GB at most."""
    env = {**os.environ, "PYTHONPATH": str(folder)}  # as the launchers set it
    before, start = os.times(), time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        end, after = time.perf_counter(), os.times()
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        assert process.returncode == (UNSET in command), output.read().decode()
    work = sum(after[2:4]) - sum(before[2:4])  # of children: user and system
    return end - start, work, usage.ru_maxrss / 1e6


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9, help="rounds (default: %(default)s)")
    parser.add_argument("--kohya", type=Path, help="a folder with sd-scripts, to rehearse there")
    parser.add_argument("--images", type=int, default=6, help="pictures (default: %(default)s)")
    parser.add_argument("--photos", type=int, default=0, help="photos (default: %(default)s)")
    parser.add_argument("--before", type=Path, help="a folder with another version of the bundle")
    args, more = parser.parse_known_args()
    timed = programs(args.kohya, args.before, more)
    with tempfile.TemporaryDirectory() as name:
        make_folder(folder := Path(name), args.images, args.photos)
        rounds = [
            [measured([sys.executable, *words], folder) for words in timed.values()]
            for _ in range(args.runs + 1)
        ]
    del rounds[0]  # which fills the disk cache
    taken = dict(zip(timed, zip(*rounds, strict=True), strict=True))
    medians = {name: [*map(statistics.median, zip(*t, strict=True))] for name, t in taken.items()}
    torch_wall, torch_work, _ = medians["import torch"]
    print("| | seconds | of `import torch` | work | of `import torch` | GB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for program, (wall, work, most) in medians.items():
        shares = f"{wall:.2f} | {wall / torch_wall:.2f} | {work:.2f} | {work / torch_work:.2f}"
        print(f"| {program} | {shares} | {most:.2f} |")


if __name__ == "__main__":
    main()
