#!/usr/bin/env bash
# A small policy that writes like a reasoning model, on two cores: cold start of SmolLM2-135M on generated chains of
# thought, then GRPO at T=1.0 on problems whose answers need from 2 lines to a page. Sets up everything on a fresh machine.
#   --cold-start-only  stop after the cold start and its profile
#   RUN_DIR  folder of the RL run (default runs/reasoner_cpu; must be new, or hold this run, which is then resumed)
#   SEED     seed of data and sampling of RL (default 1234); the cold start is the same for all seeds
#   CACHE    folder of cold-started policies (default models/reasoner)
# Further arguments go to pretrain_rl.py and win over those below.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
run_dir="${RUN_DIR:-$root/runs/reasoner_cpu}"
seed="${SEED:-1234}"
model_dir="${MODEL_DIR:-$root/models/smollm2}"
cache="${CACHE:-$root/models/reasoner}"
venv="${VENV:-$root/.venv}"
cold_start_only=0
if [[ "${1:-}" == "--cold-start-only" ]]; then
    cold_start_only=1
    shift
fi

bash "$root/tools/setup_env.sh"
"$venv/bin/python" "$root/tools/prepare_smollm2.py" --out "$model_dir"
source "$root/examples/reasoner_cpu/recipe.sh"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # one core a rank
launch=("$venv/bin/torchrun" --standalone --nproc_per_node 2)

# The cold start is made once for each content of what it depends on: recipe but for RL's, code and package versions.
key="$( (declare -p COLD_START_ARGS SOURCES WEIGHTS PROMPT_ARGS SFT_ARGS ROLLOUT_ARGS EVAL_ARGS PRECISION_ARGS && cd "$root" &&
    find tools/make_cold_start.py tools/train_sft.py tools/prepare_smollm2.py requirements-cpu.txt \
    tlt/sft tlt/policy tlt/rl tlt/data tlt/weight_sync megatron_patches \
    -type f \( -name '*.py' -o -name '*.txt' \) -print0 | sort -z | xargs -0 sha256sum) | sha256sum | cut -c1-12)"
cold="$cache/$key"
if [[ ! -d "$cold/hf" ]]; then
    echo "reasoner_cpu: cold start into $cold"
    "$venv/bin/python" "$root/tools/make_cold_start.py" --out "$cold/data" "${COLD_START_ARGS[@]}"
    "${launch[@]}" "$root/tools/train_sft.py" --hf-model "$model_dir" --save "$cold/sft" --load "$cold/sft" \
        --data-train "jsonl:$cold/data/train.jsonl" --sft-held-out "jsonl:$cold/data/held_out.jsonl" \
        --sft-out "$cold/hf" "${PROMPT_ARGS[@]}" "${SFT_ARGS[@]}" "${PRECISION_ARGS[@]}"
fi
DATA_ARGS=("${PROMPT_ARGS[@]}" --data-train "${SOURCES[@]}" --data-weights "${WEIGHTS[@]}"
    --data-exclude "$cold/data/train.jsonl" "$cold/data/held_out.jsonl")
if [[ ! -f "$cold/profile.json" ]]; then
    "${launch[@]}" "$root/pretrain_rl.py" --hf-model "$cold/hf" --save "$cold/evaluation" --train-iters 0 \
        "${DATA_ARGS[@]}" "${ROLLOUT_ARGS[@]}" "${EVAL_ARGS[@]}" "${PRECISION_ARGS[@]}" --seed 1234
    "$venv/bin/python" "$root/tools/profile_workload.py" "$cold/evaluation" --out "$cold/profile"
fi
cat "$cold/profile.md"
echo "cold-started policy: $cold/hf"
if [[ $cold_start_only == 1 ]]; then
    exit 0
fi

"${launch[@]}" "$root/pretrain_rl.py" --hf-model "$cold/hf" --save "$run_dir" --load "$run_dir" --seed "$seed" \
    "${DATA_ARGS[@]}" "${ROLLOUT_ARGS[@]}" "${EVAL_ARGS[@]}" "${RL_ARGS[@]}" "${PRECISION_ARGS[@]}" "$@"
"$venv/bin/python" "$root/tools/show_run.py" "$run_dir"
"$venv/bin/python" "$root/tools/profile_workload.py" "$run_dir" --out "$run_dir/profile"

# The second point at which speed is measured: the policy after RL.
trained="$cold/rl-$seed-$(cat "$run_dir/latest_checkpointed_iteration.txt")"
if [[ ! -d "$trained" ]]; then
    "$venv/bin/python" "$root/tools/convert_mcore_to_hf.py" --load "$run_dir" --hf-model "$cold/hf" --out "$trained"
fi
echo "policy after RL: $trained"
