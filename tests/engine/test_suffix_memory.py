"""What the engine's suffix drafter remembers of a problem that is drawn again, under another id."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np

from tests.engine.engines import make_prompts
from tlt.drafter.history import SuffixHistory
from tlt.rollout.vllm.learned_drafter import DraftRequest
from tlt.rollout.vllm.suffix_drafter import SuffixDrafter
from tlt.types import rollout_name


def test_past_responses_of_the_same_problem_are_drafted_from():
    past = [101, 102, 103, 104, 105, 106]
    (first,) = make_prompts(1)
    again, other = (replace(first, prompt_id=f"2:{first.prompt_id}"), make_prompts(2)[1])
    history = SuffixHistory(2**20)
    history.add(first.problem_key, past, policy_version=1)
    for prompt, expected in ((again, past[3:]), (other, [])):
        text = [*prompt.token_ids, *past[:3]]
        runner = SimpleNamespace(input_batch=SimpleNamespace(token_ids_cpu=np.array([text])))
        drafter = SuffixDrafter(runner, history)
        drafter.begin([prompt])
        request = DraftRequest(
            row=0, request_id="r", name=rollout_name(prompt.prompt_id, 0), num_tokens=len(text), num_draft_tokens=8,
            temperature=1.0, seed=0,
        )  # fmt: skip
        assert drafter.draft([request])["r"].token_ids == expected
