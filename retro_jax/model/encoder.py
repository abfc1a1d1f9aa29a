"""The neighbour encoder, conditioned on the retrieving chunk (paper algorithm 1, ENCODER; section 2.4)."""

import jax
from flax import nnx

from retro_jax.config import RetroConfig
from retro_jax.model.attention import Attention, SelfAttention
from retro_jax.model.chunked_cross_attention import Memory
from retro_jax.model.layers import FeedForward, RMSNorm, remat
from retro_jax.model.positions import Positions, positions
from retro_jax.model.weights import decoder_stream, encoder_stream, stacked, take
from retro_jax.parallel import rules


class ConditioningAttention(Attention):
    """CA_enc: the R tokens of each neighbour on the M activations H_u of the chunk that retrieved it."""

    def __init__(self, config: RetroConfig, key: jax.Array):
        super().__init__(
            config,
            queries=encoder_stream(config),
            source=decoder_stream(config),
            num_heads=config.encoder_num_heads,
            head_size=config.encoder_head_size,
            num_layers=config.encoder_layers,
            key=key,
            relative=config.cross_positions,
        )
        self.source_norm = RMSNorm(config, decoder_stream(config))

    def __call__(self, x: jax.Array, chunks: jax.Array, valid: jax.Array, where: Positions) -> jax.Array:
        """x [B, L, K, R, E], chunks H_u [B, L, M, D] with valid [B, L, M], to x + CA_enc(x, H_u)."""
        return x + self.attend(self.norm(x), self.source_norm(chunks)[:, :, None], valid[:, :, None], where)


class EncoderLayer(nnx.Module):
    """ATTN_enc, then CA_enc in the layers of P_enc, then FFW_enc."""

    def __init__(self, attention: SelfAttention, ca: ConditioningAttention | None, ffw: FeedForward):
        self.attention = attention
        self.ca = ca
        self.ffw = ffw

    def __call__(
        self,
        x: jax.Array,
        valid: jax.Array,
        chunks: jax.Array,
        chunks_valid: jax.Array,
        where: tuple[Positions, Positions],
    ) -> jax.Array:
        x = self.attention(x, valid, where[0], causal=False)
        if self.ca is not None:
            x = self.ca(x, chunks, chunks_valid, where[1])
        return self.ffw(x)


class Encoder(nnx.Module):
    """Encodes every neighbour by itself, with the activations of its retrieving chunk in view."""

    def __init__(self, config: RetroConfig, key: jax.Array):
        stream, depth, conditioned = encoder_stream(config), config.encoder_layers, config.encoder_ca_layers
        heads = (config.encoder_num_heads, config.encoder_head_size)
        keys = jax.random.split(key, 3)
        attention = stacked(lambda key: SelfAttention(config, stream, *heads, depth, key), keys[0], depth)
        ffw = stacked(lambda key: FeedForward(config, stream, config.encoder_ffw_width, depth, key), keys[1], depth)
        ca = stacked(lambda key: ConditioningAttention(config, key), keys[2], len(conditioned)) if conditioned else None

        def layer(number: int) -> EncoderLayer:
            own = take(ca, conditioned.index(number)) if number in conditioned else None
            return EncoderLayer(take(attention, number - 1), own, take(ffw, number - 1))

        self.config = config
        self.layers = nnx.List([layer(number) for number in range(1, depth + 1)])
        self.norm = RMSNorm(config, encoder_stream(config))

    def __call__(self, x: jax.Array, valid: jax.Array, hidden: jax.Array, hidden_valid: jax.Array) -> Memory:
        """Algorithm 1, lines 1 to 4.

        Args:
          x: [B, L, K, R, E] embedded neighbours.
          valid: [B, L, K, R] bool, False at PAD.
          hidden: H [B, T, D], decoder activations after ATTN of layer min(P); L = T // M.
          hidden_valid: [B, T] bool, False at PAD.
        """
        config = self.config
        batch, num_chunks, _, length, _ = x.shape
        complete = num_chunks * config.chunk_length
        chunks = hidden[:, :complete].reshape(batch, num_chunks, config.chunk_length, hidden.shape[-1])
        chunks_valid = hidden_valid[:, :complete].reshape(batch, num_chunks, config.chunk_length)
        where = (
            encoder_positions(config, length, keys=length),
            encoder_positions(config, length, keys=config.chunk_length) if config.cross_positions else Positions(),
        )
        for layer in self.layers:
            x = remat(config, layer)(x, valid, chunks, chunks_valid, where)
            x = rules.constrain(x, "batch", "chunks", None, None, None)
        return Memory(self.norm(x), valid)


def encoder_positions(config: RetroConfig, neighbour_length: int, *, keys: int) -> Positions:
    """Distance s - j of neighbour token s and key j: in self-attention, and in CA_enc (paper equation 7, 0-based)."""
    return positions(
        config,
        query_width=config.encoder_width,
        head_size=config.encoder_head_size,
        queries=neighbour_length,
        keys=keys,
    )
