#!/usr/bin/env bash
# Sets itself up, then lints and tests: what passes here is green. Options go to pytest.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source tests/environment.sh tests/requirements-check.txt
source tests/lycoris_releases.sh

ruff check .
ruff format --check .
shellcheck ./*.sh tests/*.sh .ci/run
python -m pytest tests "$@"
