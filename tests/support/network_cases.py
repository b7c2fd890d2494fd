"""The steps that are taken with LyCORIS' network and with blora_network: see network_probe.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kohya_folder import ROOT
from lycoris_releases import NEWEST, PRESETS

OWN = {
    "middle": r"middle_block\.1\.transformer_blocks\.\d+\.attn[12]\.to_(q|k|v|out\.0)$",
    "last layer": r"out\.2$",
    "first layer": r"input_blocks\.0\.0$",
    "wrapped": r"inner\.output_blocks\.1\.1\.transformer_blocks\.0\.attn1\.to_q$",
    "time": r"(time_embed\.0|output_blocks\.1\.1\.transformer_blocks\.0\.attn1\.to_q)$",
}
CONTENT, LAYOUT = "output_blocks.0.1", "input_blocks.8.1"
# Where the backward pass ends, and how many of the 794 Linear and Conv2d layers lie before it.
STOPS = {
    "blora_content_style": (CONTENT, 387),
    "blora_content_style_clip": (CONTENT, 387),
    "bdora_content_style_clip": (CONTENT, 387),
    "blora_content_layout_style": (LAYOUT, 173),
    "blora_layout_style": (LAYOUT, 173),
    "middle": ("middle_block.1", 278),
    "last layer": ("out.2", 793),
}
MODULES = ("lycoris.kohya", "blora_network")
DORA = {"dora_wd": "True", "wd_on_output": "False"}
BYPASS = {"bypass_mode": "True"}


def case(preset: str, checkpointing: bool = True, **more: Any) -> dict[str, Any]:
    """A step of network_probe.py; `args` are network arguments beside the preset."""
    args = {"preset": preset, **more.pop("args", {})}
    return {"args": args, "checkpointing": checkpointing, **more}


def preset_files(folder: Path) -> dict[str, str]:
    """The five presets by name, and own ones of a single pattern."""
    files = {name: str(ROOT / f"lycoris_presets/{name}.toml") for name in PRESETS}
    for name, pattern in OWN.items():
        path = folder / f"{name}.toml"
        lists = ["unet_target_module", "text_encoder_target_module", "text_encoder_target_name"]
        empty = "".join(f"{key} = []\n" for key in lists)
        path.write_text(f"enable_conv = true\n{empty}unet_target_name = ['{pattern}']\n")
        files[name] = str(path)
    return files


def cases(files: dict[str, str], release: str) -> dict[str, dict[str, Any]]:
    """Every preset with and without checkpointing; more ways to train with the newest LyCORIS."""
    style = files["blora_content_style"]
    found = {
        f"{name}, {'checkpointing' if checkpointing else 'all kept'}": case(
            files[name], checkpointing
        )
        for name in STOPS
        for checkpointing in (True, False)
    }
    found |= {
        "DoRA": case(style, args=DORA),
        "bypass": case(style, args=BYPASS),
        "bypass, all kept": case(style, False, args=BYPASS),
    }
    if release == NEWEST:
        found |= {
            "LoKr": case(style, args={"algo": "lokr", "factor": "4"}),
            "text encoders": case(style, text_encoders=True),
            "no text encoders in the preset": case(files["middle"], text_encoders=True),
            "first layer": case(files["first layer"]),
            "time": case(files["time"]),
            "another U-Net": case(files["wrapped"], wrapped=True),
        }
    return found


def with_both(asked: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each case with each network module, as "CASE|MODULE"."""
    return {f"{n}|{m}": {**c, "module": m} for n, c in asked.items() for m in MODULES}


PLAIN = [*cases(dict.fromkeys([*PRESETS, *OWN], ""), "")]
MORE = [name for name in cases(dict.fromkeys([*PRESETS, *OWN], ""), NEWEST) if name not in PLAIN]
