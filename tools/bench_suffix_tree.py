"""Speed and memory of the suffix tree, one thread: time per draft, time to insert 10,000 tokens, bytes per token.

Texts: skewed random tokens (Zipf, exponent 1.2, 49,152 tokens); and with --data and --hf-model answers of several
checkpoints to one prompt, the newest of them decoding, 4 tokens between drafts. The first calls, which compile or load
the kernels, are timed apart.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # so that it runs from any folder

import numpy as np  # noqa: E402

from tlt.drafter.suffix_tree import SuffixTree  # noqa: E402
from tools.replay_history import read_texts  # noqa: E402

REPEATS = 7
"""Insertions of which the median counts."""
TOKENS_PER_STEP = 4
TARGETS = {"draft_p50_us": 100.0, "insert_10k_ms": 60.0, "bytes_per_token": 40.0}
PUBLISHED = {"draft_p50_us": 35.0, "insert_10k_ms": 21.0}
"""arctic-inference's C++ suffix cache, as published; not measured here, nor on this hardware."""


def tree_of(texts: Sequence[np.ndarray]) -> SuffixTree:
    tree = SuffixTree()
    for number, tokens in enumerate(texts):
        tree.begin(number, tokens)
        tree.end(number)
    return tree


def measure(past: Sequence[np.ndarray], live: np.ndarray, *, max_tokens: int) -> dict[str, float]:
    """Insertion of `past` whole, then `live` step by step with a draft each."""
    insert_s = []
    for _ in range(REPEATS):
        begin_s = time.perf_counter()
        tree = tree_of(past)
        insert_s.append(time.perf_counter() - begin_s)
    num_inserted = tree.num_tokens
    tree.begin("live")
    append_s, draft_s, num_drafted = [], [], 0
    for begin in range(0, len(live), TOKENS_PER_STEP):
        begin_s = time.perf_counter()
        tree.append("live", live[begin : begin + TOKENS_PER_STEP])
        middle_s = time.perf_counter()
        draft = tree.draft("live", max_tokens)
        append_s.append(middle_s - begin_s)
        draft_s.append(time.perf_counter() - middle_s)
        num_drafted += len(draft.token_ids)
    return {
        "tokens": tree.num_tokens,
        "draft_p50_us": 1e6 * float(np.quantile(draft_s, 0.5)),
        "draft_p99_us": 1e6 * float(np.quantile(draft_s, 0.99)),
        "drafted": num_drafted / len(draft_s),
        "append_p50_us": 1e6 * float(np.quantile(append_s, 0.5)),
        "append_p99_us": 1e6 * float(np.quantile(append_s, 0.99)),
        "insert_10k_ms": 1e3 * float(np.median(insert_s)) * 10_000 / num_inserted,
        "bytes_per_token": tree.num_bytes / tree.num_tokens,
    }


def skewed_random(num_tokens: int) -> np.ndarray:
    return np.random.default_rng(0).zipf(1.2, num_tokens).clip(max=49_151).astype(np.int32)


def table(rows: dict[str, dict[str, float]]) -> str:
    """Markdown, one row a workload."""
    lines = [
        f"| text | tokens | draft us, p50 / p99 (drafted) | append {TOKENS_PER_STEP} tokens, us, p50 / p99 "
        "| insert 10,000 tokens, ms | bytes/token |",
        "|---" * 6 + "|",
    ]
    form = (
        "| {name} | {tokens:,} | {draft_p50_us:.1f} / {draft_p99_us:.1f} ({drafted:.1f}) "
        "| {append_p50_us:.1f} / {append_p99_us:.1f} | {insert_10k_ms:.1f} | {bytes_per_token:.1f} |"
    )
    lines += [form.format(name=name, **row) for name, row in rows.items()]
    for name, row in (("asked, at most", TARGETS), ("arctic-inference, published", PUBLISHED)):
        cells = (row.get(key, "") for key in ("draft_p50_us", "insert_10k_ms", "bytes_per_token"))
        lines.append("| {} | | {} | | {} | {} |".format(name, *cells))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="gzipped JSONL of step (checkpoint), idx and text")
    parser.add_argument("--hf-model", help="Hugging Face directory with the tokenizer (needed with --data)")
    parser.add_argument("--prompts", type=int, default=2, help="prompts of --data, a row each (default: 2)")
    parser.add_argument("--max-draft-tokens", type=int, default=8, help="default: 8")
    parser.add_argument("--json", type=Path, help="file to write")
    args = parser.parse_args()
    if args.data and not (args.data.is_file() and args.hf_model):
        print("bench_suffix_tree.py: error: --data must be a file and needs --hf-model", file=sys.stderr)
        return 2
    begin_s = time.perf_counter()
    measure([skewed_random(100)], skewed_random(100), max_tokens=args.max_draft_tokens)
    first_call_s = time.perf_counter() - begin_s
    rows = {}
    for num_tokens in (10_000, 100_000):
        tokens = skewed_random(num_tokens + 4000)
        name = f"skewed random, {num_tokens:,}"
        rows[name] = measure([tokens[4000:]], tokens[:4000], max_tokens=args.max_draft_tokens)
    if args.data:
        texts = read_texts(args.data, args.hf_model, num_prompts=args.prompts)
        for prompt in sorted({text.prompt for text in texts}):
            *past, live = [text.token_ids for text in texts if text.prompt == prompt]
            name = f"prompt {prompt}, {len(past)} past answers"
            rows[name] = measure(past, live[:8000], max_tokens=args.max_draft_tokens)
    load = os.getloadavg()[0]
    print(table(rows))
    print(f"first calls {first_call_s:.1f} s (compiled or loaded); load average {load:.1f} on {os.cpu_count()} cores")
    if args.json:
        result = {"rows": rows, "first_calls_s": first_call_s, "load_average": load, "cpu_count": os.cpu_count()}
        args.json.write_text(json.dumps(result | {"targets": TARGETS, "published": PUBLISHED}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
