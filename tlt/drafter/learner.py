"""A head that follows its policy: trained between meetings of ranks, averaged at them, judged against the live one."""

from collections.abc import Callable, Mapping, Sequence

import torch

from tlt.config.drafter import DrafterConfig
from tlt.drafter.batch import micro_batches, pack, whole
from tlt.drafter.losses import readout, target_distribution
from tlt.drafter.model import EagleHead
from tlt.drafter.trainer import DrafterTrainer, Target, take_over
from tlt.drafter.unroll import unroll
from tlt.types import HiddenStateSample, Piece

STARTS_PER_PACK = 512
"""Judged together where ranks wait for it: a pass over few rows costs nearly what one over many does."""
POSITIONS_PER_PACK = 16384
"""At most, that give keys to what is judged together: of a long response each stretch needs all before it."""

LEAST_FRAC = 0.5
"""Of an optimizer step's starts that it is made of where no more were gathered when the tail ended: a tail has few
steps, and fewer starts are no good estimate of a gradient that counts as a whole step."""


LEAST_LR_FRAC = 1 / 8
"""Of the given learning rate, below which training that went wrong is not tried."""


class HeadLearner:
    """`head` drafts already; `target()` gives the policy's embedding [V, H] and the output rows [V_draft, H] that
    drafts are read out with, as they are now."""

    def __init__(
        self, head: EagleHead, config: DrafterConfig, *, target: Callable[[], tuple[torch.Tensor, torch.Tensor]],
        temperature: float, seed: int,
    ):  # fmt: skip
        self.target = target
        self.temperature = temperature
        own = self._target()
        self.trainer = DrafterTrainer(
            head.to(own.output_weight.device), config, target=own, seed=seed, dtype=own.embedding.dtype,
            is_trained=True,
        )  # fmt: skip

    def _target(self) -> Target:
        embedding, output_weight = self.target()
        # An engine's tensors are inference tensors, which autograd may not keep: the rows are copied.
        return Target(
            embedding=embedding, output_weight=output_weight.to(torch.float32, copy=True), temperature=self.temperature
        )  # fmt: skip

    def train(
        self, samples: Sequence[HiddenStateSample], *, should_stop: Callable[[], bool], on_step: Callable[[], None]
    ) -> None:
        """Passes over the samples until `should_stop()`, asked twice in a micro-step; `on_step` is called after each
        optimizer step, the last of which may be of half its starts. Returns at once where no sample is long enough."""
        pieces = [piece for piece in map(whole, samples) if piece.num_starts > 0]
        if not pieces:
            return
        self.trainer.renew_target(self._target())
        self.trainer.train(
            pieces, progress=lambda: 0.0, should_stop=should_stop, on_step=lambda metrics: on_step(),
            least_frac=LEAST_FRAC,
        )  # fmt: skip

    @torch.no_grad()
    def average(
        self, sum_in_place: Callable[[torch.Tensor], None],
        gather: Callable[[list[int]], list[list[int]]], *, weight: float,
    ) -> None:  # fmt: skip
        """Weights, their running average and Adam's moments become the mean over ranks; this rank's count `weight`,
        all together 1. Steps are counted on from the most that any of them made: whoever trains next goes on with a
        warm optimizer. What is trained on changes, so the pass is over.

        Collective over the ranks that `sum_in_place` sums over and `gather` hears.
        """
        trainer = self.trainer
        for tensor in trainer.memory:
            if weight > 0:
                tensor.mul_(weight)
            else:
                tensor.zero_()  # a rank that counts for nothing may hold anything, NaN included
            sum_in_place(tensor)
        counts = [trainer.num_steps, trainer.num_passes] if weight > 0 else [0, 0]
        num_steps, num_passes = map(max, zip(*gather(counts), strict=True))
        trainer.set_steps(num_steps, num_passes=num_passes + 1)

    @torch.no_grad()
    def score(
        self, pieces: Sequence[Piece], tensors: Mapping[str, torch.Tensor], *,
        should_stop: Callable[[], bool] | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """[P] float64: accepted tokens that sampled drafts of these weights are expected to have, summed over the
        drafts that begin at each piece's starts (the sum over depths of the product of 1 - TV(p, q)).

        `should_stop` is asked at first, and after about as many starts each time as a micro-step has; if it says so,
        only the first pieces are scored.
        """
        if not pieces or (should_stop is not None and should_stop()):
            return torch.zeros(0, dtype=torch.float64)
        size = STARTS_PER_PACK if should_stop is None else self.trainer.micro_step_starts
        size = max(size, *(piece.num_starts for piece in pieces))  # none is cut
        self.trainer.renew_target(self._target())
        own = {name: parameter.clone() for name, parameter in self.trainer.parameters.items()}
        take_over(self.trainer.parameters, tensors)
        expected: list[float] = []
        for each in micro_batches(pieces, size, max_positions=POSITIONS_PER_PACK):
            expected += self._expected_of_pack(each)
            if should_stop is not None and should_stop():
                break
        take_over(self.trainer.parameters, own)
        return torch.tensor(expected, dtype=torch.float64)

    def _expected_of_pack(self, pieces: Sequence[Piece]) -> list[float]:
        """Of drafts of the present weights that begin at each piece's starts."""
        target, num_depths = self.trainer.target, self.trainer.config.num_depths
        reads = self.trainer.head.reads
        batch = pack(pieces, num_depths=num_depths, reads=reads, device=target.output_weight.device)
        stands = torch.ones(len(batch.starts))
        totals = torch.zeros(len(pieces), dtype=torch.float64)
        owner = torch.arange(len(pieces)).repeat_interleave(torch.tensor(batch.num_starts))
        with self.trainer.precision():
            target_probs = target_distribution(
                batch.target_hidden_states, target.output_weight, temperature=self.temperature
            ).probs
            for depth in unroll(self.trainer.head, batch, target.embedding, num_depths=num_depths):
                draft_probs = readout(depth.output, target.output_weight, temperature=self.temperature).softmax(1)
                starts = depth.starts.cpu()
                stands[starts] *= torch.minimum(target_probs[depth.rows], draft_probs).sum(1).cpu()
                totals.index_add_(0, owner[starts], stands[starts].double())
        return totals.tolist()

    def published(self) -> dict[str, torch.Tensor]:
        """Weights to draft with."""
        return self.trainer.published()

    def begin_from(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Train these weights anew: no average, moment or warm-up of others is left."""
        self.trainer.begin_from(tensors)

    def slow_down(self) -> bool:
        """Halve the learning rate from now on; False, and nothing changes, where that would be too little."""
        is_possible = self.trainer.lr_frac / 2 >= LEAST_LR_FRAC
        if is_possible:
            self.trainer.lr_frac /= 2
        return is_possible

    def state_dict(self) -> dict:
        """Weights, running average, optimizer and counters."""
        return self.trainer.state_dict()

    def load_state_dict(self, state: Mapping) -> None:
        """Take the place of what is held. The seed is kept: it tells ranks apart, all of which load one rank's."""
        self.trainer.load_state_dict({**state, "seed": self.trainer.seed})
