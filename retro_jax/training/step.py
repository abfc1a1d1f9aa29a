"""One optimizer step, jitted, with the state donated."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from retro_jax.config import TrainConfig
from retro_jax.parallel import rules
from retro_jax.training.health import judge
from retro_jax.training.loss import label_weights, token_nats
from retro_jax.training.optimizer import clip_factor
from retro_jax.training.state import ModelPlan, TrainState, plan_state

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def make_train_step(
    config: TrainConfig,
    plan: ModelPlan,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    unscored: tuple[int, ...],
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The function (state, batch) -> (state, metrics) of a run.

    Args:
      config: the run.
      plan: its model.
      optimizer: its gradient transformation.
      mesh: its devices.
      unscored: labels that carry no loss: PAD, and BOS, which nothing predicts.

    Returns:
      A jitted function. `batch` has tokens [B, T+1] int32 and, unless the model is a baseline, neighbours
      [B, L, K, R] int32 (with `data.prompt` [B, T] and [B, 1, K, R]), both split over the batch axes. Metrics are
      float32 scalars: `loss` in nats per scored token, `tokens` scored, `gradient_norm` before clipping, `bad` 1 when
      the step was skipped, `bad_in_a_row` and `skipped` so far, this step included.

    A batch of several micro-batches is computed in as many parts, whose sums of nats, of weights and of gradients are
    divided once, at the end.
    """

    def nats(params: nnx.State, batch: Batch) -> tuple[jax.Array, jax.Array]:
        with rules.use(mesh):
            model = plan.merge(params)
            inputs, labels = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
            neighbours = batch.get("neighbours") if config.cca_gate else None
            hidden = model.hidden(inputs, neighbours, last_chunks=config.data.prompt > 0)
            weights = label_weights(labels, unscored=unscored, prompt=config.data.unscored_prompt)
            each = token_nats(hidden, model.head_kernel(), labels, block=config.vocab_block)
            # A label that is PAD may have no row in the head, and no number then.
            return jnp.where(weights > 0, each * weights, 0).sum(), weights.sum()

    def sums(params: nnx.State, batch: Batch) -> tuple[jax.Array, jax.Array, nnx.State]:
        trained, frozen = plan.split(params)
        with_frozen = lambda trained, batch: nats(plan.join(trained, frozen), batch)  # noqa: E731
        (total, count), gradients = jax.value_and_grad(with_frozen, has_aux=True)(trained, batch)
        return total, count, jax.lax.with_sharding_constraint(gradients, shardings)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if config.microbatches == 1:
            total, count, gradients = sums(state.params, batch)
        else:
            parts = {name: _micro(array, config.microbatches) for name, array in batch.items()}

            def add(so_far: tuple, part: Batch) -> tuple[tuple, None]:
                return jax.tree.map(jnp.add, so_far, sums(state.params, part)), None

            zero = jnp.zeros((), jnp.float32)
            none = jax.tree.map(jnp.zeros_like, plan.split(state.params)[0])
            none = jax.lax.with_sharding_constraint(none, shardings)
            (total, count, gradients), _ = jax.lax.scan(add, (zero, zero, none), parts)
        count = jnp.maximum(count, 1.0)
        loss, norm = total / count, optax.global_norm(gradients) / count
        bad, health = judge(state.health, loss, norm, config.stability)
        factor = clip_factor(config.optimizer, norm) / count

        trained, frozen = plan.split(state.params)

        # A branch, and not a choice number by number, for which XLA would keep parameters and moments twice.
        def update(gradients: nnx.State, opt_state: Any, params: nnx.State) -> tuple[nnx.State, Any]:
            gradients = jax.tree.map(lambda gradient: gradient * factor, gradients)
            updates, opt_state = optimizer.update(gradients, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        def keep(gradients: nnx.State, opt_state: Any, params: nnx.State) -> tuple[nnx.State, Any]:
            return params, opt_state

        params, opt_state = jax.lax.cond(bad, keep, update, gradients, state.opt_state, trained)
        metrics = {
            "loss": loss,
            "tokens": count,
            "gradient_norm": norm,
            "bad": bad,
            "bad_in_a_row": health.bad_in_a_row,
            "skipped": health.skipped,
        }
        metrics = {name: value.astype(jnp.float32) for name, value in metrics.items()}
        return TrainState(state.step + 1, plan.join(params, frozen), opt_state, health), metrics

    shardings = jax.tree.map(lambda leaf: leaf.sharding, plan.split(plan.params)[0])
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, plan_state(plan, optimizer, mesh))
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(state_shardings, rules.batch_sharding(mesh)),
        out_shardings=(state_shardings, rules.replicated(mesh)),
    )


def _micro(array: jax.Array, count: int) -> jax.Array:
    """[B, ...] to [count, B / count, ...]. Row r goes to part r % count, so that every device keeps its own rows."""
    return jnp.swapaxes(array.reshape(-1, count, *array.shape[1:]), 0, 1)
