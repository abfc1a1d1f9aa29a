"""Tasks that ask for the end of a text: LAMBADA's last word, a summary behind its article, a planted fact.

Documents carry their "completion", the end of their text that is asked for. Only its tokens are scored: its bits per
byte (the protocol of the Curation Corpus, paper section 4.1) and whether greedy generation finds it, that is whether
each of its tokens is the most probable one behind those before it.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from retro_jax.data.corpus import Corpus
from retro_jax.errors import UserError
from retro_jax.evaluation.forward import Forward
from retro_jax.evaluation.losses import TokenLosses
from retro_jax.evaluation.passes import document_keys
from retro_jax.progress import Progress
from retro_jax.retrieval.database import Database


@dataclasses.dataclass(frozen=True)
class CompletionScores:
    """What each document's completion costs, arrays [n] in order of documents.

    Attributes:
      nats: float64, of the completion's tokens together.
      tokens, bytes: int64, of the completion.
      correct: bool, greedy generation gives it; None where the most probable tokens are unknown.
      keys: int64, of the documents' groups.
    """

    nats: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray
    correct: np.ndarray | None
    keys: np.ndarray

    def as_json(self) -> dict[str, float | None]:
        """Bits per byte of the completions, accuracy, and how many there are."""
        return {
            "bits_per_byte": float(self.nats.sum() / np.log(2) / self.bytes.sum()),
            "nats_per_token": float(self.nats.sum() / self.tokens.sum()),
            "accuracy": None if self.correct is None else float(self.correct.mean()),
            "completions": len(self.nats),
        }


def completion_tokens(corpus: Corpus, completions: Mapping[str, str]) -> np.ndarray:
    """Which tokens of a corpus belong to completions, bool [chunks, M].

    A token belongs when any of its bytes but leading white space lies in the completion: the space before a word is
    commonly part of the word's token.

    Args:
      corpus: of texts that end with their completion.
      completions: document id to the end of its text; white space around it does not matter. Documents without one
        have no such token.

    Raises:
      UserError: a document's text does not end with its completion, or no document has one.
    """
    marked = np.zeros((corpus.num_chunks, corpus.chunk_length), bool)
    for document in range(corpus.num_documents):
        record = corpus.document(document)
        wanted = completions.get(record.id, "").strip().encode()
        if not wanted:
            continue
        rows = slice(record.first_chunk, record.first_chunk + record.chunks)
        tokens = corpus.tokens(np.arange(rows.start, rows.stop))
        places = np.flatnonzero(corpus.tokenizer.is_text(tokens))
        text = tokens.reshape(-1)[places]
        count, tail = 0, b""
        while len(tail) < len(wanted) and count < len(text):
            count += 1
            tail = corpus.tokenizer.decode_bytes(text[len(text) - count :]).strip()
        if not tail.endswith(wanted):
            raise UserError(
                f"{corpus.directory}: document {record.id!r} does not end with its completion "
                f"{wanted.decode()[:40]!r}; build the corpus from the same text"
            )
        marked[rows].reshape(-1)[places[len(places) - count :]] = True
    if not marked.any():
        raise UserError(f"{corpus.directory}: no document has a completion")
    return marked


def completion_scores(losses: TokenLosses, marked: np.ndarray) -> CompletionScores:
    """Scores completions as they stand in their documents: chunks begin with the document ("natural" alignment).

    Args:
      losses: of the corpus.
      marked: bool [chunks, M] of `completion_tokens`.
    """
    corpus = losses.corpus
    chunks, places = np.nonzero(marked)
    documents, row = np.unique(corpus.document_index(chunks), return_inverse=True)
    tokens = corpus.tokens(chunks)[np.arange(len(chunks)), places]
    correct = None
    if losses.best is not None:
        correct = np.bincount(row, losses.best[chunks, places] != tokens, len(documents)) == 0
    return CompletionScores(
        nats=np.bincount(row, losses.nats[chunks, places].astype(np.float64), len(documents)),
        tokens=np.bincount(row, minlength=len(documents)),
        bytes=np.bincount(row, corpus.tokenizer.token_bytes[tokens], len(documents)).astype(np.int64),
        correct=correct,
        keys=document_keys(corpus)[documents],
    )


def padded_losses(
    forward: Forward, corpus: Corpus, marked: np.ndarray, *, window: int, database: Database | None = None, k: int = 2
) -> TokenLosses:
    """Losses of completions when their contexts are padded on the left to end at a chunk boundary (spec section 12.1).

    So the last chunk of the context, whole, retrieves what the completion's first chunk can use. Contexts longer than
    the window less a chunk lose their beginning.

    Args:
      forward: a model that gives `best` too.
      corpus, marked: as for `completion_scores`.
      window: most tokens of a row.
      database: opened with its embedder; None: RETRO[OFF] or a baseline.
      k: neighbours of each chunk.

    Returns:
      losses of the completions' tokens alone, 0 everywhere else.

    Raises:
      UserError: a completion longer than a chunk.
    """
    M, pad = corpus.chunk_length, corpus.pad_id
    documents = np.unique(corpus.document_index(np.flatnonzero(marked.any(axis=1))))
    rows = [_padded_row(corpus, marked, int(document), window) for document in documents]
    retrieved = None
    if database is not None:
        chunks = [row.tokens[: row.context].reshape(-1, M) for row in rows]
        ends = np.cumsum([0, *(len(own) for own in chunks)])
        retrieved = database.retrieve(np.concatenate(chunks), k).tokens
    nats = np.zeros(marked.shape, np.float32)
    best = np.full(marked.shape, -1, np.int32)
    order = sorted(range(len(rows)), key=lambda row: len(rows[row].tokens))
    with Progress("completions, padded", total=len(rows), unit="texts") as progress:
        for start in range(0, len(rows), forward.batch_size):
            places = order[start : start + forward.batch_size]
            length = max(-(-len(rows[place].tokens) // M) for place in places) * M
            tokens = np.full((len(places), length), pad, np.int32)
            for row, place in enumerate(places):
                tokens[row, : len(rows[place].tokens)] = rows[place].tokens
            labels = np.concatenate([tokens[:, 1:], np.full((len(places), 1), pad, np.int32)], axis=1)

            def neighbours(wanted: Sequence[int], places: Sequence[int] = places, length: int = length) -> np.ndarray:
                found = np.full((len(wanted), length // M, k, retrieved.shape[-1]), pad, np.int32)
                for row, at in enumerate(wanted):
                    own = retrieved[ends[places[at]] : ends[places[at] + 1]]
                    found[row, : len(own)] = own
                return found

            outputs = forward(tokens, labels, None if retrieved is None else neighbours)
            for row, place in enumerate(places):
                one = rows[place]
                asked = slice(one.context - 1, len(one.tokens) - 1)
                nats[one.chunks, one.places] = outputs.nats[row, asked]
                best[one.chunks, one.places] = outputs.best[row, asked]
            progress.update(len(places))
    return TokenLosses(corpus, nats, best)


@dataclasses.dataclass(frozen=True)
class _PaddedRow:
    """A context and its completion.

    Attributes:
      tokens: [n] int32, padding before them.
      context: place of the completion's first token, a multiple of the chunk length.
      chunks, places: [completion's tokens], where these stand in the corpus.
    """

    tokens: np.ndarray
    context: int
    chunks: np.ndarray
    places: np.ndarray


def _padded_row(corpus: Corpus, marked: np.ndarray, document: int, window: int) -> _PaddedRow:
    M = corpus.chunk_length
    first, chunks = corpus.document_range(document)
    tokens = corpus.tokens(np.arange(first, first + chunks)).reshape(-1)
    asked = np.flatnonzero(marked[first : first + chunks].reshape(-1))
    if len(asked) > M:
        raise UserError(f"{corpus.directory}: a completion of {len(asked)} tokens is longer than a chunk of {M}")
    context = tokens[: asked[0]][-(window - M) :]
    padding = np.full(-len(context) % M, corpus.pad_id, np.int32)
    row = np.concatenate([padding, context, tokens[asked]])
    return _PaddedRow(row, len(padding) + len(context), first + asked // M, asked % M)
