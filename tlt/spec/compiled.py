"""Loops compiled by numba: imported after vLLM's engine, whose search through loaded modules fails at llvmlite's."""

from collections.abc import Callable
from functools import partial

from numba import njit


def compiled(function: Callable, **options) -> Callable:
    """Compiled when first called, and kept beside its file or in the user's cache if either can be written.

    It is compiled anew when its own file changes, but not when a constant does that it takes from another one.
    """
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # numba found no folder to write to
        return njit(**options)(function)


compiled_sums = partial(compiled, fastmath={"reassoc", "contract"})
"""The same, where sums may be taken in any order: in vectors, then. NaN and infinity stay what they are."""
