"""Counts are those of the paper; names reach every parameter of every layer."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from small import SMALL, inputs, logits, random_parameters

from retro_jax.errors import UserError
from retro_jax.model import (
    PRESETS,
    abstract_parameters,
    count_parameters,
    from_layers,
    layer_shapes,
    logical_axes,
    matrix_parameters,
    preset,
    to_layers,
)

# Spec 4.2: baseline, RETRO, number of CCA layers, CA_enc, one CCA.
PAPER = {
    "172m": (132_120_576, 172_490_752, 3, 4_587_520, 4_587_520),
    "425m": (368_050_176, 425_459_712, 3, 5_898_240, 9_830_400),
    "1.5b": (1_308_622_848, 1_451_360_256, 7, 6_946_816, 16_252_928),
    "7.5b": (6_979_321_856, 7_531_528_192, 9, 11_141_120, 57_671_680),
}


@pytest.mark.parametrize("name", PAPER)
def test_matrix_parameters_equal_the_paper(name):  # spec 11.1 [1]
    baseline, retro, cca_layers, ca_enc, cca = PAPER[name]
    assert matrix_parameters(preset(name)) == {
        "decoder": baseline,
        "encoder": 22_020_096,
        "ca_enc": ca_enc,
        "cca": cca_layers * cca,
        "total": retro,
    }
    assert matrix_parameters(preset(f"{name}-baseline"))["total"] == baseline
    # Table 10 calls the baselines 247M, 564M, 1,574M and 7,505M with one tied embedding matrix.
    total = count_parameters(preset(f"{name}-baseline"))
    assert 0 <= total - baseline - 128_000 * preset(name).width < 2e-4 * total


@pytest.mark.parametrize("name", PRESETS)
def test_every_dimension_of_every_parameter_has_a_name(name):
    params = abstract_parameters(preset(name))
    for path, leaf in nnx.to_flat_state(params):
        assert len(leaf.axes) == len(leaf.shape), path
        assert leaf.dtype == np.float32
        sizes = dict(zip(leaf.axes, leaf.shape, strict=True))
        config = preset(name)
        assert sizes.get("vocab", config.vocab_size) == config.vocab_size
        assert sizes.get("embed", config.width) == config.width
        assert sizes.get("encoder_embed", config.encoder_width) == config.encoder_width
    names = {
        axis for axes in jax.tree.leaves(logical_axes(params), is_leaf=lambda n: isinstance(n, tuple)) for axis in axes
    }
    expected = {"vocab", "embed", "heads", "head", "ffw", "layers", "encoder_embed"}
    assert names == expected - ({"encoder_embed"} if preset(name).is_baseline else set())


CONFIGS = {
    "paper": SMALL,
    "irregular": dataclasses.replace(
        SMALL, num_layers=9, cca_layers=(3, 4, 8), encoder_layers=3, encoder_ca_layers=(3,)
    ),
    "first layer only": dataclasses.replace(SMALL, cca_layers=(1,)),
    "last layer only, rope, untied": dataclasses.replace(
        SMALL, cca_layers=(4,), positions="rope", tie_embeddings=False
    ),
    "baseline": dataclasses.replace(SMALL, cca_layers=()),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_survive_the_way_to_layers_and_back(name):
    config = CONFIGS[name]
    params = random_parameters(config)
    flat = to_layers(params, config)
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in flat.items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in layer_shapes(config).items()
    }
    back = from_layers(flat, config)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    for layer in range(1, config.num_layers + 1):
        assert (f"decoder.layers.{layer}.cca.query" in flat) == (layer in config.cca_layers)
        assert f"decoder.layers.{layer}.ffw.up" in flat
    for layer in range(1, config.encoder_layers + 1):
        conditioned = not config.is_baseline and layer in config.encoder_ca_layers
        assert (f"encoder.layers.{layer}.ca.query" in flat) == conditioned
    assert sum(leaf.size for leaf in flat.values()) == count_parameters(config)


def test_names_do_not_depend_on_which_layers_have_cca():
    """A baseline's parameters are those of RETRO with the same name: what RETROfitting copies."""
    plain, retro = CONFIGS["baseline"], SMALL
    params = random_parameters(retro)
    flat = to_layers(params, retro)
    baseline = from_layers({name: flat[name] for name in layer_shapes(plain)}, plain)
    tokens, _ = inputs(retro)
    np.testing.assert_allclose(logits(plain, baseline, tokens), logits(retro, params, tokens), rtol=0, atol=1e-12)


def test_wrong_parameters_are_named():
    config = CONFIGS["baseline"]
    flat = to_layers(random_parameters(config), config)
    name = "decoder.layers.3.ffw.up"
    with pytest.raises(UserError, match=r"parameter decoder.layers.3.ffw.up is missing"):
        from_layers({key: value for key, value in flat.items() if key != name}, config)
    with pytest.raises(
        UserError, match=r"decoder.layers.3.ffw.up has shape \(20, 16\), the configuration needs \(16, 20\)"
    ):
        from_layers({**flat, name: flat[name].T}, config)
    with pytest.raises(UserError, match=r"decoder.layers.9.ffw.up is unknown.*did you mean 'decoder.layers"):
        from_layers({**flat, "decoder.layers.9.ffw.up": flat[name]}, config)
