"""A step is bad when it is not finite, or a spike among the losses before it."""

import jax.numpy as jnp
import numpy as np
import pytest

from retro_jax.config import StabilityConfig
from retro_jax.errors import UserError
from retro_jax.training.health import healthy, judge


def judged(losses, norms=None, spike_factor=0.0):
    health, verdicts = healthy(), []
    for loss, norm in zip(losses, norms or [1.0] * len(losses), strict=True):
        bad, health = judge(health, jnp.float32(loss), jnp.float32(norm), StabilityConfig(3, spike_factor))
        verdicts.append(bool(bad))
    return verdicts, health


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_bad(value):
    assert judged([1.0, value, 1.0])[0] == [False, True, False]
    assert judged([1.0, 1.0, 1.0], [1.0, value, 1.0])[0] == [False, True, False]


def test_bad_steps_in_a_row_and_altogether_are_counted():
    verdicts, health = judged([1.0, np.nan, np.nan, 1.0, np.nan])
    assert verdicts == [False, True, True, False, True]
    assert (int(health.bad_in_a_row), int(health.skipped), int(health.good)) == (1, 3, 2)


def test_a_spike_is_bad_once_the_average_has_settled():
    assert not any(judged([1.0] * 19 + [5.0], spike_factor=2.0)[0])
    assert judged([1.0] * 20 + [5.0, 1.9], spike_factor=2.0)[0][-2:] == [True, False]
    assert not any(judged([1.0] * 20 + [5.0])[0])


def test_bad_losses_do_not_move_the_average():
    _, health = judged([2.0] * 20 + [np.nan, 50.0], spike_factor=3.0)
    assert float(health.average) == pytest.approx(2.0)


def test_impossible_settings_are_refused():
    with pytest.raises(UserError, match=r"stability.spike_factor is 0 \(off\) or above 1"):
        StabilityConfig(spike_factor=0.5)
    with pytest.raises(UserError, match="max_bad_steps"):
        StabilityConfig(max_bad_steps=-1)
