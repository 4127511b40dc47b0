#!/usr/bin/env bash
# Compile the locks: pinned, hashed, no index hosts; and note what they were made from and came to. `make lock`
set -euo pipefail
cd "$(dirname "$0")"
source ./indexes.sh
lock() { "$UV" pip compile -q --generate-hashes --no-emit-index-url --no-emit-find-links --custom-compile-command 'make lock' "$@"; }
lock --python-version 3.11 --override override-cpu.txt cpu.in -o cpu.txt
lock --python-version 3.11 -c cpu.txt dev.in -o dev.txt
lock --python-version 3.11 --no-deps demo.in -o demo.txt
lock --python-version 3.11 setup.in -o setup.txt
lock --python-version 3.12 --python-platform x86_64-manylinux_2_35 --override override-gpu.txt gpu.in -o gpu.txt
lock --python-version 3.11 --universal ../infra/airflow/requirements.in -o ../infra/airflow/requirements.txt
sha256sum -- *.in override-*.txt lock.sh {cpu,demo,dev,gpu,setup}.txt ../infra/airflow/requirements.{in,txt} > locked.sha256
