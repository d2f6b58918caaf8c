"""Flags of tools that answer prompts of data sources, and what they are read into."""

import argparse


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
