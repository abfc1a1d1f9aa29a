"""Which mesh axis splits which logical axis, of parameters and of activations, and the shardings that follow.

Parameters are stored by one map and used by another; the difference is ZeRO-3. `RULES` stores the width of the
residual stream split over fsdp; where a matrix is used, `gather` brings it together (in the compute dtype, so half the
bytes in bfloat16) and sends its gradient back as a sum of which each device keeps its own part.
"""

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Target = str | tuple[str, ...] | None

# Axes of parameters, as they are stored.
RULES: Mapping[str | None, Target] = {
    "vocab": "tensor",
    "embed": "fsdp",
    "encoder_embed": "fsdp",
    "heads": "tensor",
    "head": None,
    "ffw": "tensor",
    "positions": None,
    "rank": None,
    "layers": None,
    None: None,
}

# A matrix may have two axes of one target only when they are named here: the second then stays whole.
YIELDS = {("embed", "encoder_embed"), ("encoder_embed", "embed")}

# Axes of activations, and of parameters where they are used (there the residual width is whole).
ACTIVATIONS: Mapping[str | None, Target] = {
    "batch": ("data", "fsdp"),
    "examples": "data",  # the batch while the width is split over fsdp, in the embedding lookup
    "tokens": "context",
    "chunks": "context",
    "heads": "tensor",
    "ffw": "tensor",
    "vocab": "tensor",
    "width": "fsdp",
    None: None,
}


def partition_spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh) -> P:
    """The partition of one parameter as it is stored.

    Args:
      axes: logical name of each dimension.
      shape: its sizes.
      mesh: the device mesh.

    Returns:
      A PartitionSpec. A dimension that its mesh axis does not divide stays whole, and so do vectors (norm scales): they
      are small, and gathering one costs a round trip.

    Raises:
      ValueError: a logical name without a rule, two that claim one mesh axis, or another number of names than
        dimensions.
    """
    if len(axes) != len(shape):
        raise ValueError(f"{len(axes)} axis names {tuple(axes)} for shape {tuple(shape)}")
    if sum(name != "layers" for name in axes) == 1:
        return P(*(None for _ in axes))
    parts: list[Target] = []
    for place, (name, size) in enumerate(zip(axes, shape, strict=True)):
        if name not in RULES:
            raise ValueError(f"no sharding rule for the logical axis {name!r}")
        target = RULES[name]
        for other in axes[:place]:
            if target is not None and RULES[other] == target and (other, name) not in YIELDS:
                raise ValueError(f"axes {other!r} and {name!r} of {tuple(axes)} both claim the mesh axis {target!r}")
        taken = target in parts
        parts.append(None if target is None or taken or size % mesh.shape[target] else target)
    return P(*parts)


def shardings(axes: Any, shapes: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every array of a tree.

    Args:
      axes: tree of tuples of logical names.
      shapes: tree of the same structure whose leaves have a `shape`.
      mesh: the device mesh.
    """

    def sharding(names: tuple[str | None, ...], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, partition_spec(names, leaf.shape, mesh))

    return jax.tree.map(sharding, axes, shapes, is_leaf=_is_names)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch split over `data` and `fsdp`."""
    return NamedSharding(mesh, P(ACTIVATIONS["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, P())


@contextlib.contextmanager
def use(mesh: Mesh) -> Iterator[None]:
    """Inside a function that jit traces: lets `constrain` and `gather` know the mesh. Without it they do nothing."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield


def axis_size(name: str) -> int:
    """Devices along a mesh axis where `use` is in force, else 1."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape[name]


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Splits an activation by the logical names of its dimensions (`ACTIVATIONS`); an axis that does not divide stays
    whole."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, _activation_spec(axes, x.shape, mesh))


def gather(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """A parameter as it is used: its residual width brought together over fsdp.

    The gradient is constrained to how the parameter is stored, so that it is reduced and scattered at once.

    Args:
      x: the parameter, already in the compute dtype.
      axes: its logical names; a leading "layers" that a scan has taken away may be left in.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return _gather(x, axes[len(axes) - x.ndim :])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    used = tuple(name if name in ACTIVATIONS else None for name in axes)
    return jax.lax.with_sharding_constraint(x, _activation_spec(used, x.shape, jax.sharding.get_abstract_mesh()))


def _gather_forward(x: jax.Array, axes: tuple[str | None, ...]) -> tuple[jax.Array, None]:
    return _gather(x, axes), None


def _gather_backward(axes: tuple[str | None, ...], _: None, cotangent: jax.Array) -> tuple[jax.Array]:
    spec = partition_spec(axes, cotangent.shape, jax.sharding.get_abstract_mesh())
    return (jax.lax.with_sharding_constraint(cotangent, spec),)


_gather.defvjp(_gather_forward, _gather_backward)


def _activation_spec(axes: Sequence[str | None], shape: Sequence[int], mesh: AbstractMesh) -> P:
    parts: list[Target] = []
    for name, size in zip(axes, shape, strict=True):
        target = ACTIVATIONS[name]
        names = (target,) if isinstance(target, str) else target or ()
        parts.append(target if size % math.prod(mesh.shape[axis] for axis in names) == 0 else None)
    return P(*parts)


def _is_names(node: Any) -> bool:
    return isinstance(node, tuple) and all(isinstance(name, str | None) for name in node)
