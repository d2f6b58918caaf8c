"""All flags of a run."""

from dataclasses import dataclass

from tlt.config.drafter import DrafterConfig
from tlt.config.policy import ModelConfig, OptimizerConfig
from tlt.config.rl import RLConfig
from tlt.config.rollout import RolloutConfig
from tlt.config.spec import SpecConfig
from tlt.config.spot import SpotConfig
from tlt.config.training import DataConfig, EvalConfig, RewardConfig, TrainingConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything a run is made of; components get their own part, never this."""

    training: TrainingConfig
    model: ModelConfig
    optimizer: OptimizerConfig
    rl: RLConfig
    rollout: RolloutConfig
    spec: SpecConfig
    drafter: DrafterConfig
    spot: SpotConfig
    data: DataConfig
    eval: EvalConfig
    reward: RewardConfig
