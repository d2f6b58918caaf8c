"""Scores one response; runs in the processes of the reward pool, so it imports no engine and no torch."""

import re

from tlt.data.procedural import make_dataset, make_item

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def score(answer: dict, response: str) -> float:
    """1.0 for a correct response, else 0.0: partial credit is farmed (see `exact_score`).

    `answer` is `Prompt.answer`; its `kind` chooses the scorer. Raises KeyError for an unknown kind.
    """
    return {"reasoning-gym": score_reasoning_gym, "math": score_math}[answer["kind"]](answer, response)


def score_reasoning_gym(answer: dict, response: str) -> float:
    """Exact score of the task's own verifier; the problem is made again from (task, configuration, seed, index)."""
    dataset = make_dataset(answer["task"], answer["config"], answer["seed"])
    entry = make_item(dataset, answer["index"])
    extracted = extract(response, entry["answer"])
    return exact_score(dataset.score_answer(extracted, entry))


def exact_score(value: float) -> float:
    """reasoning-gym gives len(oracle) / len(answer) where the oracle is a part of the answer: only 1 counts."""
    return float(value == 1.0)


def extract(response: str, gold: str | None) -> str:
    """The answer in a response: the last <answer> element, else the last number where the gold answer is one, else the
    last line with text."""
    tagged = last_answer(response)
    if tagged is not None:
        return tagged.strip()
    if gold is not None and NUMBER.fullmatch(gold.strip()):
        numbers = NUMBER.findall(response)
        return numbers[-1].replace(",", "") if numbers else ""
    lines = [line.strip() for line in response.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def last_answer(response: str) -> str | None:
    """Text of the last <answer> element, the one that a scan from the left ends with; None without one. Linear in the
    length: a response may be nothing but opening tags."""
    found, begin = None, 0
    while (opening := response.find("<answer>", begin)) >= 0:
        closing = response.find("</answer>", opening + 8)
        if closing < 0:
            return found
        found, begin = response[opening + 8 : closing], closing + 9
    return found


def score_math(answer: dict, response: str) -> float:
    """Mathematical equality by math-verify; its own timer needs the main thread, the pool keeps the time instead."""
    from math_verify import parse, verify

    gold = parse(f"${answer['gold']}$", parsing_timeout=None)
    given = parse(response, parsing_timeout=None)
    return float(bool(gold) and bool(given) and verify(gold, given, timeout_seconds=None))
