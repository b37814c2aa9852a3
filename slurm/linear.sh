#!/usr/bin/env bash
# Linear evaluation of a run's newest checkpoint, into the folder NAME (linear) of its directory:
#   sbatch --partition=gpu slurm/linear.sh run.dir=runs/adco_r50_800ep
# The data are those of the run, or data.train=… and data.val=… after it. NAME=linear-fast before sbatch and
# linear.fast=true are the fast protocol, which begins again when it is requeued.
# Options on the sbatch line win over those below. docs/evaluation.md has the protocols, docs/slurm.md the options.
#SBATCH --job-name=linear
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
run=
for setting in "$@"; do [[ $setting != run.dir=* ]] || run=${setting#run.dir=}; done
[[ -n $run ]] || { echo "error: no run to evaluate: run.dir=…" >&2 && exit 1; }
export CONFIG=$run/config.yaml VERB=linear NAME=${NAME:-linear}
# shellcheck source=slurm/job.sh
source slurm/job.sh
