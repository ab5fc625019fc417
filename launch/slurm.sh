#!/bin/bash
# A recipe on several nodes of 8 GPUs under Slurm, one torchrun a node. The folder must be one that all nodes see.
#   sbatch --nodes 4 launch/slurm.sh r1-distill-llama-70b
#   sbatch --nodes 2 launch/slurm.sh r1-distill-qwen-32b --seed 1
# A job that the scheduler ends is started again by the same line and goes on from its last checkpoint.
#SBATCH --job-name=reason
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=reason-%j.log
set -euo pipefail
if [ $# -eq 0 ]; then
    echo "give a recipe: sbatch --nodes 4 launch/slurm.sh r1-distill-llama-70b" >&2
    exit 2
fi
cd "${SLURM_SUBMIT_DIR:-.}"
HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p) # all of it is read: with pipefail a closed pipe would end the job
export HOST
# $SLURM_NODEID is each node's own, so it is read there.
srun bash -c 'exec torchrun --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" --nproc-per-node 8 \
    --master-addr "$HOST" --master-port 29500 -m cli run "$@"' reason "$@"
