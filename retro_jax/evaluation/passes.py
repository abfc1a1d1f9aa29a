"""A model's pass over the whole documents of a corpus, window by window, each token scored once."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from retro_jax.data.corpus import Corpus
from retro_jax.data.tokenizer import PAD_ID
from retro_jax.evaluation.forward import Forward
from retro_jax.evaluation.neighbourhood import Neighbourhood, other_documents
from retro_jax.evaluation.windows import Window, check_window, document_windows
from retro_jax.progress import Progress


@dataclasses.dataclass(frozen=True)
class ScoredSpan:
    """Consecutive tokens of a document that one window scored, the end token of the document among them.

    Attributes:
      document: index in the corpus.
      first: position in the document of the first of them; the start token is at 0 and is never scored.
      labels: [n] int32, the tokens.
      nats: [n] float32, -ln p of each given those before it.
      hidden: [n, D] float32, what the output head read to predict each; None unless the `Forward` gives it.
      best: [n] int32, the most probable token in its place; None unless the `Forward` gives it.
    """

    document: int
    first: int
    labels: np.ndarray
    nats: np.ndarray
    hidden: np.ndarray | None
    best: np.ndarray | None


def scored_spans(
    forward: Forward,
    corpus: Corpus,
    *,
    window: int,
    stride: int,
    neighbourhood: Neighbourhood | None = None,
    description: str = "evaluating",
) -> Iterator[ScoredSpan]:
    """Scores every token of every document once; spans come in the order of documents and positions.

    Args:
      forward: the model; its batch size does not change what comes out.
      corpus: what is scored.
      window, stride: in tokens, multiples of the chunk length; 2048 and 1024 in the paper (section 4.1).
      neighbourhood: where neighbours come from; None evaluates RETRO[OFF] or a baseline.
      description: for the progress bar.

    Raises:
      UserError: a window off the chunk grid, neighbours that do not belong to the corpus, one document only when
        shuffled.
    """
    check_window(window, stride, corpus.chunk_length)
    if neighbourhood is not None:
        neighbourhood.check(corpus)
    reader = _WindowReader(corpus, neighbourhood, window)
    windows = [
        one
        for document in range(corpus.num_documents)
        for one in document_windows(document, reader.document_tokens(document), window=window, stride=stride)
    ]
    with Progress(description, total=len(windows), unit="windows") as progress:
        for first in range(0, len(windows), forward.batch_size):
            batch = windows[first : first + forward.batch_size]
            tokens, labels = reader.text(batch)
            found = forward(tokens, labels, reader.neighbours_of(batch))
            for row, one in enumerate(batch):
                # The label at a window's place i is the token at `start + i + 1` of the document.
                at = (row, slice(one.scored_from - 1 - one.start, one.scored_to - 1 - one.start))
                yield ScoredSpan(
                    one.document,
                    one.scored_from,
                    labels[at],
                    found.nats[at],
                    None if found.hidden is None else found.hidden[at],
                    None if found.best is None else found.best[at],
                )
            progress.update(len(batch))


class _WindowReader:
    """Cuts windows out of a corpus, with the neighbours of their chunks."""

    def __init__(self, corpus: Corpus, neighbourhood: Neighbourhood | None, window: int) -> None:
        self._corpus = corpus
        self._neighbourhood = neighbourhood
        self._window = window
        shuffled = neighbourhood is not None and neighbourhood.shuffled
        self._donors = other_documents(corpus.num_documents) if shuffled else None

    def document_tokens(self, document: int) -> int:
        """Tokens of a document, start and end token included."""
        first, chunks = self._corpus.document_range(document)
        return int(self._corpus.lengths(np.arange(first, first + chunks)).sum())

    def text(self, windows: Sequence[Window]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and labels [n, W] int32; PAD beyond a window's end."""
        tokens = np.full((len(windows), self._window), PAD_ID, np.int32)
        labels = np.full((len(windows), self._window), PAD_ID, np.int32)
        for row, window in enumerate(windows):
            text = self._corpus.tokens(self._chunk_ids(window)).reshape(-1)
            tokens[row, : window.length] = text[: window.length]
            labels[row, : window.length] = text[1 : window.length + 1]
        return tokens, labels

    def neighbours_of(self, windows: Sequence[Window]):
        """What `Forward` asks for the neighbours of some of these windows; None without retrieval."""
        if self._neighbourhood is None:
            return None
        return lambda rows: self._neighbours([windows[row] for row in rows])

    def _neighbours(self, windows: Sequence[Window]) -> np.ndarray:
        """Neighbours [n, W/M, K, R] int32 of the complete chunks; PAD elsewhere."""
        M = self._corpus.chunk_length
        ids = np.full((len(windows), self._window // M, self._neighbourhood.k), -1, np.int64)
        for row, window in enumerate(windows):
            complete = window.length // M
            if complete:
                ids[row, :complete] = self._neighbour_ids(window.document, self._chunk_ids(window)[:complete])
        return self._neighbourhood.database.neighbour_tokens(ids)

    def _chunk_ids(self, window: Window) -> np.ndarray:
        """Chunks of a window, and one more for its last label."""
        M = self._corpus.chunk_length
        first, chunks = self._corpus.document_range(window.document)
        return np.arange(first + window.start // M, first + chunks)[: self._window // M + 1]

    def _neighbour_ids(self, document: int, chunk_ids: np.ndarray) -> np.ndarray:
        if self._donors is not None:
            first, _ = self._corpus.document_range(document)
            donor_first, donor_chunks = self._corpus.document_range(int(self._donors[document]))
            chunk_ids = donor_first + (chunk_ids - first) % donor_chunks
        return self._neighbourhood.ids(chunk_ids)
