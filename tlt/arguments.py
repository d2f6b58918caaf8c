"""Config dataclasses -> argparse groups -> config dataclasses; a flag's help is its field's docstring."""

import argparse
import ast
import dataclasses
import inspect
import math
import textwrap
import types
import typing
from collections.abc import Sequence

from tlt.config import RunConfig

MEGATRON_GROUPS = ("training", "model", "optimizer")
"""Parts of RunConfig whose flags carry no prefix, as they are Megatron's own."""


class Parser(argparse.ArgumentParser):
    """Raises ValueError where argparse would print usage and exit: every rank parses, one reports."""

    def error(self, message: str) -> typing.NoReturn:
        raise ValueError(message)


def finite_float(text: str) -> float:
    """A number that bounds mean something for: `nan` and `inf` pass where there is none on their side."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text!r}")
    return value


TYPES = {int: int, str: str, float: finite_float}
"""Of a field -> what reads its flag."""


def field_docs(cls: type) -> dict[str, str]:
    """Map each field of `cls`, those of its bases included, to the docstring written right below it."""
    docs = {}
    for owner in reversed([each for each in cls.__mro__ if dataclasses.is_dataclass(each)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0].body
        for node, below in zip(body, body[1:], strict=False):
            is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            if isinstance(node, ast.AnnAssign) and is_text:
                docs[node.target.id] = " ".join(inspect.cleandoc(below.value.value).split())
    return docs


def flag_kwargs(hint: type) -> dict:
    """Argparse keywords for a field type: bool, int, float, str, Literal, `T | None`, `tuple[T, ...]`."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        (hint,) = [arg for arg in typing.get_args(hint) if arg is not type(None)]
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(hint) is typing.Literal:
        choices = typing.get_args(hint)
        return {"type": type(choices[0]), "choices": choices}
    if typing.get_origin(hint) is tuple:
        return {"type": TYPES[typing.get_args(hint)[0]], "nargs": "+", "metavar": "X"}
    return {"type": TYPES[hint], "metavar": hint.__name__.upper()}


def flag_name(part: str, field: str) -> str:
    """`rl`, `clip_low` -> `--rl-clip-low`; Megatron's groups have no prefix."""
    return "--" + (field if part in MEGATRON_GROUPS else f"{part}_{field}").replace("_", "-")


def add_config_group(parser: argparse.ArgumentParser, part: str, cls: type, **defaults: object) -> None:
    """Add one argparse group with a flag for every field of `cls`; `defaults` take the place of some fields' own."""
    group = parser.add_argument_group(title=part, description=inspect.cleandoc(cls.__doc__))
    docs, hints = field_docs(cls), typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name not in docs:
            raise TypeError(f"{cls.__name__}.{field.name} has no docstring; it is the --help text of its flag")
        kwargs = {"dest": f"{part}.{field.name}", "help": docs[field.name].replace("%", "%%")}
        kwargs |= flag_kwargs(hints[field.name])
        if field.default is dataclasses.MISSING:
            kwargs["required"] = True
        else:
            kwargs["default"] = defaults.get(field.name, field.default)
            kwargs["help"] += f" (default: {kwargs['default']})"
        group.add_argument(flag_name(part, field.name), **kwargs)


def build_parser(description: str, config_class: type = RunConfig) -> argparse.ArgumentParser:
    """Parser of every flag of a run; `config_class` is a dataclass of config dataclasses."""
    parser = Parser(
        description=description,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, width=119),
    )
    for part, cls in typing.get_type_hints(config_class).items():
        add_config_group(parser, part, cls)
    return parser


def parse(argv: Sequence[str], description: str, config_class: type = RunConfig) -> RunConfig:
    """Build the config from flags. Raises ValueError naming the flag that is missing, unknown or not allowed."""
    values = vars(build_parser(description, config_class).parse_args(argv))
    parts = {}
    for part, cls in typing.get_type_hints(config_class).items():
        own = {field.name: values[f"{part}.{field.name}"] for field in dataclasses.fields(cls)}
        parts[part] = cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in own.items()})
    return config_class(**parts)


def to_flags(config: RunConfig) -> list[str]:
    """The flags that `parse` turns into `config` again."""
    flags = []
    for part in dataclasses.fields(config):
        for name, value in dataclasses.asdict(getattr(config, part.name)).items():
            flag = flag_name(part.name, name)
            if value is None:
                continue
            if isinstance(value, bool):
                flags.append(flag if value else flag.replace("--", "--no-", 1))
            else:
                flags += [flag, *map(str, value)] if isinstance(value, tuple) else [flag, str(value)]
    return flags
