"""Loops compiled by numba: imported after vLLM's engine, whose search through loaded modules fails at llvmlite's."""

from collections.abc import Callable

from numba import njit


def compiled(function: Callable) -> Callable:
    """Compiled when first called, and kept beside its file or in the user's cache if either can be written."""
    try:
        return njit(cache=True)(function)
    except RuntimeError:  # numba found no folder to write to
        return njit(function)
