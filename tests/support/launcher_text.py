"""What the launchers hold as text, for the tests that compare it with the docs or with a twin."""

from __future__ import annotations

import re
from pathlib import Path

# The only differences between the two recipes: classic's argument, fast's arguments.
FAST_CHANGES = [
    ("--network_module=lycoris.kohya", "--network_module=blora_network", "bypass_mode=True"),
    ("--random_crop", "--cache_latents"),
    ("--mem_eff_attn", "--sdpa"),
    ("--lr_warmup_steps=500", "--lr_warmup_steps=0"),
    ("use_bias_correction=True", "use_bias_correction=False"),
    (None, "--save_precision=fp16"),
]


def outline(path: Path) -> list[str]:
    """A launcher without its shell: comments, settings with defaults, options, messages."""
    lines = []
    for line in path.read_bytes().decode("ascii").splitlines():
        if line.startswith(("# ", "rem ")):
            lines.append(line.split(" ", 1)[1].rstrip("-"))
        elif setting := re.match(
            r'(\w+)="\$\{\w+:-(.*)\}"$|if not defined \w+ set "(\w+)=(.*)"$', line
        ):
            name, default = setting[1] or setting[3], setting[2] or setting[4] or ""
            lines.append(f"{name} = {default}")
        elif re.match(r'  ("?--|"\w+=|"\$\{|%)', line):
            lines.append(without_variables(line).strip(" \\^"))
        elif message := re.match(r"  (?:fail|echo) (.*\w.*\w.*\.)", line):
            lines.append(without_variables(message[1]).replace("\\", ""))
    return lines


def without_variables(text: str) -> str:
    """Name a variable the same way in both shells: $A, ${A} and %A% become A."""
    text = text.replace('"$@"', "ARGS").replace("%*", "ARGS").replace("$PWD", "CD")
    text = text.replace("[@]", "")
    return re.sub(r"\$\{?(\w+)\}?|%(\w+)%", lambda m: m[1] or m[2], text).replace('"', "")
