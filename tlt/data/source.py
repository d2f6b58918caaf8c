"""Where problems come from: procedural tasks of reasoning-gym, or a JSONL file of questions with gold answers."""

import difflib
import hashlib
import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Protocol

from tlt.data.jsonl import is_text, numbered_lines, parse_object
from tlt.data.procedural import REFUSED, make_dataset, make_item

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A question as asked, or the messages of a conversation, and what the reward function needs."""

    name: str
    """`<source>/<index>`, for messages and as the prompt's id."""
    question: str
    messages: tuple[dict, ...] | None
    answer: dict
    """JSON types; `kind` names the reward function."""


class Source(Protocol):
    name: str
    num_problems: int | None
    """None: without limit."""

    def problem(self, position: int) -> Problem:
        """Problem at a position of the source's endless order."""


def derive_seed(*parts: object) -> int:
    """A 31-bit seed from a run's seed and names: neighbouring seeds give unrelated streams."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1


def question_key(question: str) -> str:
    """Two problems are the same if their questions are, up to white space and case."""
    return " ".join(question.lower().split())


def parse_source(spec: str, flag: str, *, seed: int, max_rejected: int = 0) -> Source:
    """`reasoning-gym:<task>[:<JSON configuration>]` or `jsonl:<file>`, of which `max_rejected` lines may be
    bad. Raises ValueError naming the flag."""
    kind, _, rest = spec.partition(":")
    if kind == "reasoning-gym" and rest:
        task, _, config = rest.partition(":")
        return ReasoningGymSource(task, config, flag, seed=seed)
    if kind == "jsonl" and rest:
        return JsonlSource(Path(rest), flag, seed=seed, max_rejected=max_rejected)
    raise ValueError(f"{flag} must be `reasoning-gym:<task>[:<JSON configuration>]` or `jsonl:<file>`, got {spec!r}")


class ReasoningGymSource:
    """A procedural task: endless, each problem a function of (seed, position).

    reasoning-gym's datasets have a size, beyond which some tasks have no problem (gsm_symbolic, list_functions,
    word_ladder): each further block of that size is a dataset of a seed of its own.
    """

    num_problems = None

    def __init__(self, task: str, config: str, flag: str, *, seed: int):
        from reasoning_gym.factory import DATASETS

        if task not in DATASETS:
            near = difflib.get_close_matches(task, DATASETS, n=3) or sorted(DATASETS)[:3]
            raise ValueError(f"{flag}: reasoning-gym has no task {task!r}; close to it: {', '.join(near)}")
        if task in REFUSED:
            raise ValueError(f"{flag}: reasoning-gym:{task} is refused: it {REFUSED[task]}")
        try:
            self.config = json.loads(config) if config else {}
        except json.JSONDecodeError as error:
            raise ValueError(f"{flag}: the configuration of {task} is not JSON ({error}): {config}") from None
        self.name = f"reasoning-gym:{task}"
        self.task = task
        self.seed = derive_seed(seed, task, config)
        try:
            self.block_size = len(make_dataset(task, self.config, self.seed))
        except (TypeError, AssertionError, ValueError) as error:  # its three ways to say so
            refused = f"{flag}: reasoning-gym:{task} refuses the configuration {self.config}"
            raise ValueError(f"{refused}: {error}") from None
        if self.block_size < 1:
            raise ValueError(f"{flag}: the size of reasoning-gym:{task} must be at least 1, got {self.block_size}")

    def problem(self, position: int) -> Problem:
        block, index = divmod(position, self.block_size)
        seed = derive_seed(self.seed, block) if block else self.seed  # the first: as it was before there were others
        item = make_item(make_dataset(self.task, self.config, seed), index)
        answer = {
            "kind": "reasoning-gym", "task": self.task, "config": self.config, "seed": seed, "index": index,
        }  # fmt: skip
        return Problem(name=f"{self.name}/{position}", question=item["question"], messages=None, answer=answer)


class ShuffledEpochs:
    """Endless order of `size` items, shuffled anew each epoch; a function of the seed's parts and the position."""

    def __init__(self, size: int, *seed_parts: object):
        self.size = size
        self.seed_parts = seed_parts
        self._order: tuple[int, list[int]] = (-1, [])

    def index(self, position: int) -> int:
        """Item at a position of the endless order."""
        epoch, offset = divmod(position, self.size)
        if self._order[0] != epoch:
            order = list(range(self.size))
            Random(derive_seed(*self.seed_parts, epoch)).shuffle(order)
            self._order = (epoch, order)
        return self._order[1][offset]


class JsonlSource:
    """Questions of a file in an order shuffled anew each epoch; a function of (seed, position)."""

    def __init__(self, path: Path, flag: str, *, seed: int, max_rejected: int = 0):
        self.name = f"jsonl:{path}"
        self.problems = read_jsonl(path, flag, max_rejected=max_rejected)
        self.num_problems = len(self.problems)
        self.order = ShuffledEpochs(self.num_problems, derive_seed(seed, self.name))

    def problem(self, position: int) -> Problem:
        return self.problems[self.order.index(position)]


def read_jsonl(path: Path, flag: str, *, max_rejected: int = 0) -> list[Problem]:
    """Problems of a file, repeated questions left out. Up to `max_rejected` bad lines are left out too, each named in
    the log; ValueError naming file and line where there are more."""
    if not path.is_file():
        raise ValueError(f"{flag}: {path} is not a file")
    problems: dict[str, Problem] = {}
    repeated, rejected = [], []
    for number, line in numbered_lines(path):
        try:
            problem = parse_line(line, f"{path}, line {number}", f"jsonl:{path}/{number}")
        except ValueError as error:
            rejected.append(str(error))
            continue
        if problems.setdefault(question_key(problem.question), problem) is not problem:
            repeated.append(number)
    if len(rejected) > max_rejected:
        more = f"; {len(rejected)} lines are bad, --data-max-rejected allows {max_rejected}" if rejected[1:] else ""
        raise ValueError(rejected[0] + more)
    if not problems:
        raise ValueError(f"{flag}: {path} holds no problem")
    for error in rejected:
        logger.warning("rejected: %s", error)
    if repeated:
        logger.warning("%s: %d lines repeat an earlier question and are left out: %s", path, len(repeated), repeated)
    return list(problems.values())


def parse_question(line: str, where: str) -> tuple[dict, str, tuple[dict, ...] | None]:
    """(record, question, messages or None) of a JSONL object with `prompt`, `question` or `messages`."""
    record = parse_object(line, where)
    messages = record.get("messages")
    question = record.get("prompt", record.get("question"))
    if messages is not None:
        is_chat = isinstance(messages, list) and messages and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        )  # fmt: skip
        if not is_chat:
            raise ValueError(f'{where}: "messages" must be a list of {{"role": text, "content": text}}')
        question = messages[-1]["content"]
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f'{where}: needs "prompt", "question" or "messages" with text, got keys {sorted(record)}')
    if not all(map(is_text, [question, *(text for each in messages or () for text in each.values())])):
        raise ValueError(f"{where}: has half a character (a lone surrogate)")
    return record, question, None if messages is None else tuple(messages)


def unanswered(line: str, where: str, *, name: str) -> Problem:
    """Of a JSONL line whose answer no one scores; as `parse_question`."""
    _, question, messages = parse_question(line, where)
    return Problem(name=name, question=question, messages=messages, answer={})


def parse_line(line: str, where: str, name: str) -> Problem:
    """One JSONL object: a question and `answer` (text or number; GSM8K's `#### 42` too)."""
    record, question, messages = parse_question(line, where)
    answer = record.get("answer")
    is_finite = not isinstance(answer, float) or math.isfinite(answer)
    is_scalar = isinstance(answer, str | int | float) and not isinstance(answer, bool) and is_finite
    if not is_scalar or not str(answer).strip() or not is_text(str(answer)):
        raise ValueError(f'{where}: needs "answer", a text or a number, got {answer!r}')
    gold = str(answer).rpartition("####")[2].strip()
    return Problem(
        name=name,
        question=question,
        messages=messages,
        answer={"kind": "math", "gold": gold},
    )
