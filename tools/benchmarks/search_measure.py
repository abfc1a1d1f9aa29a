"""Times searches and measures their recall, with NumPy alone, so that a peer's environment does it by the same code."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

BATCH = 1024
SECONDS = 0.3
_ROUNDS = 3


def curve(
    search: Callable[[np.ndarray, Any], np.ndarray],
    settings: Iterable[Any],
    vectors: np.ndarray,
    queries: np.ndarray,
    limits: np.ndarray,
    *,
    seconds: float = SECONDS,
    stop: float = 0.995,
) -> list[dict[str, Any]]:
    """Queries a second against recall, over settings that cost more and more.

    Args:
      search: (queries [q, E], setting) -> rows int [q, k], -1 for none.
      settings: in order; JSON-serialisable.
      vectors: [n, E].
      queries: [q, E].
      limits: [q], squared distance of the k-th true neighbour.
      seconds: of a round, of which the best of three counts.
      stop: recall at which the curve ends.
    """
    points = []
    for setting in settings:
        rows = np.concatenate([search(block, setting) for block in _blocks(queries)])
        recall = recall_of(rows, vectors, queries, limits)
        points.append({"setting": setting, "recall": recall, **_rate(search, setting, queries, seconds)})
        if recall >= stop:
            break
    return points


def recall_of(rows: np.ndarray, vectors: np.ndarray, queries: np.ndarray, limits: np.ndarray) -> float:
    """Share of the true k nearest that were found; equally near vectors count alike."""
    hits = 0
    for found, query, limit in zip(rows, queries, limits, strict=True):
        found = np.unique(found[found >= 0])
        squares = np.square(vectors[found].astype(np.float64) - query).sum(1)
        hits += min(rows.shape[1], int((squares <= limit * (1 + 1e-6) + 1e-12).sum()))
    return hits / rows.size


def _rate(
    search: Callable[[np.ndarray, Any], np.ndarray], setting: Any, queries: np.ndarray, seconds: float
) -> dict[str, float]:
    """Best and median of a few rounds, each of at least so many seconds."""
    rates = []
    for _ in range(_ROUNDS):
        done, begun = 0, time.perf_counter()
        while time.perf_counter() - begun < seconds:
            for block in _blocks(queries):
                search(block, setting)
                done += len(block)
        rates.append(done / (time.perf_counter() - begun))
    return {"queries_per_second": max(rates), "queries_per_second_median": float(np.median(rates))}


def _blocks(queries: np.ndarray) -> Iterator[np.ndarray]:
    for first in range(0, len(queries), BATCH):
        yield queries[first : first + BATCH]
