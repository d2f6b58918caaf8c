#!/usr/bin/env bash
# Qwen3-30B-A3B (128 experts, 8 for each token), GRPO with responses of up to 32K tokens, on two nodes of 8 GPUs of 80 GB.
# The paper has no such model: settings of its 7B models. Variables: ../paper_settings.sh, ../launch.sh. Further flags win;
# with --dry-run among them nothing is started.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/../paper_settings.sh"
source "$here/../launch.sh"
NODES=2

RL_ARGS+=(
    --rl-prompts-per-iteration 64
    --rl-optimizer-steps 16
)
ROLLOUT_ARGS+=(
    --rollout-max-model-len 33792  # prompts of up to 1024 tokens
    --rollout-tensor-parallel-size 2
    --rollout-max-num-seqs 64
    --rollout-gpu-memory-utilization 0.6
)
LAYOUT_ARGS=(
    --tensor-model-parallel-size 4
    --sequence-parallel
    --expert-model-parallel-size 8
    --recompute-granularity full
    --max-tokens-per-micro-batch 33792
)
if [[ -n "${DRAFTER_DIR:-}" ]]; then
    SPEC_ARGS+=(--spot-training on)
fi

launch "$@"
