#!/usr/bin/env bash
# Llama-3.3-70B-Instruct, GRPO with responses of up to 32K tokens, on 8 nodes of 8 GPUs of 80 GB:
#   sbatch --nodes 8 examples/slurm/train.sbatch examples/llama3.3_70b/run.sh
# Variables: ../paper_settings.sh, ../launch.sh. Further flags win; with --dry-run among them nothing is started.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/../paper_settings.sh"
source "$here/../launch.sh"
NODES=8

RL_ARGS+=(
    --rl-prompts-per-iteration 256
    --rl-optimizer-steps 32
)
ROLLOUT_ARGS+=(
    --rollout-max-model-len 34816  # prompts of up to 2048 tokens
    --rollout-tensor-parallel-size 8
    --rollout-max-num-seqs 256
    --rollout-gpu-memory-utilization 0.55
)
LAYOUT_ARGS=(
    --tensor-model-parallel-size 8
    --pipeline-model-parallel-size 2
    --sequence-parallel
    --recompute-granularity full
    --max-tokens-per-micro-batch 34816
)

launch "$@"
