"""Names of the shared memory through which tensor-parallel ranks exchange tensors on a CPU.

vLLM 0.32 names it after the rendezvous, which is `env://` for every job of torchrun. So a job that starts while
another one runs on the machine, or after one that was killed, finds the segments there and ends with errno 17.
"""

from typing import Any


def name_after(job: str) -> None:
    """Name the segments of communicators made from now on after a job; the same on all ranks of a replica."""
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    def name(communicator: Any) -> str:
        return f"{job}-{communicator.unique_name}-{'-'.join(map(str, communicator.ranks))}"

    _CPUSHMDistributed.make_group_name = staticmethod(name)
