#!/usr/bin/env bash
# Real RL on two CPU cores: SmolLM2-135M learns one-digit sums. Sets up everything on a fresh machine.
#   RUN_DIR  folder of the run (default runs/quickstart_cpu; must be new, or hold this run, which is then resumed)
#   SEED     seed of data and sampling (default 1234)
# Further arguments go to pretrain_rl.py and win over those below.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
run_dir="${RUN_DIR:-$root/runs/quickstart_cpu}"
seed="${SEED:-1234}"
model_dir="${MODEL_DIR:-$root/models/smollm2}"
venv="${VENV:-$root/.venv}"

bash "$root/tools/setup_env.sh"
"$venv/bin/python" "$root/tools/prepare_smollm2.py" --out "$model_dir"

MODEL_ARGS=(
    --hf-model "$model_dir"
)
RUN_ARGS=(
    --save "$run_dir"
    --load "$run_dir"
    --train-iters 15
    --seed "$seed"
)
OPTIMIZER_ARGS=(
    --lr 2e-5
    --use-distributed-optimizer
)
RL_ARGS=(
    --rl-prompts-per-iteration 8
    --rl-group-size 8
    --rollout-max-response-tokens 20
    --rollout-max-model-len 256
    --rollout-max-num-seqs 32
)
DATA_ARGS=(
    --data-train 'reasoning-gym:chain_sum:{"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}'
    --data-instruction $'\nGive only the final answer.'
    --eval-num-prompts 64
)

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # one core a rank
"$venv/bin/torchrun" --standalone --nproc_per_node 2 "$root/pretrain_rl.py" \
    "${MODEL_ARGS[@]}" "${RUN_ARGS[@]}" "${OPTIMIZER_ARGS[@]}" "${RL_ARGS[@]}" "${DATA_ARGS[@]}" "$@"

"$venv/bin/python" "$root/tools/show_run.py" "$run_dir"
