"""What a training run carries from step to step, where each array lives, and how it is named on disk."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from retro_jax.config import RetroConfig
from retro_jax.model.retro import Retro
from retro_jax.model.weights import logical_axes
from retro_jax.parallel import rules
from retro_jax.training.health import Health, healthy


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """Steps taken, skipped ones included (int32 scalar), parameters, optimizer state, and how the steps went."""

    step: jax.Array
    params: nnx.State
    opt_state: optax.OptState
    health: Health


@dataclasses.dataclass(frozen=True)
class ModelPlan:
    """A model without numbers: its graph, abstract parameters with their shardings, and logical axes.

    Attributes:
      trained: for each array of `params`, in their order, whether it is trained; None where all are.
    """

    graphdef: nnx.GraphDef
    axes: Any
    params: nnx.State
    trained: tuple[bool, ...] | None = None

    def merge(self, params: nnx.State) -> Retro:
        """The module with these parameters."""
        return nnx.merge(self.graphdef, params)

    def split(self, tree: nnx.State) -> tuple[nnx.State, nnx.State | None]:
        """What is trained of a tree like `params`, and the rest: each with None where the other has an array."""
        return (tree, None) if self.trained is None else _divided(tree, self.trained)

    def join(self, kept: nnx.State, rest: nnx.State | None) -> nnx.State:
        """Inverse of `split`."""
        return kept if rest is None else _joined(kept, rest)


def plan_model(config: RetroConfig, mesh: Mesh, trains: Callable[[tuple[str, ...]], bool] | None = None) -> ModelPlan:
    """Shapes and shardings of a model's parameters, without allocating them.

    Args:
      config: the model.
      mesh: the devices.
      trains: says of the path of a parameter whether it is trained; None where all are.
    """
    model = nnx.eval_shape(lambda: Retro(config, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(model)
    axes = logical_axes(params)
    params = _with_shardings(params, rules.shardings(axes, params, mesh))
    return ModelPlan(graphdef, axes, params, None if trains is None else _chosen(params, trains))


def named_params(plan: ModelPlan) -> dict[str, jax.ShapeDtypeStruct]:
    """The abstract parameters by their path, `decoder.after.0.blocks.0.ffw.up`; stacked layers are one entry."""
    return {".".join(_names(path)): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(plan.params)}


def named_axes(plan: ModelPlan) -> dict[str, tuple[str | None, ...]]:
    """The logical axes of each entry of `named_params`."""
    names = [".".join(_names(path)) for path, _ in jax.tree_util.tree_leaves_with_path(plan.params)]
    return dict(zip(names, jax.tree.leaves(plan.axes, is_leaf=lambda node: isinstance(node, tuple)), strict=True))


def plan_state(plan: ModelPlan, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The abstract train state with shardings; the optimizer's moments lie as their parameters do."""
    everywhere = rules.replicated(mesh)
    kept, _ = plan.split(plan.params)
    opt_state = jax.eval_shape(optimizer.init, kept)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, kept)
    opt_shardings = optax.tree_map_params(
        optimizer, lambda _, sharding: sharding, opt_state, shardings, transform_non_params=lambda _: everywhere
    )
    health = jax.eval_shape(healthy)
    return TrainState(
        jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere),
        plan.params,
        _with_shardings(opt_state, opt_shardings),
        _with_shardings(health, jax.tree.map(lambda _: everywhere, health)),
    )


def initialise(
    config: RetroConfig,
    plan: ModelPlan,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    seed: int,
    draws: Callable[[tuple[str, ...]], bool] = lambda path: True,
) -> TrainState:
    """A fresh state, made directly in its shardings; the same numbers on every mesh.

    Args:
      config: the model.
      plan, optimizer, mesh: of the run.
      seed: of the parameters.
      draws: says of the path of a parameter whether it is made. The others take no memory, and are abstract as in the
        plan.
    """
    drawn = _chosen(plan.params, draws)
    wanted, others = _divided(plan.params, drawn)

    def create() -> TrainState:
        _, params = nnx.split(Retro(config, rngs=nnx.Rngs(seed)))
        opt_state = optimizer.init(plan.split(params)[0])
        return TrainState(jnp.zeros((), jnp.int32), _divided(params, drawn)[0], opt_state, healthy())

    abstract = dataclasses.replace(plan_state(plan, optimizer, mesh), params=wanted)
    state = jax.jit(create, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))()
    return dataclasses.replace(state, params=_joined(state.params, others))


def to_nested_dict(tree: Any) -> dict[str, Any]:
    """Any pytree as nested dicts with string keys: the form on disk."""
    nested: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        *parents, last = _names(path)
        level = nested
        for name in parents:
            level = level.setdefault(name, {})
        level[last] = leaf
    return nested


def from_nested_dict(like: Any, nested: dict[str, Any]) -> Any:
    """The inverse of `to_nested_dict`, into the structure of `like`."""

    def pick(path: tuple[Any, ...], _: Any) -> Any:
        level = nested
        for name in _names(path):
            level = level[name]
        return level

    return jax.tree_util.tree_map_with_path(pick, like)


def _chosen(tree: Any, chooses: Callable[[tuple[str, ...]], bool]) -> tuple[bool, ...]:
    """For each leaf of a tree, in their order, what `chooses` says of its path."""
    return tuple(chooses(tuple(_names(path))) for path, _ in jax.tree_util.tree_leaves_with_path(tree))


def _divided(tree: Any, chosen: tuple[bool, ...]) -> tuple[Any, Any]:
    """The leaves that are chosen, and the others: each tree with None where the other has a leaf."""
    leaves, treedef = jax.tree.flatten(tree)
    kept, rest = (
        treedef.unflatten([leaf if choice is wanted else None for leaf, choice in zip(leaves, chosen, strict=True)])
        for wanted in (True, False)
    )
    return kept, rest


def _joined(kept: Any, rest: Any) -> Any:
    """Inverse of `_divided`."""
    return jax.tree.map(lambda a, b: b if a is None else a, kept, rest, is_leaf=lambda leaf: leaf is None)


def _names(path: tuple[Any, ...]) -> list[str]:
    return [jax.tree_util.keystr((key,), simple=True) for key in path if not _is_variable_value(key)]


def _is_variable_value(key: Any) -> bool:
    """The innermost key of an nnx.Variable leaf says only `.value`; it carries no information."""
    return isinstance(key, jax.tree_util.GetAttrKey) and key.name in ("value", "raw_value", "_raw_value")


def _with_shardings(shapes: Any, shardings: Any) -> Any:
    leaves, treedef = jax.tree.flatten(shapes)
    return jax.tree.unflatten(
        treedef,
        [
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
            for leaf, sharding in zip(leaves, jax.tree.leaves(shardings), strict=True)
        ],
    )
