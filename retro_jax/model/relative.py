"""Relative positions of Transformer-XL (Dai et al. 2019): sinusoids of distances, and products aligned with keys."""

import functools

import jax
import jax.numpy as jnp


def sinusoid(distances: jax.Array, width: int, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """R(delta) = concat(sin(delta w_a), cos(delta w_a)), w_a = 10000^(-2a/D), of distances [..., P]: [..., P, D]
    (Dai et al. 2019)."""
    frequencies = 10_000.0 ** (-jnp.arange(0, width, 2, dtype=dtype) / width)
    angles = distances.astype(dtype)[..., None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


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
