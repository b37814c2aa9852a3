#!/usr/bin/env bash
# Runs a command on a node with what its ranks need: node.sh COMMAND ARGUMENT…. launch.sh and ssh.sh start it on every
# node, inside the container if there is one. Variables that slurm/env.sh exports stay as they are.
set -euo pipefail
ulimit -Sn "$(ulimit -Hn)" || true # open files: torchrun on the first node has two connections to each rank
# torchrun's --shutdown-timeout; torch 2.11 ignores it and kills ranks 30 s after TERM
export PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-600}
# Segments that grow leave less memory unused between tensors of several sizes, such as those of multi-crop.
[[ -n ${PYTORCH_CUDA_ALLOC_CONF:-} ]] || export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}

# Compiled kernels, which Triton stores in the home directory by default: on network storage all nodes would write there at
# once. The folder must be this user's, because the ranks run what is in it.
for parent in "${SLURM_TMPDIR:-}" "${TMPDIR:-}" /tmp; do
    [[ -n $parent ]] || continue
    cache=$parent/trainer-$(id -u)
    mkdir -m 700 "$cache" 2>/dev/null || true
    if [[ -d $cache && ! -L $cache && -O $cache && -w $cache ]]; then
        export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$cache/triton}
        export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$cache/inductor}
        break
    fi
done
exec "$@"
