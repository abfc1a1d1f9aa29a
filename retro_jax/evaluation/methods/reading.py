"""Neighbours read by a plain language model as text before the text, as REALM and RAG read theirs, without training.

(Guu et al. 2020; Lewis et al. 2020; Ram et al. 2023 for a model that was not trained for it.) A token is scored after
the neighbours of the chunk before its own, those that a RETRO would cross-attend to (paper section 2.4). They cost
context: the row stays as long as the window, and what stands before leaves as much less room for the document itself,
at most half of it. The same tokens are scored as without; tokens without neighbours, those of the first chunk among
them, have the rows of the plain evaluation.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from retro_jax.data.corpus import Corpus
from retro_jax.data.tokenizer import Tokenizer
from retro_jax.errors import UserError
from retro_jax.evaluation.evaluated import Evaluated
from retro_jax.evaluation.forward import Forward
from retro_jax.evaluation.losses import LossCollector, TokenLosses
from retro_jax.evaluation.methods.knn_lm import predicted_text
from retro_jax.evaluation.methods.method import MethodContext
from retro_jax.evaluation.methods.mixture import best_mixture, log_sum, mix
from retro_jax.evaluation.methods.tuned import Evidence, TunedMethod
from retro_jax.evaluation.neighbourhood import Neighbourhood
from retro_jax.evaluation.passes import corpus_windows, document_tokens
from retro_jax.evaluation.windows import Window
from retro_jax.progress import Progress

# Of the neighbours' squared distances; 0 weighs all alike.
_SHARPNESS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


@dataclasses.dataclass(frozen=True)
class Piece:
    """Tokens that are scored with the same text before them.

    Attributes:
      window: of the plain evaluation, whose first token is the earliest that may be read.
      first, stop: positions in the document of the scored tokens, within `window.scored_from` and `scored_to`.
      chunk: id of the chunk whose neighbours are read; -1 for none.
    """

    window: Window
    first: int
    stop: int
    chunk: int


def pieces(corpus: Corpus, *, window: int, stride: int, every: int) -> Iterator[Piece]:
    """All text tokens of a corpus, in order, cut where the neighbours that are read change.

    Args:
      corpus: what is scored.
      window, stride: of the plain evaluation.
      every: chunks that read the same neighbours, those of the chunk before the first of them.
    """
    length = every * corpus.chunk_length
    for one in corpus_windows(corpus, window=window, stride=stride):
        start, _ = corpus.document_range(one.document)
        end = min(one.scored_to, document_tokens(corpus, one.document) - 1)  # the end token is no text
        for block in range(one.scored_from // length, (end - 1) // length + 1):
            first, stop = max(one.scored_from, block * length), min(end, (block + 1) * length)
            yield Piece(one, first, stop, start + block * every - 1 if block else -1)


def reading_row(
    text: np.ndarray, prefix: np.ndarray, piece: Piece, size: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray, slice]:
    """A row of the model: a text to read, then the document up to the scored tokens and as far beyond as fits.

    What lies beyond changes nothing, and makes the row without a prefix that of the plain evaluation.

    Args:
      text: tokens of the whole document, start token first.
      prefix: [P] tokens to read before it, at most `size` / 2.
      piece: what is scored.
      size: tokens of the row.
      pad_id: of what lies behind the text.

    Returns:
      tokens and labels int32 [size], and the places of the scored labels. A start token stays the first token.
    """
    window, room = piece.window, size - len(prefix)
    start = max(window.start, piece.stop - 1 - room)
    stop = min(window.start + window.length, start + room)
    tokens, labels = np.full((2, size), pad_id, np.int32)
    body = np.concatenate([prefix, text[start:stop]])
    if start == 0:
        body = np.concatenate([text[:1], prefix, text[1:stop]])
    tokens[: len(body)] = body
    labels[len(prefix) : len(body)] = text[start + 1 : stop + 1]
    # The label of place i is the token at `start + 1 + i - P` of the document.
    shift = len(prefix) - start - 1
    return tokens, labels, slice(piece.first + shift, piece.stop + shift)


def joined(neighbours: np.ndarray, room: int, tokenizer: Tokenizer) -> np.ndarray:
    """Neighbours [K, R], nearest first, as one text of at most `room` tokens: the nearest last, the farthest cut."""
    texts = [row[tokenizer.is_text(row)] for row in neighbours]
    whole = np.concatenate([*reversed(texts), np.zeros(0, np.int32)])
    return whole[max(0, len(whole) - room) :]


def read(
    forward: Forward, corpus: Corpus, rows: Sequence[tuple[Piece, np.ndarray]], size: int, description: str
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Losses [n] of the scored tokens of pieces with prefixes, in order, and the most probable ones in their places."""
    with Progress(description, total=len(rows), unit="rows") as progress:
        for begin in range(0, len(rows), forward.batch_size):
            batch = []
            for piece, prefix in rows[begin : begin + forward.batch_size]:
                first, chunks = corpus.document_range(piece.window.document)
                text = corpus.tokens(np.arange(first, first + chunks)).reshape(-1)
                batch.append(reading_row(text, prefix, piece, size, corpus.pad_id))
            found = forward(np.stack([row[0] for row in batch]), np.stack([row[1] for row in batch]))
            for row, (_, _, places) in enumerate(batch):
                yield found.nats[row, places], None if found.best is None else found.best[row, places]
            progress.update(len(batch))


class Prepend:
    """The nearest neighbours stand before the text, all of them in one row.

    Attributes:
      name, settings, inputs: of `Method`.
    """

    name = "prepend"
    for_retro = False
    needs_neighbours = True
    needs_tuning = False

    def __init__(self, context: MethodContext) -> None:
        self._context = context
        options = context.options
        self.settings: dict[str, Any] = {"neighbours": options.prepended, "stride_in_chunks": options.prepend_stride}
        self.inputs: dict[str, str] = {}

    def losses(self, evaluated: Evaluated, asked: np.ndarray | None = None) -> TokenLosses:
        """Losses of the tokens of a set; see `Method`.

        Raises:
          UserError: the set has no neighbours, or too few a chunk.
        """
        context, corpus, count = self._context, evaluated.corpus, self._context.options.prepended
        every = list(pieces(corpus, **context.windows, every=context.options.prepend_stride))
        neighbours = _neighbour_texts(evaluated, every, count)
        room, tokenizer = context.window // 2, corpus.tokenizer
        rows = [(piece, joined(texts, room, tokenizer)) for piece, texts in zip(every, neighbours, strict=True)]
        forward = context.plain if asked is None else context.with_best
        collector = LossCollector(corpus, best=asked is not None)
        found = read(forward, corpus, rows, context.window, f"{evaluated.name}: {self.name}")
        for piece, (nats, best) in zip(every, found, strict=True):
            collector.add(piece.window.document, piece.first, nats, best)
        read_tokens = float(np.mean([len(prefix) for _, prefix in rows]))
        return collector.finish({"mean_tokens_prepended": read_tokens, "window": context.window})


class Rag(TunedMethod):
    """Each neighbour stands before the text alone, and what the model predicts after them is mixed.

    p = lambda sum_z w_z p(y | z, context) + (1 - lambda) p_LM,  w_z proportional to exp(-sharpness d_z)

    (RAG-Token, Lewis et al. 2020, section 2.1, with the distance of the retriever in the place of its trained score,
    and REALM's reading of no document at all as the second term.)

    What each reading gives the token that came is known, and no other token: which is the most probable is not told.
    """

    name = "rag"
    needs_neighbours = True

    def __init__(self, context: MethodContext) -> None:
        super().__init__(context)
        options = context.options
        self.settings |= {"neighbours": options.prepended, "stride_in_chunks": options.prepend_stride}

    def gather(self, evaluated: Evaluated) -> Evidence:
        context, corpus, count = self.context, evaluated.corpus, self.context.options.prepended
        documents, _, nats = predicted_text(context, evaluated)
        every = list(pieces(corpus, **context.windows, every=context.options.prepend_stride))
        texts = _neighbour_texts(evaluated, every, count)
        chunks = np.array([piece.chunk for piece in every])
        there = (texts != corpus.pad_id).any(-1)
        distances = np.where(there, evaluated.neighbours.distances(chunks)[:, :count], np.inf)
        rows, owners = [], []
        for number, piece in enumerate(every):
            for place in np.flatnonzero(np.isfinite(distances[number])).tolist():
                near = joined(texts[number, place : place + 1], context.window // 2, corpus.tokenizer)
                rows.append((piece, near))
                owners.append((number, place))
        firsts = np.cumsum([0, *(piece.stop - piece.first for piece in every)])
        after = np.full((firsts[-1], count), np.inf, np.float32)
        found = read(context.plain, corpus, rows, context.window, f"{evaluated.name}: {self.name}")
        for (number, place), (costs, _) in zip(owners, found, strict=True):
            after[firsts[number] : firsts[number + 1], place] = costs
        return Evidence(documents, nats, {"after": after, "distances": np.repeat(distances, np.diff(firsts), axis=0)})

    def fit(self, evidence: Evidence) -> dict[str, Any]:
        candidates = ((sharpness, _mixed(evidence, sharpness)) for sharpness in _SHARPNESS)
        sharpness, weight = best_mixture(evidence.nats, candidates)
        return {"weight": weight, "sharpness": sharpness}

    def fixed(self, evidence: Evidence) -> dict[str, Any]:
        return {"weight": 0.5, "sharpness": 0.0}

    def apply(self, parameters: dict[str, Any], evidence: Evidence) -> np.ndarray:
        return mix(evidence.nats, _mixed(evidence, parameters["sharpness"]), parameters["weight"])


def _mixed(evidence: Evidence, sharpness: float) -> np.ndarray:
    """ln of the neighbours' mixture [n], NaN where there are none."""
    there = np.isfinite(evidence["distances"])
    logits = np.where(there, -sharpness * np.where(there, evidence["distances"], 0.0), -np.inf)
    with np.errstate(invalid="ignore"):
        return log_sum(logits - evidence["after"]) - log_sum(logits)


def _neighbour_texts(evaluated: Evaluated, every: Sequence[Piece], count: int) -> np.ndarray:
    """Tokens [pieces, K, R] of what each piece reads, PAD for none."""
    if evaluated.neighbours is None or evaluated.database is None:
        raise UserError(f"{evaluated.name}: reading neighbours needs those of its chunks; find them first")
    neighbourhood = Neighbourhood(evaluated.neighbours, evaluated.database, count)
    neighbourhood.check(evaluated.corpus)
    chunks = np.array([piece.chunk for piece in every])
    return evaluated.database.neighbour_tokens(np.where(chunks[:, None] >= 0, neighbourhood.ids(chunks), -1))
