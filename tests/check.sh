#!/usr/bin/env bash
# Sets itself up, then lints, checks types and tests: what passes here is green.
#   bash tests/check.sh          everything, on as many cores as there are
#   bash tests/check.sh quick    what needs neither torch nor a shell, on PYTHON (python3)
# Further options go to pytest.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=1 # a core a test

how=(--numprocesses=auto --dist=worksteal)
if [[ "${1:-}" == quick ]]; then
  shift
  version="$("${PYTHON:-python3}" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
  source tests/environment.sh tests/requirements-quick.txt ".venv/quick-$version"
  how=(-m "not slow and not shell" --only-importable) # in one process, which names what it leaves out
else
  source tests/environment.sh tests/requirements-check.txt
  source tests/lycoris_releases.sh
  source tests/windows_python.sh
fi

ruff check .
ruff format --check .
mypy
shellcheck blora/*.sh tests/*.sh .ci/run
python -m pytest tests "${how[@]}" "$@"
