"""Examples of prompt and response: from JSONL to the sequences of each optimizer step."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tlt.data.jsonl import numbered_lines
from tlt.data.prompts import PromptBuilder
from tlt.data.source import Problem, ShuffledEpochs, parse_question
from tlt.types import TrainSequence


def read_examples(
    spec: str, flag: str, builder: PromptBuilder, *, tokenizer: Any, stop_token_id: int, max_tokens: int
) -> list[TrainSequence]:
    """Sequences of `jsonl:<file>`, each line {"prompt" | "messages", "response"}; a response ends with the stop token.

    Prompts are built as in RL. Loss weights are 0 until a step is known. Raises ValueError naming file and line.
    """
    kind, _, path = spec.partition(":")
    if kind != "jsonl" or not Path(path).is_file():
        raise ValueError(f"{flag} must be `jsonl:<file>` with an existing file, got {spec!r}")
    sequences = []
    for number, line in numbered_lines(Path(path)):
        where = f"{path}, line {number}"
        record, question, messages = parse_question(line, where)
        response = record.get("response")
        if not isinstance(response, str) or not response:
            raise ValueError(f'{where}: needs "response" with text, got {response!r}')
        prompt = builder.build(Problem(name=where, question=question, messages=messages, answer={}), spec)
        token_ids = [*tokenizer.encode(response, add_special_tokens=False), stop_token_id]
        if len(prompt.token_ids) + len(token_ids) > max_tokens:
            raise ValueError(
                f"{where}: prompt and response have {len(prompt.token_ids) + len(token_ids)} tokens; "
                f"the model's context is {max_tokens}"
            )
        sequences.append(
            TrainSequence(
                token_ids=prompt.token_ids + tuple(token_ids),
                num_prompt_tokens=len(prompt.token_ids),
                advantage=0.0,
                rollout_logprobs=(),
                loss_weight=0.0,
            )
        )
    if not sequences:
        raise ValueError(f"{flag}: {path} holds no example")
    return sequences


def weighted(sequences: Sequence[TrainSequence]) -> tuple[TrainSequence, ...]:
    """The sequences of one optimizer step, weighted so that its loss is the mean over its response tokens."""
    num_tokens = sum(sequence.num_response_tokens for sequence in sequences)
    return tuple(replace(sequence, loss_weight=1.0 / num_tokens) for sequence in sequences)


class ExampleStream:
    """Optimizer steps of about equal size, examples shuffled anew each epoch; a function of seed and cursor."""

    def __init__(self, sequences: Sequence[TrainSequence], *, tokens_per_step: int, seed: int):
        self.sequences = sequences
        self.tokens_per_step = tokens_per_step
        self.order = ShuffledEpochs(len(sequences), seed, "examples")
        self.num_drawn = 0

    def next_step(self) -> tuple[TrainSequence, ...]:
        """As many examples, in order, as `tokens_per_step` holds, and at least one."""
        step: list[TrainSequence] = []
        num_tokens = 0
        while True:
            candidate = self.sequences[self.order.index(self.num_drawn)]
            num_tokens += len(candidate.token_ids)
            if step and num_tokens > self.tokens_per_step:
                return weighted(step)
            step.append(candidate)
            self.num_drawn += 1

    def state_dict(self) -> dict:
        return {"num_drawn": self.num_drawn}

    def load_state_dict(self, state: dict) -> None:
        self.num_drawn = state["num_drawn"]
