"""An engine that writes given responses again, so that strategies which round differently do the same work."""


class Replay:
    """Makes an engine draw the tokens of `texts`, by request name; whatever it drafts is verified against these."""

    def __init__(self, engine):
        self.runner = engine.runner
        self.texts: dict[str, tuple[int, ...]] = {}
        self.num_drawn = self.num_forced = 0
        self._own = engine.sampler.draw
        engine.sampler.draw = self._draw

    def _draw(self, logits, probs, rows, seeds, positions):
        from tlt.rollout.vllm.drafting import request_name

        drawn = self._own(logits, probs, rows, seeds, positions)
        batch = self.runner.input_batch
        texts = [self.texts.get(request_name(self.runner, request_id), ()) for request_id in batch.req_ids]
        row_before = -1
        for index, (row, position) in enumerate(zip(rows.tolist(), positions.tolist(), strict=True)):
            at = position - int(batch.num_prompt_tokens[row])
            if not 0 <= at < len(texts[row]):
                continue
            if row != row_before:  # those behind a draft that falls are no draws
                self.num_drawn += 1
                self.num_forced += int(drawn[index]) != texts[row][at]
                row_before = row
            drawn[index] = texts[row][at]
        return drawn

    def take_counts(self) -> dict[str, int]:
        """Tokens that began a step since the last call, and how many of them the engine would have drawn otherwise."""
        counts = {"num_drawn": self.num_drawn, "num_forced": self.num_forced}
        self.num_drawn = self.num_forced = 0
        return counts
