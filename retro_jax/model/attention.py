"""Multi-head attention with relative positions: the one core of all four attentions (paper section 2.5, App. B.1.2).

The core sees queries in groups X and keys in groups Y, so that self-attention (X = Y = 1), the encoder's
cross-attention (the K neighbours of a chunk query one chunk: X = K, Y = 1) and chunked cross-attention (one chunk
queries K neighbours under one softmax: X = 1, Y = K) are the same computation. Groups share positions.
Heads lead ([N, B, ...]): the positional product then is one matrix product per head, with nothing to transpose.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from retro_jax.config import RetroConfig
from retro_jax.model.layers import (
    RMSNorm,
    Stream,
    compute_dtype,
    linear,
    normal,
    product,
    residual_scale,
    statistics_dtype,
    weight,
)
from retro_jax.parallel import rules


class Positions(NamedTuple):
    """What an attention needs to know about where its queries and keys lie; the same for every layer of a stack.

    With neither, positions do not count (`config.cross_positions`).

    Attributes:
      sinusoids: transformer_xl: [P, D] vectors of the distinct distances, descending; [C, P, D] when the queries are
        cut into C parts; else None.
      rotations: rope: (cos, sin) of the queries [I, H/2] and (cos, sin) of the keys [J, H/2]; else None.
    """

    sinusoids: jax.Array | None = None
    rotations: tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]] | None = None


def positions(
    config: RetroConfig,
    *,
    query_width: int,
    head_size: int,
    queries: int,
    keys: int,
    offset: int = 0,
    causal: bool = False,
    parts: int = 1,
) -> Positions:
    """Positions of `queries` and `keys` of which query i and key j are `i - j + offset` apart.

    Args:
      config: chooses transformer_xl or rope.
      query_width: D of the query stream, width of the sinusoids (spec: W_R maps from it).
      head_size: H, for rope.
      queries, keys: I and J.
      offset: distance of query 0 and key 0.
      causal: only distances >= 0 are needed (I == J, offset 0); halves the positional product.
      parts: C, equal parts that the queries of a causal attention are cut into.
    """
    dtype = statistics_dtype(config)
    if config.positions == "rope":
        return Positions(
            None,
            (
                rotation(jnp.arange(queries) + offset, head_size, config.rope_theta, dtype),
                rotation(jnp.arange(keys), head_size, config.rope_theta, dtype),
            ),
        )
    # The table ends with a distance that no pair has: skew() needs one column more.
    count = keys + 1 if causal else queries + keys
    if parts > 1:
        last = (jnp.arange(parts) + 1) * (queries // parts) - 1
        distances = rules.constrain(last[:, None] - jnp.arange(count), "tokens", None)
    else:
        distances = (queries - 1 + offset) - jnp.arange(count)
    return Positions(sinusoid(distances, query_width, dtype), None)


def sinusoid(distances: jax.Array, width: int, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """R(delta) = concat(sin(delta w_a), cos(delta w_a)), w_a = 10000^(-2a/D), of distances [..., P]: [..., P, D]
    (Dai et al. 2019)."""
    frequencies = 10_000.0 ** (-jnp.arange(0, width, 2, dtype=dtype) / width)
    angles = distances.astype(dtype)[..., None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def rotation(places: jax.Array, head_size: int, theta: float, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """(cos, sin) of the rotary angles, each [P, H/2]."""
    frequencies = theta ** (-jnp.arange(0, head_size, 2, dtype=dtype) / head_size)
    angles = places.astype(dtype)[:, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (a, a + H/2) of x [..., P, H] by `angles`; the product of two depends on distance only."""
    cos, sin = angles
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def skew(products: jax.Array, keys: int) -> jax.Array:
    """Aligns products with descending distances to keys: out[..., i, j] = products[..., i, j + I - 1 - i].

    Read row after row with a stride one shorter, each row starts one distance later, which is the shift wanted:
    slices and a reshape instead of a gather.

    Args:
      products: [..., I, P]; column p belongs to distance d_0 - p. P is I + J, or J + 1 when causal.
      keys: J.

    Returns:
      [..., I, J]. With P = J + 1 the entries with j > i + (J - I) are meaningless and must be masked.
    """
    return _skew(products, keys, products.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _skew(products: jax.Array, keys: int, distances: int) -> jax.Array:
    *lead, queries, _ = products.shape
    flat = products.reshape(*lead, queries * distances)
    if distances == keys + 1:
        return flat[..., queries - 1 : queries - 1 + queries * keys].reshape(*lead, queries, keys)
    rows = flat[..., : queries * (distances - 1)].reshape(*lead, queries, distances - 1)
    return rows[..., queries - 1 :]


def unskew(logits: jax.Array, distances: int) -> jax.Array:
    """The transpose of `skew`: [..., I, J] to [..., I, P], 0 where `skew` takes nothing."""
    *lead, queries, keys = logits.shape
    zero, whole = jnp.zeros((), logits.dtype), [(0, 0, 0)] * len(lead)
    if distances == keys + 1:
        flat = jax.lax.pad(logits.reshape(*lead, queries * keys), zero, [*whole, (queries - 1, 1, 0)])
    else:
        # The row below makes room for the shorter stride.
        rows = jax.lax.pad(logits, zero, [*whole, (0, 1, 0), (queries - 1, 0, 0)])
        flat = rows.reshape(*lead, -1)[..., : queries * distances]
    return flat.reshape(*lead, queries, distances)


# By hand, for one padding instead of the two that JAX's own transpose takes.
_skew.defvjp(
    lambda products, keys, distances: (_skew(products, keys, distances), None),
    lambda keys, distances, _, cotangent: (unskew(cotangent, distances),),
)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def masked_softmax(logits: jax.Array, mask: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Softmax jointly over `axes` of the entries where `mask`; exactly 0 elsewhere, also where nothing is left.

    Args:
      logits: any shape, float32 or float64; may hold any finite value where masked.
      mask: bool, broadcastable to logits.
      axes: summed over together.
    """
    lowest = jnp.finfo(logits.dtype).min
    logits = jnp.where(mask, logits, lowest)
    # Half the lowest: where nothing is left, the exponentials are 0 and not exp(lowest - lowest).
    top = jnp.maximum(jnp.max(logits, axis=axes, keepdims=True), lowest / 2)
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=axes, keepdims=True)
    return weights / jnp.where(total > 0, total, 1)


@masked_softmax.defjvp
def _masked_softmax_jvp(axes, primals, tangents):
    # By hand, so that the backward pass keeps the probabilities and nothing else.
    probabilities = masked_softmax(*primals, axes)
    product = probabilities * tangents[0]
    return probabilities, product - probabilities * jnp.sum(product, axis=axes, keepdims=True)


def causal_blocks(length: int, smallest: int = 64, most: int = 4) -> list[tuple[int, int]]:
    """Ranges of queries that attend to the keys before their own end only, which spares most of the masked half.

    With four blocks five eighths of the products remain; every block is compiled, so there are not more.
    """
    count = max(1, min(most, length // smallest))
    size = -(-length // count)
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def causal_mask(queries: jax.Array, keys: int) -> jax.Array:
    """Which of the keys 0..J-1 the queries at these places [..., I] may see: bool [..., I, 1, J]."""
    return (queries[..., None] >= jnp.arange(keys))[..., None, :]


class Attention(nnx.Module):
    """Projections of one attention and `attend`, shared by the four kinds.

    Parameters: query [D, N, H], key and value [C, N, H], output [N, H, D]; transformer_xl adds relative W_R [D, N, H]
    and the biases content_bias u and position_bias v [N, H], where positions count.
    """

    def __init__(
        self,
        config: RetroConfig,
        *,
        queries: Stream,
        source: Stream,
        num_heads: int,
        head_size: int,
        num_layers: int,
        key: jax.Array,
        relative: bool = True,
    ):
        """`num_layers` is the depth of the residual stream that the output adds to; without `relative` positions do
        not count."""
        dtype = statistics_dtype(config)
        heads = (num_heads, head_size)
        from_queries, from_source = (queries.axis, "heads", "head"), (source.axis, "heads", "head")
        self.compute = compute_dtype(config)
        self.statistics = dtype
        self.scale = 1 / math.sqrt(head_size)
        query, keys, value, output, distances = jax.random.split(key, 5)
        self.norm = RMSNorm(config, queries)
        self.query = normal(query, (queries.width, *heads), from_queries, config.init_scale, dtype)
        self.key = normal(keys, (source.width, *heads), from_source, config.init_scale, dtype)
        self.value = normal(value, (source.width, *heads), from_source, config.init_scale, dtype)
        self.output = normal(
            output,
            (*heads, queries.width),
            ("heads", "head", queries.axis),
            residual_scale(config, num_layers),
            dtype,
        )
        if relative and config.positions == "transformer_xl":
            self.relative = normal(distances, (queries.width, *heads), from_queries, config.init_scale, dtype)
            self.content_bias = nnx.Param(jnp.zeros(heads, dtype), axes=("heads", "head"))
            self.position_bias = nnx.Param(jnp.zeros(heads, dtype), axes=("heads", "head"))

    def attend(
        self, x: jax.Array, source: jax.Array, valid: jax.Array, where: Positions, *, causal: bool = False
    ) -> jax.Array:
        """Attention of x on source: softmax jointly over all Y*J keys, projected back to the query stream.

        Args:
          x: [B..., X, I, D] normalised queries.
          source: [B..., Y, J, C] normalised keys and values.
          valid: [B..., Y, J] bool, which keys may be seen.
          where: positions of I queries and J keys.
          causal: key j is seen by queries i >= j only.

        Returns:
          [B..., X, I, D]; exactly 0 for a query that may see no key.
        """
        query = checkpoint_name(self.heads(x, self.query), "query")
        key = checkpoint_name(self.heads(source, self.key), "key")
        value = checkpoint_name(self.heads(source, self.value), "value")
        if where.rotations is not None:
            rotate_query, rotate_key = where.rotations
            content, position, relative = rotate(query * self.scale, rotate_query), None, None
            key = rotate(key, rotate_key)
        elif where.sinusoids is None:
            content, position, relative = query * self.scale, None, None
        else:
            content = self.biased(query, self.content_bias)
            position = self.biased(query, self.position_bias)
            relative = checkpoint_name(self.heads(where.sinusoids.astype(self.compute), self.relative), "relative")
        if not causal:
            heads = self._mix(content, position, relative, key, value, valid[..., None, None, :, :])
        elif rules.axis_size("context") == 1:
            heads = self._mix_blocks(content, position, relative, key, value, valid)
        else:
            heads = self._mix_parts(content, position, relative, key, value, valid)
        return self.project(checkpoint_name(heads, "mixed"))

    def _mix_blocks(
        self,
        content: jax.Array,
        position: jax.Array | None,
        relative: jax.Array | None,
        key: jax.Array,
        value: jax.Array,
        valid: jax.Array,
    ) -> jax.Array:
        """Causal: block after block of queries, each on the keys before its own end. Arguments as in `_mix`."""
        mixed = [
            self._mix(
                content[..., start:stop, :],
                None if position is None else position[..., start:stop, :],
                None if relative is None else relative[:, -(stop + 1) :],
                key[..., :stop, :],
                value[..., :stop, :],
                valid[..., None, None, :, :stop] & causal_mask(jnp.arange(start, stop), stop),
            )
            for start, stop in causal_blocks(content.shape[-2])
        ]
        return jnp.concatenate(mixed, axis=-2)

    def _mix_parts(
        self,
        content: jax.Array,
        position: jax.Array | None,
        relative: jax.Array | None,
        key: jax.Array,
        value: jax.Array,
        valid: jax.Array,
    ) -> jax.Array:
        """Causal over a mesh that splits the sequence: each device its own part of the queries, on all keys.

        Arguments as in `_mix`, relative with a second axis C (`positions(parts=C)`).
        """
        parts, length = rules.axis_size("context"), content.shape[-2]
        lead = ("heads", "batch", *(None for _ in content.shape[2:-2]))

        def cut(queries: jax.Array) -> jax.Array:
            queries = queries.reshape(*queries.shape[:-2], parts, length // parts, queries.shape[-1])
            return rules.constrain(jnp.moveaxis(queries, -3, 0), "tokens", *lead, None, None)

        key, value = (rules.constrain(x, *lead, None, None) for x in (key, value))
        mask = causal_mask(jnp.arange(length).reshape(parts, -1), length)
        mask = valid[..., None, None, :, :] & mask.reshape(parts, *(1,) * (valid.ndim - 2), 1, -1, 1, length)
        mixed = jax.vmap(lambda *part: self._mix(*part[:3], key, value, part[3]))(
            cut(content),
            None if position is None else cut(position),
            None if relative is None else jnp.moveaxis(relative, 1, 0),
            mask,
        )
        mixed = rules.constrain(mixed, "tokens", *lead, None, None)
        return jnp.moveaxis(mixed, 0, -3).reshape(content.shape)

    def _mix(
        self,
        content: jax.Array,
        position: jax.Array | None,
        relative: jax.Array | None,
        key: jax.Array,
        value: jax.Array,
        mask: jax.Array,
    ) -> jax.Array:
        """The values' mean under the softmax of one block of queries, [N, B..., X, I, H].

        Args:
          content, position: scaled queries for content and position [N, B..., X, I, H]; position None for rope.
          relative: [N, P, H] keys of the distances, descending.
          key, value: [N, B..., Y, J, H].
          mask: bool, broadcastable to [N, B..., X, I, Y, J].
        """
        logits = product("n...xih,n...yjh->n...xiyj", content, key, self.statistics)
        if position is not None:
            # In the compute dtype: to shift the products is memory traffic alone, the largest on an accelerator.
            logits += skew(product("n...ih,nph->n...ip", position, relative), key.shape[-2])[..., None, :]
        probabilities = masked_softmax(logits, mask, (-2, -1)).astype(self.compute)
        return product("n...xiyj,n...yjh->n...xih", probabilities, value)

    def project(self, heads: jax.Array) -> jax.Array:
        """The heads' means [N, ..., H] to what they add to the query stream, [..., D]."""
        output = weight(self.output, self.compute)
        heads = jnp.moveaxis(heads, 0, -2).reshape(*heads.shape[1:-1], -1)
        return checkpoint_name(linear(heads, output.reshape(-1, output.shape[-1])), "added")

    def heads(self, x: jax.Array, kernel: nnx.Param) -> jax.Array:
        """[..., D] to [N, ..., H]."""
        kernel = weight(kernel, self.compute)
        width, *heads = kernel.shape
        return jnp.moveaxis(linear(x, kernel.reshape(width, -1)).reshape(*x.shape[:-1], *heads), -2, 0)

    def biased(self, query: jax.Array, bias: nnx.Param) -> jax.Array:
        """(q + bias) / sqrt(H) of q [N, ..., H]."""
        bias = bias[...].reshape(bias.shape[0], *(1,) * (query.ndim - 2), bias.shape[1])
        return (query + bias.astype(self.compute)) * self.scale


class SelfAttention(Attention):
    """ATTN of paper section 2.4 (causal, decoder) and of the encoder (bidirectional), with its norm and residual."""

    def __init__(
        self, config: RetroConfig, stream: Stream, num_heads: int, head_size: int, num_layers: int, key: jax.Array
    ):
        super().__init__(
            config,
            queries=stream,
            source=stream,
            num_heads=num_heads,
            head_size=head_size,
            num_layers=num_layers,
            key=key,
        )

    def __call__(self, x: jax.Array, valid: jax.Array, where: Positions, *, causal: bool) -> jax.Array:
        """x [..., T, D] and valid [..., T] bool to x + attention, [..., T, D]."""
        y = self.norm(x)[..., None, :, :]
        return x + self.attend(y, y, valid[..., None, :], where, causal=causal)[..., 0, :, :]
