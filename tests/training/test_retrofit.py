"""RETROfit: the first step is the base, only encoder and CCA are trained, and OFF stays the base bit for bit."""

import dataclasses

import jax
import numpy as np
import pytest

from retro_jax.config import MeshConfig, OptimizerConfig, RetroConfig, TrainConfig
from retro_jax.errors import UserError
from retro_jax.model import from_layers, layer_reader, layer_shapes, to_layers
from retro_jax.parallel.mesh import create_mesh
from retro_jax.training.optimizer import create_optimizer
from retro_jax.training.retrofit import Base, begin, resolve, trains
from retro_jax.training.state import initialise, plan_model
from retro_jax.training.step import make_train_step

BASE = RetroConfig(
    vocab_size=40,
    width=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=4,
    ffw_width=20,
    positions="rope",
    ffw="swiglu",
    tie_embeddings=False,
    norm_epsilon=1e-5,
    pad_id=40,
    chunk_length=4,
)
WANTED = RetroConfig(
    vocab_size=99,
    width=8,
    num_layers=9,
    num_heads=2,
    head_size=4,
    ffw_width=8,
    chunk_length=4,
    neighbour_length=8,
    cca_layers=(1, 2),
    encoder_width=16,
    encoder_layers=1,
    encoder_num_heads=2,
    encoder_head_size=4,
    encoder_ffw_width=16,
)
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
RUN = TrainConfig(
    model=WANTED,
    init_from="base",
    encoder_embedding="decoder",
    optimizer=OptimizerConfig(peak_learning_rate=1e-2, initial_learning_rate=1e-3, warmup_steps=1),
    steps=10,
    batch_size=2,
)


@pytest.fixture(scope="module")
def base():
    generator = np.random.default_rng(0)
    flat = {name: generator.normal(0, 0.4, leaf.shape).astype(leaf.dtype) for name, leaf in layer_shapes(BASE).items()}
    params = from_layers(flat, BASE)
    return Base("base", BASE, lambda: layer_reader(params, BASE))


@pytest.fixture(scope="module")
def batch():
    generator = np.random.default_rng(1)
    tokens = generator.integers(3, 40, (2, 13), np.int32)
    tokens[1, 9:] = BASE.pad_id
    return {"tokens": tokens, "neighbours": generator.integers(3, 40, (2, 3, 2, 8), np.int32)}


def begun(run, base):
    """(resolved run, plan, optimizer, mesh, fresh state)."""
    run = resolve(run, base.config)
    mesh = create_mesh(MeshConfig(), jax.devices()[:1])
    plan = plan_model(run.model, mesh, trains(run))
    optimizer = create_optimizer(run.optimizer, run.steps, plan.axes)
    state = initialise(run.model, plan, optimizer, mesh, seed=0)
    return run, plan, optimizer, mesh, dataclasses.replace(state, params=begin(state.params, run, base))


def test_the_decoder_is_the_bases_and_the_retrieval_that_of_the_recipe():
    model = resolve(RUN, BASE).model
    assert model == dataclasses.replace(
        BASE,
        cca_layers=(1, 2),
        neighbour_length=8,
        encoder_width=16,
        encoder_layers=1,
        encoder_num_heads=2,
        encoder_head_size=4,
        encoder_ffw_width=16,
    )
    deep = dataclasses.replace(BASE, num_layers=12)
    nothing = dataclasses.replace(RUN, model=dataclasses.replace(WANTED, cca_layers=()))
    assert resolve(nothing, deep).model.cca_layers == (6, 9, 12)
    with pytest.raises(UserError, match="a model of 2 layers has no sixth"):
        resolve(nothing, BASE)


def test_on_begins_as_the_base_only_the_retrieval_is_trained_and_off_stays_the_base(base, batch):
    run, plan, optimizer, mesh, state = begun(RUN, base)
    logits = jax.jit(lambda params, *inputs: plan.merge(params)(*inputs), compiler_options=QUICK)
    tokens, near = batch["tokens"][:, :-1], batch["neighbours"]
    plain = plan_model(BASE, mesh)
    params = from_layers({name: base.open()(name) for name in layer_shapes(BASE)}, BASE)
    expected = jax.jit(lambda params: plain.merge(params)(tokens), compiler_options=QUICK)(params)
    off = np.asarray(logits(state.params, tokens))
    np.testing.assert_allclose(off, expected, atol=1e-5)
    np.testing.assert_array_equal(logits(state.params, tokens, near)[0], off[0])
    before = {name: np.array(array) for name, array in to_layers(state.params, run.model).items()}
    np.testing.assert_array_equal(before["encoder_embedding.table"], before["embedding.table"])

    moments = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)}
    moments = {name for name in moments if ".mu" in name}
    assert moments and all("cca" in name or "encoder" in name for name in moments)

    step = make_train_step(run, plan, optimizer, mesh, unscored=(run.model.pad_id,))
    step = step.lower(state, batch).compile(compiler_options=QUICK)
    losses = []
    for _ in range(4):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] and np.isfinite(losses).all()
    after = to_layers(state.params, run.model)
    for name, array in before.items():
        same = np.asarray(after[name]).tobytes() == array.tobytes()
        assert same == (name in layer_shapes(BASE)), name
    np.testing.assert_array_equal(logits(state.params, tokens), off)
    assert np.abs(np.asarray(logits(state.params, tokens, near)) - off).max() > 1e-3


def test_with_lora_the_additions_are_trained_too_and_begin_at_nothing(base):
    run = resolve(dataclasses.replace(RUN, model=dataclasses.replace(WANTED, lora_rank=3)), BASE)
    mesh = create_mesh(MeshConfig(), jax.devices()[:1])
    plan = plan_model(run.model, mesh, trains(run))
    kept = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(plan.split(plan.params)[0])}
    assert {"query_lora" in name for name in kept} == {True, False}
    assert all(any(part in name for part in ("_lora", "cca", "encoder")) for name in kept)
    added = set(layer_shapes(run.model)) - set(layer_shapes(resolve(RUN, BASE).model))
    assert len(added) == 2 * 2 * BASE.num_layers and all("_lora." in name for name in added)


def test_unfrozen_everything_is_trained_and_with_the_gate_shut_the_decoder_alone(base):
    assert trains(dataclasses.replace(RUN, unfreeze_decoder=True)) is None
    assert trains(dataclasses.replace(RUN, init_from="")) is None
    shut = dataclasses.replace(RUN, unfreeze_decoder=True, cca_gate=0)
    run = resolve(shut, BASE)
    mesh = create_mesh(MeshConfig(), jax.devices()[:1])
    plan = plan_model(run.model, mesh, trains(run))
    kept, rest = plan.split(plan.params)
    counts = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (kept, rest)]
    assert counts[0] == sum(np.prod(leaf.shape) for leaf in layer_shapes(BASE).values())
    assert sum(counts) == sum(np.prod(leaf.shape) for leaf in layer_shapes(run.model).values())


def test_with_the_gate_shut_a_baseline_stays_one_unless_layers_are_named():
    shut = dataclasses.replace(RUN, unfreeze_decoder=True, cca_gate=0)
    alone = resolve(dataclasses.replace(shut, model=dataclasses.replace(WANTED, cca_layers=())), BASE)
    assert alone.model.is_baseline and (alone.model.width, alone.model.num_layers) == (BASE.width, BASE.num_layers)
    assert resolve(shut, BASE).model.cca_layers == (1, 2)


def test_data_of_another_tokenizer_than_the_bases_is_refused(base):
    base.check_tokenizer("any", "data")
    known = base._replace(tokenizers=("0123", "89ab"))
    known.check_tokenizer("89ab", "data")
    with pytest.raises(UserError, match="tokenizer 4567, init_from base was trained with 0123 or 89ab"):
        known.check_tokenizer("4567", "data")


def test_settings_that_do_not_go_together_are_refused(base):
    with pytest.raises(UserError, match="unfreeze_decoder goes with init_from"):
        TrainConfig(model=WANTED, unfreeze_decoder=True)
    with pytest.raises(UserError, match="cca_gate 0 trains the decoder alone"):
        dataclasses.replace(RUN, cca_gate=0)
    narrow = dataclasses.replace(RUN, model=dataclasses.replace(WANTED, encoder_width=12))
    with pytest.raises(UserError, match=r"encoder_embedding 'decoder' needs model\.encoder_width 16"):
        begun(narrow, base)
