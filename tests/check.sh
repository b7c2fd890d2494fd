#!/usr/bin/env bash
# Sets itself up, then lints and tests: what passes here is green. Options go to pytest.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source tests/environment.sh tests/requirements-check.txt

# The presets are tested on these too; requirements.txt has the newest.
for release in 3.2.0.post2 3.4.0; do
  folder=".venv/lycoris/$release"
  if [[ ! -d "$folder" ]]; then
    rm -rf "$folder.part"
    python -m pip install --quiet --disable-pip-version-check --no-deps \
      --target "$folder.part" "lycoris_lora==$release"
    mv "$folder.part" "$folder"
  fi
done

ruff check .
ruff format --check .
shellcheck ./*.sh tests/*.sh .ci/run
python -m pytest tests "$@"
