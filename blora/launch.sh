#!/usr/bin/env bash
# What the .sh launchers start, with their own name and the options they are given: finds the
# training's environment, and goes on in its Python (launch.py), which reads the launcher.
set -euo pipefail

fail() {
  echo "$1" >&2
  exit 1
}

LAUNCHER="${1##*/}"
shift
CDPATH="" cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
if [[ ! -f sdxl_train_network.py && ! -f sd-scripts/sdxl_train_network.py ]]; then
  fail "No sdxl_train_network.py in \"$PWD\" or its sd-scripts folder: copy the B-LoRA files into a kohya sd-scripts or kohya_ss folder."
fi

VENV=""
if [[ -x ".venv/bin/accelerate" ]]; then VENV="$PWD/.venv"; fi
if [[ -x "venv/bin/accelerate" ]]; then VENV="$PWD/venv"; fi
if [[ -n "$VENV" ]]; then export VIRTUAL_ENV="$VENV" PATH="$VENV/bin:$PATH"; fi
if ! ACCELERATE="$(type -P accelerate)"; then
  fail "No accelerate in venv, .venv or the active environment: install kohya's requirements, or activate the environment that has them."
fi

# The first line of accelerate names its Python. If that is a shell, because the path is long or
# has a space, Python is beside it.
read -r PYTHON PROGRAM _ <"$ACCELERATE"
PYTHON="${PYTHON#??}"
if [[ "$PYTHON" == */env ]]; then PYTHON="$(type -P "$PROGRAM" || true)"; fi
if [[ "${PYTHON##*/}" != python* ]]; then PYTHON="${ACCELERATE%/*}/python"; fi
if [[ ! -x "$PYTHON" ]]; then
  fail "No Python found that runs \"$ACCELERATE\": make its environment again, with kohya's requirements."
fi

exec "$PYTHON" -m blora.launch "$LAUNCHER" "$@"
