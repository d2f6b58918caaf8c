"""Training prompts in a resumable order, and the held-out prompts that training never draws."""

import logging
from collections.abc import Sequence, Set
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from tlt.config import DataConfig, EvalConfig
from tlt.data.jsonl import numbered_lines
from tlt.data.source import Problem, derive_seed, parse_question, parse_source, question_key
from tlt.types import Prompt, drawn_prompt_id

logger = logging.getLogger(__name__)

MAX_DRAWS = 10_000
"""Problems of one source that may be skipped in a row before it counts as exhausted."""


class PromptBuilder:
    """Problem -> tokenised Prompt, within the length that leaves room for a response."""

    def __init__(self, config: DataConfig, *, tokenizer: Any, max_prompt_tokens: int):
        if config.chat_template and tokenizer.chat_template is None:
            raise ValueError(
                "--data-chat-template: the tokenizer of --hf-model has no chat template; use --no-data-chat-template"
            )
        self.config = config
        self.tokenizer = tokenizer
        self.max_prompt_tokens = max_prompt_tokens

    def build(self, problem: Problem, source: str) -> Prompt:
        """Raises ValueError naming the problem where its prompt is too long."""
        if self.config.chat_template:
            messages = list(problem.messages or [{"role": "user", "content": problem.question}])
            messages[-1] = messages[-1] | {"content": messages[-1]["content"] + self.config.instruction}
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            token_ids = self.tokenizer.encode(text, add_special_tokens=False)
        elif problem.messages is not None:
            raise ValueError(f'{problem.name}: "messages" need a chat template; remove --no-data-chat-template')
        else:
            token_ids = self.tokenizer.encode(problem.question + self.config.instruction)
        if len(token_ids) > self.max_prompt_tokens:
            raise ValueError(
                f"prompt {problem.name} has {len(token_ids)} tokens; at most {self.max_prompt_tokens} fit the context "
                "beside --rollout-max-response-tokens (see --rollout-max-model-len)"
            )
        return Prompt(
            prompt_id=problem.name,
            source=source,
            token_ids=tuple(token_ids),
            text=problem.question,
            answer=problem.answer,
        )


class PromptStream:
    """Endless training prompts: sources mixed by weight, excluded questions (by `question_key`) skipped; a function of
    seed and cursor."""

    def __init__(self, config: DataConfig, builder: PromptBuilder, *, seed: int, excluded: Set[str]):
        self.sources = [
            parse_source(
                spec, "--data-train", seed=derive_seed(seed, "train"), max_rejected=config.max_rejected
            ) for spec in config.train
        ]  # fmt: skip
        self.weights = config.weights or tuple(1.0 for _ in self.sources)
        self.builder = builder
        self.seed = seed
        self.excluded = excluded
        self.num_drawn = 0
        self.positions = [0] * len(self.sources)
        for source in self.sources:
            if source.num_problems is not None:  # a file's prompts are all checked now, not in the middle of the run
                for position in range(source.num_problems):
                    builder.build(source.problem(position), source.name)

    def next_batch(self, num_prompts: int) -> list[Prompt]:
        """The next prompts, each with its own id even where a question comes again."""
        return [self._next() for _ in range(num_prompts)]

    def _next(self) -> Prompt:
        choice = Random(derive_seed(self.seed, "mixture", self.num_drawn))
        index = choice.choices(range(len(self.sources)), weights=self.weights)[0]
        self.num_drawn += 1
        source = self.sources[index]
        for _ in range(MAX_DRAWS):
            position = self.positions[index]
            self.positions[index] += 1
            problem = source.problem(position)
            if question_key(problem.question) not in self.excluded:
                prompt = self.builder.build(problem, source.name)
                # A file's problem comes once an epoch, and sources may be of one task: the draw number tells apart.
                return replace(prompt, prompt_id=drawn_prompt_id(self.num_drawn, prompt.prompt_id))
        raise ValueError(
            f"--data-train {source.name}: {MAX_DRAWS} problems in a row are held out or excluded; "
            "hold out fewer (--eval-num-prompts) or exclude fewer (--data-exclude)"
        )

    def state_dict(self) -> dict:
        return {"num_drawn": self.num_drawn, "positions": list(self.positions)}

    def load_state_dict(self, state: dict) -> None:
        self.num_drawn, self.positions = state["num_drawn"], list(state["positions"])


def excluded_questions(paths: Sequence[str]) -> set[str]:
    """Keys of the questions in JSONL files. Raises ValueError naming file and line."""
    keys = set()
    for path in paths:
        if not Path(path).is_file():
            raise ValueError(f"--data-exclude: {path} is not a file")
        for number, line in numbered_lines(Path(path)):
            keys.add(question_key(parse_question(line, f"{path}, line {number}")[1]))
    return keys


def held_out_prompts(
    eval_config: EvalConfig, data: DataConfig, builder: PromptBuilder, *, seed: int, excluded: Set[str] = frozenset()
) -> list[Prompt]:
    """`num_prompts` distinct problems: of --eval-sources equally many each, else of --data-train by its weights.

    Fixed for the run by its seed. A source with fewer distinct problems than asked for gives what it has, saying so.
    """
    specs, flag = (eval_config.sources, "--eval-sources") if eval_config.sources else (data.train, "--data-train")
    weights = (None if eval_config.sources else data.weights) or [1.0] * len(specs)
    prompts: dict[str, Prompt] = {}
    for number, spec in enumerate(specs):
        source = parse_source(spec, flag, seed=derive_seed(seed, "held out"), max_rejected=data.max_rejected)
        wanted = round(eval_config.num_prompts * sum(weights[: number + 1]) / sum(weights))
        num_draws = MAX_DRAWS if source.num_problems is None else source.num_problems
        for position in range(num_draws):
            if len(prompts) == wanted:
                break
            problem = source.problem(position)
            key = question_key(problem.question)
            if key not in prompts and key not in excluded:
                prompt = builder.build(problem, source.name)
                prompts[key] = replace(prompt, prompt_id=f"held-out {len(prompts)}:{prompt.prompt_id}")
        if len(prompts) < wanted:
            logger.warning("%s %s has fewer distinct problems than --eval-num-prompts asks for", flag, spec)
    return list(prompts.values())
