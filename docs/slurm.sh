#!/bin/bash
# sbatch docs/slurm.sh RECIPE [--config CONFIG] [key=value ...]
#SBATCH --job-name=mdm
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@300

host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# Without "B:", SLURM sends the signal to what srun has started, and not to this script, which goes on below.
# From SLURM 22.05 on, srun does not take --cpus-per-task from sbatch: the launchers would share a core with all their processes.
srun --kill-on-bad-exit=0 --cpus-per-task "$SLURM_CPUS_PER_TASK" mdm run \
    --nnodes "1:$SLURM_JOB_NUM_NODES" --nproc_per_node "$SLURM_GPUS_ON_NODE" --max-restarts 10 \
    --rdzv_backend c10d --rdzv_endpoint "$host:29500" --rdzv_id "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" \
    "$@"
code=$?

# 143: all processes were told to leave, and have saved. srun gives the highest code of its tasks.
if [ "$code" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
