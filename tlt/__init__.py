"""Reasoning-RL training with losslessly accelerated rollouts on megatron-core and vLLM."""

__version__ = "0.1.0"
