"""Sampling with retrieval at every chunk boundary (paper section 2.4).

At the last token of a chunk its neighbours are retrieved, and with them the next chunk is generated: on the device,
with one round trip to the host a chunk.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from retro_jax.config import RetroConfig
from retro_jax.errors import UserError
from retro_jax.inference.decoding import Choice, Decoding
from retro_jax.inference.generation import Programs, Rows
from retro_jax.inference.neighbours import Given, Neighbours, RetrievedChunk, Retriever, Source, Wanted
from retro_jax.inference.placement import check_context, count_rows, count_slots, place
from retro_jax.training.state import ModelPlan

__all__ = ["Neighbours", "Request", "RetrievedChunk", "Retriever", "SampledToken", "Sampler"]


@dataclasses.dataclass(frozen=True)
class Request:
    """A text to be continued.

    Attributes:
      prompt: token ids without the start token, which is put before them.
      sample: number of this continuation among those of the same prompt; each draws by itself.
      given: neighbours that the caller chooses, by index of the chunk; the others are retrieved.
    """

    prompt: Sequence[int]
    sample: int = 0
    given: Given = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class SampledToken:
    """A generated token, its log-probability in nats under the model, and what was retrieved just before it."""

    token: int
    log_probability: float
    retrieved: tuple[RetrievedChunk, ...]


class Sampler:
    """Generates continuations, one or several at a time; what was computed once is kept and not computed again."""

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
        mesh: Mesh | None = None,
        retrieval_step: int | None = None,
        left_pad: bool = False,
        on_retrieval_failure: str = "error",
    ) -> None:
        """Sets the model and the source of neighbours.

        Args:
          config, plan, params: the model.
          vocab_size: tokens of the tokenizer; rows of a larger embedding table are never drawn.
          retriever: source of neighbours; None samples RETRO[OFF] or a baseline, or with given neighbours alone.
          neighbours: K, for each chunk.
          max_context: tokens the model sees at most; older chunks are forgotten, whole chunks at a time.
          mesh: the devices the parameters lie on; None for one device.
          retrieval_step: s of Wang et al. (2023), 1 to M: after every s tokens the chunks are cut anew so that the text
            ends with one, and retrieved again; all is computed anew then. M by default: chunks stay as they are.
          left_pad: pad a prompt at the left so that it ends with a chunk, whose neighbours the first token sees; always
            so with a retrieval step below M.
          on_retrieval_failure: "error", or "off": a chunk whose retrieval fails goes on without neighbours.
        """
        length = config.chunk_length
        if retriever is not None and config.is_baseline:
            raise UserError("this model is a baseline without chunked cross-attention; sample it without a database")
        check_context(max_context, length)
        if retrieval_step is not None and not 1 <= retrieval_step <= length:
            raise UserError(f"retrieval_step {retrieval_step} must be between 1 and the chunk length {length}")
        self._config = config
        self._retriever = retriever
        self._k = neighbours
        self._max_context = max_context
        self._step = retrieval_step or length
        self._left_pad = left_pad or self._step < length
        self._on_failure = on_retrieval_failure
        self._programs = Programs(config, plan, params, vocab_size=vocab_size, mesh=mesh)

    def generate(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        decoding: Decoding,
        stop_at_end: bool = True,
        given: Given | None = None,
    ) -> Iterator[SampledToken]:
        """Yields the tokens of one continuation, as `generate_batch` does of several."""
        requests = [Request(prompt, given=given or {})]
        for _, token in self.generate_batch(
            requests, max_new_tokens=max_new_tokens, decoding=decoding, stop_at_end=stop_at_end
        ):
            yield token

    def generate_batch(
        self,
        requests: Sequence[Request],
        *,
        max_new_tokens: int,
        decoding: Decoding,
        stop_at_end: bool = True,
        stop: Callable[[int, SampledToken], bool] = lambda row, token: False,
        burst: int | None = None,
        retrieve: bool = True,
    ) -> Iterator[tuple[int, SampledToken]]:
        """Yields (index of the request, token), in the order in which they come.

        Args:
          requests: texts to be continued together. What one gets does not depend on the others.
          max_new_tokens: tokens to generate at most, of each.
          decoding: how each is chosen.
          stop_at_end: a text ends when the model ends the document (the end token is not yielded).
          stop: asked after each token that was yielded; True ends its text.
          burst: tokens of a text that come at once, at most; M by default. Fewer come sooner and cost more.
          retrieve: False samples RETRO[OFF], whatever the retriever.

        Raises:
          UserError: neighbours given that do not fit, or any to a baseline; what the retriever raises.
        """
        retrieving = retrieve and (self._retriever is not None or any(request.given for request in requests))
        if retrieving and self._config.is_baseline:
            raise UserError("this model is a baseline without chunked cross-attention; it takes no neighbours")
        source = Source(self._config, self._retriever, self._k, self._on_failure)
        rows = [_Row(request, self._left_pad and retrieving, self._config) for request in requests]
        longest = max((len(row.tokens) for row in rows), default=0) + max_new_tokens
        if self._left_pad and retrieving:
            longest += self._config.chunk_length
        slots = count_slots(longest, chunk_length=self._config.chunk_length, most=self._max_context)
        batch = _Batch(self._config, self._programs, rows, source if retrieving else None, self._k, slots)
        choice, end_token = decoding.choice(), self._config.eos_id if stop_at_end else -1
        anew = self._step if retrieving and self._step < self._config.chunk_length else max_new_tokens
        burst = burst or self._config.chunk_length
        while any(row.live for row in rows):
            batch.place(end_token, max_new_tokens=max_new_tokens, anew=anew)
            while any(row.live for row in rows) and batch.go_on(choice, burst):
                for index, row in enumerate(rows):
                    for token in row.news():
                        if token.token == end_token:
                            row.live = False
                        else:
                            yield index, token
                            row.live = row.generated < max_new_tokens and not stop(index, token)

    def compiled(self) -> int:
        """How many programs have been compiled so far; does not grow once the sizes in use have been met."""
        return self._programs.compiled()


class _Row:
    """A text on the host: PAD where it is padded, the start token, prompt and generated tokens."""

    def __init__(self, request: Request, left_pad: bool, config: RetroConfig) -> None:
        self.request = request
        self.tokens: list[int] = [config.bos_id, *request.prompt]
        self.log_probabilities: list[float] = [0.0] * len(self.tokens)
        self.live = True
        self.pad = 0
        self._told = self._prompt = len(self.tokens)
        self._left_pad, self._config = left_pad, config
        self._retrieved: list[RetrievedChunk] = []
        self._reported = 0  # tokens up to the end of the last chunk whose neighbours were told
        self.align()

    def align(self) -> None:
        """Pads so that the text ends with a chunk, where that is asked for."""
        if self._left_pad:
            self.pad = -len(self.tokens) % self._config.chunk_length

    def padded(self) -> list[int]:
        return [self._config.pad_id] * self.pad + self.tokens

    def note(self, retrieved: RetrievedChunk) -> None:
        if retrieved.end > self._reported:
            self._retrieved.append(retrieved)
            self._reported = retrieved.end

    @property
    def generated(self) -> int:
        """Tokens that were told."""
        return self._told - self._prompt

    def news(self) -> Iterator[SampledToken]:
        """Tells the tokens that were not told yet, while the text is alive."""
        while self.live and self._told < len(self.tokens):
            index, self._told = self._told, self._told + 1
            retrieved = tuple(chunk for chunk in self._retrieved if chunk.end <= index)
            self._retrieved = self._retrieved[len(retrieved) :]
            yield SampledToken(self.tokens[index], self.log_probabilities[index], retrieved)


class _Batch:
    """Rows in the slots of the device, and what the host knows of them."""

    def __init__(
        self, config: RetroConfig, programs: Programs, rows: list[_Row], source: Source | None, k: int, slots: int
    ) -> None:
        self._config = config
        self._programs = programs
        self._rows = rows
        self._source = source
        self._k = k
        self._slots = slots
        self._size = count_rows(len(rows))

    def place(self, end_token: int, *, max_new_tokens: int, anew: int) -> None:
        """Puts all rows into the slots and computes their state, up to before their last known tokens.

        Args:
          end_token: as in Rows.
          max_new_tokens: of each row.
          anew: tokens after which the rows are to be placed again.
        """
        length, rows = self._config.chunk_length, self._rows
        for row in rows:
            row.align()
        padded = [row.padded() for row in rows]
        where = place([len(tokens) for tokens in padded], chunk_length=length, slots=self._slots)
        self._where, self._slot, self._anew = where, where.slot, max(where.ends) - 1 + anew
        self._last = [end - 1 + max_new_tokens - row.generated for end, row in zip(where.ends, rows, strict=True)]
        self._tokens = np.full((self._size, self._slots + 1), self._config.pad_id, np.int32)
        seen = np.zeros((self._size, self._config.vocab_size), bool)
        for index, row in enumerate(rows):
            kept = padded[index][where.dropped[index] :]
            self._tokens[index, where.starts[index] : where.ends[index]] = kept
            seen[index, row.tokens] = True
        origins = [self._origin(index) for index in range(len(rows))]
        samples = [row.request.sample for row in rows]
        self._fixed = Rows(
            *(self._per_row(values, np.int32) for values in (where.ends, origins, samples)), np.int32(end_token)
        )
        neighbours = None
        if self._source is not None:
            # Also of the chunk that ends with the next slot, so that the retriever is asked once.
            found = self._find(range((self._slot + 1) // length))
            shape = (self._size, self._slots // length, self._k, self._config.neighbour_length)
            neighbours = np.full(shape, self._config.pad_id, np.int32)
            for (index, chunk), each in found.items():
                if (chunk + 1) * length <= self._slot:
                    neighbours[index, chunk] = each.tokens
        self._carry = self._programs.prefill(self._tokens, self._slot, neighbours, self._done(), seen)

    def go_on(self, choice: Choice, burst: int) -> bool:
        """Generates up to the end of a chunk or of a burst; False when the rows must be placed anew first."""
        begun, length, first = self._slot, self._config.chunk_length, max(self._where.ends)
        if begun >= min(self._slots, self._anew):
            return False
        done, carry, slot = self._done(), self._carry, begun
        if slot % length == length - 1:
            neighbours = None
            if self._source is not None:
                neighbours = np.full(
                    (self._size, self._k, self._config.neighbour_length), self._config.pad_id, np.int32
                )
                for (index, _), each in self._find([slot // length]).items():
                    neighbours[index] = each.tokens
            carry = self._programs.end_chunk(carry, self._fixed, choice, done, neighbours)
            slot += 1
        # The first token of every row comes by itself, so that nobody waits for a chunk to be filled.
        goal = first if begun < first else begun + burst
        goal = min(goal, self._anew, max(last for last, row in zip(self._last, self._rows, strict=True) if row.live))
        if goal > slot:
            carry = self._programs.go_on(carry, self._fixed, choice, done, goal - slot)
        tokens, nats, slot = jax.device_get((carry.tokens, carry.log_probabilities, carry.slot))
        self._carry, self._slot, self._tokens = carry, int(slot), np.array(tokens)
        for index, row in enumerate(self._rows):
            if row.live:
                fresh = slice(max(begun + 1, self._where.ends[index]), self._slot + 1)
                row.tokens += self._tokens[index, fresh].tolist()
                row.log_probabilities += nats[index, fresh].tolist()
        return True

    def _find(self, chunks: Iterable[int]) -> dict[tuple[int, int], RetrievedChunk]:
        """Neighbours of these chunks of slots of the rows that are still generated: (row, chunk) to what was found."""
        length = self._config.chunk_length
        places, wanted = [], []
        for chunk in chunks:
            for index, row in enumerate(self._rows):
                tokens = self._tokens[index, chunk * length : (chunk + 1) * length]
                if row.live and (tokens != self._config.pad_id).any():
                    end = (chunk + 1) * length - self._origin(index)
                    number = (end + row.pad) // length - 1
                    places.append((index, chunk))
                    wanted.append(Wanted(number, end, tokens, row.request.given.get(number)))
        found = dict(zip(places, self._source.find(wanted), strict=True))
        for (index, _), each in found.items():
            self._rows[index].note(each)
        return found

    def _origin(self, index: int) -> int:
        """Slot where the row's start token would stand, had it forgotten nothing."""
        return self._where.starts[index] - self._where.dropped[index] + self._rows[index].pad

    def _done(self) -> np.ndarray:
        return ~self._per_row([row.live for row in self._rows], bool)

    def _per_row(self, values: Sequence[int], dtype: type) -> np.ndarray:
        """[B], 0 for the rows that fill the batch up."""
        filled = np.zeros(self._size, dtype)
        filled[: len(values)] = values
        return filled
