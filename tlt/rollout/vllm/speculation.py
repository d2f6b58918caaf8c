"""All of an engine's speculation: what it drafts with, what is chosen for each step, and what is watched."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tlt.config.spec import SpecConfig
from tlt.drafter.buffer import HiddenStateBuffer
from tlt.drafter.history import SuffixHistory
from tlt.drafter.model import EagleHead, load_head
from tlt.drafter.router import SUFFIX, DraftRouter
from tlt.rollout.vllm.drafting import Agree, Drafting, EngineDrafter, NoHiddenStates, request_name
from tlt.rollout.vllm.learned_drafter import LearnedDrafter
from tlt.rollout.vllm.ledger import DraftLedger, Proposal
from tlt.rollout.vllm.lookup_drafter import LookupDrafter
from tlt.rollout.vllm.routing import AdaptiveRouting
from tlt.rollout.vllm.suffix_drafter import SuffixDrafter, compile_kernels
from tlt.rollout.vllm.target_weights import EMBEDDING, WeightCopies, not_at_hand, output_name, read_weight
from tlt.rollout.vllm.token_pool import TokenPool
from tlt.spec.controller import Controller
from tlt.spec.draft_kind import kind_choice
from tlt.spec.policy import parse_policy
from tlt.spec.strategy import ADAPTIVE, HEADS, DecodeStep, StrategyPolicy
from tlt.spec.watchdog import Watchdog
from tlt.types import AUX, LAST, EngineStats, HiddenStateSample, Prompt

logger = logging.getLogger(__name__)

LEARNED = HEADS[0]
NO_DRAFTER = "the engine was built without a learned drafter (--spec-drafter)"


@dataclass(frozen=True, kw_only=True)
class SpecPlan:
    """Everything about speculation that is read and checked before an engine exists."""

    config: SpecConfig
    policy: StrategyPolicy
    methods: frozenset[str]
    """Of all strategies that the policy may choose."""
    heads: Mapping[str, EagleHead]
    """Learned drafters by name."""
    tp_size: int = 1
    """Ranks of a replica."""
    aux_layers: tuple[int, ...] = ()
    """That the engine keeps hidden states of, besides the last one (tlt/drafter/aux_layers.py)."""
    is_trained: bool = False
    """Whether the first head goes on learning in this process."""

    @property
    def max_draft_tokens(self) -> int:
        """0 leaves vLLM without any code of speculation; hidden states alone are recorded through the same seam."""
        return max(self.policy.max_draft_tokens, int(self.config.hidden_states_mib > 0))

    def kept_states(self) -> dict[str, int]:
        """Hidden states that are kept of every token, by name: of how many layers. {} if no one reads any."""
        names = {head.reads for head in self.heads.values()}
        if self.config.hidden_states_mib > 0:
            names |= {LAST, AUX}  # the last one gives the distribution that a drafter is trained for
        return {
            name: count for name, count in ((LAST, 1), (AUX, len(self.aux_layers))) if name in names and count > 0
        }  # fmt: skip


def read_spec_plan(
    config: SpecConfig, *, target_config: dict, dtype: torch.dtype, tp_size: int, is_trained: bool = False
) -> SpecPlan:  # fmt: skip
    """Raises ValueError naming the flag. `target_config` is the policy's config.json."""
    policy, strategies = parse_policy(
        config.strategy, "--spec-strategy", max_running_requests=config.max_running_requests
    )
    methods = frozenset(strategy.method for strategy in strategies)
    folders = config.drafter or ()
    if len(folders) > len(HEADS):
        raise ValueError(f"--spec-drafter takes at most {len(HEADS)} directories, got {len(folders)}")
    heads = {
        name: load_head(Path(folder), flag="--spec-drafter", target_config=target_config, dtype=dtype)
        for name, folder in zip(HEADS, folders, strict=False)
    }
    if heads and dtype == torch.float32 and torch.cuda.is_available():
        raise ValueError("--spec-drafter: on a GPU heads attend in 16 bits (FlashAttention), got --no-bf16")
    missing = sorted(methods.intersection(HEADS).difference(heads))
    if missing:
        raise ValueError(
            f"--spec-strategy {config.strategy} needs --spec-drafter, a directory for each of its heads: "
            f"{len(heads)} given, without {', '.join(missing)}"
        )
    if heads and config.drafts == "sampled" and tp_size > 1:
        raise ValueError(
            "--spec-drafts sampled needs --rollout-tensor-parallel-size 1: ranks round differently; coupled does not"
        )
    layers = sorted({head.aux_layers for head in heads.values()} - {()})
    if len(layers) > 1:
        raise ValueError(f"--spec-drafter: heads that read three layers must read the same ones, got {layers}")
    return SpecPlan(
        config=config, policy=policy, methods=methods, heads=heads, tp_size=tp_size,
        aux_layers=layers[0] if layers else (), is_trained=is_trained,
    )  # fmt: skip


class NoSpeculation:
    """Nothing is drafted and nothing recorded: vLLM runs as if no code of speculation were here."""

    drafter_version = -1

    def __init__(self) -> None:
        self.ledger = DraftLedger()

    def begin(self, prompts: Sequence[Prompt]) -> None:
        """Nothing to count."""

    def before_step(self, num_running: int) -> None:
        """Nothing to choose."""

    def after_step(self, seconds: float) -> None:
        """Nothing to watch."""

    def finished(
        self, name: str, token_ids: list[int], *, num_prompt_tokens: int, policy_version: int, is_learned_from: bool
    ) -> None:
        """Nothing to keep."""

    def load_drafter(self, tensors: Mapping[str, torch.Tensor], *, version: int) -> None:
        """Refuses: there is none."""
        raise RuntimeError(NO_DRAFTER)

    def drafter_tensors(self) -> dict[str, torch.Tensor]:
        """Refuses: there is none."""
        raise RuntimeError(NO_DRAFTER)

    def drafter_target(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Refuses: there is none."""
        raise RuntimeError(NO_DRAFTER)

    def hidden_state_samples(self) -> list[HiddenStateSample]:
        """None are kept."""
        return []

    def training_samples(self, *, seed: int) -> list[HiddenStateSample]:
        """None are kept."""
        return []

    def renew_target(self, name: str, tensor: torch.Tensor) -> None:
        """No copies of the target's weights."""

    def report(self, stats: EngineStats) -> None:
        """Nothing to report."""

    def state_dict(self) -> dict:
        """Nothing was learned."""
        return {}

    def load_state_dict(self, state: Mapping) -> None:
        """Nothing to go on with: a run may be resumed without speculation."""


class Speculation:
    """Of one engine that may draft."""

    def __init__(
        self, plan: SpecPlan, runner: Any, scheduler: Any, *, agree: Agree, hf_model: str, history: SuffixHistory
    ):
        self.strategy = plan.config.strategy
        self.is_trained = plan.is_trained
        self.runner = runner
        self.controller = Controller(plan.policy, agree=agree)
        self.on_step: Callable[[DecodeStep], None] = lambda step: None
        """Called after each step that only decoded: for whoever records a run."""
        self.ledger = DraftLedger()
        self.buffer = HiddenStateBuffer(plan.config.hidden_states_mib * 2**20)
        self.watchdog = Watchdog(collapse_frac=plan.config.collapse_frac)
        kept = plan.kept_states()
        pool = TokenPool(runner, kept) if kept else NoHiddenStates()
        if AUX in kept:
            runner.use_aux_hidden_state_outputs = True
            runner.get_model().set_aux_hidden_state_layers(plan.aux_layers)
            if runner.compilation_config.cudagraph_mode.has_full_cudagraphs():
                capture_again(runner)
        self.suffix = SuffixDrafter(runner, history)
        if plan.methods & {SUFFIX, ADAPTIVE}:
            compile_kernels()
        drafters: dict[str, EngineDrafter] = {"prompt_lookup": LookupDrafter(runner), SUFFIX: self.suffix}
        self.heads = {
            name: LearnedDrafter(
                head, runner, pool, name=name, kinds=kind_choice(plan.config.drafts, tp_size=plan.tp_size)
            )
            for name, head in plan.heads.items()
        }
        self.learned = self.heads.get(LEARNED)
        """The head that follows the policy: it is swapped and watched."""
        drafters |= self.heads
        for learned in self.heads.values():
            if learned.head.draft_token_ids is not None:
                name = output_name(runner.get_model())
                learned.renew_output(name, read_weight(Path(hf_model), name))
        missing: set[str] = set()
        if plan.is_trained and self.learned is not None:
            reads_output = self.learned.head.draft_token_ids is None
            missing = not_at_hand(
                output_name(runner.get_model()), tp_size=plan.tp_size, on_cpu=runner.device.type == "cpu",
                reads_output=reads_output,
            )  # fmt: skip
        self.copies = WeightCopies(Path(hf_model), missing, dtype=runner.model_config.dtype)
        self.drafting = Drafting(
            runner, scheduler, drafters=drafters, ledger=self.ledger, pool=pool, agree=agree,
            max_draft_tokens=runner.num_spec_tokens,
        )  # fmt: skip
        self.router = DraftRouter(list(self.heads), max_draft_tokens=runner.num_spec_tokens)
        self.routing = AdaptiveRouting(self.router, self.suffix, list(self.heads.values()), agree=agree)
        self.drafting.router = self.routing
        self.ledger.on_verified = self.routing.verified
        self.ledger.on_compared = self._compared
        for name, learned in self.heads.items():
            learned.on_pass = partial(self.controller.costs.observe_pass, name)
        self.begin([])

    def begin(self, prompts: Sequence[Prompt]) -> None:
        """A rollout of these prompts begins: statistics start anew, what was learned of them stays."""
        self.ledger.begin()
        self.suffix.begin(prompts)
        self.router.begin({prompt.prompt_id: prompt.source for prompt in prompts})
        self._switches = self._roll_backs = 0
        self._speculative_s = self._draft_s = 0.0
        self._counted = (0, 0)
        self._had_drafts = False

    def before_step(self, num_running: int) -> None:
        """Choose what is drafted at the end of the next engine step."""
        strategy, self.routing.prices = self.controller.choose(
            num_running,
            num_planned=self.router.num_planned,
            max_draft_tokens=num_running * self.router.max_draft_tokens,
        )
        self._verified = self.drafting.strategy
        self._switches += strategy != self.drafting.strategy
        self.drafting.strategy = strategy
        self._had_drafts = bool(self.ledger.proposals)

    def after_step(self, seconds: float) -> None:
        """Watch the acceptance of the step that ended."""
        self._speculative_s += seconds * self._had_drafts
        if self.drafting.num_tokens:  # nothing but decoding
            verified = self.ledger.step
            step = DecodeStep(
                strategy=self._verified, num_running=self.drafting.num_rows, drafted=tuple(verified.drafted),
                accepted=tuple(verified.accepted), draft_s=self._draft_s, verify_s=seconds - self.drafting.draft_s,
            )  # fmt: skip
            self.controller.observe(step)
            self.on_step(step)
        self._draft_s = self.drafting.draft_s
        if self.learned is None:
            return
        stats = self.ledger.stats[LEARNED]
        drafted, accepted = sum(stats.drafted), sum(stats.accepted)
        if self.watchdog.count(drafted - self._counted[0], accepted - self._counted[1]):
            self._roll_backs += 1
            bad = self.learned.version
            self.learned.roll_back()
            self.router.drafter_changed(LEARNED)
            logger.error(
                "drafter version %d was withdrawn: accepted at %.3f against %.3f before; the one before it drafts "
                "again, as version %d", bad, self.watchdog.num_accepted / self.watchdog.num_drafted,
                self.watchdog.baseline, self.learned.version,
            )  # fmt: skip
            self.watchdog.withdrawn()
        self._counted = (drafted, accepted)

    @property
    def policy(self) -> StrategyPolicy:
        """Chooses for each step; may be replaced between two of them."""
        return self.controller.policy

    @policy.setter
    def policy(self, policy: StrategyPolicy) -> None:
        self.controller.policy = policy

    def finished(
        self, name: str, token_ids: list[int], *, num_prompt_tokens: int, policy_version: int, is_learned_from: bool
    ) -> None:
        """Keep a response that just ended: its text for its siblings, its hidden states while its blocks hold them."""
        self.suffix.finished(name, token_ids)
        if not self.buffer.is_open or not is_learned_from:
            return
        rows = self.runner.input_batch.req_id_to_index
        (row,) = (row for request_id, row in rows.items() if request_name(self.runner, request_id) == name)
        self.buffer.add(
            HiddenStateSample(
                request_id=name,
                token_ids=torch.tensor(token_ids, dtype=torch.int32),
                num_prompt_tokens=num_prompt_tokens,
                policy_version=policy_version,
                **self.drafting.pool.read(row, len(token_ids) - 1),
            )
        )

    def _compared(self, proposal: Proposal, rates: dict[str, float], num_positions: int) -> None:
        self.heads[proposal.drafter].kinds.observe(proposal.temperature, rates, num_positions)

    def load_drafter(self, tensors: Mapping[str, torch.Tensor], *, version: int) -> None:
        """Swap the learned drafter's weights, between two engine steps, while requests run or not."""
        if self.learned is None:
            raise RuntimeError(NO_DRAFTER)
        self.learned.load(tensors, version=version)
        self.watchdog.drafter_changed()
        self.router.drafter_changed(LEARNED)

    def renew_target(self, name: str, tensor: torch.Tensor) -> None:
        """A weight of the target was replaced; copies of it follow."""
        self.copies.renew(name, tensor)
        for learned in self.heads.values():
            learned.renew_output(name, tensor)

    def drafter_tensors(self) -> dict[str, torch.Tensor]:
        """Copies of the weights of the head that follows the policy. RuntimeError without one."""
        if self.learned is None:
            raise RuntimeError(NO_DRAFTER)
        return {name: parameter.detach().cpu().clone() for name, parameter in self.learned.head.named_parameters()}

    def drafter_target(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(embedding, output rows) that the head drafts with: the engine's memory or copies, the first perhaps on the
        host. RuntimeError unless the engine was built for a head that is trained."""
        if not self.is_trained or self.learned is None:
            raise RuntimeError("the engine was not built for a head that is trained")
        embedding, output = (self._target_weight(name) for name in (EMBEDDING, output_name(self.runner.get_model())))
        rows = output if self.learned.output_weight is None else self.learned.output_weight
        return embedding, rows.to(self.runner.device)

    def _target_weight(self, name: str) -> torch.Tensor:
        """[V, H] under a Hugging Face name."""
        if name in self.copies.tensors:
            return self.copies.tensors[name]
        model = self.runner.get_model()
        layer = model.model.embed_tokens if name == EMBEDDING else model.lm_head
        return layer.weight[: model.config.vocab_size]  # vLLM pads the vocabulary

    def hidden_state_samples(self) -> list[HiddenStateSample]:
        """Of finished responses, oldest first."""
        return list(self.buffer)

    def training_samples(self, *, seed: int) -> list[HiddenStateSample]:
        """Of the newest policy, and what they lack in length from the one before it."""
        return self.buffer.training_samples(seed=seed)

    @property
    def drafter_version(self) -> int:
        return -1 if self.learned is None else self.learned.version

    def state_dict(self) -> dict:
        """Prices, calibrations and what the policy learned: JSON types."""
        return {
            "strategy": self.strategy,
            "policy": self.policy.state_dict(),
            "costs": self.controller.costs.state_dict(),
            "router": self.router.state_dict(),
        }

    def load_state_dict(self, state: Mapping) -> None:
        """Go on with what a run learned; {} for nothing. All ranks must call with the same state.

        Prices and calibrations hold for any strategy, what a policy learned only for the same --spec-strategy."""
        if not state:
            return
        self.router.load_state_dict(state["router"])
        self.controller.costs.load_state_dict(state["costs"])
        if state["strategy"] == self.strategy:
            self.policy.load_state_dict(state["policy"])
        logger.info("speculation goes on with what it learned under --spec-strategy %s", state["strategy"])

    def report(self, stats: EngineStats) -> None:
        """Write what this rollout's speculation did into its statistics."""
        stats.acceptance = dict(self.ledger.stats)
        stats.plan_s = self.ledger.plan_s
        stats.speculative_step_s = self._speculative_s
        stats.num_strategy_switches = self._switches
        stats.num_roll_backs = self._roll_backs
        stats.num_unsound_samples = self.buffer.num_unsound
        stats.hidden_state_bytes = self.buffer.num_bytes
        stats.drafter_version = self.drafter_version


def make_speculation(plan: SpecPlan, runner: Any, scheduler: Any, **kwargs: Any) -> Speculation | NoSpeculation:
    """What the plan asks for; `kwargs` are those of `Speculation`."""
    if plan.max_draft_tokens == 0:
        return NoSpeculation()
    return Speculation(plan, runner, scheduler, **kwargs)


def capture_again(runner: Any) -> None:
    """Replace the CUDA graphs of the engine's start: they give out what the model gave out then."""
    from vllm.config import set_current_vllm_config

    runner.model.clear_graphs()
    runner.model.graph_pool = torch.cuda.graph_pool_handle()  # that of graphs which are gone takes no new ones
    with set_current_vllm_config(runner.vllm_config):
        runner.capture_model()
