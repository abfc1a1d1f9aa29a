"""One optimizer step, jitted, with the state donated."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from retro_jax.config import TrainConfig
from retro_jax.parallel import rules
from retro_jax.training.loss import label_weights, token_nats
from retro_jax.training.state import ModelPlan, TrainState

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
      [B, L, K, R] int32, both split over the batch axes. Metrics are float32 scalars: `loss` in nats per scored
      token, `tokens` scored, `gradient_norm` before clipping.
    """

    def loss(params: object, batch: Batch) -> tuple[jax.Array, jax.Array]:
        model = plan.merge(params)
        inputs, labels = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
        hidden = model.hidden(inputs, batch.get("neighbours"))
        weights = label_weights(labels, unscored=unscored)
        nats = token_nats(hidden, model.head_kernel(), labels, block=config.vocab_block)
        count = weights.sum()
        return (nats * weights).sum() / jnp.maximum(count, 1.0), count

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        (value, count), gradients = jax.value_and_grad(loss, has_aux=True)(state.params, batch)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": value, "tokens": count, "gradient_norm": optax.global_norm(gradients)}
        return TrainState(state.step + 1, params, opt_state), metrics

    return jax.jit(step, donate_argnums=0, in_shardings=(None, rules.batch_sharding(mesh)))
