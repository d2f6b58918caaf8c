"""Flags of tools that answer prompts of data sources, what they are read into, and their names in errors."""

import argparse
import re

OWN_NAMES = {
    "--data-chat-template": "--chat-template",
    "--data-exclude": "--exclude",
    "--data-max-rejected": "this tool",
    "--data-train": "--sources",
    "--data-weights": "--weights",
    "--hf-model": "--model",
    "--no-data-chat-template": "--no-chat-template",
    "--rollout-engine-args": "--engine-args",
    "--rollout-max-model-len": "--max-model-len",
    "--rollout-max-num-seqs": "--max-num-seqs",
    "--rollout-max-response-tokens": "--max-tokens",
    "--rollout-top-k": "--top-k",
    "--rollout-top-p": "--top-p",
    "--spec-drafter": "--drafter",
    "--spec-hidden-states-mib": "--hidden-states-mib",
}
"""What these tools call pretrain_rl.py's flags, which errors name."""


def add_prompt_flags(parser: argparse.ArgumentParser) -> None:
    """Add those beside --sources."""
    parser.add_argument("--weights", nargs="+", type=float, metavar="X", help="share of each source")
    parser.add_argument("--exclude", nargs="+", default=(), metavar="FILE", help="JSONL of questions to leave out")
    parser.add_argument("--instruction", default="", help="text appended to every question")
    parser.add_argument("--chat-template", action=argparse.BooleanOptionalAction, default=True)


def data_config(args: argparse.Namespace):
    """DataConfig; a tool without --sources has prompts of its own. Raises ValueError naming the flag."""
    from tlt.config import DataConfig

    return DataConfig(
        train=tuple(args.sources or ("prompts",)), weights=tuple(args.weights) if args.weights else None,
        instruction=args.instruction, chat_template=args.chat_template,
    )  # fmt: skip


def prompt_builder(args: argparse.Namespace, tokenizer):
    """PromptBuilder for prompts that leave room for --max-tokens in --max-model-len."""
    from tlt.data.prompts import PromptBuilder

    return PromptBuilder(
        data_config(args), tokenizer=tokenizer, max_prompt_tokens=args.max_model_len - args.max_tokens
    )  # fmt: skip


def prompt_stream(args: argparse.Namespace, builder):
    """PromptStream of --sources from its beginning. Raises ValueError naming flag or file."""
    from tlt.data.prompts import PromptStream, excluded_questions

    return PromptStream(data_config(args), builder, seed=args.seed, excluded=excluded_questions(args.exclude))


def in_own_names(error: ValueError) -> str:
    """The error's text with the tool's names of flags."""
    return re.sub(r"--[a-z][a-z-]*", lambda found: OWN_NAMES.get(found[0], found[0]), str(error))
