"""A rollout engine without RL: the ranks of torchrun, or one process of its own, and an engine on each."""

import os
import tempfile
from collections.abc import Callable, Sequence


def start_ranks() -> None:
    """The ranks of torchrun, or a world of this process alone."""
    import torch.distributed as dist

    if "MASTER_ADDR" in os.environ:
        dist.init_process_group("gloo")
        return
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    dist.init_process_group("gloo", init_method=f"file://{tempfile.mkdtemp()}/store", rank=0, world_size=1)


def make_engine(
    rollout, *, hf_model: str, dtype: str, stop_token_ids: Sequence[int], plan, seed: int = 0,
    decode: Callable[[Sequence[int]], str] = lambda ids: "",
):  # fmt: skip
    """VLLMRolloutEngine of this rank, never told to stop and without past responses; `rollout` is a RolloutConfig,
    `plan` a SpecPlan. Collective over all ranks; all must call."""
    from tlt.drafter.history import SuffixHistory
    from tlt.rollout.consolidation import NoConsolidation
    from tlt.rollout.outlook import NoOutlook
    from tlt.rollout.vllm.engine import VLLMRolloutEngine

    return VLLMRolloutEngine(
        rollout, hf_model=hf_model, dtype=dtype, seed=seed, stop_token_ids=stop_token_ids, decode=decode,
        should_stop=lambda: False, spec=plan, history=SuffixHistory(0), outlook=NoOutlook(),
        consolidation=NoConsolidation(),
    )  # fmt: skip
