# shellcheck shell=bash
# Sourced with a requirements file, from the root: makes .venv where it is missing, installs what
# the file pins where that changed, and activates it.

python="${PYTHON:-python3}"
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
  echo "Python 3.10 or newer is needed: set PYTHON to the one to use, for example PYTHON=python3.11." >&2
  exit 1
fi
# A venv that was moved, or whose Python is gone, cannot be mended.
if ! .venv/bin/python -c '' 2>/dev/null && ! .venv/Scripts/python -c '' 2>/dev/null; then
  "$python" -m venv --clear .venv
fi
if [[ -d .venv/Scripts ]]; then
  # shellcheck source=/dev/null
  source .venv/Scripts/activate
else
  # shellcheck source=/dev/null
  source .venv/bin/activate
fi
wanted="$(cat tests/requirements*.txt)"
stamp=".venv/installed-$(basename -- "$1")"
if [[ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]]; then
  python -m pip install --quiet --disable-pip-version-check -r "$1"
  echo "$wanted" >"$stamp"
fi
