"""Sampling with retrieval at every chunk boundary (paper section 2.4).

At the last token of a chunk its neighbours are retrieved, and with them the next chunk is generated.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Protocol

import jax
import numpy as np
from flax import nnx

from retro_jax.config import RetroConfig
from retro_jax.data.tokenizer import BOS_ID, EOS_ID, PAD_ID, UNK_ID
from retro_jax.errors import UserError
from retro_jax.inference.decoding import Decoding, choose
from retro_jax.training.state import ModelPlan


class Neighbours(Protocol):
    """What a retriever returns for n chunks: ids [n, K], distances [n, K], tokens [n, K, R]."""

    ids: np.ndarray
    distances: np.ndarray
    tokens: np.ndarray


class Retriever(Protocol):
    """Where neighbours come from: a database in this process, a service, or a caller's own choice."""

    def retrieve(self, chunk_tokens: np.ndarray, k: int) -> Neighbours:
        """[n, M] int32 tokens of complete chunks -> their k neighbours."""


@dataclasses.dataclass(frozen=True)
class RetrievedChunk:
    """The neighbours one chunk was given: its index in the sequence, ids [K], distances [K], tokens [K, R]."""

    chunk: int
    ids: np.ndarray
    distances: np.ndarray
    tokens: np.ndarray


@dataclasses.dataclass(frozen=True)
class SampledToken:
    """A generated token, its log-probability in nats under the model, and what was retrieved just before it."""

    token: int
    log_probability: float
    retrieved: tuple[RetrievedChunk, ...]


class Sampler:
    """Generates one sequence at a time.

    Each token runs the model over the sequence so far, padded to a few lengths so that little is compiled. PAD is
    never seen by any attention, so the padding changes nothing.
    """

    def __init__(
        self,
        config: RetroConfig,
        plan: ModelPlan,
        params: nnx.State,
        *,
        vocab_size: int,
        retriever: Retriever | None,
        neighbours: int = 2,
        max_context: int = 2048,
    ) -> None:
        """Sets the model and the source of neighbours.

        Args:
          config, plan, params: the model.
          vocab_size: tokens of the tokenizer; rows of a larger embedding table are never drawn.
          retriever: source of neighbours; None samples RETRO[OFF] or a baseline.
          neighbours: K, for each chunk.
          max_context: tokens the model sees at most; older chunks are forgotten, whole chunks at a time.
        """
        if retriever is not None and config.is_baseline:
            raise UserError("this model is a baseline without chunked cross-attention; sample it without a database")
        if max_context % config.chunk_length or max_context <= config.chunk_length:
            raise UserError(
                f"max_context {max_context} must be a multiple of the chunk length {config.chunk_length}, and above it"
            )
        self._config = config
        self._params = params
        self._vocab_size = vocab_size
        self._retriever = retriever
        self._k = neighbours
        self._max_context = max_context

        def logits_at(
            params: nnx.State, tokens: jax.Array, neighbours: jax.Array | None, position: jax.Array
        ) -> jax.Array:
            model = plan.merge(params)
            hidden = model.hidden(tokens, neighbours)
            return model.logits(jax.lax.dynamic_slice_in_dim(hidden, position, 1, axis=1))[0, 0]

        self._logits_at = jax.jit(logits_at)

    def generate(
        self, prompt: Sequence[int], *, max_new_tokens: int, decoding: Decoding, stop_at_end: bool = True
    ) -> Iterator[SampledToken]:
        """Yields tokens one by one.

        Args:
          prompt: token ids without BOS, which is put before them.
          max_new_tokens: tokens to generate at most.
          decoding: how each is chosen.
          stop_at_end: end when the model ends the document (the end token is not yielded).
        """
        M = self._config.chunk_length
        tokens = [BOS_ID, *prompt]
        found: list[np.ndarray] = []  # [K, R] of every complete chunk
        for _ in range(max_new_tokens):
            retrieved = self._retrieve(tokens, len(found))
            found += [chunk.tokens for chunk in retrieved]
            dropped = max(0, -(-(len(tokens) - self._max_context) // M))
            logits = self._next_logits(tokens[dropped * M :], found[dropped:])
            logits[[PAD_ID, BOS_ID, UNK_ID]] = -np.inf  # never a target in training
            logits[self._vocab_size :] = -np.inf
            token = choose(logits, decoding, len(tokens))
            if token == EOS_ID and stop_at_end:
                return
            yield SampledToken(token, float(logits[token] - _log_sum_exp(logits)), tuple(retrieved))
            tokens.append(token)

    def _retrieve(self, tokens: list[int], known: int) -> list[RetrievedChunk]:
        M = self._config.chunk_length
        complete = len(tokens) // M
        if self._retriever is None or complete <= known:
            return []
        chunks = np.asarray(tokens[known * M : complete * M], np.int32).reshape(-1, M)
        result = self._retriever.retrieve(chunks, self._k)
        return [
            RetrievedChunk(known + i, result.ids[i], result.distances[i], result.tokens[i]) for i in range(len(chunks))
        ]

    def _next_logits(self, tokens: list[int], found: list[np.ndarray]) -> np.ndarray:
        M, R = self._config.chunk_length, self._config.neighbour_length
        chunks = 2
        while chunks * M < len(tokens):
            chunks *= 2
        padded = np.full((1, chunks * M), PAD_ID, np.int32)
        padded[0, : len(tokens)] = tokens
        neighbours = None
        if self._retriever is not None:
            neighbours = np.full((1, chunks, self._k, R), PAD_ID, np.int32)
            if found:
                neighbours[0, : len(found)] = np.stack(found)
        return np.array(self._logits_at(self._params, padded, neighbours, len(tokens) - 1), np.float64)


def _log_sum_exp(logits: np.ndarray) -> float:
    top = logits.max()
    return float(top + np.log(np.exp(logits - top).sum()))
