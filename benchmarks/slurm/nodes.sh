#!/usr/bin/env bash
# Unlearning on several nodes: sbatch --nodes=4 benchmarks/slurm/nodes.sh --model M --data D --forget-class C --out OUT
# Arguments are those of `erasediff unlearn`. OUT and the cache (ERASEDIFF_CACHE) must be on a file system that all
# nodes see: ranks write their parts of a checkpoint side by side, and read the latents that the first one has encoded.
#SBATCH --job-name=erasediff
#SBATCH --nodes=2
# One torchrun per node, which starts a rank per GPU.
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
# To each job step, two minutes before the time is up: a checkpoint is written, and the run can be resumed.
#SBATCH --signal=TERM@120
# A node that fails takes the job down; requeued, it goes on from the last complete checkpoint.
#SBATCH --requeue
set -euo pipefail

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))

# torchrun hands the signal on, and must leave the ranks the time to write.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110

resume=()
if ((${SLURM_RESTART_COUNT:-0} > 0)); then
    resume=(--resume latest)
fi

shares=(--launch "${LAUNCH:-zero}")
if [[ ${LAUNCH:-zero} == zero ]]; then
    shares+=(--stage "${STAGE:-2}")
fi

# RANK, WORLD_SIZE and the rest come from torchrun: --launch then says only how the ranks share the work.
exec srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_PER_NODE##*:}" \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head_node:$port" \
    --no-python erasediff unlearn "${shares[@]}" "${resume[@]}" "$@"
