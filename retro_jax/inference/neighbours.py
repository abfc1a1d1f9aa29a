"""Where the neighbours of a chunk come from: a database here, a service, the caller, or nowhere."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from retro_jax.config import RetroConfig
from retro_jax.errors import UserError

ON_FAILURE = ("error", "off")


class Neighbours(Protocol):
    """What a retriever returns for n chunks: ids [n, K], distances [n, K], tokens [n, K, R]."""

    ids: np.ndarray
    distances: np.ndarray
    tokens: np.ndarray


class Retriever(Protocol):
    """A source of neighbours: `retro_jax.retrieval.database.Database`, or the client of a retrieval service.

    A failure is a UserError or an OSError (of which TimeoutError and ConnectionError are kinds).
    """

    def retrieve(self, chunk_tokens: np.ndarray, k: int) -> Neighbours:
        """[n, M] int32 tokens of complete chunks -> their k neighbours. PAD may stand at the left."""


@dataclasses.dataclass(frozen=True)
class RetrievedChunk:
    """The neighbours one chunk was given.

    Attributes:
      chunk: its index in the sequence.
      end: tokens of the sequence up to its end, the start token included.
      ids, distances: [K]; -1 and inf for none, and for neighbours that the caller gave.
      tokens: [K, R], PAD for none.
      failure: why there are none though they were asked for; empty if that was not so.
    """

    chunk: int
    end: int
    ids: np.ndarray
    distances: np.ndarray
    tokens: np.ndarray
    failure: str = ""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A chunk that needs neighbours: its index, the tokens up to its end, its own [M], and what the caller gave."""

    chunk: int
    end: int
    tokens: np.ndarray
    given: np.ndarray | None = None


class Source:
    """Neighbours of chunks, asked for once each: those of the caller first, then the retriever's, else none."""

    def __init__(self, config: RetroConfig, retriever: Retriever | None, k: int, on_failure: str = "error") -> None:
        """Remembers what it found for as long as it lives.

        Args:
          config: the model's; fixes M and R.
          retriever: None where only the caller gives neighbours.
          k: K, neighbours of a chunk.
          on_failure: "error", or "off": a chunk whose retrieval fails goes on without neighbours.
        """
        if on_failure not in ON_FAILURE:
            raise UserError(f"on_retrieval_failure {on_failure!r} is none of {', '.join(ON_FAILURE)}")
        self._config = config
        self._retriever = retriever
        self._k = k
        self._on_failure = on_failure
        self._known: dict[bytes, tuple[np.ndarray, np.ndarray, np.ndarray, str]] = {}

    def find(self, wanted: Sequence[Wanted]) -> list[RetrievedChunk]:
        """Neighbours of each chunk; one call of the retriever at most.

        Raises:
          UserError, OSError: the retriever failed and failures are errors; neighbours that do not fit the model.
        """
        new = {
            chunk.tokens.tobytes(): chunk.tokens
            for chunk in wanted
            if chunk.given is None and chunk.tokens.tobytes() not in self._known
        }
        if new and self._retriever is not None:
            self._ask(list(new.values()))
        found = []
        for chunk in wanted:
            if chunk.given is not None:
                answer = (*self._nothing()[:2], fit(chunk.given, self._config, self._k), "")
            else:
                answer = self._known.get(chunk.tokens.tobytes(), self._nothing())
            ids, distances, tokens, failure = answer
            found.append(RetrievedChunk(chunk.chunk, chunk.end, ids, distances, tokens, failure))
        return found

    def _ask(self, chunks: list[np.ndarray]) -> None:
        try:
            answer = self._retriever.retrieve(np.stack(chunks).astype(np.int32), self._k)
        except (UserError, OSError) as error:
            if self._on_failure == "error":
                raise
            failure = " ".join(str(error).split()) or type(error).__name__
            self._known |= {chunk.tobytes(): (*self._nothing()[:3], failure) for chunk in chunks}
            return
        expected = (len(chunks), self._k, self._config.neighbour_length)
        if tuple(answer.tokens.shape) != expected:
            raise UserError(f"the retriever gave neighbours {tuple(answer.tokens.shape)}, the model needs {expected}")
        for row, chunk in enumerate(chunks):
            self._known[chunk.tobytes()] = (answer.ids[row], answer.distances[row], answer.tokens[row], "")

    def _nothing(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
        shape = (self._k, self._config.neighbour_length)
        return (
            np.full(self._k, -1, np.int64),
            np.full(self._k, np.inf, np.float32),
            np.full(shape, self._config.pad_id, np.int32),
            "",
        )


Given = Mapping[int, np.ndarray | Sequence[Sequence[int]]]
"""Neighbours that a caller gives: index of a chunk -> at most K neighbours of at most R tokens each."""


def fit(given: np.ndarray | Sequence[Sequence[int]], config: RetroConfig, k: int) -> np.ndarray:
    """Neighbours given by a caller as [K, R] int32, filled up with PAD.

    Raises:
      UserError: more than K neighbours, longer ones than R, or ids that the model does not have.
    """
    tokens = np.full((k, config.neighbour_length), config.pad_id, np.int32)
    if len(given) > k:
        raise UserError(f"{len(given)} neighbours given for one chunk, the sampler takes {k}")
    for rank, neighbour in enumerate(given):
        if len(neighbour) > config.neighbour_length:
            raise UserError(f"a given neighbour has {len(neighbour)} tokens, the model reads {config.neighbour_length}")
        tokens[rank, : len(neighbour)] = neighbour
    if tokens.min() < 0 or (tokens[tokens != config.pad_id] >= config.vocab_size).any():
        raise UserError(f"given neighbours hold token ids outside 0 to {config.vocab_size - 1}")
    return tokens
