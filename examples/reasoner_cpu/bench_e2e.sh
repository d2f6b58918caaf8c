#!/usr/bin/env bash
# Whole RL training of the reasoner with and without speculation, the same seeds, paired: seconds by phase, learning
# curves, table, JSON and PNG (tools/bench_e2e.py). Makes the policy and the EAGLE head once where they are missing.
#   COLD     folder of a cold start (default: that of run.sh --cold-start-only)
#   DRAFTER  EAGLE head of its policy (default COLD/head, trained for 30 minutes if it is not there)
#   OUT      prefix of what is written, and of the runs (default runs/e2e/reasoner); started again, it goes on
# Further arguments go to tools/bench_e2e.py: --quick, --requests-per-rank 8 32, --seeds, --iterations, --block, --modes.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
venv="${VENV:-$root/.venv}"
out="${OUT:-$root/runs/e2e/reasoner}"
cold="${COLD:-}"
if [[ -z $cold ]]; then
    cold="$(bash "$root/examples/reasoner_cpu/run.sh" --cold-start-only | tee /dev/stderr |
        sed -n 's/^cold-started policy: \(.*\)\/hf$/\1/p')"
elif [[ ! -x $venv/bin/python ]]; then
    bash "$root/tools/setup_env.sh"  # run.sh does so too; an environment that is there may be one for GPUs
fi
source "$root/examples/reasoner_cpu/recipe.sh"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # one core a rank
exclude=("$cold/data/train.jsonl" "$cold/data/held_out.jsonl")

drafter="${DRAFTER:-$cold/head}"
if [[ ! -d $drafter ]]; then
    dtype=bfloat16
    [[ ${PRECISION_ARGS[0]} == --bf16 ]] || dtype=float32
    "$venv/bin/torchrun" --standalone --nproc_per_node 2 "$root/tools/train_drafter.py" --model "$cold/hf" \
        --sources "${SOURCES[@]}" --weights "${WEIGHTS[@]}" --exclude "${exclude[@]}" --no-chat-template \
        --instruction $'\n' --max-tokens 768 --max-model-len 1024 --dtype "$dtype" --minutes 30 --out "$drafter"
fi

# One greedy answer to each of 128 problems: the curve costs less than a rollout.
exec "$venv/bin/python" "$root/tools/bench_e2e.py" --hf-model "$cold/hf" --drafter "$drafter" --out "$out" "$@" -- \
    "${PROMPT_ARGS[@]}" --data-train "${SOURCES[@]}" --data-weights "${WEIGHTS[@]}" --data-exclude "${exclude[@]}" \
    "${ROLLOUT_ARGS[@]}" "${RL_ARGS[@]}" "${PRECISION_ARGS[@]}" --eval-num-prompts 128 --eval-num-samples 0
