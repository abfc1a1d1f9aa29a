"""Digests of arrays, computed on the devices where they lie and equal on every mesh.

Orbax compresses arrays without a checksum of the content: a flipped bit in a file of a checkpoint would load as other
numbers. The digest of what was saved goes into the checkpoint, the digest of what was loaded is compared with it.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


def digests(arrays: dict[str, jax.Array]) -> dict[str, str]:
    """Eight hex digits for each array; every process gets all of them.

    The digest is the sum, modulo 2^32, of the elements' bits times an odd number made from their position: integer
    arithmetic, so neither the mesh nor the order of summation shows, and any change of one element changes it.

    Args:
      arrays: by name; of any type of 1, 2, 4 or 8 bytes; sharded in any way, over one mesh.
    """
    everywhere = None
    for array in arrays.values():
        if isinstance(array.sharding, NamedSharding):
            everywhere = NamedSharding(array.sharding.mesh, P())
    sums = jax.device_get(_jitted(everywhere)(list(arrays.values())))
    return {name: f"{int(value):08x}" for name, value in zip(arrays, sums, strict=True)}


@functools.cache
def _jitted(out: NamedSharding | None) -> Callable[[list[jax.Array]], jax.Array]:
    """One program for all arrays, whose sums cross the mesh together."""
    return jax.jit(lambda arrays: jnp.stack([_weighted_sum(array) for array in arrays]), out_shardings=out)


def _weighted_sum(array: jax.Array) -> jax.Array:
    bits = _bits(array)
    position = jnp.zeros(bits.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(bits.ndim)):
        position += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * np.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    # Two rounds of a multiplicative hash spread neighbouring positions over all 32 bits.
    weight = position * np.uint32(0x9E3779B1)
    weight = (weight ^ (weight >> 15)) * np.uint32(0x85EBCA77)
    return jnp.sum(bits * ((weight ^ (weight >> 13)) | 1), dtype=jnp.uint32)


def _bits(array: jax.Array) -> jax.Array:
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    words: Any = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[array.dtype.itemsize]
    return jax.lax.bitcast_convert_type(array, words).astype(jnp.uint32)
