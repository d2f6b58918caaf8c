"""Replay of real texts: how much would the suffix drafter have drafted right, from which texts?

Checkpoint n's answer to a prompt is decoded again, token by token as recorded: a draft token stands if it is the
recorded one, a step yields the tokens that stand and one more. Drafts come from the text so far alone, from texts of
other checkpoints that decode beside it (stand-ins for siblings, each known up to the same position), or from answers
of the newest or of all earlier checkpoints. The texts scored are the same: those of the second checkpoint and later.

Many long texts end in a literal loop until the cut, which any lookup drafts well: everything is also counted without
what follows the first round of that loop.
"""

import argparse
import gzip
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # so that it runs from any folder

import numpy as np  # noqa: E402

from tlt.config import require  # noqa: E402
from tlt.drafter.history import SuffixHistory  # noqa: E402
from tlt.drafter.prompt_lookup import prompt_lookup  # noqa: E402
from tlt.drafter.suffix_tree import SuffixTree  # noqa: E402

MIN_ROUNDS, MIN_LOOP_TOKENS = 3, 64
"""What makes a periodic end a loop: so many rounds, and so many tokens behind the first."""
CUT_TOKENS = 8
"""Last tokens that need not be part of the loop: where a text was cut, its tokens may differ."""
MIN_LOOKUP, MAX_LOOKUP = 2, 8
"""Tokens that prompt lookup matches."""
NUM_SIBLINGS = 3


@dataclass(frozen=True, kw_only=True)
class Text:
    """One answer. S tokens."""

    checkpoint: int
    """0, 1, 2, ... in the order of training."""
    prompt: str
    token_ids: np.ndarray  # [S] int32
    loop_start: int
    """Position behind the first round of the loop it ends in; S without one."""


@dataclass(kw_only=True)
class Tally:
    """What the replay of some texts came to."""

    num_tokens: int = 0
    num_steps: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    calibration: np.ndarray = field(default_factory=lambda: np.zeros((10, 3)))
    """By tenth of the estimated probability: sum of the estimates, tokens that stood, tokens; of those that were
    reached, which all before them had to stand for."""

    def count(self, step: "Step") -> None:
        self.num_tokens += step.num_tokens
        self.num_steps += 1
        self.num_draft_tokens += len(step.probs)
        self.num_accepted_tokens += step.num_accepted_tokens
        reached = step.probs[: step.num_accepted_tokens + 1]
        stood = np.arange(len(reached)) < step.num_accepted_tokens
        rows = np.minimum((10 * reached).astype(int), 9)
        np.add.at(self.calibration, rows, np.stack([reached, stood, np.ones_like(reached)], axis=1))

    def rates(self) -> dict:
        return {
            "tokens_per_step": self.num_tokens / self.num_steps,
            "drafted_per_step": self.num_draft_tokens / self.num_steps,
            "acceptance_rate": self.num_accepted_tokens / max(1, self.num_draft_tokens),
            "tokens": self.num_tokens,
            "steps": self.num_steps,
            "calibration": [
                {"estimate": total / count, "stood": stood / count, "tokens": count}
                for total, stood, count in self.calibration.tolist()
                if count
            ],
        }


@dataclass(frozen=True, kw_only=True)
class Step:
    """One verification step. K draft tokens."""

    position: int
    num_tokens: int
    num_accepted_tokens: int
    probs: np.ndarray  # [K]


def loop_start(token_ids: np.ndarray) -> int:
    """Position behind the first round of a literal loop that goes on to the end; the length of the text without one.

    Of all periods the one that reaches back furthest counts. Z-algorithm (Gusfield, 1997) on the reversed text: its
    value at p is how many tokens equal those p later.
    """
    tokens = token_ids[::-1][CUT_TOKENS:].tolist()
    size = len(tokens)
    best_start = len(token_ids)
    z, left, right = [0] * size, 0, 0
    for place in range(1, size):
        length = min(right - place, z[place - left]) if place < right else 0
        while place + length < size and tokens[length] == tokens[place + length]:
            length += 1
        z[place] = length
        if place + length > right:
            left, right = place, place + length
        if length >= max((MIN_ROUNDS - 1) * place, MIN_LOOP_TOKENS):
            best_start = min(best_start, size - length)
    return best_start


def read_texts(data: Path, hf_model: str, *, num_prompts: int | None) -> list[Text]:
    """Texts of the first prompts (None: all), by checkpoint, then prompt. Raises ValueError for other files."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(hf_model)
    tokenizer.model_max_length = 10**9  # texts are longer than the model's context; nothing here runs the model
    with gzip.open(data, "rt") as file:
        records = [json.loads(line) for line in file]
    if not records or not {"step", "idx", "text"} <= set(records[0]):
        raise ValueError(f"--data {data}: lines must have step, idx and text")
    checkpoints = sorted({record["step"] for record in records})
    prompts = sorted({record["idx"] for record in records})[:num_prompts]
    texts = []
    for record in sorted(records, key=lambda record: (record["step"], record["idx"])):
        if record["idx"] in prompts:
            tokens = np.array(tokenizer(record["text"])["input_ids"], dtype=np.int32)
            texts.append(
                Text(
                    checkpoint=checkpoints.index(record["step"]), prompt=str(record["idx"]), token_ids=tokens,
                    loop_start=loop_start(tokens),
                )
            )  # fmt: skip
    return texts


class Suffix:
    """Drafts from a tree of the text so far, of complete `past` texts, and of `siblings` at the same position."""

    def __init__(self, past: Sequence[np.ndarray], siblings: Sequence[np.ndarray], limits: dict):
        self.tree = SuffixTree()
        self.limits = limits
        self.siblings = siblings
        self.position = 0
        for number, tokens in enumerate(past):
            self.tree.begin(("past", number), tokens)
        for number in range(len(siblings)):
            self.tree.begin(number)
        self.tree.begin("own")

    def append(self, tokens: np.ndarray) -> None:
        begin, self.position = self.position, self.position + len(tokens)
        for number, sibling in enumerate(self.siblings):
            self.tree.append(number, sibling[begin : self.position])
        self.tree.append("own", tokens)

    def draft(self, max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """([K] tokens, [K] estimated probabilities)."""
        draft = self.tree.draft("own", max_tokens, **self.limits)
        return draft.token_ids, draft.probs


class Lookup:
    """Prompt lookup in the text so far; it has no estimates and claims 0."""

    def __init__(self, size: int):
        self.text = np.zeros(size, dtype=np.int32)
        self.position = 0

    def append(self, tokens: np.ndarray) -> None:
        self.text[self.position : self.position + len(tokens)] = tokens
        self.position += len(tokens)

    def draft(self, max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """([K] tokens, [K] zeros)."""
        text = self.text[: self.position]
        draft = prompt_lookup(text, min_match=MIN_LOOKUP, max_match=MAX_LOOKUP, max_tokens=max_tokens)
        return draft, np.zeros(len(draft))


def replay(text: Text, drafter: Suffix | Lookup, max_tokens: int) -> Iterator[Step]:
    """The verification steps of a text."""
    tokens, position = text.token_ids, 0
    while position < len(tokens):
        draft, probs = drafter.draft(max_tokens)
        coming = tokens[position : position + len(draft)]
        differs = np.flatnonzero(draft[: len(coming)] != coming)
        num_accepted = int(differs[0]) if len(differs) else len(coming)
        num_new = min(num_accepted + 1, len(tokens) - position)
        drafter.append(tokens[position : position + num_new])
        yield Step(position=position, num_tokens=num_new, num_accepted_tokens=num_accepted, probs=probs)
        position += num_new


SOURCES = ("lookup", "own", "siblings", "newest", "history")
LABELS = {
    "lookup": "own text, prompt lookup",
    "own": "own text, suffix tree",
    "siblings": f"own + {NUM_SIBLINGS} stand-in siblings",
    "newest": "own + newest earlier checkpoint",
    "history": "own + all earlier checkpoints",
}


def drafter_for(source: str, text: Text, others: Sequence[Text], history: SuffixHistory, limits: dict):
    """A drafter of the source for one text. others: the same prompt's texts, by checkpoint."""
    if source == "lookup":
        return Lookup(len(text.token_ids))
    past, siblings = [], []
    if source in ("newest", "history"):
        past = [response.token_ids for response in history.responses(text.prompt)]
    if source == "siblings":
        nearest = sorted(
            (other for other in others if other is not text), key=lambda other: abs(other.checkpoint - text.checkpoint)
        )
        siblings = [other.token_ids for other in nearest[:NUM_SIBLINGS]]
    return Suffix(past, siblings, limits)


def run_source(
    source: str, texts: Sequence[Text], max_tokens: int, limits: dict, *, history_bytes: int
) -> dict[str, Tally]:
    """Tallies over all texts, with and without loops."""
    tallies = {"all": Tally(), "without_loops": Tally()}
    history = SuffixHistory(history_bytes, max_age=0 if source == "newest" else None)
    by_prompt = defaultdict(list)
    for text in texts:
        by_prompt[text.prompt].append(text)
    for checkpoint, answers in groupby(texts, key=lambda text: text.checkpoint):
        own = list(answers)
        for text in own if checkpoint > 0 else ():
            drafter = drafter_for(source, text, by_prompt[text.prompt], history, limits)
            for step in replay(text, drafter, max_tokens):
                tallies["all"].count(step)
                if step.position < text.loop_start:
                    tallies["without_loops"].count(step)
        for text in own:  # only now: a checkpoint's texts are written together
            history.add(text.prompt, text.token_ids, policy_version=checkpoint)
    return tallies


def ranks(values: Sequence[float]) -> np.ndarray:
    return np.argsort(np.argsort(values))


def length_correlation(texts: Sequence[Text]) -> list[float]:
    """Spearman correlation of expected and true lengths over the prompts, for each checkpoint but the first."""
    history, found = SuffixHistory(2**30), []
    for checkpoint, answers in groupby(texts, key=lambda text: text.checkpoint):
        own = list(answers)
        if checkpoint > 0:
            expected = [history.expected_length(text.prompt) for text in own]
            true = [len(text.token_ids) for text in own]
            found.append(float(np.corrcoef(ranks(expected), ranks(true))[0, 1]))
        for text in own:
            history.add(text.prompt, text.token_ids, policy_version=checkpoint)
    return found


def table(rows: Sequence[dict]) -> str:
    """Markdown."""
    lines = [
        "| drafts from | at most | all: tokens/step (drafted/step), accepted | without loops |",
        "|---|---|---|---|",
    ]
    form = "{tokens_per_step:.2f} ({drafted_per_step:.1f}), {acceptance_rate:.2f}"
    for row in rows:
        cells = form.format(**row["all"]), form.format(**row["without_loops"])
        lines.append(f"| {LABELS[row['source']]} | {row['max_draft_tokens']} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def summary(texts: Sequence[Text]) -> dict:
    """What is replayed, and how well lengths are foreseen."""
    scored = [text for text in texts if text.checkpoint > 0]
    return {
        "texts": len(scored),
        "tokens": sum(len(text.token_ids) for text in scored),
        "tokens_without_loops": sum(text.loop_start for text in scored),
        "texts_with_loop": sum(text.loop_start < len(text.token_ids) for text in scored),
        "length_rank_correlation": length_correlation(texts) if len({text.prompt for text in texts}) > 2 else [],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="gzipped JSONL of step (checkpoint), idx and text")
    parser.add_argument("--hf-model", required=True, help="Hugging Face directory with the tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="prefix of the .json and .md written")
    parser.add_argument("--prompts", type=int, help="only the first so many prompts (default: all)")
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=SOURCES, help="default: all")
    parser.add_argument("--max-draft-tokens", type=int, nargs="+", default=(8,), help="default: 8")
    parser.add_argument("--min-match", type=int, default=1, help="tokens that must match (default: 1)")
    parser.add_argument("--tokens-per-match", type=float, default=2.0, help="draft tokens per matched (default: 2)")
    parser.add_argument("--min-prob", type=float, default=0.2, help="least probability of a draft (default: 0.2)")
    parser.add_argument("--history-mib", type=float, default=64, help="MiB of past texts (default: 64)")
    args = parser.parse_args(arguments)
    try:
        require(args.data.is_file(), "--data", str(args.data), "a file")
        require(min(args.max_draft_tokens) >= 1, "--max-draft-tokens", min(args.max_draft_tokens), "at least 1")
        texts = read_texts(args.data, args.hf_model, num_prompts=args.prompts)
    except ValueError as error:
        print(f"replay_history.py: error: {error}", file=sys.stderr)
        return 2
    limits = {"min_match": args.min_match, "tokens_per_match": args.tokens_per_match, "min_prob": args.min_prob}
    result = {"limits": limits, **summary(texts), "cpu_count": os.cpu_count(), "rows": []}
    print(json.dumps(result), flush=True)
    for max_tokens in args.max_draft_tokens:
        for source in args.sources:
            begin_s = time.perf_counter()
            tallies = run_source(source, texts, max_tokens, limits, history_bytes=int(args.history_mib * 2**20))
            row = {"source": source, "max_draft_tokens": max_tokens, "replay_s": time.perf_counter() - begin_s}
            result["rows"].append(row | {name: tally.rates() for name, tally in tallies.items()})
            print(table(result["rows"][-1:]).splitlines()[-1], f"{row['replay_s']:.0f} s", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{args.out}.json").write_text(json.dumps(result, indent=1) + "\n")
    Path(f"{args.out}.md").write_text(table(result["rows"]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
