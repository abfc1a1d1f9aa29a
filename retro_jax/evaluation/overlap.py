"""How much of a chunk stands in its neighbours: the longest common token substrings (paper section 2.6)."""

from collections.abc import Iterator

import numpy as np

from retro_jax.data.corpus import Corpus
from retro_jax.evaluation.neighbourhood import Neighbourhood
from retro_jax.progress import Progress

_CHUNKS_AT_ONCE = 512


def common_runs(chunks: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
    """For each token of a chunk the longest run of tokens that ends with it and stands in one of the neighbours.

    A run is contiguous, lies inside the chunk and inside one neighbour, and is of text. The table of all pairs of
    places is walked along its diagonals at once for many chunks: M steps on [n, K, R] arrays.

    Args:
      chunks: [n, M] int32, -1 for what is no text: padding, start and end tokens.
      neighbours: [n, K, R] int32, those of each chunk; -1 as well.

    Returns:
      [n, M] int32.
    """
    chunks = np.where(chunks >= 0, chunks, -2)  # equal to nothing in the neighbours
    run = np.zeros((*neighbours.shape[:2], neighbours.shape[2] + 1), np.int16)  # run[..., r + 1] ends at place r
    longest = np.zeros(chunks.shape, np.int32)
    for place in range(chunks.shape[1]):
        run[..., 1:] = np.where(neighbours == chunks[:, place, None, None], run[..., :-1] + 1, 0)
        longest[:, place] = run.max(axis=(1, 2), initial=0)
    return longest


def runs_in_own_neighbours(corpus: Corpus, neighbourhood: Neighbourhood) -> np.ndarray:
    """`common_runs` of every chunk of a corpus with its own neighbours, int32 [chunks, M] (paper section 2.6)."""
    return _runs(corpus, neighbourhood, "overlap with neighbours", lambda chunks: chunks)


def runs_in_read_neighbours(corpus: Corpus, neighbourhood: Neighbourhood) -> np.ndarray:
    """`common_runs` of every chunk with what a model reads when it predicts it, int32 [chunks, M].

    These are the neighbours of the chunk before it in the document; the first chunk of a document has none.
    """

    def before(chunks: np.ndarray) -> np.ndarray:
        previous = np.maximum(chunks - 1, 0)
        same = corpus.document_index(previous) == corpus.document_index(chunks)
        return np.where(same & (chunks > 0), previous, -1)

    return _runs(corpus, neighbourhood, "overlap with what was read", before)


def _runs(corpus: Corpus, neighbourhood: Neighbourhood, description: str, source) -> np.ndarray:
    neighbourhood.check(corpus)
    is_text = corpus.tokenizer.is_text
    runs = np.zeros((corpus.num_chunks, corpus.chunk_length), np.int32)
    with Progress(description, total=corpus.num_chunks, unit="chunks") as progress:
        for chunks in _blocks(corpus.num_chunks):
            of = source(chunks)
            ids = np.where(of[:, None] >= 0, neighbourhood.ids(np.maximum(of, 0)), -1)
            own, near = corpus.tokens(chunks), neighbourhood.database.neighbour_tokens(ids)
            runs[chunks] = common_runs(np.where(is_text(own), own, -1), np.where(is_text(near), near, -1))
            progress.update(len(chunks))
    return runs


def _blocks(count: int) -> Iterator[np.ndarray]:
    for first in range(0, count, _CHUNKS_AT_ONCE):
        yield np.arange(first, min(first + _CHUNKS_AT_ONCE, count))
