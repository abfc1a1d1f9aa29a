"""RETROfit: the first step is the base, only encoder and CCA are trained, and OFF stays the base bit for bit."""

import dataclasses
import gc
import itertools
import re
import shutil

import jax
import numpy as np
import pytest
import small_run

from retro_jax.config import CheckpointConfig, DataConfig, MeshConfig, OptimizerConfig, RetroConfig, TrainConfig
from retro_jax.errors import UserError
from retro_jax.model import from_layers, layer_reader, layer_shapes, to_layers
from retro_jax.parallel.mesh import create_mesh
from retro_jax.training.loop import train
from retro_jax.training.optimizer import create_optimizer
from retro_jax.training.retrofit import Base, begin, known_base, resolve, trains
from retro_jax.training.state import plan_model
from retro_jax.training.step import make_train_step
from retro_jax.training.workdir import begun_with, load_config

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


def drawn(config, seed=0):
    """A trained model, as it were; its numbers are NumPy's, none of them on a device."""
    generator = np.random.default_rng(seed)
    shapes = layer_shapes(config).items()
    flat = {name: generator.normal(0, 0.4, leaf.shape).astype(leaf.dtype) for name, leaf in shapes}
    params = from_layers(flat, config)
    return Base("base", config, lambda: layer_reader(params, config))


@pytest.fixture(scope="module")
def base():
    return drawn(BASE)


@pytest.fixture(scope="module")
def batch():
    generator = np.random.default_rng(1)
    tokens = generator.integers(3, 40, (2, 13), np.int32)
    tokens[1, 9:] = BASE.pad_id
    return {"tokens": tokens, "neighbours": generator.integers(3, 40, (2, 3, 2, 8), np.int32)}


def planned(run, base):
    """(resolved run, plan, optimizer, mesh)."""
    run = resolve(run, base.config)
    mesh = create_mesh(MeshConfig(), jax.devices()[:1])
    plan = plan_model(run.model, mesh, trains(run))
    return run, plan, create_optimizer(run.optimizer, run.steps, plan.axes), mesh


def begun(run, base):
    """What `planned` gives, and the fresh state."""
    run, plan, optimizer, mesh = planned(run, base)
    return run, plan, optimizer, mesh, begin(run, plan, optimizer, mesh, base)


def compiled_step(run, plan, optimizer, mesh, state, batch):
    step = make_train_step(run, plan, optimizer, mesh, unscored=(run.model.pad_id,))
    return step.lower(state, batch).compile(compiler_options=QUICK)


def on_host(state, run):
    return {name: np.array(array) for name, array in to_layers(state.params, run.model).items()}


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


@pytest.mark.parametrize("rank", [0, 3], ids=["frozen", "with LoRA"])
def test_on_begins_as_the_base_and_only_what_is_added_is_trained(base, batch, rank):
    wanted = dataclasses.replace(RUN, model=dataclasses.replace(WANTED, lora_rank=rank))
    run, plan, optimizer, mesh, state = begun(wanted, base)
    logits = jax.jit(lambda params, *inputs: plan.merge(params)(*inputs), compiler_options=QUICK)
    tokens, near = batch["tokens"][:, :-1], batch["neighbours"]
    plain = plan_model(BASE, mesh)
    params = from_layers({name: base.open()(name) for name in layer_shapes(BASE)}, BASE)
    expected = jax.jit(lambda params: plain.merge(params)(tokens), compiler_options=QUICK)(params)
    off = np.asarray(logits(state.params, tokens))
    np.testing.assert_allclose(off, expected, atol=1e-5)
    np.testing.assert_array_equal(logits(state.params, tokens, near), off)
    before = on_host(state, run)
    np.testing.assert_array_equal(before["encoder_embedding.table"], before["embedding.table"])

    moments = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)}
    moments = {name for name in moments if ".mu" in name}
    assert moments and all("cca" in name or "encoder" in name or "_lora" in name for name in moments)
    lora = {name for name in before if "_lora." in name}
    assert len(lora) == (2 * 2 * BASE.num_layers if rank else 0)

    step = compiled_step(run, plan, optimizer, mesh, state, batch)
    losses = []
    for _ in range(4):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] and np.isfinite(losses).all()
    for name, array in on_host(state, run).items():
        assert (array.tobytes() == before[name].tobytes()) == (name in layer_shapes(BASE)), name
    after = np.asarray(logits(state.params, tokens))
    assert (after.tobytes() == off.tobytes()) == (rank == 0)
    assert np.abs(np.asarray(logits(state.params, tokens, near)) - after).max() > 1e-3


def test_the_model_is_on_the_devices_once_while_it_begins(base):
    seen, names = [], []

    def live():
        return sum(array.nbytes for array in jax.live_arrays())

    def opened():
        read = base.open()
        return lambda name: (seen.append(live()), names.append(name), read(name))[2]

    plan = planned(RUN, base)
    gc.collect()
    before = live()
    state = begin(*plan, base._replace(open=opened))
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    given = sum(4 * np.prod(leaf.shape) for leaf in layer_shapes(BASE).values())
    assert live() - before == whole
    assert seen[0] - before <= whole - given
    assert max(seen) - before <= whole
    # All layers of a kind in turn: of a base that has them in one stack, one stack is in memory.
    kinds = [kind for kind, _ in itertools.groupby(re.sub(r"\d", "", name) for name in names)]
    assert len(kinds) == len(set(kinds)) < len(names)


def test_the_gate_shut_leaves_retrieval_out_of_the_step(batch):
    whole = drawn(resolve(RUN, BASE).model)
    run, plan, optimizer, mesh, state = begun(dataclasses.replace(RUN, unfreeze_decoder=True, cca_gate=0), whole)
    before = on_host(state, run)
    step = compiled_step(run, plan, optimizer, mesh, state, batch)
    copy = jax.tree.map(lambda leaf: leaf.copy(), state)
    state, metrics = step(state, batch)
    others = {**batch, "neighbours": np.roll(batch["neighbours"], 1, axis=0)}
    _, other = step(copy, others)
    assert float(metrics["loss"]) == float(other["loss"])
    for name, array in on_host(state, run).items():
        retrieval = name.startswith("encoder") or ".cca." in name
        assert (array.tobytes() == before[name].tobytes()) == retrieval, name


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
    with pytest.raises(UserError, match=r"'decoder' needs model\.encoder_width 16, the width of base; it is 12"):
        resolve(narrow, BASE)
    resolve(dataclasses.replace(narrow, encoder_embedding="random"), BASE)


def test_a_base_with_lora_keeps_its_rank_and_no_other_is_taken():
    adapted = dataclasses.replace(BASE, lora_rank=2)
    for rank in (0, 2):
        wanted = dataclasses.replace(RUN, model=dataclasses.replace(WANTED, lora_rank=rank))
        assert resolve(wanted, adapted).model.lora_rank == 2
    other = dataclasses.replace(RUN, model=dataclasses.replace(WANTED, lora_rank=3))
    with pytest.raises(UserError, match=r"model\.lora_rank is 3, and base has LoRA of rank 2; leave it out"):
        resolve(other, adapted)
    assert resolve(other, BASE).model.lora_rank == 3


def test_a_fingerprint_tells_models_of_one_form_apart(base):
    record = base.record()
    assert record == drawn(BASE).record() and record["init_from"] == "base"
    read = base.open()
    for name in ("decoder.layers.2.attention.query", "decoder.layers.2.ffw.norm.scale"):
        changed = base._replace(open=lambda name=name: lambda asked: read(asked) + (asked == name) * np.float32(1e-6))
        assert changed.record()["fingerprint"] != record["fingerprint"], name


def test_a_run_goes_on_without_its_base_and_with_no_other(small_data, tmp_path):
    base = drawn(dataclasses.replace(small_run.MODEL, cca_layers=()))
    run = TrainConfig(
        model=small_run.MODEL,
        init_from="base",
        data=DataConfig(sequences=(str(small_data.sequences),)),
        optimizer=OptimizerConfig(peak_learning_rate=1e-2, warmup_steps=1),
        checkpoint=CheckpointConfig(every_steps=2),
        mesh=MeshConfig(data=jax.device_count(), fsdp=1),  # too small to be split
        steps=4,
        batch_size=8,
    )
    workdir = tmp_path / "run"
    assert known_base(workdir, "base") is None
    whole = train(run, workdir, base=base)
    kept, begun = load_config(workdir), begun_with(workdir)
    with pytest.raises(UserError, match="began with another model"):
        train(dataclasses.replace(run, init_from="other"), workdir, base=drawn(base.config, 1)._replace(name="other"))
    assert load_config(workdir) == kept and begun_with(workdir) == begun
    assert known_base(workdir, "other") is None
    shutil.rmtree(workdir / "checkpoints" / "4")
    again = train(run, workdir, base=known_base(workdir, "base"))
    assert (again.step, again.loss) == (4, whole.loss)
    assert load_config(workdir) == kept and begun_with(workdir) == begun
    shutil.rmtree(workdir / "checkpoints")
    assert known_base(workdir, "base") is None  # there is nothing to go on from
