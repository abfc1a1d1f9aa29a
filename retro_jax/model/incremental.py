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

from retro_jax.model.attention import Attention, masked_softmax, rotate, rotation, sinusoid, skew
from retro_jax.model.chunked_cross_attention import cca_positions
from retro_jax.model.decoder import Block, Segment
from retro_jax.model.layers import compute_dtype, product, statistics_dtype
from retro_jax.model.retro import Retro
from retro_jax.parallel import rules


class Stored(NamedTuple):
    """Keys and values that one attention has of what it attends to, each [N, B, Y, J, H] (Y groups of J keys)."""

    keys: jax.Array
    values: jax.Array


class Retrieved(NamedTuple):
    """The encoded neighbours of the last complete chunk: for each CCA layer their keys and values, and which of their
    tokens may be seen, [B, K, R]."""

    layers: list[Stored]
    valid: jax.Array


class State(NamedTuple):
    """What the model keeps of the slots it was fed.

    Attributes:
      past: keys and values of every layer's self-attention, one group of S slots.
      valid: [B, S] bool, False at PAD.
      hidden: [B, M, D], activations after ATTN of layer min(P) in the current chunk: what E is conditioned on.
      retrieved: what CCA attends to; None for RETRO[OFF] and baselines.
    """

    past: list[Stored]
    valid: jax.Array
    hidden: jax.Array
    retrieved: Retrieved | None


class Distances(NamedTuple):
    """Keys of the distances with transformer_xl positions, per layer; empty where positions are rotations or nothing.

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
        table = sinusoid(slots - 1 - jnp.arange(slots), config.width, statistics_dtype(config))
        past = [block.attention.heads(table.astype(compute), block.attention.relative) for block in self.blocks]
        if not config.cross_positions:
            return Distances(past, [])
        start, stop = config.neighbour_range
        table = cca_positions(config, stop - start).sinusoids
        return Distances(past, [cca.heads(table.astype(compute), cca.relative) for cca in self._cross_attentions()])

    def empty(self, batch: int, slots: int, neighbours: int | None) -> State:
        """The state before the first token: B rows of S slots, K neighbours, or None for OFF."""
        config = self.config
        dtype = compute_dtype(config)

        def stored(*groups: int) -> Stored:
            shape = (config.num_heads, batch, *groups, config.head_size)
            zeros = rules.constrain(jnp.zeros(shape, dtype), "heads", "batch", *(None for _ in groups), None)
            return Stored(zeros, zeros)

        retrieved = None
        if neighbours is not None:
            start, stop = config.neighbour_range
            shape = (neighbours, stop - start)
            retrieved = Retrieved([stored(*shape) for _ in config.cca_layers], jnp.zeros((batch, *shape), bool))
        return State(
            [stored(1, slots) for _ in self.blocks],
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
        complete: jax.Array | bool = True,
    ) -> tuple[jax.Array, State]:
        """Feeds the tokens of slots `slot` to `slot + I - 1`, all of one chunk.

        Args:
          distances: of this model and the state's slots.
          state: of the slots before.
          tokens: [B, I] int32.
          slot: int32 scalar.
          neighbours: [B, K, R] int32 of the chunk whose last slot is the last of these; attended to from that slot on
            (two phases: up to ATTN of layer min(P) for these tokens, then the encoder, then the rest). None where the
            chunk goes on, or when nothing is retrieved.
          complete: bool scalar; False: there are neighbours, but the tokens end before the chunk does (the rest is
            PAD), and E stays that of the chunk before.

        Returns:
          [B, I, D] after the final norm, and the state with these slots in it.
        """
        length = tokens.shape[1]
        slots = jnp.arange(state.valid.shape[1])
        valid = jax.lax.dynamic_update_slice(state.valid, tokens != self.config.pad_id, (0, slot))
        mask = valid[:, None] & (slots <= slot + jnp.arange(length)[:, None])
        past = list(state.past)
        x = self.embedding(tokens)

        def attend(x: jax.Array, index: int) -> jax.Array:
            relative = distances.past[index] if distances.past else None
            added, past[index] = _extend(
                self.blocks[index].attention, x, past[index], mask, relative, slot, self.config
            )
            return x + added

        for index in range(self.entry):
            x = rules.constrain(self.blocks[index].ffw(attend(x, index)), "batch", "tokens", None)
        if self.entry == len(self.blocks):
            return self.norm(x), State(past, valid, state.hidden, None)
        x = attend(x, self.entry)
        place = slot % self.config.chunk_length
        hidden = jax.lax.dynamic_update_slice(state.hidden, x, (0, place, 0))
        before = after = state.retrieved
        if neighbours is not None:
            seen = jax.lax.dynamic_slice_in_dim(valid, slot - place, self.config.chunk_length, axis=1)
            encode = functools.partial(self._encode, neighbours, hidden, seen)
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
        return self.norm(x), State(past, valid, hidden, after)

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
            keys = cca.heads(values, cca.key)
            if config.cross_positions and config.positions == "rope":
                keys = rotate(keys, _angles(config, jnp.arange(values.shape[-2])))
            layers.append(Stored(keys, cca.heads(values, cca.value)))
        return Retrieved(layers, memory.valid[:, 0])


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
        graphdef, stacked = nnx.split(segment.blocks)
        for index in range(segment.repeats):
            one = jax.tree.map(
                lambda param: param.replace(param[index], axes=param.axes[1:]),  # noqa: B023 (used at once)
                stacked,
                is_leaf=lambda node: isinstance(node, nnx.Variable),
            )
            yield from nnx.merge(graphdef, one)

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
    mask: jax.Array,
    relative: jax.Array | None,
    slot: jax.Array,
    config,
) -> tuple[jax.Array, Stored]:
    """Causal self-attention of x [B, I, D] at `slot` on all slots up to each: what it adds, and the longer past."""
    x = attention.norm(x)
    keys, values = attention.heads(x, attention.key), attention.heads(x, attention.value)
    angles = None
    if config.positions == "rope":
        angles = _angles(config, slot + jnp.arange(x.shape[1]))
        keys = rotate(keys, angles)
    at = (0, 0, 0, slot, 0)
    past = Stored(
        jax.lax.dynamic_update_slice(past.keys, keys[:, :, None], at),
        jax.lax.dynamic_update_slice(past.values, values[:, :, None], at),
    )
    if relative is not None:
        # Keys after the query are masked, so their distances need no numbers of their own.
        shift = relative.shape[1] - slot - x.shape[1]
        return _attend(attention, x, past, mask[:, :, None], (relative, shift, relative.shape[1]), None), past
    return _attend(attention, x, past, mask[:, :, None], None, angles), past


def _cross(
    cca: Attention,
    x: jax.Array,
    stored: Stored,
    valid: jax.Array,
    relative: jax.Array | None,
    first: jax.Array | int,
    config,
) -> jax.Array:
    """CCA of x [B, I, D], indices `first` and on of the attending chunk (modulo M), on E: what it adds."""
    length, offset = x.shape[1], config.chunk_length - 1
    first = first % config.chunk_length
    angles = None
    if config.cross_positions and config.positions == "rope":
        angles = _angles(config, first + jnp.arange(length) + offset)
    shift = None if relative is None else (relative, offset - first - (length - 1), 0)
    return _attend(cca, cca.norm(x), stored, valid[:, None], shift, angles)


def _attend(
    attention: Attention,
    x: jax.Array,
    stored: Stored,
    mask: jax.Array,
    relative: tuple[jax.Array, jax.Array | int, int] | None,
    angles: tuple[jax.Array, jax.Array] | None,
) -> jax.Array:
    """Normalised queries x [B, I, D] on stored keys, under one softmax over Y and J: [B, I, D] to be added to x.

    Args:
      mask: bool, broadcastable to [B, I, Y, J].
      relative: keys of distances [N, P, H], descending; the column that holds the distance of the last query to the
        first key; how many columns of nothing to add at their end.
      angles: of the queries, for rope.
    """
    query = attention.heads(x, attention.query)
    keys = stored.keys.shape[-2]
    position = None
    if relative is not None:
        content = attention.biased(query, attention.content_bias)
        position = attention.biased(query, attention.position_bias)
    else:
        content = query * attention.scale
        content = content if angles is None else rotate(content, angles)
    logits = product("nbih,nbyjh->nbiyj", content, stored.keys, attention.statistics)
    if position is not None:
        table, column, more = relative
        products = product("nbih,nph->nbip", position, table)
        products = jnp.pad(products, ((0, 0), (0, 0), (0, 0), (0, more)))
        products = jax.lax.dynamic_slice_in_dim(products, column, keys + x.shape[1], axis=-1)
        logits += skew(products, keys)[..., None, :]
    probabilities = masked_softmax(logits, mask, (-2, -1)).astype(attention.compute)
    return attention.project(product("nbiyj,nbyjh->nbih", probabilities, stored.values))


def _angles(config, places: jax.Array) -> tuple[jax.Array, jax.Array]:
    return rotation(places, config.head_size, config.rope_theta, statistics_dtype(config))
