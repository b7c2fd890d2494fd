"""Run a launcher: read its settings and its recipe, check the training, and start it.

launch.sh and launch.bat start this in the kohya folder, by the Python of accelerate:

    python -m blora.launch LAUNCHER [OPTIONS OF SD-SCRIPTS]

Below the line that starts it a launcher is text: NAME=VALUE up to the first option, then options,
one or more a line. No shell reads that, so a value may hold whatever a path can hold.
"""

from __future__ import annotations

import locale
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from blora import ROOT
from blora.text import BloraError, escape_unencodable, say, shortened

SCRIPTS = ("sdxl_train_network.py", "sd-scripts/sdxl_train_network.py")  # sd-scripts, kohya_ss
PATHS = ("BLORA_CHECKPOINT", "BLORA_PRESET")
REQUIRED = ("BLORA_NAME", "BLORA_REVISION", "BLORA_RANK", *PATHS)
OPTIONAL = ("BLORA_SAVE_MEMORY", "BLORA_CHECK_ONLY", "BLORA_ACCELERATE_ARGS")
FOR_PREFLIGHT = ("BLORA_PREVIEW", "BLORA_REHEARSAL")  # which reads them from the environment
SETTINGS = (*REQUIRED, *OPTIONAL, *FOR_PREFLIGHT)
# What a value has to be, and what else to give.
RULES = {
    "BLORA_NAME": (".+", "give your project a name"),
    "BLORA_REVISION": (".+", "give the attempt a number"),
    "BLORA_RANK": ("0*[1-9][0-9]*", "give a whole number, such as 64"),
    "BLORA_SAVE_MEMORY": ("[01]", "give 1 to save memory, or 0 to be faster"),
    "BLORA_CHECK_ONLY": ("[01]?", "give 1 to check and stop, or 0 to train"),
}
# After pre-flight, in place of the training.
SHEET_IS_READY = "The sheet is ready. To train, run this again without BLORA_PREVIEW."
CHECKED_ONLY = "Nothing was trained. To train, set BLORA_CHECK_ONLY to 0."

STARTS_THIS = re.compile(r'(?:exec|").*blora[/\\]launch\.(?:sh|bat)', re.IGNORECASE)
COMMENT = re.compile(r"#|rem\b", re.IGNORECASE)
# NAME=VALUE, or with what version 1 had around it in a .bat, and around the value in a .sh.
SETTING = re.compile(r'(?:if not defined \w+ )?(?:set |export )?"?([A-Za-z_]\w*)\s*=(.*)')
DEFAULT_OF_SH = re.compile(r'"\$\{\w+:-(.*)\}"')
# A variable, in a .bat written in either way; there version 1 needed %% for a percent sign.
VARIABLE = re.compile(r"\$\{(?P<braced>\w+)\}|\$(?P<bare>\w+)|%(?P<of_cmd>\w*)%")
OPENING, CLOSING = "\"'\u201c\u2018", "\"'\u201d\u2019"


@dataclass(frozen=True)
class Launcher:
    """A launcher's values by setting, and its options, each with the number of its line."""

    name: str
    settings: dict[str, tuple[str, int]]
    options: list[tuple[str, int]]

    @property
    def is_bat(self) -> bool:
        """Whether its paths and variables are written as Windows has them."""
        return self.name.lower().endswith(".bat")


# ---- The text of a launcher ----------------------------------------------------------------------


def decoded(content: bytes) -> str:
    """The text of a launcher: UTF-8, or what editors of this system wrote before that."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode(locale.getpreferredencoding(False), "surrogateescape")


def unquoted(text: str) -> str:
    """A value without blanks and quote marks around it; a mark that is never closed goes too."""
    text = text.strip()
    if match := DEFAULT_OF_SH.fullmatch(text):
        text = match[1].strip()
    is_opened = text[:1] != "" and text[0] in OPENING
    text = text[1:] if is_opened else text
    is_closed = text[-1:] != "" and text[-1] in (CLOSING if is_opened else '"')
    return (text[:-1] if is_closed else text).strip()


def words(line: str) -> list[str]:
    """A line of options, split at blanks outside of quote marks; a backslash is a backslash."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.escape, lexer.commenters = True, "", ""
    return list(lexer)


def refused(name: str, value: str, place: str, advice: str) -> BloraError:
    return BloraError(f'{name} is "{shortened(value)}" in {place}: {advice}')


def read_launcher(path: Path) -> Launcher:
    """Read what is below the line that starts blora/launch; BloraError names a wrong line."""
    launcher = Launcher(path.name, {}, [])
    lines = list(enumerate(decoded(path.read_bytes()).splitlines(), start=1))
    start = max((number for number, line in lines if STARTS_THIS.match(line)), default=0)
    for number, line in lines[start:]:
        if line.strip() and not COMMENT.match(line.strip()):
            read_line(launcher, line.strip(), number)
    return launcher


def read_line(launcher: Launcher, line: str, number: int) -> None:
    """Add the setting or the options of a line; version 1 ended options with a ^ in a .bat."""
    setting = SETTING.fullmatch(line)
    is_option = launcher.options or line.lstrip("\"'").startswith("--")
    if setting and (not is_option or setting[1].startswith("BLORA_")):
        launcher.settings[setting[1]] = unquoted(setting[2]), number
        return
    place = launcher.name
    if not is_option:
        advice = "write a setting as NAME=VALUE, and put commands above the line that starts blora"
        raise refused(f"line {number}", line, place, advice)
    try:
        launcher.options.extend((word, number) for word in words(line.rstrip(" ^")))
    except ValueError:
        raise refused(f"line {number}", line, place, "close its quote mark") from None


# ---- Settings and options ------------------------------------------------------------------------


def expanded(text: str, environ: Mapping[str, str], is_bat: bool) -> str:
    """A text with the variables that exist: $NAME, and in a .bat %NAME% too."""

    def value(match: re.Match[str]) -> str:
        if match["of_cmd"] is None or is_bat:
            name = match["braced"] or match["bare"] or match["of_cmd"]
            return environ.get(name, match[0]) if name else "%"
        return match[0]

    return VARIABLE.sub(value, text)


def as_path(text: str, is_bat: bool) -> str:
    """A path as it was pasted, from the home folder on, in a .bat with slashes."""
    path = unquoted(text)
    path = f"{Path.home()}{path[1:]}" if path.startswith(("~/", "~\\")) else path
    return path.replace("\\", "/") if is_bat else path


def chosen_settings(launcher: Launcher, environ: Mapping[str, str]) -> dict[str, str]:
    """Each setting from the environment, or else from the launcher; BloraError for a wrong one."""
    values = {name: environ[name] for name in SETTINGS if environ.get(name)}
    for name, (text, number) in launcher.settings.items():
        if name.startswith("BLORA_") and name not in SETTINGS:
            advice = f"the settings are {', '.join(SETTINGS)}"
            raise refused(f"line {number}", name, launcher.name, advice)
        values[name] = environ.get(name) or expanded(text, environ, launcher.is_bat)
    for name in REQUIRED:
        if name not in values:
            raise BloraError(f"{launcher.name} has no {name}: add a line {name}=VALUE")
    for name, (pattern, advice) in RULES.items():
        if name in values and not re.fullmatch(pattern, values[name]):
            is_from_file = name in launcher.settings and not environ.get(name)
            line = f"line {launcher.settings[name][1]} of {launcher.name}" if is_from_file else ""
            raise refused(name, values[name], line or "the environment", advice)
    return values | {name: as_path(values[name], launcher.is_bat) for name in PATHS}


def chosen_options(launcher: Launcher, environ: Mapping[str, str], given: list[str]) -> list[str]:
    """The recipe with the settings filled in, which `environ` has, and the options given."""
    options = [expanded(word, environ, launcher.is_bat) for word, _ in launcher.options]
    every, left_out = [*options, *given], set()
    if "BLORA_SAVE_MEMORY" in launcher.settings and environ["BLORA_SAVE_MEMORY"] == "0":
        left_out.add("--gradient_checkpointing")
    # torch refuses to keep workers where there are none.
    none = "--max_data_loader_n_workers", "0"
    if "=".join(none) in every or none in pairwise(every):
        left_out.add("--persistent_data_loader_workers")
    return [option for option in options if option not in left_out] + given


def accelerate_line(launcher: Launcher, environ: Mapping[str, str], given: list[str]) -> list[str]:
    """What follows "accelerate": its own options, the script, and the script's options."""
    args = environ.get("BLORA_ACCELERATE_ARGS", "")
    try:
        own = words(args)
    except ValueError:
        message = f'BLORA_ACCELERATE_ARGS is "{shortened(args)}": close its quote mark'
        raise BloraError(message) from None
    script = next((script for script in SCRIPTS if (ROOT / script).is_file()), SCRIPTS[0])
    threads = "--num_cpu_threads_per_process=8"
    return ["launch", threads, *own, script, *chosen_options(launcher, environ, given)]


# ---- Running -------------------------------------------------------------------------------------


def train(line: list[str]) -> int:
    """Go on as accelerate, on Windows wait for it; the exit code is the training's."""
    accelerate = shutil.which("accelerate") or "accelerate"
    if os.name != "nt":
        os.execv(accelerate, [accelerate, *line])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C ends the training, not the wait for it
    return subprocess.run([accelerate, *line], check=False).returncode


def run(line: list[str]) -> int:
    """Pre-flight, and the training where nothing is wrong and no setting asks to stop."""
    # Lets the trainer of a kohya_ss folder find blora_network.py, which lies here.
    folders = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(folders)
    preflight = [sys.executable, "blora_preflight.py", *line]
    if code := subprocess.run(preflight, cwd=ROOT, check=False).returncode:
        return code
    if os.environ.get("BLORA_PREVIEW"):
        print(SHEET_IS_READY)
    elif os.environ.get("BLORA_CHECK_ONLY") == "1":
        print(CHECKED_ONLY)
    else:
        return train(line)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the launcher that is named first, with the options behind it."""
    escape_unencodable()
    name, *given = (sys.argv[1:] if argv is None else argv) or [""]
    if not name:
        print(__doc__)
        return 2
    try:
        launcher = read_launcher(ROOT / name)
        os.environ.update(chosen_settings(launcher, os.environ))
        return run(accelerate_line(launcher, os.environ, given))
    except (BloraError, OSError) as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 130  # as a shell counts Ctrl+C


if __name__ == "__main__":
    sys.exit(main())
