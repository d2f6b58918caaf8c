"""What an engine step costs on a named GPU: the larger of reading all weights and of the arithmetic, plus overheads.

Data sheets and published model shapes, and efficiencies that are assumptions (`Efficiency`): no machine was measured
here. Attention reads the keys and values of every running request once a step, whatever is verified.
"""

from dataclasses import dataclass

import numpy as np

from tlt.spec.step_model import DrafterModel, Line, StepModel

BYTES = 2
"""Of a weight, a key or a value: bf16."""


@dataclass(frozen=True, kw_only=True)
class GPU:
    """Dense bf16, from the vendor's data sheet."""

    flops_per_s: float
    bytes_per_s: float
    memory_gib: float


GPUS = {
    "A100": GPU(flops_per_s=312e12, bytes_per_s=2.039e12, memory_gib=80),
    "H100": GPU(flops_per_s=989e12, bytes_per_s=3.35e12, memory_gib=80),
    "H200": GPU(flops_per_s=989e12, bytes_per_s=4.8e12, memory_gib=141),
}
"""SXM variants."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A dense decoder, as its config.json says."""

    num_params: float
    num_layers: int
    hidden_size: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    @property
    def kv_bytes(self) -> int:
        """Of one token, all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * BYTES

    @property
    def layer_params(self) -> float:
        """One layer, embedding and output apart."""
        return (self.num_params - 2 * self.vocab_size * self.hidden_size) / self.num_layers


MODELS = {
    "7B": ModelShape(
        num_params=7.62e9, num_layers=28, hidden_size=3584, num_kv_heads=4, head_dim=128, vocab_size=152_064
    ),
    "32B": ModelShape(
        num_params=32.8e9, num_layers=64, hidden_size=5120, num_kv_heads=8, head_dim=128, vocab_size=152_064
    ),
    "70B": ModelShape(
        num_params=70.6e9, num_layers=80, hidden_size=8192, num_kv_heads=8, head_dim=128, vocab_size=128_256
    ),
}  # fmt: skip
"""Qwen2.5-7B, Qwen2.5-32B, Llama-3.3-70B."""


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Assumptions. `memory` and `host_s` were chosen so that a 7B model at batch 1 takes what TLT's table 2 reports
    without speculation (164.65 tokens a second on an H100, second-hand: 6.07 ms); the rest is what such systems
    commonly reach."""

    memory: float = 0.85
    """Share of the data sheet's bandwidth."""
    arithmetic: float = 0.6
    """Share of the data sheet's arithmetic, in an engine step."""
    training: float = 0.35
    """The same in the policy's update."""
    host_s: float = 0.7e-3
    """Of an engine step, beside the GPU's work."""
    all_reduce_s: float = 10e-6
    """Each of the two all-reduces of a layer under tensor parallelism."""
    pass_s: float = 0.5e-3
    """Of a drafter's pass, beside its weights. The slope over depths of TLT's figure 13 (32B, TP 4, second-hand) gives
    0.25 ms; as much again stands for the host's work around drafts."""


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """Seconds of an engine step by verified tokens, without attention to earlier tokens; `Times`."""

    gpu: GPU
    shape: ModelShape
    tp_size: int
    efficiency: Efficiency

    def seconds(self, size: float) -> float:
        """Of that many tokens."""
        gpu, share = self.gpu, self.efficiency
        read_s = self.shape.num_params * BYTES / (self.tp_size * gpu.bytes_per_s * share.memory)
        compute_s = 2 * self.shape.num_params * size / (self.tp_size * gpu.flops_per_s * share.arithmetic)
        all_reduces = 2 * self.shape.num_layers if self.tp_size > 1 else 0
        return share.host_s + all_reduces * share.all_reduce_s + max(read_s, compute_s)

    @property
    def context_s(self) -> float:
        """Seconds that one token of context adds to each engine step of its request."""
        gpu = self.gpu
        return self.shape.kv_bytes / (self.tp_size * gpu.bytes_per_s * self.efficiency.memory)

    @property
    def head_pass_s(self) -> float:
        """One pass of an EAGLE head: one layer, the projection of two hidden states, and the output layer."""
        shape = self.shape
        params = shape.layer_params + 2 * shape.hidden_size**2 + shape.vocab_size * shape.hidden_size
        read_s = params * BYTES / (self.tp_size * self.gpu.bytes_per_s * self.efficiency.memory)
        return self.efficiency.pass_s + read_s

    def update_s(self, num_tokens: float, *, num_gpus: int) -> float:
        """Old log-probabilities and one update with recomputation on so many tokens: 10 operations a weight."""
        return 10 * self.shape.num_params * num_tokens / (num_gpus * self.gpu.flops_per_s * self.efficiency.training)

    def kv_room(self) -> float:
        """Tokens of context that fit into 90 % of a replica's memory beside the weights."""
        free = 0.9 * self.tp_size * self.gpu.memory_gib * 2**30 - self.shape.num_params * BYTES
        return free / self.shape.kv_bytes


def roofline(gpu: str, model: str, *, tp_size: int, efficiency: Efficiency | None = None) -> Roofline:
    """Of names in `GPUS` and `MODELS`."""
    return Roofline(gpu=GPUS[gpu], shape=MODELS[model], tp_size=tp_size, efficiency=efficiency or Efficiency())


def gpu_model(times: Roofline, *, stands: tuple[float, ...], suffix: tuple[float, float]) -> StepModel:
    """With a head whose tokens stand with `stands` by depth, and suffix drafts for a share of requests whose tokens
    stand with a probability, (share, probability): both are assumptions of the caller."""
    covers, suffix_stands = suffix
    return StepModel(
        steps=times,
        drafters={
            "eagle": DrafterModel(covers=(1.0,), stands=stands, passes=Line(times.head_pass_s, 0.0)),
            "suffix": DrafterModel(covers=(covers,), stands=(suffix_stands,), passes=Line(50e-6, 0.0)),
        },
        noise=np.ones(1),
    )
