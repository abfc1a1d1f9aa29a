"""Where evaluation gets the neighbours of a corpus's chunks: precomputed, another document's, of a smaller database."""

import dataclasses
from typing import Protocol

import numpy as np

from retro_jax.data.corpus import Corpus
from retro_jax.data.sequences import NeighbourText
from retro_jax.errors import UserError


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
      shuffled: give every chunk the neighbours of a chunk of another document: the control that shows whether a
        model uses what it retrieves at all.
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
        """Raises UserError unless table, database and corpus belong together and have what is asked for."""
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

    def ids(self, chunk_ids: np.ndarray) -> np.ndarray:
        """[n, k] int64 ids in the database of the neighbours of chunks [n], -1 for none."""
        found = self.table.ids(chunk_ids)
        if self.share < 1:
            keys = self.database.document_keys(found)
            found = np.where(_kept(keys, self.share), found, -1)
            order = np.argsort(found < 0, axis=-1, kind="stable")
            found = np.take_along_axis(found, order, axis=-1)
        return found[:, : self.k]


def other_documents(count: int) -> np.ndarray:
    """For each of `count` documents the index of another one: a fixed random cycle through all of them.

    Raises:
      UserError: there is only one.
    """
    if count < 2:
        raise UserError("shuffled neighbours need at least two documents to evaluate")
    order = np.random.default_rng(0).permutation(count)
    others = np.empty(count, np.int64)
    others[order] = np.roll(order, 1)
    return others


def _kept(keys: np.ndarray, share: float) -> np.ndarray:
    """bool [...]: whether documents of these keys belong to the share; keys are spread again, by Fibonacci hashing."""
    spread = keys.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (spread >> np.uint64(32)).astype(np.float64) < share * 2.0**32
