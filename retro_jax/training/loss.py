"""Cross-entropy over a large vocabulary without holding all its logits."""

import jax
import jax.numpy as jnp

from retro_jax.config import RetroConfig
from retro_jax.parallel import rules


def unscored_labels(model: RetroConfig) -> tuple[int, ...]:
    """Labels without a loss: PAD, and BOS, which nothing predicts, unless it ends documents too."""
    return (model.pad_id,) if model.bos_id == model.eos_id else (model.pad_id, model.bos_id)


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
      [B, T] float32 (float64 for float64 input); NaN for a label beyond the vocabulary.
    """
    vocab, width = kernel.shape
    known = (labels >= 0) & (labels < vocab)
    # Over a mesh with a tensor axis every block takes its share of each device's rows.
    tensor = rules.axis_size("tensor")
    shares = tensor if vocab % tensor == 0 else 1
    share = vocab // shares
    blocks = -(-vocab // block) if block > 0 else 1
    size = -(-share // blocks)
    kernel = kernel.astype(hidden.dtype).reshape(shares, share, width)
    ids = jnp.arange(vocab).reshape(shares, share)
    hidden = rules.constrain(hidden, "batch", "tokens", None)

    def logits_of(rows: jax.Array) -> jax.Array:
        logits = head_logits(hidden, rules.gather(rows, ("vocab", None, "embed")))
        return rules.constrain(logits, "batch", "tokens", "vocab", None)

    def picked_from(logits: jax.Array, ids: jax.Array) -> jax.Array:
        return jnp.where(ids == labels[..., None, None], logits, 0).sum((-2, -1))

    if blocks == 1:
        logits = logits_of(kernel)
        if shares == 1:
            picked = jnp.take_along_axis(logits[:, :, 0], labels[..., None], axis=-1)[..., 0]
        else:
            picked = picked_from(logits, ids)
        return jnp.where(known, jax.nn.logsumexp(logits, axis=(-2, -1)) - picked, jnp.nan)

    def in_blocks(x: jax.Array, filler: int) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, blocks * size - share), *((0, 0),) * (x.ndim - 2)), constant_values=filler)
        return jnp.swapaxes(x.reshape(shares, blocks, size, *x.shape[2:]), 0, 1)

    @jax.checkpoint
    def body(carry: tuple[jax.Array, ...], part: tuple[jax.Array, jax.Array]) -> tuple[tuple[jax.Array, ...], None]:
        maximum, total, picked = carry
        ids, rows = part
        logits = jnp.where(ids >= 0, logits_of(rows), -jnp.inf)
        new_maximum = jnp.maximum(maximum, jax.lax.stop_gradient(logits.max(axis=(-2, -1))))
        exponentials = jnp.exp(logits - new_maximum[..., None, None]).sum(axis=(-2, -1))
        total = total * jnp.exp(maximum - new_maximum) + exponentials
        return (new_maximum, total, picked + picked_from(logits, ids)), None

    zero = jnp.zeros(labels.shape, jnp.promote_types(hidden.dtype, jnp.float32))
    start = (jnp.full_like(zero, -jnp.inf), zero, zero)
    (maximum, total, picked), _ = jax.lax.scan(body, start, (in_blocks(ids, -1), in_blocks(kernel, 0)))
    return jnp.where(known, maximum + jnp.log(total) - picked, jnp.nan)


@jax.custom_vjp
def head_logits(hidden: jax.Array, rows: jax.Array) -> jax.Array:
    """hidden [B, T, D] and rows [S, V, D] of the output head to logits [B, T, S, V], float32 (float64 for float64)."""
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    return jnp.einsum("btd,svd->btsv", hidden, rows, preferred_element_type=dtype)


def _head_forward(hidden: jax.Array, rows: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return head_logits(hidden, rows), (hidden, rows)


def _head_backward(saved: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    # By hand for two reasons: both products are of operands in the compute dtype, where JAX's own would multiply
    # float32 by bfloat16; and the barrier keeps XLA from transposing the cotangent, which is V wide, on a CPU.
    hidden, rows = saved
    cotangent = cotangent.astype(hidden.dtype)
    gradient = jax.lax.optimization_barrier(jnp.einsum("btd,btsv->dsv", hidden, cotangent))
    return jnp.einsum("btsv,svd->btd", cotangent, rows), jnp.moveaxis(gradient, 0, -1)


head_logits.defvjp(_head_forward, _head_backward)


def label_weights(labels: jax.Array, *, unscored: tuple[int, ...], prompt: int = 0) -> jax.Array:
    """[B, T] float32: 0 where the label is one of `unscored` (PAD, BOS), else 1.

    Labels of a prompt, the first `prompt` tokens of the sequence, weigh 0 too. Label t is token t + 1.
    """
    weights = jnp.broadcast_to((jnp.arange(labels.shape[1]) >= prompt - 1).astype(jnp.float32), labels.shape)
    for token in unscored:
        weights = jnp.where(labels == token, 0.0, weights)
    return weights
