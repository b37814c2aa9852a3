#!/usr/bin/env bash
# One measurement of a scaling study. Runs in the batch shell on the first node, from the code that job.sh copied.
set -euo pipefail
job=$1
shift
# shellcheck source=slurm/launch.sh
source "$job/code/slurm/launch.sh"
say "job $SLURM_JOB_ID: $SLURM_NNODES nodes ($SLURM_JOB_NODELIST) x $ranks ranks"
launch bench throughput "$config" "$@"
