"""Times searches and measures their recall; NumPy is enough, so a peer's environment does it by the same code."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from retro_jax.retrieval.exact import recall

BATCH = 1024
SECONDS = 0.3


def curve(
    search: Callable[[np.ndarray, Any], np.ndarray],
    settings: Iterable[Any],
    vectors: np.ndarray,
    queries: np.ndarray,
    exact: np.ndarray,
    *,
    seconds: float = SECONDS,
    start: float = 0.8,
    stop: float = 0.995,
) -> list[dict[str, Any]]:
    """Queries a second against recall, over settings that cost more and more.

    Args:
      search: (queries [q, E], setting) -> rows int [q, k], -1 for none.
      settings: in order; JSON-serialisable.
      vectors: [n, E].
      queries: [q, E].
      exact: [q, k], squared distances of the true neighbours.
      seconds: that a rate is measured over.
      start, stop: recall at which the curve begins and ends.
    """
    points = []
    for setting in settings:
        rows = np.concatenate([search(block, setting) for block in _blocks(queries)])
        share = recall(rows, exact, queries, vectors)
        if share < start:
            continue
        points.append(
            {"setting": setting, "recall": share, "queries_per_second": _rate(search, setting, queries, seconds)}
        )
        if share >= stop:
            break
    return points


def _rate(search: Callable[[np.ndarray, Any], np.ndarray], setting: Any, queries: np.ndarray, seconds: float) -> float:
    """Queries a second over at least so many seconds."""
    done, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        for block in _blocks(queries):
            search(block, setting)
            done += len(block)
    return done / (time.perf_counter() - begun)


def _blocks(queries: np.ndarray) -> Iterator[np.ndarray]:
    for first in range(0, len(queries), BATCH):
        yield queries[first : first + BATCH]
