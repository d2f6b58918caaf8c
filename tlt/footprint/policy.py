"""Bytes that the policy takes on one GPU: exact for weights, gradients and optimizer state, derived for activations.

Shapes: T packed tokens of a micro-batch, H hidden, F feed-forward width, V vocabulary; bytes of one rank.
"""

from dataclasses import dataclass
from math import prod

from tlt.config import ModelConfig, OptimizerConfig
from tlt.config.architecture import experts_of, head_dim
from tlt.rl.logprobs import ROWS_PER_CHUNK
from tlt.weight_sync.names import Weight, layout_of, query_groups, weight_table

FP32 = 4


@dataclass(frozen=True, kw_only=True)
class PolicyShards:
    """How the policy is spread over ranks."""

    hf_config: dict
    model: ModelConfig
    optimizer: OptimizerConfig
    dp_size: int

    @property
    def pp_size(self) -> int:
        return self.model.pipeline_model_parallel_size

    @property
    def tp_size(self) -> int:
        return self.model.tensor_model_parallel_size

    @property
    def ep_size(self) -> int:
        return self.model.expert_model_parallel_size

    @property
    def expert_dp_size(self) -> int:
        """Ranks of a stage that have the same experts."""
        return self.dp_size * self.tp_size // self.ep_size

    @property
    def item_bytes(self) -> int:
        """Of a weight or an activation."""
        return 2 if self.model.bf16 else FP32


def table_of(hf_config: dict) -> list[Weight]:
    """All parameters; their sizes do not depend on the layer implementation."""
    return weight_table(hf_config, transformer_engine=True)


def num_entries(weight: Weight) -> int:
    """Of the whole parameter."""
    return sum(prod(shape) for shape in weight.hf_shapes)


def num_parameters(hf_config: dict) -> int:
    """Of the whole model."""
    return sum(num_entries(weight) for weight in table_of(hf_config))


@dataclass(frozen=True, kw_only=True)
class StageParameters:
    """Entries of the parameters on each rank of a pipeline stage."""

    dense: int
    of_experts: int

    @property
    def total(self) -> int:
        return self.dense + self.of_experts


def stage_parameters(shards: PolicyShards, stage: int) -> StageParameters:
    """The last stage has a copy of a tied embedding."""
    layout = layout_of(shards.hf_config, pp_size=shards.pp_size, ep_size=shards.ep_size)
    table = table_of(shards.hf_config)
    own = [weight for weight in table if layout.stage(weight) == stage]
    has_tied_copy = table[-1].name != "output_layer.weight" and 0 < stage == shards.pp_size - 1
    own += [table[0]] if has_tied_copy else []
    dense = [weight for weight in own if weight.expert is None]
    return StageParameters(
        dense=sum(num_entries(each) // (1 if each.kind == "replicated" else shards.tp_size) for each in dense),
        of_experts=sum(num_entries(each) for each in own if layout.ep_rank(each) == 0),
    )


def weight_bytes(shards: PolicyShards, stage: int) -> int:
    return stage_parameters(shards, stage).total * shards.item_bytes


def gradient_bytes(shards: PolicyShards, stage: int) -> int:
    """One fp32 buffer; a distributed optimizer shards its reduction, not the buffer."""
    return stage_parameters(shards, stage).total * FP32


def save_bytes(shards: PolicyShards, stage: int) -> int:
    """Host memory that a save takes on the first data-parallel rank of a shard, where a distributed optimizer's state
    is gathered in fp32 (master weights, both moments), and copied while it is written, as the weights are."""
    own = stage_parameters(shards, stage).total
    if not shards.optimizer.use_distributed_optimizer:
        return own * shards.item_bytes
    whole, received = 3 * FP32, 2 * FP32  # of all three; of one, from each rank and laid together
    return max(own * (2 * whole + shards.item_bytes), own * (whole + received) + own * whole // shards.dp_size)


def optimizer_bytes(shards: PolicyShards, stage: int) -> int:
    """Both moments in fp32, and fp32 master weights of a bf16 model; a distributed optimizer has a part of each."""
    per_parameter = (3 if shards.model.bf16 else 2) * FP32
    own, is_shared = stage_parameters(shards, stage), shards.optimizer.use_distributed_optimizer
    shares = (shards.dp_size, shards.expert_dp_size) if is_shared else (1, 1)
    return per_parameter * sum(
        -(-part // share) for part, share in zip((own.dense, own.of_experts), shares, strict=True)
    )


def layer_token_bytes(shards: PolicyShards) -> float:
    """What one layer keeps of a token for its backward pass, without recomputation.

    Counted as in arXiv 2205.05198 for Megatron's code of this network, with an attention that keeps no matrix: input
    and output of both norms [H]; cosine and sine for query and key; query and key before and after rotation, value
    and attention output; gate and up projection, up again (an offset is added to it), the activated gate and its
    product with up [F]. Sequence parallelism shards the norms too. Experts: `expert_token_bytes`.
    """
    config, tp = shards.hf_config, shards.tp_size
    norms = 4 * config["hidden_size"] / (tp if shards.model.sequence_parallel else 1)
    tables = 4 * head_dim(config)
    attention = 3 * (config["num_attention_heads"] + query_groups(config)) * head_dim(config) / tp
    own = (norms + tables + attention) * shards.item_bytes
    if experts_of(config) is not None:
        return own + expert_token_bytes(shards)
    return own + 5 * config["intermediate_size"] / tp * shards.item_bytes


def expert_token_bytes(shards: PolicyShards) -> float:
    """The same of a layer's experts, if all get as many tokens: for each expert of the token its input [H], gate and
    up projection, up again, the activated gate, its product with up, and that weighted [F]; the router's logits, what
    it chose and where the token went."""
    experts = experts_of(shards.hf_config)
    chosen = experts.per_token * (shards.hf_config["hidden_size"] + 6 * experts.width)
    router = experts.num * (1 + shards.item_bytes)
    return chosen * shards.item_bytes + router


def activation_bytes(shards: PolicyShards, stage: int, *, num_tokens: int) -> int:
    """Of all micro-batches that the stage has in flight under Megatron's 1F1B schedule, the first stage the most.

    Full recomputation keeps the input of each layer, and one layer's activations at a time.
    """
    num_layers = shards.hf_config["num_hidden_layers"] // shards.pp_size
    in_flight = shards.pp_size - stage
    if shards.model.recompute_granularity == "full":
        entry = shards.hf_config["hidden_size"] / (shards.tp_size if shards.model.sequence_parallel else 1)
        kept = in_flight * num_layers * entry * shards.item_bytes + layer_token_bytes(shards)
    else:
        kept = in_flight * num_layers * layer_token_bytes(shards)
    return int(num_tokens * kept)


def logits_bytes(shards: PolicyShards, stage: int, *, num_tokens: int) -> int:
    """On the last stage: logits, their gradient in chunks and laid together, and three fp32 copies of one chunk."""
    if stage < shards.pp_size - 1:
        return 0
    width = shards.hf_config["vocab_size"] // shards.tp_size
    return 3 * width * (num_tokens * shards.item_bytes + min(num_tokens, ROWS_PER_CHUNK) * FP32)
