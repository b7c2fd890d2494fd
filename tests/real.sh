#!/usr/bin/env bash
# Runs the tests on a real sd-scripts, and prints the rows of docs/tested_with.md that came of it.
#
#   bash tests/real.sh <sd-scripts> [options of pytest]
#
#   bash tests/real.sh v0.11.1                      # a release: cloned into .real/, a venv made for it
#   bash tests/real.sh main                         # the newest there is, or a commit by its number
#   bash tests/real.sh ~/sd-scripts                 # a folder with a checkout, which is only read
#   bash tests/real.sh v0.11.1 -k test_real_cases   # a part: the others say "not run" in the rows
#
# Each of these adds to it, set before the command:
#   KOHYA_PYTHON=<python>           one that has sd-scripts' packages, LyCORIS and torch: no venv is made
#   LYCORIS=3.4.0                   another release of LyCORIS in the venv
#   BLORA_E2E=1                     two steps of a full-size SDXL a recipe, with random weights
#   BLORA_RANDOM_SDXL=<folder>      where its checkpoint and SDXL's tokenizers are, or are to be made
#   KOHYA_SS_ROOT=<kohya_ss> KOHYA_SS_PYTHON=<python>   a real GUI too, with the Python it runs on
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

if [[ $# == 0 || "$1" == -* ]]; then
  sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
  exit 1
fi
asked="$1"
shift
if [[ -d "$OLDPWD/$asked" ]]; then asked="$OLDPWD/$asked"; fi
if [[ -d "$asked" ]]; then
  KOHYA_ROOT="$(cd -- "$asked" && pwd)"
elif [[ "$asked" =~ ^(v[0-9.]+|main|[0-9a-f]{7,40})$ ]]; then
  KOHYA_ROOT="$PWD/.real/$asked"
else
  echo "\"$asked\" is neither a folder nor a release such as v0.11.1, main or a commit" >&2
  exit 1
fi
release="$(basename -- "$KOHYA_ROOT")"
lycoris="$(sed -n 's/^lycoris_lora==//p' tests/requirements.txt)"
lycoris="${LYCORIS:-$lycoris}"
venv="$PWD/.real/$release-venv"
if [[ -n "${LYCORIS:-}" ]]; then venv+="-lycoris-$LYCORIS"; fi

# ---- What it needs -------------------------------------------------------------------------------

echo "This needs:"
echo "  - 20 minutes on two cores that are free, and 6 GB of memory"
if [[ ! -d "$KOHYA_ROOT" ]]; then echo "  - the internet and 200 MB of disk for sd-scripts $asked"; fi
if [[ -z "${KOHYA_PYTHON:-}" && ! -f "$venv/made" ]]; then
  echo "  - the internet and 2 GB of disk for its packages, 7 GB if pip takes torch for CUDA"
fi
if [[ ! -f .venv/made-in ]]; then
  echo "  - the internet and 2 GB of disk for the tests' own packages, 7 GB with torch for CUDA"
fi
if [[ "${BLORA_E2E:-}" == 1 ]]; then
  echo "  - for the full-size SDXL 16 GB of memory, 7 GB of disk and some 30 minutes more"
fi

# ---- sd-scripts and its Python -------------------------------------------------------------------

if [[ ! -d "$KOHYA_ROOT" ]]; then
  mkdir -p .real
  rm -rf "$KOHYA_ROOT.part"
  git clone --quiet --no-checkout https://github.com/kohya-ss/sd-scripts "$KOHYA_ROOT.part"
  git -C "$KOHYA_ROOT.part" -c advice.detachedHead=false checkout --quiet "$asked"
  mv "$KOHYA_ROOT.part" "$KOHYA_ROOT"
elif [[ "$KOHYA_ROOT" == "$PWD/.real/main" ]]; then
  git -C "$KOHYA_ROOT" pull --quiet
fi
if [[ -z "${KOHYA_PYTHON:-}" ]]; then
  KOHYA_PYTHON="$venv/bin/python"
  if [[ ! -f "$venv/made" ]]; then
    mkdir -p .real
    "${PYTHON:-python3}" -m venv --clear "$venv"
    # Those of 0.10.1 for all releases, less what needs CUDA or other trainers need.
    { git -C "$KOHYA_ROOT" show v0.10.1:requirements.txt 2>/dev/null ||
      cat "$KOHYA_ROOT/requirements.txt"; } |
      grep -Ev '^(#|-e |bitsandbytes|pytorch-optimizer|prodigy-plus)' |
      sed 's/^opencv-python=/opencv-python-headless=/' >"$venv/requirements.txt"
    install=("$KOHYA_PYTHON" -m pip install --quiet --disable-pip-version-check)
    "${install[@]}" "$(grep '^torch==' tests/requirements.txt)" torchvision
    "${install[@]}" -r "$venv/requirements.txt" "lycoris_lora==$lycoris"
    "${install[@]}" --no-deps open_clip_torch
    if ! "$KOHYA_PYTHON" -c "import torchvision" 2>/dev/null; then
      packages="$("$KOHYA_PYTHON" -c "import sysconfig; print(sysconfig.get_path('purelib'))")"
      cp tests/support/declare_operators.py "$packages/sitecustomize.py"
    fi
    touch "$venv/made"
  fi
fi
if ! "$KOHYA_PYTHON" -c "import torch, torchvision, transformers, lycoris, prodigyopt"; then
  echo "$KOHYA_PYTHON lacks packages of sd-scripts, lycoris_lora or prodigyopt" >&2
  exit 1
fi

# ---- The tests -----------------------------------------------------------------------------------

export KOHYA_ROOT KOHYA_PYTHON OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
source tests/environment.sh tests/requirements-check.txt
source tests/lycoris_releases.sh
python -m pytest tests/real "$@"
