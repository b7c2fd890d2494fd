#!/usr/bin/env bash
# Trains content and style of an SDXL B-LoRA together, as classic does, with these changes: it
# computes only the gradients that a B-LoRA needs (blora_network), caches latents, uses torch's
# own attention, has no warm-up and no bias correction, and saves in fp16.
# Edit the settings below, preferably in a copy of this file, and run it.
# Options given to it are appended last and override the recipe: sdxl_blora_fast --max_train_steps=10
# sh cannot read the rest: started as "sh sdxl_blora_fast.sh", it goes on in bash.
if [ -z "${BASH_VERSION:-}" ]; then exec bash "$0" "$@"; fi
set -euo pipefail

# ---- Settings (edit them here, or set them in the environment) -----------------------------------
# Change only what is between :- and }, and put no spaces around the =. For example:
#   BLORA_CHECKPOINT="${BLORA_CHECKPOINT:-~/my models/sdxl.safetensors}"
# Your project. Its dataset config is _in/lora/sdxl/NAME/config.toml.
BLORA_NAME="${BLORA_NAME:-my_project}"
# The attempt. The LoRA is saved as _out/lora/sdxl/NAME_REVISION/NAME_REVISION.safetensors.
BLORA_REVISION="${BLORA_REVISION:-1}"
# Rank and alpha. 1024 saves 0.9 GB in fp16; 64, the paper's, 56 MB, and trains on smaller cards.
BLORA_RANK="${BLORA_RANK:-1024}"
# The SDXL checkpoint to train on: a .safetensors file or a diffusers folder.
BLORA_CHECKPOINT="${BLORA_CHECKPOINT:-path/to/sd_xl_base_1.0.safetensors}"
# The blocks to train: one of lycoris_presets, relative to this folder.
BLORA_PRESET="${BLORA_PRESET:-lycoris_presets/blora_content_style.toml}"
# 1 saves memory by computing part of each step twice. 0 is faster and takes 3 to 4 GB more.
BLORA_SAVE_MEMORY="${BLORA_SAVE_MEMORY:-1}"
# Options for accelerate launch. For two GPUs: --multi_gpu --num_processes=2
# For one of several: --num_processes=1
BLORA_ACCELERATE_ARGS="${BLORA_ACCELERATE_ARGS:-}"

# ---- Launch (nothing below needs editing) --------------------------------------------------------
fail() {
  echo "$1" >&2
  exit 1
}

# A path may have been pasted with quote marks around it, or start at the home folder.
as_path() {
  local path="${1#[\"\']}"
  path="${path%[\"\']}"
  if [[ "$path" == \~/* ]]; then path="$HOME${path:1}"; fi
  printf '%s\n' "$path"
}

BLORA_CHECKPOINT="$(as_path "$BLORA_CHECKPOINT")"
BLORA_PRESET="$(as_path "$BLORA_PRESET")"
CDPATH="" cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
PROJECT="${BLORA_NAME}_${BLORA_REVISION}"
SCRIPT="sdxl_train_network.py"
if [[ ! -f "$SCRIPT" ]]; then SCRIPT="sd-scripts/sdxl_train_network.py"; fi

if [[ ! -f "$SCRIPT" ]]; then
  fail "No sdxl_train_network.py in \"$PWD\" or its sd-scripts folder: copy the B-LoRA files into a kohya sd-scripts or kohya_ss folder."
fi

# Lets the trainer of a kohya_ss folder find blora_network.py, which lies here.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
VENV=""
if [[ -x ".venv/bin/accelerate" ]]; then VENV="$PWD/.venv"; fi
if [[ -x "venv/bin/accelerate" ]]; then VENV="$PWD/venv"; fi
if [[ -n "$VENV" ]]; then export VIRTUAL_ENV="$VENV" PATH="$VENV/bin:$PATH"; fi
if ! ACCELERATE="$(type -P accelerate)"; then
  fail "No accelerate in venv, .venv or the active environment: install kohya's requirements, or activate the environment that has them."
fi

# Pre-flight looks at the environment of the training, so it runs by the Python of accelerate.
# The first line of accelerate names it. If that is a shell, because the path is long or has a
# space, Python is beside it.
read -r PYTHON PROGRAM _ <"$ACCELERATE"
PYTHON="${PYTHON#??}"
if [[ "$PYTHON" == */env ]]; then PYTHON="$(type -P "$PROGRAM" || true)"; fi
if [[ "${PYTHON##*/}" != python* ]]; then PYTHON="${ACCELERATE%/*}/python"; fi
if [[ ! -x "$PYTHON" ]]; then
  fail "No Python found that runs \"$ACCELERATE\": make its environment again, with kohya's requirements."
fi

CHECKPOINTING=()
if [[ "$BLORA_SAVE_MEMORY" == 1 ]]; then CHECKPOINTING=(--gradient_checkpointing); fi
if [[ "$BLORA_SAVE_MEMORY" != [01] ]]; then
  fail "BLORA_SAVE_MEMORY is \"$BLORA_SAVE_MEMORY\": give 1 to save memory, or 0 to be faster."
fi

# torch refuses to keep workers where --max_data_loader_n_workers=0 leaves none.
WORKERS=(--persistent_data_loader_workers)
if [[ " $* " == *" --max_data_loader_n_workers"[=\ ]"0 "* ]]; then WORKERS=(); fi

OPTIONS=(
  --pretrained_model_name_or_path="$BLORA_CHECKPOINT"
  --dataset_config="./_in/lora/sdxl/$BLORA_NAME/config.toml"
  --output_dir="./_out/lora/sdxl/$PROJECT"
  --output_name="$PROJECT"
  --network_module=blora_network
  --network_args "preset=$BLORA_PRESET"
  "bypass_mode=True"
  --network_dim="$BLORA_RANK"
  --network_alpha="$BLORA_RANK"
  --network_train_unet_only
  "--resolution=1024,1024"
  --enable_bucket
  --min_bucket_reso=512
  --bucket_reso_steps=32
  --cache_latents
  --caption_extension=.txt
  "${WORKERS[@]}"
  --max_train_steps=3000
  --save_every_n_steps=1000
  --save_model_as=safetensors
  --save_precision=fp16
  --mixed_precision=fp16
  --no_half_vae
  "${CHECKPOINTING[@]}"
  --sdpa
  --prior_loss_weight=0
  --max_grad_norm=1.0
  --seed=0
  --lr_scheduler=cosine
  --lr_warmup_steps=0
  --learning_rate=1.0
  --optimizer_type=prodigy
  --optimizer_args
  "weight_decay=1e-04"
  "betas=(0.9,0.999)"
  "eps=1e-08"
  "decouple=True"
  "use_bias_correction=False"
  "safeguard_warmup=True"
  "beta3=None"
)

read -r -a ACCELERATE_ARGS <<<"$BLORA_ACCELERATE_ARGS"
"$PYTHON" blora_preflight.py launch --num_cpu_threads_per_process=8 "${ACCELERATE_ARGS[@]}" "$SCRIPT" "${OPTIONS[@]}" "$@"
"$ACCELERATE" launch --num_cpu_threads_per_process=8 "${ACCELERATE_ARGS[@]}" "$SCRIPT" "${OPTIONS[@]}" "$@"
