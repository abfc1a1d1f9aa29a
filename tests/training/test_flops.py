"""FLOPs in closed form against what XLA counts, and the peaks of chips."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from retro_jax.config import DataConfig, MeshConfig, OptimizerConfig, RetroConfig, TrainConfig
from retro_jax.errors import UserError
from retro_jax.model import Retro
from retro_jax.parallel.costs import matrix_flops
from retro_jax.parallel.hlo import parse
from retro_jax.parallel.mesh import create_mesh
from retro_jax.training.flops import forward_flops, hardware_flops, peak_flops, processed_tokens, step_flops
from retro_jax.training.optimizer import create_optimizer
from retro_jax.training.retrofit import trains
from retro_jax.training.state import plan_model, plan_state
from retro_jax.training.step import make_train_step

# Wide and short, so that matrix products are nearly all that there is to count; every part of the model occurs.
MODEL = RetroConfig(
    vocab_size=768,
    width=320,
    num_layers=2,
    num_heads=3,
    head_size=96,
    ffw_width=640,
    chunk_length=32,
    neighbour_length=48,
    cca_layers=(1, 2),
    encoder_width=256,
    encoder_layers=1,
    encoder_num_heads=2,
    encoder_head_size=96,
    encoder_ffw_width=512,
    scan_layers=False,
)
BATCH, K = 3, 2
# The optimiser of the compiler changes nothing that is counted here, and takes most of the time.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def compiled_forward(model, length):
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Retro(model)))
    params = jax.eval_shape(lambda: nnx.state(Retro(model)))
    inputs = [jax.ShapeDtypeStruct((BATCH, length), jnp.int32)]
    if not model.is_baseline:
        shape = (BATCH, length // model.chunk_length, K, model.neighbour_length)
        inputs.append(jax.ShapeDtypeStruct(shape, jnp.int32))
    return (
        jax.jit(lambda params, *inputs: nnx.merge(graphdef, params)(*inputs))
        .lower(params, *inputs)
        .compile(compiler_options=QUICK)
    )


def train_config(length, **changes):
    model = dataclasses.replace(MODEL, **{k: v for k, v in changes.items() if hasattr(MODEL, k)})
    run = {k: v for k, v in changes.items() if not hasattr(MODEL, k)}
    data = DataConfig(length=length, neighbours=K)
    return TrainConfig(model=model, data=data, batch_size=BATCH * run.get("microbatches", 1), **run)


def lowered_step(config):
    mesh = create_mesh(MeshConfig(), jax.devices()[:1])
    plan = plan_model(config.model, mesh, trains(config))
    optimizer = create_optimizer(OptimizerConfig(warmup_steps=1), config.steps, plan.axes)
    length, model = config.data.length, config.model
    neighbours = (config.batch_size, length // model.chunk_length, K, model.neighbour_length)
    batch = {"tokens": jax.ShapeDtypeStruct((config.batch_size, length + 1), jnp.int32)}
    if not model.is_baseline:
        batch["neighbours"] = jax.ShapeDtypeStruct(neighbours, jnp.int32)
    step = make_train_step(config, plan, optimizer, mesh, unscored=(0,))
    return step.lower(plan_state(plan, optimizer, mesh), batch)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"positions": "rope"},
        {"cca_layers": ()},
        {"cross_positions": False},
        {"neighbour_part": "neighbour"},
        {"cca_layers": (), "positions": "rope", "num_kv_heads": 1, "ffw": "swiglu", "tie_embeddings": False},
    ],
    ids=["retro", "rope", "baseline", "no positions in cross-attention", "neighbours without continuations", "llama"],
)
def test_the_forward_pass_agrees_with_xla_within_three_per_cent(changes):
    model, length = dataclasses.replace(MODEL, **changes), 96  # one block of queries: no product is left out
    expected = compiled_forward(model, length).cost_analysis()["flops"]
    assert forward_flops(model, BATCH, length, K, causal=False).total == pytest.approx(expected, rel=0.03)


def test_a_training_step_agrees_with_xla_within_three_per_cent():
    config = train_config(96, vocab_block=0)
    assert step_flops(config, causal=False) == pytest.approx(lowered_step(config).cost_analysis()["flops"], rel=0.03)


@pytest.mark.parametrize("remat", ["none", "block", "query,mixed,hidden", "key,value,relative,added"])
def test_executed_flops_have_the_recomputation_of_the_program(remat):
    """As lowered, without loops. XLA's CPU compiler undoes a part of it again: it merges what is computed twice."""
    config = train_config(160, remat=remat, vocab_block=0)
    assert hardware_flops(config) == pytest.approx(lowered_step(config).cost_analysis()["flops"], rel=0.02)


def test_executed_flops_are_those_of_the_compiled_loops():
    """Layers in a scan, micro-batches, blocks of the vocabulary; products behind the diagonal left out."""
    config = train_config(160, cca_layers=(), num_layers=3, scan_layers=True, vocab_block=500, microbatches=3)
    counted = matrix_flops(parse(lowered_step(config).compile(compiler_options=QUICK).as_text()))
    assert hardware_flops(config) == pytest.approx(counted, rel=0.01)


RETROFIT = {"num_layers": 3, "cca_layers": (2, 3), "init_from": "base", "vocab_block": 0}
LORA = {**RETROFIT, "lora_rank": 32, "positions": "rope", "ffw": "swiglu", "num_kv_heads": 1}


@pytest.mark.parametrize("remat", ["none", "block"])
@pytest.mark.parametrize("changes", [RETROFIT, LORA], ids=["frozen", "with LoRA"])
def test_a_frozen_decoder_has_no_gradients_of_its_weights(changes, remat):
    config = train_config(96, remat=remat, **changes)
    assert hardware_flops(config) == pytest.approx(lowered_step(config).cost_analysis()["flops"], rel=0.02)
    whole = dataclasses.replace(config, unfreeze_decoder=True)
    assert step_flops(config) < 0.9 * step_flops(whole) < hardware_flops(whole)


def test_with_the_gate_shut_the_encoder_costs_nothing():
    shut = train_config(96, cca_gate=0)
    assert step_flops(shut) == 3 * forward_flops(MODEL, BATCH, 96, 0).total
    assert processed_tokens(shut) == BATCH * 96


def test_a_split_sequence_multiplies_all_pairs():
    config = train_config(256)
    split = dataclasses.replace(config, mesh=MeshConfig(context=2))
    pairs = 2 * BATCH * 256 * 256 * MODEL.num_heads * MODEL.head_size  # of one product
    # Three products a layer, forward once and backward twice; position has one distance more than there are keys.
    expected = MODEL.num_layers * 3 * (3 * pairs * 3 / 8)
    assert hardware_flops(split) - hardware_flops(config) == pytest.approx(expected, rel=0.01)
    assert step_flops(split) == step_flops(config)


def test_causality_halves_the_products_of_decoder_self_attention_and_nothing_else():
    full, causal = (forward_flops(MODEL, BATCH, 128, K, causal=causal) for causal in (False, True))
    pairs = 2 * BATCH * 128 * 128 * MODEL.num_heads * MODEL.head_size  # of one product
    assert full.decoder - causal.decoder == MODEL.num_layers * 3 * pairs / 2  # content, position, mean of values
    assert (full.encoder, full.cca, full.head) == (causal.encoder, causal.cca, causal.head)


def test_a_window_counts_the_pairs_within_it():
    whole, windowed = (
        forward_flops(dataclasses.replace(MODEL, positions="rope", window=window), BATCH, 128, K) for window in (0, 32)
    )
    pairs = sum(min(t + 1, 32) for t in range(128))
    products = 2 * MODEL.num_layers * 2 * BATCH * MODEL.num_heads * MODEL.head_size  # scores and means
    assert whole.decoder - windowed.decoder == products * (128 * 128 / 2 - pairs)


def test_flops_grow_with_batch_and_neighbours_as_the_model_says():
    part = functools.partial(forward_flops, MODEL, length=128)
    one, two = part(batch_size=1, neighbours=2), part(batch_size=2, neighbours=2)
    assert two.head == 2 * one.head and one.decoder < two.decoder < 2 * one.decoder  # relative keys once a layer
    assert part(batch_size=1, neighbours=0).encoder == part(batch_size=1, neighbours=0).cca == 0
    assert part(batch_size=1, neighbours=4).decoder == one.decoder


def test_an_unset_length_is_refused():
    with pytest.raises(UserError, match=r"data\.length"):
        step_flops(TrainConfig(model=MODEL))
    with pytest.raises(UserError, match=r"data\.length"):
        hardware_flops(TrainConfig(model=MODEL))


@pytest.mark.parametrize(
    "kind, bf16",
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
    ],
)
def test_peaks_are_known_by_the_names_that_jax_gives(kind, bf16):
    assert peak_flops(kind, "bfloat16") == bf16 * 1e12
    assert peak_flops(kind, "float32") == (bf16 if kind.startswith("TPU") else bf16 / 2) * 1e12
    assert peak_flops(kind, "float64") is None


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H100 NVL", "NVIDIA H100 PCIe", "TPU v4 lite"])
def test_an_unlisted_device_has_no_peak(kind):
    assert peak_flops(kind, "bfloat16") is None
