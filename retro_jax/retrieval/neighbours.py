"""Neighbours of every chunk of a corpus, searched once and kept by chunk id (paper section 2.3, spec section 2.4).

More than the K of training are kept, so that sequence length, K and batch size change without another search. Hits of
the chunk's own document are dropped here; whoever cuts sequences drops those of the sequence's other documents.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np

from retro_jax.data.arrays import ArrayWriter
from retro_jax.data.stage import Manifest, Stage, load_manifest, shard_name, verify_checksums
from retro_jax.errors import UserError
from retro_jax.progress import Progress

FILTERS = ("document", "none")
_QUERIES_AT_ONCE = 1024


def neighbour_dtype(k: int) -> np.dtype:
    """One chunk's row: ids int64 [K] (-1 for none) and squared distances float32 [K] (+inf for none), nearest first."""
    return np.dtype([("ids", "<i8", (k,)), ("distances", "<f4", (k,))])


def find_neighbours(
    corpus: Any,
    database_directory: str | os.PathLike,
    directory: str | os.PathLike,
    *,
    k: int = 16,
    filter: str = "document",
    embeddings: Any = None,
) -> Manifest:
    """The neighbours stage: the nearest database chunks of every chunk of a corpus; goes on after the last shard.

    The manifest counts chunks, chunks without a vector (they have no neighbours), hits dropped because they are of the
    chunk's own document, chunks with fewer than k neighbours, and `survivors`: how many chunks have 0, 1, ..., k.

    Args:
      corpus: `Corpus` of the queries; may be the database's own.
      database_directory: with corpus/, embeddings/ and index/ in it.
      directory: to write.
      k: neighbours kept of each chunk.
      filter: "document" drops hits whose document key is the chunk's; "none" keeps all (evaluation, spec section 2.4).
      embeddings: `EmbeddingSet` of the query corpus; None takes the database's, when the corpus is the database's.

    Raises:
      UserError: embeddings of another corpus or embedder, a corpus of another tokenizer or chunk length, a damaged
        database, settings out of range, or the directory belongs to something else.
    """
    # Here, so that reading a table needs neither ScaNN nor JAX.
    from retro_jax.retrieval.database import Database, require_embedder, search_excluding
    from retro_jax.retrieval.embedder import EmbeddingSet

    if k < 1:
        raise UserError(f"k must be at least 1, is {k}")
    if filter not in FILTERS:
        raise UserError(f"filter {filter!r} is not one of {', '.join(FILTERS)}")
    database = Database.open(database_directory)
    if embeddings is None:
        if corpus.fingerprint != database.corpus.fingerprint:
            raise UserError(f"{corpus.directory} is not the database's corpus: embed it too and give its embeddings")
        embeddings = EmbeddingSet(Path(database_directory) / "embeddings")
    if embeddings.corpus_fingerprint != corpus.fingerprint:
        raise UserError(f"{embeddings.directory} was not made from {corpus.directory}; embed this corpus")
    require_embedder(
        embeddings.embedder_fingerprint, database.index.embedder_fingerprint, f"the embedder of {embeddings.directory}"
    )
    for name in ("tokenizer_fingerprint", "chunk_length"):
        ours, theirs = getattr(corpus, name), getattr(database.corpus, name)
        if ours != theirs:
            raise UserError(
                f"{corpus.directory} has {name} {ours}, the database has {theirs}; build both with the same tokenizer "
                "and chunk length"
            )
    inputs = {
        "corpus": corpus.fingerprint,
        "embeddings": embeddings.fingerprint,
        "database": database.fingerprint,
        "database_corpus": database.corpus.fingerprint,
    }
    with Stage(directory, "neighbours", settings={"k": k, "filter": filter}, inputs=inputs) as stage:
        if stage.complete:
            return stage.manifest
        offsets = np.asarray(corpus.shard_offsets)
        names = [shard_name("neighbours", i, len(offsets) - 1, ".npy") for i in range(len(offsets) - 1)]
        done = sum(stage.counts(name)["chunks"] for name in names if stage.has(name))
        with Progress("neighbours", total=corpus.num_chunks, unit="chunks", initial=done) as progress:
            for name, start, stop in zip(names, offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
                if stage.has(name):
                    continue
                counts = {"chunks": stop - start, "empty": 0, "dropped": 0}
                survivors = np.zeros(k + 1, np.int64)
                with stage.shard(name) as (path, shard_counts), ArrayWriter(path, neighbour_dtype(k)) as writer:
                    for first in range(start, stop, _QUERIES_AT_ONCE):
                        chunks = np.arange(first, min(first + _QUERIES_AT_ONCE, stop))
                        vectors = embeddings.vectors(chunks)
                        keys = corpus.document_keys(chunks) if filter == "document" else None
                        ids, distances, dropped = search_excluding(
                            database.index, database.corpus.document_keys, vectors, k, keys
                        )
                        rows = np.empty(len(chunks), neighbour_dtype(k))
                        rows["ids"], rows["distances"] = ids, distances
                        writer.append(rows)
                        survivors += np.bincount((ids >= 0).sum(1), minlength=k + 1)
                        counts["empty"] += int((~vectors.any(1)).sum())
                        counts["dropped"] += dropped
                        progress.update(len(chunks))
                    shard_counts.update(counts, survivors=survivors.tolist())
        totals = {key: sum(stage.counts(name)[key] for name in names) for key in ("chunks", "empty", "dropped")}
        histogram = np.sum([stage.counts(name)["survivors"] for name in names], axis=0)
        totals["fewer_than_k"] = int(histogram[:-1].sum())
        totals["survivors"] = histogram.tolist()
        return stage.finish(totals)


class NeighbourTable:
    """Reader of a finished neighbours directory; arrays are memory-mapped. Needs NumPy alone.

    Attributes:
      k: neighbours kept of each chunk.
      filter: "document" or "none".
      fingerprint: of this table.
      corpus_fingerprint, database_fingerprint: whose chunks these are neighbours of, and what was searched.
      database_corpus_fingerprint: of the corpus that the neighbours' ids count in.
      manifest: of the stage.
    """

    def __init__(self, directory: str | os.PathLike, *, verify: bool = False) -> None:
        """Opens the shards.

        Args:
          directory: output of the neighbours stage.
          verify: compare every shard's checksum (reads all of it).

        Raises:
          UserError: not a complete neighbours data set, or a damaged shard.
        """
        self.directory = Path(directory)
        self.manifest = load_manifest(directory, "neighbours")
        if verify:
            verify_checksums(directory, self.manifest)
        self.k: int = self.manifest.settings["k"]
        self.filter: str = self.manifest.settings["filter"]
        self.corpus_fingerprint: str = self.manifest.inputs["corpus"]
        self.database_fingerprint: str = self.manifest.inputs["database"]
        self.database_corpus_fingerprint: str = self.manifest.inputs["database_corpus"]
        self._shards = [self._open(self.directory / shard.name) for shard in self.manifest.shards]
        self._offsets = np.cumsum([0] + [len(shard) for shard in self._shards])

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def ids(self, chunks: np.ndarray) -> np.ndarray:
        """Database chunk ids int64 [..., K] of chunks [...], nearest first, -1 for none; chunk -1 has none."""
        return self._gather(chunks, "ids", np.int64, -1)

    def distances(self, chunks: np.ndarray) -> np.ndarray:
        """Squared L2 distances float32 [..., K] of chunks [...], +inf for none."""
        return self._gather(chunks, "distances", np.float32, np.inf)

    def _gather(self, chunks: np.ndarray, field: str, dtype: type, missing: float) -> np.ndarray:
        chunks = np.asarray(chunks, np.int64)
        if chunks.size and (chunks.min() < -1 or chunks.max() >= len(self)):
            raise IndexError(f"chunk ids from {chunks.min()} to {chunks.max()}, the table has {len(self)}")
        result = np.full((*chunks.shape, self.k), missing, dtype)
        shard = np.searchsorted(self._offsets, chunks, side="right") - 1
        for s in np.unique(shard[chunks >= 0]):
            at = (shard == s) & (chunks >= 0)
            result[at] = self._shards[s][field][chunks[at] - self._offsets[s]]
        return result

    def _open(self, path: Path) -> np.ndarray:
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise UserError(f"{path}: not a NumPy array ({error}); find the neighbours again") from None
        if array.dtype != neighbour_dtype(self.k):
            raise UserError(f"{path}: rows of type {array.dtype}, expected {self.k} neighbours; find them again")
        return array
