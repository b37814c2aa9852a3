#!/usr/bin/env bash
# Sourced by the scripts that run in a job, with the job's folder in `job`: the site's settings, and how to start all ranks.
# shellcheck disable=SC2034,SC2154 # the caller sets job and uses config
restarts=${SLURM_RESTART_COUNT:-0}
export PYTHONPATH=$PWD/$job/code PYTHONSAFEPATH=1 # the copied code, not the working directory
# shellcheck source=slurm/env.sh
source "$job/code/slurm/env.sh"

# shellcheck disable=SC2153 # CONFIG is set by the submitted script
config=$job/code/configs/${CONFIG##*/}
ranks=${SLURM_GPUS_ON_NODE:-0} # per node
ranks=$((ranks > 0 ? ranks : 1))
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((SRUN_CPUS_PER_TASK > ranks ? SRUN_CPUS_PER_TASK / ranks : 1))}
port=$((10000 + (SLURM_JOB_ID + 8191 * restarts) % 20000))

say() { echo "$(date '+%F %T') slurm: $*" || true; } # a log on a full disk must not end the job

launch() { # VERB ARGUMENT…: runs python -m trainer on every rank
    srun --kill-on-bad-exit=1 "${srun_options[@]}" "${container[@]}" \
        bash "$job/code/slurm/node.sh" python -m torch.distributed.run --nnodes="$SLURM_NNODES" \
        --nproc-per-node="$ranks" --rdzv-backend=c10d --rdzv-endpoint="$head_node:$port" \
        --rdzv-id="$SLURM_JOB_ID-$restarts-$1" \
        --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 -m trainer "$@"
}
