"""The model a chunk or a token at a time: what is computed stays in a state, for generation (spec section 9.2).

All rows of a batch stand at the same slot. A slot is a place in the state; chunks are slots u*M to (u + 1)*M - 1 for
every row, and a row begins at a slot of its own: what lies before is PAD, which nothing sees.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from retro_jax.config import RetroConfig, RopeScaling
from retro_jax.errors import UserError
from retro_jax.model.attention import Attention, masked_softmax, share, unshare
from retro_jax.model.chunked_cross_attention import cca_positions
from retro_jax.model.decoder import Block, Segment
from retro_jax.model.relative import sinusoid, skew
from retro_jax.model.retro import Retro
from retro_jax.model.rotary import rotate, rotation
from retro_jax.model.weights import compute_dtype, product, statistics_dtype, take
from retro_jax.parallel import rules


class Stored(NamedTuple):
    """What one attention has of the J tokens it attends to: keys [N, B, H, J] and values [N, B, J, H], so that the
    products with a query read them as they lie."""

    keys: jax.Array
    values: jax.Array


class Retrieved(NamedTuple):
    """The encoded neighbours of the last complete chunk: for each CCA layer keys and values of their K * R tokens, and
    which of them may be seen, [B, K * R]."""

    layers: list[Stored]
    valid: jax.Array


class State(NamedTuple):
    """What the model keeps of the slots it was fed.

    Attributes:
      past: keys and values of every layer's self-attention, S slots, those before the current chunk.
      chunk: the same of the current chunk, M slots. Apart from the past, so that a loop over the tokens
        of a chunk leaves the past alone; XLA would copy it for every token.
      valid: [B, S] bool, False at PAD.
      hidden: [B, M, D], activations after ATTN of layer min(P) in the current chunk: what E is conditioned on.
      retrieved: what CCA attends to; None for RETRO[OFF] and baselines.
    """

    past: list[Stored]
    chunk: list[Stored]
    valid: jax.Array
    hidden: jax.Array
    retrieved: Retrieved | None


class Distances(NamedTuple):
    """Keys of the distances with transformer_xl positions, per layer; empty where positions are something else.

    Attributes:
      past: [N, S, H] each, of the distances S - 1 to 0.
      retrieved: [N, P, H] each, of the distances of `cca_positions`, descending.
    """

    past: list[jax.Array]
    retrieved: list[jax.Array]


class Incremental(nnx.Module):
    """A `Retro` laid out for generation: layers apart from each other, matrices in the compute dtype.

    Made of a model's parameters once, by `split_incremental`.
    """

    def __init__(self, model: Retro):
        config = model.config
        self.config = config
        self.embedding = model.embedding
        self.positions = model.positions
        self.encoder_embedding = model.encoder_embedding
        self.encoder = model.encoder
        self.blocks = nnx.List(_blocks(model))
        self.norm = model.decoder.norm
        self.head = model.head
        self.entry = config.num_layers if config.is_baseline else min(config.cca_layers) - 1

    def distances(self, slots: int) -> Distances:
        """For a state of `slots` slots."""
        config, compute = self.config, compute_dtype(self.config)
        if config.positions == "rope":
            return Distances([], [])
        past = []
        if config.positions == "transformer_xl":
            table = sinusoid(slots - 1 - jnp.arange(slots), config.width, statistics_dtype(config))
            past = [block.attention.heads(table.astype(compute), block.attention.relative) for block in self.blocks]
        if not config.cross_positions:
            return Distances(past, [])
        start, stop = config.neighbour_range
        table = cca_positions(config, stop - start).sinusoids
        return Distances(past, [cca.heads(table.astype(compute), cca.relative) for cca in self._cross_attentions()])

    def empty(self, batch: int, slots: int, neighbours: int | None) -> State:
        """The state before the first token: B rows of S slots, K neighbours, or None for OFF.

        Raises:
          UserError: more slots than there are learned positions.
        """
        config = self.config
        dtype = compute_dtype(config)
        if config.max_positions and slots > config.max_positions:
            raise UserError(f"a context of {slots} tokens is longer than the {config.max_positions} learned positions")

        def stored(tokens: int, heads: int) -> Stored:
            zeros = jnp.zeros((heads, batch, tokens, config.head_size), dtype)
            zeros = rules.constrain(zeros, "heads", "batch", None, None)
            return Stored(jnp.swapaxes(zeros, -1, -2), zeros)

        retrieved = None
        if neighbours is not None:
            start, stop = config.neighbour_range
            tokens = neighbours * (stop - start)
            retrieved = Retrieved(
                [stored(tokens, config.num_heads) for _ in config.cca_layers], jnp.zeros((batch, tokens), bool)
            )
        return State(
            [stored(slots, config.kv_heads) for _ in self.blocks],
            [stored(config.chunk_length, config.kv_heads) for _ in self.blocks],
            jnp.zeros((batch, slots), bool),
            jnp.zeros((batch, config.chunk_length, config.width), dtype),
            retrieved,
        )

    def advance(
        self,
        distances: Distances,
        state: State,
        tokens: jax.Array,
        slot: jax.Array,
        neighbours: jax.Array | None = None,
        *,
        ends_chunk: bool,
        complete: jax.Array | bool = True,
    ) -> tuple[jax.Array, State]:
        """Feeds the tokens of slots `slot` to `slot + I - 1`: one, or a whole chunk.

        Args:
          distances: of this model and the state's slots.
          state: of the slots before.
          tokens: [B, I] int32.
          slot: int32 scalar.
          neighbours: [B, K, R] int32 of the chunk that ends with these slots; attended to from the last one on (two
            phases: up to ATTN of layer min(P) for these tokens, then the encoder, then the rest). None where the chunk
            goes on, or when nothing is retrieved.
          ends_chunk: these slots are the last of their chunk.
          complete: bool scalar; False: the tokens end before these slots do (the rest is PAD), and E stays that of the
            chunk before.

        Returns:
          [B, I, D] after the final norm, and the state with these slots in it.
        """
        length = tokens.shape[1]
        valid = jax.lax.dynamic_update_slice(state.valid, tokens != self.config.pad_id, (0, slot))
        place = slot % self.config.chunk_length
        begin = slot - place
        current = jax.lax.dynamic_slice_in_dim(valid, begin, self.config.chunk_length, axis=1)
        causal = jnp.arange(self.config.chunk_length) <= place + jnp.arange(length)[:, None]
        earlier = state.valid & (jnp.arange(valid.shape[1]) < begin)
        earlier = jnp.broadcast_to(earlier[:, None], (tokens.shape[0], length, valid.shape[1]))
        mask = jnp.concatenate([earlier, current[:, None] & causal], axis=-1)
        if self.config.window:
            mask &= self._within_window(slot + jnp.arange(length), begin, valid.shape[1])
        past, chunk = list(state.past), list(state.chunk)
        x = self.embedding(tokens)
        if self.positions is not None:
            x += self.positions(tokens != self.config.pad_id, state.valid.sum(1, keepdims=True))

        def attend(x: jax.Array, index: int) -> jax.Array:
            relative = distances.past[index] if distances.past else None
            attention = self.blocks[index].attention
            added, chunk[index] = _extend(attention, x, past[index], chunk[index], mask, relative, slot, self.config)
            if ends_chunk:
                past[index] = Stored(
                    jax.lax.dynamic_update_slice(past[index].keys, chunk[index].keys, (0, 0, 0, begin)),
                    jax.lax.dynamic_update_slice(past[index].values, chunk[index].values, (0, 0, begin, 0)),
                )
            return x + added

        for index in range(self.entry):
            x = rules.constrain(self.blocks[index].ffw(attend(x, index)), "batch", "tokens", None)
        if self.entry == len(self.blocks):
            return self.norm(x), State(past, chunk, valid, state.hidden, None)
        x = attend(x, self.entry)
        hidden = jax.lax.dynamic_update_slice(state.hidden, x, (0, place, 0))
        before = after = state.retrieved
        if neighbours is not None:
            encode = functools.partial(self._encode, neighbours, hidden, current)
            after = encode() if complete is True else jax.lax.cond(complete, encode, lambda: before)
        number = 0
        for index in range(self.entry, len(self.blocks)):
            block = self.blocks[index]
            if index > self.entry:
                x = attend(x, index)
            if block.cca is not None and before is not None:
                relative = distances.retrieved[number] if distances.retrieved else None
                parts = [(x, before, place + 1)]
                if neighbours is not None:
                    parts = [(x[:, :-1], before, place + 1), (x[:, -1:], after, 0)]
                added = [
                    _cross(block.cca, part, source.layers[number], source.valid, relative, first, self.config)
                    for part, source, first in parts
                    if part.shape[1]
                ]
                x = x + jnp.concatenate(added, axis=1)
                number += 1
            x = rules.constrain(block.ffw(x), "batch", "tokens", None)
        return self.norm(x), State(past, chunk, valid, hidden, after)

    def _within_window(self, places: jax.Array, begin: jax.Array, slots: int) -> jax.Array:
        """Which of S slots and of the M of the chunk that begins at `begin` the queries at `places` [I] reach."""
        keys = jnp.concatenate([jnp.arange(slots), begin + jnp.arange(self.config.chunk_length)])
        return places[:, None] - keys < self.config.window

    def logits(self, hidden: jax.Array) -> jax.Array:
        """READ of algorithm 1: hidden [..., D] to logits [..., V] float32."""
        kernel = (self.embedding.table if self.head is None else self.head)[...]
        kernel = kernel.astype(compute_dtype(self.config))
        return jnp.einsum("...d,vd->...v", hidden, kernel, preferred_element_type=statistics_dtype(self.config))

    def _cross_attentions(self) -> Iterator[Attention]:
        return (block.cca for block in self.blocks if block.cca is not None)

    def _encode(self, neighbours: jax.Array, hidden: jax.Array, hidden_valid: jax.Array) -> Retrieved:
        """E of one chunk, [B, K, R] tokens and its activations [B, M, D], as every CCA layer sees it."""
        config = self.config
        embedding = self.embedding if self.encoder_embedding is None else self.encoder_embedding
        chosen = neighbours[:, None, :, slice(*config.neighbour_range)]
        memory = self.encoder(embedding(chosen), chosen != config.pad_id, hidden, hidden_valid)
        values, layers = memory.values[:, 0], []
        for cca in self._cross_attentions():
            keys = cca.keys(values)
            if config.cross_positions and config.positions == "rope":
                keys = rotate(keys, _angles(config, jnp.arange(values.shape[-2])))
            flat = [x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in (keys, cca.values(values))]
            layers.append(Stored(jnp.swapaxes(flat[0], -1, -2), flat[1]))
        return Retrieved(layers, memory.valid.reshape(values.shape[0], -1))


def split_incremental(model: Retro) -> tuple[nnx.GraphDef, nnx.State]:
    """The graph and the parameters of `Incremental(model)`; for use inside jit, once a model."""
    graphdef, params = nnx.split(Incremental(model))
    dtype = compute_dtype(model.config)

    def cast(param: nnx.Param) -> nnx.Param:
        value = param[...]
        # Norm scales, the only vectors, are used in the dtype of the statistics.
        return param.replace(value if value.ndim == 1 else value.astype(dtype))

    return graphdef, jax.tree.map(cast, params, is_leaf=lambda node: isinstance(node, nnx.Variable))


def _blocks(model: Retro) -> Iterator[Block]:
    """The decoder's layers in order, each with parameters of its own."""

    def layers(segment: Segment) -> Iterator[Block]:
        for index in range(segment.repeats):
            yield from take(segment.blocks, index)

    for segment in model.decoder.before:
        yield from layers(segment)
    if model.decoder.entry is not None:
        yield model.decoder.entry
    for segment in model.decoder.after:
        yield from layers(segment)


def _extend(
    attention: Attention,
    x: jax.Array,
    past: Stored,
    chunk: Stored,
    mask: jax.Array,
    relative: jax.Array | None,
    slot: jax.Array,
    config: RetroConfig,
) -> tuple[jax.Array, Stored]:
    """Causal self-attention of x [B, I, D] at `slot`: what it adds, and the chunk with its keys and values in it.

    Args:
      mask: [B, I, S + M] bool, of the past and of the chunk.
    """
    x = attention.norm(x)
    keys, values = attention.keys(x), attention.values(x)
    place = slot % config.chunk_length
    angles = shift = None
    if config.positions == "rope":
        angles = _angles(config, slot + jnp.arange(x.shape[1]), config.rope_scaling)
        keys = rotate(keys, angles)
    elif relative is not None:
        # Keys after the query are masked, so their distances need no numbers of their own.
        slots = relative.shape[1]
        shift = Shift(relative, slots - slot - x.shape[1], slots, more=slots, second=slot - place)
    keys = jnp.swapaxes(keys, -1, -2)
    if x.shape[1] == config.chunk_length:
        chunk = Stored(keys, values)
    else:
        # By choice and not by an update in place, which XLA on a CPU would copy the chunk four times for.
        here = jnp.arange(config.chunk_length) == place
        chunk = Stored(jnp.where(here, keys, chunk.keys), jnp.where(here[:, None], values, chunk.values))
    return _attend(attention, x, [past, chunk], mask, shift, angles), chunk


def _cross(
    cca: Attention,
    x: jax.Array,
    stored: Stored,
    valid: jax.Array,
    relative: jax.Array | None,
    first: jax.Array | int,
    config: RetroConfig,
) -> jax.Array:
    """CCA of x [B, I, D], indices `first` and on of the attending chunk (modulo M), on E: what it adds."""
    length, offset = x.shape[1], config.chunk_length - 1
    first = first % config.chunk_length
    angles = None
    if config.cross_positions and config.positions == "rope":
        angles = _angles(config, first + jnp.arange(length) + offset)
    shift = None
    if relative is not None:
        start, stop = config.neighbour_range
        shift = Shift(relative, offset - first - (length - 1), stop - start)
    return _attend(cca, cca.norm(x), [stored], valid[:, None], shift, angles)


class Shift(NamedTuple):
    """Where in a table of distances the ones of some queries and keys are.

    Attributes:
      table: keys of the distances [N, P, H], descending.
      column: the one with the distance of the last query to the first key.
      keys: how many keys have places of their own; further neighbours have the same again.
      more: columns of nothing to add at the end of the table.
      second: where there are two sources of keys, the key of the first that has the place of the second's first.
    """

    table: jax.Array
    column: jax.Array | int
    keys: int
    more: int = 0
    second: jax.Array | int = 0


def _attend(
    attention: Attention,
    x: jax.Array,
    sources: list[Stored],
    mask: jax.Array,
    shift: Shift | None,
    angles: tuple[jax.Array, jax.Array] | None,
) -> jax.Array:
    """Normalised queries x [B, I, D] on stored keys, under one softmax over all of them: [B, I, D] to be added to x.

    Args:
      sources: one or two.
      mask: bool, broadcastable to [B, I, J], J that of the sources together.
      shift: for transformer_xl.
      angles: of the queries, for rope.
    """
    query = attention.queries(x)
    shared = query.shape[0] // sources[0].keys.shape[0]
    if shift is None:
        content = query * attention.scale
        content = content if angles is None else rotate(content, angles)
        if shared > 1:  # heads that share their keys stand as more queries
            content = share(content[:, :, None], shared).reshape(-1, x.shape[0], shared * x.shape[1], content.shape[-1])
            mask = jnp.tile(mask, (1, shared, 1)) if mask.shape[1] > 1 else mask
    else:
        content = attention.biased(query, attention.content_bias)
        products = product("nbih,nph->nbip", attention.biased(query, attention.position_bias), shift.table)
        products = jnp.pad(products, ((0, 0), (0, 0), (0, 0), (0, shift.more)))
        products = jax.lax.dynamic_slice_in_dim(products, shift.column, shift.keys + x.shape[1], axis=-1)
        products = skew(products, shift.keys)
    logits = [product("nbih,nbhj->nbij", content, source.keys, attention.statistics) for source in sources]
    sizes = [each.shape[-1] for each in logits]
    if shift is not None:
        logits[0] += jnp.tile(products, sizes[0] // shift.keys)
        if len(sources) > 1:
            logits[1] += jax.lax.dynamic_slice_in_dim(products, shift.second, sizes[1], axis=-1)
    weights = masked_softmax(jnp.concatenate(logits, axis=-1), mask, (-1,)).astype(attention.compute)
    parts = jnp.split(weights, [sizes[0]], axis=-1)
    mixed = [product("nbij,nbjh->nbih", part, source.values) for part, source in zip(parts, sources, strict=False)]
    mixed = functools.reduce(jnp.add, mixed)
    if shared > 1:
        mixed = unshare(mixed.reshape(*mixed.shape[:2], shared, x.shape[1], -1), shared)[:, :, 0]
    return attention.project(mixed)


def _angles(config: RetroConfig, places: jax.Array, scaling: RopeScaling | None = None) -> tuple[jax.Array, jax.Array]:
    return rotation(places, config.head_size, config.rope_theta, statistics_dtype(config), scaling)
