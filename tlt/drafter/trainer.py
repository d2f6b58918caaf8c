"""Trains an EAGLE head in short micro-steps that can stop at any time; data parallel over the ranks that are given.

Lifecycle, per optimizer step: 1. micro-steps, each a forward and backward over some pieces, gradients summed;
2. one all-reduce of gradients, loss sums and the wish to stop; 3. AdamW, average of weights. What stops between
micro-steps is taken up at the same optimizer step, so an interrupted training ends as one that was not. The policy is
read only: its embedding and output rows come from outside, in no optimizer and without a gradient.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from tlt.config.drafter import DrafterConfig
from tlt.drafter.batch import GOLDEN, DrafterBatch, micro_batches, pack, shuffled_steps
from tlt.drafter.losses import LossWeights, drafter_loss, target_distribution
from tlt.drafter.model import EagleHead
from tlt.drafter.unroll import Depth, unroll
from tlt.types import Piece

FIRST_MICRO_STEP_STARTS = 128
"""Until the first micro-step was timed."""
MIN_MICRO_STEP_STARTS = 16
"""Below this a micro-step's fixed costs prevail; an interruption waits for these at most."""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's names for them."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a drafter reads of its target: the policy's own memory or copies, never written to, without gradient."""

    embedding: torch.Tensor  # [V, H], of any dtype
    output_weight: torch.Tensor  # [V_draft, H] float32: rows of the LM head in the order of the head's draft_token_ids
    temperature: float
    """That responses are sampled at."""

    def __post_init__(self):
        for name in ("embedding", "output_weight"):
            object.__setattr__(self, name, getattr(self, name).detach())


def multiplies_in(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the hardware does; a CPU that does not emulates it, at a seventh of float32's speed."""
    if dtype != torch.bfloat16 or device.type != "cpu":
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class DrafterTrainer:
    """Owns a head in float32 and its optimizer; `group`: ranks that train together and make the same calls.

    `dtype` is that of matrix products: a head that drafts in bfloat16 reads such numbers anyway, and where the
    hardware multiplies in it a step is shorter; elsewhere they are float32. Weights, optimizer, sums over micro-steps
    and what follows the logits are float32. `is_trained`: the head is no random one, its weights belong into the
    average from the first step on.
    """

    def __init__(
        self, head: EagleHead, config: DrafterConfig, *, target: Target, seed: int,
        group: dist.ProcessGroup | None = None, dtype: torch.dtype = torch.float32, is_trained: bool = False,
    ):  # fmt: skip
        self.head = head.float().requires_grad_(True)
        self.config = config
        self.target = target
        self.seed = seed
        self.group = group
        self.is_trained = is_trained
        self.dtype = dtype if multiplies_in(dtype, target.output_weight.device) else torch.float32
        self.num_steps = 0
        self.num_passes = 0
        """The pass over all pieces that is under way."""
        self.num_steps_in_pass = 0
        self.micro_step_starts = FIRST_MICRO_STEP_STARTS
        self.lr_frac = 1.0
        """Of the configured learning rate, whatever the schedule."""
        self.parameters = dict(self.head.named_parameters())
        weights, views = laid_together(list(self.parameters.values()))
        for parameter, view in zip(self.parameters.values(), views, strict=True):
            parameter.data = view
        average, views = laid_together(views)
        self.average = dict(zip(self.parameters, views, strict=True))
        self.memory = [weights, average]
        """[N] each of all parameters' weights, average and, last, Adam's moments: what ranks make one of."""
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=config.lr, betas=(0.9, config.adam_beta2), weight_decay=config.weight_decay,
            fused=True,
        )  # fmt: skip
        self._fill_moments()
        self.loss_weights = LossWeights(
            cross_entropy=config.cross_entropy_weight, hidden=config.hidden_weight,
            total_variation=config.total_variation_weight,
        )  # fmt: skip

    def renew_target(self, target: Target) -> None:
        """The policy moved."""
        self.target = target

    def train(
        self, pieces: Sequence[Piece], *, progress: Callable[[], float],
        should_stop: Callable[[], bool] = lambda: False,
        on_step: Callable[[Mapping[str, float]], None] = lambda metrics: None, least_frac: float = 1.0,
    ) -> None:  # fmt: skip
        """Passes over all pieces until `progress()` reaches 1 or `should_stop()`.

        `progress` is the share done, which sets the learning rate; it is asked once before each optimizer step and
        must return the same on all ranks. Any rank may stop all: alone after a micro-step or its forward pass,
        dropping what the optimizer step had gathered, or making it of that where it is `least_frac` of the starts; in
        a group at the end of the optimizer step. Collective over the group.
        """
        if not any(piece.num_starts for piece in pieces):
            raise ValueError("there is nothing to train on: no response has two tokens")
        steps = self._steps(pieces)
        while (done := progress()) < 1:
            if self.group is None and should_stop():
                return
            metrics = self.step(
                next(steps), lr_scale=self.lr_scale(done), should_stop=should_stop, least_frac=least_frac
            )  # fmt: skip
            if not metrics:
                return
            self.num_steps_in_pass += 1
            on_step(metrics)
            if metrics["stop"]:
                return

    def _steps(self, pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
        """Pieces of one optimizer step after another, without end, from where the training stands."""
        while True:
            steps = shuffled_steps(
                pieces, starts_per_step=self.config.starts_per_step, seed=self.seed + self.num_passes
            )
            yield from itertools.islice(steps, self.num_steps_in_pass, None)
            self.num_passes, self.num_steps_in_pass = self.num_passes + 1, 0

    def lr_scale(self, done: float) -> float:
        """Linear warm-up, then cosine decay over the share done; `lr_frac` of it."""
        warmup = min((self.num_steps + 1) / max(self.config.warmup_steps, 1), 1.0)
        least = self.config.min_lr_frac
        return self.lr_frac * warmup * (least + (1 - least) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))

    def step(
        self, pieces: Sequence[Piece], *, lr_scale: float = 1.0, should_stop: Callable[[], bool] = lambda: False,
        least_frac: float = 1.0,
    ) -> dict[str, float]:  # fmt: skip
        """One optimizer step; means of its metrics. {} if stopped before `least_frac` of its starts were gathered:
        then nothing was changed.

        Raises FloatingPointError, and changes nothing, where a gradient is not finite; on all ranks of the group.
        Collective over the group; all ranks must call, with pieces of their own.
        """
        begin_s = time.perf_counter()
        sums: dict[str, torch.Tensor] = {}
        num_left, is_stopped = sum(piece.num_starts for piece in pieces), False
        most_left = (1 - least_frac) * num_left
        is_told = should_stop if self.group is None else lambda: False
        for micro in micro_batches(pieces, self.micro_step_starts):
            added = self.micro_step(micro, should_stop=is_told)
            for name, value in added.items():
                sums[name] = sums[name] + value if name in sums else value
            num_left -= sum(piece.num_starts for piece in micro) if added else 0
            is_stopped = not added or is_told()
            if is_stopped:
                break
        if is_stopped and num_left > most_left:
            self.optimizer.zero_grad(set_to_none=True)
            return {}
        sums["stop"] = torch.tensor(float(is_stopped or should_stop()))
        sums = self._reduce(sums)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.clip_grad)
        if not norm.isfinite():
            self.optimizer.zero_grad(set_to_none=True)
            raise FloatingPointError(f"the drafter's gradients are not finite in step {self.num_steps + 1}")
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * lr_scale
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.num_steps += 1
        self._average_weights()
        weight, stop = sums.pop("weight"), sums.pop("stop")
        return {
            **{name: value if name == "starts" else value / weight for name, value in sums.items()},
            "grad_norm": float(norm), "lr": self.config.lr * lr_scale, "stop": stop,
            "step_s": time.perf_counter() - begin_s,
        }  # fmt: skip

    def precision(self) -> torch.autocast:
        """Context of the head's passes."""
        device_type = self.target.output_weight.device.type
        return torch.autocast(device_type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def micro_step(
        self, pieces: Sequence[Piece], *, should_stop: Callable[[], bool] = lambda: False
    ) -> dict[str, torch.Tensor]:  # fmt: skip
        """Forward and backward over these pieces; gradients add up until `step` ends. Sums of the metrics; {} if
        stopped between the two: then these pieces count for nothing."""
        begin_s = time.perf_counter()
        batch = pack(
            pieces, num_depths=self.config.num_depths, reads=self.head.reads, device=self.target.output_weight.device
        )  # fmt: skip
        with self.precision():
            loss, sums = self.loss(batch)
        if should_stop():
            return {}
        loss.backward()
        self._adapt(len(batch.starts), time.perf_counter() - begin_s)
        return sums

    def loss(self, batch: DrafterBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(weighted sum over starts and depths, its parts): one read-out of all depths, the target's once."""
        depths = unroll(
            self.head, batch, self.target.embedding, num_depths=self.config.num_depths, deep=self._deep(batch)
        )
        rows = torch.cat([depth.rows for depth in depths])
        weights = batch.weights[rows] * self._depth_weights(depths)
        target = target_distribution(
            batch.target_hidden_states, self.target.output_weight, temperature=self.target.temperature
        )
        losses, parts = drafter_loss(
            torch.cat([depth.output for depth in depths]), batch.target_hidden_states[rows], target[rows],
            self.target.output_weight, temperature=self.target.temperature, weights=self.loss_weights,
        )  # fmt: skip
        loss = (losses * weights).sum()
        sums = {name: (part * weights).sum() for name, part in parts.items()}
        starts = torch.tensor(float(len(batch.starts)))
        return loss, {"loss": loss.detach(), "weight": weights.sum(), "starts": starts, **sums}

    def _depth_weights(self, depths: Sequence[Depth]) -> torch.Tensor:
        """A depth matters only if all before it stood."""
        weights = [self.config.depth_decay**index for index in range(len(depths))]
        counts = torch.tensor([len(depth.rows) for depth in depths])
        return torch.repeat_interleave(torch.tensor(weights), counts).to(depths[0].output.device)

    def _deep(self, batch: DrafterBatch) -> torch.Tensor | None:
        """[N] bool: starts to go on from, others in each pass; a function of the position and the pass."""
        if self.config.deep_frac == 1:
            return None
        position = batch.row_position_ids[batch.start_rows].double()
        return ((position + self.num_passes * 0.37) * GOLDEN) % 1.0 < self.config.deep_frac

    def _adapt(self, num_starts: int, seconds: float) -> None:
        """Size of the next micro-steps, by how long this one took; half way, since times scatter."""
        wanted = num_starts * self.config.micro_step_ms / 1e3 / seconds
        size = int((self.micro_step_starts + wanted) / 2)
        self.micro_step_starts = min(max(size, MIN_MICRO_STEP_STARTS), self.config.starts_per_step)

    def _reduce(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Sums over the group; gradients become those of the mean by weight. Collective over the group."""
        parameters = list(self.parameters.values())
        values = torch.stack([value.to(parameters[0]) for value in sums.values()])
        flat = torch.cat([*(parameter.grad.flatten() for parameter in parameters), values])
        if self.group is not None:
            dist.all_reduce(flat, group=self.group)
        *gradients, values = flat.split([*(parameter.numel() for parameter in parameters), len(values)])
        reduced = dict(zip(sums, values.tolist(), strict=True))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.view_as(parameter).div_(max(reduced["weight"], 1e-12))
        return reduced

    @torch.no_grad()
    def _average_weights(self) -> None:
        decay = self.config.ema_decay
        if not self.is_trained:  # at first the average forgets faster: it must not hold on to random weights
            decay = min(decay, self.num_steps / (self.num_steps + 10))
        torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), 1 - decay)

    def _fill_moments(self) -> None:
        """Adam's state as before its first step, where it has none, and its moments in one piece of memory each."""
        states = [self.optimizer.state[parameter] for parameter in self.parameters.values()]
        for parameter, state in zip(self.parameters.values(), states, strict=True):
            if not state:
                state["step"] = torch.zeros((), device=parameter.device)
                state |= {name: torch.zeros_like(parameter) for name in MOMENTS}
        del self.memory[2:]
        for name in MOMENTS:
            flat, views = laid_together([state[name] for state in states])
            self.memory.append(flat)
            for state, view in zip(states, views, strict=True):
                state[name] = view

    @torch.no_grad()
    def begin_from(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Train these weights, which become their own running average, with an optimizer that has made no step."""
        for own in (self.parameters, self.average):
            take_over(own, tensors)
        for moments in self.memory[2:]:
            moments.zero_()
        self.set_steps(0, num_passes=self.num_passes)

    def set_steps(self, num_steps: int, *, num_passes: int) -> None:
        """Stand at the beginning of a pass, after so many optimizer steps."""
        self.num_steps, self.num_passes, self.num_steps_in_pass = num_steps, num_passes, 0
        for parameter in self.parameters.values():
            self.optimizer.state[parameter]["step"].fill_(num_steps)

    def published(self) -> dict[str, torch.Tensor]:
        """Weights to draft with, under the names of the head's parameters: the average, in memory of its own."""
        return {name: tensor.clone() for name, tensor in self.average.items()}

    def state_dict(self) -> dict:
        """Head, average, optimizer and counters: what a resumed training needs. The policy's weights are not in it."""
        return {
            "head": {name: parameter.detach() for name, parameter in self.parameters.items()},
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "counters": [self.num_steps, self.num_passes, self.num_steps_in_pass, self.micro_step_starts],
            "seed": self.seed,
            "lr_frac": self.lr_frac,
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping) -> None:
        """Take the place of what is held."""
        for own, found in ((self.parameters, state["head"]), (self.average, state["average"])):
            if set(own) != set(found):
                raise ValueError(f"the drafter's checkpoint holds {sorted(found)}, the head has {sorted(own)}")
            take_over(own, found)
        self.optimizer.load_state_dict(state["optimizer"])
        self._fill_moments()
        self.num_steps, self.num_passes, self.num_steps_in_pass, self.micro_step_starts = state["counters"]
        self.seed = state["seed"]
        self.lr_frac = state.get("lr_frac", 1.0)  # older checkpoints have none


def laid_together(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """([N] a copy of all in one piece of memory, views of it in their shapes)."""
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
    parts = flat.split([tensor.numel() for tensor in tensors])
    return flat, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


@torch.no_grad()
def take_over(own: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> None:
    """Copy into each of a head's own tensors what is found under its name."""
    for name, tensor in own.items():
        tensor.copy_(found[name])
