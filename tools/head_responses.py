"""What replays of a head begin with: its model's responses to prompts, and their hidden states."""

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from any folder
from tools.lone_engine import make_engine, start_ranks  # noqa: E402
from tools.prompt_flags import add_prompt_flags, prompt_builder, prompt_stream  # noqa: E402
from tools.target_weights import make_target, read_rows  # noqa: E402

HIDDEN_STATES_MIB = 6144
"""Room for all responses of a replay."""


def add_response_flags(parser: argparse.ArgumentParser) -> None:
    """Add all but how many prompts."""
    parser.add_argument("--model", required=True, help="Hugging Face directory")
    parser.add_argument("--drafter", type=Path, required=True, metavar="DIR", help="EAGLE head for the model")
    parser.add_argument("--sources", nargs="+", required=True, metavar="X", help="as --data-train of pretrain_rl.py")
    add_prompt_flags(parser)
    parser.add_argument("--temperature", type=float, default=1.0, help="default: 1.0")
    parser.add_argument("--max-tokens", type=int, default=768, help="of a response (default: 768)")
    parser.add_argument("--max-model-len", type=int, default=1024, help="default: 1024")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="default: bfloat16")
    parser.add_argument("--seed", type=int, default=1, help="default: 1")
    parser.add_argument("--json", type=Path, help="file to write")


@dataclass(frozen=True, kw_only=True)
class HeadAndPrompts:
    """All that is read before an engine exists."""

    args: argparse.Namespace
    hf_config: dict
    tokenizer: object
    plan: object
    head: object
    prompts: list

    def target(self):
        """Target whose distributions the head is to meet."""
        rows = read_rows(self.args.model, self.hf_config)
        return make_target(*rows, self.head.draft_token_ids, temperature=self.args.temperature)

    def responses(self, *, group_size: int) -> list:
        """SampledText of `group_size` responses to each prompt, by an engine that drafts nothing."""
        from tlt.config import RolloutConfig
        from tlt.data.tokenizer import stop_token_ids
        from tlt.drafter.evaluation import SampledText
        from tlt.spec.randomness import request_seed
        from tlt.types import SamplingConfig, prompt_id_of

        args = self.args
        start_ranks()
        engine = make_engine(
            RolloutConfig(max_model_len=args.max_model_len, max_response_tokens=args.max_tokens),
            hf_model=args.model, dtype=args.dtype, plan=self.plan,
            stop_token_ids=stop_token_ids(Path(args.model), self.hf_config, self.tokenizer),
        )  # fmt: skip
        sampling = SamplingConfig(temperature=args.temperature, max_response_tokens=args.max_tokens)
        try:
            engine.generate(self.prompts, sampling, group_size=group_size, seed=args.seed, on_finished=lambda *_: None)
            samples = engine.hidden_state_samples()
        finally:
            engine.close()
        if len(samples) != len(self.prompts) * group_size:
            raise ValueError(
                f"--prompts x --group-size: hidden states of {len(samples)} of {len(self.prompts) * group_size} "
                f"responses are there; {HIDDEN_STATES_MIB} MiB hold no more: fewer or shorter ones (--max-tokens)"
            )
        indices = [int(sample.request_id.rpartition("#")[2]) for sample in samples]
        return [
            SampledText(sample=sample, seed=request_seed(args.seed, prompt_id_of(sample.request_id), index))
            for sample, index in zip(samples, indices, strict=True)
        ]


def read_head_and_prompts(args: argparse.Namespace) -> HeadAndPrompts:
    """Of `add_response_flags` and --prompts. Raises ValueError naming the flag."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    import torch
    from transformers import AutoTokenizer

    from tlt.config import SpecConfig, read_hf_config
    from tlt.drafter.model import load_head
    from tlt.rollout.vllm.speculation import read_spec_plan

    hf_config = read_hf_config(args.model)
    head = load_head(args.drafter, flag="--drafter", target_config=hf_config, dtype=torch.float32)
    plan = read_spec_plan(
        SpecConfig(hidden_states_mib=HIDDEN_STATES_MIB), target_config=hf_config, dtype=getattr(torch, args.dtype),
        tp_size=1,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    prompts = prompt_stream(args, prompt_builder(args, tokenizer)).next_batch(args.prompts)
    return HeadAndPrompts(
        args=args, hf_config=hf_config, tokenizer=tokenizer, plan=plan, head=head, prompts=prompts
    )  # fmt: skip
