"""What ranks of tests import, imported once: the fork server of ranks.py begins with this module.

Modules only: nothing that a test makes or patches is in it, and no thread runs, so that a fork is as good as new.
"""

# ruff: noqa: E402
import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a pool of threads would not survive a fork

from tlt.config import RolloutConfig
from tlt.rollout.vllm.engine import set_engine_environment

set_engine_environment(RolloutConfig())  # vLLM reads it when it is imported

import compressed_tensors  # noqa: F401
import pytest  # noqa: F401
import reasoning_gym  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
import vllm.entrypoints.llm  # noqa: F401
import vllm.model_executor.models.llama  # noqa: F401
import vllm.model_executor.models.qwen2  # noqa: F401
import vllm.model_executor.models.qwen3  # noqa: F401
import vllm.v1.worker.cpu_worker  # noqa: F401

import tests.distributed.trainer_cases  # noqa: F401
import tlt.build  # noqa: F401

gc.collect()
gc.freeze()  # vLLM collects garbage again and again while it starts
