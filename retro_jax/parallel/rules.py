"""Which mesh axis splits which logical axis of a parameter, and the shardings that follow."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# Axes of parameters. ZeRO-3: the width of the residual stream is split over fsdp and gathered where it is used.
RULES: Mapping[str | None, str | None] = {
    "vocab": "tensor",
    "embed": "fsdp",
    "encoder_embed": "fsdp",
    "heads": "tensor",
    "head": None,
    "ffw": "tensor",
    "layers": None,
    None: None,
}

# The batch axis of every activation and input.
BATCH = P(("data", "fsdp"))


def partition_spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> P:
    """The partition of one parameter.

    Args:
      axes: logical name of each dimension.
      shape: its sizes.
      mesh: the device mesh.

    Returns:
      A PartitionSpec. A dimension that its mesh axis does not divide stays whole, and so does the second dimension
      that claims a mesh axis which is taken (a matrix from `embed` to `encoder_embed`).

    Raises:
      ValueError: a logical name without a rule, or another number of names than dimensions.
    """
    if len(axes) != len(shape):
        raise ValueError(f"{len(axes)} axis names {tuple(axes)} for shape {tuple(shape)}")
    parts: list[str | None] = []
    for name, size in zip(axes, shape, strict=True):
        if name not in RULES:
            raise ValueError(f"no sharding rule for the logical axis {name!r}")
        target = RULES[name]
        parts.append(target if target and target not in parts and size % mesh.shape[target] == 0 else None)
    return P(*parts)


def shardings(axes: Any, shapes: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every array of a tree.

    Args:
      axes: tree of tuples of logical names.
      shapes: tree of the same structure whose leaves have a `shape`.
      mesh: the device mesh.
    """
    return jax.tree.map(
        lambda names, leaf: NamedSharding(mesh, partition_spec(names, leaf.shape, mesh)),
        axes,
        shapes,
        is_leaf=lambda node: isinstance(node, tuple) and all(isinstance(name, str | None) for name in node),
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch split over `data` and `fsdp`."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, P())
