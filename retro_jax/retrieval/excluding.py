"""Search that leaves out the chunks of some documents, by fetching more and dropping (paper section 2.3)."""

from collections.abc import Callable

import numpy as np

# Hits held at once while neighbours of other documents are looked for: about 200 MB.
_MAX_HITS = 8_000_000


def first_fetch(k: int) -> int:
    """Hits that are fetched at first for k that survive."""
    return 2 * k + 8


def search_excluding(
    search: Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]],
    size: int,
    document_keys: Callable[[np.ndarray], np.ndarray],
    vectors: np.ndarray,
    k: int,
    exclude_keys: np.ndarray | None,
    *,
    removed: Callable[[np.ndarray], np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray, int]:
    """The k nearest chunks that are not of an excluded document and not removed, in rank order.

    Rows with fewer than k survivors fetch twice as many, until k survive or there are no more.

    Args:
      search: (queries [n, E], k) -> ids int64 [n, k] (-1) and distances float32 [n, k] (+inf), nearest first.
      size: vectors that it searches.
      document_keys: chunk ids [...] -> int64 keys [...].
      vectors: queries [n, E]; a zero vector finds nothing.
      k: wanted.
      exclude_keys: int64 [n] or [n, X], -1 for none; None: no document is excluded.
      removed: chunk ids [...] -> bool [...]; None: no chunk is removed.

    Returns:
      ids int64 [n, K] (-1), distances float32 [n, K] (+inf), and how many nearer hits of excluded documents were
      dropped altogether.
    """
    ids = np.full((len(vectors), k), -1, np.int64)
    distances = np.full((len(vectors), k), np.inf, np.float32)
    pending = np.flatnonzero(vectors.any(1))
    if exclude_keys is None and removed is None:
        if len(pending):
            ids[pending], distances[pending] = search(vectors[pending], k)
        return ids, distances, 0
    excluded = np.full((len(vectors), 1), -1) if exclude_keys is None else np.asarray(exclude_keys, np.int64)
    excluded = excluded.reshape(len(vectors), -1)
    dropped = 0
    fetch = first_fetch(k)
    while len(pending):
        fetch = max(k, min(fetch, size))
        if len(pending) * fetch > _MAX_HITS and len(pending) > 1:
            # Rows that still lack neighbours want much of the index: fewer at a time keep memory bounded.
            for part in np.array_split(pending, 2):
                ids[part], distances[part], some = search_excluding(
                    search, size, document_keys, vectors[part], k, excluded[part], removed=removed
                )
                dropped += some
            break
        hits, squares = search(vectors[pending], fetch)
        real = hits >= 0
        same = (document_keys(hits)[:, :, None] == excluded[pending][:, None, :]).any(2) & real
        survives = real & ~same if removed is None else real & ~same & ~removed(hits)
        # A row with an empty place has got all there is for it.
        settled = (survives.sum(1) >= k) | ~real[:, -1] | (fetch >= size)
        rows, order = pending[settled], np.argsort(~survives[settled], axis=1, kind="stable")[:, :k]
        kept = np.take_along_axis(survives[settled], order, 1)
        ids[rows] = np.where(kept, np.take_along_axis(hits[settled], order, 1), -1)
        distances[rows] = np.where(kept, np.take_along_axis(squares[settled], order, 1), np.inf)
        # Only hits before the k-th survivor were in the way.
        before = np.cumsum(survives[settled], axis=1) < k
        dropped += int((same[settled] & before).sum())
        pending = pending[~settled]
        fetch *= 2
    return ids, distances, dropped
