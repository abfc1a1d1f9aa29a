"""Times searches and measures their recall; NumPy is enough, so a peer's environment does it by the same code."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from benchmarks import measure
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

    def answer(setting: Any) -> list[np.ndarray]:
        return [search(queries[first : first + BATCH], setting) for first in range(0, len(queries), BATCH)]

    points = []
    for setting in settings:
        share = recall(np.concatenate(answer(setting)), exact, queries, vectors)
        if share < start:
            continue
        rate = measure.rate(functools.partial(answer, setting), len(queries), seconds)
        points.append({"setting": setting, "recall": share, "queries_per_second": rate})
        if share >= stop:
            break
    return points
