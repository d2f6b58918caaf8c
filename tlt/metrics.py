"""Metric records with their reduction, and where a run's metrics go: a log line, metrics.jsonl, TensorBoard."""

import json
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class MetricSums:
    """Metrics accumulated over micro-batches and ranks: means as (sum, count), and maxima."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)

    def add(self, other: "MetricSums") -> None:
        for name in other.sums:
            self.sums[name] = self.sums.get(name, 0.0) + other.sums[name]
            self.counts[name] = self.counts.get(name, 0.0) + other.counts[name]
        for name, value in other.maxima.items():
            self.maxima[name] = max(self.maxima.get(name, -math.inf), value)

    def values(self) -> dict[str, float]:
        """Mean (sum / count; 0 where nothing was counted) or maximum by name."""
        means = {name: self.sums[name] / self.counts[name] if self.counts[name] else 0.0 for name in self.sums}
        return means | self.maxima


def reduce_metrics(own: MetricSums, group: dist.ProcessGroup) -> MetricSums:
    """Sums and maxima over the ranks of `group`; a rank that has nothing to add passes an empty record.

    Collective over `group`; all ranks must call.
    """
    records = [MetricSums()] * dist.get_world_size(group)
    dist.all_gather_object(records, own, group=group)
    total = MetricSums()
    for record in records:
        total.add(record)
    return total


class MetricsLog:
    """Writes a run's metrics; on ranks that are not the writer it does nothing."""

    def __init__(self, folder: Path, *, tensorboard_dir: Path, is_writer: bool, resumed_iteration: int):
        self.path = folder / "metrics.jsonl"
        self.tensorboard = None
        if not is_writer:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._cut_after(resumed_iteration)
        self.tensorboard = SummaryWriter(str(tensorboard_dir), purge_step=resumed_iteration + 1)

    def _cut_after(self, iteration: int) -> None:
        """Drop what an interrupted run wrote beyond the iteration that this one resumes after; where this one begins
        again, all of it: it writes record 0 too."""
        if not self.path.exists():
            return
        records = [json.loads(line) for line in self.path.read_text().splitlines() if line.endswith("}")]
        kept = [json.dumps(record) + "\n" for record in records if record["iteration"] <= iteration > 0]
        partial = self.path.with_suffix(".tmp")
        partial.write_text("".join(kept))
        partial.rename(self.path)

    def log(self, iteration: int, metrics: dict[str, float], *, train_iters: int) -> None:
        """One object of metrics.jsonl, one TensorBoard step, one log line. JSON has no NaN: such a value is null."""
        if self.tensorboard is None:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        with self.path.open("a") as file:
            file.write(json.dumps({"iteration": iteration, **finite}) + "\n")
        for name, value in metrics.items():
            self.tensorboard.add_scalar(name, value, iteration)
        self.tensorboard.flush()
        logger.info("%s", iteration_line(iteration, train_iters, metrics))

    def close(self) -> None:
        if self.tensorboard is not None:
            self.tensorboard.close()


LINE = (
    ("policy/nll", "nll {:.3f}"),
    ("sft/held_out_nll", "held-out nll {:.3f}"),
    ("sft/tokens_per_s", "{:.0f} tokens/s"),
    ("rl/reward", "reward {:.3f}"),
    ("eval/greedy_accuracy", "held-out accuracy {:.3f}"),
    ("eval/sampled_accuracy", "sampled {:.3f}"),
    ("rollout/response_tokens_mean", "response len {:.1f}"),
    ("rollout/response_tokens_max", "max {:.0f}"),
    ("rollout/duration_s", "rollout {:.1f} s"),
    ("rollout/tail_s", "tail {:.1f} s"),
    ("policy/update_s", "update {:.1f} s"),
    ("weight_sync/push_s", "sync {:.1f} s"),
    ("rl/trained_groups", "groups {:.0f}"),
    ("policy/entropy", "entropy {:.2f}"),
    ("policy/policy_loss", "policy loss {:.2e}"),
    ("policy/logprob_diff_mean", "logprob diff {:.1e}"),
    ("policy/grad_norm", "grad norm {:.2f}"),
    ("policy/lr", "lr {:.1e}"),
)


def iteration_line(iteration: int, train_iters: int, metrics: dict[str, float]) -> str:
    """`iteration 12/200 | reward 0.412 | ...` in Megatron's form, of those metrics that are there."""
    parts = [text.format(metrics[name]) for name, text in LINE if name in metrics]
    return " | ".join([f"iteration {iteration}/{train_iters}", *parts])


def token_sums(**values: torch.Tensor) -> MetricSums:
    """Means over all entries of each of `values` [N]."""
    sums = {name: float(value.detach().double().sum()) for name, value in values.items()}
    return MetricSums(sums=sums, counts={name: float(value.numel()) for name, value in values.items()})
