"""The target's hidden states of all tokens in the engine's KV cache, addressed as the cache is.

Each engine step writes what it computed at the slots of its tokens; a rejected token's entry is overwritten when the
position is computed again, and tokens found in the prefix cache have theirs from the request that computed them.
Nobody allocates or frees here: the engine's block tables say where a request's tokens are.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch


class TokenPool:
    """`states` [slots, layers, H] by the name that they have in a HiddenStateSample; those named in `num_layers` are
    kept. A slot is block x block size + offset."""

    def __init__(self, runner: Any, num_layers: Mapping[str, int]):
        self.runner = runner
        self.table = runner.input_batch.block_table[0]
        self.block_size = self.table.block_size
        group = runner.kv_cache_config.kv_cache_groups[0]
        blocks_per_kv_block = group.kv_cache_spec.block_size // self.block_size
        self.num_blocks = runner.kv_cache_config.num_blocks * blocks_per_kv_block
        num_slots, hidden_size = self.num_blocks * self.block_size, runner.model_config.get_hidden_size()
        self.states = {
            name: torch.zeros(
                num_slots, count, hidden_size, dtype=runner.model_config.dtype, device=runner.device
            )
            for name, count in num_layers.items()
        }  # fmt: skip

    def write(self, slots: torch.Tensor, computed: Mapping[str, Sequence[torch.Tensor]]) -> None:
        """What this engine step computed, at [T] slots: at least T rows [H] of each layer, then padding."""
        for name, kept in self.states.items():
            for layer, rows in enumerate(computed[name]):
                kept[:, layer].index_copy_(0, slots.long(), rows[: len(slots)])

    def at(self, name: str, slots: torch.Tensor) -> torch.Tensor:
        """[T, layers x H] at [T] slots."""
        kept = self.states[name]
        return kept[slots.to(kept.device)].flatten(1)

    def block_table(self, rows: torch.Tensor) -> torch.Tensor:
        """[B, blocks] int32, CPU: of these rows of the batch."""
        return self.table.get_cpu_tensor()[rows]

    def table_on_device(self, rows: torch.Tensor) -> torch.Tensor:
        """[B, blocks] int32, as of the engine step before: of [B] rows on the device, where nothing waits for it."""
        return self.table.get_device_tensor(self.table.max_num_reqs).index_select(0, rows)

    @property
    def num_blocks_of_row(self) -> int:
        """Columns of a block table."""
        return self.table.get_cpu_tensor().shape[1]

    def slots_of_rows(self, rows: np.ndarray, position: np.ndarray) -> np.ndarray:
        """[B, W] int64: slots of [B, W] positions of the requests at [B] rows of the batch."""
        blocks = self.table.get_numpy_array()[rows[:, None], position // self.block_size].astype(np.int64)
        return blocks * self.block_size + position % self.block_size

    def slots(self, block_table: torch.Tensor, index: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """[T] int64: slot of each position of the request at `index` of `block_table`."""
        blocks = block_table[index, position // self.block_size].long()
        return blocks * self.block_size + position % self.block_size

    def read(self, row: int, num_tokens: int) -> dict[str, torch.Tensor]:
        """All that is kept, [num_tokens, layers x H] on the CPU: at the first tokens of a row's request."""
        block_table = self.block_table(torch.tensor([row]))
        position = torch.arange(num_tokens)
        slots = self.slots(block_table, torch.zeros_like(position), position)
        return {name: self.at(name, slots).cpu() for name in self.states}
