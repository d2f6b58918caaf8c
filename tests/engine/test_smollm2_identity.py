"""Greedy identity on the real pretrained model: 200 prompts of 200 tokens, fp32, every strategy against plain vLLM.

A response may leave the plain one only where the two best logits are closer than plain vLLM's own noise between batch
shapes; each such case is listed and counted.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.engine.engines import make_engine
from tests.engine.test_speculation import ByRequest, EveryStep, agreeing, write_head
from tlt.config import SpecConfig
from tlt.spec.strategy import FixedStrategy, parse_strategy
from tlt.types import OFF, Prompt, RolloutGroup, SamplingConfig

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(10800)]

NUM_PROMPTS, NUM_TOKENS = 200, 200
SWAP_STEPS = 40
"""Engine steps between two swaps of the head."""
GREEDY = SamplingConfig(temperature=0.0, max_response_tokens=NUM_TOKENS, ignore_eos=True)


def prompts_of(folder: Path) -> list[Prompt]:
    import reasoning_gym
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    dataset = reasoning_gym.create_dataset("gsm_symbolic", size=NUM_PROMPTS, seed=5)
    return [
        Prompt(
            prompt_id=f"{i}", source="", token_ids=tuple(tokenizer.encode(dataset[i]["question"])), text="", answer={}
        )
        for i in range(NUM_PROMPTS)
    ]


def generate(engine, prompts: list[Prompt]) -> list[RolloutGroup]:
    return engine.generate(prompts, GREEDY, group_size=1, seed=0, on_finished=lambda *_: None)


def top_two_gap(model, ids: tuple[int, ...]) -> float:
    with torch.no_grad():
        best = model(torch.tensor([ids])).logits[0, -1].topk(2).values
    return float(best[0] - best[1])


def divergences(model, prompts, plain, found, *, noise: float) -> list[str]:
    """One line per response that leaves the plain one, all at near ties; AssertionError for any other."""
    lines = []
    for prompt, first, second in zip(prompts, plain, found, strict=True):
        a, b = first.rollouts[0].token_ids, second.rollouts[0].token_ids
        if a == b:
            continue
        at = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
        gap = top_two_gap(model, prompt.token_ids + a[:at])
        lines.append(f"prompt {prompt.prompt_id}, token {at}: gap of the two best logits {gap:.2e}")
        assert gap <= 2 * noise, (lines[-1], noise)
    return lines


def swap_again_and_again(engine, heads: list) -> None:
    """Load the heads in turn, in the middle of rollouts."""
    before, count = engine.speculation.before_step, {"steps": 0}

    def before_step(num_running: int) -> None:
        count["steps"] += 1
        number, is_due = divmod(count["steps"], SWAP_STEPS)
        if is_due == 0:
            engine.load_drafter(heads[number % len(heads)], drafter_version=1 + number)
        before(num_running)

    engine.speculation.before_step = before_step


def _identity(rank: int, world_size: int, folder: Path, head: Path, out: Path) -> None:
    from transformers import AutoModelForCausalLM

    prompts = prompts_of(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    limits = {"max_model_len": 512, "max_num_seqs": 32, "num_gpu_blocks_override": None}
    if not out.exists():
        engine = make_engine(folder, **limits)
        plain = generate(engine, prompts)
        halves = generate(engine, prompts[::2])  # other neighbours in other batches, nothing drafted
        noise = max(
            abs(x - y)
            for first, second in zip(plain[::2], halves, strict=True)
            if first.rollouts[0].token_ids == second.rollouts[0].token_ids
            for x, y in zip(first.rollouts[0].logprobs, second.rollouts[0].logprobs, strict=True)
        )
        torch.save((plain, noise), out)
        engine.close()
        return
    plain, noise = torch.load(out, weights_only=False)
    engine = make_engine(folder, spec=SpecConfig(strategy="eagle:6", drafter=(str(head), str(head))), **limits)
    names = ("eagle:4", "prompt_lookup:6", "adaptive:8", "eagle:1", "prompt_lookup:2", "suffix:6")
    choices = [OFF, *(parse_strategy(name, "t") for name in names)]
    policies = {
        "off": FixedStrategy(OFF), "eagle:4": FixedStrategy(choices[1]), "prompt_lookup:6": FixedStrategy(choices[2]),
        "adaptive:8": FixedStrategy(choices[3]), "every step": EveryStep(choices),
        "by request": FixedStrategy(choices[1]),
    }  # fmt: skip
    random_weights = {name: p.detach().clone() for name, p in engine.speculation.learned.head.named_parameters()}
    policies["swaps"] = FixedStrategy(choices[1])
    listed = {}
    for label, policy in policies.items():
        engine.speculation.policy = policy
        if label == "by request":
            engine.speculation.drafting.router = ByRequest()
            engine.load_drafter(agreeing(engine.speculation.learned.head), drafter_version=1)
        if label == "swaps":
            swap_again_and_again(engine, [random_weights, agreeing(engine.speculation.learned.head)])
        found = generate(engine, prompts)
        listed[label] = divergences(model, prompts, plain, found, noise=max(noise, 1e-4))
        print(f"{label}: {len(listed[label])} of {NUM_PROMPTS} responses leave plain vLLM's (noise {noise:.1e})")
        print("\n".join(listed[label]))
        drafters = engine.stats().acceptance
        print({name: stats.metrics(name) for name, stats in drafters.items()}, flush=True)
        if label == "by request":
            assert drafters["prompt_lookup"].acceptance_length > 1.2
    assert engine.speculation.drafter_version > 5, "swapped in the middle"
    engine.close()


def test_greedy_text_of_smollm2_is_plain_vllms(tmp_path):
    folder = tmp_path / "smollm2"
    tool = Path(__file__).parents[2] / "tools" / "prepare_smollm2.py"
    subprocess.run([sys.executable, str(tool), "--out", str(folder)], check=True)
    head = write_head(tmp_path / "head", folder, draft_token_ids=torch.arange(0, 49152, 24))
    run_ranks(_identity, 1, folder, head, tmp_path / "plain.pt")
    run_ranks(_identity, 1, folder, head, tmp_path / "plain.pt")
