"""Idle ranks train the drafter: each on its own until the last replica is done, then all weights become one.

Between two meetings of all ranks, which every rollout has anyway, a rank trains alone on the hidden states of its own
replica's responses (local SGD: Stich, arXiv 1805.09767); at the meeting the weights are averaged, each counting its
optimizer steps. So no collective runs while anyone decodes, membership needs no agreement, ranks may join at any time,
and one that is drained, slow or broken holds no one up: it is back within one micro-step, or counts for nothing.
Whether a tail is used at all, tlt/spot/opportunity.py decides.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from tlt.config import SpotConfig
from tlt.drafter.batch import GOLDEN, stretches
from tlt.parallel import Parallel
from tlt.protocols import DrafterLearner, RolloutEngine
from tlt.spot.board import TailBoard
from tlt.spot.judgement import NO_JUDGES, Judges, judgement, judgement_sums
from tlt.spot.opportunity import GainRecord, SwitchCost
from tlt.spot.rank_state import Event, Rank, RankState
from tlt.trace import Trace
from tlt.types import HiddenStateSample, TailReport, draw_number, prompt_id_of

logger = logging.getLogger(__name__)

LOOK_S = 0.05
"""Seconds between two looks at the board of an idle rank that finds the tail too short."""
LEAST_JUDGES = 4
"""Responses, of which ever fewer say ever less about their own scatter."""
STRETCH, STRETCH_STEP = 32, 2
"""Drafts that judge near each other, since each stretch needs the keys before it, and how far apart they begin: as
many that are neighbours say less, twice as many little more (docs/spot.md)."""


class NoSpotTraining:
    """Idle ranks wait."""

    def begin(self) -> None:
        """Nothing to prepare."""

    def use_tail(self) -> TailReport:
        """Nothing is done."""
        return TailReport()

    def publish(self) -> dict[str, float]:
        """Nothing is published."""
        return {}

    def state_dict(self) -> dict:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: Mapping) -> None:
        """The head of --spec-drafter drafts, whatever a run before made of it."""


def is_held_out(sample: HiddenStateSample, *, every: int) -> bool:
    """Whether a response is of one in `every` prompts that no head is trained on, so that it may judge them: a
    function of the prompt's name, the same wherever and whenever asked. Siblings share much text: all of them judge or
    none. Of so many prompts that a run draws in a row exactly one judges, or an iteration of few would often have no
    judge; a rank of few may have none all the same, or nothing else."""
    prompt_id = prompt_id_of(sample.request_id)
    number = draw_number(prompt_id)
    if number is not None:
        row, place = divmod(number - 1, every)
        return place == int((row + 1) * GOLDEN % 1 * every)  # no place judges more often than others
    digest = hashlib.sha256(prompt_id.encode()).digest()
    return int.from_bytes(digest[:4], "little") % every == 0


class SpotTraining:
    """Of one rank. `learner` is the head's trainer, the same weights on all ranks whenever they meet."""

    def __init__(
        self, learner: DrafterLearner, engine: RolloutEngine, board: TailBoard, parallel: Parallel, *,
        config: SpotConfig, is_stopped: Callable[[], bool], trace: Trace,
    ):  # fmt: skip
        self.learner = learner
        self.engine = engine
        self.board = board
        self.parallel = parallel
        self.config = config
        self.is_stopped = is_stopped
        self.trace = trace
        self.rank = Rank()
        self.has_failed = False
        self.num_steps = 0
        self.train_s = 0.0
        """Both since the last meeting that averaged."""
        self.gains = GainRecord(min_gain_frac=config.min_gain)
        self.switch = SwitchCost()
        self.meeting_s = 0.0
        """Seconds of the last meeting that averaged; 0 before the first."""
        self.begin_s = 0.0
        self.judges = NO_JUDGES
        """Of this rank, at the next meeting."""
        self.first = engine.drafter_tensors() if config.compare_first == "on" else None
        """Weights of the head that the run was given."""

    def begin(self) -> None:
        """A rollout of the world begins."""
        self.begin_s = time.perf_counter()
        self.judges = NO_JUDGES
        self.rank.on(Event.NEXT_ROLLOUT)
        self.board.begin()

    def use_tail(self) -> TailReport:
        """This rank's replica is done: train until the others' are. Returns within one micro-step of that, or at once
        where there is nothing to train on or training is not due; the rank then waits where ranks meet."""
        self.rank.on(Event.OWN_ROLLOUT_ENDED)
        self.board.ended()
        expected_s, num_before, train_s = self.board.remaining_s() or 0.0, self.num_steps, 0.0
        did_train = was_too_short = False
        if not self.has_failed and self.gains.is_due(self.engine.policy_version) and not self._is_over():
            was_too_short = not self._opens()
            begin_s = time.perf_counter()
            if was_too_short:
                self.switch.skipped()
            else:
                did_train = self._train(begin_s)
            if self.num_steps > num_before:
                train_s = time.perf_counter() - begin_s
        self.train_s += train_s
        report = TailReport(
            train_s=train_s, num_steps=max(self.num_steps - num_before, 0), did_train=did_train,
            has_failed=self.has_failed, back_s=time.time(), expected_s=expected_s, was_too_short=was_too_short,
        )  # fmt: skip
        self.rank.on(Event.LEFT_TAIL)
        return report

    def _opens(self) -> bool:
        """Wait until the tail is expected to last for one optimizer step; False if it ends before."""
        while not self._is_over():
            if self.switch.fits(self.board.remaining_s()):
                return True
            time.sleep(LOOK_S)
        return False

    def _train(self, begin_s: float) -> bool:
        """Until all have ended; whether there was anything to train on."""
        samples = self._samples(self.engine.training_samples(seed=self.engine.policy_version), are_held_out=False)
        if not samples:
            return False
        self.rank.on(Event.TRAINING_BEGAN)
        num_before = self.num_steps

        def count() -> None:
            self.num_steps += 1
            self.trace.point("drafter_step")
            if self.num_steps == num_before + 1:
                self.switch.observe(time.perf_counter() - begin_s)
                self.judges = self._judges(should_stop=self._is_over)

        try:
            with self.trace.span("spot_training", num_samples=len(samples)):
                self.learner.train(samples, should_stop=self._is_over, on_step=count)
        except Exception:
            # The one place where a failure is survived: speculation is never needed for a right result.
            logger.exception("training of the drafter failed on rank %d; it goes on without", self.parallel.rank)
            self.has_failed = True
            self.num_steps = 0
            self.judges = NO_JUDGES
        if self.num_steps == num_before:
            self.switch.observe_none(time.perf_counter() - begin_s)
        self.rank.on(Event.TRAINER_RAISED if self.has_failed else Event.TRAINING_ENDED)
        return True

    def _samples(self, samples: Sequence[HiddenStateSample], *, are_held_out: bool) -> list[HiddenStateSample]:
        """Those that are young enough, and that judge or do not."""
        oldest = self.engine.policy_version - self.config.max_age
        every = self.config.held_out_every
        return [
            sample for sample in samples
            if sample.policy_version >= oldest and is_held_out(sample, every=every) == are_held_out
        ]  # fmt: skip

    def _judges(self, *, should_stop: Callable[[], bool] | None = None) -> Judges:
        """Stretches of what no head was trained on, with the scores of the weights that draft; those that were scored
        before `should_stop()`."""
        held_out = self._samples(self.engine.hidden_state_samples(), are_held_out=True)
        pieces = stretches(
            held_out, size=STRETCH, num_starts=self.config.judge_starts, seed=self.engine.policy_version,
            step=STRETCH_STEP,
        )  # fmt: skip
        if not pieces:
            return NO_JUDGES
        live = self.learner.score(pieces, self.engine.drafter_tensors(), should_stop=should_stop)
        pieces = pieces[: len(live)]
        first = live[:0] if self.first is None else self.learner.score(pieces, self.first, should_stop=should_stop)
        return Judges(pieces=pieces, live=live, first=first, drafter_version=self.engine.drafter_version)

    def _is_over(self) -> bool:
        return self.board.all_ended() or self.is_stopped()

    def publish(self) -> dict[str, float]:
        """Make one head of all ranks' and let it draft if it is measurably better than the one that does.

        Collective over all ranks; all must call, after they met."""
        assert self.rank.state is RankState.BACK, "the rank still trains"
        self._agree_on_live()
        rollout_s = time.perf_counter() - self.begin_s
        if self.judges.drafter_version != self.engine.drafter_version:
            self.judges = NO_JUDGES
        own = [
            self.num_steps, self.has_failed, self.train_s, self.meeting_s, rollout_s, self.judges.num_starts,
            self.judges.num_responses,
        ]  # fmt: skip
        total = self.parallel.sum(torch.tensor([float(value) for value in own], dtype=torch.float64)).tolist()
        num_steps, num_failed, train_s, meeting_s, rollout_s, num_starts, num_judges = total  # the same on all ranks
        metrics = {
            "spot/steps": num_steps, "spot/failed_ranks": num_failed, "spot/published": 0.0,
            "spot/due": float(self.gains.is_due(self.engine.policy_version)),
        }  # fmt: skip
        if num_steps < self.config.min_steps:
            return metrics
        begin_s = time.perf_counter()
        with self.trace.span("spot_publish"):
            metrics |= self._meet(
                num_steps, train_s, cost_frac=meeting_s / rollout_s if meeting_s > 0 else None,
                are_enough=num_starts >= self.config.judge_starts and num_judges >= LEAST_JUDGES,
            )  # fmt: skip
        self.meeting_s = time.perf_counter() - begin_s
        self.num_steps, self.train_s = 0, 0.0
        return metrics

    def _agree_on_live(self) -> None:
        """One head drafts on all ranks: where a replica withdrew one on its own, and is a version ahead, all do.

        Collective over all ranks; all must call."""
        versions = self.parallel.all_gather_objects(self.engine.drafter_version)
        highest = max(versions)
        if min(versions) == highest:
            return
        is_teller = self.parallel.rank == versions.index(highest)
        live = {}
        for name, tensor in self.engine.drafter_tensors().items():
            told = tensor.float() if is_teller else torch.zeros(tensor.shape)
            live[name] = self.parallel.sum(told).to(tensor.dtype)
        if self.engine.drafter_version != highest:
            self.engine.load_drafter(live, drafter_version=highest)
        self.gains.withdrawn()
        logger.warning("a drafter was withdrawn by %d of %d ranks, now by all", versions.count(highest), len(versions))

    def _meet(
        self, num_steps: float, train_s: float, *, cost_frac: float | None, are_enough: bool
    ) -> dict[str, float]:  # fmt: skip
        """Average, judge and load; the sums are those of all ranks. Those judge who had time for it in their tail, and
        unless these are enough, all."""
        self.learner.average(
            self.parallel.sum_in_place, self.parallel.all_gather_objects, weight=self.num_steps / num_steps
        )  # fmt: skip
        if not (are_enough or self.judges.num_starts):
            self.judges = self._judges()
        candidate = self.learner.published()
        scores = self.judges.scores(self.learner.score(self.judges.pieces, candidate))
        judged = judgement(self.parallel.sum(judgement_sums(scores)))
        if judged is None:
            return {}
        version = self.engine.policy_version
        metrics = self.gains.count(judged, policy_version=version, cost_frac=cost_frac, num_steps=num_steps)
        if self.first is not None:
            expected, drafts = self.parallel.sum(self.judges.first_sums()).tolist()
            metrics |= {"spot/first_score": expected / drafts} if drafts else {}
        if train_s > 0:
            metrics["spot/gain_per_idle_s"] = metrics["spot/added_gain"] / train_s
        if judged.is_better:
            self.engine.load_drafter(candidate, drafter_version=self.engine.drafter_version + 1)
            self.gains.published(judged, policy_version=version)
            metrics["spot/published"] = 1.0
        elif judged.is_worse:
            self.learner.begin_from(self.engine.drafter_tensors())  # a training that went wrong is not gone on with
            self.gains.begun_anew()
            if self.learner.slow_down():
                logger.info("training made the drafter worse: it begins anew, at half the learning rate")
                self.gains.tried_anew()
        return metrics

    def state_dict(self) -> dict:
        """The head that drafts, what trainings gained, and its trainer unless that has failed: it may hold anything
        then, NaN included."""
        state = {
            "live": self.engine.drafter_tensors(), "version": self.engine.drafter_version,
            "gains": self.gains.state_dict(), "meeting_s": self.meeting_s,
        }  # fmt: skip
        return state if self.has_failed else state | {"learner": self.learner.state_dict()}

    def load_state_dict(self, state: Mapping) -> None:
        """Draft and train on with another run's head; {} leaves the head of --spec-drafter. Raises ValueError where
        it is of another shape. All ranks must call with the same state: then all hold the same weights."""
        if not state:
            return
        self.engine.load_drafter(state["live"], drafter_version=state["version"])
        if "gains" in state:  # older checkpoints have none
            self.gains.load_state_dict(state["gains"])
            self.meeting_s = state["meeting_s"]
        if "learner" in state:
            self.learner.load_state_dict(state["learner"])
        else:
            self.learner.begin_from(state["live"])
            self.gains.begun_anew()
        logger.info("the drafter goes on as version %d", state["version"])
