#!/usr/bin/env bash
# Pre-trains AdCo with a ResNet-50 for 800 epochs of ImageNet (or another recipe with CONFIG=another.yaml):
#   sbatch --nodes=1 --partition=gpu slurm/adco_800ep.sh data.train=/data/imagenet/train data.val=/data/imagenet/val
# Options on the sbatch line override those below. docs/slurm.md lists them; slurm/env.sh has the settings of your site.
#SBATCH --job-name=adco_800ep
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
export CONFIG=${CONFIG:-configs/adco_r50_800ep.yaml}
# shellcheck source=slurm/job.sh
source slurm/job.sh
