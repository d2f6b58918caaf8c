#!/usr/bin/env bash
# SmolLM2-135M on one GPU: the paper's settings within this model's context of 8192 tokens, for a first look.
# Variables: ../paper_settings.sh, ../launch.sh. Further flags win; with --dry-run among them nothing is started.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/../paper_settings.sh"
source "$here/../launch.sh"
NODES=1
GPUS_PER_NODE="${GPUS_PER_NODE:-1}"

RL_ARGS+=(
    --rl-prompts-per-iteration 64
    --rl-optimizer-steps 16
)
ROLLOUT_ARGS+=(
    --rollout-max-model-len 8192
    --rollout-max-response-tokens 7168
    --rollout-tensor-parallel-size 1
    --rollout-max-num-seqs 512
    --rollout-gpu-memory-utilization 0.6
)
LAYOUT_ARGS=(
    --max-tokens-per-micro-batch 16384
    --recompute-granularity full
)
if [[ -n "${DRAFTER_DIR:-}" ]]; then
    SPEC_ARGS+=(--spot-training on)
fi

launch "$@"
