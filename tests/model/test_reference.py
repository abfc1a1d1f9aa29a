"""The model equals loops written from the equations."""

import dataclasses

import jax
import numpy as np
import pytest
import reference
from flax import nnx
from small import BLOCKS, SMALL, graph, inputs, logits, random_parameters

from retro_jax.config import RopeScaling
from retro_jax.model import to_layers

CASES = {
    "paper": (SMALL, {}),
    "padding on the left": (SMALL, {}),
    "padding on the left of a whole chunk": (dataclasses.replace(SMALL, chunk_length=3), {"r": 6}),
    "rope": (dataclasses.replace(SMALL, positions="rope"), {}),
    "one neighbour, T a multiple of M": (SMALL, {"length": 12, "k": 1}),
    "three neighbours, long": (SMALL, {"k": 3, "r": 11}),
    "neighbours shorter than a chunk": (SMALL, {"k": 1, "r": 3}),
    "chunks of one token": (dataclasses.replace(SMALL, chunk_length=1), {"length": 5, "r": 2}),
    "chunks of five, wide heads, irregular P": (
        dataclasses.replace(
            SMALL,
            chunk_length=5,
            neighbour_length=10,
            num_layers=5,
            num_heads=2,
            head_size=10,
            cca_layers=(1, 4, 5),
            encoder_ca_layers=(1, 2),
        ),
        {"length": 17},
    ),
    "untied head, encoder conditioned in its last layer": (
        dataclasses.replace(SMALL, tie_embeddings=False, encoder_ca_layers=(2,), cca_layers=(3,)),
        {"length": 9},
    ),
    "shared embedding, rope, three encoder layers": (
        dataclasses.replace(SMALL, share_embeddings=True, encoder_width=16, positions="rope", encoder_layers=3),
        {"length": 9},
    ),
    "no positions in cross-attention": (dataclasses.replace(SMALL, cross_positions=False), {}),
    "no positions in cross-attention, rope": (
        dataclasses.replace(SMALL, cross_positions=False, positions="rope"),
        {"length": 9},
    ),
    "neighbours without continuations": (dataclasses.replace(SMALL, neighbour_part="neighbour"), {"length": 9}),
    "continuations alone": (dataclasses.replace(SMALL, neighbour_part="continuation"), {"length": 9}),
    "baseline": (dataclasses.replace(SMALL, cca_layers=()), {}),
    **{name: (config, {"length": 10}) for name, config in BLOCKS.items()},
    "linear scaling, all with biases": (
        dataclasses.replace(
            BLOCKS["llama"],
            rope_scaling=RopeScaling("linear", 3.0),
            attention_biases="all",
            ffw_biases=True,
            cca_layers=(),
        ),
        {"length": 10},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_forward_equals_loops_from_the_equations(name):
    config, shapes = CASES[name]
    params = random_parameters(config)
    tokens, neighbours = inputs(config, **shapes)
    tokens[0, slice(3) if "on the left" in name else 2] = config.pad_id
    tokens[1, -2:] = config.pad_id
    neighbours[0, 0, 0, 1:] = config.pad_id
    neighbours[1, -1] = config.pad_id  # a chunk without neighbours
    if config.is_baseline:
        neighbours = None
    flat = to_layers(params, config)
    expected = reference.forward(flat, config, tokens, neighbours)
    np.testing.assert_allclose(logits(config, params, tokens, neighbours), expected, rtol=0, atol=1e-9)
    if neighbours is not None:
        off = logits(config, params, tokens)
        np.testing.assert_allclose(off, reference.forward(flat, config, tokens), rtol=0, atol=1e-9)
        assert np.abs(expected - off).max() > 0.01, "neighbours must matter for the comparison to mean anything"


def test_forward_in_float32_stays_within_1e_5():
    config = dataclasses.replace(SMALL, dtype="float32", init_scale=0.02)
    params = random_parameters(config)
    tokens, neighbours = inputs(config)
    expected = reference.forward(to_layers(params, config), config, tokens, neighbours)
    found = jax.jit(nnx.merge(graph(config), params))(tokens, neighbours)  # with the compiler's usual optimisations
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
