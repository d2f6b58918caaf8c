set -euo pipefail
# The recipe of examples/reasoner_cpu, read by run.sh and by benchmarks that start from its policies.

# Problems: chain_sum with a heavy-tailed number of terms, and gcd, whose number of subtractions is heavy-tailed by
# itself. Question and a newline; no chat template, which costs 30 tokens. RL and evaluation have more short sums than
# the cold start: a problem that is never solved teaches nothing.
CHAIN='reasoning-gym:chain_sum:{"min_digits": 1, "max_digits": 1'
GCD='reasoning-gym:gcd:{"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 40}'
LONG_SUMS=("$CHAIN, \"min_terms\": 10, \"max_terms\": 18}" "$CHAIN, \"min_terms\": 19, \"max_terms\": 30}")
COLD_START_SOURCES=(
    "$CHAIN, \"min_terms\": 3, \"max_terms\": 5}" "$CHAIN, \"min_terms\": 6, \"max_terms\": 9}"
    "${LONG_SUMS[@]}" "$GCD"
)
COLD_START_WEIGHTS=(0.48 0.14 0.05 0.05 0.28)
SOURCES=(
    "$CHAIN, \"min_terms\": 2, \"max_terms\": 4}" "$CHAIN, \"min_terms\": 5, \"max_terms\": 9}"
    "${LONG_SUMS[@]}" "$GCD"
)
WEIGHTS=(0.55 0.13 0.05 0.05 0.22)
PROMPT_ARGS=(--no-data-chat-template --data-instruction $'\n')

# Cold start: bounded by tokens (72 steps of 1,536), not by time.
COLD_START_ARGS=(--sources "${COLD_START_SOURCES[@]}" --weights "${COLD_START_WEIGHTS[@]}" --num-examples 1500 --num-held-out 64
    --quick-frac 0.6 --seed 1)
SFT_ARGS=(
    --train-iters 72
    --sft-tokens-per-step 1536
    --sft-eval-interval 24
    --save-interval 24
    --save-retain 1
    --lr 2e-4
    --min-lr 1e-5
    --lr-decay-style linear
    --lr-warmup-iters 4
    --use-distributed-optimizer
)

# bf16 without hardware for it is emulated, many times slower than fp32 (docs/log.md).
PRECISION_ARGS=(--bf16)
if ! grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then
    PRECISION_ARGS=(--no-bf16)
fi

ROLLOUT_ARGS=(
    --rollout-temperature 1.0
    --rollout-max-response-tokens 768
    --rollout-max-model-len 1024
    --rollout-max-num-seqs 64
    --rollout-save-interval 10
)
EVAL_ARGS=(--eval-num-prompts 64 --eval-num-samples 8 --eval-interval 5)
RL_ARGS=(
    --train-iters 10
    --lr 3e-5
    --lr-warmup-iters 2
    --use-distributed-optimizer
    --max-tokens-per-micro-batch 1536
    --rl-prompts-per-iteration 16
    --rl-group-size 8
    --rl-drop-equal-groups
    --rl-clip-high 0.28
    --rl-entropy-coef 0.002
)
