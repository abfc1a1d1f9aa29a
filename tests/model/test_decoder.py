"""Layers stacked and scanned are the same model as layers called one after another."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small import QUICK, SMALL, graph, inputs, logits, random_parameters

from retro_jax.model import to_layers
from retro_jax.model.attention import SelfAttention
from retro_jax.model.chunked_cross_attention import ChunkedCrossAttention, cca_positions
from retro_jax.model.decoder import Block, layer_plan
from retro_jax.model.layers import FeedForward
from retro_jax.model.presets import every_third
from retro_jax.model.weights import decoder_stream


@st.composite
def depth_and_layers(draw):
    depth = draw(st.integers(1, 40))
    return depth, tuple(sorted(draw(st.sets(st.integers(1, depth)))))


@settings(deadline=None, max_examples=200)
@given(depth_and_layers())
@example((1, (1,)))
@example((7, (7,)))
@example((7, (1,)))
@example((7, tuple(range(1, 8))))
@example((7, ()))
def test_plan_covers_every_layer_once_in_order_with_its_kind(case):
    depth, cca_layers = case
    plan = layer_plan(depth, cca_layers)
    layers = []
    for run in plan.before:
        assert run.pattern == (False,)
        layers += run.layers()
    if plan.entry is not None:
        layers.append(plan.entry)
    for run in plan.after:
        layers += run.layers()
    assert layers == list(range(1, depth + 1))
    assert plan.entry == min(cca_layers, default=None)
    kinds = {plan.entry} if plan.entry else set()
    for run in plan.after:
        for place, has_cca in enumerate(run.pattern * run.repeats):
            if has_cca:
                kinds.add(run.first + place)
    assert kinds == set(cca_layers)


def test_plan_of_the_paper_compiles_few_blocks():
    plan = layer_plan(32, every_third(32))
    assert [(run.first, run.pattern, run.repeats) for run in plan.after] == [
        (7, (False, False, True), 8),
        (31, (False,), 2),
    ]
    assert plan.before[0].repeats == 5


def test_scanned_layers_equal_layers_one_by_one():
    config = dataclasses.replace(SMALL, num_layers=6, cca_layers=(2, 4, 6))
    params = random_parameters(config)
    tokens, neighbours = inputs(config)
    flat = to_layers(params, config)

    def block(layer):
        def build():
            key, stream = jax.random.key(0), decoder_stream(config)
            return Block(
                SelfAttention(config, stream, config.num_heads, config.head_size, config.num_layers, key),
                ChunkedCrossAttention(config, key) if layer in config.cca_layers else None,
                FeedForward(config, stream, config.ffw_width, config.num_layers, key),
            )

        graphdef, state = nnx.split(jax.eval_shape(build))
        prefix = f"decoder.layers.{layer}."
        return nnx.merge(
            graphdef,
            nnx.from_flat_state(
                [(path, leaf.replace(flat[prefix + ".".join(path)])) for path, leaf in nnx.to_flat_state(state)]
            ),
        )

    @functools.partial(jax.jit, compiler_options=QUICK)
    def looped(params):
        model = nnx.merge(graph(config), params)
        context = model.decoder.context(jnp.asarray(tokens) != config.pad_id)
        x = model.embedding(jnp.asarray(tokens))
        for layer in range(1, config.num_layers + 1):
            if layer == min(config.cca_layers):
                y = block(layer).attention(x, context.valid, context.self_positions, causal=True)
                memory = model._encode(y, context.valid, jnp.asarray(neighbours))
                where = cca_positions(config, config.neighbour_length)
                context = context._replace(memory=memory, cca_positions=where)
            x = block(layer)(x, context)
        return model.logits(model.decoder.norm(x))

    expected = looped(params)
    for scan in (True, False):
        found = logits(dataclasses.replace(config, scan_layers=scan), params, tokens, neighbours)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_recomputing_blocks_gives_the_same_loss_and_gradients():
    config = dataclasses.replace(SMALL, num_layers=3, cca_layers=(1, 2, 3), encoder_layers=1)
    params = random_parameters(config)
    tokens, neighbours = inputs(config, batch=1)
    results = []
    for changes in ({}, {"remat": "block"}):
        graphdef = graph(dataclasses.replace(config, **changes))

        def loss(params, graphdef=graphdef):
            return jnp.sum(jnp.square(nnx.merge(graphdef, params)(jnp.asarray(tokens), jnp.asarray(neighbours))))

        results.append(jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)(params))
    for result in results[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), results[0], result)


def test_gradients_are_finite_where_nothing_may_be_seen():
    config = dataclasses.replace(SMALL, num_layers=3, cca_layers=(1, 2, 3), encoder_layers=1)
    params = random_parameters(config)
    tokens, neighbours = inputs(config)
    tokens[0] = config.pad_id
    tokens[1, : config.chunk_length] = config.pad_id
    neighbours[1] = config.pad_id
    graphdef = graph(config)

    def loss(params):
        out = nnx.merge(graphdef, params)(jnp.asarray(tokens), jnp.asarray(neighbours))
        return jnp.sum(jnp.square(out))

    value, gradients = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)(params)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
