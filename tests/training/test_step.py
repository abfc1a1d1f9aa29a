"""A training step gives the same numbers on one device and on every mesh of eight."""

import jax
import numpy as np
import pytest

from retro_jax.config import MeshConfig, OptimizerConfig, RetroConfig, TrainConfig
from retro_jax.parallel import rules
from retro_jax.parallel.mesh import create_mesh
from retro_jax.training.optimizer import create_optimizer
from retro_jax.training.state import from_nested_dict, initialise, plan_model, plan_state, to_nested_dict
from retro_jax.training.step import make_train_step

MODEL = RetroConfig(
    vocab_size=48,
    width=16,
    num_layers=3,
    num_heads=2,
    head_size=8,
    ffw_width=32,
    chunk_length=4,
    neighbour_length=8,
    cca_layers=(2, 3),
    encoder_width=8,
    encoder_layers=1,
    encoder_num_heads=2,
    encoder_head_size=4,
    encoder_ffw_width=16,
)
CONFIG = TrainConfig(
    model=MODEL,
    optimizer=OptimizerConfig(warmup_steps=2, peak_learning_rate=1e-2),
    steps=10,
    batch_size=8,
    vocab_block=20,
)


def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 48, (8, 13)).astype(np.int32)
    tokens[:2, 9:] = 0
    return {"tokens": tokens, "neighbours": rng.integers(3, 48, (8, 3, 2, 8)).astype(np.int32)}


def run(mesh, steps=3):
    plan = plan_model(MODEL, mesh)
    optimizer = create_optimizer(CONFIG.optimizer, CONFIG.steps, plan.axes)
    state = initialise(MODEL, plan, optimizer, mesh, seed=1)
    step = make_train_step(CONFIG, plan, optimizer, mesh, unscored=(0, 1))
    arrays = {name: jax.device_put(value, rules.batch_sharding(mesh)) for name, value in batch().items()}
    losses = []
    for _ in range(steps):
        state, metrics = step(state, arrays)
        losses.append({name: float(value) for name, value in metrics.items()})
    return losses, state


@pytest.fixture(scope="module")
def one_device():
    return run(create_mesh(MeshConfig(fsdp=1), devices=jax.devices()[:1]))


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_every_mesh_gives_the_losses_and_parameters_of_one_device(one_device, sizes):
    data, fsdp, tensor = sizes
    losses, state = run(create_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor)))
    for found, expected in zip(losses, one_device[0], strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    for found, expected in zip(jax.tree.leaves(state.params), jax.tree.leaves(one_device[1].params), strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)


def test_parameters_and_moments_are_split_over_the_mesh():
    mesh = create_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    plan = plan_model(MODEL, mesh)
    state = plan_state(plan, create_optimizer(CONFIG.optimizer, 10, plan.axes), mesh)
    table = to_nested_dict(state.params)["embedding"]["table"]
    assert table.sharding.spec == rules.P("tensor", "fsdp")
    moments = to_nested_dict(state.opt_state)
    (adam,) = [entry for entry in moments.values() if "mu" in entry]
    assert adam["mu"]["embedding"]["table"].sharding == table.sharding == adam["nu"]["embedding"]["table"].sharding


def test_the_loss_is_the_mean_over_scored_tokens_only(one_device):
    scored = int((batch()["tokens"][:, 1:] > 1).sum())
    assert one_device[0][0]["tokens"] == scored == 8 * 12 - 2 * 4


def test_training_on_one_batch_lowers_its_loss(one_device):
    losses = [entry["loss"] for entry in one_device[0]]
    assert losses[2] < losses[0]


def test_names_on_disk_round_trip():
    mesh = create_mesh(MeshConfig())
    plan = plan_model(MODEL, mesh)
    state = plan_state(plan, create_optimizer(CONFIG.optimizer, 10, plan.axes), mesh)
    assert from_nested_dict(state, to_nested_dict(state)) == state
