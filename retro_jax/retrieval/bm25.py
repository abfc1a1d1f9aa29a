"""BM25 over the chunks of a database: retrieval by shared tokens instead of by vectors, and scores to re-rank with.

    score(q, c) = sum over the tokens t of q, repeated ones again, of
                  idf(t) tf(t, c) / (tf(t, c) + k1 (1 - b + b |c| / mean |c|))
    idf(t) = ln(1 + (N - df(t) + 1/2) / (df(t) + 1/2))

(Robertson and Zaragoza 2009, section 3; the idf that is never negative and the missing factor k1 + 1, which changes no
order, are Lucene's.) Terms are the tokens of the corpus itself, so every language and every kind of text has some, and
what a score counts is what a model can copy. Doostmohammadi et al. 2023 (arXiv 2305.16243) is why it is here: RETRO
gains more from such neighbours than from those of sentence vectors.

The weight of every term in every chunk is computed once, into a sparse matrix: 8 bytes for each distinct token of a
chunk, twice when it is searched, so at most 1 kB for a chunk of 64. It is not stored: 300,000 chunks take seconds.
"""

import dataclasses
import functools
import os
from typing import Any

import numpy as np

from retro_jax.data.stage import fingerprint
from retro_jax.data.tokenizer import Tokenizer
from retro_jax.errors import UserError
from retro_jax.progress import Progress
from retro_jax.retrieval.segments import DatabaseCorpus

_CHUNKS_AT_ONCE = 65_536
_SCORES_AT_ONCE = 20_000_000  # entries of the product of some queries, about 240 MB


@dataclasses.dataclass(frozen=True)
class Bm25Settings:
    """The two constants of BM25.

    Attributes:
      k1: how soon repetition of a term in a chunk stops to count; 0 counts presence alone.
      b: how much a chunk's length is discounted, 0 to 1.
    """

    k1: float = 1.2
    b: float = 0.75

    def __post_init__(self) -> None:
        if self.k1 < 0:
            raise UserError(f"BM25's k1 must not be negative, is {self.k1}")
        if not 0 <= self.b <= 1:
            raise UserError(f"BM25's b lies between 0 and 1, is {self.b}")


class Bm25:
    """The chunks of a database, scored by BM25; removed chunks are found by nothing and count for nothing.

    It answers as a `retro_jax.retrieval.neighbours.Searcher` does, with queries that are tokens instead of vectors.

    Attributes:
      corpus: `DatabaseCorpus` whose chunks are scored.
      settings: k1 and b.
      fingerprint: 16 hex digits of the chunks that can be found.
    """

    def __init__(self, corpus: DatabaseCorpus, settings: Bm25Settings | None = None) -> None:
        """Reads nothing yet: the terms of all chunks are counted at the first search, which needs SciPy.

        Args:
          corpus: of the database.
          settings: None for the defaults.
        """
        self.corpus = corpus
        self.settings = settings or Bm25Settings()
        self.fingerprint = fingerprint({"corpus": corpus.fingerprint, "removed": corpus.segments.removed_sha256})

    @classmethod
    def open(cls, directory: str | os.PathLike, settings: Bm25Settings | None = None) -> "Bm25":
        """Opens a database directory, of which only corpus/ (and additions) is needed, and compares its checksums."""
        return cls(DatabaseCorpus(directory, verify=True), settings)

    def search(
        self, queries: np.ndarray, k: int, exclude_keys: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best chunks of each query, best first, equally good ones by id.

        Args:
          queries: tokens int32 [n, M]; PAD, start and end tokens are no terms.
          k: at least 1.
          exclude_keys: int64 [n], document keys whose chunks are no results of that query; -1 for none.

        Returns:
          ids int64 [n, k] and negated scores float32 [n, k], so that the smaller is the nearer as with distances.
          Chunks that share no term with the query are no results: -1 and +inf.
        """
        ids = np.full((len(queries), k), -1, np.int64)
        distances = np.full((len(queries), k), np.inf, np.float32)
        terms = self._terms(queries)
        for first, stop in _cuts(terms @ np.diff(self._postings.indptr), _SCORES_AT_ONCE):
            scores = terms[first:stop] @ self._postings
            for row in range(first, stop):
                part = slice(*scores.indptr[row - first : row - first + 2])
                chunks, values = scores.indices[part], scores.data[part]
                if exclude_keys is not None:
                    other = self._document_keys[chunks] != exclude_keys[row]
                    chunks, values = chunks[other], values[other]
                chunks, values = _best(chunks, values, k)
                ids[row, : len(chunks)], distances[row, : len(chunks)] = chunks, -values
        return ids, distances

    def scores(self, queries: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Scores float32 [n, C] of chunks [n, C] for queries of tokens [n, M]; 0 for chunk -1."""
        flat = ids.reshape(-1)
        of_query = self._terms(queries)[np.repeat(np.arange(len(ids)), ids.shape[1])]
        found = np.asarray(self._weights[np.maximum(flat, 0)].multiply(of_query).sum(1), np.float32).reshape(-1)
        return np.where(flat >= 0, found, 0).reshape(ids.shape)

    def neighbour_tokens(self, ids: np.ndarray) -> np.ndarray:
        """int32 [..., 2M]: chunks [...] and their continuations."""
        return self.corpus.neighbour_tokens(ids)

    @functools.cached_property
    def _weights(self) -> Any:
        return self._weigh(_term_counts(self.corpus))

    @functools.cached_property
    def _postings(self) -> Any:
        return self._weights.T.tocsr()

    @functools.cached_property
    def _document_keys(self) -> np.ndarray:
        return self.corpus.document_keys(np.arange(self.corpus.num_chunks))

    def _weigh(self, counts: Any) -> Any:
        """Weight of every term in every chunk, sparse [N, V] float32, from the counts."""
        lengths = np.asarray(counts.sum(1), np.float64).reshape(-1)
        chunks = int((lengths > 0).sum())
        df = np.bincount(counts.indices, minlength=counts.shape[1])
        idf = np.log1p((chunks - df + 0.5) / (df + 0.5))
        average = lengths.sum() / max(chunks, 1)
        k1, b = self.settings.k1, self.settings.b
        discount = np.repeat(k1 * (1 - b + b * lengths / max(average, 1)), np.diff(counts.indptr))
        counts.data = (idf[counts.indices] * counts.data / (counts.data + discount)).astype(np.float32)
        return counts

    def _terms(self, queries: np.ndarray) -> Any:
        """How often each term is in each query, sparse [n, V]."""
        return _count(np.asarray(queries), self.corpus.tokenizer)


def _term_counts(corpus: DatabaseCorpus) -> Any:
    """How often each term is in each chunk, sparse [N, V]; nothing in removed ones."""
    sparse = _sparse()
    blocks = []
    with Progress("BM25", total=corpus.num_chunks, unit="chunks") as progress:
        for first in range(0, corpus.num_chunks, _CHUNKS_AT_ONCE):
            chunks = np.arange(first, min(first + _CHUNKS_AT_ONCE, corpus.num_chunks))
            tokens = np.where(corpus.removed(chunks)[:, None], corpus.pad_id, corpus.tokens(chunks))
            blocks.append(_count(tokens, corpus.tokenizer))
            progress.update(len(chunks))
    return sparse.vstack(blocks, format="csr")


def _count(tokens: np.ndarray, tokenizer: Tokenizer) -> Any:
    """Occurrences of each token in each row of [n, M], sparse float32 [n, V]; PAD, start and end tokens left out."""
    rows = np.broadcast_to(np.arange(len(tokens))[:, None], tokens.shape)
    term = tokenizer.is_text(tokens)
    ones = np.ones(int(term.sum()), np.float32)
    return _sparse().coo_array((ones, (rows[term], tokens[term])), (len(tokens), tokenizer.vocab_size)).tocsr()


def _best(chunks: np.ndarray, values: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k chunks of the largest values, largest first, equal ones by id."""
    if len(chunks) > k:
        contenders = values >= np.partition(values, len(values) - k)[len(values) - k]
        chunks, values = chunks[contenders], values[contenders]
    order = np.lexsort((chunks, -values))[:k]
    return chunks[order], values[order]


def _cuts(sizes: np.ndarray, most: int) -> list[tuple[int, int]]:
    """Consecutive ranges of rows whose sizes add up to at most `most`, or that are one row."""
    ranges, first, total = [], 0, 0
    for row, size in enumerate(sizes.tolist()):
        if row > first and total + size > most:
            ranges.append((first, row))
            first, total = row, 0
        total += size
    return [*ranges, (first, len(sizes))] if len(sizes) else ranges


def _sparse() -> Any:
    """SciPy's sparse matrices, imported where they are used: reading neighbours needs none."""
    try:
        from scipy import sparse
    except ImportError:
        raise UserError("BM25 needs SciPy: pip install 'retro_jax[data]'") from None
    return sparse
