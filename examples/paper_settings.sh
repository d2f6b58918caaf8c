#!/usr/bin/env bash
# Sourced by the run.sh of each model: GRPO as in arXiv 2511.16665 and its released scripts, in flags of pretrain_rl.py.
# A run.sh appends what depends on the model; of two equal flags the later one wins.
#   MODEL_DIR    Hugging Face directory of the model
#   DATA         problems: JSONL of `prompt` and `answer`, or another source as in --data-train
#   RUN_DIR      folder of the run, which all nodes share; it is resumed where it holds a run
#   DRAFTER_DIR  EAGLE head of the model (tools/train_drafter.py); without one responses draft for each other
set -euo pipefail
: "${MODEL_DIR:?set MODEL_DIR to the Hugging Face directory of the model}"
: "${DATA:?set DATA to the problems, for instance jsonl:problems.jsonl}"
: "${RUN_DIR:?set RUN_DIR to the folder of the run}"

RUN_ARGS=(
    --hf-model "$MODEL_DIR"
    --save "$RUN_DIR"
    --load "$RUN_DIR"
    --save-interval 10
    --train-iters 200
    --distributed-timeout-minutes 180  # ranks that are done wait for the world's longest response
)
DATA_ARGS=(
    --data-train "$DATA"
    --eval-num-prompts 0
    --reward-workers 4
)
RL_ARGS=(
    --rl-group-size 8
    --rl-kl-coef 0.001
    --rl-kl-estimator k3
    --rl-entropy-coef 0
    --rl-clip-low 0.2
    --rl-clip-high 0.2
    --rl-dual-clip 3.0
    --rl-loss-aggregation token-mean
)
OPTIMIZER_ARGS=(
    --lr 1e-6
    --lr-decay-style constant
    --weight-decay 0.01
    --adam-beta2 0.999
    --clip-grad 1.0
    --use-distributed-optimizer
)
ROLLOUT_ARGS=(
    --rollout-temperature 0.9
    --rollout-top-p 1.0
    --rollout-max-response-tokens 32768
)
SPEC_ARGS=(
    --spec-strategy adaptive:8
)
if [[ -n "${DRAFTER_DIR:-}" ]]; then
    SPEC_ARGS+=(--spec-drafter "$DRAFTER_DIR" --spec-hidden-states-mib 8192)
fi
