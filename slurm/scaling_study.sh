#!/usr/bin/env bash
# Measures one size of a scaling study. These commands submit it for each size and collect the results:
#   python -m trainer scale submit configs/adco_r50_800ep.yaml study --sizes 1,2,4,8 --sbatch '--partition=gpu'
#   python -m trainer scale collect study
#SBATCH --job-name=scaling_study
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=01:00:00
#SBATCH --output=%x-%j.log
#SBATCH --no-requeue
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
export CONFIG=${CONFIG:-configs/adco_r50_800ep.yaml} RUN=measure.sh
# shellcheck source=slurm/job.sh
source slurm/job.sh
