"""What a GPU replays of a drafter's passes, run as plain operations on a CPU: its drafts are those of the CPU's path.

Of coupled drafts the confidences differ: the CPU's race tells its leads, the GPU's does not, whose are probabilities.
Not covered anywhere: the capture itself, and FlashAttention against GatheredPagedAttention, which need a GPU.
"""

from functools import partial

import numpy as np
import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.engine.engines import generate, make_engine, make_prompts, tokens
from tests.engine.test_speculation import PEAKED, EveryStep, InTurn, write_head
from tests.tiny_models import write_tiny_model
from tlt.config import SpecConfig
from tlt.rollout.vllm.draft_graphs import DraftGraphs
from tlt.rollout.vllm.learned_drafter import LearnedDrafter, PassByPass
from tlt.spec.race import tensor_race
from tlt.spec.strategy import FixedStrategy, parse_strategy
from tlt.types import OFF, SamplingConfig

pytestmark = pytest.mark.engine

SAMPLINGS = (
    SamplingConfig(temperature=0.0, max_response_tokens=40),
    SamplingConfig(temperature=0.7, max_response_tokens=40, ignore_eos=True),
)


def race_by_stream(probs, seeds, positions, streams, *, token_ids):
    """As `triton_race`, which needs a GPU."""
    drawn = torch.empty(len(probs), dtype=torch.int64)
    for stream in streams.unique().tolist():
        rows = streams == stream
        drawn[rows] = tensor_race(
            probs[rows], seeds[rows].tolist(), positions[rows].tolist(), stream=stream, token_ids=token_ids
        )
    return drawn


def _same_drafts(rank: int, world_size: int, folder, head, num_tokens: int) -> None:
    engine = make_engine(folder, spec=SpecConfig(strategy=f"eagle:{num_tokens}", drafter=(str(head),)))
    speculation, prompts = engine.speculation, make_prompts(5)
    on = parse_strategy(f"eagle:{num_tokens}", "test")
    drafts: dict[tuple[str, int], object] = {}
    original = LearnedDrafter.draft

    def recording(self, requests):
        proposals = original(self, requests)
        drafts.update(((request.name, request.num_tokens), proposals[request.request_id]) for request in requests)
        return proposals

    LearnedDrafter.draft = recording
    learned = speculation.learned
    graphs = DraftGraphs(learned, race=race_by_stream)
    pass_by_pass, at_once = partial(PassByPass, learned), graphs.begin
    for sampling in SAMPLINGS:
        for strategies in ([on], [OFF] * 9 + [on] * 3):
            found = {}
            for name, chain in (("pass by pass", pass_by_pass), ("at once", at_once)):
                drafts.clear()
                learned.chain, learned.kinds, learned._num_passes = chain, InTurn(), 0
                speculation.policy = EveryStep(strategies) if len(strategies) > 1 else FixedStrategy(on)
                text = tokens(generate(engine, prompts, sampling))
                found[name] = (text, dict(drafts))
            (text, one), (other_text, other) = found.values()
            assert text == other_text
            assert set(one) == set(other)
            assert len(one) > 20
            assert all(one[key].token_ids == other[key].token_ids for key in one)
            alike = [key for key in one if np.allclose(one[key].confidences, other[key].confidences, rtol=1e-4)]
            assert len(alike) == len(one) if sampling.temperature == 0 else len(alike) > len(one) / 3  # one-hot
            kept = [key for key in one if one[key].draft_probs is not None]
            if sampling.temperature > 0 and len(strategies) == 1:
                assert kept
            for key in kept:
                torch.testing.assert_close(one[key].draft_probs, other[key].draft_probs, rtol=1e-4, atol=1e-6)
    for passes in graphs._passes.values():
        with torch.inference_mode():
            passes.warm_up()  # what a capture does first
    engine.close()


@pytest.mark.parametrize(("draft_token_ids", "num_tokens"), [(None, 5), (torch.arange(0, 512, 2), 5), (None, 1)])
def test_passes_replayed_at_once_draft_what_single_passes_draft(tmp_path, draft_token_ids, num_tokens):
    folder = write_tiny_model("llama", tmp_path, **PEAKED)
    head = write_head(tmp_path / "head", folder, draft_token_ids=draft_token_ids)
    run_ranks(_same_drafts, 1, folder, head, num_tokens)
