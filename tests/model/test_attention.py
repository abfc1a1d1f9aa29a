"""Positions, the skew that aligns them, the masked softmax and its gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from small import QUICK, SMALL, graph, inputs, random_parameters

from retro_jax.model import attention, layer_shapes
from retro_jax.model.attention import causal_blocks, masked_softmax
from retro_jax.model.chunked_cross_attention import attending_chunks, cca_positions, positions_of_chunks
from retro_jax.model.encoder import encoder_positions
from retro_jax.model.positions import positions
from retro_jax.model.presets import preset
from retro_jax.model.relative import sinusoid, skew, unskew
from retro_jax.model.rotary import rotate, rotation

# Every new shape is compiled, so few of them are drawn; one and unequal sizes are what matters.
modest = settings(deadline=None, max_examples=15)
sizes = st.integers(1, 5)


@modest
@given(sizes, sizes)
def test_skew_equals_gathering_each_distance(queries, keys):
    products = np.random.default_rng(0).normal(size=(2, queries, queries + keys))
    i, j = np.indices((queries, keys))
    expected = products[:, i, j + queries - 1 - i]
    np.testing.assert_array_equal(skew(jnp.asarray(products), keys), expected)


@modest
@given(sizes)
def test_skew_of_the_causal_half_is_exact_where_causal(length):
    products = np.random.default_rng(0).normal(size=(2, length, length + 1))
    found = np.asarray(skew(jnp.asarray(products), length))
    for i in range(length):
        for j in range(i + 1):
            np.testing.assert_array_equal(found[:, i, j], products[:, i, length - 1 - (i - j)])


@modest
@given(sizes, sizes, st.booleans())
def test_unskew_is_the_transpose_of_skew(queries, keys, causal):
    distances = keys + 1 if causal else queries + keys
    generator = np.random.default_rng(0)
    products = generator.integers(-9, 9, (2, queries, distances)).astype(np.float64)  # integers: sums are exact
    logits = generator.integers(-9, 9, (2, queries, keys)).astype(np.float64)
    shifted, transpose = jax.vjp(lambda products: skew(products, keys), products)
    np.testing.assert_array_equal(transpose(logits)[0], unskew(jnp.asarray(logits), distances))
    assert np.sum(shifted * logits) == np.sum(products * unskew(jnp.asarray(logits), distances))


@modest
@given(sizes, sizes, st.integers(-5, 9))
def test_positions_line_up_with_the_distance_of_each_pair(queries, keys, offset):
    where = positions(SMALL, query_width=8, head_size=4, queries=queries, keys=keys, offset=offset)
    assert where.sinusoids.shape == (queries + keys, 8)
    # One product per distance, laid out as attention does it: query i holds every distance's vector.
    aligned = skew(jnp.broadcast_to(where.sinusoids.T[:, None], (8, queries, queries + keys)), keys)
    i, j = np.indices((queries, keys))
    expected = sinusoid(jnp.asarray((i - j + offset).ravel()), 8, jnp.float64).reshape(queries, keys, 8)
    np.testing.assert_allclose(np.moveaxis(aligned, 0, -1), expected, rtol=0, atol=1e-12)


def test_cca_and_encoder_distances_are_those_of_the_paper():  # spec 11.1 [9]
    config = preset("172m", dtype="float64")

    def distances(where, width):
        # The lowest frequency, 10000^(-(D - 2) / D), is below 1e-3: its sine tells the distance apart without a period.
        slowest = 10_000.0 ** (-(width - 2) / width)
        return np.round(np.arcsin(np.asarray(where.sinusoids)[:, width // 2 - 1]) / slowest).astype(int)

    cca = distances(cca_positions(config, 128), config.width)
    assert cca.tolist() == list(range(126, -66, -1))
    enc = distances(encoder_positions(config, 128, keys=64), config.encoder_width)
    assert enc.tolist() == list(range(127, -65, -1))


@modest
@given(st.integers(-3, 9), st.integers(-3, 9), st.integers(-20, 20))
def test_rotary_products_depend_on_distance_only(place, other, shift):
    generator = np.random.default_rng(0)
    q, k = jnp.asarray(generator.normal(size=(2, 1, 6)))

    def product(a, b):
        turned = (rotate(x, rotation(jnp.array([at]), 6, 10_000.0, jnp.float64)) for x, at in ((q, a), (k, b)))
        return jnp.vdot(*turned)

    np.testing.assert_allclose(product(place, other), product(place + shift, other + shift), atol=1e-12)


@st.composite
def logits_and_masks(draw):
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4)))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mask = generator.random(shape) < draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))
    return generator.normal(size=shape) * draw(st.sampled_from([1.0, 1e4])), mask


@modest
@given(logits_and_masks())
def test_masked_softmax_sums_over_valid_entries_only(case):
    logits, mask = case
    poisoned = np.where(mask, logits, 1e30)  # masked entries may hold anything finite
    found = np.asarray(masked_softmax(jnp.asarray(poisoned), jnp.asarray(mask), (-2, -1)))
    for row, valid, result in zip(logits, mask, found, strict=True):
        assert (result[~valid] == 0).all()
        if valid.any():
            weights = np.exp(row[valid] - row[valid].max())
            np.testing.assert_allclose(result[valid], weights / weights.sum(), atol=1e-12)


def test_masked_softmax_has_the_gradient_of_softmax_and_none_where_nothing_is_valid():
    generator = np.random.default_rng(0)
    logits, cotangent = jnp.asarray(generator.normal(size=(2, 4, 3, 5)))
    mask = jnp.asarray(generator.random((4, 3, 5)) < 0.6).at[2].set(False)

    def plain(x):
        flat = jnp.where(mask, x, -jnp.inf).reshape(4, 15)[jnp.array([0, 1, 3])]
        return jnp.vdot(jax.nn.softmax(flat, axis=-1).reshape(3, 3, 5), cotangent[jnp.array([0, 1, 3])])

    found = jax.grad(lambda x: jnp.vdot(masked_softmax(x, mask, (-2, -1)), cotangent))(logits)
    np.testing.assert_allclose(found, jax.grad(plain)(logits), atol=1e-12)
    assert (np.asarray(found[2]) == 0).all()


@modest
@given(st.integers(1, 6), st.integers(0, 40))
def test_attending_chunks_follow_the_closed_form(chunk_length, extra):  # spec 11.1 [8]
    length = chunk_length + extra
    num_chunks = length // chunk_length
    x = 1.0 + np.arange(length)[None, :, None]
    chunks = np.asarray(attending_chunks(jnp.asarray(x), chunk_length, num_chunks))
    assert chunks.shape == (1, num_chunks, chunk_length, 1)
    expected = np.zeros_like(chunks)
    for t in range(length):
        if t >= chunk_length - 1:
            expected[0, (t + 1) // chunk_length - 1, (t + 1) % chunk_length] = x[0, t]
    np.testing.assert_array_equal(chunks, expected)
    back = np.asarray(positions_of_chunks(jnp.asarray(chunks), length))
    np.testing.assert_array_equal(back, np.where(np.arange(length) >= chunk_length - 1, x[..., 0], 0)[..., None])


@pytest.mark.parametrize("kind", ["transformer_xl", "rope"])
def test_position_parameters_exist_only_where_used(kind):
    names = layer_shapes(dataclasses.replace(SMALL, positions=kind))
    relative = [name for name in names if name.endswith((".relative", ".content_bias", ".position_bias"))]
    assert len(relative) == (0 if kind == "rope" else 3 * (4 + 2 + 2 + 1))  # ATTN, CCA, ATTN_enc, CA_enc


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 3000), st.integers(1, 80), st.integers(1, 6))
def test_causal_blocks_cover_every_query_once_in_order(length, smallest, most):
    blocks = causal_blocks(length, smallest, most)
    assert [t for start, stop in blocks for t in range(start, stop)] == list(range(length))
    assert 1 <= len(blocks) <= most


@pytest.mark.parametrize("kind", ["transformer_xl", "rope"])
def test_queries_in_blocks_give_the_same_logits_and_gradients(kind, monkeypatch):
    config = dataclasses.replace(SMALL, positions=kind, cca_layers=(), num_layers=1)
    params = random_parameters(config)
    tokens = jnp.asarray(inputs(config)[0]).at[0, 4].set(config.pad_id)

    def results():
        def loss(params):
            logits = nnx.merge(graph(config), params)(tokens)
            return jnp.sum(jnp.square(logits)), logits

        return jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)(params)

    assert len(causal_blocks(tokens.shape[1])) == 1
    whole = results()
    monkeypatch.setattr(attention, "causal_blocks", lambda length: [(0, 5), (5, 10), (10, length)])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10), results(), whole)
