"""The steps that are taken with LyCORIS' network and with blora_network: see network_probe.py."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from kohya_folder import ROOT
from lycoris_releases import NEWEST, PRESETS

OWN = {
    "middle": r"middle_block\.1\.transformer_blocks\.\d+\.attn[12]\.to_(q|k|v|out\.0)$",
    "last layer": r"out\.2$",
    "first layer": r"input_blocks\.0\.0$",
    "no layer": r"no_such_layer$",
    "wrapped": r"inner\.output_blocks\.1\.1\.transformer_blocks\.0\.attn1\.to_q$",
    "time": r"(time_embed\.0|output_blocks\.1\.1\.transformer_blocks\.0\.attn1\.to_q)$",
}
CONTENT, STYLE, LAYOUT = "output_blocks.0.1", "output_blocks.1.1", "input_blocks.8.1"
# Where the backward pass ends, and how many of the 794 Linear and Conv2d layers lie before it.
STOPS = {
    "blora_content_style": (CONTENT, 387),
    "blora_content": (CONTENT, 387),
    "blora_style": (STYLE, 493),
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
REFUSED = ("lora", "loha", "lokr")


def case(preset: str, checkpointing: bool = True, **more: Any) -> dict[str, Any]:
    """A step of network_probe.py; `args` are network arguments beside the preset."""
    args = {"preset": preset, **more.pop("args", {})}
    return {"args": args, "checkpointing": checkpointing, **more}


def preset_files(folder: Path) -> dict[str, str]:
    """The presets by name, and own ones of a single pattern."""
    files = {name: str(ROOT / f"lycoris_presets/{name}.toml") for name in PRESETS}
    lines = "enable_conv = true\nunet_target_module = []\n"
    lines += "text_encoder_target_module = []\ntext_encoder_target_name = []\n"
    for name, pattern in OWN.items():
        files[name] = str(folder / f"{name}.toml")
        Path(files[name]).write_text(f"{lines}unet_target_name = ['{pattern}']")
    return files


def cases(files: dict[str, str], release: str) -> dict[str, dict[str, Any]]:
    """Every preset with and without checkpointing; more ways to train with the newest LyCORIS."""
    style = files["blora_content_style"]
    found = {f"{name}, checkpointing": case(files[name]) for name in STOPS}
    found |= {f"{name}, all kept": case(files[name], False) for name in STOPS}
    found |= {"DoRA": case(style, args=DORA), "bypass": case(style, args=BYPASS)}
    found["bypass, all kept"] = case(style, False, args=BYPASS)
    if release == NEWEST:
        found["LoKr"] = case(style, args={"algo": "lokr", "factor": "4"})
        found["text encoders"] = case(style, text_encoders=True)
        found["no text encoders in the preset"] = case(files["middle"], text_encoders=True)
        found |= {name: case(files[name]) for name in ("first layer", "time", "no layer")}
        found["another U-Net"] = case(files["wrapped"], wrapped=True)
    return found


def with_both(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each case with each network module, as "CASE|MODULE"."""
    return {f"{n}|{m}": {**c, "module": m} for n, c in found.items() for m in MODULES}


def asked(files: dict[str, str], release: str) -> dict[str, dict[str, Any]]:
    """All of a release; of blora_network alone what it refuses, by algorithm, and torch.compile."""
    style, both = files["blora_content_style"], DORA | BYPASS
    found = {algo: case(style, args={"algo": algo, **both}) for algo in REFUSED}
    if release == NEWEST:
        found["compiled"] = case(style, compile=True)
    alone = {name: step | {"module": "blora_network"} for name, step in found.items()}
    return with_both(cases(files, release)) | alone


PLAIN = list(cases(defaultdict(str), ""))
MORE = [name for name in cases(defaultdict(str), NEWEST) if name not in PLAIN]
