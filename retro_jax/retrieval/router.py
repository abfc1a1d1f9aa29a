"""Which shards of an index a query visits, where the database is sharded by cluster.

A clustering at the top, of many more cells than shards, puts every vector into a cell, and cells that lie beside each
other into the same shard. A query visits the shards of its nearest cells. Where the shards are ranges of chunk ids
there is no router and every query visits all of them.
"""

import dataclasses

import numpy as np

from retro_jax.errors import UserError

_ROUNDS = 12
_MOST_ROWS = 65_536
_DISTANCES_AT_ONCE = 2**24


@dataclasses.dataclass(frozen=True)
class Router:
    """The cells of a clustering and the shards they are in.

    Attributes:
      centroids: [C, E] float32.
      shard_of_cell: [C] int32.
      cells_to_visit: nearest cells whose shards a query visits.
      shard_sizes: [S] int64, vectors in each shard.
    """

    centroids: np.ndarray
    shard_of_cell: np.ndarray
    cells_to_visit: int
    shard_sizes: np.ndarray

    def visits(self, queries: np.ndarray, k: int) -> np.ndarray:
        """The shards each query visits, bool [q, S]: those of its nearest cells, and as many more as hold k vectors.

        Args:
          queries: [q, E] float32.
          k: neighbours wanted.
        """
        visited = np.zeros((len(queries), len(self.shard_sizes)), bool)
        rows = rows_at_once(len(self.centroids))
        for first in range(0, len(queries), rows):
            self._visit(queries[first : first + rows], k, visited[first : first + rows])
        return visited

    def _visit(self, queries: np.ndarray, k: int, visited: np.ndarray) -> None:
        squares = squared_to_cells(queries, self.centroids)
        nearest = np.argpartition(squares, self.cells_to_visit - 1, axis=1)[:, : self.cells_to_visit]
        np.put_along_axis(visited, self.shard_of_cell[nearest], True, axis=1)
        wanted = min(k, int(self.shard_sizes.sum()))
        for row in np.flatnonzero(visited @ self.shard_sizes < wanted):
            for cell in np.argsort(squares[row], kind="stable"):
                visited[row, self.shard_of_cell[cell]] = True
                if visited[row] @ self.shard_sizes >= wanted:
                    break


def fit_cells(sample: np.ndarray, cells: int, seed: int) -> np.ndarray:
    """Centroids [C, E] float32 of a k-means clustering of a sample [n, E]; the same seed gives the same.

    Raises:
      UserError: more cells than vectors.
    """
    # Not at the top: SciPy takes a moment to import, and searching needs none of it.
    from scipy.cluster.vq import kmeans2

    if cells > len(sample):
        raise UserError(f"{cells} cells are too many for {len(sample)} vectors")
    generator = np.random.default_rng(seed)
    start = sample[np.sort(generator.choice(len(sample), cells, replace=False))]
    # A cell that runs empty keeps its old centroid.
    centroids, _ = kmeans2(np.float32(sample), start, iter=_ROUNDS, minit="matrix", missing="warn", rng=generator)
    return np.asarray(centroids, np.float32)


def rows_at_once(cells: int) -> int:
    """How many vectors to take to `squared_to_cells` at once: 64 MiB of distances, twice that while they are made."""
    return min(_MOST_ROWS, max(1, _DISTANCES_AT_ONCE // cells))


def squared_to_cells(vectors: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Squared distances [n, C] of vectors [n, E] to the centroids, but for what is equal along a row."""
    return np.square(centroids).sum(1) - 2 * (vectors @ centroids.T)


def group_cells(centroids: np.ndarray, weights: np.ndarray, shards: int) -> np.ndarray:
    """Shard of every cell, int32 [C]: about equal weights in each shard, and neighbouring cells together.

    The cells are cut in two along their principal axis, so that the weights of the parts are as the numbers of shards
    that each part is to make; and so on with the parts.

    Args:
      centroids: [C, E].
      weights: [C], vectors in each cell.
      shards: 1 to C.
    """
    result = np.zeros(len(centroids), np.int32)

    def cut(cells: np.ndarray, first: int, count: int) -> None:
        if count == 1:
            result[cells] = first
            return
        centred = centroids[cells] - np.average(centroids[cells], axis=0)
        axis = np.linalg.svd(centred, full_matrices=False)[2][0]
        along = cells[np.argsort(centred @ axis, kind="stable")]
        left = count // 2
        share = np.cumsum(weights[along] + 1e-9) / (weights[along] + 1e-9).sum()
        # Every part keeps at least a cell for each of its shards.
        at = int(np.clip(np.searchsorted(share, left / count) + 1, left, len(along) - (count - left)))
        cut(along[:at], first, left)
        cut(along[at:], first + left, count - left)

    cut(np.arange(len(centroids)), 0, shards)
    return result
