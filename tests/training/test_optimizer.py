"""Schedule and weight decay are those of the paper's appendix C.1."""

import jax.numpy as jnp
import numpy as np
import pytest

from retro_jax.config import OptimizerConfig
from retro_jax.errors import UserError
from retro_jax.training.optimizer import create_optimizer, decay_mask, learning_rate


def test_schedule_warms_up_linearly_and_ends_at_a_tenth_of_the_peak():
    schedule = learning_rate(OptimizerConfig(), 10_000)
    assert float(schedule(0)) == pytest.approx(1e-7)
    assert float(schedule(375)) == pytest.approx((1e-7 + 2e-4) / 2, rel=1e-5)
    assert float(schedule(750)) == pytest.approx(2e-4)
    assert float(schedule((750 + 10_000) // 2)) == pytest.approx(1.1e-4, rel=1e-5)
    assert float(schedule(10_000)) == pytest.approx(2e-5)


def test_a_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(UserError, match="warmup_steps 750 must be below steps 700"):
        learning_rate(OptimizerConfig(), 700)


def test_only_matrices_and_embeddings_decay():
    axes = {
        "table": ("vocab", "embed"),
        "query": ("layers", "embed", "heads", "head"),
        "scale": ("layers", "embed"),
        "content_bias": ("layers", "heads", "head"),
        "final_scale": ("embed",),
    }
    assert decay_mask(axes) == {
        "table": True,
        "query": True,
        "scale": False,
        "content_bias": False,
        "final_scale": False,
    }


def test_gradients_are_clipped_by_their_global_norm_before_adam():
    config = OptimizerConfig(warmup_steps=0, weight_decay=0.0, clip_norm=1.0)
    optimizer = create_optimizer(config, 10, {"w": ("embed",)})
    params = {"w": jnp.zeros(2)}
    state = optimizer.init(params)
    _, state = optimizer.update({"w": jnp.asarray([30.0, 40.0])}, state, params)
    np.testing.assert_allclose(state[1].mu["w"], 0.1 * np.asarray([0.6, 0.8]), rtol=1e-6)


def test_decay_pulls_matrices_towards_zero_without_gradients():
    config = OptimizerConfig(warmup_steps=0, peak_learning_rate=0.5, weight_decay=0.1)
    optimizer = create_optimizer(config, 10, {"w": ("embed", "ffw"), "s": ("embed",)})
    params = {"w": jnp.ones((2, 2)), "s": jnp.ones(2)}
    updates, _ = optimizer.update({"w": jnp.zeros((2, 2)), "s": jnp.zeros(2)}, optimizer.init(params), params)
    np.testing.assert_allclose(updates["w"], -0.05, rtol=1e-6)
    np.testing.assert_allclose(updates["s"], 0.0)
