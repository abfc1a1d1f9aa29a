"""Requests from several threads at a time, and what became of each."""

import dataclasses
import threading
import time
from collections.abc import Callable

import numpy as np

from retro_jax.retrieval.service.client import RetrievalError


@dataclasses.dataclass
class Outcome:
    """One request: the queries' seed, the answer or the error, and seconds from start to end."""

    seed: int
    ids: np.ndarray | None
    error: RetrievalError | None
    started: float
    seconds: float


class Load:
    """`with Load(search, threads) as load:` searches until the end of the block; `load.wait(n)` for n more outcomes."""

    def __init__(self, search: Callable[[np.ndarray], np.ndarray], threads: int, *, n: int = 3) -> None:
        self.outcomes: list[Outcome] = []
        self._search, self._n = search, n
        self._stop = threading.Event()
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._work, args=(i,)) for i in range(threads)]

    def _work(self, first: int) -> None:
        seed = first
        while not self._stop.is_set():
            started = time.monotonic()
            ids = error = None
            try:
                ids = self._search(queries_of(seed, self._n))
            except RetrievalError as caught:
                error = caught
            with self._changed:
                self.outcomes.append(Outcome(seed, ids, error, started, time.monotonic() - started))
                self._changed.notify_all()
            seed += len(self._threads)

    def wait(self, count: int, timeout: float = 30) -> None:
        """Until so many more requests have ended."""
        with self._changed:
            target = len(self.outcomes) + count
            assert self._changed.wait_for(lambda: len(self.outcomes) >= target, timeout)

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def stop(self) -> None:
        """No more requests are begun, and those under way are waited for."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def check(self, *worlds, k: int) -> None:
        """No request failed, and each answer is wholly of one of the worlds."""
        for outcome in self.outcomes:
            assert outcome.error is None, outcome.error
            expected = [world.search(queries_of(outcome.seed, self._n), k)[0] for world in worlds]
            assert any(np.array_equal(outcome.ids, ids) for ids in expected), outcome


def queries_of(seed: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 8)).astype(np.float32)
