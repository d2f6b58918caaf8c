"""What a run takes of each GPU, phase by phase, before it has one: --dry-run prints it and refuses what does not fit.

An estimate. Exact are parameters, gradients, optimizer state and the KV cache; activations and logits are derived from
the network; RESERVE stands for all that is not computed.
"""

from dataclasses import dataclass, replace

from tlt.config import RolloutConfig, RunConfig, require
from tlt.footprint import policy
from tlt.footprint.engine import Drafters, EngineFootprint, engine_footprint

GIB = 2**30
RESERVE = 4 * GIB
"""Of a GPU: CUDA context, NCCL's buffers, workspaces, captured graphs, fragmentation. Assumed, not measured."""
PHASES = ("update", "rollout", "weight sync")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: bytes in each of PHASES."""

    name: str
    num_bytes: tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Of the fullest rank."""

    rows: tuple[Row, ...]
    engine: EngineFootprint
    context: int
    """Tokens of the longest sequence."""
    device_bytes: int | None
    """Of one GPU; None means ranks on CPUs, whose memory is shared and not compared."""
    host_bytes: int
    """Host memory that one rank takes for what it moves off the GPU, hidden states and past responses."""
    save_bytes: int
    """Host memory beyond it, while a checkpoint is saved, on the first data-parallel rank of the fullest shard."""
    ranks_per_node: int
    cache_flags: str
    """That decide how many tokens the KV cache has room for."""

    @property
    def totals(self) -> tuple[int, ...]:
        return tuple(sum(row.num_bytes[phase] for row in self.rows) for phase in range(len(PHASES)))

    def __str__(self) -> str:
        of_what = "of memory a rank" if self.device_bytes is None else f"of a GPU of {gib(self.device_bytes)}"
        lines = [f"| GiB {of_what} | {' | '.join(PHASES)} |", "|---|---|---|---|"]
        for row in (*self.rows, Row(name="total", num_bytes=self.totals)):
            lines.append(f"| {row.name} | {' | '.join(map(gib, row.num_bytes))} |")
        full = self.engine.kv_tokens / self.context
        lines += [
            f"KV cache of a rank: {self.engine.kv_tokens} tokens, {full:.1f} sequences of {self.context}",
            f"host memory: {gib(self.host_bytes)} GiB a rank, {gib(self.host_bytes * self.ranks_per_node)} a node; "
            f"a save: {gib(self.save_bytes)} GiB more on the first data-parallel rank of each shard",
        ]
        return "\n".join(lines)

    def require_fit(self) -> None:
        """Raises ValueError naming what to change where a phase does not fit the GPU, or no sequence the KV cache."""
        require(
            self.engine.kv_tokens >= self.context,
            f"KV cache ({self.cache_flags}; or a smaller --rollout-max-model-len)",
            f"{self.engine.kv_tokens} tokens",
            f"at least one sequence of {self.context} tokens",
        )
        if self.device_bytes is None:
            return
        for phase, total in enumerate(self.totals):
            largest = max(self.rows, key=lambda row: row.num_bytes[phase])
            require(
                total <= self.device_bytes,
                f"memory of a GPU in the phase {PHASES[phase]!r}",
                f"{gib(total)} GiB, {gib(largest.num_bytes[phase])} of them {largest.name}",
                f"at most --dry-run-gpu-gib ({gib(self.device_bytes)}); {ADVICE[phase]}",
            )


ADVICE = (
    "more ranks, a larger --tensor-model-parallel-size or --pipeline-model-parallel-size, "
    "--use-distributed-optimizer, --sequence-parallel or --recompute-granularity full need less",
    *["a smaller --rollout-gpu-memory-utilization or a larger --tensor-model-parallel-size needs less"] * 2,
)
"""For each of PHASES."""


def gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f}"


def cache_flags(rollout: RolloutConfig, *, on_gpu: bool) -> str:
    """Those that size the KV cache of a rank; the number of its blocks goes before memory."""
    if rollout.num_gpu_blocks_override is not None:
        return "--rollout-num-gpu-blocks-override"
    memory = "--rollout-gpu-memory-utilization" if on_gpu else "--rollout-kv-cache-gib"
    return f"{memory}, --rollout-tensor-parallel-size"


def footprint(
    config: RunConfig, hf_config: dict, drafters: Drafters, *, world_size: int, ranks_per_node: int,
    device_bytes: int | None,
) -> Footprint:  # fmt: skip
    """The fullest pipeline stage in an iteration, with sequences as long as flags allow."""
    model = config.model
    model_ranks = model.tensor_model_parallel_size * model.pipeline_model_parallel_size
    shards = policy.PolicyShards(
        hf_config=hf_config, model=model, optimizer=config.optimizer, dp_size=world_size // model_ranks
    )
    context = config.rollout.max_model_len or hf_config["max_position_embeddings"]
    engine = engine_footprint(
        hf_config, config.rollout, drafters, item_bytes=shards.item_bytes, device_bytes=device_bytes
    )
    found = Footprint(
        rows=(), engine=engine, context=context, device_bytes=device_bytes, host_bytes=0, save_bytes=0,
        ranks_per_node=ranks_per_node, cache_flags=cache_flags(config.rollout, on_gpu=device_bytes is not None),
    )  # fmt: skip
    stages = [stage_rows(config, shards, found, stage) for stage in range(shards.pp_size)]
    stage = max(range(shards.pp_size), key=lambda stage: max(replace(found, rows=stages[stage]).totals))
    moved = policy.optimizer_bytes(shards, stage) if device_bytes is not None else 0
    kept = (config.spec.hidden_states_mib + config.spec.history_mib) * 2**20
    copied = drafters.copied_rows * hf_config["hidden_size"] * shards.item_bytes
    return replace(
        found, rows=stages[stage], host_bytes=moved + kept + copied, save_bytes=policy.save_bytes(shards, stage)
    )  # fmt: skip


def stage_rows(config: RunConfig, shards: policy.PolicyShards, found: Footprint, stage: int) -> tuple[Row, ...]:
    """Of the ranks of one pipeline stage. A GPU gives gradients and optimizer state up outside of the update, and the
    engine's memory during it; on a CPU everything stays."""
    model, engine = config.model, found.engine
    num_tokens = max(model.max_tokens_per_micro_batch, found.context)
    on_gpu = found.device_bytes is not None
    weights, gradients, optimizer = (
        size(shards, stage) for size in (policy.weight_bytes, policy.gradient_bytes, policy.optimizer_bytes)
    )
    layout = f"tensor {shards.tp_size}, pipeline {shards.pp_size} (stage {stage}), data {shards.dp_size}"
    activations = policy.activation_bytes(shards, stage, num_tokens=num_tokens)
    logits = policy.logits_bytes(shards, stage, num_tokens=num_tokens)
    gathered = sync_bytes(shards, rollout_tp_size=config.rollout.tensor_parallel_size)

    def always(name: str, num_bytes: int) -> Row:
        return Row(name=name, num_bytes=(num_bytes,) * 3)

    def training(name: str, num_bytes: int) -> Row:
        return Row(name=name, num_bytes=(num_bytes, *(0 if on_gpu else num_bytes,) * 2))

    def serving(name: str, num_bytes: int) -> Row:
        return Row(name=name, num_bytes=(0 if on_gpu else num_bytes, num_bytes, num_bytes))

    rows = (
        always(f"policy, {layout}", weights),
        always("reference policy", weights if config.rl.kl_coef > 0 else 0),
        training("gradients (fp32)", gradients),
        training("optimizer state", optimizer),
        Row(name=f"activations of {num_tokens} tokens", num_bytes=(activations, 0, 0)),
        Row(name="logits and their gradients", num_bytes=(logits, 0, 0)),
        serving(f"engine's weights, tensor {config.rollout.tensor_parallel_size}", engine.weights),
        serving("engine's KV cache", engine.kv_cache),
        Row(name="engine's largest step", num_bytes=(0, engine.step, 0)),
        # Not vLLM's, so its sleep leaves them where they are.
        always(
            "drafters: weights, states and keys of cached tokens, probabilities",
            engine.drafter_weights + engine.token_pool + engine.draft_probs,
        ),
        always("drafter's trainer", engine.drafter_trainer),
        Row(name="drafter's step in a tail", num_bytes=(0, engine.drafter_step, 0)),
        Row(name="gathered weights", num_bytes=(0, 0, gathered)),
        always("reserve (assumed)", RESERVE if on_gpu else 0),
    )
    return tuple(row for row in rows if any(row.num_bytes))


def sync_bytes(shards: policy.PolicyShards, *, rollout_tp_size: int) -> int:
    """The largest full tensor twice, and the embedding's part that is kept until it is compared with the engine's; of
    other weights a few columns are."""
    sizes = [policy.num_entries(weight) for weight in policy.table_of(shards.hf_config)]
    return shards.item_bytes * (2 * max(sizes) + sizes[0] // rollout_tp_size)
