"""What every token of a corpus costs under one method, made once and kept; every figure is a function of it.

A token's place is its chunk and its place in it, as in the corpus: `losses.nats[c, j]` belongs to
`corpus.tokens(c)[j]`. The start token, the end token and padding are not scored; every other token is, exactly once,
and so is every byte of every document: `LossCollector` makes sure.
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from retro_jax.data.corpus import Corpus
from retro_jax.data.stage import Stage
from retro_jax.errors import UserError
from retro_jax.evaluation.passes import ScoredSpan

_NATS = "nats.npy"
_BEST = "best.npy"
_CHUNKS_AT_ONCE = 65_536


class TokenLosses:
    """Losses of all tokens of a corpus.

    Attributes:
      corpus: what was scored.
      nats: [chunks, M] floating, -ln p of each token given those before it in its document; 0 where none is scored.
      best: [chunks, M] int32, the token that was most probable in its place; None when it was not kept.
      settings: what they were made with, JSON-serialisable.
    """

    def __init__(
        self, corpus: Corpus, nats: np.ndarray, best: np.ndarray | None = None, settings: dict[str, Any] | None = None
    ) -> None:
        assert nats.shape == (corpus.num_chunks, corpus.chunk_length), f"losses {nats.shape} do not fit {corpus}"
        self.corpus = corpus
        self.nats = nats
        self.best = best
        self.settings = settings or {}

    def document_nats(self, document: int) -> np.ndarray:
        """[n] float64: the losses of a document's text, in order, without start and end token."""
        first, chunks = self.corpus.document_range(document)
        ids = np.arange(first, first + chunks)
        scored = self.corpus.tokenizer.is_text(self.corpus.tokens(ids))
        return self.nats[first : first + chunks][scored].astype(np.float64)

    def chunk_nats(self) -> np.ndarray:
        """[chunks] float64: the loss of each chunk's text."""
        return self.nats.sum(axis=1, dtype=np.float64)


class LossCollector:
    """Gathers the losses of a corpus span by span, in any order, and checks that nothing is missing or twice."""

    def __init__(self, corpus: Corpus, *, best: bool = False, dtype: DTypeLike = np.float32) -> None:
        """Prepares for a corpus.

        Args:
          corpus: what is scored.
          best: the most probable tokens are gathered too.
          dtype: of the losses, kept as they are given: a model's are float32, unless it computes in float64.
        """
        self._corpus = corpus
        shape = (corpus.num_chunks, corpus.chunk_length)
        self._nats = np.full(shape, np.nan, dtype)
        self._best = np.full(shape, -1, np.int32) if best else None

    def add(self, document: int, first: int, nats: np.ndarray, best: np.ndarray | None = None) -> None:
        """Takes the losses [n] of the tokens from position `first` (the start token is at 0) of a document.

        Losses of an end token are left out; so the span may have one or not.

        Raises:
          AssertionError: a token beyond the document, or one that was given before.
        """
        start, chunks = self._corpus.document_range(document)
        own = self._nats[start : start + chunks].reshape(-1)
        place = slice(first, first + len(nats))
        assert first >= 1 and first + len(nats) <= own.size, f"positions {place} are not of document {document}"
        assert np.isnan(own[place]).all(), f"positions {place} of document {document} are scored twice"
        own[place] = nats
        if self._best is not None:
            self._best[start : start + chunks].reshape(-1)[place] = best

    def finish(self, settings: dict[str, Any] | None = None) -> TokenLosses:
        """The losses.

        Raises:
          AssertionError: a token of the text without a finite loss, or scored bytes that are not the corpus's bytes (a
            defect of ours, never to be hidden).
        """
        corpus, total = self._corpus, 0
        tokenizer = corpus.tokenizer
        for first in range(0, corpus.num_chunks, _CHUNKS_AT_ONCE):
            chunks = slice(first, min(first + _CHUNKS_AT_ONCE, corpus.num_chunks))
            tokens = corpus.tokens(np.arange(chunks.start, chunks.stop))
            scored = tokenizer.is_text(tokens)
            nats = self._nats[chunks]
            assert np.isfinite(nats[scored]).all(), "a token of the text has no finite loss"
            nats[~scored] = 0
            total += int(tokenizer.token_bytes[tokens[scored]].sum())
        assert total == corpus.num_bytes, f"scored {total} bytes of {corpus.num_bytes}"
        return TokenLosses(corpus, self._nats, self._best, settings)


def collect(corpus: Corpus, spans: Iterable[ScoredSpan], settings: dict[str, Any] | None = None) -> TokenLosses:
    """Losses of a whole corpus from the spans of `retro_jax.evaluation.passes.scored_spans`."""
    collector = None
    for span in spans:
        collector = collector or LossCollector(corpus, best=span.best is not None, dtype=span.nats.dtype)
        collector.add(span.document, span.first, span.nats, span.best)
    return (collector or LossCollector(corpus)).finish(settings)


def kept_losses(
    directory: str | os.PathLike,
    corpus: Corpus,
    compute: Callable[[], TokenLosses],
    *,
    settings: dict[str, Any],
    inputs: dict[str, str],
) -> TokenLosses:
    """The losses kept in a directory, computed and written there when they are not there yet.

    Args:
      directory: of the "losses" stage.
      corpus: what is scored.
      compute: gives the losses; called at most once.
      settings: everything beside the inputs that the losses depend on, JSON-serialisable.
      inputs: fingerprints of what they are made from; the corpus's is added.

    Raises:
      UserError: the directory holds losses of other settings or inputs, or something else.
    """
    directory = Path(directory)
    with Stage(directory, "losses", settings=settings, inputs={"corpus": corpus.fingerprint, **inputs}) as stage:
        if not stage.complete:
            losses = compute()
            for name, array in ((_NATS, losses.nats), (_BEST, losses.best)):
                if array is not None:
                    with stage.shard(name) as (path, _), open(path, "wb") as file:
                        np.save(file, array, allow_pickle=False)
            stage.finish({"chunks": corpus.num_chunks, "bytes": corpus.num_bytes, "settings": losses.settings})
        manifest = stage.manifest
    arrays = {shard.name: np.load(directory / shard.name, mmap_mode="r") for shard in manifest.shards}
    if arrays[_NATS].shape != (corpus.num_chunks, corpus.chunk_length):
        raise UserError(f"{directory}: these losses do not fit {corpus.directory}; remove the directory")
    return TokenLosses(corpus, arrays[_NATS], arrays.get(_BEST), manifest.counts["settings"])
