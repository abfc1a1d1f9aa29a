"""Cross-entropy over a large vocabulary without holding all its logits."""

import jax
import jax.numpy as jnp


def token_nats(hidden: jax.Array, kernel: jax.Array, labels: jax.Array, *, block: int = 0) -> jax.Array:
    """-log p(label) of every position, in nats.

    The vocabulary is walked in blocks with a running maximum and sum, so that the largest intermediate is
    [B, T, block]; the backward pass computes each block's logits again.

    Args:
      hidden: [B, T, D] output of the decoder after its final norm.
      kernel: [V, D] output head.
      labels: [B, T] int32 token ids.
      block: vocabulary rows at a time; 0 or at least V for all at once.

    Returns:
      [B, T] float32 (float64 for float64 input).
    """
    vocab = kernel.shape[0]
    kernel = kernel.astype(hidden.dtype)
    if block <= 0 or block >= vocab:
        logits = _logits(hidden, kernel)
        picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - picked

    blocks = -(-vocab // block)
    padded = jnp.pad(kernel, ((0, blocks * block - vocab), (0, 0))).reshape(blocks, block, -1)

    @jax.checkpoint
    def body(carry: tuple[jax.Array, ...], part: tuple[jax.Array, jax.Array]) -> tuple[tuple[jax.Array, ...], None]:
        maximum, total, picked = carry
        index, rows = part
        logits = _logits(hidden, rows)
        ids = index * block + jnp.arange(block)
        logits = jnp.where(ids < vocab, logits, -jnp.inf)
        new_maximum = jnp.maximum(maximum, jax.lax.stop_gradient(logits.max(axis=-1)))
        total = total * jnp.exp(maximum - new_maximum) + jnp.exp(logits - new_maximum[..., None]).sum(axis=-1)
        local = labels - index * block
        inside = (local >= 0) & (local < block)
        row = jnp.take_along_axis(logits, jnp.clip(local, 0, block - 1)[..., None], axis=-1)[..., 0]
        return (new_maximum, total, jnp.where(inside, row, picked)), None

    zero = jnp.zeros(labels.shape, jnp.promote_types(hidden.dtype, jnp.float32))
    start = (jnp.full_like(zero, -jnp.inf), zero, zero)
    (maximum, total, picked), _ = jax.lax.scan(body, start, (jnp.arange(blocks), padded))
    return maximum + jnp.log(total) - picked


def label_weights(labels: jax.Array, *, unscored: tuple[int, ...]) -> jax.Array:
    """[B, T] float32: 0 where the label is one of `unscored` (PAD, BOS), else 1."""
    weights = jnp.ones(labels.shape, jnp.float32)
    for token in unscored:
        weights = jnp.where(labels == token, 0.0, weights)
    return weights


def _logits(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    return jnp.einsum("btd,vd->btv", hidden, kernel, preferred_element_type=dtype)
