"""Write blora_gui_classic.json and blora_gui_fast.json, the launchers' recipes for the GUI.

Run it as: python tools/write_gui_recipes.py

The options are those that a launcher hands to sd-scripts. The keys are those of
the LoRA tab of kohya_ss v25.2.1 to 2026-07. A field whose key is not in the file keeps what is on
the form: so every field that changes a training is in it, and none that names the user's files.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests/standin"))

from sdxl_train_network_options import build_parser

from blora import ROOT
from blora.launch import chosen_options, chosen_settings, read_launcher

RECIPES = ("classic", "fast")
# The slider's maximum. Gradio refuses a value beyond it, and then every load and print of the form.
RANK = 512

# The user's. Were the checkpoint in the file, its path would not exist, and the GUI
# treats a missing file as no SDXL.
OWN = {"pretrained_model_name_or_path", "dataset_config", "output_dir", "output_name"}
# Options that are fields of the same name; the ones that no launcher gives have the trainer's
# default, whatever was on the form.
SAME = """
adaptive_noise_scale bucket_no_upscale bucket_reso_steps cache_latents cache_latents_to_disk
caption_dropout_every_n_epochs caption_dropout_rate caption_extension clip_skip color_aug
debiased_estimation_loss dim_from_weights enable_bucket flip_aug fp8_base fp8_base_unet full_bf16
full_fp16 gradient_accumulation_steps gradient_checkpointing highvram huber_c huber_scale
huber_schedule ip_noise_gamma ip_noise_gamma_random_strength keep_tokens learning_rate loss_type
lr_scheduler lr_scheduler_num_cycles lr_scheduler_power lr_warmup_steps masked_loss max_bucket_reso
max_data_loader_n_workers max_grad_norm max_train_epochs max_train_steps mem_eff_attn
min_bucket_reso min_snr_gamma min_timestep mixed_precision multires_noise_discount
multires_noise_iterations network_alpha network_dim network_dropout noise_offset
noise_offset_random_strength persistent_data_loader_workers prior_loss_weight random_crop
save_every_n_epochs save_every_n_steps save_last_n_epochs save_last_n_epochs_state
save_last_n_steps save_last_n_steps_state save_model_as scale_v_pred_loss_like_noise_pred
scale_weight_norms seed shuffle_caption train_batch_size v2 v_parameterization v_pred_like_loss
vae_batch_size weighted_captions
""".split()
SAME_TEXT = ["lr_scheduler_args", "lr_scheduler_type", "network_weights"]
RENAMED = {"resolution": "max_resolution", "no_half_vae": "sdxl_no_half_vae"}
NETWORK_ARGS = {"preset": "LyCORIS_preset", "bypass_mode": "bypass_mode"}
# Options that become several fields, or a field of another kind: see translated().
TRANSLATED = {"network_args", "network_module", "network_train_unet_only", "optimizer_args"}
TRANSLATED |= {"optimizer_type", "save_precision", "sdpa"}
# Fields that no option of sd-scripts stands behind, or one that the GUI does not name so.
FORM = {
    "LoRA_type": "LyCORIS/LoCon",
    "anima_checkbox": False,
    "bypass_mode": False,
    "conv_alpha": 1,
    "conv_dim": 1,
    "dora_wd": False,
    "epoch": 1,
    "flux1_checkbox": False,
    "hunyuan_image_checkbox": False,
    "loraplus_lr_ratio": 0,
    "loraplus_text_encoder_lr_ratio": 0,
    "loraplus_unet_lr_ratio": 0,
    "lr_warmup": 0,
    "lumina_checkbox": False,
    "max_timestep": 1000,  # these two are sd-scripts' own where nothing is given
    "max_token_length": 75,
    "module_dropout": 0,
    "noise_offset_type": "Original",
    "rank_dropout": 0,
    "rank_dropout_scale": False,
    "sd3_checkbox": False,
    "sdxl": True,
    "sdxl_cache_text_encoder_outputs": False,
    "stop_text_encoder_training": 0,
    "t5xxl_lr": 0,
    "train_inpainting": False,
    "train_norm": False,
    "use_scalar": False,
    "use_tucker": False,
}
# Options that the GUI drops (a 0, and up to v26.0.0 the warm-up beside a dataset config) or has no
# field for, each with what sd-scripts would get then. The additional parameters come last and win.
ADDITIONAL = {
    "seed": None,
    "prior_loss_weight": 1.0,
    "lr_warmup_steps": 0,
    "network_module": "lycoris.kohya",
}


def launcher_options(launcher: str) -> list[str]:
    """The options that sdxl_blora_LAUNCHER hands to sd-scripts, at the slider's maximum."""
    text = read_launcher(ROOT / f"sdxl_blora_{launcher}.sh")
    return chosen_options(text, chosen_settings(text, {"BLORA_RANK": str(RANK)}), [])


def given(options: list[str]) -> set[str]:
    """The names of the options."""
    return {word[2:].split("=")[0] for word in options if word.startswith("--")}


def plain(value: Any) -> Any:
    """A field's value: 0 for an option that is not given, and 512 for 512.0."""
    if value is None:
        return 0
    return int(value) if isinstance(value, float) and value.is_integer() else value


def translated(args: Namespace) -> dict[str, Any]:
    """The fields that are not an option under its own name or another."""
    pairs = dict(item.split("=", 1) for item in args.network_args)
    values = {NETWORK_ARGS[name]: {"True": True}.get(text, text) for name, text in pairs.items()}
    additional = {name: plain(getattr(args, name)) for name in ADDITIONAL}
    words = [f"--{name}={value}" for name, value in additional.items() if value != ADDITIONAL[name]]
    return values | {
        # The blank parts it from what is typed there: Gradio 6 appends that.
        "additional_parameters": "".join(f"{word} " for word in words),
        "optimizer": args.optimizer_type.capitalize(),
        "optimizer_args": " ".join(args.optimizer_args),
        "save_precision": args.save_precision or "float",
        # Rates are how the GUI is told what to train.
        "text_encoder_lr": 0 if args.network_train_unet_only else plain(args.learning_rate),
        "unet_lr": plain(args.learning_rate),
        "xformers": "sdpa" if args.sdpa else "none",
    }


def recipe(options: list[str]) -> dict[str, Any]:
    """The GUI's fields for these options of sd-scripts; an option that has none is refused."""
    unknown = given(options) - OWN - {*SAME, *SAME_TEXT, *RENAMED} - TRANSLATED
    if unknown:
        raise ValueError(f"no field of the GUI is named for {', '.join(sorted(unknown))}")
    args = build_parser().parse_args(options)
    values = {name: plain(getattr(args, name)) for name in SAME}
    values |= {name: getattr(args, name) or "" for name in SAME_TEXT}
    values |= {field: getattr(args, name) for name, field in RENAMED.items()}
    return FORM | values | translated(args)


def recipe_text(launcher: str) -> str:
    """The file for the recipe of sdxl_blora_LAUNCHER."""
    fields = recipe(launcher_options(launcher))
    return json.dumps(fields, indent=2, sort_keys=True) + "\n"


def main() -> None:
    for launcher in RECIPES:
        file = ROOT / f"blora_gui_{launcher}.json"
        file.write_text(recipe_text(launcher), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
