"""How sure a difference between two methods is: the bootstrap over documents (Efron 1979, percentile intervals)."""

import dataclasses
import math

import numpy as np

from retro_jax.evaluation.bits_per_byte import DocumentScores

RESAMPLES = 2000
# Of fewer units an interval of percentiles is too narrow to claim anything by it.
FEWEST_UNITS = 8
_SEED = 0


@dataclasses.dataclass(frozen=True)
class Difference:
    """A difference of two methods on the same documents, and where it would lie on other documents like them.

    Attributes:
      estimate: value of the second method less that of the first: below zero, the second costs less.
      low, high: the central 95 % of what resampled documents give.
      units: documents resampled; those of one group are drawn together.
    """

    estimate: float
    low: float
    high: float
    units: int

    @property
    def is_certain(self) -> bool:
        """Whether zero lies outside the interval, and there are units enough to believe it."""
        return self.units >= FEWEST_UNITS and (self.high < 0 or self.low > 0)

    def as_json(self) -> dict[str, float | int | bool]:
        return {**dataclasses.asdict(self), "is_certain": self.is_certain}


def bits_per_byte_difference(first: DocumentScores, second: DocumentScores) -> Difference:
    """bpb of the second less bpb of the first, over documents that both scored alike.

    Raises:
      AssertionError: they are not scores of the same bytes.
    """
    assert (first.bytes == second.bytes).all(), "the two are not of the same text"
    return _ratio_difference((second.nats - first.nats) / math.log(2), first.bytes, first.keys)


def rate_difference(first: np.ndarray, second: np.ndarray, keys: np.ndarray) -> Difference:
    """Mean of the second less mean of the first, of one value a document [n] (an accuracy, for example)."""
    return _ratio_difference(second.astype(np.float64) - first, np.ones(len(first)), keys)


def _ratio_difference(over: np.ndarray, under: np.ndarray, keys: np.ndarray) -> Difference:
    """Interval of sum(over) / sum(under), [n] each, when groups of equal keys are drawn with replacement."""
    used = under > 0
    groups, member = np.unique(keys[used], return_inverse=True)
    count = len(groups)
    if count == 0:
        return Difference(math.nan, math.nan, math.nan, 0)
    sums = np.zeros((count, 2))
    np.add.at(sums, member, np.stack([over[used], under[used]], axis=1))
    generator = np.random.default_rng(_SEED)
    draws = np.empty((RESAMPLES, 2))
    for row in draws:  # one at a time: a corpus may have millions of documents
        row[:] = np.bincount(generator.integers(0, count, count), minlength=count) @ sums
    low, high = np.percentile(draws[:, 0] / draws[:, 1], (2.5, 97.5))
    total = sums.sum(axis=0)
    return Difference(float(total[0] / total[1]), float(low), float(high), count)
