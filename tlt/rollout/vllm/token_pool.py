"""The target's last hidden states of all tokens in the engine's KV cache, addressed as the cache is.

Each engine step writes what it computed at the slots of its tokens; a rejected token's entry is overwritten when the
position is computed again, and tokens found in the prefix cache have theirs from the request that computed them.
Nobody allocates or frees here: the engine's block tables say where a request's tokens are.
"""

from typing import Any

import torch


class TokenPool:
    """`hidden_states` [slots, H]; a slot is block x block size + offset."""

    def __init__(self, runner: Any):
        self.runner = runner
        self.table = runner.input_batch.block_table[0]
        self.block_size = self.table.block_size
        group = runner.kv_cache_config.kv_cache_groups[0]
        blocks_per_kv_block = group.kv_cache_spec.block_size // self.block_size
        self.num_blocks = runner.kv_cache_config.num_blocks * blocks_per_kv_block
        size = (self.num_blocks * self.block_size, runner.model_config.get_hidden_size())
        self.hidden_states = torch.zeros(size, dtype=runner.model_config.dtype, device=runner.device)

    def write(self, slots: torch.Tensor, hidden_states: torch.Tensor) -> None:
        """[T, H] computed in this engine step, at [T] slots."""
        self.hidden_states.index_copy_(0, slots.long(), hidden_states)

    def block_table(self, rows: torch.Tensor) -> torch.Tensor:
        """[B, blocks] int32, CPU: of these rows of the batch."""
        return self.table.get_cpu_tensor()[rows]

    def slots(self, block_table: torch.Tensor, index: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """[T] int64: slot of each position of the request at `index` of `block_table`."""
        blocks = block_table[index, position // self.block_size].long()
        return blocks * self.block_size + position % self.block_size

    def read(self, row: int, num_tokens: int) -> torch.Tensor:
        """[num_tokens, H] on the CPU: at the first tokens of a row's request."""
        block_table = self.block_table(torch.tensor([row]))
        position = torch.arange(num_tokens)
        slots = self.slots(block_table, torch.zeros_like(position), position)
        return self.hidden_states[slots.to(self.hidden_states.device)].cpu()
