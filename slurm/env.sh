#!/usr/bin/env bash
# The settings of your site. Sourced on the job's first node; exported variables reach all nodes.
# shellcheck disable=SC2034 # used by run.sh

# Modules, if they provide the driver's libraries or Python:
# module purge && module load cuda

# Python: a virtual environment on storage that all nodes share …
# shellcheck source=/dev/null
source .venv/bin/activate
container=() # … or a container: comment out the line above and use one of these instead.
# container=(apptainer exec --nv --bind "$PWD" --bind /data adco.sif)
srun_options=()
# srun_options=(--container-image="$PWD/adco.sqsh" --container-mounts="$PWD,/data" --container-workdir="$PWD")

# Network. If other nodes cannot reach the address that `hostname` resolves to, name an interface that they can reach:
# export GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5
head_node=$(hostname) # the name by which other nodes reach this one

# Copies the data to a local disk of each node before training; use it with data.train=/scratch/imagenet/train:
# stage() { mkdir -p /scratch/imagenet && rsync -a /project/imagenet/ /scratch/imagenet/; }
