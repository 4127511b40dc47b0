#!/usr/bin/env bash
# Make a virtual environment and install locks into it: install.sh VENV LOCK...
# The locks are whole, so nothing is resolved (--no-deps), and every file is checked by its hash.
set -euo pipefail
cd "$(dirname "$0")"
venv=$1
shift
if [ ! -x "$venv/bin/uv" ]; then
  PYTHON=$(command -v python3.11 || command -v python3)
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' ||
    { echo "batchq: the lock for CPUs is for Python 3.11; found $("$PYTHON" --version)" >&2; exit 2; }
  "$PYTHON" -m venv "$venv"
  "$venv/bin/python" -m pip install -q --require-hashes -r setup.txt
fi
PYTHON=$venv/bin/python UV=$venv/bin/uv
source ./indexes.sh
# Compiled now, or every process of a first run compiles what it imports, and all of them always where the environment
# forbids to keep it (PYTHONDONTWRITEBYTECODE, as in many containers): 24 s to the first answer instead of 12.
for lock in "$@"; do
  echo "batchq: installing $lock (the first time some minutes and gigabytes)"
  "$UV" pip install -q --compile-bytecode --python "$PYTHON" --no-deps --require-hashes "${TORCH[@]}" -r "$lock"
done
"$UV" pip install -q --python "$PYTHON" --no-deps --no-build-isolation --editable ..
