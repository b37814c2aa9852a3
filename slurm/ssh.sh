#!/usr/bin/env bash
# Trains on a cluster without SLURM by starting torchrun on every host over ssh.
#   slurm/ssh.sh HOSTS CONFIG [section.key=value …]
# HOSTS is a file with one host per line; the other hosts must reach the first one by this name. All hosts must share this
# folder under the same path and accept ssh without a password. RANKS is the number of ranks per host (default: its GPUs).
# Ctrl-C makes all ranks save and stop; the same command resumes.
set -euo pipefail
cd "$(dirname "$0")/.."
mapfile -t hosts < <(grep -v '^ *$' "$1")
shift
# shellcheck source=slurm/env.sh
source slurm/env.sh
run_dir=$(python -m trainer config "$@" --get run.dir)
port=$((10000 + RANDOM % 20000))

everywhere() { # VERB ARGUMENT…: runs python -m trainer on all hosts; the first failure ends the others
    local host command pids=()
    printf -v command '%q ' bash slurm/node.sh python -m torch.distributed.run --nnodes="${#hosts[@]}" \
        --nproc-per-node="${RANKS:-gpu}" --rdzv-backend=c10d --rdzv-endpoint="${hosts[0]}:$port" --rdzv-id="$port-$1" \
        -m trainer "$@"
    for host in "${hosts[@]}"; do
        # -tt: when ssh ends, the remote processes receive SIGHUP.
        ssh -tt -o BatchMode=yes "$host" "cd ${PWD@Q} && source slurm/env.sh && $command" </dev/null &
        pids+=("$!")
    done
    while (($(jobs -r | wc -l))); do
        wait -n || if [[ -z $asked ]]; then
            kill "${pids[@]}" 2>/dev/null || true
            echo "error: $1 has failed" >&2 && exit 1
        fi
    done
}

ask_to_stop() {
    asked=1
    [[ -n $training ]] || return 0 # the preflight does not read the file, which would stop the next run
    stop=$run_dir/stop
    { mkdir -p "$run_dir" && touch "$stop"; } || echo "error: $stop could not be written" >&2
}

asked=
training=
stop= # set if this script has written the file, which the ranks may not read any more
trap ask_to_stop INT TERM
trap 'trap "" INT TERM; rm -f "$stop"' EXIT
everywhere doctor "$@"
training=1
[[ -n $asked ]] || everywhere pretrain "$@"
