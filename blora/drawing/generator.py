"""sd-scripts' own generator, gen_img.py: started once for all pictures that are not there yet.

A finished picture is copied to its place, with its settings in it; so whatever ends the generator
early costs the one picture that it was at.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from blora import ROOT
from blora.drawing.pictures import Drawing
from blora.text import BloraError, progress_bar, shortened, written_whole

SCRIPTS = ("gen_img.py", "sd-scripts/gen_img.py")  # in a folder of sd-scripts, of kohya_ss
LOG = "gen_img.log"
# What is given to gen_img.py here, and what would draw more than one picture of a prompt.
OURS = (
    "--ckpt", "--sdxl", "--v1", "--v2", "--outdir", "--from_file", "--from_module", "--prompt",
    "--interactive", "--network_module", "--network_weights", "--network_mul", "--network_args",
    "--network_merge", "--network_merge_n_models", "--network_pre_calc", "--images_per_prompt",
    "--n_iter", "--seed", "--W", "--H", "--steps", "--highres_fix_save_1st",
)  # fmt: skip
# With these the pictures of a row would differ by more than what is compared, or not be drawn.
UNFIT = (
    "--image_path", "--mask_path", "--guide_image_path", "--noise_offset_prob",
    "--pyramid_noise_prob", "--shuffle_prompts",
)  # fmt: skip
# What SDXL needs on a card: in fp16 its VAE overflows, and the pictures are black.
PRECISIONS, ATTENTION = ("--fp16", "--bf16"), ("--sdpa", "--xformers", "--diffusers_xformers")
PNG_END = b"IEND\xaeB`\x82"
MEMORY = re.compile(r"out of memory|MemoryError|not enough memory|paging file", re.IGNORECASE)
RAISED = re.compile(r"[\w.]*(?:Error|Exception|Exit)\b(?:: (.*))?$")
POLL = 0.2  # seconds


def find_generator() -> Path:
    """gen_img.py of the kohya folder; BloraError where there is none."""
    for script in SCRIPTS:
        if (ROOT / script).is_file():
            return ROOT / script
    raise BloraError(
        f'no gen_img.py in "{ROOT}": copy the bundle into a kohya sd-scripts or kohya_ss folder'
    )


def check_options(words: Iterable[str]) -> None:
    """Refuse options for gen_img.py that would take the place of those given here."""
    for word in words:
        option = word.partition("=")[0]
        # argparse takes the beginning of an option for it.
        if len(option) > 2 and any(name.startswith(option) for name in OURS):
            raise BloraError(f"{shortened(option)} behind -- is set already: leave it out")
        if len(option) > 4 and any(name.startswith(option) for name in UNFIT):
            raise BloraError(
                f"with {shortened(option)} behind -- the pictures cannot be compared: leave it out"
            )


def has_card() -> bool:
    """Whether torch finds the kind of card that gen_img.py draws on."""
    import torch

    return bool(torch.cuda.is_available())


def card_options(words: list[str], has_card: bool) -> list[str]:
    """Precision and attention for a card, where the options do not choose them."""
    if not has_card:
        return []
    precision = [] if {*PRECISIONS} & {*words} else ["--fp16"]
    attention = [] if {*ATTENTION} & {*words} else ["--sdpa"]
    return [*precision, *attention, *([] if "--no_half_vae" in words else ["--no_half_vae"])]


def is_whole(path: Path) -> bool:
    """Whether a PNG is written to its end."""
    with suppress(OSError), path.open("rb") as file:
        file.seek(-len(PNG_END), os.SEEK_END)
        return file.read() == PNG_END
    return False


def keep(drawn: Path, output: Path, settings: dict[str, object]) -> None:
    """Copy a picture to its place, with gen_img.py's words in it and ours."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    with Image.open(drawn) as image, written_whole(output) as part:
        info = PngInfo()
        # Names of files on Linux may hold what UTF-8 does not.
        words = json.dumps(settings, ensure_ascii=False).encode("utf-8", "backslashreplace")
        for key, text in getattr(image, "text", {}).items():
            info.add_text(key, text)
        info.add_itxt("blora", words.decode())
        image.save(part, "PNG", pnginfo=info)


def reason(log: str, code: int) -> str:
    """Why gen_img.py ended, in its own words."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    # Not all lines: prompts are in the log, and bars.
    raised = [line for line in lines if RAISED.match(line) or ".py: error: " in line]
    advice = "lower --size, such as --size 768, or close other programs"
    if any(map(MEMORY.search, raised)):
        return f"gen_img.py ran out of memory: {advice}"
    if code in (-9, 137):
        return f"gen_img.py was killed: if memory ran out, {advice}"
    last = (raised or [f"exit code {code}"])[-1]
    match = RAISED.match(last)
    return f"gen_img.py stopped: {shortened(match[1] if match and match[1] else last)}"


def start(script: Path, words: list[str], log: Path) -> subprocess.Popen[bytes]:
    """gen_img.py, whose words go to the log: its messages are Japanese too, in any console."""
    folders = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(folders),
        "PYTHONIOENCODING": "utf-8:backslashreplace",
    }
    with log.open("wb") as output:
        command = [sys.executable, str(script), *words]
        return subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT)


def watch(child: subprocess.Popen[bytes], take: Callable[[], int], total: int) -> int:
    """Take pictures as they are finished, behind a bar; returns the exit code."""
    with progress_bar(total, unit="picture") as advance:
        try:
            while (code := child.poll()) is None:
                if finished := take():
                    advance(finished)
                time.sleep(POLL)
            return code
        finally:
            if child.poll() is None:
                child.terminate()
                with suppress(subprocess.TimeoutExpired):
                    child.wait(10)
                child.kill()
            take()


@contextmanager
def drawing_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder in the one of the pictures; BloraError where nothing can be written."""
    try:
        folder.mkdir(exist_ok=True)
        with TemporaryDirectory(prefix=".drawing", dir=folder, ignore_cleanup_errors=True) as name:
            yield Path(name)
    except OSError as error:
        raise BloraError(f"cannot draw into {folder} ({error}): change --output") from error


def draw(
    drawings: list[Drawing],
    folder: Path,
    words: list[str],
    write_looks: Callable[[Path], None],
    first_lines: list[str],
) -> None:
    """Draw these into the folder; `write_looks` writes what the network module reads, `first_lines`
    are prompts that are drawn before and not kept.

    BloraError, in gen_img.py's words, where it ends before the last picture.
    """
    script = find_generator()
    with drawing_folder(folder) as part:
        prompts = part / "prompts.txt"
        lines = [*first_lines, *(drawing.line for drawing in drawings)]
        prompts.write_text("".join(f"{line}\n" for line in lines), "utf-8")

        def take() -> int:
            """Keep each finished picture."""
            finished = [
                d for d in drawings if not (folder / d.file).exists() and is_whole(part / d.file)
            ]
            for drawing in finished:
                keep(part / drawing.file, folder / drawing.file, drawing.settings)
            return len(finished)

        looks = part / "looks.json"
        write_looks(looks)
        given = ["--sdxl", "--outdir", str(part), "--from_file", str(prompts)]
        given += ["--network_weights", str(looks)]
        log = folder / LOG
        code = watch(start(script, [*given, *words], log), take, len(drawings))
    if not all((folder / drawing.file).is_file() for drawing in drawings):
        text = log.read_text("utf-8", "replace")
        raise BloraError(f"{reason(text, code)} (all that it says is in {log})")
