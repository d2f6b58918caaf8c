"""Iterations of a simulated run: prompts are placed, rollouts decoded, what was learned of lengths and heads goes on.

Placement, expected lengths, moves and the decision to train are the product's own classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tlt.drafter.history import SuffixHistory
from tlt.rollout.outlook import Outlook
from tlt.rollout.placement import longest_first, place_groups
from tlt.simulation.drafter_quality import DrafterQuality
from tlt.simulation.lengths import Lengths
from tlt.simulation.moves import KnownLengths, Moves, NoMoves
from tlt.simulation.replica import Request
from tlt.simulation.rollout import NoTraining, Outcome, TailTraining, roll_out
from tlt.simulation.step_table import StepTable
from tlt.spot.opportunity import SwitchCost
from tlt.types import Prompt, rollout_name

SHARE_STEPS = 25
"""Tables are made for so many qualities of a head."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is generated in each iteration."""

    num_groups: int
    group_size: int
    lengths: Lengths
    longest: int
    """Response tokens at most."""
    num_prompt_tokens: int
    are_prompts_known: bool = False
    """The same prompts come again in each iteration, so that the history knows how long their responses are."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a run is simulated with."""

    workload: Workload
    num_replicas: int
    strategy: str
    consolidation: str = "off"
    """`off`, `on` (lengths as the history expects them), or `known` (true lengths: a bound)."""
    training: bool = False
    switch_s: float = 0.0
    """Seconds between a rank's last response and its first optimizer step: the shortest tail that is used."""
    meeting_s: float = 0.0
    """That averaging, judging and loading a trained head add to an iteration."""
    history_mib: int = 64


@dataclass(frozen=True, kw_only=True)
class Iteration:
    """What came of one."""

    rollout: Outcome
    share: float
    """Of the head's acceptance, when it began."""
    has_met: bool
    """A training was averaged and judged."""


def simulate(
    setting: Setting, tables: Callable[[float], StepTable], *, iterations: int, seed: int,
    quality: DrafterQuality | None = None,
) -> list[Iteration]:  # fmt: skip
    """`tables` gives the replicas' table for a share of the heads' acceptance. Equal seeds give equal lengths whatever
    else the setting says. One rollout more comes first, which fills the history and is not returned."""
    quality = quality or DrafterQuality(stands=(0.0,), loss=0.0, recovery_rank_s=1.0)
    workload, found = setting.workload, []
    history = SuffixHistory(setting.history_mib * 2**20)
    effects = workload.lengths.effects(np.random.default_rng(seed), workload.num_groups)
    for number in range(iterations + 1):
        rng = np.random.default_rng([seed, number])
        if not workload.are_prompts_known:
            effects = workload.lengths.effects(rng, workload.num_groups)
        lengths = workload.lengths.draw(rng, effects, group_size=workload.group_size, longest=workload.longest)
        prompts = make_prompts(workload, iteration=0 if workload.are_prompts_known else number)
        if number > 0:
            share = round(quality.share * SHARE_STEPS) / SHARE_STEPS
            outcome = one_rollout(setting, tables(share), prompts, lengths, history, is_due=quality.is_due)
            train_s = sum(outcome.train_s)
            quality.trained(train_s, meeting_frac=setting.meeting_s / max(outcome.duration_s, 1e-9))
            found.append(Iteration(rollout=outcome, share=quality.share, has_met=train_s > 0))
            quality.policy_updated()
        for prompt, row in zip(prompts, lengths, strict=True):
            for length in row.tolist():
                history.add(prompt.problem_key, np.zeros(length, dtype=np.int32), policy_version=number)
    return found


def make_prompts(workload: Workload, *, iteration: int) -> list[Prompt]:
    """Of which only names matter."""
    return [
        Prompt(prompt_id=f"{iteration}-{group}", source="", token_ids=(iteration, group), text="", answer={})
        for group in range(workload.num_groups)
    ]


def one_rollout(
    setting: Setting, table: StepTable, prompts: Sequence[Prompt], lengths: np.ndarray, history: SuffixHistory, *,
    is_due: bool,
) -> Outcome:  # fmt: skip
    """Of `lengths` [G, S]. Raises RuntimeError where tokens got lost, which would be a defect of the model."""
    outlook = Outlook(history, tell=lambda seconds: None)
    outlook.begin(prompts, max_response_tokens=setting.workload.longest)
    expected = [history.expected_length(prompt.problem_key) for prompt in prompts]
    replicas = place_groups(expected, setting.num_replicas)
    requests: list[list[Request]] = [[] for _ in range(setting.num_replicas)]
    for group in longest_first(expected):
        own = requests[replicas[group]]
        for sample, length in enumerate(lengths[group].tolist()):
            # A group's first response reads its prompt, the others find it cached.
            num_read = setting.workload.num_prompt_tokens if sample == 0 else 0
            name = rollout_name(prompts[group].prompt_id, sample)
            own.append(
                Request(
                    name=name, num_prompt_tokens=setting.workload.num_prompt_tokens, length=length, num_unread=num_read
                )
            )  # fmt: skip
    moves = {
        "off": NoMoves, "on": lambda: Moves(outlook),
        "known": lambda: Moves(KnownLengths({one.name: one.length for own in requests for one in own})),
    }[setting.consolidation]()  # fmt: skip
    switch = SwitchCost()
    switch.observe(setting.switch_s)
    training = TailTraining(outlook, switch) if setting.training and is_due else NoTraining()
    outcome = roll_out(table, requests, moves=moves, training=training)
    if (outcome.num_tokens, outcome.num_requests) != (lengths.sum(), lengths.size):
        raise RuntimeError(f"{lengths.size} responses of {lengths.sum()} tokens began, {outcome} ended")
    return outcome
