"""Log-probability of every token of a text, with retrieval or without, and with neighbours of the caller's choice."""

import contextlib
import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from retro_jax.config import RetroConfig
from retro_jax.errors import UserError
from retro_jax.evaluation.windows import document_windows
from retro_jax.inference.neighbours import Given, RetrievedChunk, Retriever, Source, Wanted
from retro_jax.inference.placement import check_context, count_slots
from retro_jax.parallel import rules
from retro_jax.training.loss import token_nats
from retro_jax.training.state import ModelPlan

_VOCAB_BLOCK = 16_384


@dataclasses.dataclass(frozen=True)
class Scored:
    """What a model makes of a text.

    Attributes:
      log_probabilities: [T] float32 in nats, of each token given those before it.
      retrieved: the neighbours of each complete chunk, in order; chunks are counted with the start token.
    """

    log_probabilities: np.ndarray
    retrieved: tuple[RetrievedChunk, ...]


class Scorer:
    """Scores texts without generating."""

    def __init__(
        self,
        config: RetroConfig,
        plan: ModelPlan,
        params: nnx.State,
        *,
        retriever: Retriever | None,
        neighbours: int = 2,
        max_context: int = 2048,
        mesh: Mesh | None = None,
        on_retrieval_failure: str = "error",
    ) -> None:
        """Arguments as of `retro_jax.inference.sampling.Sampler`."""
        check_context(max_context, config.chunk_length)
        self._config = config
        self._params = params
        self._retriever = retriever
        self._k = neighbours
        self._max_context = max_context
        self._on_failure = on_retrieval_failure

        def nats(params: nnx.State, tokens: jax.Array, labels: jax.Array, neighbours: jax.Array | None) -> jax.Array:
            with rules.use(mesh) if mesh is not None else contextlib.nullcontext():
                model = plan.merge(params)
                return token_nats(model.hidden(tokens, neighbours), model.head_kernel(), labels, block=_VOCAB_BLOCK)

        self._nats = jax.jit(nats)

    def score(self, tokens: Sequence[int], *, retrieve: bool = True, given: Given | None = None) -> Scored:
        """Scores one text.

        A text longer than the context is cut into windows, each token with at least half a context before it.

        Args:
          tokens: token ids without the start token, which is put before them.
          retrieve: False scores RETRO[OFF], and takes no given neighbours.
          given: neighbours that the caller chooses, by index of the chunk (counted with the start token); the others
            are retrieved. So a chunk is scored again with others, or with none: `given={2: []}`.

        Raises:
          UserError: neighbours to a baseline, or that do not fit; what the retriever raises.
        """
        length = self._config.chunk_length
        text = np.asarray([self._config.bos_id, *tokens], np.int32)
        retrieved: list[RetrievedChunk] = []
        retrieving = retrieve and (self._retriever is not None or bool(given))
        if retrieving:
            if self._config.is_baseline:
                raise UserError("this model is a baseline without chunked cross-attention; it takes no neighbours")
            source = Source(self._config, self._retriever, self._k, self._on_failure)
            wanted = [
                Wanted(chunk, (chunk + 1) * length, text[chunk * length :][:length], (given or {}).get(chunk))
                for chunk in range(len(text) // length)
            ]
            retrieved = source.find(wanted)
        found = np.zeros(len(text) - 1, np.float32)
        stride = max(self._max_context // length // 2, 1) * length
        for window in document_windows(0, len(text), window=self._max_context, stride=stride):
            size = count_slots(window.length, chunk_length=length, most=self._max_context)
            inputs, labels = np.full((2, 1, size), self._config.pad_id, np.int32)
            inputs[0, : window.length] = text[window.start :][: window.length]
            labels[0, : window.length] = text[window.start + 1 :][: window.length]
            neighbours = None
            if retrieving:
                shape = (1, size // length, self._k, self._config.neighbour_length)
                neighbours = np.full(shape, self._config.pad_id, np.int32)
                first = window.start // length
                for chunk in retrieved[first : first + window.length // length]:
                    neighbours[0, chunk.chunk - first] = chunk.tokens
            nats = np.asarray(self._nats(self._params, inputs, labels, neighbours))[0]
            scored = slice(window.scored_from - 1, window.scored_to - 1)
            found[scored] = -nats[scored.start - window.start : scored.stop - window.start]
        return Scored(found, tuple(retrieved))
