"""Exact bits-per-byte: what the losses of a corpus's tokens add up to, whole, by group, by document.

bpb = sum over the scored tokens of -log2 p(token) / UTF-8 bytes of the scored text (spec section 6.3; equation 5 of the
paper prints it without sign and base). The start token is never scored and the end token carries no byte and is left
out, so numerator and denominator are of the same text.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from retro_jax.data.corpus import Corpus
from retro_jax.evaluation.losses import TokenLosses
from retro_jax.evaluation.passes import document_keys

_CHUNKS_AT_ONCE = 65_536


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
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens if self.tokens else math.nan

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
class DocumentScores:
    """What each document of a corpus costs; all arrays [documents].

    Attributes:
      nats: float64.
      tokens, bytes: int64, those scored.
      keys: int64, equal for documents of one group (parts of a book, translations of a page).
    """

    nats: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray
    keys: np.ndarray

    def total(self, chosen: np.ndarray | None = None) -> Score:
        """The sum over all documents, or those of a bool [documents]."""
        chosen = np.ones(len(self.nats), bool) if chosen is None else chosen
        # math.fsum: the same sum in any order and grouping.
        return Score(
            math.fsum(self.nats[chosen]),
            int(self.tokens[chosen].sum()),
            int(self.bytes[chosen].sum()),
            int(chosen.sum()),
        )

    def by_group(self, groups: Sequence[str]) -> dict[str, Score]:
        """Name of a group to its score, in order of name; `groups` names the one of every document."""
        names = np.asarray(groups)
        return {name: self.total(names == name) for name in sorted(set(groups))}


def document_scores(losses: TokenLosses, counted: np.ndarray | None = None) -> DocumentScores:
    """Sums losses up by document.

    Args:
      losses: of a corpus.
      counted: bool [chunks, M], the only tokens and bytes that count; None: all of the text. Documents without any
        stay, with zeros.
    """
    corpus = losses.corpus
    count, tokenizer = corpus.num_documents, corpus.tokenizer
    nats, tokens, size = np.zeros(count), np.zeros(count), np.zeros(count)
    for first in range(0, corpus.num_chunks, _CHUNKS_AT_ONCE):
        ids = np.arange(first, min(first + _CHUNKS_AT_ONCE, corpus.num_chunks))
        text = corpus.tokens(ids)
        chosen = tokenizer.is_text(text)
        if counted is not None:
            chosen &= counted[ids]
        documents = corpus.document_index(ids)
        for total, values in ((nats, losses.nats[ids]), (tokens, 1), (size, tokenizer.token_bytes[text])):
            total += np.bincount(documents, np.where(chosen, values, 0).sum(axis=1, dtype=np.float64), count)
    return DocumentScores(nats, tokens.astype(np.int64), size.astype(np.int64), document_keys(corpus))


def document_groups(corpus: Corpus, key: str | None) -> list[str]:
    """For every document the value of a metadata key (its source, for example); "all" without a key."""
    if key is None:
        return ["all"] * corpus.num_documents
    return [corpus.document(document).metadata.get(key, "(none)") for document in range(corpus.num_documents)]
