#!/usr/bin/env bash
# Sourced by the run.sh of each model: `launch FLAGS...` starts pretrain_rl.py on NODES x GPUS_PER_NODE ranks, with the
# settings that run.sh has put together (paper_settings.sh, LAYOUT_ARGS) and then these flags, which win.
# One machine needs nothing else. Several get the rendezvous in torchrun's own PET_* variables, which
# examples/slurm/train.sbatch sets; an allocation of another size than the script's wins, and the flags are checked for it.
# With --dry-run among the flags nothing but the check runs, on any machine; GPU_GIB is the GPUs' memory then.
#   PYTHON  interpreter with the project's packages (default: the project's .venv, or else python3)
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$root/.venv/bin/python}"
[[ -x "$python" || -n "${PYTHON:-}" ]] || python=python3
# One hardware queue, so that kernels start in the order of their calls: megatron-core relies on it to begin the collectives
# of tensor and sequence parallelism before the product that hides them (tensor_parallel/layers.py). Speed only.
: "${CUDA_DEVICE_MAX_CONNECTIONS:=1}"
export CUDA_DEVICE_MAX_CONNECTIONS

launch() {
    set -- "${RUN_ARGS[@]}" "${LAYOUT_ARGS[@]}" "${OPTIMIZER_ARGS[@]}" "${RL_ARGS[@]}" "${ROLLOUT_ARGS[@]}" \
        "${SPEC_ARGS[@]}" "${DATA_ARGS[@]}" "$@"
    local nodes="${PET_NNODES:-$NODES}" ranks="${PET_NPROC_PER_NODE:-${GPUS_PER_NODE:-8}}" flag
    for flag in "$@"; do
        if [[ $flag == --dry-run ]]; then
            WORLD_SIZE=$((nodes * ranks)) LOCAL_WORLD_SIZE="$ranks" \
                exec "$python" "$root/pretrain_rl.py" --dry-run-gpu-gib "${GPU_GIB:-79}" "$@"
        fi
    done
    local rendezvous=(--nproc_per_node "$ranks")
    if [[ -z "${PET_RDZV_ENDPOINT:-}" ]]; then
        if [[ $nodes != 1 ]]; then
            echo "run.sh: error: $nodes nodes need a rendezvous: sbatch --nodes $nodes examples/slurm/train.sbatch $0" >&2
            exit 2
        fi
        rendezvous+=(--standalone)
    fi
    exec "$python" -m torch.distributed.run "${rendezvous[@]}" "$root/pretrain_rl.py" "$@"
}
