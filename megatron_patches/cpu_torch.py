"""`torch` as seen by one Megatron function on a machine without CUDA: `device="cuda"` means the CPU."""

import functools
import re
import types
from collections.abc import Callable
from contextlib import nullcontext

import torch

from megatron_patches.patch import TorchStandIn, rebound

FACTORIES = ("zeros", "ones", "empty", "full", "tensor", "zeros_like", "empty_like")


def _to_cpu(factory: Callable) -> Callable:
    @functools.wraps(factory)
    def wrapped(*args, **kwargs):
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return wrapped


class _CpuCuda(types.ModuleType):
    def __getattr__(self, name: str):
        return getattr(torch.cuda, name)


class _CpuStream:
    """The one order in which a CPU does things: whatever was asked of it has happened. An event of it is itself."""

    def wait_stream(self, stream: "_CpuStream") -> None: ...

    def record_event(self) -> "_CpuStream":
        return self

    def synchronize(self) -> None: ...


_CPU_STREAM = _CpuStream()
CPU_TORCH = TorchStandIn()
CPU_TORCH.cuda = _CpuCuda("torch.cuda")
CPU_TORCH.cuda.current_device = lambda: torch.device("cpu")
CPU_TORCH.cuda.synchronize = lambda device=None: None
CPU_TORCH.cuda.Stream = CPU_TORCH.cuda.current_stream = lambda: _CPU_STREAM
CPU_TORCH.cuda.stream = lambda stream: nullcontext()
for _name in FACTORIES:
    setattr(CPU_TORCH, _name, _to_cpu(getattr(torch, _name)))


def _name_cpu_types(constant: object) -> object:
    """`torch.cuda.FloatTensor` -> `torch.FloatTensor` in a code object's constants, nested ones included."""
    if isinstance(constant, str):
        return re.sub(r"^torch\.cuda\.(\w+Tensor)$", r"torch.\1", constant)
    if isinstance(constant, tuple):
        return tuple(map(_name_cpu_types, constant))
    if isinstance(constant, types.CodeType):
        return constant.replace(co_consts=_name_cpu_types(constant.co_consts))
    return constant


def on_cpu(original: Callable) -> Callable:
    """The same code with `torch` bound to CPU_TORCH and CUDA's tensor type names made the CPU's.

    Decorators that keep `__wrapped__` are looked through.
    """
    inner = original
    while hasattr(inner, "__wrapped__"):
        inner = inner.__wrapped__
    return functools.update_wrapper(rebound(inner, CPU_TORCH, _name_cpu_types(inner.__code__)), inner)


def with_cuda_as_identity(original: Callable) -> Callable:
    """The same call, during which `tensor.cuda()` returns the tensor itself and `device="cuda"` means the CPU."""
    copied = on_cpu(original)

    @functools.wraps(original)
    def wrapped(*args, **kwargs):
        upstream = torch.Tensor.cuda
        torch.Tensor.cuda = lambda tensor, *args, **kwargs: tensor
        try:
            return copied(*args, **kwargs)
        finally:
            torch.Tensor.cuda = upstream

    return wrapped
