"""Multi-head attention with relative positions: the one core of all four attentions (paper section 2.5, App. B.1.2).

The core sees queries in groups X and keys in groups Y, so that self-attention (X = Y = 1), the encoder's
cross-attention (the K neighbours of a chunk query one chunk: X = K, Y = 1) and chunked cross-attention (one chunk
queries K neighbours under one softmax: X = 1, Y = K) are the same computation. Groups share positions.
Heads lead ([N, B, ...]): the positional product then is one matrix product per head, with nothing to transpose.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from retro_jax.config import RetroConfig
from retro_jax.model.layers import PAPER, Form, RMSNorm, norm_of
from retro_jax.model.positions import Positions
from retro_jax.model.relative import skew
from retro_jax.model.rotary import rotate
from retro_jax.model.weights import (
    Stream,
    compute_dtype,
    linear,
    normal,
    plus,
    product,
    residual_scale,
    statistics_dtype,
    weight,
    zeros,
)
from retro_jax.parallel import rules


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


def causal_mask(queries: jax.Array, keys: int, window: int = 0) -> jax.Array:
    """Which of the keys 0..J-1 the queries at these places [..., I] may see: bool [..., I, 1, J].

    With a window only the last so many, the query's own place included.
    """
    seen = queries[..., None] >= jnp.arange(keys)
    if window:
        seen &= queries[..., None] - jnp.arange(keys) < window
    return seen[..., None, :]


class LowRank(nnx.Module):
    """What LoRA adds to a projection [D, N, H]: up(down(x)) over a rank r, 0 at first (Hu et al. 2021, section 4.1)."""

    def __init__(self, config: RetroConfig, source: Stream, rank: int, heads: tuple[int, int], key: jax.Array):
        dtype = statistics_dtype(config)
        self.down = normal(key, (source.width, rank), (source.axis, "rank"), 1 / math.sqrt(source.width), dtype)
        self.up = zeros((rank, *heads), ("rank", "heads", "head"), dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] to [N, ..., H]."""
        up = weight(self.up, x.dtype)
        added = linear(linear(x, weight(self.down, x.dtype)), up.reshape(up.shape[0], -1))
        return jnp.moveaxis(added.reshape(*x.shape[:-1], *up.shape[1:]), -2, 0)


class Attention(nnx.Module):
    """Projections of one attention and `attend`, shared by the four kinds.

    Parameters: query [D, N, H], key and value [C, N, H], output [N, H, D]; transformer_xl adds relative W_R [D, N, H]
    and the biases content_bias u and position_bias v [N, H], where positions count. A `Form` may have fewer heads of
    keys and values, a bias behind each projection (query_bias [N, H], output_bias [D], …), norms of queries and keys.
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
        form: Form = PAPER,
    ):
        """`num_layers` is the depth of the residual stream that the output adds to; without `relative` there are no
        keys of distances."""
        dtype = statistics_dtype(config)
        heads, pairs = (num_heads, head_size), (form.kv_heads or num_heads, head_size)
        from_queries, from_source = (queries.axis, "heads", "head"), (source.axis, "heads", "head")
        self.compute = compute_dtype(config)
        self.statistics = dtype
        self.scale = 1 / math.sqrt(head_size)
        query, keys, value, output, distances = jax.random.split(key, 5)
        self.window = form.window
        self.norm = norm_of(form, config, queries)
        self.query = normal(query, (queries.width, *heads), from_queries, config.init_scale, dtype)
        self.key = normal(keys, (source.width, *pairs), from_source, config.init_scale, dtype)
        self.value = normal(value, (source.width, *pairs), from_source, config.init_scale, dtype)
        self.output = normal(
            output,
            (*heads, queries.width),
            ("heads", "head", queries.axis),
            residual_scale(config, num_layers),
            dtype,
        )
        biased = {"none": (), "qkv": ("query", "key", "value"), "all": ("query", "key", "value", "output")}
        biased = biased[form.attention_biases]
        self.query_bias, self.key_bias, self.value_bias = (
            zeros(shape, ("heads", "head"), dtype) if name in biased else None
            for name, shape in (("query", heads), ("key", pairs), ("value", pairs))
        )
        self.output_bias = zeros((queries.width,), (queries.axis,), dtype) if "output" in biased else None
        self.query_lora, self.value_lora = (
            LowRank(config, source, form.lora_rank, shape, jax.random.fold_in(key, number)) if form.lora_rank else None
            for number, shape in ((5, heads), (6, pairs))
        )
        of_heads = Stream(head_size, "head")
        self.query_norm, self.key_norm = (RMSNorm(config, of_heads) if form.qk_norm else None for _ in range(2))
        if relative and config.positions != "rope":
            self.relative = normal(distances, (queries.width, *heads), from_queries, config.init_scale, dtype)
            self.content_bias = zeros(heads, ("heads", "head"), dtype)
            self.position_bias = zeros(heads, ("heads", "head"), dtype)

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
        query = checkpoint_name(self.queries(x), "query")
        key = checkpoint_name(self.keys(source), "key")
        value = checkpoint_name(self.values(source), "value")
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
        # Query heads that share their keys are as many more groups of queries.
        shared = query.shape[0] // key.shape[0]
        content = share(content, shared)
        if not causal:
            heads = self._mix(content, position, relative, key, value, valid[..., None, None, :, :])
        elif rules.axis_size("context") == 1:
            heads = self._mix_blocks(content, position, relative, key, value, valid)
        else:
            heads = self._mix_parts(content, position, relative, key, value, valid)
        return self.project(checkpoint_name(unshare(heads, shared), "mixed"))

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
                valid[..., None, None, :, :stop] & causal_mask(jnp.arange(start, stop), stop, self.window),
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
        mask = causal_mask(jnp.arange(length).reshape(parts, -1), length, self.window)
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
        added = plus(linear(heads, output.reshape(-1, output.shape[-1])), self.output_bias)
        return checkpoint_name(added, "added")

    def queries(self, x: jax.Array) -> jax.Array:
        """[..., D] to [N, ..., H]."""
        query = self.heads(x, self.query, self.query_bias)
        query = query if self.query_lora is None else query + self.query_lora(x)
        return query if self.query_norm is None else self.query_norm(query)

    def keys(self, source: jax.Array) -> jax.Array:
        """[..., C] to [N, ..., H], before rotation; N heads of keys and values."""
        key = self.heads(source, self.key, self.key_bias)
        return key if self.key_norm is None else self.key_norm(key)

    def values(self, source: jax.Array) -> jax.Array:
        """[..., C] to [N, ..., H]."""
        value = self.heads(source, self.value, self.value_bias)
        return value if self.value_lora is None else value + self.value_lora(source)

    def heads(self, x: jax.Array, kernel: nnx.Param, bias: nnx.Param | None = None) -> jax.Array:
        """[..., D] to [N, ..., H]."""
        kernel = weight(kernel, self.compute)
        width, *heads = kernel.shape
        each = linear(x, kernel.reshape(width, -1)).reshape(*x.shape[:-1], *heads)
        return jnp.moveaxis(plus(each, bias), -2, 0)

    def biased(self, query: jax.Array, bias: nnx.Param) -> jax.Array:
        """(q + bias) / sqrt(H) of q [N, ..., H]."""
        bias = bias[...].reshape(bias.shape[0], *(1,) * (query.ndim - 2), bias.shape[1])
        return (query + bias.astype(self.compute)) * self.scale


def share(queries: jax.Array, count: int) -> jax.Array:
    """[N, B..., X, I, H] to [N / count, B..., count X, I, H]: heads that follow each other share keys and values."""
    if count == 1:
        return queries
    heads, *batch, groups, length, size = queries.shape
    queries = jnp.moveaxis(queries.reshape(heads // count, count, *batch, groups, length, size), 1, -4)
    return queries.reshape(heads // count, *batch, count * groups, length, size)


def unshare(mixed: jax.Array, count: int) -> jax.Array:
    """Inverse of `share`."""
    if count == 1:
        return mixed
    heads, *batch, groups, length, size = mixed.shape
    mixed = jnp.moveaxis(mixed.reshape(heads, *batch, count, groups // count, length, size), -4, 1)
    return mixed.reshape(heads * count, *batch, groups // count, length, size)


class SelfAttention(Attention):
    """ATTN of paper section 2.4 (causal, decoder) and of the encoder (bidirectional), with its norm and residual."""

    def __init__(
        self,
        config: RetroConfig,
        stream: Stream,
        num_heads: int,
        head_size: int,
        num_layers: int,
        key: jax.Array,
        *,
        relative: bool = True,
        form: Form = PAPER,
    ):
        super().__init__(
            config,
            queries=stream,
            source=stream,
            num_heads=num_heads,
            head_size=head_size,
            num_layers=num_layers,
            key=key,
            relative=relative,
            form=form,
        )

    def __call__(self, x: jax.Array, valid: jax.Array, where: Positions, *, causal: bool) -> jax.Array:
        """x [..., T, D] and valid [..., T] bool to x + attention, [..., T, D]."""
        y = self.norm(x)[..., None, :, :]
        return x + self.attend(y, y, valid[..., None, :], where, causal=causal)[..., 0, :, :]
