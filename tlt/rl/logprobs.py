"""Log-probabilities of the distribution that was sampled from, over a vocabulary sharded by tensor parallelism.

Shapes: T rows of logits, V vocabulary, V_tp this rank's shard of it.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

ROWS_PER_CHUNK = 1024
"""Rows whose fp32 logits exist at a time: bounds memory at 1024 x V x 4 bytes."""


@dataclass(frozen=True, kw_only=True)
class LogprobOutputs:
    logprobs: torch.Tensor  # [T] float32, of the target tokens
    entropy: torch.Tensor  # [T] float32, nats
    max_prob: torch.Tensor  # [T] float32, no gradient: ceiling of a one-hot draft's acceptance


def vocab_parallel_logprobs(
    logits: torch.Tensor,  # [T, V_tp]
    targets: torch.Tensor,  # [T]
    *,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
    group: dist.ProcessGroup | None = None,
) -> LogprobOutputs:
    """Log-softmax of logits / temperature at the targets, in fp32; differentiable in logprobs and entropy.

    With top_k or top_p it is the truncated, renormalised distribution, in the engine's order (temperature, top-k,
    top-p). The kept set is taken from these logits and always includes the target: the engine sampled it from its own
    logits, and rounding may put a token at the boundary just outside here, where its logprob would be minus infinity.
    Rank r of `group` holds vocabulary rows [r V_tp, (r + 1) V_tp); None means that logits are whole.
    Collective over `group`; all ranks must call.
    """
    parts = [
        _LogprobsOfChunk.apply(rows, ids, temperature, top_p, top_k, group)
        for rows, ids in zip(logits.split(ROWS_PER_CHUNK), targets.split(ROWS_PER_CHUNK), strict=True)
    ]
    logprobs, entropy, max_prob = (torch.cat(column) for column in zip(*parts, strict=True))
    return LogprobOutputs(logprobs=logprobs, entropy=entropy, max_prob=max_prob)


class _LogprobsOfChunk(torch.autograd.Function):
    """d logprob / d logits = (1[target] - p) / temperature; d entropy / d logits = -p (log p + entropy) / temperature.

    Both also hold for the truncated distribution, whose p is 0 outside the kept set. Only the logits are kept for the
    backward pass; fp32 probabilities are made again.
    """

    @staticmethod
    def forward(ctx, logits, targets, temperature, top_p, top_k, group):
        logprobs_TV = _log_softmax(logits, targets, temperature, top_p, top_k, group)
        local, is_local = _local_targets(targets, logits.shape[1], group)
        picked = logprobs_TV.gather(1, local[:, None]).squeeze(1)
        logprobs = _all_reduce(torch.where(is_local, picked, torch.zeros_like(picked)), group)
        probs_TV = logprobs_TV.exp()
        entropy = _all_reduce(-(probs_TV * _finite(logprobs_TV)).sum(1), group)
        max_prob = _all_reduce(probs_TV.max(1).values, group, dist.ReduceOp.MAX)
        ctx.save_for_backward(logits, targets, entropy)
        ctx.settings = (temperature, top_p, top_k, group)
        ctx.mark_non_differentiable(max_prob)
        return logprobs, entropy, max_prob

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy, _grad_max_prob):
        logits, targets, entropy = ctx.saved_tensors
        temperature, top_p, top_k, group = ctx.settings
        logprobs_TV = _log_softmax(logits, targets, temperature, top_p, top_k, group)
        if bool((grad_entropy != 0).any()):
            probs_TV = logprobs_TV.exp()
            slope_TV = _finite(logprobs_TV).add_(entropy[:, None]).mul_(grad_entropy[:, None])
            grad_TV = slope_TV.add_(grad_logprobs[:, None]).mul_(probs_TV).neg_()
        else:
            grad_TV = logprobs_TV.exp_().mul_(-grad_logprobs[:, None])
        local, is_local = _local_targets(targets, logits.shape[1], group)
        grad_TV.scatter_add_(1, local[:, None], (grad_logprobs * is_local)[:, None])
        if temperature != 1.0:
            grad_TV.div_(temperature)
        return grad_TV.to(logits.dtype), None, None, None, None, None


def _log_softmax(logits, targets, temperature, top_p, top_k, group) -> torch.Tensor:
    """This rank's columns of the processed distribution's log-probabilities, [T, V_tp] float32."""
    scaled = logits.to(torch.float32, copy=True)
    if temperature != 1.0:
        scaled.div_(temperature)
    if top_k > 0 or top_p < 1.0:
        kept = _kept_tokens(_gather_vocabulary(scaled, group), top_p, top_k)
        kept.scatter_(1, targets[:, None], True)
        begin = _shard_begin(logits.shape[1], group)
        scaled.masked_fill_(~kept[:, begin : begin + logits.shape[1]], float("-inf"))
    largest = _all_reduce(scaled.max(1).values, group, dist.ReduceOp.MAX)
    scaled.sub_(largest[:, None])
    total = _all_reduce(scaled.exp().sum(1), group)
    return scaled.sub_(total.log()[:, None])


def _finite(logprobs_TV: torch.Tensor) -> torch.Tensor:
    """A copy with minus infinity (tokens outside the kept set, whose probability is 0) made finite: 0 x inf is NaN."""
    return logprobs_TV.clamp(min=torch.finfo(torch.float32).min)


def _kept_tokens(logits_TV: torch.Tensor, top_p: float, top_k: int) -> torch.Tensor:
    """[T, V] bool: top-k first (ties with the k-th stay), then the smallest set of at least top_p of what is left."""
    ascending, order = logits_TV.sort(dim=1)
    dropped = torch.zeros_like(ascending, dtype=torch.bool)
    if 0 < top_k < logits_TV.shape[1]:
        dropped = ascending < ascending[:, -top_k, None]
    if top_p < 1.0:
        mass = ascending.masked_fill(dropped, float("-inf")).softmax(1).cumsum(1)
        dropped = dropped | (mass <= 1 - top_p)
        dropped[:, -1] = False
    return torch.zeros_like(dropped).scatter_(1, order, ~dropped)


def _shard_begin(shard_size: int, group: dist.ProcessGroup | None) -> int:
    return 0 if group is None else dist.get_rank(group) * shard_size


def _local_targets(targets, shard_size, group) -> tuple[torch.Tensor, torch.Tensor]:
    """Column of each target in this shard (0 where it is in another one), and whether it is in this one."""
    local = targets - _shard_begin(shard_size, group)
    is_local = (local >= 0) & (local < shard_size)
    return local.where(is_local, torch.zeros_like(local)), is_local


def _all_reduce(values: torch.Tensor, group, op=dist.ReduceOp.SUM) -> torch.Tensor:
    if group is not None and values.numel():
        dist.all_reduce(values, op=op, group=group)
    return values


def _gather_vocabulary(logits: torch.Tensor, group) -> torch.Tensor:
    if group is None:
        return logits
    shards = [torch.empty_like(logits) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shards, logits.contiguous(), group=group)
    return torch.cat(shards, dim=1)
