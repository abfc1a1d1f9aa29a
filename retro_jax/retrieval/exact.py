"""Exact nearest neighbours under squared L2: what approximate search is measured against.

In NumPy, since it runs in worker processes beside each other, which must not all take hold of the accelerator.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from retro_jax.errors import UserError

_DATABASE_ROWS = 8192  # vectors compared at once
_QUERY_ROWS = 512
_SPARE = 16  # candidates kept beyond k before the distances are computed without cancellation


def exact_search(queries: np.ndarray, database: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest database vectors of each query, by squared L2 distance.

    Candidates are found with |q|^2 - 2 q.x + |x|^2 and then measured as |q - x|^2, which does not cancel, so that the
    distance of a vector to itself is exactly 0. Equal distances are ordered by id.

    Args:
      queries: [q, E] float32.
      database: [n, E]: an array, a memory map or an `EmbeddingSet`; read in blocks, so it may be larger than memory.
      k: at least 1.

    Returns:
      ids int64 [q, k] with -1, and distances float32 [q, k] with +inf, where the database has fewer than k vectors.

    Raises:
      UserError: a query or a database vector is not finite, or k is not positive.
    """
    queries = np.ascontiguousarray(queries, np.float32)
    if k < 1:
        raise UserError(f"k must be at least 1, is {k}")
    if not np.isfinite(queries).all():
        raise UserError("a query vector is not finite")
    n, width = len(database), queries.shape[1]
    blocks = [queries[first : first + _QUERY_ROWS] for first in range(0, len(queries), _QUERY_ROWS)]
    kept = k + _SPARE
    best = [(np.full((len(block), kept), np.inf, np.float32), np.full((len(block), kept), -1)) for block in blocks]
    for first in range(0, n, _DATABASE_ROWS):
        rows = np.asarray(database[first : first + _DATABASE_ROWS], np.float32)
        if rows.shape[1] != width:
            raise UserError(f"queries have {width} components, the database {rows.shape[1]}")
        if not np.isfinite(rows).all():
            bad = first + int(np.flatnonzero(~np.isfinite(rows).all(1))[0])
            raise UserError(f"database vector {bad} is not finite")
        best = [_merge(*state, block, rows, first) for state, block in zip(best, blocks, strict=True)]
    ids = np.full((len(queries), k), -1, np.int64)
    distances = np.full((len(queries), k), np.inf, np.float32)
    for start, block, (_, candidates) in zip(range(0, len(queries), _QUERY_ROWS), blocks, best, strict=True):
        for i in range(len(block)):
            found = np.sort(candidates[i][candidates[i] >= 0])
            exact = squared_distances(block[i], gather_rows(database, found))
            order = np.argsort(exact, kind="stable")[:k]
            ids[start + i, : len(order)] = found[order]
            distances[start + i, : len(order)] = exact[order]
    return ids, distances


def squared_distances(query: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """|q - x|^2 of one query [E] to vectors [n, E], float32 [n], without cancellation."""
    return np.square(vectors.astype(np.float64) - query).sum(1).astype(np.float32)


def gather_rows(database: Any, ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """Rows of an array or of an `EmbeddingSet` by id, float32 [n, E]."""
    rows = database.vectors(ids) if hasattr(database, "vectors") else database[ids]
    return np.asarray(rows, np.float32)


def recall(found: np.ndarray, exact_distances: np.ndarray, queries: np.ndarray, database: Any) -> float:
    """Share of the true k nearest neighbours that were found; equally near vectors count alike.

    A result counts when it is no farther than the k-th exact neighbour: which of several copies of a chunk is returned
    does not matter.

    Args:
      found: ids [q, k], -1 for none, no id twice in a row.
      exact_distances: distances [q, k] from `exact_search`, +inf for none.
      queries: [q, E].
      database: what was searched.
    """
    hits = possible = 0
    for ids, limits, query in zip(found, exact_distances, queries, strict=True):
        finite = limits[np.isfinite(limits)]
        possible += len(finite)
        if len(finite):
            distances = squared_distances(query, gather_rows(database, ids[ids >= 0]))
            hits += min(len(finite), int((distances <= finite[-1] * (1 + 1e-6) + 1e-12).sum()))
    return hits / possible if possible else 1.0


def _merge(
    distances: np.ndarray, ids: np.ndarray, queries: np.ndarray, rows: np.ndarray, first: int
) -> tuple[np.ndarray, np.ndarray]:
    """Puts a block of database rows into the running best [q, kept], equally near ones in order of id."""
    squares = np.square(rows).sum(1) - 2 * (queries @ rows.T)
    squares += np.square(queries).sum(1, keepdims=True)
    kept = distances.shape[1]
    at = np.broadcast_to(np.arange(len(rows)), squares.shape)
    if len(rows) > kept:
        at = np.sort(np.argpartition(squares, kept - 1, axis=1)[:, :kept], axis=1)
        nearest = np.take_along_axis(squares, at, 1)
        # Of vectors equally near at the edge the partition takes any; the first are wanted.
        edge = nearest.max(1, keepdims=True)
        for row in np.flatnonzero((squares == edge).sum(1) > (nearest == edge).sum(1)):
            at[row] = np.sort(np.argsort(squares[row], kind="stable")[:kept])
    distances = np.concatenate([distances, np.take_along_axis(squares, at, 1)], axis=1)
    ids = np.concatenate([ids, first + at], axis=1)
    best = np.argsort(distances, axis=1, kind="stable")[:, :kept]
    return np.take_along_axis(distances, best, 1), np.take_along_axis(ids, best, 1)
