"""A head's passes as CUDA graphs: between two tokens of a draft nothing waits for the host.

Two graphs for each captured batch size. The first catches up with the tokens that were verified in the last engine
step and drafts one; the second drafts one more on the head's own output, and is replayed as often as tokens are asked
for, so drafts of all lengths share it (arXiv 2511.16665: a drafter's graphs once for all strategies). All tokens come
to the host in one copy; where a draft ends early, what was drafted behind it is dropped: on a GPU a pass costs less
than waiting for what decides about it.

Shapes: B requests, padded to S of a captured size; W positions at most that a graph catches up with; K draft tokens at
most. Padding computes at position 0 of block 0, which vLLM gives to nobody.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from tlt.rollout.vllm.learned_drafter import Drafted, DraftRequest, LearnedDrafter
from tlt.spec.draft_kind import COUPLED, ONE_HOT, SAMPLED
from tlt.spec.graph_plan import captured_sizes
from tlt.spec.randomness import DRAFT, TOKEN

BEST = -1
"""In the place of a stream: the most probable token."""
STREAMS = {ONE_HOT: BEST, COUPLED: TOKEN, SAMPLED: DRAFT}
NO_ROW = -1
"""Row of the engine's batch that padding has."""
WARM_UPS = 2
"""Runs before a capture."""


class Inputs:
    """What the host says about S requests: one array of int64, one copy to the device."""

    def __init__(self, size: int, *, window: int, device: torch.device):
        shapes = {
            "next_tokens": (size, window), "position": (size, window), "slots": (size, window), "last": (size,),
            "seeds": (size,), "num_tokens": (size,), "asked": (size,), "streams": (size,), "scales": (size,),
            "rows": (size,),
        }  # fmt: skip
        length = sum(int(np.prod(shape)) for shape in shapes.values())
        self._host = torch.zeros(length, dtype=torch.int64, pin_memory=device.type != "cpu")
        self._device = torch.zeros(length, dtype=torch.int64, device=device)
        host = self._host.numpy()
        begin = 0
        for name, shape in shapes.items():
            end = begin + int(np.prod(shape))
            setattr(self, name, self._device[begin:end].view(shape))
            setattr(self, f"host_{name}", host[begin:end].reshape(shape))
            begin = end
        self.scales = self.scales.view(torch.float64)
        self.host_scales = self.host_scales.view(np.float64)
        self.clear()
        self.send()

    def clear(self) -> None:
        """Nothing but padding."""
        self._host.zero_()
        self.host_last[:] = np.arange(len(self.host_last)) * self.host_position.shape[1]
        self.host_num_tokens[:] = 2
        self.host_streams[:] = BEST
        self.host_scales[:] = 1.0
        self.host_rows[:] = NO_ROW

    def send(self) -> None:
        """To the device; the host's side may be written again once an output has come back."""
        self._device.copy_(self._host, non_blocking=True)


class Passes:
    """One captured batch size: buffers, and the two passes that work on them."""

    def __init__(
        self, drafter: LearnedDrafter, size: int, *, num_tokens: int, race: Callable, probs: torch.Tensor,
    ):  # fmt: skip
        self.drafter = drafter
        self.race = race
        device = drafter.runner.device
        self.inputs = Inputs(size, window=num_tokens + 1, device=device)
        hidden_size = drafter.head.shape.hidden_size
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.token = torch.zeros(size, dtype=torch.int64, device=device)
        self.hidden = torch.zeros(size, hidden_size, dtype=drafter.runner.model_config.dtype, device=device)
        self.drafted = torch.zeros(2, num_tokens, size, dtype=torch.int64, device=device)
        """Tokens, and the bits of their probabilities in float64."""
        self.probs = probs  # [K, S, V_draft]
        self.block_table = torch.zeros(size, drafter.pool.num_blocks_of_row, dtype=torch.int32, device=device)
        self.passes = (self.first, self.more)[:num_tokens]  # a draft of one token has no second pass
        self.replay: Sequence[Callable[[], None]] = self.passes

    def first(self) -> None:
        """Catch up, and draft a token."""
        own, drafter = self.inputs, self.drafter
        self.step.zero_()
        self.block_table.copy_(drafter.pool.table_on_device(own.rows.clamp(min=0)) * (own.rows != NO_ROW)[:, None])
        slots = own.slots.flatten()
        hidden = drafter.passes.fuse(drafter.pool.at(drafter.head.reads, slots))
        self._pass(own.next_tokens.flatten(), hidden, own.position.flatten(), slots, own.num_tokens - 1, own.last)

    def more(self) -> None:
        """Draft one token more; requests that asked for fewer compute padding."""
        own, block_size = self.inputs, self.drafter.pool.block_size
        position = own.num_tokens - 2 + self.step
        goes_on = self.step < own.asked
        position = torch.where(goes_on, position, 0)
        block = self.block_table.gather(1, (position // block_size)[:, None]).squeeze(1)
        slots = torch.where(goes_on, block * block_size + position % block_size, 0)
        self._pass(self.token, self.hidden, position, slots, position + 1, None)

    def _pass(
        self, tokens: torch.Tensor, hidden: torch.Tensor, position: torch.Tensor, slots: torch.Tensor,
        seq_lens: torch.Tensor, rows: torch.Tensor | None,
    ) -> None:  # fmt: skip
        self.hidden.copy_(
            self.drafter.forward(tokens, hidden, position, slots, self.block_table, seq_lens.int(), rows=rows)
        )  # fmt: skip
        self._choose()

    def _choose(self) -> None:
        """The next token of each request, by the head's distribution at its output."""
        own, ids = self.inputs, self.drafter.head.draft_token_ids
        logits = self.drafter.passes.read_out(self.hidden).float() / own.scales.float()[:, None]
        probs = logits.softmax(1)
        drawn = self.race(probs, own.seeds, own.num_tokens + self.step, own.streams.clamp(min=0), token_ids=ids)
        columns = torch.where(own.streams == BEST, logits.argmax(1), drawn).clamp(min=0)  # NaN is found on the host
        confidence = probs.gather(1, columns[:, None]).squeeze(1).double()
        self.token.copy_(columns if ids is None else ids[columns])
        self.drafted.index_copy_(1, self.step, torch.stack([self.token, confidence.view(torch.int64)])[:, None])
        self.probs.index_copy_(0, self.step, probs[None])
        self.step += 1

    def warm_up(self) -> None:
        """Let libraries and kernels allocate and compile what a capture must not."""
        for _ in range(WARM_UPS):
            for one in self.passes:
                one()

    def capture(self, pool: Any, stream: Any) -> None:
        """Replace the passes by their graphs."""
        graphs = []
        for one in self.passes:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                one()
            graphs.append(graph)
        self.replay = [graph.replay for graph in graphs]


class DraftGraphs:
    """Chains of one head: `begin` is a `LearnedDrafter.chain`."""

    def __init__(self, drafter: LearnedDrafter, *, race: Callable):
        self.drafter = drafter
        self.race = race
        runner = drafter.runner
        self.num_tokens = runner.num_spec_tokens
        self.window = self.num_tokens + 1
        self.sizes = captured_sizes(runner.max_num_reqs)
        self._passes: dict[int, Passes] = {}

    def _of_size(self, num_requests: int) -> Passes:
        """Captured with the first draft, whose time it is counted to, all sizes together."""
        if not self._passes:
            # One draft is live at a time: all sizes write their probabilities to the same place.
            ids, vocabulary = self.drafter.head.draft_token_ids, self.drafter.runner.get_model().config.vocab_size
            num_columns = vocabulary if ids is None else len(ids)
            probs = torch.zeros(
                self.num_tokens, self.sizes[-1], num_columns, device=self.drafter.runner.device
            )  # fmt: skip
            for size in self.sizes:
                self._passes[size] = Passes(
                    self.drafter, size, num_tokens=self.num_tokens, race=self.race, probs=probs[:, :size]
                )  # fmt: skip
            if torch.cuda.is_available() and not self.drafter.runner.model_config.enforce_eager:
                self._capture()
        return self._passes[next(size for size in self.sizes if size >= num_requests)]

    def _capture(self) -> None:
        """Of all sizes; the ranks of a replica, which draft together, come here together."""
        from vllm.distributed.parallel_state import graph_capture

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for passes in self._passes.values():
                passes.warm_up()
        torch.cuda.current_stream().wait_stream(stream)
        pool = torch.cuda.graph_pool_handle()
        # Inside of this context vLLM's all-reduce remembers the buffers that graphs read, and tells them to the other
        # ranks at its end. The largest first: the smaller ones find their memory in the pool that it left.
        with graph_capture(device=self.drafter.runner.device) as context:
            for size in reversed(self.sizes):
                self._passes[size].capture(pool, context.stream)

    def begin(self, requests: Sequence[DraftRequest], kinds: Sequence[str]) -> "DraftedAtOnce":
        """Draft as many tokens as any of the requests asks for."""
        drafter = self.drafter
        passes = self._of_size(len(requests))
        begin_s = time.perf_counter()
        count = len(requests)
        rows = np.array([request.row for request in requests])
        ends = np.array([request.num_tokens - 1 for request in requests])
        asked = np.array([request.num_draft_tokens for request in requests])
        begins = np.array([drafter.num_cached(request) for request in requests])
        late = np.flatnonzero(ends - begins > self.window)
        if len(late):  # the first draft of a request, or the first after others drafted or none did
            drafter.catch_up([requests[index] for index in late])
            begins[late] = ends[late] - 1
        own = passes.inputs
        own.clear()
        position = begins[:, None] + np.arange(self.window)
        is_real = position < ends[:, None]
        position = np.where(is_real, position, 0)
        own.host_position[:count] = position
        own.host_next_tokens[:count] = drafter.runner.input_batch.token_ids_cpu[rows[:, None], position + 1]
        own.host_slots[:count] = np.where(is_real, drafter.pool.slots_of_rows(rows, position), 0)
        own.host_last[:count] += ends - begins - 1
        own.host_seeds[:count] = [request.seed for request in requests]
        own.host_num_tokens[:count] = ends + 1
        own.host_asked[:count] = asked
        own.host_streams[:count] = [STREAMS[kind] for kind in kinds]
        own.host_scales[:count] = [request.temperature if request.temperature > 0 else 1.0 for request in requests]
        own.host_rows[:count] = rows
        own.send()
        depth = int(asked.max())
        passes.replay[0]()
        for _ in range(depth - 1):
            passes.replay[1]()
        drafted = passes.drafted[:, :depth, :count].cpu()
        drafter.caught_up(requests)
        confidences = drafted[1].numpy().view(np.float64)
        if np.isnan(confidences[np.arange(depth)[:, None] < asked]).any():
            raise RuntimeError(f"drafter {drafter.name}: no token has a probability: NaN?")
        return DraftedAtOnce(
            tokens=drafted[0], confidences=confidences, probs=passes.probs,
            seconds=(time.perf_counter() - begin_s) / depth,
        )  # fmt: skip


class DraftedAtOnce:
    """A `Chain` whose tokens are all there."""

    def __init__(self, *, tokens: torch.Tensor, confidences: np.ndarray, probs: torch.Tensor, seconds: float):
        self.tokens = tokens  # [K, B]
        self.confidences = confidences  # [K, B]
        self.probs = probs  # [K, S, V_draft], until the next draft
        self.seconds = seconds
        self._num_steps = 0

    def step(self, rows: np.ndarray) -> Drafted:
        step = self._num_steps
        self._num_steps += 1
        index = torch.from_numpy(rows)
        return Drafted(
            tokens=self.tokens[step, index], probs=ProbsOfRows(self.probs[step], rows),
            confidences=self.confidences[step, rows], seconds=self.seconds,
        )  # fmt: skip


class ProbsOfRows:
    """Rows of probabilities on the device, each looked up when it is asked for: few are."""

    def __init__(self, probs: torch.Tensor, rows: np.ndarray):
        self.probs = probs
        self.rows = rows

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.probs[int(self.rows[index])]
