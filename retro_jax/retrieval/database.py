"""The retrieval database: a corpus, its index, and for live queries the embedder that made it (paper section 2.3)."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from retro_jax.data.corpus import Corpus
from retro_jax.data.stage import fingerprint
from retro_jax.errors import UserError
from retro_jax.retrieval.embedder import Embedder
from retro_jax.retrieval.index import Index

# Hits held at once while neighbours of other documents are looked for: about 200 MB.
_MAX_HITS = 8_000_000


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """What was retrieved for n chunks; place j is the j-th nearest.

    Attributes:
      ids: [n, K] int64 database chunks, -1 for none.
      distances: [n, K] float32 squared L2, +inf for none.
      tokens: [n, K, R] int32, the chunk and its continuation; PAD for none and where a document ends.
    """

    ids: np.ndarray
    distances: np.ndarray
    tokens: np.ndarray


class Database:
    """A directory with corpus/ and index/ in it, opened by `Database.open`.

    Attributes:
      corpus, index: its parts.
      embedder: for `retrieve`; None when only vectors are searched.
      fingerprint: 16 hex digits of corpus and index; what was retrieved records it.
    """

    def __init__(self, corpus: Corpus, index: Index, embedder: Embedder | None = None) -> None:
        """Joins the parts.

        Raises:
          UserError: the index was made from another corpus, or with another embedder.
        """
        if index.corpus_fingerprint != corpus.fingerprint:
            raise UserError(
                f"the index was made from corpus {index.corpus_fingerprint}, {corpus.directory} is corpus "
                f"{corpus.fingerprint}; embed and index this corpus"
            )
        if embedder is not None:
            require_embedder(embedder.fingerprint, index.embedder_fingerprint, "the given embedder")
        self.corpus = corpus
        self.index = index
        self.embedder = embedder
        self.fingerprint = fingerprint({"corpus": corpus.fingerprint, "index": index.fingerprint})

    @classmethod
    def open(cls, directory: str | os.PathLike, embedder: Embedder | None = None, *, verify: bool = True) -> "Database":
        """Opens a database directory.

        Args:
          directory: has corpus/ and index/ in it.
          embedder: to embed live queries; must be the one the database was made with.
          verify: compare the index's checksums first.

        Raises:
          UserError: a part missing, unfinished or damaged; parts that do not belong together.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise UserError(f"{directory}: no such directory; expected a database with corpus/ and index/ in it")
        return cls(Corpus(directory / "corpus"), Index.load(directory / "index", verify=verify), embedder)

    def search(
        self, vectors: np.ndarray, k: int, exclude_keys: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest chunks of vectors [n, E]: ids int64 [n, K] (-1) and squared distances float32 [n, K] (+inf).

        Args:
          vectors: query vectors; a zero vector is a chunk without word pieces and finds nothing.
          k: neighbours.
          exclude_keys: int64 [n] or [n, X], document keys whose chunks are no neighbours of that row; -1 for none.
        """
        ids, distances, _ = search_excluding(self.index, self.corpus.document_keys, vectors, k, exclude_keys)
        return ids, distances

    def retrieve(self, chunk_tokens: np.ndarray, k: int, exclude_keys: np.ndarray | None = None) -> Neighbours:
        """Embeds chunks [n, M] of tokens of this database's tokenizer and gives their K neighbours by value.

        Raises:
          UserError: the database was opened without an embedder.
        """
        if self.embedder is None:
            raise UserError("live queries need the embedder: open the database with the one it was made with")
        batch = self.embedder.embed_chunks(chunk_tokens, self.corpus.tokenizer)
        ids, distances = self.search(batch.vectors, k, exclude_keys)
        return Neighbours(ids, distances, self.corpus.neighbour_tokens(ids))


def require_embedder(given: str, recorded: str, what: str) -> None:
    """Refuses vectors of another embedder than the one the database records.

    Raises:
      UserError: naming both fingerprints.
    """
    if given != recorded:
        raise UserError(
            f"{what} is {given}, the database was embedded with {recorded}: use the same checkpoint, normalize and "
            "max_length"
        )


def search_excluding(
    index: Index,
    document_keys: Callable[[np.ndarray], np.ndarray],
    vectors: np.ndarray,
    k: int,
    exclude_keys: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray, int]:
    """The k nearest chunks that are not of an excluded document, in rank order (paper section 2.3).

    Fetches more than k and drops; rows with fewer than k survivors fetch twice as many, until k survive or the index
    is exhausted.

    Args:
      index: what is searched.
      document_keys: chunk ids [...] -> int64 keys [...].
      vectors: queries [n, E]; a zero vector finds nothing.
      k: wanted.
      exclude_keys: int64 [n] or [n, X], -1 for none; None: nothing is dropped.

    Returns:
      ids int64 [n, K] (-1), distances float32 [n, K] (+inf), and how many nearer hits were dropped altogether.
    """
    vectors = np.asarray(vectors, np.float32)
    ids = np.full((len(vectors), k), -1, np.int64)
    distances = np.full((len(vectors), k), np.inf, np.float32)
    pending = np.flatnonzero((vectors != 0).any(1))  # NaN != 0: a query that is not finite reaches the index's check
    if exclude_keys is None:
        ids[pending], distances[pending] = index.search(vectors[pending], k)
        return ids, distances, 0
    excluded = np.asarray(exclude_keys, np.int64).reshape(len(vectors), -1)
    dropped = 0
    fetch = min(2 * k + 8, index.size)
    while len(pending):
        if len(pending) * fetch > _MAX_HITS and len(pending) > 1:
            # Rows that still lack neighbours want much of the index: fewer at a time keep memory bounded.
            for part in np.array_split(pending, 2):
                ids[part], distances[part], some = search_excluding(
                    index, document_keys, vectors[part], k, excluded[part]
                )
                dropped += some
            return ids, distances, dropped
        hits, squares = index.search(vectors[pending], max(fetch, k))
        real = hits >= 0
        same = (document_keys(hits)[:, :, None] == excluded[pending][:, None, :]).any(2) & real
        survives = real & ~same
        enough = survives.sum(1) >= k
        settled = enough | (fetch >= index.size)
        rows, order = pending[settled], np.argsort(~survives[settled], axis=1, kind="stable")[:, :k]
        kept = np.take_along_axis(survives[settled], order, 1)
        ids[rows] = np.where(kept, np.take_along_axis(hits[settled], order, 1), -1)
        distances[rows] = np.where(kept, np.take_along_axis(squares[settled], order, 1), np.inf)
        # Only hits before the k-th survivor were in the way.
        before = np.cumsum(survives[settled], axis=1) < k
        dropped += int((same[settled] & before).sum())
        pending = pending[~settled]
        fetch = min(2 * fetch, index.size)
    return ids, distances, dropped
