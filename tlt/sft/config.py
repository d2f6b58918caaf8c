"""Configuration of supervised fine-tuning; training, model, optimizer and data flags are those of RL."""

from dataclasses import dataclass

from tlt.config import DataConfig, ModelConfig, OptimizerConfig, TrainingConfig, require


@dataclass(frozen=True, kw_only=True)
class SftTrainingConfig(TrainingConfig):
    """Flags without a prefix: the run as a whole."""

    dry_run: bool = False
    """Check the configuration and every example for the ranks that WORLD_SIZE names, print the configuration and stop
    before any model is built; memory is not estimated. Of --hf-model all but the weights is read."""
    dry_run_gpu_gib: float | None = None
    """Not allowed here: --dry-run estimates no memory."""

    def __post_init__(self):
        super().__post_init__()
        require(self.dry_run_gpu_gib is None, "--dry-run-gpu-gib", self.dry_run_gpu_gib, "left out: none is estimated")


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Flags --sft-*: supervised fine-tuning on examples of prompt and response."""

    tokens_per_step: int = 4096
    """Packed tokens (prompt and response) of one optimizer step, over all ranks; one iteration is one such step."""
    held_out: str | None = None
    """`jsonl:<file>` of examples whose loss is measured and that are not trained on; None measures nothing."""
    eval_interval: int = 0
    """Iterations between measurements of the held-out loss; 0 measures before the first and after the last only."""
    out: str | None = None
    """Hugging Face directory to write at the end; None means <save>/hf."""

    def __post_init__(self):
        require(self.tokens_per_step >= 1, "--sft-tokens-per-step", self.tokens_per_step, "at least 1")
        require(self.eval_interval >= 0, "--sft-eval-interval", self.eval_interval, "at least 0 iterations")


@dataclass(frozen=True, kw_only=True)
class SftRunConfig:
    """Everything a run of supervised fine-tuning is made of."""

    training: SftTrainingConfig
    model: ModelConfig
    optimizer: OptimizerConfig
    sft: SftConfig
    data: DataConfig

    def __post_init__(self):
        data = self.data
        require(data.weights is None, "--data-weights", data.weights, "left out: examples come once an epoch")
        require(data.exclude is None, "--data-exclude", data.exclude, "left out: every example is trained on")
        require(data.max_rejected == 0, "--data-max-rejected", data.max_rejected, "0: every line must be an example")
