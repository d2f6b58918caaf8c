"""Policy -> engine after every update, over device memory; no file is written."""

import time

from tlt.protocols import PolicyTrainer, RolloutEngine
from tlt.trace import Trace


class StreamedWeightSync:
    """Hands the device from the policy to the engine and the policy's weights with it, one bucket at a time."""

    def __init__(self, trainer: PolicyTrainer, engine: RolloutEngine, *, trace: Trace):
        self.trainer = trainer
        self.engine = engine
        self.trace = trace

    def push(self, *, policy_version: int) -> dict[str, float]:
        """Make the engine's target model the policy of `policy_version`; afterwards the engine has the device.

        Raises RuntimeError where the engine holds other values than the policy. Collective over all ranks; all must
        call.
        """
        begin_s = time.perf_counter()
        with self.trace.span("weight_sync", policy_version=policy_version):
            self.trainer.offload()
            self.engine.wake()
            self.engine.load_weights(self.trainer.named_hf_tensors(), policy_version=policy_version)
        return {"weight_sync/push_s": time.perf_counter() - begin_s}
