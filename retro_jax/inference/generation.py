"""The compiled programs of generation: prefill, the step at the end of a chunk, and the loop inside one."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from retro_jax.config import RetroConfig
from retro_jax.inference.decoding import Choice, choose
from retro_jax.model.incremental import Distances, Incremental, State, split_incremental
from retro_jax.parallel import rules
from retro_jax.training.state import ModelPlan


class Rows(NamedTuple):
    """What is fixed of the rows between two placements; all [B].

    Attributes:
      ends: int32, slot after the last known token: from here on tokens are chosen.
      origins: int32, slot where the row's text would begin had it forgotten nothing.
      samples: int32, number of the row among the samples of its prompt.
      end_token: int32 scalar, the token that ends a row; -1 for none.
    """

    ends: Any
    origins: Any
    samples: Any
    end_token: Any


class Carry(NamedTuple):
    """A generation on the device.

    Attributes:
      state: the model's, of the slots before `slot`.
      slot: int32 scalar, the next to be fed.
      tokens: [B, S + 1] int32, the token of each slot, known ones and chosen ones.
      log_probabilities: [B, S + 1] float32, of the chosen ones, in nats, before penalty, temperature and filters.
      done: [B] bool, rows that ended.
      seen: [B, V] bool, tokens that the row has.
    """

    state: State
    slot: jax.Array
    tokens: jax.Array
    log_probabilities: jax.Array
    done: jax.Array
    seen: jax.Array


class Programs:
    """Programs of one model; compiled once for each number of rows and slots."""

    def __init__(
        self, config: RetroConfig, plan: ModelPlan, params: nnx.State, *, vocab_size: int, mesh: Mesh | None
    ) -> None:
        """Lays the parameters out for generation, which takes memory for a second copy of them.

        Args:
          config, plan, params: the model.
          vocab_size: tokens of the tokenizer; rows of a larger table are never chosen.
          mesh: the devices, as the parameters are laid out on them.
        """
        self._config = config
        self._mesh = mesh
        ids = np.arange(config.vocab_size)
        special = {config.pad_id, config.bos_id, config.unk_id} - {config.eos_id}
        self._never = np.isin(ids, list(special)) | (ids >= vocab_size)  # never a target in training
        graphdef = None

        def lay_out(params: nnx.State) -> nnx.State:
            nonlocal graphdef
            graphdef, own = split_incremental(plan.merge(params))
            return own

        self._params = self._compiled(lay_out)(params)
        self._model: Callable[[nnx.State], Incremental] = functools.partial(nnx.merge, graphdef)
        self._distances = functools.cache(
            lambda slots: self._compiled(lambda params: self._model(params).distances(slots))(self._params)
        )
        self._prefill = self._compiled(self._prefill)
        self._end_chunk = self._compiled(self._end_chunk, donate_argnums=2)
        self._go_on = self._compiled(self._go_on, donate_argnums=2)

    def prefill(
        self, tokens: np.ndarray, slot: int, neighbours: np.ndarray | None, done: np.ndarray, seen: np.ndarray
    ) -> Carry:
        """The state of slots 0 to `slot` - 1.

        Args:
          tokens: [B, S + 1] int32, known tokens; PAD elsewhere.
          slot: how many to feed.
          neighbours: [B, S // M, K, R] int32 of the chunks that end before `slot`; None for OFF.
          done, seen: as in Carry.
        """
        distances = self._distances(tokens.shape[1] - 1)
        return self._prefill(self._params, distances, tokens, np.int32(slot), neighbours, done, seen)

    def end_chunk(
        self, carry: Carry, rows: Rows, choice: Choice, done: np.ndarray, neighbours: np.ndarray | None
    ) -> Carry:
        """Feeds the last token of a chunk, whose neighbours are [B, K, R] (None for OFF), and chooses the next."""
        return self._end_chunk(self._params, self._slots(carry), carry, rows, choice, done, neighbours)

    def go_on(self, carry: Carry, rows: Rows, choice: Choice, done: np.ndarray, limit: int) -> Carry:
        """Feeds and chooses tokens one after the other: `limit` of them, or up to before the last of the chunk, or
        until all rows are done."""
        return self._go_on(self._params, self._slots(carry), carry, rows, choice, done, np.int32(limit))

    def compiled(self) -> int:
        """How many programs have been compiled for prefill, chunk ends and loops together."""
        return sum(program._cache_size() for program in (self._prefill, self._end_chunk, self._go_on))

    def _slots(self, carry: Carry) -> Distances:
        return self._distances(carry.tokens.shape[1] - 1)

    def _compiled(self, function: Callable, **options: Any) -> Callable:
        @functools.wraps(function)
        def on_mesh(*args: Any, **kwargs: Any) -> Any:
            with rules.use(self._mesh) if self._mesh is not None else contextlib.nullcontext():
                return function(*args, **kwargs)

        return jax.jit(on_mesh, **options)

    def _prefill(self, params, distances, tokens, slot, neighbours, done, seen) -> Carry:
        model, length = self._model(params), self._config.chunk_length
        batch, slots = tokens.shape[0], tokens.shape[1] - 1
        empty = model.empty(batch, slots, None if neighbours is None else neighbours.shape[2])

        def feed(chunk: jax.Array, state: State) -> State:
            first = chunk * length
            piece = jax.lax.dynamic_slice_in_dim(tokens, first, length, axis=1)
            piece = jnp.where(first + jnp.arange(length) < slot, piece, self._config.pad_id)
            near = None
            if neighbours is not None:
                near = jax.lax.dynamic_index_in_dim(neighbours, chunk, axis=1, keepdims=False)
            complete = first + length <= slot
            return model.advance(distances, state, piece, first, near, ends_chunk=True, complete=complete)[1]

        state = jax.lax.fori_loop(0, -(-slot // length), feed, empty)
        nothing = jnp.zeros(tokens.shape, jnp.float32)
        return Carry(state, slot, jnp.asarray(tokens), nothing, jnp.asarray(done), jnp.asarray(seen))

    def _end_chunk(self, params, distances, carry: Carry, rows: Rows, choice: Choice, done, neighbours) -> Carry:
        carry = carry._replace(done=carry.done | done)
        return self._step(self._model(params), distances, carry, rows, choice, neighbours, ends_chunk=True)

    def _go_on(self, params, distances, carry: Carry, rows: Rows, choice: Choice, done, limit) -> Carry:
        model, length = self._model(params), self._config.chunk_length
        carry = carry._replace(done=carry.done | done)
        last = carry.slot // length * length + length - 1
        until = jnp.minimum(carry.slot + limit, last)
        return jax.lax.while_loop(
            lambda carry: (carry.slot < until) & ~jnp.all(carry.done),
            lambda carry: self._step(model, distances, carry, rows, choice),
            carry,
        )

    def _step(
        self,
        model: Incremental,
        distances: Distances,
        carry: Carry,
        rows: Rows,
        choice: Choice,
        neighbours: jax.Array | None = None,
        *,
        ends_chunk: bool = False,
    ) -> Carry:
        slot = carry.slot
        fed = jax.lax.dynamic_slice_in_dim(carry.tokens, slot, 1, axis=1)
        hidden, state = model.advance(distances, carry.state, fed, slot, neighbours, ends_chunk=ends_chunk)
        logits = jnp.where(self._never, -jnp.inf, model.logits(hidden)[:, 0].astype(jnp.float32))
        chosen = choose(logits, carry.seen, choice, rows.samples, slot + 1 - rows.origins)
        every = jnp.arange(len(chosen))
        nats = logits[every, chosen] - jax.nn.logsumexp(logits, axis=-1)
        fresh = (slot + 1 >= rows.ends) & ~carry.done
        known = jax.lax.dynamic_slice_in_dim(carry.tokens, slot + 1, 1, axis=1)[:, 0]
        token = jnp.where(fresh, chosen, known)
        return Carry(
            state,
            slot + 1,
            jax.lax.dynamic_update_slice(carry.tokens, token[:, None], (0, slot + 1)),
            jax.lax.dynamic_update_slice(carry.log_probabilities, nats[:, None], (0, slot + 1)),
            carry.done | (fresh & (token == rows.end_token)),
            carry.seen.at[every, token].set(True),
        )
