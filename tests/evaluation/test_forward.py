"""What a model gives for rows of tokens: losses, states, and the most probable tokens by blocks of the vocabulary."""

import jax
import numpy as np
import pytest
from flax import nnx
from small_run import MODEL

from retro_jax.config import MeshConfig
from retro_jax.evaluation.forward import Forward
from retro_jax.model.retro import Retro
from retro_jax.parallel.mesh import create_mesh
from retro_jax.training.state import plan_model

MESHES = {"one device": (MeshConfig(fsdp=1), 1), "eight devices": (MeshConfig(data=2, fsdp=2, tensor=2), 8)}


@pytest.fixture(scope="module")
def rows():
    tokens = np.random.default_rng(0).integers(4, MODEL.vocab_size, (5, 13)).astype(np.int32)
    return tokens[:, :-1], tokens[:, 1:]


@pytest.fixture(scope="module")
def model():
    graph, params = nnx.split(Retro(MODEL, rngs=nnx.Rngs(3)))
    return graph, jax.tree.map(lambda leaf: leaf * 8.0, params)


@pytest.fixture(scope="module")
def logits(model, rows):
    graph, params = model
    return np.asarray(jax.jit(lambda params, tokens: nnx.merge(graph, params)(tokens))(params, rows[0]), np.float64)


@pytest.mark.parametrize("where", MESHES)
@pytest.mark.parametrize("vocab_block", [0, 100])
def test_outputs_are_those_of_the_logits(model, rows, logits, where, vocab_block):
    config, devices = MESHES[where]
    mesh = create_mesh(config, devices=jax.devices()[:devices])
    plan = plan_model(MODEL, mesh)
    params = jax.device_put(model[1], jax.tree.map(lambda leaf: leaf.sharding, plan.params))
    forward = Forward(plan, params, mesh, batch_size=6, hidden=True, best=True, vocab_block=vocab_block)
    found = forward(*rows)
    assert forward.batch_size == (6 if devices == 1 else 8)
    assert (found.best == logits.argmax(-1)).all()
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_probabilities, rows[1][..., None], -1)[..., 0]
    np.testing.assert_allclose(found.nats, expected, rtol=2e-5, atol=2e-5)
    assert found.hidden.shape == (*rows[0].shape, MODEL.width)


def test_what_is_not_asked_for_is_not_given(model, rows):
    mesh = create_mesh(MeshConfig(fsdp=1), devices=jax.devices()[:1])
    found = Forward(plan_model(MODEL, mesh), model[1], mesh, batch_size=5)(*rows)
    assert found.hidden is None and found.best is None and found.nats.shape == (5, 12)
