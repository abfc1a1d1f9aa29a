"""Where evaluation gets the neighbours of a corpus's chunks: precomputed, another document's, of a smaller database."""

import dataclasses
from typing import Protocol

import numpy as np

from retro_jax.data.corpus import Corpus
from retro_jax.data.sequences import NeighbourText
from retro_jax.errors import UserError
from retro_jax.retrieval.segments import DatabaseCorpus

_CHUNKS_AT_ONCE = 65_536


class NeighbourIds(Protocol):
    """Precomputed neighbours of a corpus, as `retro_jax.retrieval.neighbours.NeighbourTable` reads them."""

    k: int
    fingerprint: str
    corpus_fingerprint: str
    database_corpus_fingerprint: str

    def ids(self, chunk_ids: np.ndarray) -> np.ndarray:
        """[n] chunk ids -> [n, k] ids in the database, nearest first, -1 for none."""


@dataclasses.dataclass(frozen=True)
class Neighbourhood:
    """Neighbours of the chunks of one corpus.

    Attributes:
      table: precomputed neighbours of the evaluated corpus.
      database: corpus of the database, which has the tokens.
      k: neighbours fed to the model, at most `table.k`.
      shuffled: give every chunk the neighbours of a chunk of another document, of another group: the control that
        shows whether a model uses what it retrieves at all.
      share: of the database's documents that may be retrieved, in (0, 1]; which ones is a function of their keys alone,
        and those of a smaller share are among those of a larger one. Chunks whose table holds fewer than k of them get
        those that there are: `table.k` must be several times `k / share`.
    """

    table: NeighbourIds
    database: NeighbourText
    k: int
    shuffled: bool = False
    share: float = 1.0

    def check(self, corpus: Corpus) -> None:
        """Raises UserError unless table, database and corpus belong together and have what is asked for.

        Neighbours that have been removed from the database since are refused: nobody would find them now.
        """
        if not 1 <= self.k <= self.table.k:
            raise UserError(f"{self.k} neighbours asked for, {self.table.k} are stored; find more first")
        if not 0 < self.share <= 1:
            raise UserError(f"a share of the database lies in (0, 1], not {self.share}")
        if self.table.corpus_fingerprint != corpus.fingerprint:
            raise UserError(f"the neighbours are of another corpus than {corpus.directory}; find this one's")
        if self.table.database_corpus_fingerprint != self.database.fingerprint:
            raise UserError(
                f"the neighbours were found in another database than {self.database.directory}; find them again"
            )
        if isinstance(self.database, DatabaseCorpus) and len(self.database.segments.removed):
            for first in range(0, corpus.num_chunks, _CHUNKS_AT_ONCE):
                chunks = np.arange(first, min(first + _CHUNKS_AT_ONCE, corpus.num_chunks))
                if self.database.removed(self.table.ids(chunks)).any():
                    raise UserError(
                        f"some neighbours have been removed from {self.database.directory} since they were found; find "
                        "them again"
                    )

    def ids(self, chunk_ids: np.ndarray) -> np.ndarray:
        """[n, k] int64 ids in the database of the neighbours of chunks [n], -1 for none."""
        found = self.table.ids(chunk_ids)
        if self.share < 1:
            keys = self.database.document_keys(found)
            found = np.where(_kept(keys, self.share), found, -1)
            order = np.argsort(found < 0, axis=-1, kind="stable")
            found = np.take_along_axis(found, order, axis=-1)
        return found[:, : self.k]


def other_documents(keys: np.ndarray) -> np.ndarray:
    """For each document the index of one of another group, at random but always the same.

    No two documents have the same one, unless a single group has more than half of them.

    Args:
      keys: [documents], equal for documents of one group.

    Raises:
      UserError: there is only one group.
    """
    count = len(keys)
    order = np.random.default_rng(0).permutation(count)
    _, first, group, sizes = np.unique(keys[order], return_index=True, return_inverse=True, return_counts=True)
    if len(sizes) < 2:
        raise UserError("shuffled neighbours need documents of at least two groups to evaluate")
    # Groups stand together, a largest one in front, and everyone looks back by its size: out of any group.
    largest = np.lexsort((first, -sizes))[0]
    order = order[np.argsort(np.where(group == largest, -1, first[group]), kind="stable")]
    at, size = np.arange(count), sizes[largest]
    others = np.empty(count, np.int64)
    others[order] = order[np.where(at < size, count - 1 - at % (count - size), at - size)]
    return others


def _kept(keys: np.ndarray, share: float) -> np.ndarray:
    """bool [...]: whether documents of these keys belong to the share; keys are spread again, by Fibonacci hashing."""
    spread = keys.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (spread >> np.uint64(32)).astype(np.float64) < share * 2.0**32
