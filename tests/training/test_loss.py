"""The blocked cross-entropy is the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retro_jax.training.loss import label_weights, token_nats


def arrays(vocab, seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(2, 5, 6)).astype(np.float32)
    kernel = rng.normal(size=(vocab, 6)).astype(np.float32)
    return hidden, kernel, rng.integers(0, vocab, (2, 5)).astype(np.int32)


def plain(hidden, kernel, labels):
    logits = np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64).T
    return np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, labels[..., None], -1)[..., 0]


@pytest.mark.parametrize("block", [0, 1, 3, 4, 7, 12, 13, 100])
def test_every_block_size_gives_the_plain_cross_entropy(block):
    hidden, kernel, labels = arrays(13)
    np.testing.assert_allclose(
        token_nats(hidden, kernel, labels, block=block), plain(hidden, kernel, labels), rtol=2e-6
    )


def test_gradients_do_not_depend_on_the_block_size():
    hidden, kernel, labels = arrays(13)
    gradient = jax.jit(
        jax.grad(lambda h, k, block: token_nats(h, k, labels, block=block).sum(), argnums=(0, 1)), static_argnums=2
    )
    for blocked, whole in zip(gradient(hidden, kernel, 4), gradient(hidden, kernel, 0), strict=True):
        np.testing.assert_allclose(blocked, whole, rtol=1e-5, atol=1e-6)


def test_large_logits_neither_overflow_nor_lose_the_label():
    hidden = np.full((1, 1, 1), 1000.0, np.float32)
    kernel = np.asarray([[-1.0], [0.0], [1.0]], np.float32)
    nats = token_nats(hidden, kernel, np.asarray([[1]], np.int32), block=2)
    np.testing.assert_allclose(nats, [[1000.0]])


def test_a_uniform_model_costs_the_logarithm_of_the_vocabulary():
    nats = token_nats(jnp.zeros((1, 3, 4)), jnp.ones((10, 4)), jnp.zeros((1, 3), jnp.int32), block=3)
    np.testing.assert_allclose(nats, np.log(10.0), rtol=1e-6)


@pytest.mark.parametrize("block", [0, 4])
def test_a_label_beyond_the_vocabulary_is_not_a_number(block):
    hidden, kernel, labels = arrays(13)
    labels[0, 1], labels[1, 3] = 13, -1
    nats = np.asarray(token_nats(hidden, kernel, labels, block=block))
    assert np.isnan(nats).sum() == 2 and np.isnan(nats[0, 1]) and np.isnan(nats[1, 3])


def test_labels_without_loss_weigh_nothing():
    weights = label_weights(jnp.asarray([[0, 1, 2, 3]]), unscored=(0, 1))
    np.testing.assert_array_equal(weights, [[0, 0, 1, 1]])
