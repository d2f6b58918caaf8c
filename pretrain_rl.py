"""RL training of a language model: megatron-core policy, colocated vLLM rollouts, started by torchrun.

torchrun --nproc_per_node 2 pretrain_rl.py --hf-model DIR --save DIR --data-train reasoning-gym:chain_sum
"""

import json
import logging
import os
import sys
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Parse, check, build, train. Bad input: one line on rank 0's standard error and exit status 2 on every rank."""
    import dataclasses

    from tlt.arguments import parse

    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format=f"[rank {rank}] %(message)s" if world_size > 1 else "%(message)s",
        stream=sys.stderr,
        force=True,
    )
    logger = logging.getLogger("pretrain_rl")
    try:
        config = parse(argv, __doc__)
        if not config.training.dry_run and "MASTER_ADDR" not in os.environ:
            raise ValueError("start with torchrun: torchrun --nproc_per_node N pretrain_rl.py ... (or use --dry-run)")
        from tlt.rollout.vllm.engine import set_engine_environment

        set_engine_environment(config.rollout)
        from tlt.build import Inputs, build, close

        inputs = Inputs(config, world_size=world_size)
    except ValueError as error:
        if rank == 0:
            sys.stderr.write(f"pretrain_rl.py: error: {error}\n")
        return 2
    logger.info("config %s", json.dumps(dataclasses.asdict(config), indent=1))
    if config.training.dry_run:
        logger.info("dry run: the configuration is valid for %d ranks", world_size)
        return 0

    from tlt.loop import train

    run = build(config, inputs)
    train(run)
    close(run)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
