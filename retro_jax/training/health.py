"""Whether a step went wrong: judged on the device, so that a bad step is skipped without waiting for the host."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from retro_jax.config import StabilityConfig

# Good steps before a loss can be called a spike, and how slowly their running average moves.
_SETTLED = 20
_DECAY = 0.98


class Health(NamedTuple):
    """Of the steps so far, int32 and float32 scalars.

    Attributes:
      bad_in_a_row: bad steps since the last good one.
      skipped: bad steps altogether.
      good: good steps altogether.
      average: running average of their losses, nats per token.
    """

    bad_in_a_row: jax.Array
    skipped: jax.Array
    good: jax.Array
    average: jax.Array


def healthy() -> Health:
    """Before the first step."""
    zero = jnp.zeros((), jnp.int32)
    return Health(zero, zero, zero, jnp.zeros((), jnp.float32))


def judge(
    health: Health, loss: jax.Array, gradient_norm: jax.Array, config: StabilityConfig
) -> tuple[jax.Array, Health]:
    """Whether a step with this loss and gradient norm is bad (bool scalar), and the health after it."""
    bad = ~(jnp.isfinite(loss) & jnp.isfinite(gradient_norm))
    if config.spike_factor:
        bad |= (health.good >= _SETTLED) & (loss > config.spike_factor * health.average)
    loss = loss.astype(jnp.float32)
    average = jnp.where(health.good == 0, loss, _DECAY * health.average + (1 - _DECAY) * loss)
    after = Health(
        jnp.where(bad, health.bad_in_a_row + 1, 0),
        health.skipped + bad,
        health.good + ~bad,
        jnp.where(bad, health.average, average),
    )
    return bad, after
