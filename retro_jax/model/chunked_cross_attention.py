"""Chunked cross-attention CCA (paper section 2.4, equation 3, and spec section 3.4)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from retro_jax.config import RetroConfig
from retro_jax.model.attention import Attention
from retro_jax.model.positions import Positions, positions
from retro_jax.model.weights import decoder_stream, encoder_stream


class Memory(NamedTuple):
    """Encoded neighbours: E of algorithm 1, a constant of all CCA layers.

    Attributes:
      values: [B, L, K, R, E], after the encoder's output norm.
      valid: [B, L, K, R] bool, False at PAD.
    """

    values: jax.Array
    valid: jax.Array


def attending_chunks(x: jax.Array, chunk_length: int, num_chunks: int) -> jax.Array:
    """The attending chunks H_u^+, last token of chunk u and first M - 1 of the next: [B, T, D] to [B, L, M, D].

    Position t (0-based) lands in chunk (t + 1) // M - 1 at index (t + 1) % M; the first M - 1 are left out, and what
    the last chunk lacks at the end of the sequence is 0.
    """
    x = x[:, chunk_length - 1 :]
    x = jnp.pad(x, ((0, 0), (0, num_chunks * chunk_length - x.shape[1]), (0, 0)))
    return x.reshape(x.shape[0], num_chunks, chunk_length, x.shape[2])


def positions_of_chunks(chunks: jax.Array, length: int) -> jax.Array:
    """Inverse of `attending_chunks`, with 0 at the first M - 1 positions: [B, L, M, D] to [B, T, D]."""
    batch, num_chunks, chunk_length, width = chunks.shape
    x = chunks.reshape(batch, num_chunks * chunk_length, width)[:, : length - chunk_length + 1]
    return jnp.pad(x, ((0, 0), (chunk_length - 1, 0), (0, 0)))


def cca_positions(config: RetroConfig, neighbour_length: int) -> Positions:
    """Distance i - s + M - 1 of index i in the attending chunk and neighbour token s (paper equation 6, 0-based)."""
    if not config.cross_positions:
        return Positions()
    return positions(
        config,
        query_width=config.width,
        head_size=config.head_size,
        queries=config.chunk_length,
        keys=neighbour_length,
        offset=config.chunk_length - 1,
    )


class ChunkedCrossAttention(Attention):
    """CCA with its norm and residual: each attending chunk on the K*R tokens of its neighbours, one softmax."""

    def __init__(self, config: RetroConfig, key: jax.Array):
        super().__init__(
            config,
            queries=decoder_stream(config),
            source=encoder_stream(config),
            num_heads=config.num_heads,
            head_size=config.head_size,
            num_layers=config.num_layers,
            key=key,
            relative=config.cross_positions,
        )
        self.chunk_length = config.chunk_length

    def __call__(self, x: jax.Array, memory: Memory, where: Positions) -> jax.Array:
        """x [B, T, D] to x + CCA(x, E), T >= M; the identity at the first M - 1 positions and where all is PAD.

        E of fewer chunks than x has is that of the last complete ones; CCA is the identity before them.
        """
        num_chunks, length = memory.values.shape[1], x.shape[1]
        first = (length // self.chunk_length - num_chunks) * self.chunk_length
        chunks = attending_chunks(self.norm(x[:, first:]), self.chunk_length, num_chunks)
        out = self.attend(chunks[:, :, None], memory.values, memory.valid, where)[:, :, 0]
        added = positions_of_chunks(out, length - first)
        return x + (jnp.pad(added, ((0, 0), (first, 0), (0, 0))) if first else added)
