# shellcheck shell=bash
# Sourced after environment.sh: the releases of LyCORIS that the tests use beside the newest, which
# is in requirements.txt.

for release in 3.2.0.post2 3.4.0; do
  folder="$VIRTUAL_ENV/lycoris/$release"
  if [[ ! -d "$folder" ]]; then
    rm -rf "$folder.part"
    python -m pip install --quiet --disable-pip-version-check --no-deps \
      --target "$folder.part" "lycoris_lora==$release"
    mv "$folder.part" "$folder"
  fi
done
