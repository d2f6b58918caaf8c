"""Tensor-parallel engines on a machine where a killed job left its shared memory."""

from pathlib import Path

from tests.distributed.ranks import run_ranks
from tests.engine.engines import generate, make_engine, make_prompts, tokens
from tests.tiny_models import write_tiny_model
from tlt.types import SamplingConfig

SEGMENTS = Path("/dev/shm")
GREEDY = SamplingConfig(temperature=0, max_response_tokens=4)


def _generate(rank: int, world_size: int, folder: Path) -> None:
    engine = make_engine(folder, tensor_parallel_size=2)
    assert all(tokens(generate(engine, make_prompts(2), GREEDY)))


def test_what_a_killed_job_left_stops_no_other_one(tmp_path):
    left = [SEGMENTS / f"-tp:0-[0-1]-cpushm_{rank}" for rank in range(2)]  # vLLM's names under torchrun
    made = [path for path in left if not path.exists()]
    for path in made:
        path.write_bytes(bytes(4096))
    try:
        run_ranks(_generate, 2, write_tiny_model("llama", tmp_path / "model"))
    finally:
        for path in made:
            path.unlink()
