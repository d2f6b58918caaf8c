"""Warm start of a drafter: the target answers prompts, and an EAGLE head learns from the hidden states it had.

tools/train_drafter.py --model DIR --sources 'reasoning-gym:...' --out DIR --minutes 20
torchrun --nproc_per_node 2 tools/train_drafter.py --model DIR --prompts FILE --out DIR --train-tokens 1000000

Responses come from the rollout engine with its hidden-state tap, so there is no second forward; generation takes its
share of the time, training the rest. Under torchrun each rank generates with an engine of its own and all train one
head together. Held-out prompts are answered too and not trained on: acceptance on them goes to standard error and to
training.json beside the head. The head drafts in this project's engine (--spec-drafter), and in stock vLLM with method
`eagle`, where it may draft all tokens (docs/drafter.md); one with --aux-layers in this project's alone.
"""

import argparse
import copy
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from any folder
from tools.lone_engine import make_engine, start_ranks  # noqa: E402
from tools.prompt_flags import add_prompt_flags, in_own_names, prompt_builder, prompt_stream  # noqa: E402
from tools.target_weights import make_target, read_rows  # noqa: E402

MICRO_STEP_MS = 5000
"""Nothing interrupts this training, and larger products are faster: micro-steps are as large as they may be."""
ROUND_FACTOR = 2
"""Requests of one round of generation for each that runs at a time: the last ones of a round run alone."""


def parser() -> argparse.ArgumentParser:
    from tlt.arguments import add_config_group
    from tlt.config import DrafterConfig

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face directory of the target")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--init", type=Path, metavar="DIR", help="head to go on from (default: random weights)")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompts", type=Path, metavar="FILE", help="JSONL, each line with `prompt` or `messages`")
    text.add_argument("--sources", nargs="+", metavar="X", help="as --data-train of pretrain_rl.py")
    add_prompt_flags(parser)
    parser.add_argument("--minutes", type=float, help="of generation and training together")
    parser.add_argument("--train-tokens", type=int, metavar="N", help="starts of drafts to train on, of all ranks")
    parser.add_argument("--generate-frac", type=float, default=0.35, help="of --minutes (default: 0.35)")
    parser.add_argument("--generate-tokens", type=int, metavar="N", help="response tokens after which none is begun")
    parser.add_argument("--held-out-prompts", type=int, default=64, help="of all ranks (default: 64)")
    parser.add_argument("--num-draft-tokens", type=int, default=4, metavar="K", help="of the evaluation (default: 4)")
    parser.add_argument("--draft-vocabulary", type=int, default=512, metavar="N", help="0 drafts all (default: 512)")
    parser.add_argument(
        "--aux-layers", metavar="default|I,J,K",
        help="layers whose hidden states the head reads in the place of the last one (EAGLE-3), as vLLM numbers them; "
        "they are kept besides it, in three times its memory (docs/drafter.md)",
    )  # fmt: skip
    parser.add_argument("--temperature", type=float, default=1.0, help="default: 1.0")
    parser.add_argument("--max-tokens", type=int, default=768, help="of a response (default: 768)")
    parser.add_argument("--max-model-len", type=int, default=1024, help="default: 1024")
    parser.add_argument("--max-num-seqs", type=int, default=64, help="requests of a rank at a time (default: 64)")
    parser.add_argument("--hidden-states-mib", type=int, default=4096, help="of each rank (default: 4096)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="default: bfloat16")
    parser.add_argument("--seed", type=int, default=1, help="default: 1")
    add_config_group(parser, "drafter", DrafterConfig, micro_step_ms=MICRO_STEP_MS)
    return parser


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Everything that is read and checked before an engine exists."""

    target_config: dict
    stream: object
    """`next_batch(n)` gives prompts, the held-out ones first."""
    plan: object
    """SpecPlan of an engine without heads that keeps what the new one reads."""
    init: object
    """EagleHead of --init, or None."""
    stop_token_ids: list
    rollout: object
    """RolloutConfig"""
    drafter: object
    """DrafterConfig"""


class PromptFile:
    """Prompts of a JSONL file, again and again in their order, each time under another id; the first `num_held_out`
    come once. Raises ValueError naming file and line."""

    def __init__(self, path: Path, builder, *, num_held_out: int):
        from tlt.data.jsonl import numbered_lines
        from tlt.data.source import unanswered

        if not path.is_file():
            raise ValueError(f"--prompts must be a JSONL file, got {path}")
        self.prompts = []
        for number, line in numbered_lines(path):
            problem = unanswered(line, f"{path}, line {number}", name=f"{path.name}/{number}")
            self.prompts.append(builder.build(problem, "prompts"))
        if len(self.prompts) <= num_held_out:
            raise ValueError(f"--prompts {path} holds {len(self.prompts)}, --held-out-prompts takes {num_held_out}")
        self.num_held_out = num_held_out
        self.num_drawn = 0

    def next_batch(self, num_prompts: int) -> list:
        """The next ones; equal on all ranks."""
        return [self._next() for _ in range(num_prompts)]

    def _next(self):
        from tlt.types import drawn_prompt_id

        index, self.num_drawn = self.num_drawn, self.num_drawn + 1
        if index >= len(self.prompts):
            rest = len(self.prompts) - self.num_held_out
            index = self.num_held_out + (index - self.num_held_out) % rest
        prompt = self.prompts[index]
        return replace(prompt, prompt_id=drawn_prompt_id(self.num_drawn, prompt.prompt_id))


def read_setup(args: argparse.Namespace) -> Setup:
    """Raises ValueError naming the flag."""
    import torch
    from transformers import AutoTokenizer

    from tlt.config import DrafterConfig, RolloutConfig, SpecConfig, read_hf_config, require
    from tlt.data.tokenizer import stop_token_ids
    from tlt.drafter.aux_layers import parse_aux_layers
    from tlt.drafter.model import load_head
    from tlt.rollout.vllm.speculation import read_spec_plan

    require((args.minutes is None) != (args.train_tokens is None), "--minutes", args.minutes, "this or --train-tokens")
    require(args.minutes is not None or args.generate_tokens is not None, "--generate-tokens", None, "a number")
    for flag in ("--minutes", "--train-tokens", "--generate-tokens"):
        value = getattr(args, flag[2:].replace("-", "_"))
        require(value is None or 0 < value < math.inf, flag, value, "above 0 and finite")
    require(0 < args.generate_frac < 1, "--generate-frac", args.generate_frac, "in (0, 1)")
    require(args.temperature > 0, "--temperature", args.temperature, "above 0")
    require(args.held_out_prompts >= 1, "--held-out-prompts", args.held_out_prompts, "at least 1")
    require(args.max_tokens < args.max_model_len, "--max-tokens", args.max_tokens, "below --max-model-len")
    require(not (args.init and args.aux_layers), "--aux-layers", args.aux_layers, "left to the head of --init")
    hf_config = read_hf_config(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    builder = prompt_builder(args, tokenizer)
    if args.prompts:
        stream = PromptFile(args.prompts, builder, num_held_out=args.held_out_prompts)
    else:
        stream = prompt_stream(args, builder)
    layers, init = parse_aux_layers(args.aux_layers, "--aux-layers", num_layers=hf_config["num_hidden_layers"]), None
    if args.init:
        init = load_head(args.init, flag="--init", target_config=hf_config, dtype=torch.float32)
        layers = init.aux_layers
    rollout = RolloutConfig(
        max_model_len=args.max_model_len, max_response_tokens=args.max_tokens, max_num_seqs=args.max_num_seqs,
        enforce_eager=bool(layers),  # a compiled model gives out its last hidden state alone
    )  # fmt: skip
    spec = SpecConfig(hidden_states_mib=args.hidden_states_mib)
    plan = read_spec_plan(spec, target_config=hf_config, dtype=getattr(torch, args.dtype), tp_size=1)
    fields = {name.partition(".")[2]: value for name, value in vars(args).items() if name.startswith("drafter.")}
    return Setup(
        target_config=hf_config, stream=stream, rollout=rollout, drafter=DrafterConfig(**fields), init=init,
        plan=replace(plan, aux_layers=layers),
        stop_token_ids=stop_token_ids(Path(args.model), hf_config, tokenizer),
    )  # fmt: skip


def agreed(value: float) -> float:
    """The first rank's value. Collective over all ranks; all must call."""
    import torch
    import torch.distributed as dist

    tensor = torch.tensor(value, dtype=torch.float64)
    dist.broadcast(tensor, 0)
    return float(tensor)


def total(value: float) -> float:
    """Sum over all ranks. Collective over all ranks; all must call."""
    import torch
    import torch.distributed as dist

    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor)
    return float(tensor)


def generate(args: argparse.Namespace, setup: Setup, engine, begin_s: float) -> tuple[list, list]:
    """(samples to train on, held-out texts) of this rank. Whole rounds, since a round that is cut off would lack its
    long responses; another begins where it is expected to end within half its own time of the share.

    Collective over all ranks; all must call.
    """
    import torch.distributed as dist

    from tlt.drafter.evaluation import SampledText
    from tlt.spec.randomness import request_seed
    from tlt.types import SamplingConfig, prompt_id_of, rollout_name

    sampling = SamplingConfig(temperature=args.temperature, max_response_tokens=args.max_tokens)
    held_out = setup.stream.next_batch(args.held_out_prompts)
    asked = {prompt.text for prompt in held_out}
    held_ids = {rollout_name(prompt.prompt_id, 0) for prompt in held_out}
    num_tokens, prompts, round_s = 0.0, held_out, 0.0
    while True:
        round_begin_s = time.perf_counter()
        fresh = setup.stream.next_batch(dist.get_world_size() * ROUND_FACTOR * args.max_num_seqs)
        prompts = prompts + [prompt for prompt in fresh if prompt.text not in asked]
        engine.generate(prompts, sampling, group_size=1, seed=args.seed, on_finished=lambda *_: None)
        num_tokens += total(engine.stats().num_response_tokens)
        prompts = []
        round_s = time.perf_counter() - round_begin_s
        elapsed_s = agreed(time.perf_counter() - begin_s)
        say(f"generated {num_tokens:.0f} tokens in {elapsed_s:.0f} s")
        if args.generate_tokens is not None and num_tokens >= args.generate_tokens:
            break
        if args.minutes and elapsed_s + agreed(round_s) / 2 > args.minutes * 60 * args.generate_frac:
            break
    buffer = engine.speculation.buffer
    if buffer.num_dropped:
        raise ValueError(f"--hidden-states-mib {args.hidden_states_mib} is too little: samples were dropped")
    samples = [sample for sample in buffer if sample.request_id not in held_ids]
    texts = [
        SampledText(sample=sample, seed=request_seed(args.seed, prompt_id_of(sample.request_id), 0))
        for sample in buffer if sample.request_id in held_ids
    ]  # fmt: skip
    return samples, texts


def make_trainer(args: argparse.Namespace, setup: Setup, samples: list):
    """(trainer, coverage of its draft vocabulary). Collective over all ranks; all must call."""
    import torch
    import torch.distributed as dist

    from tlt.drafter.model import EagleHead, HeadShape, initialize
    from tlt.drafter.trainer import DrafterTrainer
    from tlt.drafter.vocabulary import draft_vocabulary

    embedding, output = read_rows(args.model, setup.target_config)
    counts = torch.zeros(len(output), dtype=torch.int64)
    moments = torch.zeros(3, dtype=torch.float64)  # number, sum and sum of squares of hidden states
    for sample in samples:
        counts += torch.bincount(sample.token_ids[sample.num_prompt_tokens :].long(), minlength=len(counts))
        hidden = sample.last_hidden_states.double()
        moments += torch.stack([torch.tensor(float(hidden.numel())), hidden.sum(), hidden.square().sum()])
    dist.all_reduce(counts)
    dist.all_reduce(moments)
    hidden_std = float((moments[2] / moments[0] - (moments[1] / moments[0]) ** 2).sqrt())
    if setup.init is not None:
        head = setup.init
        ids = head.draft_token_ids
        coverage = 1.0 if ids is None else float(counts[ids].sum() / counts.sum())
    else:
        ids, coverage = draft_vocabulary(counts, args.draft_vocabulary) if args.draft_vocabulary else (None, 1.0)
        shape = HeadShape.of_target(setup.target_config)
        head = EagleHead(shape, draft_token_ids=ids, aux_layers=setup.plan.aux_layers)
        read = embedding[counts > 0].float()
        initialize(head, seed=args.seed, hidden_std=hidden_std, embedding_std=float(read.std()))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # the engine, which sleeps, chose which GPU
    target = make_target(embedding.to(device), output.to(device), ids, temperature=args.temperature)
    head = head.to(device)
    group = dist.group.WORLD if dist.get_world_size() > 1 else None
    trainer = DrafterTrainer(
        head, setup.drafter, target=target, seed=args.seed, group=group, dtype=getattr(torch, args.dtype)
    )
    return trainer, coverage


def train(args: argparse.Namespace, trainer, samples: list, begin_s: float) -> dict:
    """Until time or tokens are used up; what it took. Collective over all ranks; all must call."""
    from tqdm import tqdm

    from tlt.drafter.batch import whole

    train_begin_s = time.perf_counter()
    seen = {"starts": 0.0, "kl": 0.0, "said_s": 0.0}
    bar = tqdm(total=1.0, desc="training", disable=not (is_first() and sys.stderr.isatty()), bar_format="{l_bar}{bar}")

    def progress() -> float:
        if args.train_tokens is not None:
            return seen["starts"] / args.train_tokens
        given_s = args.minutes * 60 - (train_begin_s - begin_s)
        return agreed((time.perf_counter() - train_begin_s) / given_s if given_s > 0 else 1.0)

    def on_step(metrics) -> None:
        seen["starts"] += metrics["starts"]
        seen["kl"] += (metrics["kl"] - seen["kl"]) * max(0.05, 1 / trainer.num_steps)
        elapsed_s = time.perf_counter() - train_begin_s
        bar.set_postfix_str(f"kl {seen['kl']:.3f}")
        bar.n = min(seen["starts"] / args.train_tokens if args.train_tokens else elapsed_s / (args.minutes * 60), 1.0)
        bar.refresh()
        if bar.disable and elapsed_s - seen["said_s"] > 30:
            seen["said_s"] = elapsed_s
            say(
                f"step {trainer.num_steps}, pass {trainer.num_passes + 1}: kl {seen['kl']:.4f}, "
                f"{seen['starts'] / elapsed_s:.0f} tokens/s, {elapsed_s:.0f} s"
            )

    trainer.train([whole(sample) for sample in samples], progress=progress, on_step=on_step)
    bar.close()
    seconds = time.perf_counter() - train_begin_s
    return {"starts": seen["starts"], "train_s": seconds, "steps": trainer.num_steps, "passes": trainer.num_passes + 1}


def evaluate(args: argparse.Namespace, trainer, texts: list) -> tuple:
    """(the head to publish, its held-out acceptance over all ranks). Collective over all ranks; all must call."""
    import torch.distributed as dist

    from tlt.drafter.evaluation import HeldOutAcceptance
    from tlt.drafter.evaluation import evaluate as evaluate_head

    head = copy.deepcopy(trainer.head)
    head.load_state_dict(trainer.published())
    own = evaluate_head(
        head, texts, target=trainer.target, num_draft_tokens=args.num_draft_tokens, max_response_tokens=args.max_tokens
    )
    found: list[HeldOutAcceptance] = [own] * dist.get_world_size()
    dist.all_gather_object(found, own)
    for other in found[1:]:
        found[0].add(other)
    return head, found[0]


def is_first() -> bool:
    import torch.distributed as dist

    return dist.get_rank() == 0


def say(text: str) -> None:
    """A line of the first rank."""
    if is_first():
        print(text, file=sys.stderr, flush=True)


def main() -> int:
    args = parser().parse_args()
    begin_s = time.perf_counter()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        setup = read_setup(args)
    except ValueError as error:
        print(f"train_drafter.py: error: {in_own_names(error)}", file=sys.stderr)
        return 2
    start_ranks()
    engine = make_engine(
        setup.rollout, hf_model=args.model, dtype=args.dtype, plan=setup.plan, stop_token_ids=setup.stop_token_ids
    )  # fmt: skip
    samples, texts = generate(args, setup, engine, begin_s)
    generate_s = time.perf_counter() - begin_s
    engine.sleep()  # frees a GPU; on a CPU the engine's memory stays until the end
    trainer, coverage = make_trainer(args, setup, samples)
    num_samples, num_tokens = (total(n) for n in (len(samples), sum(len(s.token_ids) for s in samples)))
    took = train(args, trainer, samples, begin_s)
    head, acceptance = evaluate(args, trainer, texts)
    if is_first():
        from tlt.drafter.model import save_head
        from tlt.provenance import git_commit

        save_head(head, args.out, target_config=setup.target_config)
        report = {
            "acceptance": acceptance.report(), "coverage": coverage, "generate_s": generate_s, **took,
            "samples": num_samples, "tokens": num_tokens, "held_out": acceptance.num_texts,
            "total_s": time.perf_counter() - begin_s, "commit": git_commit(), "command": sys.argv,
            "drafter": asdict(setup.drafter),
        }  # fmt: skip
        (args.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
        say(json.dumps({name: value for name, value in report.items() if name not in ("command", "drafter")}))
    engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
