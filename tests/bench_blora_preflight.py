"""How long pre-flight takes, against Python's own start and the imports it does without.

  python tests/bench_blora_preflight.py [--runs 9]

Makes a folder like a real one: a checkpoint with the 2,515 tensor names of SDXL and 6.9 GB that are
a hole in the file, 168 images with captions (empty files: only their names are read), the fast
launcher's preset. Prints medians of whole processes, alternated, and their ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kohya_folder import install

TENSORS, SIZE = 2515, 6_900_000_000
IMAGES = 168
PROGRAMS = {
    "Python alone": ["-c", "pass"],
    "pre-flight": ["blora_preflight.py", "sdxl_train_network.py"],
    "import torch": ["-c", "import torch"],
    "import lycoris.kohya": ["-c", "import lycoris.kohya"],
}
OPTIONS = (
    "--pretrained_model_name_or_path=sdxl.safetensors --dataset_config=config.toml "
    "--output_dir=_out --network_module=lycoris.kohya --network_dim=64 --network_alpha=64 "
    "--network_args preset=lycoris_presets/blora_content_style.toml --network_train_unet_only "
    "--resolution=1024,1024 --caption_extension=.txt --optimizer_type=prodigy"
).split()


def write_checkpoint(path: Path) -> None:
    """The header of an SDXL checkpoint before a hole of its size."""
    import blora_preflight

    names = [*blora_preflight.SDXL_KEYS]
    names += [f"model.diffusion_model.layer.{n}.weight" for n in range(TENSORS - len(names))]
    each = SIZE // TENSORS // 2 * 2
    header = {
        name: {"dtype": "F16", "shape": [each // 2], "data_offsets": [n * each, (n + 1) * each]}
        for n, name in enumerate(names)
    }
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + TENSORS * each)


def make_folder(folder: Path) -> None:
    """All that pre-flight looks at."""
    install(folder)
    write_checkpoint(folder / "sdxl.safetensors")
    (folder / "sdxl_train_network.py").touch()
    (folder / "images").mkdir()
    for number in range(IMAGES):
        (folder / f"images/{number}.png").touch()
        (folder / f"images/{number}.txt").touch()
    (folder / "config.toml").write_text(
        '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "images"\n'
    )


def seconds(command: list[str], folder: Path) -> float:
    """The wall time of one whole process."""
    start = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> int:
    """Measure, and print one Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--runs", type=int, default=9, help="measured rounds (default: %(default)s)"
    )
    runs = parser.parse_args().runs
    times: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_folder(folder)
        for _ in range(runs + 1):  # the first fills the disk cache
            for program, args in PROGRAMS.items():
                options = OPTIONS if program == "pre-flight" else []
                times[program].append(seconds([sys.executable, *args, *options], folder))
    medians = {program: statistics.median(found[1:]) for program, found in times.items()}
    print("| | seconds | of pre-flight |\n| --- | --- | --- |")
    for program, median in medians.items():
        print(f"| {program} | {median:.2f} | {median / medians['pre-flight']:.2f} |")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    sys.exit(main())
