"""A training step gives the same numbers on one device and on every mesh of eight."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from retro_jax.config import MeshConfig, OptimizerConfig, RetroConfig, StabilityConfig, TrainConfig
from retro_jax.model.parameters import to_layers
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
ROPE = dataclasses.replace(MODEL, positions="rope")
CONFIG = TrainConfig(
    model=MODEL,
    optimizer=OptimizerConfig(warmup_steps=2, peak_learning_rate=1e-2),
    steps=10,
    batch_size=8,
    vocab_block=20,
)


def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 48, (8, 17)).astype(np.int32)
    tokens[:2, 13:] = 0
    return {"tokens": tokens, "neighbours": rng.integers(3, 48, (8, 4, 2, 8)).astype(np.int32)}


def run(batches, **changes):
    """Metrics of each step, and the state before and after, on one device."""
    config, mesh = dataclasses.replace(CONFIG, **changes), one()
    plan = plan_model(config.model, mesh)
    optimizer = create_optimizer(config.optimizer, config.steps, plan.axes)
    state = initialise(config.model, plan, optimizer, mesh, seed=1)
    step = make_train_step(config, plan, optimizer, mesh, unscored=(0, 1))
    metrics, states = [], [jax.device_get(state)]
    for arrays in batches:
        state, values = step(state, arrays)
        metrics.append({name: float(value) for name, value in values.items()})
        states.append(jax.device_get(state))
    return metrics, states


def gradients(mesh, **changes):
    """The loss and the gradients as the optimizer is given them."""
    config = dataclasses.replace(CONFIG, **changes)
    plan = plan_model(config.model, mesh)
    keep = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda gradients, _state, _params: (jax.tree.map(jnp.zeros_like, gradients), gradients),
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, plan_state(plan, keep, mesh))
    state = jax.device_put(initial_state(config.model), shardings)
    step = make_train_step(config, plan, keep, mesh, unscored=(0, 1))
    arrays = {name: jax.device_put(value, rules.batch_sharding(mesh)) for name, value in batch().items()}
    state, metrics = step(state, arrays)
    return float(metrics["loss"]), to_layers(jax.device_get(state.opt_state), config.model)


@functools.cache
def initial_state(model):
    """On one device, compiled once."""
    plan = plan_model(model, one())
    keep = optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), None)
    return jax.device_get(initialise(model, plan, keep, one(), seed=1))


def assert_equal(found, expected, tolerance):
    """Losses and gradients; of a gradient the norm of the difference counts, as a share of its norm, or of a thousandth
    of the norm of all where its own is smaller than that."""
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    assert found[1].keys() == expected[1].keys()
    floor = 1e-3 * np.sqrt(sum(np.square(want).sum() for want in expected[1].values()))
    for name, want in expected[1].items():
        difference = np.linalg.norm(np.asarray(found[1][name], np.float64) - want)
        assert difference <= tolerance * max(np.linalg.norm(want), floor), name


def one():
    return create_mesh(MeshConfig(fsdp=1), devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def expected_gradients():
    return {model: gradients(one(), model=model) for model in (MODEL, ROPE)}


MESHES = [(8, 1, 1, 1), (1, 8, 1, 1), (2, 2, 2, 1), (1, 2, 2, 2)]
MORE_MESHES = [(1, 1, 2, 4), (4, 1, 1, 2), (2, 1, 1, 4)]
CASES = [
    *((sizes, MODEL) for sizes in MESHES),
    ((1, 2, 2, 2), ROPE),
    *(pytest.param(sizes, MODEL, marks=pytest.mark.slow) for sizes in MORE_MESHES),
]


@pytest.mark.parametrize(("sizes", "model"), CASES, ids=lambda case: str(getattr(case, "positions", case)))
def test_every_mesh_gives_the_loss_and_gradients_of_one_device(expected_gradients, sizes, model):
    found = gradients(create_mesh(MeshConfig(*sizes)), model=model)
    assert_equal(found, expected_gradients[model], 1e-5)


def test_a_step_clips_by_the_global_norm_before_adam():
    optimizer = dataclasses.replace(CONFIG.optimizer, clip_norm=1e-3)
    (metrics,), (_, after) = run([batch()], optimizer=optimizer)
    assert metrics["gradient_norm"] > 1e-2
    moment = float(optax.global_norm(after.opt_state[0].mu))
    assert moment == pytest.approx((1 - optimizer.beta1) * 1e-3, rel=1e-4)


def test_parameters_and_moments_are_split_over_the_mesh():
    mesh = create_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    plan = plan_model(MODEL, mesh)
    state = plan_state(plan, create_optimizer(CONFIG.optimizer, 10, plan.axes), mesh)
    table = to_nested_dict(state.params)["embedding"]["table"]
    assert table.sharding.spec == rules.P("tensor", "fsdp")
    moments = to_nested_dict(state.opt_state)
    (adam,) = [entry for entry in moments.values() if "mu" in entry]
    assert adam["mu"]["embedding"]["table"].sharding == table.sharding == adam["nu"]["embedding"]["table"].sharding


@pytest.fixture(scope="module")
def three_steps():
    """With a batch in the middle whose tokens are beyond the vocabulary, which gives NaN."""
    good = batch()
    bad = {**good, "tokens": np.full_like(good["tokens"], MODEL.vocab_size)}
    return run([good, bad, good], stability=StabilityConfig(max_bad_steps=1))


def test_the_loss_is_the_mean_over_scored_tokens_only(three_steps):
    scored = int((batch()["tokens"][:, 1:] > 1).sum())
    assert three_steps[0][0]["tokens"] == scored == 8 * 16 - 2 * 4


def test_training_on_one_batch_lowers_its_loss(three_steps):
    assert three_steps[0][2]["loss"] < three_steps[0][0]["loss"]


def test_a_bad_step_is_skipped_and_counted(three_steps):
    metrics, (_, first, second, third) = three_steps
    assert [values["bad"] for values in metrics] == [0, 1, 0]
    assert [values["bad_in_a_row"] for values in metrics] == [0, 1, 0]
    assert [values["skipped"] for values in metrics] == [0, 1, 1]
    assert np.isnan(metrics[1]["loss"])
    for before, after in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert np.array_equal(before, after) or before.dtype == np.int32  # the counters alone
    assert int(second.step) == 2 and int(third.step) == 3
    changed = zip(jax.tree.leaves(second.params), jax.tree.leaves(third.params), strict=True)
    assert all(not np.array_equal(before, after) for before, after in changed)


def test_a_mesh_begins_with_the_numbers_of_one_device():
    mesh = create_mesh(MeshConfig(1, 2, 2, 2))
    plan = plan_model(MODEL, mesh)
    optimizer = create_optimizer(CONFIG.optimizer, CONFIG.steps, plan.axes)
    state = initialise(MODEL, plan, optimizer, mesh, seed=1)
    for found, expected in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(initial_state(MODEL).params), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_names_on_disk_round_trip():
    mesh = create_mesh(MeshConfig())
    plan = plan_model(MODEL, mesh)
    state = plan_state(plan, create_optimizer(CONFIG.optimizer, 10, plan.axes), mesh)
    assert from_nested_dict(state, to_nested_dict(state)) == state


@pytest.mark.parametrize("microbatches", [2, 8])
def test_parts_of_a_batch_equal_the_whole(expected_gradients, microbatches):
    assert_equal(gradients(one(), microbatches=microbatches), expected_gradients[MODEL], 1e-6)


def test_parts_of_a_batch_equal_the_whole_on_a_mesh(expected_gradients):
    mesh = create_mesh(MeshConfig(data=2, fsdp=2, tensor=1, context=2))
    assert_equal(gradients(mesh, microbatches=2), expected_gradients[MODEL], 1e-5)


@pytest.mark.parametrize("remat", ["block", "query,key,value,mixed,hidden"])
def test_what_is_computed_again_changes_no_number(expected_gradients, remat):
    found = gradients(one(), model=dataclasses.replace(MODEL, remat=remat))
    assert_equal(found, expected_gradients[MODEL], 1e-6)
