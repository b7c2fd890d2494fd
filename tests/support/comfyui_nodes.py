"""Print as JSON what ComfyUI's nodes take and hand back, in the order in which it shows them.

  cd COMFYUI_ROOT && COMFYUI_PYTHON comfyui_nodes.py NAME...

tests/data/comfyui_nodes.json is its answer for the nodes of docs/compare.json. An input is a
type, or the list that one chooses from; a list of files is empty there.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from pathlib import Path
from typing import Any

FILES = ("ckpt_name", "lora_name")


def kind(name: str, spec: Any) -> str | list[str]:
    """The type of an input; newer nodes keep the list that one chooses from beside it."""
    first, more = spec[0], (spec[1:] or [{}])[0]
    choices = first if isinstance(first, list) else more.get("options")
    if choices is None:
        return first
    return [] if name in FILES else list(choices)


def main(names: list[str]) -> None:
    sys.path[0] = str(Path.cwd())  # ComfyUI's own modules, before those beside this file
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    importlib.import_module("utils.install_util")  # before nodes puts another utils in its place
    import nodes

    asyncio.run(nodes.init_builtin_extra_nodes())
    found = {}
    for name in names:
        node = nodes.NODE_CLASS_MAPPINGS[name]
        given = {"required": {}, "optional": {}, **node.INPUT_TYPES()}
        kinds = {n: kind(n, spec) for n, spec in (given["required"] | given["optional"]).items()}
        found[name] = {"inputs": kinds, "outputs": list(node.RETURN_TYPES)}
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
