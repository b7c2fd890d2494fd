@echo off
setlocal EnableExtensions DisableDelayedExpansion
if not exist "%~dp0blora\launch.bat" echo No blora folder beside "%~f0": copy the B-LoRA files again.& pause & exit /b 1
"%~dp0blora\launch.bat" "%~f0" %*

# Trains content and style of an SDXL B-LoRA together, with the original bundle's settings.
# Edit the settings below, preferably in a copy of this file, and run it.
# Options given to it are appended last and override the recipe: sdxl_blora_classic --max_train_steps=10

# ---- Settings (edit them here, or set them in the environment) -----------------------------------
# Change only what is after the =. Blanks, quote marks and letters of any language may be in it:
#   BLORA_CHECKPOINT=~/my models/sdxl.safetensors
#   BLORA_CHECKPOINT=D:\my models\sdxl.safetensors
# Your project. Its dataset config is _in/lora/sdxl/NAME/config.toml.
BLORA_NAME=my_project
# The attempt. The LoRA is saved as _out/lora/sdxl/NAME_REVISION/NAME_REVISION.safetensors.
BLORA_REVISION=1
# Rank and alpha. 1024 saves 1.8 GB in fp32; 64, the paper's, 113 MB, and trains on smaller cards.
BLORA_RANK=1024
# The SDXL checkpoint to train on: a .safetensors file or a diffusers folder.
BLORA_CHECKPOINT=path/to/sd_xl_base_1.0.safetensors
# The blocks to train: one of lycoris_presets, relative to this folder.
BLORA_PRESET=lycoris_presets/blora_content_style.toml
# Options for accelerate launch. For two GPUs: --multi_gpu --num_processes=2
# For one of several: --num_processes=1
BLORA_ACCELERATE_ARGS=
# 1 checks the training and stops before it begins. 0 trains.
BLORA_CHECK_ONLY=0

# ---- Recipe (options of sd-scripts) --------------------------------------------------------------
# Delete a line, add one, or put a # in front of it to leave it out.
--pretrained_model_name_or_path=$BLORA_CHECKPOINT
--dataset_config=./_in/lora/sdxl/$BLORA_NAME/config.toml
--output_dir=./_out/lora/sdxl/${BLORA_NAME}_$BLORA_REVISION
--output_name=${BLORA_NAME}_$BLORA_REVISION
--network_module=lycoris.kohya
--network_args
preset=$BLORA_PRESET
--network_dim=$BLORA_RANK
--network_alpha=$BLORA_RANK
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
