"""A model's pass over the whole documents of a corpus, window by window, each token scored once."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from retro_jax.data.corpus import Corpus
from retro_jax.evaluation.forward import Forward
from retro_jax.evaluation.neighbourhood import Neighbourhood, other_documents
from retro_jax.evaluation.windows import Window, check_window, document_windows
from retro_jax.progress import Progress

_BATCHES_TOGETHER = 32


@dataclasses.dataclass(frozen=True)
class ScoredSpan:
    """Consecutive tokens of a document that one window scored, the end token of the document among them.

    Attributes:
      document: index in the corpus.
      first: position in the document of the first of them; the start token is at 0 and is never scored.
      labels: [n] int32, the tokens.
      nats: [n] float32, -ln p of each given those before it; float64 of a model that computes in it.
      hidden: [n, D] float32, what the output head read to predict each; None unless the `Forward` gives it.
      best: [n] int32, the most probable token in its place; None unless the `Forward` gives it.
    """

    document: int
    first: int
    labels: np.ndarray
    nats: np.ndarray
    hidden: np.ndarray | None
    best: np.ndarray | None


def document_tokens(corpus: Corpus, document: int) -> int:
    """Tokens of a document, start and end token included."""
    first, chunks = corpus.document_range(document)
    return int(corpus.lengths(np.arange(first, first + chunks)).sum())


def document_keys(corpus: Corpus) -> np.ndarray:
    """int64 [documents]: equal for documents of one group."""
    return corpus.document_keys(np.concatenate([first for first, _ in corpus.document_ranges()]))


def corpus_windows(corpus: Corpus, *, window: int, stride: int, documents: Sequence[int] | None = None) -> list[Window]:
    """The windows of all documents of a corpus, or of some, in order; see `document_windows`.

    Raises:
      UserError: a window off the chunk grid.
    """
    check_window(window, stride, corpus.chunk_length)
    return [
        one
        for document in (range(corpus.num_documents) if documents is None else documents)
        for one in document_windows(document, document_tokens(corpus, document), window=window, stride=stride)
    ]


def scored_spans(
    forward: Forward,
    corpus: Corpus,
    *,
    window: int,
    stride: int,
    neighbourhood: Neighbourhood | None = None,
    documents: Sequence[int] | None = None,
    description: str = "evaluating",
) -> Iterator[ScoredSpan]:
    """Scores every token of every document once; spans come in the order of documents and positions.

    Args:
      forward: the model; its batch size does not change what comes out.
      corpus: what is scored.
      window, stride: in tokens, multiples of the chunk length; 2048 and 1024 in the paper (section 4.1).
      neighbourhood: where neighbours come from; None evaluates RETRO[OFF] or a baseline.
      documents: only these; None: all.
      description: for the progress bar.

    Raises:
      UserError: a window off the chunk grid, neighbours that do not belong to the corpus, documents of one group only
        when shuffled.
    """
    if neighbourhood is not None:
        neighbourhood.check(corpus)
    windows = corpus_windows(corpus, window=window, stride=stride, documents=documents)
    reader = _WindowReader(corpus, neighbourhood, window)
    together = _BATCHES_TOGETHER * forward.batch_size
    with Progress(description, total=len(windows), unit="windows") as progress:
        for first in range(0, len(windows), together):
            block = windows[first : first + together]
            # Windows of like length share a batch, so that short documents are not computed in rows of padding.
            order = sorted(range(len(block)), key=lambda place: block[place].length)
            spans: dict[int, ScoredSpan] = {}
            for start in range(0, len(order), forward.batch_size):
                places = order[start : start + forward.batch_size]
                batch = [block[place] for place in places]
                spans.update(zip(places, _score(forward, reader, batch), strict=True))
                progress.update(len(batch))
            yield from (spans[place] for place in range(len(block)))


def _score(forward: Forward, reader: "_WindowReader", batch: Sequence[Window]) -> Iterator[ScoredSpan]:
    length = reader.row_length(batch[-1].length)
    tokens, labels = reader.text(batch, length)
    found = forward(tokens, labels, reader.neighbours_of(batch, length))
    for row, window in enumerate(batch):
        # The label at a window's place i is the token at `start + i + 1` of the document.
        at = (row, slice(window.scored_from - 1 - window.start, window.scored_to - 1 - window.start))
        yield ScoredSpan(
            window.document,
            window.scored_from,
            labels[at],
            found.nats[at],
            None if found.hidden is None else found.hidden[at],
            None if found.best is None else found.best[at],
        )


class _WindowReader:
    """Cuts windows out of a corpus, with the neighbours of their chunks."""

    def __init__(self, corpus: Corpus, neighbourhood: Neighbourhood | None, window: int) -> None:
        self._corpus = corpus
        self._neighbourhood = neighbourhood
        self._window = window
        shuffled = neighbourhood is not None and neighbourhood.shuffled
        self._donors = other_documents(document_keys(corpus)) if shuffled else None

    def row_length(self, tokens: int) -> int:
        """Length of the rows for windows of at most so many tokens: the window or a 4th, 16th, ... of it, whole chunks.

        Each length is another program to compile, so there are few.
        """
        chunk, length = self._corpus.chunk_length, self._window
        while (shorter := -(-length // (4 * chunk)) * chunk) >= tokens and shorter < length:
            length = shorter
        return length

    def text(self, windows: Sequence[Window], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and labels [n, length] int32; PAD beyond a window's end."""
        tokens = np.full((len(windows), length), self._corpus.pad_id, np.int32)
        labels = np.full((len(windows), length), self._corpus.pad_id, np.int32)
        for row, window in enumerate(windows):
            text = self._corpus.tokens(self._chunk_ids(window)).reshape(-1)
            tokens[row, : window.length] = text[: window.length]
            labels[row, : window.length] = text[1 : window.length + 1]
        return tokens, labels

    def neighbours_of(self, windows: Sequence[Window], length: int) -> Callable[[Sequence[int]], np.ndarray] | None:
        """What `Forward` asks for the neighbours of some of these windows; None without retrieval."""
        if self._neighbourhood is None:
            return None
        return lambda rows: self._neighbours([windows[row] for row in rows], length)

    def _neighbours(self, windows: Sequence[Window], length: int) -> np.ndarray:
        """Neighbours [n, length/M, K, R] int32 of the complete chunks; PAD elsewhere."""
        M = self._corpus.chunk_length
        ids = np.full((len(windows), length // M, self._neighbourhood.k), -1, np.int64)
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
