"""Exact bits-per-byte of whole documents, with retrieval on, off, or with another document's neighbours.

bpb = sum over the scored tokens of -log2 p(token) / UTF-8 bytes of the documents (spec section 6.3). The start token
is never scored and the end token carries no byte and is left out, so numerator and denominator are of the same text.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from retro_jax.data.corpus import Corpus
from retro_jax.data.tokenizer import EOS_ID, PAD_ID
from retro_jax.errors import UserError
from retro_jax.evaluation.windows import Window, check_window, document_windows
from retro_jax.parallel import hosts, rules
from retro_jax.progress import Progress
from retro_jax.training.loss import token_nats
from retro_jax.training.state import ModelPlan

MODES = ("off", "on", "shuffled")


class NeighbourIds(Protocol):
    """Precomputed neighbours of a corpus, as `retro_jax.retrieval.neighbours.NeighbourTable` reads them."""

    k: int
    corpus_fingerprint: str
    database_corpus_fingerprint: str

    def ids(self, chunk_ids: np.ndarray) -> np.ndarray:
        """[n] chunk ids -> [n, k] ids in the database, -1 for none."""


@dataclasses.dataclass(frozen=True)
class Score:
    """What a text costs a model.

    Attributes:
      nats: sum of -ln p over scored tokens.
      tokens: scored tokens.
      bytes: UTF-8 bytes of the text, each counted once.
      documents: documents.
    """

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0
    documents: int = 0

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    def __add__(self, other: "Score") -> "Score":
        return Score(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def as_json(self) -> dict[str, float]:
        """All figures, with their unit in the name."""
        return {
            "bits_per_byte": self.bits_per_byte,
            "nats_per_token": self.nats_per_token,
            "nats": self.nats,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "documents": self.documents,
        }


@dataclasses.dataclass(frozen=True)
class Neighbourhood:
    """Where evaluation gets the neighbours of a chunk.

    Attributes:
      table: precomputed neighbours of the evaluated corpus.
      database: corpus of the database, which has the tokens.
      k: neighbours fed to the model, at most `table.k`.
      shuffled: give every chunk the neighbours of a chunk of another document: the control that shows whether a
        model uses what it retrieves at all.
    """

    table: NeighbourIds
    database: Corpus
    k: int
    shuffled: bool = False


def evaluate(
    plan: ModelPlan,
    params: nnx.State,
    corpus: Corpus,
    mesh: Mesh,
    *,
    window: int,
    stride: int,
    batch_size: int,
    neighbourhood: Neighbourhood | None = None,
    group_by: Callable[[int], str] = lambda document: "all",
    vocab_block: int = 16_384,
    description: str = "evaluating",
) -> dict[str, Score]:
    """Scores every byte of every document of a corpus once.

    Several processes call this alike: each reads the neighbours of its rows of a batch, and all get the same scores.

    Args:
      plan, params: the model.
      corpus: what is scored.
      mesh: the devices; rows of a batch are split over them.
      window, stride: in tokens, multiples of the chunk length; 2048 and 1024 in the paper.
      batch_size: windows at a time; does not change the result.
      neighbourhood: where neighbours come from; None evaluates RETRO[OFF] or a baseline.
      group_by: document index -> name of the group it is added to (its source, for example).
      vocab_block: as in training.
      description: for the progress bar.

    Returns:
      Group to score.

    Raises:
      UserError: a window off the chunk grid, more neighbours than are stored, one document only when shuffled.
      AssertionError: the bytes scored are not the bytes of the corpus (a defect of ours, never to be hidden).
    """
    check_window(window, stride, corpus.chunk_length)
    if neighbourhood is not None:
        _check_neighbourhood(neighbourhood, corpus)
    reader = _WindowReader(corpus, neighbourhood, window)
    windows = [
        window_
        for document in range(corpus.num_documents)
        for window_ in document_windows(document, reader.document_tokens(document), window=window, stride=stride)
    ]
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    batch_size = -(-min(batch_size, len(windows)) // rows) * rows
    sharding = rules.batch_sharding(mesh)
    own_rows = hosts.batch_rows(sharding, batch_size)
    nats_of = _make_scorer(plan, mesh, vocab_block)
    token_bytes = corpus.tokenizer.token_bytes

    scores: dict[str, Score] = collections.defaultdict(Score)
    for document in range(corpus.num_documents):
        scores[group_by(document)] += Score(documents=1)
    with Progress(description, total=len(windows), unit="windows") as progress:
        for batch in _batches(windows, batch_size):
            text = reader.text(batch, batch_size)
            own = {name: array[list(own_rows)] for name, array in text.items()}
            if neighbourhood is not None:
                own_windows = [batch[row] for row in own_rows if row < len(batch)]
                own["neighbours"] = reader.neighbours(own_windows, len(own_rows))
            arrays = hosts.to_global(own, own_rows, batch_size, sharding)
            labels = text["labels"]
            nats = np.asarray(nats_of(params, arrays), np.float64)
            for row, window_ in enumerate(batch):
                first = window_.scored_from - 1 - window_.start
                scored = slice(first, first + window_.scored_to - window_.scored_from)
                counted = labels[row, scored] != EOS_ID
                scores[group_by(window_.document)] += Score(
                    nats=float(nats[row, scored][counted].sum()),
                    tokens=int(counted.sum()),
                    bytes=int(token_bytes[labels[row, scored]].sum()),
                )
            progress.update(len(batch))
    total = sum(scores.values(), Score())
    assert total.bytes == corpus.num_bytes, f"scored {total.bytes} bytes of {corpus.num_bytes}"
    return dict(scores)


def _check_neighbourhood(neighbourhood: Neighbourhood, corpus: Corpus) -> None:
    table, database = neighbourhood.table, neighbourhood.database
    if neighbourhood.k > table.k:
        raise UserError(f"{neighbourhood.k} neighbours asked for, {table.k} are stored; find more first")
    if table.corpus_fingerprint != corpus.fingerprint:
        raise UserError(f"the neighbours are of another corpus than {corpus.directory}; find this one's")
    if table.database_corpus_fingerprint != database.fingerprint:
        raise UserError(f"the neighbours were found in another database than {database.directory}; find them again")


def _batches(windows: Sequence[Window], size: int) -> Iterator[Sequence[Window]]:
    for first in range(0, len(windows), size):
        yield windows[first : first + size]


def _make_scorer(plan: ModelPlan, mesh: Mesh, vocab_block: int) -> Callable[[nnx.State, dict[str, Any]], jax.Array]:
    def nats(params: nnx.State, arrays: dict[str, jax.Array]) -> jax.Array:
        with rules.use(mesh):
            model = plan.merge(params)
            hidden = model.hidden(arrays["tokens"], arrays.get("neighbours"))
            return token_nats(hidden, model.head_kernel(), arrays["labels"], block=vocab_block)

    # Every process counts every row, in the same order: the sums are the same on any number of processes.
    return jax.jit(nats, in_shardings=(None, rules.batch_sharding(mesh)), out_shardings=rules.replicated(mesh))


class _WindowReader:
    """Cuts windows out of a corpus, with the neighbours of their chunks."""

    def __init__(self, corpus: Corpus, neighbourhood: Neighbourhood | None, window: int) -> None:
        self._corpus = corpus
        self._neighbourhood = neighbourhood
        self._window = window
        self._donors = self._other_documents() if neighbourhood is not None and neighbourhood.shuffled else None

    def document_tokens(self, document: int) -> int:
        """Tokens of a document, start and end token included."""
        first, chunks = self._corpus.document_range(document)
        return int(self._corpus.lengths(np.arange(first, first + chunks)).sum())

    def text(self, windows: Sequence[Window], batch_size: int) -> dict[str, np.ndarray]:
        """tokens, labels [B, W] int32; PAD beyond a window's end and in rows without a window."""
        tokens = np.full((batch_size, self._window), PAD_ID, np.int32)
        labels = np.full((batch_size, self._window), PAD_ID, np.int32)
        for row, window in enumerate(windows):
            text = self._corpus.tokens(self._chunk_ids(window)).reshape(-1)
            tokens[row, : window.length] = text[: window.length]
            labels[row, : window.length] = text[1 : window.length + 1]
        return {"tokens": tokens, "labels": labels}

    def neighbours(self, windows: Sequence[Window], batch_size: int) -> np.ndarray:
        """Neighbours [B, W/M, K, R] int32 of the complete chunks; PAD elsewhere."""
        M = self._corpus.chunk_length
        ids = np.full((batch_size, self._window // M, self._neighbourhood.k), -1, np.int64)
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
        return self._neighbourhood.table.ids(chunk_ids)[:, : self._neighbourhood.k]

    def _other_documents(self) -> np.ndarray:
        """For every document another one: a fixed random cycle through all of them."""
        count = self._corpus.num_documents
        if count < 2:
            raise UserError("shuffled neighbours need at least two documents to evaluate")
        order = np.random.default_rng(0).permutation(count)
        donors = np.empty(count, np.int64)
        donors[order] = np.roll(order, 1)
        return donors
