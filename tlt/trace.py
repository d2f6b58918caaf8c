"""What each rank did when, one JSON line a span: tlt/timeline draws runs from them."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Trace:
    """Appends `{"name", "rank", "begin_s", "end_s", ...}` to `<folder>/rank<rank>.jsonl`, a span's when it ends.

    Times are seconds of the wall clock since the epoch, so that ranks can be laid over each other. Spans nest; one
    that ends by an exception is written too, with the exception's type under `error`.
    """

    def __init__(self, folder: Path, rank: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.rank = rank
        self.iteration: float | str | None = None
        """The one under way, or the last one."""
        self.phases: list[str] = []
        """Spans that are open, outermost first."""
        self.file = (folder / f"rank{rank}.jsonl").open("a", buffering=1)

    @contextmanager
    def span(self, name: str, **attributes: float | str) -> Iterator[None]:
        begin_s = time.time()
        outcome = {}
        self.phases.append(name)
        if name == "iteration":
            self.iteration = attributes["iteration"]
        try:
            yield
        except BaseException as error:
            outcome = {"error": type(error).__name__}
            if not getattr(error, "__notes__", None):  # the innermost span says where it was
                error.add_note(self.where())
            raise
        finally:
            self.phases.pop()
            self.record(name, begin_s=begin_s, end_s=time.time(), **attributes, **outcome)

    def where(self) -> str:
        """Iteration and innermost phase, for messages."""
        phase = self.phases[-1] if self.phases else "no phase"
        return phase if self.iteration is None else f"{phase} of iteration {self.iteration}"

    def point(self, name: str) -> None:
        """A moment inside a span at which a test may let something go wrong (tlt/faults.py); nothing is written."""

    def record(self, name: str, *, begin_s: float, end_s: float, **attributes: float | str | list[int]) -> None:
        """Write what happened between two times that were taken elsewhere."""
        times = {"begin_s": begin_s, "end_s": end_s}
        self.file.write(json.dumps({"name": name, "rank": self.rank, **times, **attributes}) + "\n")

    def close(self) -> None:
        self.file.close()


class NoTrace(Trace):
    """Keeps nothing."""

    def __init__(self):
        self.rank = 0
        self.iteration = None
        self.phases = []

    def record(self, name: str, *, begin_s: float, end_s: float, **attributes: float | str | list[int]) -> None:
        pass

    def close(self) -> None:
        pass
