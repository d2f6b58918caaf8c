"""The check of CUDA graphs, on a CPU: an engine passes it, one whose steps without drafts compute noise does not."""

from types import SimpleNamespace

import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.engine.engines import generate, make_engine, make_prompts, tokens
from tests.engine.test_speculation import GREEDY, PEAKED
from tests.tiny_models import write_tiny_model
from tlt.config import SpecConfig
from tlt.rollout.vllm.graph_check import at_least_two, check_graphs, num_equal, without_graphs
from tlt.rollout.vllm.sampling import PositionSampler

pytestmark = pytest.mark.engine


class NoisyGraphs(PositionSampler):
    """What a captured kernel that reads another layout gives: noise, where graphs may run and nothing is drafted."""

    def sample(self, logits, spec_decode_metadata):
        is_decode = self.runner.input_batch.num_reqs == len(logits)  # none was drafted
        if self.runner.cudagraph_dispatcher.dispatch is self.own and is_decode and self.num_steps % 8:
            logits = torch.randn_like(logits)
        self.num_steps += 1
        return super().sample(logits, spec_decode_metadata)


def _check(rank: int, world_size: int, folder) -> None:
    engine = make_engine(folder, spec=SpecConfig(strategy="prompt_lookup:4"))
    before = tokens(generate(engine, make_prompts(4), GREEDY))
    check_graphs(engine, seed=1)
    assert tokens(generate(engine, make_prompts(4), GREEDY)) == before
    assert not engine.speculation.ledger.stats.get("filler")
    noisy = NoisyGraphs(engine.runner, engine.speculation.ledger)
    noisy.own, noisy.num_steps = engine.runner.cudagraph_dispatcher.dispatch, 0
    engine.runner.cudagraph_dispatcher.dispatch = noisy.own  # bound methods are made anew at each look
    with pytest.raises(RuntimeError, match=r"steps without drafts: by .*--rollout-enforce-eager"):
        check_graphs(engine, seed=1)
    engine.close()


def test_graphs_that_compute_noise_are_refused(tmp_path):
    run_ranks(_check, 1, write_tiny_model("llama", tmp_path, **PEAKED))


def test_steps_without_graphs_ask_for_none():
    asked = []
    runner = SimpleNamespace(
        cudagraph_dispatcher=SimpleNamespace(dispatch=lambda *args, **kwargs: asked.append(kwargs["valid_modes"]))
    )
    with without_graphs(runner):
        runner.cudagraph_dispatcher.dispatch(8, valid_modes=None)
    runner.cudagraph_dispatcher.dispatch(8, valid_modes="own")
    assert [mode.name for mode in asked[0]] == ["NONE"]
    assert asked[1] == "own"


def test_attention_is_never_scheduled_for_single_tokens():
    build = at_least_two(lambda prefix, metadata, fast_build=False: (prefix, metadata.max_query_len, fast_build))
    assert build(0, SimpleNamespace(max_query_len=1)) == (0, 2, False)
    assert build(common_prefix_len=3, common_attn_metadata=SimpleNamespace(max_query_len=5)) == (3, 5, False)


def test_num_equal():
    assert num_equal((1, 2, 3), (1, 2, 4)) == 2
    assert num_equal((1, 2), (1, 2)) == 2
