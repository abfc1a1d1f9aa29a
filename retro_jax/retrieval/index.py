"""The index of a database: approximate nearest neighbours over the shards that are loaded, merged exactly.

    index/manifest.json
    index/shard-00000-of-00004/ids.npy           chunk ids int64 [n] of the shard's vectors
    index/shard-00000-of-00004/scann/…           what `scann_shard.py` writes
    index/shard-00000-of-00004/probes.npy        what the stored queries find in this shard, exactly and by the index
    index/shard-00000-of-00004/shard.json        settings and counts of the shard
    index/probes.npy                             queries that recall is measured with: vectors of the database itself
    index/router/{centroids,shard_of_cell}.npy   where the database is sharded by cluster; with cells/ of every chunk

`index_build.py` writes it.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retro_jax.data.stage import Manifest, load_manifest, require_shards, shard_name, verify_checksums
from retro_jax.errors import UserError
from retro_jax.retrieval.index_settings import IndexSettings
from retro_jax.retrieval.router import Router
from retro_jax.retrieval.scann_shard import ScannShard

LAYOUT = 2
PROBES = "probes.npy"
IDS = "ids.npy"
SHARD = "shard.json"
SCANN = "scann"
CENTROIDS = "router/centroids.npy"
SHARD_OF_CELL = "router/shard_of_cell.npy"


def shard_folder(index: int, count: int) -> str:
    """`shard-00000-of-00004`."""
    return shard_name("shard", index, count, "")


@dataclasses.dataclass(frozen=True)
class LoadedShard:
    """A shard in memory: its number in the index, chunk ids int64 [n] and searcher; None without any vector."""

    number: int
    ids: np.ndarray
    searcher: ScannShard | None


class Index:
    """A searchable index, made by `Index.load`.

    Attributes:
      manifest: of the index stage.
      directory: of the index.
      num_shards: shards of the whole index.
      shards: numbers of those that are loaded.
      dimension: E.
      size: vectors in the loaded shards.
      router: chooses the shards of a query; None: all of them.
      embedder_fingerprint, corpus_fingerprint, fingerprint: what it was made with and from, and what it is.
    """

    def __init__(
        self, directory: Path, manifest: Manifest, loaded: Sequence[LoadedShard], router: Router | None = None
    ) -> None:
        self.directory = directory
        self.manifest = manifest
        self.router = router
        self._loaded = tuple(loaded)
        self.shards = tuple(shard.number for shard in self._loaded)
        self.num_shards: int = manifest.settings["num_shards"]
        self.dimension: int = manifest.settings["dimension"]
        self.size = sum(len(shard.ids) for shard in self._loaded)
        self.embedder_fingerprint: str = manifest.settings["embedder_fingerprint"]
        self.corpus_fingerprint: str = manifest.inputs["corpus"]
        self.fingerprint = manifest.fingerprint

    @classmethod
    def load(cls, directory: str | os.PathLike, *, shards: Sequence[int] | None = None, verify: bool = True) -> "Index":
        """Loads shards of a finished index directory, wherever it was moved.

        Args:
          directory: output of the index stage.
          shards: numbers of those to load, also none of them; None: all.
          verify: compare the checksums of what is loaded first; without, a damaged file may load and answer wrongly.

        Raises:
          UserError: incomplete, damaged, or not an index; no such shard; ScaNN not installed.
        """
        directory = Path(directory)
        manifest = _load_manifest(directory)
        count = manifest.settings["num_shards"]
        chosen = list(range(count)) if shards is None else sorted(set(shards))
        if chosen and not 0 <= chosen[0] <= chosen[-1] < count:
            raise UserError(f"{directory} has shards 0 to {count - 1}; cannot load {shards}")
        folders = {shard_folder(number, count) for number in chosen}
        # The files of other shards may be on other machines.
        mine = [
            shard
            for shard in manifest.shards
            if not shard.name.startswith(("shard-", "cells/")) or shard.name.partition("/")[0] in folders
        ]
        require_shards(directory, mine)
        if verify:
            verify_checksums(directory, mine)
        return cls(
            directory,
            manifest,
            [_load_shard(directory, manifest, number) for number in chosen],
            _load_router(directory, manifest),
        )

    @staticmethod
    def count_shards(directory: str | os.PathLike) -> int:
        """How many shards a finished index directory has.

        Raises:
          UserError: incomplete, or not an index.
        """
        return _load_manifest(Path(directory)).settings["num_shards"]

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest chunks of each query in the loaded shards that it visits: nearest first, equals by id.

        Thread-safe; the search runs outside Python's lock.

        Args:
          queries: [q, E] float32; q may be 0.
          k: at least 1; may exceed the number of vectors.

        Returns:
          ids int64 [q, k] of corpus chunks and squared L2 distances float32 [q, k]. With all shards loaded,
          min(k, size) places are filled; the rest is -1 and +inf.

        Raises:
          UserError: wrong shape, a query that is not finite, or k < 1.
        """
        queries = self.checked(queries, k)
        if not len(queries) or not self._loaded:
            return np.full((len(queries), k), -1, np.int64), np.full((len(queries), k), np.inf, np.float32)
        visits = None if self.router is None else self.router.visits(queries, k)
        found = [_search_shard(shard, queries, k, visits) for shard in self._loaded]
        return merge(found, k)

    def checked(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Queries as float32 [q, E], when they and k can be searched.

        Raises:
          UserError: wrong shape, a query that is not finite, or k < 1.
        """
        queries = np.asarray(queries)
        if queries.ndim != 2 or queries.shape[1] != self.dimension:
            raise UserError(f"queries have shape {queries.shape}, the index takes [q, {self.dimension}]")
        if k < 1:
            raise UserError(f"k must be at least 1, is {k}")
        queries = np.ascontiguousarray(queries, np.float32)
        if not np.isfinite(queries).all():
            bad = int(np.flatnonzero(~np.isfinite(queries).all(1))[0])
            raise UserError(f"query {bad} is not finite")
        return queries


def merge(found: Sequence[tuple[np.ndarray, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of several answers to the same queries: nearest first, equally near ones by id.

    Args:
      found: (ids int64 [q, k'], squared distances float32 [q, k']) with -1 and +inf for none, no id in two of them.
      k: wanted.

    Returns:
      ids int64 [q, k] and distances float32 [q, k], -1 and +inf for none.
    """
    ids = np.concatenate([ids for ids, _ in found], axis=1)
    squares = np.concatenate([squares for _, squares in found], axis=1)
    if ids.shape[1] < k:
        more = ((0, 0), (0, k - ids.shape[1]))
        ids, squares = np.pad(ids, more, constant_values=-1), np.pad(squares, more, constant_values=np.inf)
    order = np.lexsort((ids, squares), axis=1)[:, :k]
    return np.take_along_axis(ids, order, 1), np.take_along_axis(squares, order, 1)


def _search_shard(
    shard: LoadedShard, queries: np.ndarray, k: int, visits: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    count = min(k, len(shard.ids))
    rows = slice(None) if visits is None else np.flatnonzero(visits[:, shard.number])
    ids = np.full((len(queries), count), -1, np.int64)
    squares = np.full((len(queries), count), np.inf, np.float32)
    if count and (visits is None or len(rows)):
        at, squares[rows] = shard.searcher.search(queries[rows], count)
        ids[rows] = np.where(at >= 0, shard.ids[at], -1)
    return ids, squares


def _load_manifest(directory: Path) -> Manifest:
    manifest = load_manifest(directory, "index", whole=False)
    if manifest.settings.get("layout") != LAYOUT:
        raise UserError(f"{directory} was built by an older program, as one shard; build it again")
    return manifest


def _load_shard(directory: Path, manifest: Manifest, number: int) -> LoadedShard:
    folder = shard_folder(number, manifest.settings["num_shards"])
    description = json.loads((directory / folder / SHARD).read_text(encoding="utf-8"))
    settings, size = IndexSettings(**description["settings"]), description["counts"]["vectors"]
    ids = load_array(directory / folder / IDS, np.int64, (size,))
    if not size:
        return LoadedShard(number, ids, None)
    prefix = f"{folder}/{SCANN}/"
    listed = [shard.name.removeprefix(prefix) for shard in manifest.shards if shard.name.startswith(prefix)]
    return LoadedShard(number, ids, ScannShard.load(directory / prefix, settings, size, listed))


def _load_router(directory: Path, manifest: Manifest) -> Router | None:
    cells = manifest.settings["cells"]
    if not cells:
        return None
    counts = manifest.counts
    return Router(
        load_array(directory / CENTROIDS, np.float32, (cells, manifest.settings["dimension"])),
        load_array(directory / SHARD_OF_CELL, np.int32, (cells,)),
        counts["cells_to_visit"],
        np.asarray(counts["shard_vectors"], np.int64),
    )


def load_array(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """An array of a known type and shape.

    Raises:
      UserError: it is another one, or none.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise UserError(f"{path}: not a NumPy array ({error}); rebuild the index") from None
    if array.shape != shape or array.dtype != dtype:
        raise UserError(f"{path}: {array.dtype} {array.shape}, expected {np.dtype(dtype)} {shape}; rebuild the index")
    return array
