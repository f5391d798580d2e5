#!/bin/bash
# Four hosts with eight GPUs each, under SLURM:   sbatch examples/cluster/slurm.sh [C.yaml] [--key VALUE …]
#
# One torchrun a host, which starts a process a GPU. A job that is killed, or reaches its time, goes on from its last
# checkpoint when it is submitted again. Start it from the project's directory, which all hosts share, with tether
# installed in the environment that is active. Not run under SLURM yet.
#SBATCH --job-name=tether
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
set -euo pipefail

config=${1:-examples/cluster/four_nodes.yaml}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=8

srun torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node 8 --max-restarts 3 \
     --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first:29500" \
     -m tether ppo "$config" "${@:2}"
