"""Rotary positions (RoPE) and how their frequencies are changed for long contexts."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from retro_jax.config import RopeScaling


@functools.cache
def frequencies(
    head_size: int, theta: float, scaling: RopeScaling | None = None, dtype: str = "float32"
) -> tuple[np.ndarray, float]:
    """Radians per token of the H/2 pairs, descending, and the factor for the length of what is rotated.

    Pair a turns by theta^(-2a/H) (Su et al. 2021, section 3.2.2). In float32 and in this order of operations as torch
    computes them: far from the start a last bit more or less of a frequency shows in the logits.
    """
    number = np.dtype(dtype).type
    plain = number(1) / number(theta) ** (np.arange(0, head_size, 2, dtype=dtype) / number(head_size))
    if scaling is None:
        return plain, 1.0
    slow = plain / scaling.factor
    if scaling.kind == "linear":  # position interpolation (Chen et al. 2023)
        return slow, 1.0
    if scaling.kind == "llama3":
        rotations = scaling.original_length * plain / (2 * math.pi)
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        keep = np.clip((rotations - low) / (high - low), 0, 1)
        return slow * (1 - keep) + plain * keep, 1.0
    # YaRN (Peng et al. 2023, section 3.2): the dimension that makes so many rotations over the original context.
    first, last = (
        head_size * math.log(scaling.original_length / (count * 2 * math.pi)) / (2 * math.log(theta))
        for count in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_size - 1)
    keep = 1 - np.clip((np.arange(head_size // 2) - first) / max(last - first, 1e-3), 0, 1)
    return slow * (1 - keep) + plain * keep, scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1


def rotation(
    places: jax.Array, head_size: int, theta: float, dtype: jnp.dtype, scaling: RopeScaling | None = None
) -> tuple[jax.Array, jax.Array]:
    """(cos, sin) of the rotary angles, each [P, H/2]."""
    each, length = frequencies(head_size, theta, scaling, jnp.dtype(dtype).name)
    angles = places.astype(dtype)[:, None] * jnp.asarray(each, dtype)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return (cos, sin) if length == 1 else (cos * length, sin * length)


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (a, a + H/2) of x [..., P, H] by `angles`; the product of two depends on distance only."""
    cos, sin = angles
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
