"""Configuration: strict, typed, the same as JSON."""

import dataclasses
import json

import ml_collections
import pytest

from retro_jax.config import RetroConfig, TrainConfig, from_config_dict, from_dict, to_config_dict, to_dict
from retro_jax.errors import UserError

SMALL = RetroConfig(vocab_size=64, width=8, num_layers=4, num_heads=2, head_size=4, ffw_width=16, cca_layers=(2, 4))


def test_json_round_trip_gives_the_same_config():
    config = TrainConfig(model=SMALL, steps=7)
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_config_dict_round_trip_gives_the_same_config():
    config = TrainConfig(model=SMALL)
    assert from_config_dict(TrainConfig, to_config_dict(config)) == config


def test_integers_are_taken_for_floats():
    values = to_dict(TrainConfig(model=SMALL))
    values["optimizer"]["peak_learning_rate"] = 1
    assert from_dict(TrainConfig, values).optimizer.peak_learning_rate == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"widht": 8}}, r"config\.model\.widht: unknown key; did you mean 'width'\?"),
        ({"model": {"width": "wide"}}, r"config\.model\.width: expected int, found 'wide'"),
        ({"model": {"width": True}}, r"config\.model\.width: expected int, found True"),
        ({"model": {"cca_layers": [5]}}, r"model\.cca_layers are 1-based and distinct, at most 4; found \(5,\)"),
        ({"model": {"cca_layers": 3}}, r"config\.model\.cca_layers: expected a list, found 3"),
        ({"model": 3}, r"config\.model: expected a group of settings, found 3"),
        ({"model": {"positions": "rop"}}, r"model\.positions: 'rop' is none of transformer_xl, rope"),
        ({"model": {"remat": "block,query"}}, r"model\.remat: 'block' is none of query, key"),
        ({"steps": 0}, r"steps must be positive, is 0"),
        ({"checkpoint": {"every_steps": 0}}, r"checkpoint\.every_steps must be positive"),
    ],
)
def test_a_mistake_is_named_in_one_line(change, message):
    values = to_dict(TrainConfig(model=SMALL))
    for key, value in change.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    with pytest.raises(UserError, match=message) as caught:
        from_dict(TrainConfig, values)
    assert "\n" not in str(caught.value)


def test_a_missing_key_is_named():
    with pytest.raises(UserError, match=r"config\.model: missing"):
        from_dict(TrainConfig, {})


def test_sequences_given_with_commas_are_split():
    values = to_dict(TrainConfig(model=SMALL))
    values["data"]["sequences"] = ["a,b"]
    assert from_dict(TrainConfig, values).data.sequences == ("a", "b")


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SMALL.width = 3


def test_config_dict_of_a_recipe_takes_overrides():
    recipe = to_config_dict(TrainConfig(model=SMALL))
    assert isinstance(recipe, ml_collections.ConfigDict)
    recipe.model.width = 16
    assert from_config_dict(TrainConfig, recipe).model.width == 16
