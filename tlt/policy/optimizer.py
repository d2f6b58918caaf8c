"""Megatron's AdamW with its learning-rate schedule, from our flags (which carry Megatron's names)."""

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from tlt.config import OptimizerConfig


def build_optimizer(
    model: DistributedDataParallel, config: OptimizerConfig, *, bf16: bool, steps_per_iteration: int, train_iters: int
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """AdamW (fp32 master weights for a bf16 model) and its schedule, counted in optimizer steps."""
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_eps=config.adam_eps,
            clip_grad=config.clip_grad,
            use_distributed_optimizer=config.use_distributed_optimizer,
            overlap_param_gather=config.overlap_param_gather,
        ),
        [model],
    )
    warmup_steps = config.lr_warmup_iters * steps_per_iteration
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=warmup_steps,
        lr_decay_steps=max(train_iters * steps_per_iteration, warmup_steps + 1),
        lr_decay_style=config.lr_decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,  # a resumed run may have another --train-iters
    )
    return optimizer, scheduler
