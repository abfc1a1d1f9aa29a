"""The rules that choose how an index is built."""

import json

import pytest

from retro_jax.errors import UserError
from retro_jax.retrieval.index_settings import IndexSettings, build_bytes, shards_for


def test_kind_and_sizes_follow_the_number_of_vectors():
    assert IndexSettings().resolve(20_000, 16, unit=False).kind == "brute_force"
    made = IndexSettings().resolve(100_000, 384, unit=True)
    assert (made.kind, made.score, made.dimensions_per_block) == ("tree", "dot_product", 2)
    assert (made.num_leaves, made.spill, made.leaf_eta, made.rescore) == (443, 1.0, 4.0, "bfloat16")
    assert made.leaves_to_search is None  # measured
    assert IndexSettings(spill=0).resolve(100_000, 384, unit=True).spill == 0
    assert IndexSettings().resolve(100_000, 768, unit=True).dimensions_per_block == 3
    made = IndexSettings().resolve(100_000, 384, unit=False)
    assert (made.score, made.num_leaves, made.spill, made.rescore) == ("squared_l2", 316, 0.0, "float32")
    assert made.leaf_eta == 0
    assert IndexSettings(kind="brute_force").resolve(10**6, 16, unit=True).kind == "brute_force"
    made = IndexSettings(num_leaves=50, leaves_to_search=70, reorder=9).resolve(30_000, 16, unit=False)
    assert (made.num_leaves, made.leaves_to_search, made.reorder) == (50, 50, 9)
    again = made.resolve(30_000, 16, unit=False)
    assert again == made


@pytest.mark.parametrize(
    ("wrong", "unit", "message"),
    [
        ({"kind": "graph"}, True, "kind 'graph' is not one of auto, brute_force, tree"),
        ({"rescore": "int8"}, True, "rescore 'int8' is not one of"),
        ({"kind": "tree", "num_leaves": 0}, True, "num_leaves must be at least 1"),
        ({"kind": "tree", "num_leaves": 51}, True, "num_leaves 51 is too many for 100 vectors; at most 50"),
        ({"score": "dot_product"}, False, "needs vectors of length 1"),
        ({"spill": 1.0}, False, "spill needs score dot_product"),
        ({"spill": -1.0}, True, "spill must not be negative"),
        ({"leaf_eta": 2.0}, False, "leaf_eta needs score dot_product"),
        ({"score": "squared_l2", "spill": 1.0}, True, "spill needs score dot_product"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong, unit, message):
    with pytest.raises(UserError, match=message):
        IndexSettings(**wrong).resolve(100, 16, unit=unit)


def test_a_tree_needs_vectors_to_learn_from():
    with pytest.raises(UserError, match="needs at least 64 vectors"):
        IndexSettings(kind="tree").resolve(63, 16, unit=False)


def test_shards_are_as_few_as_can_be_built():
    assert shards_for(1000, 384) == 1
    largest = 10**9 // build_bytes(384)
    assert shards_for(largest, 384, 1e9) == 1
    assert shards_for(largest + 1, 384, 1e9) == 2
    with pytest.raises(UserError, match="give more"):
        shards_for(10**6, 384, 1e6)


def test_settings_are_read_from_a_file(tmp_path):
    path = tmp_path / "settings.json"
    for value in ({"num_leaves": 7}, {"settings": {"num_leaves": 7}, "trials": []}):
        path.write_text(json.dumps(value))
        assert IndexSettings.load(path) == IndexSettings(num_leaves=7)
    for text in ("[]", "{", '{"leafs": 3}'):
        path.write_text(text)
        with pytest.raises(UserError, match="no settings of an index"):
            IndexSettings.load(path)
    for value, told in (
        ({"num_leaves": "7"}, 'num_leaves is "7", expected a whole number or null'),
        ({"num_leaves": 7.0}, "num_leaves is 7.0, expected a whole number or null"),
        ({"num_leaves": True}, "num_leaves is true, expected"),
        ({"training_sample": None}, "training_sample is null, expected a whole number"),
        ({"spill": "1"}, 'spill is "1", expected a number or null'),
        ({"kind": None}, "kind is null, expected a text"),
    ):
        path.write_text(json.dumps(value))
        with pytest.raises(UserError, match=told):
            IndexSettings.load(path)
    path.write_text(json.dumps({"spill": 1, "leaf_eta": 0.5, "score": None}))
    assert IndexSettings.load(path) == IndexSettings(spill=1.0, leaf_eta=0.5)
    with pytest.raises(UserError, match="no such file"):
        IndexSettings.load(tmp_path / "absent.json")
