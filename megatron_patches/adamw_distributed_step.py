"""Loading a distributed optimizer copies every tensor of AdamW's state from the checkpoint, where torch's AdamW (used
without Transformer Engine and Apex) also keeps a step count per parameter: KeyError 'step'. The count is common to all
parameters, saved apart and already restored at this point, so it is copied onto itself.

Remove when upstream loads torch's AdamW.
"""

import functools

from megatron_patches.patch import Patch


def make(original):
    @functools.wraps(original)
    def set_main_param_and_optimizer_states(self, model_param, tensors):
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        if "step" in state:
            tensors = {"step": state["step"], **tensors}  # patched: upstream looks for it in the checkpoint
        return original(self, model_param, tensors)

    return set_main_param_and_optimizer_states


PATCH = Patch(
    name="adamw_distributed_step",
    distribution="megatron-core",
    versions=">=0.16.1,<0.17",
    target="megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._set_main_param_and_optimizer_states",
    source_sha256=("93c254228283",),
    reason="loading a distributed optimizer looks for the per-parameter step of torch's AdamW in the checkpoint",
    upstream="https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/core/optimizer/distrib_optimizer.py",
    make=make,
)
