"""What a suite does of itself: all that can be made, at a bounded cost."""

import types

import pytest

from retro_jax.evaluation.choice import chosen_datastore_share, chosen_methods, chosen_steps, chosen_sweeps
from retro_jax.evaluation.methods import METHODS


def test_all_methods_that_can_be_made_are_and_the_others_are_named():
    chosen, left_out = chosen_methods(baseline=True, retro=True, tuning=True)
    assert chosen == list(METHODS) and left_out == []
    chosen, left_out = chosen_methods(baseline=True, retro=False, tuning=False)
    assert chosen == ["knn_lm", "cache", "prepend", "rag"]
    assert left_out == [
        "spalm, which needs a tuning set",
        "bm25, which is for a RETRO",
        "bm25_rerank, which is for a RETRO",
    ]


def test_sweeps_are_made_on_the_first_set_with_neighbours():
    sets = [types.SimpleNamespace(name=name, neighbours=some) for name, some in (("a", None), ("b", 1), ("c", 1))]
    assert chosen_sweeps(sets) == ("b",) and chosen_sweeps(sets[:1]) == ()


@pytest.mark.parametrize(
    ("saved", "evaluated", "steps"),
    [
        (([10, 20], [20]), (20, 20), [10]),
        (([20], [20]), (20, 20), []),
        ((list(range(10, 110, 10)), [50, 100]), (100, 100), [10, 50, 90]),
        (([10, 20, 30], [20, 40]), (20, 40), [10, 20]),
    ],
)
def test_up_to_three_earlier_steps_are_scored(saved, evaluated, steps):
    assert chosen_steps(saved, evaluated) == steps


def test_a_datastore_has_about_a_million_tokens_or_all_there_are():
    parts = [types.SimpleNamespace(num_tokens=tokens) for tokens in (1_000_000, 3_000_000)]
    assert chosen_datastore_share(types.SimpleNamespace(parts=parts)) == 0.25
    assert chosen_datastore_share(types.SimpleNamespace(parts=parts[:1])) == 1.0
