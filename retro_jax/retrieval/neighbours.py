"""Neighbours of every chunk of a corpus, searched once and kept by chunk id (paper section 2.3, spec section 2.4).

More than the K of training are kept, so that sequence length, K and batch size change without another search. Hits of
the chunk's own document are dropped here; whoever cuts sequences drops those of the sequence's other documents.
"""

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from retro_jax.data.arrays import ArrayWriter, files_of
from retro_jax.data.distribute import BeamOptions, Unit, distribute
from retro_jax.data.stage import Manifest, ShardWriter, Stage, load_manifest, shard_name, verify_checksums
from retro_jax.errors import UserError
from retro_jax.retrieval.service.access import Service

if TYPE_CHECKING:
    from retro_jax.data.corpus import Corpus
    from retro_jax.retrieval.bm25 import Bm25Settings
    from retro_jax.retrieval.embedder import EmbeddingSet

FILTERS = ("document", "none")
# A tree's candidates depend on which queries are asked together: the same blocks, the same neighbours.
_QUERIES_AT_ONCE = 1024
DISTINCT_AMONG = 1000  # nearest chunks; as many as the service gives a query (`service/wire.py: Limits`)
_COMPARED_AT_ONCE = 65_536  # chunks whose tokens are in memory


def neighbour_dtype(k: int) -> np.dtype:
    """One chunk's row: ids int64 [K] (-1 for none) and squared distances float32 [K] (+inf for none), nearest first.

    Where BM25 ordered the neighbours its negated scores stand in the place of distances.
    """
    return np.dtype([("ids", "<i8", (k,)), ("distances", "<f4", (k,))])


class Searcher(Protocol):
    """What is searched: a `Database` in this process, or a service, by vectors; or `Bm25`, by tokens."""

    fingerprint: str

    def search(
        self, queries: np.ndarray, k: int, exclude_keys: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids int64 [n, K] (-1) and squared distances float32 [n, K] (+inf), nearest first, of queries [n, E or M]."""

    def neighbour_tokens(self, ids: np.ndarray) -> np.ndarray:
        """int32 [..., 2M]: chunks [...] and their continuations."""


@dataclasses.dataclass(frozen=True)
class _Searched:
    """Fingerprints of what is searched, and its chunks' length; no embedder where tokens are searched."""

    database: str
    corpus: str
    embedder: str | None
    tokenizer_fingerprint: str
    chunk_length: int


def find_neighbours(
    corpus: "Corpus",
    database_directory: str | os.PathLike | None,
    directory: str | os.PathLike,
    *,
    k: int = 16,
    filter: str = "document",
    deduplicate: bool = False,
    embeddings: "EmbeddingSet | None" = None,
    service: Service | None = None,
    bm25: "Bm25Settings | None" = None,
    options: BeamOptions | None = None,
) -> Manifest:
    """The neighbours stage: the nearest database chunks of every chunk of a corpus; goes on after the last shard.

    The manifest counts chunks, chunks without a vector (they have no neighbours), chunks with fewer than k neighbours,
    hits dropped because a nearer one has the same tokens, and `survivors`: how many chunks have 0, 1, ..., k.

    Args:
      corpus: of the queries; may be the database's own.
      database_directory: with corpus/, embeddings/ and index/ in it, of which BM25 needs corpus/ alone; None where a
        service is searched and `embeddings` are given.
      directory: to write.
      k: neighbours kept of each chunk.
      filter: "document" drops hits whose document key is the chunk's; "none" keeps all (evaluation, spec section 2.4).
      deduplicate: keep only the nearest of neighbours whose chunks have the same tokens, as `search_distinct` does.
      embeddings: of the query corpus; None takes the database's, when the corpus is the database's.
      service: is searched instead of the database's index in this process.
      bm25: the neighbours are those that score best by BM25 with these settings; no vectors are needed.
      options: where the shards are worked off.

    Raises:
      UserError: embeddings of another corpus or embedder, a corpus of another tokenizer or chunk length, a damaged
        database, a service that does not answer, settings out of range, or the directory belongs to something else.
    """
    # Here, so that reading a table needs neither ScaNN nor JAX.
    from retro_jax.retrieval.database import require_embedder
    from retro_jax.retrieval.embedder import EmbeddingSet

    if k < 1:
        raise UserError(f"k must be at least 1, is {k}")
    if filter not in FILTERS:
        raise UserError(f"filter {filter!r} is not one of {', '.join(FILTERS)}")
    if bm25 is not None and (database_directory is None or service is not None or embeddings is not None):
        raise UserError("BM25 searches a database directory: give that, and neither service nor embeddings")
    place = None if database_directory is None else str(Path(database_directory).absolute())
    asked = {
        "database": place,
        "service": service and dataclasses.asdict(service),
        "bm25": bm25 and dataclasses.asdict(bm25),
    }
    _searcher.cache_clear()  # the directory may hold another database than at an earlier call
    searched = _searched(asked)
    if bm25 is None and embeddings is None:
        if corpus.fingerprint != searched.corpus or database_directory is None:
            raise UserError(f"{corpus.directory} is not the database's corpus: embed it too and give its embeddings")
        embeddings = EmbeddingSet(Path(database_directory) / "embeddings")
    if embeddings is not None:
        if embeddings.corpus_fingerprint != corpus.fingerprint:
            raise UserError(f"{embeddings.directory} was not made from {corpus.directory}; embed this corpus")
        require_embedder(embeddings.embedder_fingerprint, searched.embedder, f"the embedder of {embeddings.directory}")
    for name in ("tokenizer_fingerprint", "chunk_length"):
        ours, theirs = getattr(corpus, name), getattr(searched, name)
        if ours != theirs:
            raise UserError(
                f"{corpus.directory} has {name} {ours}, the database has {theirs}; build both with the same tokenizer "
                "and chunk length"
            )
    settings = {"k": k, "filter": filter, "deduplicate": deduplicate}
    inputs = {"corpus": corpus.fingerprint, "database": searched.database, "database_corpus": searched.corpus}
    if bm25 is not None:
        settings["bm25"] = dataclasses.asdict(bm25)
    else:
        inputs["embeddings"] = embeddings.fingerprint
    with Stage(directory, "neighbours", settings=settings, inputs=inputs) as stage:
        if stage.complete:
            return stage.manifest
        common = {
            **settings,
            **asked,
            "fingerprint": searched.database,
            "corpus": str(corpus.directory.absolute()),
            "embeddings": None if embeddings is None else str(embeddings.directory.absolute()),
        }
        offsets = np.asarray(corpus.shard_offsets).tolist()
        names = [shard_name("neighbours", i, len(offsets) - 1, ".npy") for i in range(len(offsets) - 1)]
        units = [
            Unit((name,), {**common, "name": name, "first": first, "stop": stop}, stop - first)
            for name, first, stop in zip(names, offsets[:-1], offsets[1:], strict=True)
        ]
        try:
            distribute(stage, units, search_shard, options or BeamOptions(), label="neighbours", unit="chunks")
        finally:
            _searcher.cache_clear()
        totals = {key: sum(stage.counts(name)[key] for name in names) for key in ("chunks", "empty", "duplicates")}
        histogram = np.sum([stage.counts(name)["survivors"] for name in names], axis=0)
        totals["fewer_than_k"] = int(histogram[:-1].sum())
        totals["survivors"] = histogram.tolist()
        return stage.finish(totals)


def search_shard(writer: ShardWriter, arguments: dict[str, Any]) -> None:
    """Finds the neighbours of the chunks of one shard.

    Args:
      writer: of the stage.
      arguments: "corpus" and "embeddings" directories of the queries, "first" and "stop" of their chunk ids, "name" of
        the file, the stage's settings, "database" directory or "service", settings of "bm25" or None, and the
        "fingerprint" that must answer.

    Raises:
      UserError: the database has changed since the stage began; a shard of the queries is damaged.
    """
    from retro_jax.data.corpus import Corpus
    from retro_jax.retrieval.embedder import EmbeddingSet

    corpus, part = Corpus(arguments["corpus"]), range(arguments["first"], arguments["stop"])
    corpus.verify(part)
    queries_of = corpus.tokens
    if not arguments["bm25"]:
        embeddings = EmbeddingSet(arguments["embeddings"])
        embeddings.verify(part)
        queries_of = embeddings.vectors
    searcher = _searcher(json.dumps({name: arguments[name] for name in ("database", "service", "bm25")}))
    if searcher.fingerprint != arguments["fingerprint"]:
        raise UserError(
            f"the database is {searcher.fingerprint} now, it was {arguments['fingerprint']} when the search began; "
            "find all neighbours again, in another directory"
        )
    k = arguments["k"]
    survivors, empty, duplicates = np.zeros(k + 1, np.int64), 0, 0
    with (
        writer.shard(arguments["name"]) as (path, counts),
        ArrayWriter(path, neighbour_dtype(k)) as file,
    ):
        for first in range(arguments["first"], arguments["stop"], _QUERIES_AT_ONCE):
            chunks = np.arange(first, min(first + _QUERIES_AT_ONCE, arguments["stop"]))
            queries = queries_of(chunks)
            keys = corpus.document_keys(chunks) if arguments["filter"] == "document" else None
            rows = np.empty(len(chunks), neighbour_dtype(k))
            if arguments["deduplicate"]:
                rows["ids"], rows["distances"], some = search_distinct(searcher, queries, k, keys, corpus.chunk_length)
                duplicates += some
            else:
                rows["ids"], rows["distances"] = searcher.search(queries, k, keys)
            file.append(rows)
            survivors += np.bincount((rows["ids"] >= 0).sum(1), minlength=k + 1)
            empty += int((~queries.any(1)).sum())
            writer.advance(len(chunks))
        counts.update(
            chunks=arguments["stop"] - arguments["first"],
            empty=empty,
            duplicates=duplicates,
            survivors=survivors.tolist(),
        )


def search_distinct(
    searcher: Searcher, queries: np.ndarray, k: int, keys: np.ndarray | None, chunk_length: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """The k nearest chunks [n, K] with different tokens: the nearest of equals; and how many nearer ones were dropped.

    Rows with fewer than k of them fetch twice as many, until there are no more or `DISTINCT_AMONG` were looked at (k,
    where that is more). What is not among those is not found, here and through a service alike.
    """
    ids = np.full((len(queries), k), -1, np.int64)
    distances = np.full((len(queries), k), np.inf, np.float32)
    most = max(k, DISTINCT_AMONG)
    pending, fetch, dropped = np.arange(len(queries)), min(2 * k, most), 0
    while len(pending):
        hits, squares = searcher.search(queries[pending], fetch, None if keys is None else keys[pending])
        keep = (hits >= 0) & ~_repeated(searcher, hits, chunk_length)
        settled = (keep.sum(1) >= k) | (hits[:, -1] < 0) | (fetch == most)
        rows, order = pending[settled], np.argsort(~keep[settled], axis=1, kind="stable")[:, :k]
        kept = np.take_along_axis(keep[settled], order, 1)
        ids[rows] = np.where(kept, np.take_along_axis(hits[settled], order, 1), -1)
        distances[rows] = np.where(kept, np.take_along_axis(squares[settled], order, 1), np.inf)
        before = np.cumsum(keep[settled], axis=1) < k
        dropped += int((~keep[settled] & (hits[settled] >= 0) & before).sum())
        pending = pending[~settled]
        fetch = min(2 * fetch, most)
    return ids, distances, dropped


def _repeated(searcher: Searcher, hits: np.ndarray, chunk_length: int) -> np.ndarray:
    """bool [n, K]: whether a nearer place of the row has a chunk of the same tokens."""
    again = np.zeros(hits.shape, bool)
    rows = max(1, _COMPARED_AT_ONCE // hits.shape[1])
    for first in range(0, len(hits), rows):
        part = slice(first, first + rows)
        tokens = np.ascontiguousarray(searcher.neighbour_tokens(hits[part])[..., :chunk_length], "<i4")
        keys = tokens.view(np.dtype((np.void, chunk_length * 4)))[..., 0]
        numbers = np.unique(keys, return_inverse=True)[1].reshape(keys.shape)
        order = np.argsort(numbers, axis=1, kind="stable")
        ordered = np.take_along_axis(numbers, order, 1)
        np.put_along_axis(again[part], order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    return again


@functools.lru_cache(maxsize=1)
def _searcher(described: str) -> Any:
    """What is searched, opened once in a process; `described` in JSON."""
    asked = json.loads(described)
    if asked["bm25"] is not None:
        from retro_jax.retrieval.bm25 import Bm25, Bm25Settings

        return Bm25.open(asked["database"], Bm25Settings(**asked["bm25"]))
    if asked["service"] is None:
        from retro_jax.retrieval.database import Database

        return Database.open(asked["database"])
    return Service(**asked["service"]).connect()


def _searched(asked: dict[str, Any]) -> _Searched:
    """What it is, from its manifests alone: whoever searches loads it and compares the checksums."""
    if asked["service"] is not None:
        served = _searcher(json.dumps(asked)).description
        return _Searched(served.database, served.corpus, served.embedder, served.tokenizer, served.chunk_length)
    if asked["bm25"] is not None:
        from retro_jax.retrieval.bm25 import Bm25
        from retro_jax.retrieval.segments import DatabaseCorpus

        searcher, embedder = Bm25(DatabaseCorpus(asked["database"])), None
    else:
        from retro_jax.retrieval.database import Database

        searcher = Database.open(asked["database"], index_shards=(), verify=False)
        embedder = searcher.embedder_fingerprint
    corpus = searcher.corpus
    return _Searched(
        searcher.fingerprint, corpus.fingerprint, embedder, corpus.tokenizer_fingerprint, corpus.chunk_length
    )


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
            verify_checksums(directory, self.manifest.shards)
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

    def verify(self, chunks: range | None = None) -> None:
        """Compares the checksums of the shards with the neighbours of these chunks; None: of all.

        Raises:
          UserError: naming the first shard that differs.
        """
        chosen = slice(None) if chunks is None else files_of(self._offsets, chunks)
        verify_checksums(self.directory, self.manifest.shards[chosen])

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
