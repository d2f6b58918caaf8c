"""Speculative decoding on the real vLLM, fp32 tiny models: no strategy, drafter, swap or route changes a token.

Sampled drafts, which change tokens but not their distribution, are in test_sampled_drafts.py.
Not covered: GPU kernels, the V2 runner.
"""

import random
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.distributed.ranks import run_ranks
from tests.engine.engines import generate, make_engine, make_prompts, tokens
from tests.tiny_models import EXPERTS, write_tiny_model
from tlt.config import SpecConfig, read_hf_config
from tlt.drafter.model import EagleHead, HeadShape, initialize, save_head
from tlt.rollout.vllm.learned_drafter import DraftRequest
from tlt.rollout.vllm.routing import OneForAll
from tlt.rollout.vllm.speculation import LEARNED
from tlt.spec.draft_kind import COUPLED, ONE_HOT, FixedKind
from tlt.spec.strategy import DecodeStep, FixedStrategy, parse_strategy
from tlt.types import OFF, SamplingConfig, SpecStrategy
from tlt.weight_sync.gather import HfDirectory

pytestmark = pytest.mark.engine

GREEDY = SamplingConfig(temperature=0.0, max_response_tokens=40)
SAMPLINGS = (
    GREEDY,
    SamplingConfig(temperature=1.0, max_response_tokens=40),
    SamplingConfig(temperature=0.7, top_p=0.9, max_response_tokens=40),
    SamplingConfig(temperature=1.0, top_k=20, max_response_tokens=40, ignore_eos=True),
)
PEAKED = {"initializer_range": 0.25}  # logits of a size at which drafts can be right
AUX_LAYERS = (0, 1, 3)  # of four


def write_head(
    folder: Path, target: Path, *, seed: int = 1, draft_token_ids: torch.Tensor | None = None,
    aux_layers: tuple[int, ...] = (),
) -> Path:  # fmt: skip
    config = read_hf_config(str(target))
    head = EagleHead(HeadShape.of_target(config), draft_token_ids=draft_token_ids, aux_layers=aux_layers)
    initialize(head, seed=seed)
    save_head(head, folder, target_config=config)
    return folder


def agreeing(head: EagleHead) -> dict[str, torch.Tensor]:
    """Weights under which the head's output is the hidden state it was given: its drafts repeat the target's own
    last prediction."""
    tensors = {name: torch.zeros_like(parameter) for name, parameter in head.named_parameters()}
    size = head.shape.hidden_size
    tensors["fc.weight"][:, size:] = torch.eye(size)
    return tensors


class EveryStep:
    """Another strategy at every engine step."""

    max_draft_tokens = 6

    def __init__(self, strategies: list[SpecStrategy]):
        self.strategies = strategies
        self.step = 0

    def choose(self, num_running: int) -> SpecStrategy:
        self.step += 1
        return self.strategies[self.step % len(self.strategies)]

    def observe(self, step: DecodeStep) -> None:
        assert step.num_verified >= step.num_tokens >= step.num_running >= 1
        assert step.verify_s > 0


class ByRequest(OneForAll):
    """Routes each request its own way, and differently as it grows; alike on all ranks, or their collectives part."""

    choices = (("off", 0), ("prompt_lookup", 3), ("eagle", 4), ("suffix", 5), ("eagle2", 2))

    def __init__(self) -> None:
        self.routes: set[str] = set()

    def plan(self, requests: list[DraftRequest], strategy: SpecStrategy) -> dict[str, list[DraftRequest]]:
        plan: dict[str, list[DraftRequest]] = {}
        for request in requests:
            method, count = self.choices[(ord(request.name[-1]) + request.num_tokens // 7) % len(self.choices)]
            self.routes.add(method)
            if count:
                plan.setdefault(method, []).append(request.asking_for(min(count, request.num_draft_tokens)))
        return plan


def all_tokens(engine, prompts) -> list[dict]:
    return [tokens(generate(engine, prompts, sampling)) for sampling in SAMPLINGS]


def _plain(rank: int, world_size: int, folder: Path, expected: Path, tp_size: int) -> None:
    engine = make_engine(folder, tensor_parallel_size=tp_size)
    torch.save(all_tokens(engine, make_prompts(4)), expected)
    engine.close()


class InTurn(FixedKind):
    """Another kind with each request."""

    def __init__(self) -> None:
        self.kinds = cycle((COUPLED, ONE_HOT))

    def choose(self, temperature: float) -> str:
        return next(self.kinds)


def _identity(rank: int, world_size: int, folder: Path, head: Path, expected_file: Path, tp_size: int) -> None:
    engine = make_engine(
        folder, spec=SpecConfig(strategy="eagle:6", drafter=(str(head), f"{head}2")), tensor_parallel_size=tp_size
    )  # fmt: skip
    expected, prompts, speculation = torch.load(expected_file), make_prompts(4), engine.speculation
    # Nothing is kept that neither head reads.
    assert set(speculation.drafting.pool.states) == {one.head.reads for one in speculation.heads.values()}

    def check(label: str) -> None:
        for sampling, plain in zip(SAMPLINGS, expected, strict=True):
            assert tokens(generate(engine, prompts, sampling)) == plain, (label, sampling)

    fixed = [
        ("coupled", ("off", "eagle:1", "eagle2:6", "prompt_lookup:4", "suffix:6")),
        ("one-hot", ("eagle:2", "eagle:6")),
    ]
    for drafts, strategies in fixed if tp_size == 1 else [("coupled", ("eagle:6",))]:
        speculation.learned.kinds = FixedKind(drafts)
        for strategy in strategies:
            speculation.policy = FixedStrategy(parse_strategy(strategy, "test"))
            check(f"{drafts} {strategy}")
    speculation.learned.kinds = InTurn()
    check("coupled and one-hot drafts in one batch")
    rng = random.Random(0)
    choices = [
        OFF,
        *(
            parse_strategy(f"{m}:{k}", "test")
            for m in ("eagle", "eagle2", "prompt_lookup", "suffix", "adaptive")
            for k in (1, 2, 3, 6)
        ),
    ]
    speculation.policy = EveryStep([rng.choice(choices) for _ in range(101)])
    check("another strategy every step")
    assert engine.stats().num_strategy_switches > 20
    speculation.policy = FixedStrategy(parse_strategy("eagle:4", "test"))
    router = ByRequest()
    adaptive, speculation.drafting.router = speculation.drafting.router, router
    check("routed by request")
    assert router.routes == {"off", "prompt_lookup", "eagle", "suffix", "eagle2"}
    assert set(engine.stats().acceptance) >= {"prompt_lookup", "eagle", "suffix", "eagle2"}
    speculation.drafting.router = adaptive
    speculation.policy = FixedStrategy(parse_strategy("adaptive:6", "test"))
    check("adaptive")
    assert {"eagle", "eagle2", "suffix"} & set(engine.stats().acceptance)
    engine.close()


@pytest.mark.parametrize("kind", ["llama", "qwen3", EXPERTS])
def test_no_strategy_changes_a_token(tmp_path, kind):
    folder = write_tiny_model(kind, tmp_path, **PEAKED)
    ids = torch.arange(0, 512, 2) if kind == "qwen3" else None
    head = write_head(tmp_path / "head", folder, draft_token_ids=ids, aux_layers=AUX_LAYERS)
    # With a head of the last layer beside that of three, and with another head of the same three alone.
    layers = AUX_LAYERS if kind == "qwen3" else ()
    write_head(tmp_path / "head2", folder, seed=2, draft_token_ids=torch.arange(0, 512, 3), aux_layers=layers)
    run_ranks(_plain, 1, folder, tmp_path / "plain.pt", 1)
    run_ranks(_identity, 1, folder, head, tmp_path / "plain.pt", 1)


def test_no_strategy_changes_a_token_on_two_tensor_parallel_ranks(tmp_path):
    folder = write_tiny_model("llama", tmp_path, **PEAKED)
    head = write_head(tmp_path / "head", folder, aux_layers=AUX_LAYERS)
    write_head(tmp_path / "head2", folder, seed=2)
    run_ranks(_plain, 1, folder, tmp_path / "plain.pt", 1)
    run_ranks(_identity, 2, folder, head, tmp_path / "plain.pt", 2)


def _swaps(rank: int, world_size: int, folder: Path, head_folder: Path) -> None:
    """Drafters of every quality come and go in mid-rollout; text stays, acceptance follows."""
    engine = make_engine(folder, spec=SpecConfig(strategy="eagle:4", drafter=(str(head_folder),), collapse_frac=0.0))
    prompts, speculation = make_prompts(4), engine.speculation
    learned = speculation.learned
    random_weights = {name: p.detach().clone() for name, p in learned.head.named_parameters()}
    speculation.policy = FixedStrategy(OFF)
    plain = tokens(generate(engine, prompts, GREEDY))
    speculation.policy = FixedStrategy(SpecStrategy(method=LEARNED, num_draft_tokens=4))

    lengths = {}
    step, swap_at = {"now": 0}, {}
    before = speculation.before_step

    def before_step(num_running: int) -> None:
        step["now"] += 1
        if step["now"] in swap_at:
            engine.load_drafter(swap_at[step["now"]], drafter_version=learned.version + 1)
        before(num_running)

    speculation.before_step = before_step
    for label, swaps in {
        "random": {1: random_weights}, "agreeing": {1: agreeing(learned.head)},
        "to random in mid-rollout": {1: agreeing(learned.head), 5: random_weights},
    }.items():  # fmt: skip
        step["now"], swap_at = 0, swaps
        version = learned.version
        groups = generate(engine, prompts, GREEDY)
        assert tokens(groups) == plain, label
        assert {rollout.drafter_version for group in groups for rollout in group.rollouts} <= {
            *range(version, learned.version + 1)
        }
        stats = engine.stats()
        assert len(stats.step_begin_s) == len(stats.step_drafts) == len(stats.step_accepted) == stats.num_engine_steps
        assert sum(stats.step_drafts) == stats.acceptance[LEARNED].num_drafts
        assert sum(stats.step_accepted) == sum(stats.acceptance[LEARNED].accepted)
        lengths[label] = stats.acceptance[LEARNED].acceptance_rate
    assert lengths["random"] < 0.05
    assert lengths["agreeing"] > 0.95
    assert lengths["random"] < lengths["to random in mid-rollout"] < lengths["agreeing"]
    with pytest.raises(ValueError, match="the drafter has the weights"):
        engine.load_drafter({"fc.weight": torch.zeros(1)}, drafter_version=9)
    engine.close()


def test_drafters_swapped_in_mid_rollout_change_acceptance_but_no_token(tmp_path):
    # All layers of the target add nothing: its hidden state is its token's embedding, greedy text repeats one token,
    # and a head that returns what it was given always agrees.
    folder = write_tiny_model("llama", tmp_path)
    silence(folder)
    run_ranks(_swaps, 1, folder, write_head(tmp_path / "head", folder))


def silence(folder: Path) -> None:
    """Zero what every layer adds to the residual stream."""
    from safetensors.torch import save_file

    tensors = {name: file.get_tensor(name) for name, file in HfDirectory(folder).owner.items()}
    for name in tensors:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _collapses(rank: int, world_size: int, folder: Path, head_folder: Path) -> None:
    engine = make_engine(folder, spec=SpecConfig(strategy="eagle:4", drafter=(str(head_folder),), drafts="one-hot"))
    prompts, speculation = make_prompts(6), engine.speculation
    learned = speculation.learned
    garbage = {name: p.detach().clone() for name, p in learned.head.named_parameters()}
    engine.load_drafter(agreeing(learned.head), drafter_version=1)
    plain = tokens(generate(engine, prompts, GREEDY))
    assert engine.stats().num_roll_backs == 0
    engine.load_drafter(garbage, drafter_version=2)
    assert tokens(generate(engine, prompts, GREEDY)) == plain
    stats = engine.stats()
    assert (stats.num_roll_backs, stats.drafter_version) == (1, 3)
    # Noticed after `window` drafts: what came before was in vain, what comes after is right again.
    acceptance = stats.acceptance[LEARNED]
    rejected = sum(acceptance.drafted) - sum(acceptance.accepted)
    assert rejected <= speculation.watchdog.window + len(prompts) * 2 * 4
    assert tokens(generate(engine, prompts, GREEDY)) == plain
    assert engine.stats().acceptance[LEARNED].acceptance_rate > 0.95
    assert engine.stats().num_roll_backs == 0
    engine.close()


def test_a_drafter_that_collapses_is_withdrawn(tmp_path):
    folder = write_tiny_model("llama", tmp_path)
    silence(folder)
    run_ranks(_collapses, 1, folder, write_head(tmp_path / "head", folder))


def _thousands_of_steps(rank: int, world_size: int, folder: Path, head: Path, expected_file: Path) -> None:
    rng = random.Random(3)
    choices = [OFF, *(parse_strategy(f"{m}:{k}", "test") for m in ("eagle", "prompt_lookup") for k in range(1, 7))]
    sampling = SamplingConfig(temperature=1.0, max_response_tokens=400, ignore_eos=True)
    spec = SpecConfig(strategy="eagle:6", drafter=(str(head),)) if world_size > 1 else None
    engine = make_engine(folder, spec=spec, tensor_parallel_size=world_size, max_model_len=512)
    if world_size > 1:
        engine.speculation.policy = EveryStep([rng.choice(choices) for _ in range(997)])
    found, num_steps = [], 0
    for seed in range(7):
        found.append(tokens(generate(engine, make_prompts(3), sampling, seed=seed)))
        num_steps += engine.stats().num_engine_steps
    if world_size == 1:
        torch.save(found, expected_file)
    else:
        assert num_steps >= 2000
        assert found == torch.load(expected_file)
    engine.close()


def _another_rounding(rank: int, world_size: int, folder: Path, head: Path, expected_file: Path) -> None:
    sampling = SamplingConfig(temperature=1.0, max_response_tokens=120, ignore_eos=True)
    spec = SpecConfig(strategy="adaptive:6", drafter=(str(head),)) if world_size > 1 else None
    engine = make_engine(folder, spec=spec, tensor_parallel_size=world_size)
    if world_size == 1:
        torch.save(tokens(generate(engine, make_prompts(3), sampling)), expected_file)
        engine.close()
        return
    engine.speculation.policy = EveryStep([parse_strategy(f"{m}:4", "test") for m in ("adaptive", "eagle", "suffix")])
    learned = engine.speculation.learned
    rng, choose = np.random.default_rng(0), learned._choose

    def another(*args):
        drafted, probs, confidences = choose(*args)
        if rng.random() < 0.2:
            drafted = (drafted + 1) % 250
        return drafted, probs, confidences * rng.uniform(0.8, 1.0, len(confidences))

    if rank == 1:
        learned._choose = another
    assert tokens(generate(engine, make_prompts(3), sampling)) == torch.load(expected_file)
    counts = {name: (one.drafted, one.accepted) for name, one in engine.stats().acceptance.items()}
    assert sum(counts[LEARNED][0]) > 100
    of_ranks: list = [None] * world_size
    dist.all_gather_object(of_ranks, (engine.speculation.router.state_dict(), counts))
    assert of_ranks[0] == of_ranks[1]
    engine.close()


def test_ranks_of_a_replica_that_round_differently_learn_and_plan_the_same(tmp_path):
    folder = write_tiny_model("llama", tmp_path, **PEAKED)
    head = write_head(tmp_path / "head", folder)
    run_ranks(_another_rounding, 1, folder, head, tmp_path / "plain.pt")
    run_ranks(_another_rounding, 2, folder, head, tmp_path / "plain.pt")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_tensor_parallel_ranks_agree_for_thousands_of_steps(tmp_path):
    folder = write_tiny_model("llama", tmp_path, **PEAKED)
    head = write_head(tmp_path / "head", folder)
    run_ranks(_thousands_of_steps, 1, folder, head, tmp_path / "plain.pt")
    run_ranks(_thousands_of_steps, 2, folder, head, tmp_path / "plain.pt")
