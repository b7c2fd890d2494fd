#!/usr/bin/env bash
# Runs the quick check with the oldest and the newest Python that the bundle is for. Options go to
# pytest.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

# Whether a program is there, only a run of it tells: pyenv has one of each name on PATH.
find_python() {
  local program is_it="import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$1')"
  for program in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
    if "$program" -c "$is_it" 2>/dev/null; then
      echo "$program"
      return
    fi
  done
  echo "There is no Python $1 on this machine: install it, for example by pyenv install $1." >&2
  return 1
}

for version in 3.10 3.13; do
  python="$(find_python "$version")"
  echo "== Python $version"
  PYTHON="$python" bash tests/check.sh quick "$@"
done
