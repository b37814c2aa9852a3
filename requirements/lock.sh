#!/usr/bin/env bash
# Writes the lock files from the ranges in the requirement files. Needs uv (pip install uv).
#   requirements/lock.sh [PACKAGE==VERSION …]    packages, such as torch==2.14.1, that lock.txt holds back
# lock.txt has the newest versions for every supported Python. lock-oldest.txt has the oldest that the ranges allow, for
# Python 3.11 and 3.12: its tests check the ranges. pip takes them as constraints (-c). CUDA's packages are not in them,
# because every build of torch names its own.
set -euo pipefail
cd "$(dirname "$0")"

lock() { # FILE OPTION…
    {
        echo "# Written by requirements/lock.sh: change the requirement files and run it again."
        uv pip compile --quiet --no-header --no-annotate --upgrade --python-version 3.11 "${@:2}" \
            core.txt dali.txt dali-cuda12.txt deepspeed.txt export.txt wandb.txt dev.txt |
            grep -E '^nvidia-dali|^[^nc]|^n[^v]|^c[^u]'
    } >"$1"
}

lock lock.txt --universal --fork-strategy fewest --constraint <(printf '%s\n' "$@")
lock lock-oldest.txt --resolution lowest-direct
