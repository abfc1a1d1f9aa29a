"""RETRO: embedding, decoder with chunked cross-attention, neighbour encoder and output head (paper algorithm 1)."""

import jax
import jax.numpy as jnp
from flax import nnx

from retro_jax.config import RetroConfig
from retro_jax.errors import UserError
from retro_jax.model.chunked_cross_attention import Memory
from retro_jax.model.decoder import Decoder
from retro_jax.model.encoder import Encoder
from retro_jax.model.layers import Embedding
from retro_jax.model.positions import LearnedPositions
from retro_jax.model.weights import (
    compute_dtype,
    decoder_stream,
    encoder_stream,
    normal,
    require_dtype,
    statistics_dtype,
)


class Retro(nnx.Module):
    """The retrieval-enhanced transformer; with `config.cca_layers == ()` the plain baseline.

    Used functionally: `graphdef, params = nnx.split(Retro(config))`, and inside `jax.jit`
    `nnx.merge(graphdef, params)(tokens, neighbours)`.

    In all methods
      tokens: [B, T] int32. T need not be a multiple of M: chunks are counted from the left, and an incomplete last
        chunk has no neighbours.
      neighbours: [B, T // M, K, R] int32, for each complete chunk K neighbours with their continuations; any K, any R.
        None is RETRO[OFF]: encoder and every CCA are skipped.
    PAD (config.pad_id) is seen by nothing, neither in tokens nor in neighbours; a chunk whose neighbours are all PAD is
    as if it had none.
    """

    def __init__(self, config: RetroConfig, rngs: nnx.Rngs | None = None):
        """`rngs` (default seed 0) only draws the initial parameters; nothing random stays in the model."""
        require_dtype(config)
        rngs = nnx.Rngs(0) if rngs is None else rngs
        keys = jax.random.split(rngs.params(), 5)
        self.config = config
        self.embedding = Embedding(config, decoder_stream(config), keys[0])
        learned = config.positions == "learned"
        self.positions = LearnedPositions(config, jax.random.fold_in(keys[0], 1)) if learned else None
        self.decoder = Decoder(config, keys[1])
        self.encoder = None if config.is_baseline else Encoder(config, keys[2])
        separate = not (config.is_baseline or config.share_embeddings)
        self.encoder_embedding = Embedding(config, encoder_stream(config), keys[3]) if separate else None
        shape, axes = (config.vocab_size, config.width), ("vocab", "embed")
        self.head = (
            None if config.tie_embeddings else normal(keys[4], shape, axes, config.init_scale, statistics_dtype(config))
        )

    def __call__(self, tokens: jax.Array, neighbours: jax.Array | None = None) -> jax.Array:
        """Logits of the next token, [B, T, V] float32."""
        return self.logits(self.hidden(tokens, neighbours))

    def hidden(self, tokens: jax.Array, neighbours: jax.Array | None = None, *, last_chunks: bool = False) -> jax.Array:
        """What the output head reads: [B, T, D] after the final norm, in the compute dtype.

        With `last_chunks` neighbours may be [B, C, K, R] with any C up to T // M: those of the last C complete chunks.
        The chunks before have none, and cost nothing.
        """
        self._check(tokens, neighbours, last_chunks)
        context = self.decoder.context(tokens != self.config.pad_id)
        x = self.decoder.enter(self._embed(tokens, context.valid), context)
        return self.decoder.leave(x, context, self._encode(x, context.valid, neighbours))

    def encode(self, tokens: jax.Array, neighbours: jax.Array) -> Memory | None:
        """The encoded neighbours E that every CCA attends to; None when there is nothing to attend to."""
        self._check(tokens, neighbours)
        context = self.decoder.context(tokens != self.config.pad_id)
        x = self.decoder.enter(self._embed(tokens, context.valid), context)
        return self._encode(x, context.valid, neighbours)

    def head_kernel(self) -> jax.Array:
        """[V, D] in the parameters' dtype: the embedding table when tied. For a loss over blocks of the vocabulary."""
        return self.embedding.table[...] if self.head is None else self.head[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """READ of algorithm 1: hidden [..., D] to logits [..., V] float32."""
        kernel = self.head_kernel().astype(compute_dtype(self.config))
        return jnp.einsum("...d,vd->...v", hidden, kernel, preferred_element_type=statistics_dtype(self.config))

    def _embed(self, tokens: jax.Array, valid: jax.Array) -> jax.Array:
        x = self.embedding(tokens)
        return x if self.positions is None else x + self.positions(valid)

    def _encode(self, x: jax.Array, valid: jax.Array, neighbours: jax.Array | None) -> Memory | None:
        if neighbours is None or neighbours.size == 0:  # no complete chunk, or k = 0
            return None
        embedding = self.embedding if self.encoder_embedding is None else self.encoder_embedding
        if self.config.neighbour_part != "both":
            neighbours = neighbours[..., slice(*self.config.neighbour_range)]
        first = (x.shape[1] // self.config.chunk_length - neighbours.shape[1]) * self.config.chunk_length
        return self.encoder(embedding(neighbours), neighbours != self.config.pad_id, x[:, first:], valid[:, first:])

    def _check(self, tokens: jax.Array, neighbours: jax.Array | None, last_chunks: bool = False) -> None:
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise UserError(f"tokens must be integers [B, T], are {tokens.dtype} {tuple(tokens.shape)}")
        if self.config.max_positions and tokens.shape[1] > self.config.max_positions:
            raise UserError(
                f"tokens {tuple(tokens.shape)} are more than the model's {self.config.max_positions} learned positions"
            )
        if neighbours is None:
            return
        if self.config.is_baseline:
            raise UserError(
                f"a baseline (cca_layers = ()) takes no neighbours; got neighbours {tuple(neighbours.shape)}"
            )
        length, m = tokens.shape[1], self.config.chunk_length
        expected = (tokens.shape[0], length // m)
        if last_chunks and neighbours.ndim == 4:
            expected = (tokens.shape[0], min(neighbours.shape[1], length // m))
        if neighbours.ndim != 4 or tuple(neighbours.shape[:2]) != expected:
            raise UserError(
                f"neighbours {tuple(neighbours.shape)} do not fit tokens {tuple(tokens.shape)}: "
                f"with chunks of {m} they must be [{expected[0]}, {expected[1]}, K, R]"
            )
        if not jnp.issubdtype(neighbours.dtype, jnp.integer):
            raise UserError(f"neighbours must be integers, are {neighbours.dtype}")
