#!/usr/bin/env bash
# DeepSeek-R1-Distill-Qwen-7B, GRPO with responses of up to 32K tokens, on one node of 8 GPUs of 80 GB: of the shape of
# Qwen2.5-7B, whose settings it takes.
# Variables: ../paper_settings.sh, ../launch.sh. Further flags win; with --dry-run among them nothing is started.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../qwen2.5_7b/run.sh" "$@"
