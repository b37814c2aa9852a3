#!/usr/bin/env bash
# Writes the lock files from the ranges in the requirement files. Needs uv (pip install uv).
#   requirements/lock.sh [PACKAGE==VERSION …]    packages, such as torch==2.14.1, that lock.txt holds back
# lock.txt has the newest versions, lock-oldest.txt the oldest that the ranges allow, both for every supported Python. pip
# takes them as constraints (-c). CUDA's packages are not in them, because every build of torch names its own.
set -euo pipefail
cd "$(dirname "$0")"

lock() { # FILE OPTION…
    {
        echo "# Written by requirements/lock.sh: change the requirement files and run it again."
        uv pip compile --quiet --no-header --no-annotate --upgrade --universal --python-version 3.11 "${@:2}" \
            core.txt dali.txt dali-cuda12.txt deepspeed.txt export.txt wandb.txt dev.txt |
            grep -E '^nvidia-dali|^[^nc]|^n[^v]|^c[^u]'
    } >"$1"
}

lock lock.txt --fork-strategy fewest --constraint <(printf '%s\n' "$@")
lock lock-oldest.txt --fork-strategy fewest --resolution lowest-direct
