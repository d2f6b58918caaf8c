"""Configuration: one frozen dataclass per component. Fields become flags (arguments.py), docstrings their help.

Groups without a prefix use Megatron's own flag names and meanings.
"""

from tlt.config.checks import check, check_policy_layout, read_hf_config
from tlt.config.drafter import DrafterConfig
from tlt.config.policy import ModelConfig, OptimizerConfig
from tlt.config.requirement import require
from tlt.config.rl import RLConfig
from tlt.config.rollout import RolloutConfig
from tlt.config.run import RunConfig
from tlt.config.spec import SpecConfig
from tlt.config.training import DataConfig, EvalConfig, RewardConfig, TrainingConfig

__all__ = [
    "DataConfig",
    "DrafterConfig",
    "EvalConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RLConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "SpecConfig",
    "TrainingConfig",
    "check",
    "check_policy_layout",
    "read_hf_config",
    "require",
]
