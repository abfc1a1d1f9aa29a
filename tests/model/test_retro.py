"""The public model: shapes, messages, dtypes, initialisation, presets."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small import QUICK, SMALL, graph, inputs, logits, random_parameters

import retro_jax
from retro_jax.errors import UserError
from retro_jax.model import PRESETS, Retro, from_layers, layer_shapes, preset, to_layers
from retro_jax.model.layers import gelu


def shaped(config, tokens, neighbours=None):
    """eval_shape of the model on int32 inputs of these shapes."""
    specs = [None if shape is None else jax.ShapeDtypeStruct(shape, np.int32) for shape in (tokens, neighbours)]
    return jax.eval_shape(lambda *arguments: Retro(config)(*arguments), *specs)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_gives_logits_of_its_shape(name):
    config = preset(name)
    out = shaped(config, (2, 512), None if config.is_baseline else (2, 8, 2, 128))
    assert out.shape == (2, 512, config.vocab_size)
    assert out.dtype == np.float32
    assert shaped(config, (2, 512)).shape == out.shape
    baseline = preset(name.removesuffix("-baseline") + "-baseline")
    assert baseline == dataclasses.replace(config, cca_layers=())


def test_presets_take_changes_and_name_the_nearest_when_unknown():
    assert retro_jax.RetroConfig.preset("tiny", num_layers=9, cca_layers=(3, 6, 9)).num_layers == 9
    assert preset("1.5b").cca_layers == (6, 9, 12, 15, 18, 21, 24)
    with pytest.raises(UserError, match=r"preset 'tinny' is unknown; did you mean 'tiny'"):
        preset("tinny")
    with pytest.raises(UserError, match=r"model.num_layer: unknown key; did you mean 'num_layers'"):
        preset("tiny", num_layer=3)


@pytest.mark.parametrize(
    ("tokens", "neighbours", "message"),
    [
        ((8,), None, r"tokens must be integers \[B, T\], are int32 \(8,\)"),
        ((2, 14), (2, 4, 2, 8), r"neighbours \(2, 4, 2, 8\) do not fit tokens \(2, 14\).*\[2, 3, K, R\]"),
        ((2, 14), (1, 3, 2, 8), r"neighbours \(1, 3, 2, 8\) do not fit tokens \(2, 14\)"),
        ((2, 14), (2, 3, 8), r"neighbours \(2, 3, 8\) do not fit tokens \(2, 14\)"),
    ],
)
def test_wrong_shapes_are_named(tokens, neighbours, message):
    with pytest.raises(UserError, match=message):
        shaped(SMALL, tokens, neighbours)


def test_neighbours_of_the_last_chunks_are_as_if_those_before_had_none():
    config = dataclasses.replace(SMALL, num_layers=2, cca_layers=(1, 2), encoder_layers=1)
    params = random_parameters(config)
    tokens, neighbours = inputs(config, length=15)
    tokens[1, :5] = config.pad_id

    def of_last_chunks(params, tokens, neighbours):
        model = nnx.merge(graph(config), params)
        return model.logits(model.hidden(tokens, neighbours, last_chunks=True))

    for chunks in (1, 2):
        padded = neighbours.copy()
        padded[:, : 3 - chunks] = config.pad_id
        found = jax.jit(of_last_chunks, compiler_options=QUICK)(params, tokens, neighbours[:, 3 - chunks :])
        np.testing.assert_allclose(found, logits(config, params, tokens, padded), atol=1e-12)
    with pytest.raises(UserError, match=r"neighbours \(2, 4, 2, 8\) do not fit"):
        jax.eval_shape(of_last_chunks, params, tokens, np.zeros((2, 4, 2, 8), np.int32))


def test_wrong_dtypes_and_neighbours_for_a_baseline_are_refused():
    tokens = jax.ShapeDtypeStruct((2, 14), np.float32)
    with pytest.raises(UserError, match=r"tokens must be integers \[B, T\], are float32"):
        jax.eval_shape(lambda x: Retro(SMALL)(x), tokens)
    with pytest.raises(UserError, match=r"a baseline \(cca_layers = \(\)\) takes no neighbours"):
        shaped(dataclasses.replace(SMALL, cca_layers=()), (2, 14), (2, 3, 2, 8))
    with jax.enable_x64(False), pytest.raises(UserError, match="float64 needs jax_enable_x64"):
        Retro(SMALL)


def test_sequence_shorter_than_a_chunk_has_nothing_to_retrieve():
    params = random_parameters(SMALL)
    tokens, neighbours = inputs(SMALL, length=3)
    assert neighbours.shape[1] == 0
    np.testing.assert_array_equal(logits(SMALL, params, tokens, neighbours), logits(SMALL, params, tokens))


def test_any_number_and_length_of_neighbours_is_taken():
    params = random_parameters(SMALL)
    for k, r in ((1, 8), (5, 3), (3, 12)):
        assert np.isfinite(logits(SMALL, params, *inputs(SMALL, k=k, r=r))).all()


def test_bfloat16_computes_near_float32_with_float32_parameters_and_logits():
    config = dataclasses.replace(SMALL, dtype="bfloat16")
    params = random_parameters(dataclasses.replace(SMALL, dtype="float32"))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    tokens, neighbours = inputs(config)
    low = logits(config, params, tokens, neighbours)
    high = logits(dataclasses.replace(SMALL, dtype="float32"), params, tokens, neighbours)
    assert low.dtype == np.float32
    assert np.corrcoef(low.ravel(), high.ravel())[0, 1] > 0.999
    hidden = jax.eval_shape(lambda params: nnx.merge(graph(config), params).hidden(tokens, neighbours), params)
    assert (hidden.shape, hidden.dtype) == ((*tokens.shape, config.width), jnp.bfloat16)


@functools.cache
def initialised():
    with jax.enable_x64(True):
        config = dataclasses.replace(SMALL, width=64, ffw_width=256, vocab_size=256, dtype="float32")
        return config, to_layers(jax.jit(lambda: nnx.state(Retro(config, rngs=nnx.Rngs(7))))(), config)


def test_initial_parameters_follow_the_configuration():
    config, flat = initialised()
    for name, leaf in flat.items():
        last = name.rsplit(".", 1)[-1]
        if last == "scale":
            assert (leaf == 1).all()
        elif last.endswith("_bias"):
            assert (leaf == 0).all()
        else:
            depth = config.num_layers if name.startswith("decoder") else config.encoder_layers
            scale = config.init_scale * (1 / math.sqrt(2 * depth) if last in ("output", "down") else 1)
            assert abs(float(leaf.std()) / scale - 1) < 4 / math.sqrt(2 * leaf.size), name


def test_baseline_and_retro_of_one_seed_start_from_the_same_decoder():
    config, flat = initialised()
    plain = dataclasses.replace(config, cca_layers=())
    baseline = to_layers(jax.jit(lambda: nnx.state(Retro(plain, rngs=nnx.Rngs(7))))(), plain)
    for name, leaf in baseline.items():
        np.testing.assert_array_equal(leaf, flat[name], err_msg=name)


def test_no_two_layers_start_equal():
    _, flat = initialised()
    kernels = [np.asarray(leaf).ravel()[:8].tobytes() for name, leaf in flat.items() if np.asarray(leaf).std() > 0]
    assert len(set(kernels)) == len(kernels)


def test_head_kernel_and_hidden_give_the_logits():
    for tied in (True, False):
        config = dataclasses.replace(SMALL, tie_embeddings=tied, cca_layers=(), num_layers=1)
        params = random_parameters(config)
        tokens, _ = inputs(config)

        model = nnx.merge(graph(config), jax.tree.map(jnp.asarray, params))
        hidden = model.hidden(jnp.asarray(tokens))
        expected = jnp.einsum("btd,vd->btv", hidden, model.head_kernel())
        np.testing.assert_allclose(model.logits(hidden), expected, rtol=0, atol=1e-12)
        assert ("head" in layer_shapes(config)) != tied


def test_a_token_beyond_the_vocabulary_cannot_pass_unnoticed():
    config = dataclasses.replace(SMALL, cca_layers=(), num_layers=1)
    params = random_parameters(config)
    tokens, _ = inputs(config)
    tokens[0, 3] = config.vocab_size
    assert np.isnan(logits(config, params, tokens)[0, 3:]).all()


def test_parameters_by_name_can_be_numpy_arrays_of_any_source():
    flat = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in layer_shapes(SMALL).items()}
    params = from_layers(flat, SMALL)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
    assert (logits(SMALL, params, *inputs(SMALL)) == 0).all()


def test_gelu_and_its_gradient_are_those_of_gpt_2():
    x = jnp.linspace(-6, 6, 101)
    for mine, theirs in ((gelu, jax.nn.gelu), (jax.vmap(jax.grad(gelu)), jax.vmap(jax.grad(jax.nn.gelu)))):
        np.testing.assert_allclose(mine(x), theirs(x), rtol=0, atol=1e-12)
