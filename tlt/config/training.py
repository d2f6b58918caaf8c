"""The run as a whole, its problems, their evaluation and scoring."""

from dataclasses import dataclass

from tlt.config.requirement import require


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Flags without a prefix: the run as a whole."""

    train_iters: int = 100
    """Iterations to train in all, counted from the start of the run, resumed or not."""
    seed: int = 1234
    """Seed of the data order and of every sampled token; a run is reproducible from it."""
    save: str
    """Folder of the run: checkpoints, metrics.jsonl, trace/, tensorboard/ and run.json are written here."""
    load: str | None = None
    """Folder of a run to resume from (its latest complete checkpoint); None starts from --hf-model. Resumes nothing
    and starts afresh, saying so, if the folder has no checkpoint yet."""
    save_interval: int = 0
    """Iterations between checkpoints; 0 saves only at the end and when interrupted."""
    save_retain: int = 2
    """Checkpoints kept in --save; older ones are deleted after a newer one is complete."""
    tensorboard_dir: str | None = None
    """Folder of TensorBoard events; None means <save>/tensorboard."""
    distributed_timeout_minutes: float = 10.0
    """Minutes until a collective that a rank does not reach raises instead of waiting on, and after which a rank that
    does not move or is not heard of ends the run, saying where it was. Must exceed the longest tail of a rollout."""
    fault: tuple[str, ...] | None = None
    """For tests: things to go wrong, each `<kind>@<point>/<iteration>[/<rank>]`, for instance `sigkill@update/2/1`
    (tlt/faults.py)."""
    dry_run: bool = False
    """Check the configuration for the ranks that WORLD_SIZE names (LOCAL_WORLD_SIZE of them on a node), print it and
    the memory it takes, and stop before any model is built. Of --hf-model a config.json is enough."""
    dry_run_gpu_gib: float | None = None
    """GiB of one GPU that --dry-run holds its estimate against; None takes this machine's first GPU, and without one
    compares nothing."""

    def __post_init__(self):
        require(self.train_iters >= 0, "--train-iters", self.train_iters, "at least 0")
        require(0 <= self.seed < 2**31, "--seed", self.seed, "between 0 and 2**31 - 1")
        require(self.save_interval >= 0, "--save-interval", self.save_interval, "at least 0 iterations")
        require(self.save_retain >= 1, "--save-retain", self.save_retain, "at least 1 checkpoint")
        require(
            self.distributed_timeout_minutes > 0,
            "--distributed-timeout-minutes",
            self.distributed_timeout_minutes,
            "above 0",
        )
        require(
            self.dry_run_gpu_gib is None or self.dry_run_gpu_gib > 0,
            "--dry-run-gpu-gib",
            self.dry_run_gpu_gib,
            "above 0",
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Flags --data-*: problems to train on."""

    train: tuple[str, ...]
    """Sources of training problems, each `reasoning-gym:<task>` or `reasoning-gym:<task>:<JSON configuration>` or
    `jsonl:<file>`; several are mixed by --data-weights."""
    weights: tuple[float, ...] | None = None
    """Share of each source of --data-train (normalised), in training and among held-out problems; None mixes
    evenly."""
    exclude: tuple[str, ...] | None = None
    """JSONL files whose questions are neither trained on nor held out, for instance those of a cold start."""
    max_rejected: int = 0
    """Bad lines of each JSONL file that are left out, each named in the log; with more of them the run does not
    start."""
    instruction: str = ""
    """Text appended to every question."""
    chat_template: bool = True
    """Put the question through the tokenizer's chat template; --no-data-chat-template uses it as it is."""

    def __post_init__(self):
        require(self.max_rejected >= 0, "--data-max-rejected", self.max_rejected, "at least 0 lines")
        require(len(self.train) > 0, "--data-train", self.train, "at least one source")
        if self.weights is not None:
            require(
                len(self.weights) == len(self.train),
                "--data-weights",
                self.weights,
                f"one number per source of --data-train ({len(self.train)})",
            )
            require(min(self.weights) > 0, "--data-weights", self.weights, "positive numbers")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Flags --eval-*: held-out problems, answered greedily and, on request, sampled as in training."""

    sources: tuple[str, ...] | None = None
    """Sources of held-out problems, written as in --data-train; None holds out problems of --data-train. Training
    never draws a problem whose question is held out."""
    num_prompts: int = 64
    """Held-out problems; 0 turns evaluation off."""
    num_samples: int = 0
    """Responses to each held-out problem sampled with the rollout's own distribution, beside the greedy one."""
    interval: int = 0
    """Iterations between evaluations; 0 evaluates before the first and after the last iteration only."""

    def __post_init__(self):
        require(self.num_prompts >= 0, "--eval-num-prompts", self.num_prompts, "at least 0")
        require(self.num_samples >= 0, "--eval-num-samples", self.num_samples, "at least 0")
        require(self.interval >= 0, "--eval-interval", self.interval, "at least 0 iterations")


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Flags --reward-*: the processes that score responses."""

    workers: int = 1
    """Scoring processes of each rollout replica."""
    timeout_s: float = 10.0
    """Seconds after which the scoring of one response is stopped and counted as reward 0."""
    memory_mib: int = 4096
    """MiB of memory that a scoring process may have; one that wants more is ended, its response scored again once."""

    def __post_init__(self):
        require(self.workers >= 1, "--reward-workers", self.workers, "at least 1")
        require(self.memory_mib >= 1, "--reward-memory-mib", self.memory_mib, "at least 1 MiB")
        require(self.timeout_s > 0, "--reward-timeout-s", self.timeout_s, "above 0 seconds")
