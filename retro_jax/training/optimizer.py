"""AdamW as the paper trains: linear warm-up, one cosine cycle, decay of matrices only; clipping of gradients."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from retro_jax.config import OptimizerConfig
from retro_jax.errors import UserError


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear from `initial_learning_rate` to the peak over `warmup_steps`, then cosine to the final fraction.

    Raises:
      UserError: the warm-up does not end before the run does.
    """
    if config.warmup_steps >= steps:
        raise UserError(f"optimizer.warmup_steps {config.warmup_steps} must be below steps {steps}")
    return optax.warmup_cosine_decay_schedule(
        init_value=config.initial_learning_rate,
        peak_value=config.peak_learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=steps,
        end_value=config.peak_learning_rate * config.final_fraction,
    )


def decay_mask(axes: Any) -> Any:
    """True for matrices and embedding tables; False for norm scales and the attention biases u and v.

    Args:
      axes: tree of tuples of logical axis names, as `retro_jax.model.logical_axes` returns.
    """

    def decays(names: tuple[str | None, ...]) -> bool:
        own = tuple(name for name in names if name != "layers")
        return len(own) >= 2 and own != ("heads", "head")

    return jax.tree.map(decays, axes, is_leaf=lambda node: isinstance(node, tuple))


def clip_factor(config: OptimizerConfig, norm: jax.Array) -> jax.Array:
    """What gradients of this global norm are multiplied by, so that it is at most `clip_norm` (0: no limit)."""
    return jnp.minimum(1.0, config.clip_norm / norm) if config.clip_norm > 0 else jnp.ones_like(norm)


def create_optimizer(config: OptimizerConfig, steps: int, axes: Any) -> optax.GradientTransformation:
    """The gradient transformation of a run, for gradients that are clipped already; `axes` as in `decay_mask`."""
    return optax.chain(
        _adam(config),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask(axes)),
        optax.scale_by_learning_rate(learning_rate(config, steps)),
    )


def _adam(config: OptimizerConfig) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon)
    if config.moments_dtype == "float32":
        return adam

    def stored(state: optax.ScaleByAdamState, dtype: jnp.dtype) -> optax.ScaleByAdamState:
        cast = functools.partial(jax.tree.map, lambda moment: moment.astype(dtype))
        return state._replace(mu=cast(state.mu), nu=cast(state.nu))

    def init(params: Any) -> optax.ScaleByAdamState:
        return stored(adam.init(params), jnp.dtype(config.moments_dtype))

    def update(gradients: Any, state: optax.ScaleByAdamState, params: Any = None) -> tuple[Any, optax.ScaleByAdamState]:
        updates, state = adam.update(gradients, stored(state, jnp.float32), params)
        return updates, stored(state, jnp.dtype(config.moments_dtype))

    return optax.GradientTransformation(init, update)
