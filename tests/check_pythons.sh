#!/usr/bin/env bash
# Runs the quick tests of Python code that need no torch, with the oldest and the newest Python that
# the bundle is for, where they are on this machine. Options go to pytest.
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
  return 1
}

for version in 3.10 3.13; do
  if ! python="$(find_python "$version")"; then
    echo "NOT RUN with Python $version: there is none on this machine"
    continue
  fi
  echo "== Python $version"
  (
    PYTHON="$python"
    source tests/environment.sh tests/requirements-other-pythons.txt ".venv/python$version"
    python -m pytest tests -m "not slow and not shell" --only-importable "$@"
  )
done
