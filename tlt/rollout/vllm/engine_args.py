"""What --rollout-engine-args may set."""

import dataclasses
import difflib
import json
from collections.abc import Mapping

from tlt.spec.lossless import refuse_lossy

OWNED = {
    "model", "dtype", "seed", "tensor_parallel_size", "distributed_executor_backend", "max_model_len", "max_num_seqs",
    "max_num_batched_tokens", "num_gpu_blocks_override", "gpu_memory_utilization", "enforce_eager",
    "kv_cache_memory_bytes", "enable_sleep_mode", "enable_prefix_caching", "logprobs_mode", "disable_log_stats",
}  # fmt: skip
"""Arguments of vLLM's engine that flags decide on, or engine.py."""


def parse_engine_args(text: str) -> dict:
    """Raises ValueError where --rollout-engine-args, or `compilation_config` in it, is no JSON object, or where it
    sets what it must not, or what vLLM does not have. Imports vLLM for the last, which reads its environment then."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--rollout-engine-args must be a JSON object, got {text!r}: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"--rollout-engine-args must be a JSON object, got {text!r}")
    if not isinstance(found.get("compilation_config", {}), dict):
        got = found["compilation_config"]
        raise ValueError(f"--rollout-engine-args: compilation_config must be an object, got {got!r}")
    refuse_lossy(found, "--rollout-engine-args")
    owned = sorted(OWNED.intersection(found))
    if owned:
        raise ValueError(f"--rollout-engine-args must not set {owned}: other flags decide on them")
    if found:
        refuse_unknown(found)
    return found


def refuse_unknown(settings: Mapping[str, object]) -> None:
    """Raises ValueError where vLLM's engine has no such argument."""
    from vllm.engine.arg_utils import EngineArgs

    known = [field.name for field in dataclasses.fields(EngineArgs) if not field.name.startswith("_")]
    for name in settings:
        if name not in known:
            near = "".join(f"; close to it: {each}" for each in difflib.get_close_matches(name, known, n=1))
            raise ValueError(f"--rollout-engine-args must set arguments of vLLM's engine, got {name!r}{near}")
