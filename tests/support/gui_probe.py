"""Print as JSON the training commands that the kohya_ss GUI prints once recipes are loaded.

  echo '{"NAME": [{"preset": "user_presets/RECIPE"}, {"file": "RECIPE.json"},
    {"fields": {"LABEL": "VALUE"}}]}' | KOHYA_SS_PYTHON gui_probe.py

Run it in a kohya_ss folder; each NAME is a page that is done these things to, and then asked for
the command. The LoRA tab is built by the GUI's own code, and Gradio handles each event as for a
browser, checks of what is on the form included; only what the page does by itself is left out.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import sys
import time
from typing import Any

import gradio as gr


class Page:
    """The LoRA tab, and what is in its fields."""

    def __init__(self) -> None:
        sys.path.insert(0, ".")
        from kohya_gui.class_gui_config import KohyaSSGUIConfig
        from kohya_gui.lora_gui import lora_tab

        with gr.Blocks() as self.blocks:
            lora_tab(headless=True, config=KohyaSSGUIConfig(config_file_path="config.toml"))
        self.values = {
            number: block.postprocess(block.value)
            for number, block in self.blocks.blocks.items()
            if hasattr(block, "postprocess") and hasattr(block, "value")
        }

    def field(self, label: str) -> Any:
        return next(b for b in self.blocks.blocks.values() if getattr(b, "label", None) == label)

    def button(self, text: str) -> Any:
        blocks = self.blocks.blocks.values()
        return next(b for b in blocks if isinstance(b, gr.Button) and str(b.value).strip() == text)

    def trigger(self, block: Any, event: str) -> None:
        """Do what the page does on the block's event."""
        functions = [f for f in self.blocks.fns.values() if (block._id, event) in f.targets]
        for function in functions:
            inputs = [self.values[field._id] for field in function.inputs]
            answer = asyncio.run(self.blocks.process_api(function, inputs))
            for field, value in zip(function.outputs, answer["data"], strict=True):
                if isinstance(value, dict) and value.get("__type__") == "update":
                    if "value" not in value:
                        continue
                    value = value["value"]
                self.values[field._id] = value

    def do(self, kind: str, what: Any) -> None:
        """Load a preset or a file, or fill in fields."""
        label = {"preset": "Presets", "file": "Load/Save Config file"}.get(kind)
        for name, value in ({label: what} if label else what).items():
            self.values[self.field(name)._id] = value
        if kind == "preset":
            self.trigger(self.field(label), "input")
        elif kind == "file":
            self.trigger(
                self.button("\N{LEFTWARDS ARROW WITH HOOK}\N{VARIATION SELECTOR-16}"), "click"
            )


def main() -> None:
    """Answer the question on stdin; what the GUI logs goes to stderr."""
    answer = {}
    with contextlib.redirect_stdout(sys.stderr):
        for name, deeds in json.load(sys.stdin).items():
            page = Page()
            for deed in deeds:
                page.do(*deed.popitem())
            with contextlib.redirect_stdout(io.StringIO()) as out:
                page.trigger(page.button("Print training command"), "click")
            [line] = [text for text in out.getvalue().splitlines() if " launch " in text]
            answer[name] = line.split()
            time.sleep(1)  # the config file that the line names is called after the second
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
