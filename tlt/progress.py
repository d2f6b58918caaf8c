"""A progress bar over iterations where somebody watches a terminal."""

import sys
from collections.abc import Iterable


class Progress:
    """Bar on standard error of the one rank that shows it, if that is a terminal; otherwise plain iteration."""

    def __init__(self, *, is_shown: bool):
        self.is_shown = is_shown and sys.stderr.isatty()

    def iterations(self, first: int, last: int) -> Iterable[int]:
        """first, ..., last (inclusive)."""
        from tqdm import tqdm

        return tqdm(
            range(first, last + 1), initial=first - 1, total=last, desc="iteration", unit="it",
            disable=not self.is_shown,
        )  # fmt: skip
