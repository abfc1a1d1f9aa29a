"""Sets of whole numbers as ranges: int64 [r, 2], first and stop of each."""

import numpy as np


def merge_ranges(ranges: np.ndarray) -> np.ndarray:
    """Ranges [r, 2] (first, stop) of the same numbers, in order, none empty, none touching the next."""
    ranges = np.asarray(ranges, np.int64).reshape(-1, 2)
    ranges = ranges[ranges[:, 0] < ranges[:, 1]]
    ranges = ranges[np.argsort(ranges[:, 0], kind="stable")]
    if not len(ranges):
        return ranges
    reach = np.maximum.accumulate(ranges[:, 1])
    starts = np.flatnonzero(np.concatenate([[True], ranges[1:, 0] > reach[:-1]]))
    return np.stack([ranges[starts, 0], reach[np.append(starts[1:] - 1, len(ranges) - 1)]], axis=1)


def in_ranges(numbers: np.ndarray, ranges: np.ndarray) -> np.ndarray:
    """Whether numbers [...] lie in ranges [r, 2] as `merge_ranges` gives them, bool [...]."""
    at = np.searchsorted(ranges[:, 0], numbers, side="right") - 1
    if not len(ranges):
        return np.zeros(np.shape(numbers), bool)
    return (at >= 0) & (numbers < ranges[np.maximum(at, 0), 1])
