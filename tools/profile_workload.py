"""Profile of a workload: does the policy's text look like a reasoning model's? Table, JSON and PNG.

tools/profile_workload.py RUN_FOLDER | ROLLOUTS.jsonl --out PREFIX [--hf-model DIR --temperature T]
"""

import argparse
import gzip
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # so that it runs from any folder

from tlt.workload.profile import Response, length_profile, profile  # noqa: E402

ROWS = (
    ("entropy_mean", "token entropy, mean (nats)", "{:.3f}"),
    ("entropy_below_0.01", "tokens below 0.01 nats", "{:.2f}"),
    ("entropy_p80", "token entropy, p80 (nats)", "{:.3f}"),
    ("max_prob_mean", "E[max p]: ceiling of a one-hot draft", "{:.3f}"),
    ("responses", "responses", "{:.0f}"),
    ("length_mean", "length, mean (tokens)", "{:.0f}"),
    ("length_p10", "length, p10", "{:.0f}"),
    ("length_p50", "length, p50", "{:.0f}"),
    ("length_p90", "length, p90", "{:.0f}"),
    ("length_p99", "length, p99", "{:.0f}"),
    ("length_max", "length, max", "{:.0f}"),
    ("length_p99_over_p50", "length, p99 / p50", "{:.1f}"),
    ("truncated", "truncated", "{:.3f}"),
    ("running_le_1", "rank time with at most 1 running", "{:.2f}"),
    ("running_le_2", "rank time with at most 2 running", "{:.2f}"),
    ("running_le_4", "rank time with at most 4 running", "{:.2f}"),
    ("predictable_own", "tokens predictable: own past", "{:.2f}"),
    ("predictable_siblings", "tokens predictable: and siblings", "{:.2f}"),
    ("predictable_history", "tokens predictable: and history", "{:.2f}"),
    ("pass_rate", "pass rate", "{:.3f}"),
    ("mixed_groups", "groups with both rewards", "{:.2f}"),
)
QWEN3 = {"entropy_p80": 0.672}
"""Qwen3-8B, chains of thought on AIME (arXiv 2506.01939); more than half of its tokens are below 0.01 nats."""


def read(path: Path) -> list[Response]:
    """Responses of a JSONL file. Raises ValueError naming file and line."""
    responses = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
                responses.append(
                    Response(
                        question=record.get("question") or str(record["prompt_id"]),
                        sample=record["sample"],
                        token_ids=tuple(record["token_ids"]),
                        entropies=tuple(record.get("entropies", ())),
                        max_probs=tuple(record.get("max_probs", ())),
                        is_truncated=record["finish_reason"] == "length",
                        iteration=record.get("iteration", 0),
                        replica=record.get("replica", 0),
                        reward=record.get("reward"),
                        prompt_token_ids=tuple(record.get("prompt_token_ids", ())),
                    )
                )
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: not a response as a run writes them ({error!r})") from None
    return responses


def find(path: Path) -> tuple[Path, list[Path]]:
    """(file to profile, files of earlier iterations) of a file, or of a run: its newest evaluation, else training."""
    if path.is_file():
        return path, []
    for name in ("eval", "train"):
        files = sorted((path / "rollouts").glob(f"{name}_*.jsonl"))
        if files:
            return files[-1], files[:-1]
    raise ValueError(f"{path} must be a JSONL file, or a run with rollouts (--rollout-save-interval)")


def with_model(responses: Sequence[Response], hf_model: str, temperature: float) -> list[Response]:
    """The responses with entropies and largest probabilities by a Hugging Face model, in fp32, one at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf_model, dtype=torch.float32).eval()
    result = []
    for response in responses:
        if not response.prompt_token_ids:
            raise ValueError("--hf-model needs prompt_token_ids in every response")
        token_ids = torch.tensor([response.prompt_token_ids + response.token_ids])
        with torch.inference_mode():
            logits = model(token_ids).logits[0, len(response.prompt_token_ids) - 1 : -1]
            logprobs = (logits / temperature).log_softmax(-1)
        probs = logprobs.exp()
        result.append(
            replace(
                response,
                entropies=tuple((-(probs * logprobs).sum(-1)).tolist()),
                max_probs=tuple(probs.amax(-1).tolist()),
            )
        )
    return result


def anchors(data: Path) -> dict[str, dict[str, float]]:
    """Real workloads to compare with: published figures, and traces of `data` where they are there."""
    found: dict[str, dict[str, float]] = {"Qwen3-8B, AIME (2506.01939)": dict(QWEN3)}
    trace = data / "servegen_deepseek_r1_output_tokens.json"
    if trace.is_file():
        weights = json.loads(trace.read_text())["output_tokens"]
        lengths = [int(length) for length, weight in weights.items() for _ in range(round(weight))]
        found["DeepSeek-R1 production"] = length_profile(lengths)
    history = data / "skythought_aime24_11ckpts.jsonl.gz"
    if history.is_file():
        with gzip.open(history, "rt") as file:
            records = [json.loads(line) for line in file]
        # About 3 characters a token: only ratios of these lengths mean anything.
        lengths = [max(1, len(record["text"]) // 3) for record in records]
        rate = sum(bool(record["correct"]) for record in records) / len(records)
        found["AIME, 11 checkpoints"] = length_profile(lengths) | {"pass_rate": rate}
    return found


def table(columns: dict[str, dict[str, float]]) -> str:
    """Markdown table, one column a workload; a dash where a workload does not say."""
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for key, label, form in ROWS:
        cells = [form.format(column[key]) if key in column else "-" for column in columns.values()]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(path: Path, responses: Sequence[Response], result: dict[str, float]) -> None:
    """Distributions of token entropy and of response length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.5))
    entropies = sorted(value for response in responses for value in response.entropies)
    lengths = sorted(len(response.token_ids) for response in responses)
    for axes, values, label in (
        (left, entropies, "token entropy (nats)"),
        (right, lengths, "response length (tokens)"),
    ):
        axes.plot(values, [(rank + 1) / len(values) for rank in range(len(values))])
        axes.set_xlabel(label)
        axes.set_ylabel("share at or below")
        axes.grid(alpha=0.3)
    left.set_title(f"mean {result['entropy_mean']:.2f} nats, E[max p] {result['max_prob_mean']:.2f}")
    right.set_title(f"p50 {result['length_p50']:.0f}, p99 {result['length_p99']:.0f}, max {result['length_max']:.0f}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", type=Path, help="rollouts.jsonl, or folder of a run")
    parser.add_argument("--out", type=Path, required=True, help="prefix of the .json, .md and .png written")
    parser.add_argument("--hf-model", help="model that computes entropies anew (needed where none were recorded)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of --hf-model's distribution (default: 1.0)")
    parser.add_argument("--max-num-seqs", type=int, default=64, help="requests of a rank at a time (default: 64)")
    parser.add_argument("--anchors", type=Path, default=ROOT.parent / "shared" / "data", help="folder of real traces")
    args = parser.parse_args()
    try:
        if args.temperature <= 0 or args.max_num_seqs < 1:
            raise ValueError("--temperature must be above 0 and --max-num-seqs at least 1")
        path, earlier = find(args.workload)
        responses = read(path)
        if args.hf_model:
            responses = with_model(responses, args.hf_model, args.temperature)
        history = [response for file in earlier for response in read(file)]
        result = profile(responses, history=history, max_num_seqs=args.max_num_seqs)
    except ValueError as error:
        print(f"profile_workload.py: error: {error}", file=sys.stderr)
        return 2
    text = table({str(path.stem): result} | anchors(args.anchors))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{args.out}.json").write_text(json.dumps({"file": str(path), **result}, indent=1) + "\n")
    Path(f"{args.out}.md").write_text(text + "\n")
    draw(Path(f"{args.out}.png"), responses, result)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
