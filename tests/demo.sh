#!/usr/bin/env bash
# The whole job on a CPU in a minute: train a B-LoRA with the real launcher, real accelerate,
# real LyCORIS and real Prodigy on a toy SDXL, cut content and style, and show what each file holds.
#   bash tests/demo.sh [a new folder for the kohya checkout]
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source tests/environment.sh tests/requirements.txt

say() { printf '\n== %s\n' "$1"; }

KOHYA="${1:-}"
if [[ -z "$KOHYA" ]]; then
  KOHYA=".demo/kohya folder"
  rm -rf .demo
fi
if [[ -e "$KOHYA" ]]; then
  echo "\"$KOHYA\" exists already: name a folder that is not there yet." >&2
  exit 1
fi

say "Install into \"$KOHYA\", by the README's lines as they stand"
mkdir -p "$KOHYA"
ln -s "$VIRTUAL_ENV" "$KOHYA/venv" # kohya's environment
install="$(sed -n '/^source "<kohya folder>/,/^cp -r /p' README.md)"
install="${install//<kohya folder>/"$KOHYA"}" # in quotes an & of the path is one
echo "$install"
eval "$install"
# In place of sd-scripts, a checkpoint and a dataset: the stand-in, a toy, drawn pictures.
cp -r tests/standin/* tests/data/sdxl_train_network_options.json \
  blora/preflight/sdxl_checkpoint.json "$KOHYA/"
cd "$KOHYA"
python make_checkpoint.py toy_sdxl.safetensors
python make_dataset.py _in/lora/sdxl/demo

say "Train content and style together"
export BLORA_NAME=demo BLORA_RANK=4 BLORA_CHECKPOINT=toy_sdxl.safetensors
export BLORA_ACCELERATE_ARGS="--cpu --num_processes=1 --num_machines=1 --mixed_precision=no --dynamo_backend=no"
export TOY_REAL_ATTENTION=1
cp sdxl_blora_classic.sh my_classic.sh
./my_classic.sh --mixed_precision=no --max_train_steps=10 --lr_warmup_steps=0

say "Cut it"
python blora_slicer.py --loras _out/lora/sdxl/demo_1/demo_1.safetensors \
  --traits content style --not_combined --output_path _out/lora/sdxl/demo_1/demo.safetensors

say "What each file holds"
python blora_slicer.py --inspect --loras _out/lora/sdxl/demo_1/*.safetensors
