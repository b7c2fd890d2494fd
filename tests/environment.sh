# shellcheck shell=bash
# Sourced with a requirements file and a folder, from the root: makes a venv in the folder (.venv)
# where it is missing, installs what the file pins where that changed, and activates it.

venv="$PWD/${2:-.venv}"
python="${PYTHON:-python3}"
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
  echo "Python 3.10 or newer is needed: set PYTHON to the one to use, for example PYTHON=python3.11." >&2
  exit 1
fi
# A venv holds its own path: one that was moved or copied would install elsewhere. One that is linked
# here is somebody else's.
if [[ ! -L "$venv" && "$(cat "$venv/made-in" 2>/dev/null)" != "$PWD" ]]; then
  "$python" -m venv --clear "$venv"
  echo "$PWD" >"$venv/made-in"
fi
programs="$venv/bin"
if [[ -d "$venv/Scripts" ]]; then programs="$venv/Scripts"; fi
export VIRTUAL_ENV="$venv" PATH="$programs:$PATH"
wanted="$(cat tests/requirements*.txt)"
stamp="$venv/installed-$(basename -- "$1")"
if [[ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]]; then
  python -m pip install --quiet --disable-pip-version-check -r "$1"
  echo "$wanted" >"$stamp"
fi
