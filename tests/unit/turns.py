"""Threads that take turns: code of several ranks, interleaved at each access to the store they share."""

import threading
from collections.abc import Callable, Sequence

Move = tuple[int, str]
"""Who goes on, and with what: a thread may have several ways to."""


class WalkOver(BaseException):
    """Ends a thread whose walk is over; no handler of the code that is walked may take it for a failure."""


class Turns:
    """Threads of which one runs at a time, from one `wait` to the next, in an order that `choose` makes: given all
    possible moves it returns one, or None to leave the walk unfinished."""

    MOST = 10_000

    def __init__(self, count: int, choose: Callable[[list[Move]], Move | None]):
        self.choose = choose
        self.go = [self._taken() for _ in range(count)]
        self.back = self._taken()
        self.running = set(range(count))
        self.asked: list[tuple[Sequence[str], Callable[[], bool]]] = [((), lambda: False)] * count
        self.chosen = [""] * count
        self.failures: list[BaseException] = []
        self.was_left = self.is_over = False

    @staticmethod
    def _taken() -> threading.Lock:
        """A semaphore of 0: turns are handed over one by one, and a plain lock is the cheaper one."""
        lock = threading.Lock()
        lock.acquire()
        return lock

    def wait(self, index: int, moves: Sequence[str] = ("go",), *, is_ready: Callable[[], bool] = lambda: True) -> str:
        """Until it is this thread's turn, not before `is_ready()`; which of its moves it has to make."""
        if not self.is_over:
            self.asked[index] = (moves, is_ready)
            self.back.release()
            self.go[index].acquire()
        if self.is_over:
            raise WalkOver
        return self.chosen[index]

    def moves(self) -> list[Move]:
        return [
            (index, move) for index in sorted(self.running) if self.asked[index][1]() for move in self.asked[index][0]
        ]

    def start(self, index: int, run) -> threading.Thread:
        def body() -> None:
            try:
                run()
            except BaseException as error:  # noqa: BLE001 - reported by `walk`
                self.failures.append(error)
            if not self.is_over:
                self.running.discard(index)
                self.back.release()

        thread = threading.Thread(target=body)
        thread.start()
        self.back.acquire()  # it has come to its first wait
        return thread

    def walk(self, runs) -> None:
        """Raises what a thread raised, and AssertionError if some are left that cannot go on."""
        threads = [self.start(index, run) for index, run in enumerate(runs)]
        turns = 0
        while not self.failures and not self.was_left and turns < self.MOST and (moves := self.moves()):
            move = self.choose(moves)
            if move is None:
                self.was_left = True
            else:
                turns, index, self.chosen[move[0]] = turns + 1, *move
                self.go[index].release()
                self.back.acquire()
        failures, self.is_over = list(self.failures), True
        for index in self.running:
            self.go[index].release()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        assert self.was_left or not self.running, f"{self.running} wait for ever"


class Store:
    """Of one thread; each access is a turn."""

    def __init__(self, values: dict, turns: Turns, index: int):
        self.values, self.turns, self.index = values, turns, index

    def turn(self, key: str) -> None:
        self.turns.wait(self.index)

    def add(self, key: str, amount: int) -> int:
        self.turn(key)
        self.values[key] = self.values.get(key, 0) + amount
        return self.values[key]

    def set(self, key: str, value: bytes) -> None:
        self.turn(key)
        self.values[key] = value

    def get(self, key: str) -> bytes:
        self.turns.wait(self.index, is_ready=lambda: key in self.values)
        return self.values[key]

    def delete_key(self, key: str) -> bool:
        self.turn(key)
        return self.values.pop(key, None) is not None
