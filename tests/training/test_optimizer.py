"""Schedule and weight decay are those of the paper's appendix C.1."""

import jax.numpy as jnp
import numpy as np
import pytest

from retro_jax.config import OptimizerConfig
from retro_jax.errors import UserError
from retro_jax.training.optimizer import clip_factor, create_optimizer, decay_mask, learning_rate


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


@pytest.mark.parametrize(
    ("clip_norm", "norm", "factor"), [(1.0, 50.0, 0.02), (1.0, 0.5, 1.0), (1.0, 0.0, 1.0), (0, 50.0, 1.0)]
)
def test_gradients_are_scaled_down_to_the_global_norm_that_is_allowed(clip_norm, norm, factor):
    assert float(clip_factor(OptimizerConfig(clip_norm=clip_norm), jnp.asarray(norm))) == pytest.approx(factor)


def test_decay_pulls_matrices_towards_zero_without_gradients():
    config = OptimizerConfig(warmup_steps=0, peak_learning_rate=0.5, weight_decay=0.1)
    optimizer = create_optimizer(config, 10, {"w": ("embed", "ffw"), "s": ("embed",)})
    params = {"w": jnp.ones((2, 2)), "s": jnp.ones(2)}
    updates, _ = optimizer.update({"w": jnp.zeros((2, 2)), "s": jnp.zeros(2)}, optimizer.init(params), params)
    np.testing.assert_allclose(updates["w"], -0.05, rtol=1e-6)
    np.testing.assert_allclose(updates["s"], 0.0)
