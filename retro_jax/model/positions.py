"""Where queries and keys lie: relative or rotary positions of an attention, or learned ones in the decoder's input."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from retro_jax.config import RetroConfig
from retro_jax.model.relative import sinusoid
from retro_jax.model.rotary import rotation
from retro_jax.model.weights import compute_dtype, decoder_stream, normal, statistics_dtype, weight
from retro_jax.parallel import rules


class Positions(NamedTuple):
    """What an attention needs to know about where its queries and keys lie; the same for every layer of a stack.

    With neither, positions do not count (`config.cross_positions`), or stand in the input (`config.positions` learned).

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
      causal: decoder self-attention: only distances >= 0 are needed (I == J, offset 0); halves the positional product.
      parts: C, equal parts that the queries of a causal attention are cut into.
    """
    dtype = statistics_dtype(config)
    if config.positions == "rope":
        # A neighbour is never as far away as contexts are long, so nothing is scaled in cross-attention.
        scaling = config.rope_scaling if causal else None
        at_queries, at_keys = (
            rotation(places, head_size, config.rope_theta, dtype, scaling)
            for places in (jnp.arange(queries) + offset, jnp.arange(keys))
        )
        return Positions(None, (at_queries, at_keys))
    if config.positions == "learned" and causal:
        return Positions()
    # The table ends with a distance that no pair has: skew() needs one column more.
    count = keys + 1 if causal else queries + keys
    if parts > 1:
        last = (jnp.arange(parts) + 1) * (queries // parts) - 1
        distances = rules.constrain(last[:, None] - jnp.arange(count), "tokens", None)
    else:
        distances = (queries - 1 + offset) - jnp.arange(count)
    return Positions(sinusoid(distances, query_width, dtype), None)


class LearnedPositions(nnx.Module):
    """A vector for each place [P, D], added to the decoder's input (GPT-2)."""

    def __init__(self, config: RetroConfig, key: jax.Array):
        stream, shape = decoder_stream(config), (config.max_positions, config.width)
        self.dtype = compute_dtype(config)
        self.table = normal(key, shape, ("positions", stream.axis), config.init_scale, statistics_dtype(config))

    def __call__(self, valid: jax.Array, first: jax.Array | int = 0) -> jax.Array:
        """The vectors of tokens with validity [B, T], [B, T, D]; `first` [B, 1] is the place of each row's first token.

        PAD counts for nothing, so that a row means the same wherever it is padded.
        """
        places = jnp.maximum(first + jnp.cumsum(valid, axis=1) - 1, 0)
        return jnp.take(weight(self.table, self.dtype), places, axis=0, mode="fill")
