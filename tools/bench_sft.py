"""Supervised fine-tuning speed against a plain Hugging Face loop: same model, examples, threads and process.

Both train in bf16 with fp32 master weights (--fp32: in fp32 throughout) and AdamW, one rank, alternating, so that a
shared machine's noise hits both. The Hugging Face loop is the one people write: batches padded to their longest
sequence, as many sequences as fit the same number of tokens, `labels` of -100 on the prompt, gradient clipping. Its
batches hold sequences of similar length (--plain-order sorted, the better case for it) or come in order (shuffled).
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # so that it runs from any folder

import torch  # noqa: E402


class PlainLoop:
    """transformers, padded batches, torch.optim.AdamW on fp32 weights (copies of bf16 ones, or the model's own)."""

    def __init__(self, hf_model: str, lr: float, *, bf16: bool):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(hf_model, dtype=torch.bfloat16 if bf16 else torch.float32)
        self.model.train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.masters = self.parameters
        if bf16:
            self.masters = [p.detach().float().requires_grad_(True) for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.masters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, foreach=True)

    def step(self, batches: Sequence[Sequence]) -> float:
        """One optimizer step over padded batches; the mean loss of response tokens."""
        num_response = sum(sequence.num_response_tokens for batch in batches for sequence in batch)
        total = 0.0
        for batch in batches:
            width = max(len(sequence.token_ids) for sequence in batch)
            ids = torch.zeros(len(batch), width, dtype=torch.int64)
            labels = torch.full_like(ids, -100)
            mask = torch.zeros_like(ids)
            for row, sequence in enumerate(batch):
                length = len(sequence.token_ids)
                ids[row, :length] = torch.tensor(sequence.token_ids)
                labels[row, sequence.num_prompt_tokens : length] = ids[row, sequence.num_prompt_tokens : length]
                mask[row, :length] = 1
            own = sum(sequence.num_response_tokens for sequence in batch)
            loss = self.model(input_ids=ids, attention_mask=mask, labels=labels).loss * (own / num_response)
            loss.backward()
            total += float(loss.detach())
        self._update()
        return total

    def _update(self) -> None:
        copies = [pair for pair in zip(self.masters, self.parameters, strict=True) if pair[0] is not pair[1]]
        for master, parameter in copies:
            master.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for master, parameter in copies:
                parameter.copy_(master)


def padded_batches(sequences: Sequence, *, max_tokens: int, order: str) -> list[list]:
    """Batches of which none, padded to its longest sequence, exceeds `max_tokens`."""
    if order == "sorted":
        sequences = sorted(sequences, key=lambda sequence: len(sequence.token_ids))
    batches: list[list] = [[]]
    for sequence in sequences:
        longest = max([len(sequence.token_ids), *(len(other.token_ids) for other in batches[-1])])
        if batches[-1] and longest * (len(batches[-1]) + 1) > max_tokens:
            batches.append([])
        batches[-1].append(sequence)
    return batches


def our_trainer(hf_model: str, lr: float, max_tokens: int, *, bf16: bool):
    """The policy trainer on one rank."""
    import torch.distributed as dist

    from megatron_patches import apply_patches
    from tlt import parallel as process_groups
    from tlt.build import build_policy_trainer
    from tlt.config import ModelConfig, OptimizerConfig, read_hf_config
    from tlt.rl.losses import LikelihoodObjective
    from tlt.trace import NoTrace
    from tlt.types import SamplingConfig

    apply_patches()
    dist.init_process_group("gloo", init_method=f"file://{tempfile.mkdtemp()}/store", rank=0, world_size=1)
    model = ModelConfig(hf_model=hf_model, bf16=bf16, max_tokens_per_micro_batch=max_tokens)
    return build_policy_trainer(
        read_hf_config(hf_model), model, OptimizerConfig(lr=lr),
        process_groups.initialize(model, timeout=timedelta(minutes=5)), objective=LikelihoodObjective(),
        sampling=SamplingConfig(temperature=1.0, max_response_tokens=1), train_iters=1000, trace=NoTrace(),
    )  # fmt: skip


def read_steps(args: argparse.Namespace) -> list[tuple]:
    from transformers import AutoTokenizer

    from tlt.config import DataConfig
    from tlt.data.prompts import PromptBuilder
    from tlt.sft.examples import ExampleStream, read_examples

    tokenizer = AutoTokenizer.from_pretrained(args.hf_model)
    data = DataConfig(train=(f"jsonl:{args.data}",), instruction="\n", chat_template=False)
    builder = PromptBuilder(data, tokenizer=tokenizer, max_prompt_tokens=4096)
    sequences = read_examples(
        data.train[0], "--data", builder, tokenizer=tokenizer, stop_token_id=tokenizer.eos_token_id, max_tokens=8192
    )  # fmt: skip
    stream = ExampleStream(sequences, tokens_per_step=args.tokens_per_step, seed=1)
    return [stream.next_step() for _ in range(args.steps)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf-model", required=True, help="Hugging Face directory")
    parser.add_argument("--fp32", action="store_true", help="train in fp32; for a CPU without bf16 arithmetic")
    parser.add_argument("--data", type=Path, required=True, help="train.jsonl of tools/make_cold_start.py")
    parser.add_argument("--tokens-per-step", type=int, default=1536, help="default: 1536")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of each, the first not counted")
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    parser.add_argument("--plain-order", choices=("sorted", "shuffled"), default="sorted", help="default: sorted")
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args()
    if args.steps < 3 or not args.data.is_file():
        print("bench_sft.py: error: --steps must be at least 3 and --data a file", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    steps = read_steps(args)
    ours = our_trainer(args.hf_model, 1e-5, args.tokens_per_step, bf16=not args.fp32)
    plain = PlainLoop(args.hf_model, 1e-5, bf16=not args.fp32)
    torch.set_num_threads(args.threads)

    from tlt.provenance import git_commit
    from tlt.types import TrainBatch

    rows = []
    for index, sequences in enumerate(steps):
        num_tokens = sum(len(sequence.token_ids) for sequence in sequences)
        begin_s = time.perf_counter()
        our_loss = ours.train_step(TrainBatch(optimizer_steps=(sequences,), policy_version=index))["policy/nll"]
        middle_s = time.perf_counter()
        batches = padded_batches(sequences, max_tokens=args.tokens_per_step, order=args.plain_order)
        plain_loss = plain.step(batches)
        end_s = time.perf_counter()
        rows.append(
            {
                "tokens": num_tokens, "ours_tokens_per_s": num_tokens / (middle_s - begin_s),
                "plain_tokens_per_s": num_tokens / (end_s - middle_s), "our_loss": our_loss, "plain_loss": plain_loss,
            }
        )  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    counted = rows[1:]
    ratios = [row["ours_tokens_per_s"] / row["plain_tokens_per_s"] for row in counted]
    result = {
        "ours_tokens_per_s": statistics.median(row["ours_tokens_per_s"] for row in counted),
        "plain_tokens_per_s": statistics.median(row["plain_tokens_per_s"] for row in counted),
        "ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios),
        "threads": args.threads, "bf16": not args.fp32,
        "plain_order": args.plain_order, "cpu_count": os.cpu_count(), "commit": git_commit(),
        "steps": rows,
    }  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name != "steps"}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
