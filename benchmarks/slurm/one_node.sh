#!/usr/bin/env bash
# Unlearning on all GPUs of one node: sbatch benchmarks/slurm/one_node.sh --model M --data D --forget-class C --out OUT
# Arguments are those of `erasediff unlearn`; --resume latest --out OUT goes on.
#SBATCH --job-name=erasediff
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
# Two minutes before the time is up: erasediff ends the step, writes a checkpoint and leaves with exit code 143.
#SBATCH --signal=TERM@120
set -euo pipefail

shares=(--launch "${LAUNCH:-zero}")
if [[ ${LAUNCH:-zero} == zero ]]; then
    shares+=(--stage "${STAGE:-2}")
fi

# `exec` lets the signal reach erasediff itself, which hands it on to its ranks.
exec srun erasediff unlearn \
    "${shares[@]}" --processes "${SLURM_GPUS_PER_NODE##*:}" \
    "$@"
