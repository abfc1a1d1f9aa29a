"""Finds the settings of an index by measurement: the quickest that reach a recall, on a database's own vectors.

One setting is varied at a time and the best value is kept: leaves, spilling, components a code, the type of rescoring.
For each that is built, the depth of rescoring is tried, and the leaves to search are the fewest that reach the recall.
"""

import dataclasses
import time
from collections.abc import Iterator

import numpy as np

from retro_jax.errors import UserError
from retro_jax.retrieval.exact import exact_search, recall
from retro_jax.retrieval.index_settings import IndexSettings
from retro_jax.retrieval.scann_shard import ScannShard

BATCH = 1024
DEPTHS = (12, 16, 24, 32, 48, 64, 96, 128)  # candidates rescored, for each neighbour from 2 on as many times
LEAVES = (0.5, 2.0)  # times the rule's
SPILLS = (0.0, 1.5)
ETAS = (0.0, 8.0)
DIMENSIONS = (3, 4)
_GROWTH = 1.12


@dataclasses.dataclass(frozen=True)
class Trial:
    """What some settings gave.

    Attributes:
      settings: with every choice made.
      recall: at k.
      queries_per_second: in batches of `BATCH`, with the cores this process may use.
      build_seconds: of the index.
      memory_bytes: of a vector.
    """

    settings: IndexSettings
    recall: float
    queries_per_second: float
    build_seconds: float
    memory_bytes: float


class Tuner:
    """Measures settings on some vectors.

    Attributes:
      trials: all so far.
    """

    def __init__(
        self,
        vectors: np.ndarray,
        queries: np.ndarray,
        *,
        unit: bool,
        k: int = 2,
        goal: float = 0.95,
        seconds: float = 0.5,
    ) -> None:
        """Finds the true neighbours of the queries.

        Args:
          vectors: [n, E] of the index.
          queries: [q, E] that are not among them.
          unit: all have length 1.
          k: neighbours.
          goal: recall@k to reach.
          seconds: that a rate is measured over, of which the better of two counts.

        Raises:
          UserError: a number out of range.
        """
        if not 0 < goal <= 1:
            raise UserError(f"the recall to reach must be between 0 and 1, is {goal}")
        self._vectors, self._queries, self._unit, self._k, self._goal = vectors, queries, unit, k, goal
        self._seconds = seconds
        self._exact = exact_search(queries, vectors, k)[1]
        self.trials: list[Trial] = []

    def tune(self, start: IndexSettings | None = None) -> Iterator[Trial]:
        """Yields trials as they are measured, the best of every build; `best` is the result.

        Args:
          start: what is varied; None: the rules.
        """
        start = start or IndexSettings(kind="tree")
        rules = start.resolve(len(self._vectors), self._vectors.shape[1], unit=self._unit)
        yield self._measure(rules)
        variations = [{"num_leaves": round(rules.num_leaves * factor)} for factor in LEAVES]
        if rules.score == "dot_product":
            variations += [{"spill": value} for value in SPILLS]
            variations += [{"leaf_eta": value} for value in ETAS]
        variations += [{"dimensions_per_block": value} for value in DIMENSIONS]
        variations += [{"rescore": "float32" if rules.rescore == "bfloat16" else "bfloat16"}]
        for variation in variations:
            if variation.get("num_leaves", 1) <= len(self._vectors) // 2:
                yield self._measure(dataclasses.replace(self.best.settings, **variation))

    @property
    def best(self) -> Trial:
        """The quickest trial that reaches the recall; the one with most recall where none does."""
        enough = [trial for trial in self.trials if trial.recall >= self._goal]
        if not enough:
            return max(self.trials, key=lambda trial: trial.recall)
        return max(enough, key=lambda trial: trial.queries_per_second)

    def _measure(self, settings: IndexSettings) -> Trial:
        """Builds, and tries depths of rescoring, each with the fewest leaves that reach the recall."""
        begun = time.perf_counter()
        searcher = ScannShard.build(self._vectors, dataclasses.replace(settings, leaves_to_search=None))
        seconds = time.perf_counter() - begun
        tried = []
        for depth in DEPTHS:
            depth = depth * self._k // 2
            leaves, share = self._fewest_leaves(searcher, depth)
            if tried and share < self._goal:
                continue
            made = dataclasses.replace(settings, leaves_to_search=leaves, reorder=depth)
            rate = self._rate(searcher, leaves, depth)
            memory = made.memory_bytes(self._vectors.shape[1])
            tried.append(Trial(made, share, rate, seconds, memory))
            if len(tried) > 2 and rate < tried[-2].queries_per_second < tried[-3].queries_per_second:
                break
        self.trials += tried
        enough = [trial for trial in tried if trial.recall >= self._goal] or tried
        return max(enough, key=lambda trial: trial.queries_per_second)

    def _fewest_leaves(self, searcher: ScannShard, depth: int) -> tuple[int, float]:
        leaves = max(1, searcher.settings.num_leaves // 200)
        while True:
            share = self._recall(searcher, leaves, depth)
            if share >= self._goal or leaves >= searcher.settings.num_leaves // 3:
                return leaves, share
            leaves = max(leaves + 1, round(leaves * _GROWTH))

    def _recall(self, searcher: ScannShard, leaves: int, depth: int) -> float:
        blocks = [self._queries[first : first + BATCH] for first in range(0, len(self._queries), BATCH)]
        rows = [searcher.search(block, self._k, leaves=leaves, reorder=depth)[0] for block in blocks]
        return recall(np.concatenate(rows), self._exact, self._queries, self._vectors)

    def _rate(self, searcher: ScannShard, leaves: int, depth: int) -> float:
        rates = []
        for _ in range(2):
            done, begun = 0, time.perf_counter()
            while time.perf_counter() - begun < self._seconds:
                for first in range(0, len(self._queries), BATCH):
                    block = self._queries[first : first + BATCH]
                    searcher.search(block, self._k, leaves=leaves, reorder=depth)
                    done += len(block)
            rates.append(done / (time.perf_counter() - begun))
        return max(rates)
