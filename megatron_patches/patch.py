"""One upstream fix: which symbol, for which versions and source texts, why, and how it is replaced."""

import hashlib
import importlib
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import torch
from packaging.specifiers import SpecifierSet


@dataclass(frozen=True, kw_only=True)
class Patch:
    name: str
    distribution: str
    """Installed package that owns the symbol, as pip names it."""
    versions: str
    """Releases the patch is written for, e.g. ">=0.16.1,<0.17"."""
    target: str
    """`module:qualname` of the place where the symbol is looked up at call time."""
    source_sha256: tuple[str, ...]
    """First 12 hex digits of the original's source, one per distinct text among `versions`."""
    reason: str
    upstream: str
    """Where to watch for a fix; the patch goes when it is released."""
    make: Callable[[Callable], Callable]
    """Original -> replacement."""

    def original(self) -> Callable:
        """What the target names at present: the upstream function, or the replacement once applied."""
        owner, attribute = self._owner()
        return getattr(owner, attribute)

    def _owner(self) -> tuple[object, str]:
        module, _, qualname = self.target.partition(":")
        owner = importlib.import_module(module)
        *path, attribute = qualname.split(".")
        for part in path:
            owner = getattr(owner, part)
        return owner, attribute

    def apply(self) -> bool:
        """Replace the symbol; False if it already was. Raises where the patch was not written for what is
        installed."""
        owner, attribute = self._owner()
        original = getattr(owner, attribute)
        if getattr(original, "__patch__", None) == self.name:
            return False

        installed = version(self.distribution)
        if installed not in SpecifierSet(self.versions):
            raise RuntimeError(
                f"patch {self.name!r} is written for {self.distribution} {self.versions}, found {installed}: "
                f"re-check {self.upstream}, then widen `versions` or delete the patch"
            )
        source = fingerprint(original)
        if source not in self.source_sha256:
            raise RuntimeError(
                f"patch {self.name!r}: {self.target} of {self.distribution} {installed} has a source text "
                f"({source}) the patch was not written for: re-check {self.upstream}"
            )
        replacement = self.make(original)
        getattr(replacement, "__func__", replacement).__patch__ = self.name  # a class method passes on its function's
        setattr(owner, attribute, replacement)
        return True


class TorchStandIn(types.ModuleType):
    """Everything is torch's own but what is set on it."""

    def __init__(self) -> None:
        super().__init__("torch")

    def __getattr__(self, name: str):
        return getattr(torch, name)


def rebound(function: Callable, stand_in: TorchStandIn, code: types.CodeType | None = None) -> Callable:
    """A copy of a function with its global name `torch` bound to a stand-in, so that torch itself, and whatever else
    runs in the process (the rollout engine does), stay untouched; `code` in the place of its own."""
    copy = types.FunctionType(
        code or function.__code__, {**function.__globals__, "torch": stand_in}, function.__name__,
        function.__defaults__, function.__closure__,
    )  # fmt: skip
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def fingerprint(function: Callable) -> str:
    """First 12 hex digits of the SHA-256 of a function's source text."""
    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:12]
