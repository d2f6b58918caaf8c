"""How a program under torchrun begins: logging, flags, checks; bad input is one line on each node, status 2 on all."""

import dataclasses
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tlt.arguments import parse
from tlt.config.requirement import is_count, require


def told(name: str, default: int, *, least: int) -> int:
    """A number that torchrun puts into the environment. Raises ValueError naming the variable."""
    text = os.environ.get(name, str(default))
    require(is_count(text) and int(text) >= least, f"{name} in the environment", text, f"a number of at least {least}")
    return int(text)


def ranks_per_node(world_size: int) -> int:
    """Ranks of each machine, as torchrun says; all of them where it does not. Raises ValueError."""
    return told("LOCAL_WORLD_SIZE", world_size, least=1)


def prepare(
    argv: Sequence[str], *, program: str, description: str, config_class: type,
    read_inputs: Callable[[Any, int], Any],
) -> tuple[Any, Any] | int:  # fmt: skip
    """(config, inputs) of a run, or the exit status where there is none: 2 after bad input, 0 after --dry-run.

    `program` is its path in the repository; `read_inputs(config, world_size)` raises ValueError naming flag or file.
    """
    name = Path(program).name
    try:
        rank, world_size = told("RANK", 0, least=0), told("WORLD_SIZE", 1, least=1)
        local_rank = told("LOCAL_RANK", rank, least=0)
    except ValueError as error:
        sys.stderr.write(f"{name}: error: {error}\n")
        return 2
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format=f"[rank {rank}] %(message)s" if world_size > 1 else "%(message)s",
        stream=sys.stderr,
        force=True,
    )
    logger = logging.getLogger(Path(program).stem)
    try:
        config = parse(argv, description, config_class)
        if not config.training.dry_run and "MASTER_ADDR" not in os.environ:
            raise ValueError(f"start with torchrun: torchrun --nproc_per_node N {program} ... (or use --dry-run)")
        inputs = read_inputs(config, world_size)
    except ValueError as error:
        if local_rank == 0:  # what is wrong may be wrong on one node only
            sys.stderr.write(f"{name}: error: {error}\n")
        return 2
    logger.info("config %s", json.dumps(dataclasses.asdict(config), indent=1))
    if config.training.dry_run:
        logger.info("dry run: the configuration is valid for %d ranks", world_size)
        return 0
    os.umask(os.umask(0o077) | 0o007)  # a run's files hold prompts and responses: not for everyone on the machine
    return config, inputs
