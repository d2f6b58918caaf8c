"""Records that flow along the arrows of docs/architecture.md; every stage takes one of them and returns the next.

Shapes: S tokens of one sequence (prompt and response), R tokens of one response, T packed tokens of a micro-batch, N
response tokens among them.
"""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One problem, tokenised; equal on all ranks."""

    prompt_id: str
    """Names one drawing of the problem: a problem that comes again has another id."""
    source: str
    """Name of the data source it was drawn from; the reward function is chosen by it."""
    token_ids: tuple[int, ...]
    text: str
    """The question as asked, before the chat template."""
    answer: dict
    """What the reward function of `source` needs to score a response; JSON types only."""

    @cached_property
    def problem_key(self) -> str:
        """The same whenever the same tokens are asked: what is remembered of a problem is kept under it."""
        return hashlib.sha256(np.array(self.token_ids, dtype=np.int32).tobytes()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """The distribution that response tokens are drawn from; old, current and reference logprobs are of the same
    one."""

    temperature: float
    """Divides the logits; 0 means greedy (evaluation only)."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all tokens."""
    max_response_tokens: int
    ignore_eos: bool = False
    is_learned_from: bool = True
    """Whether a drafter may be trained on such responses."""


def rollout_name(prompt_id: str, sample_index: int) -> str:
    """Of one response of a prompt; what requests, drafts and hidden states are told apart by."""
    return f"{prompt_id}#{sample_index}"


def prompt_id_of(name: str) -> str:
    """Prompt of a rollout's name."""
    return name.rpartition("#")[0]


def drawn_prompt_id(number: int, prompt_id: str) -> str:
    """Of a prompt that a run draws, by its number among all that it draws, from 1 on."""
    return f"{number}:{prompt_id}"


def draw_number(prompt_id: str) -> int | None:
    """The number; None where the prompt was not drawn by a run."""
    number = prompt_id.partition(":")[0]
    return int(number) if number.isdecimal() else None


@dataclass(frozen=True, kw_only=True)
class SpecStrategy:
    """How one engine step's drafts are made; equal on all ranks of a replica."""

    method: str
    """Name of the drafter, or `off`."""
    num_draft_tokens: int

    def __str__(self) -> str:
        return self.method if self.num_draft_tokens == 0 else f"{self.method}:{self.num_draft_tokens}"


OFF = SpecStrategy(method="off", num_draft_tokens=0)


LAST, AUX = "last_hidden_states", "aux_hidden_states"
"""Fields of a HiddenStateSample of which a drafter reads one; what an engine keeps of each token has their names."""


@dataclass(frozen=True, kw_only=True)
class HiddenStateSample:
    """The target's hidden states over one sequence: training data of a drafter. S tokens, H hidden."""

    request_id: str
    token_ids: torch.Tensor  # [S] int32, CPU: prompt, then response
    num_prompt_tokens: int
    last_hidden_states: torch.Tensor  # [S - 1, H] engine dtype, CPU: after the final norm, at the first S - 1 tokens
    policy_version: int
    aux_hidden_states: torch.Tensor | None = None  # [S - 1, 3 H]: of three layers; None where no drafter reads them

    @property
    def num_starts(self) -> int:
        """Positions at which an engine would begin a draft whose first token is known."""
        return max(len(self.token_ids) - 1 - max(self.num_prompt_tokens, 1), 0)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Starts first, first + step, ... before `end` of one sample. Pieces of a sample need not be trained together:
    gradients add up."""

    sample: HiddenStateSample
    first: int
    end: int
    step: int = 1
    weights: torch.Tensor | None = None  # [S] of the loss by the position that a draft is read at; None: all 1

    @property
    def starts(self) -> range:
        return range(self.first, self.end, self.step)

    @property
    def num_starts(self) -> int:
        return len(self.starts)


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One response of a prompt, as the engine sampled it."""

    token_ids: tuple[int, ...]  # [R], the end-of-sequence token included where one was sampled
    logprobs: tuple[float, ...]  # [R], natural log, of the processed distribution (temperature, top-p, top-k)
    text: str
    finish_reason: str
    """`stop` (end of sequence) or `length` (cut at the response limit or the context length)."""
    policy_version: int
    """Version of the weights that every token of the response was sampled with."""
    entropies: tuple[float, ...] = ()  # [R], nats, of the same distribution as logprobs; empty where not recorded
    max_probs: tuple[float, ...] = ()  # [R], largest probability: bounds a one-hot draft's acceptance
    sample_index: int = 0
    """Place in its group."""
    replica: int = 0
    """Where it ended."""
    drafter_version: int = -1
    """Version of the learned drafter when the response ended; -1 without one."""
    num_drafts: int = 0
    """Verifications of this response that had draft tokens."""
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class RolloutGroup:
    """The rollouts of one prompt (the group of GRPO), in the order of their sample index; out of an engine, those of
    them that ended there."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    rewards: tuple[float, ...] | None = None
    """One per rollout; None until scored."""

    @property
    def is_equal(self) -> bool:
        """All rewards are the same, so every advantage is 0. RuntimeError for a group that is not scored."""
        if self.rewards is None:
            raise RuntimeError(f"group {self.prompt.prompt_id} is not scored")
        return min(self.rewards) == max(self.rewards)


@dataclass(frozen=True, kw_only=True)
class TrainSequence:
    """One rollout as the policy trainer sees it."""

    token_ids: tuple[int, ...]  # [S] prompt, then response
    num_prompt_tokens: int
    advantage: float
    rollout_logprobs: tuple[float, ...]  # [R]
    loss_weight: float
    """Weight of each response token's loss; the weights of one optimizer step make its loss a sum over tokens, so it
    does not depend on packing, micro-batches or the data-parallel split (see `rl/train_batch.py`)."""

    @property
    def num_response_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens


@dataclass(frozen=True, kw_only=True)
class TrainBatch:
    """All sequences of one iteration; equal on all ranks."""

    optimizer_steps: tuple[tuple[TrainSequence, ...], ...]
    """Sequences of each optimizer step, in order."""
    policy_version: int
    """Version that sampled every rollout of the batch."""
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(kw_only=True)
class PackedMicroBatch:
    """Sequences laid end to end. Fields of length N have one entry per response token, in the order of the pack."""

    token_ids: torch.Tensor  # [T] int64
    position_ids: torch.Tensor  # [T] int64, restarts at 0 with each sequence
    cu_seqlens: torch.Tensor  # [B + 1] int32, CPU; where each sequence begins, and T
    predicting: torch.Tensor  # [N] int64: position in the pack whose logits predict the response token
    targets: torch.Tensor  # [N] int64: the response token
    loss_weights: torch.Tensor  # [N] float32
    advantages: torch.Tensor  # [N] float32
    rollout_logprobs: torch.Tensor  # [N] float32
    old_logprobs: torch.Tensor | None = None  # [N] float32, by the policy before the iteration's first optimizer step
    ref_logprobs: torch.Tensor | None = None  # [N] float32


@dataclass(frozen=True, kw_only=True)
class TailReport:
    """What one rank did with the time between its own last response and the world's."""

    train_s: float = 0.0
    """Trained its drafter."""
    num_steps: int = 0
    """Optimizer steps."""
    did_train: bool = False
    """Its trainer began; all may have ended before its first optimizer step."""
    has_failed: bool = False
    """Its trainer raised, now or before."""
    expected_s: float = 0.0
    """Seconds that the tail was expected to last when it began; 0 where nothing was known."""
    was_too_short: bool = False
    """It was never expected to last long enough for one optimizer step."""
    back_s: float = 0.0
    """Wall-clock second at which it was where all ranks meet; 0 where it never left."""


@dataclass(kw_only=True)
class EngineStats:
    """What one call of `RolloutEngine.generate` did on this rank."""

    num_engine_steps: int = 0
    num_response_tokens: int = 0
    rollout_s: float = 0.0
    num_preemptions: int = 0
    num_adopted: int = 0
    """Responses that were begun on another replica."""
    running_requests: list[int] = field(default_factory=list)
    """Requests that ran in each engine step."""
    step_s: list[float] = field(default_factory=list)
    """Seconds of each engine step."""
    step_begin_s: list[float] = field(default_factory=list)
    """Wall-clock second at which each engine step began."""
    step_drafts: list[int] = field(default_factory=list)
    """Drafts that each engine step verified."""
    step_accepted: list[int] = field(default_factory=list)
    """Draft tokens that stood in each engine step."""
    acceptance: dict = field(default_factory=dict)
    """`AcceptanceStats` (tlt/spec/acceptance.py) of each drafter, by name."""
    plan_s: float = 0.0
    """Seconds spent on deciding who drafts."""
    speculative_step_s: float = 0.0
    """Seconds of engine steps that verified drafts, their drafting included."""
    num_strategy_switches: int = 0
    num_unsound_samples: int = 0
    """Responses since the run began whose hidden states were not finite: the drafter is not trained on them."""
    hidden_state_bytes: int = 0
    """Held for the drafter's training."""
    num_roll_backs: int = 0
    """Drafters withdrawn because their acceptance collapsed."""
    drafter_version: int = -1
