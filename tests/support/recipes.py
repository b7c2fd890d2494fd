"""The recipes, argument by argument: classic's are those of the original bundle."""

from __future__ import annotations

from kohya_folder import CHECKPOINT

CLASSIC = f"""
--pretrained_model_name_or_path={CHECKPOINT}
--dataset_config=./_in/lora/sdxl/my_project/config.toml
--output_dir=./_out/lora/sdxl/my_project_1
--output_name=my_project_1
--network_module=lycoris.kohya
--network_args
preset=lycoris_presets/blora_content_style.toml
--network_dim=1024
--network_alpha=1024
--network_train_unet_only
--resolution=1024,1024
--enable_bucket
--min_bucket_reso=512
--bucket_reso_steps=32
--random_crop
--caption_extension=.txt
--persistent_data_loader_workers
--max_train_steps=3000
--save_every_n_steps=1000
--save_model_as=safetensors
--mixed_precision=fp16
--no_half_vae
--gradient_checkpointing
--mem_eff_attn
--prior_loss_weight=0
--max_grad_norm=1.0
--seed=0
--lr_scheduler=cosine
--lr_warmup_steps=500
--learning_rate=1.0
--optimizer_type=prodigy
--optimizer_args
weight_decay=1e-04
betas=(0.9,0.999)
eps=1e-08
decouple=True
use_bias_correction=True
safeguard_warmup=True
beta3=None
""".split()
# All that fast changes: classic's argument, fast's arguments.
FAST_CHANGES = {
    "--network_module=lycoris.kohya": ["--network_module=blora_network"],
    "preset=lycoris_presets/blora_content_style.toml": [
        "preset=lycoris_presets/blora_content_style.toml",
        "bypass_mode=True",
    ],
    "--random_crop": ["--cache_latents"],
    "--mem_eff_attn": ["--sdpa"],
    "--lr_warmup_steps=500": ["--lr_warmup_steps=0"],
    "use_bias_correction=True": ["use_bias_correction=False"],
    "--save_model_as=safetensors": ["--save_model_as=safetensors", "--save_precision=fp16"],
}
FAST = [new for old in CLASSIC for new in FAST_CHANGES.get(old, [old])]
