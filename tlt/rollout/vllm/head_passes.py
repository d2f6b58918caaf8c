"""How a head's passes are computed: in torch with the head's own modules, or on a CPU with what is faster there.

Shapes: T rows, B of them queries, H hidden, V_draft tokens that may be drafted.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch.nn.functional import linear

from tlt.drafter.arrays import floats_of, memory_of
from tlt.drafter.model import EagleHead
from tlt.rollout.vllm.packed_head import PackedLinear, packed
from tlt.rollout.vllm.paged_attention import CpuPagedAttention, FlashPagedAttention

FEW_QUERIES, FEW_ROWS = 4, 16
"""Up to so many queries a pass mostly reads weights, each once; of more, matrix kernels make better use. Rows that
only leave their keys cost a fifth as much."""


class TorchPasses:
    """In torch; a GPU's graphs may hold what it computes, so weights are replaced in place.

    `output_weight` [V_draft, H] are rows of the target's LM head, None where `read_out` is the layer itself.
    """

    def __init__(
        self, head: EagleHead, attention: CpuPagedAttention | FlashPagedAttention,
        read_out: Callable[[torch.Tensor], torch.Tensor],
    ):  # fmt: skip
        self.head = head
        self.live = head
        """What computes."""
        self.attention = attention
        self.read_out = read_out
        """Logits [B, V_draft] of the head's outputs [B, H]."""
        self.output_weight: torch.Tensor | None = None

    def weights_changed(self) -> None:
        """The head's were replaced in place."""

    def output_changed(self, weight: torch.Tensor) -> None:
        """Read out with `weight` from now on, [V_draft, H] of the head's dtype and device."""
        if self.output_weight is not None:
            self.output_weight.copy_(weight)
            return
        self.output_weight = weight
        self.read_out = partial(linear, weight=weight)

    def fuse(self, states: torch.Tensor) -> torch.Tensor:
        """[T, H] of the target's states that the head reads."""
        return self.live.fuse(states)

    def forward(
        self, embeddings: torch.Tensor, hidden: torch.Tensor, position: torch.Tensor, slots: torch.Tensor,
        block_table: torch.Tensor, seq_lens: torch.Tensor, rows: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        """[B, H] at `rows` [B] of T, all where None; each is the last token of a sequence of `seq_lens` [B] int32
        tokens whose blocks are `block_table` [B, blocks] int32. Keys of all rows go to `slots` [T]."""
        attend = self.attention.plan(block_table=block_table, seq_lens=seq_lens, slots=slots)
        return self.live(embeddings, hidden, position, attend, rows)

    def probs(self, hidden: torch.Tensor, temperatures: Sequence[float]) -> torch.Tensor:
        """[B, V_draft] float32 that follow outputs [B, H]."""
        logits = self.read_out(hidden).float()
        if any(one != 1 for one in temperatures):
            logits = logits / torch.tensor(temperatures, device=logits.device)[:, None]
        return logits.softmax(1)


class CpuPasses(TorchPasses):
    """Few rows by a compiled function (tlt/drafter/head_kernel.py), more by packed matrices.

    A bfloat16 head is read as int8 by the first: drafts are proposals, which need not be those of its exact weights.
    """

    def __init__(
        self, head: EagleHead, attention: CpuPagedAttention, read_out: Callable[[torch.Tensor], torch.Tensor]
    ):
        super().__init__(head, attention, read_out)
        self.weights_changed()
        self._output: tuple[np.ndarray, np.ndarray] | None = None
        one = torch.zeros(1, dtype=torch.int64)
        none = torch.zeros(1, head.shape.hidden_size, dtype=head.fc.weight.dtype)
        # Compiles, which takes seconds and must not fall into an engine step.
        self._few(none, none, one, one, one[None].int(), one.int() + 1, None)
        self._few_probs(matrix_of(head.fc.weight[:, : head.shape.hidden_size]), none, [1.0])

    def weights_changed(self) -> None:
        self.live = packed(self.head)
        self._weights = kernel_weights(self.head)

    def output_changed(self, weight: torch.Tensor) -> None:
        self.output_weight = weight
        self.read_out = PackedLinear(weight)
        self._output = matrix_of(weight)

    def forward(
        self, embeddings: torch.Tensor, hidden: torch.Tensor, position: torch.Tensor, slots: torch.Tensor,
        block_table: torch.Tensor, seq_lens: torch.Tensor, rows: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        is_few = len(seq_lens) <= FEW_QUERIES and len(position) <= FEW_ROWS
        compute = self._few if is_few else super().forward
        return compute(embeddings, hidden, position, slots, block_table, seq_lens, rows)

    def probs(self, hidden: torch.Tensor, temperatures: Sequence[float]) -> torch.Tensor:
        if self._output is None or len(hidden) > FEW_QUERIES:
            return super().probs(hidden, temperatures)
        return self._few_probs(self._output, hidden, temperatures)

    def _few(self, embeddings, hidden, position, slots, block_table, seq_lens, rows) -> torch.Tensor:
        from tlt.drafter.head_kernel import head_pass

        queries = np.arange(len(position)) if rows is None else rows.numpy()
        output = head_pass(
            floats_of(embeddings), floats_of(hidden), position.numpy(), slots.numpy(), queries, block_table.numpy(),
            self.attention.block_size, seq_lens.numpy(), *self._weights, *self.attention.memory,
        )  # fmt: skip
        return torch.from_numpy(output).to(hidden.dtype)

    def _few_probs(self, matrix: tuple, hidden: torch.Tensor, temperatures: Sequence[float]) -> torch.Tensor:
        from tlt.drafter.head_kernel import read_out

        return torch.from_numpy(read_out(matrix, floats_of(hidden), np.array(temperatures, dtype=np.float32)))


def kernel_weights(head: EagleHead) -> tuple:
    """What `head_pass` reads of a head, by the order of its parameters."""
    (layer,) = head.layers
    attention, mlp = layer.self_attn, layer.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    return (
        # Apart: embeddings are far smaller than hidden states and their weights as much larger, so that in steps of
        # one size for both the others would be lost (1.5 % of the acceptance length).
        *(matrix_of(half) for half in head.fc.weight.chunk(2, dim=1)),
        *(matrix_of(module.weight) for module in projections),
        floats_of(layer.post_attention_layernorm.weight), np.float32(head.shape.rms_norm_eps),
        *(matrix_of(module.weight) for module in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)),
        floats_of(head.rotary.cos), floats_of(head.rotary.sin),
    )  # fmt: skip


def matrix_of(weight: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(weights [N, K], scales [N] float32): float32 as it is, bfloat16 as the nearest of 255 steps of each row."""
    weight = weight.detach()
    if weight.dtype == torch.float32:
        return memory_of(weight.contiguous()), np.ones(len(weight), dtype=np.float32)
    scales = weight.float().abs().amax(1).clamp(min=1e-30) / 127
    return (weight.float() / scales[:, None]).round().to(torch.int8).numpy(), scales.numpy()
