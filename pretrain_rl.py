"""RL training of a language model: megatron-core policy, colocated vLLM rollouts, started by torchrun.

torchrun --nproc_per_node 2 pretrain_rl.py --hf-model DIR --save DIR --data-train reasoning-gym:chain_sum
"""

import sys
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Parse, check, build, train. Bad input: a line on each node's standard error, exit status 2 on every rank."""
    from tlt.config import RunConfig
    from tlt.launch import prepare, ranks_per_node

    def read_inputs(config: RunConfig, world_size: int):
        from tlt.rollout.vllm.engine import set_engine_environment

        set_engine_environment(config.rollout)
        local = ranks_per_node(world_size)
        if config.training.dry_run:
            from tlt.rehearsal import rehearse

            return rehearse(config, world_size=world_size, ranks_per_node=local)
        from tlt.build import Inputs

        return Inputs(config, world_size=world_size, ranks_per_node=local)

    prepared = prepare(
        argv, program="pretrain_rl.py", description=__doc__, config_class=RunConfig, read_inputs=read_inputs
    )
    if isinstance(prepared, int):
        return prepared

    from tlt.build import build, close
    from tlt.loop import train

    run = build(*prepared)
    with run.heartbeat:
        train(run)
    close(run)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
