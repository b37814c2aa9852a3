#!/usr/bin/env bash
# Runs the tests that depend on the versions of Python and torch: engines, checkpoints, resuming, plans and data.
#   docs/bench/versions.sh ENVIRONMENT…    virtual environments, made with uv for example:
#     uv venv -p 3.14 /tmp/newest
#     uv pip install -p /tmp/newest/bin/python -c requirements/lock.txt -r requirements.txt
#     uv venv -p 3.12 /tmp/oldest
#     uv pip install -p /tmp/oldest/bin/python -c requirements/lock-oldest.txt -r requirements.txt
set -euo pipefail
cd "$(dirname "$0")/../.."

for environment; do
    "$environment/bin/python" -c 'import sys, torch; print("Python", sys.version.split()[0], "torch", torch.__version__)'
    PATH=$environment/bin:$PATH "$environment/bin/python" -m pytest -m 'not slow' -p no:cacheprovider \
        tests/trainer/test_{engines,checkpoint,earlier_checkpoints,loop,storage,pretrain,plan,plan_shape_only}.py \
        tests/data
done
