#!/usr/bin/env bash
# What your site changes. Sourced on the job's first node; what is exported here reaches all nodes.
# shellcheck disable=SC2034 # used by run.sh

# Modules, if the driver's libraries or Python come from them:
# module purge && module load cuda

# Python: a venv on storage that all nodes see …
# shellcheck source=/dev/null
source .venv/bin/activate
container=() # … or a container: comment the line above out, and one of these in.
# container=(apptainer exec --nv --bind "$PWD" --bind /data adco.sif)
srun_options=()
# srun_options=(--container-image="$PWD/adco.sqsh" --container-mounts="$PWD,/data" --container-workdir="$PWD")

# Network. Where `hostname` names an address that other nodes cannot reach, name the interface that they can:
# export GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5
head_node=$(hostname) # as the other nodes know this one

# Copy the data to a local disk of each node before training, with data.train=/scratch/imagenet/train:
# stage() { mkdir -p /scratch/imagenet && rsync -a /project/imagenet/ /scratch/imagenet/; }
