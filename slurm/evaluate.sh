#!/usr/bin/env bash
# Evaluates a run's newest checkpoint by VERB (linear, finetune, knn, voc07) in the directory NAME of the run:
#   sbatch --partition=gpu slurm/evaluate.sh run.dir=runs/adco_r50_800ep
#   VERB=finetune sbatch --partition=gpu --array=0-4 slurm/evaluate.sh run.dir=runs/adco_r50_800ep
# VERB is linear and NAME is VERB by default. VERB=FILE.py:NAME is an evaluation of your own (docs/extend.md), in the
# directory FILE. Each task of an array has its own seed, which is its number, and its own directory, NAME-N. The data are
# those of the run unless data.train=… and data.val=… follow. The fast linear protocol is NAME=linear-fast before sbatch and
# linear.fast=true after run.dir; it starts again after a requeue.
# Options on the sbatch line win over those below. docs/evaluation.md has the protocols, docs/slurm.md the options.
#SBATCH --job-name=evaluate
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
export CONFIG=$run/config.yaml VERB=${VERB:-linear}
file=${VERB%:*}
file=${file##*/}
export NAME=${NAME:-${file%.py}}
# shellcheck source=slurm/job.sh
source slurm/job.sh
