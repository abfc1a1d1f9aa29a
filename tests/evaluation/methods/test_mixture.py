"""Mixtures in log space are those in plain numbers, and the tuned weight is the best one."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_jax.evaluation.methods.mixture import (
    best_mixture,
    best_weight,
    log_sum,
    mix,
    most_probable,
    neighbour_log_probability,
)

probability = st.floats(1e-12, 1.0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(probability, st.one_of(st.just(0.0), probability)), min_size=1, max_size=20), st.floats(0, 1))
def test_a_mixture_is_the_weighted_sum_of_probabilities(pairs, weight):
    own, other = np.array(pairs).T
    with np.errstate(divide="ignore"):
        found = mix(-np.log(own), np.log(other), weight)
        expected = -np.log((1 - weight) * own + weight * other)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_a_weight_of_zero_and_no_second_distribution_leave_every_bit():
    nats = np.random.default_rng(0).gamma(2.0, 2.0, 1000).astype(np.float32)
    other = np.log(np.random.default_rng(1).random(1000))
    other[::3] = -np.inf
    np.testing.assert_array_equal(mix(nats, other, 0.0), nats)
    np.testing.assert_array_equal(mix(nats, np.full(1000, np.nan), 0.7), nats)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(probability, st.one_of(st.just(0.0), probability)), min_size=1, max_size=20))
def test_the_tuned_weight_is_no_worse_than_any_other(pairs):
    own, other = np.array(pairs).T
    with np.errstate(divide="ignore"):
        nats, log_other = -np.log(own), np.log(other)
    weight = best_weight(nats, log_other)
    assert 0 <= weight < 1
    least = mix(nats, log_other, weight).sum()
    assert least <= nats.sum() + 1e-9 * len(nats)
    for rival in np.linspace(0, 0.999, 200):
        assert least <= mix(nats, log_other, rival).sum() + 1e-7 * len(nats)


def test_of_several_distributions_the_one_that_helps_most_is_taken_and_none_where_none_helps():
    nats = np.full(4, 1.0)
    useless, good, better = (np.log(np.full(4, p)) for p in (0.1, 0.5, 0.9))
    name, weight = best_mixture(nats, [(7.0, useless), (8.0, better), (9.0, good)])
    assert name == 8.0 and weight > 0.99
    assert best_mixture(nats, [(7.0, useless), (8.0, useless)]) == (7.0, 0.0)


def test_a_distribution_that_never_knows_more_gets_no_weight():
    nats = np.array([0.1, 0.2, 0.3])
    assert best_weight(nats, np.full(3, -np.inf)) == 0
    assert best_weight(nats, np.full(3, np.nan)) == 0


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 6).flatmap(
        lambda k: st.lists(
            st.tuples(
                st.lists(st.floats(0, 1e4, width=32), min_size=k, max_size=k),
                st.lists(st.integers(0, 3), min_size=k, max_size=k),
            ),
            min_size=1,
            max_size=5,
        )
    ),
    st.floats(0, 10),
)
def test_the_neighbours_make_a_distribution_that_sums_to_one(rows, sharpness):
    distances = np.array([row[0] for row in rows], np.float32)
    values = np.array([row[1] for row in rows])
    total = np.zeros(len(rows))
    for token in range(4):
        found = np.exp(neighbour_log_probability(distances, values == token, sharpness))
        for row in range(len(rows)):
            weights = [math.exp(-sharpness * (float(d) - float(distances[row].min()))) for d in distances[row]]
            expected = sum(w for w, v in zip(weights, values[row], strict=True) if v == token) / sum(weights)
            assert found[row] == pytest.approx(expected, rel=1e-9, abs=1e-300)
        total += found
    np.testing.assert_allclose(total, 1, rtol=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(0, 5))
def test_the_most_probable_token_of_a_mixture_is_that_of_all_probabilities(data, count, known):
    vocab = 6
    logit = st.integers(-30, 30).map(lambda value: value / 7)
    own = np.array(data.draw(st.lists(st.lists(logit, min_size=vocab, max_size=vocab), min_size=count, max_size=count)))
    tokens = np.array(data.draw(st.lists(st.integers(-1, vocab - 1), min_size=count * known, max_size=count * known)))
    tokens = tokens.reshape(count, known).astype(int)
    other = np.array(data.draw(st.lists(logit, min_size=count * known, max_size=count * known))).reshape(tokens.shape)
    other = np.where(tokens >= 0, other, -np.inf)
    weight = data.draw(st.floats(0, 1))
    for row, best in enumerate(most_probable(own, tokens, other, weight)):
        model = np.exp(own[row]) / np.exp(own[row]).sum()
        masses = np.exp(other[row])
        share = weight if masses.any() else 0.0
        second = [masses[tokens[row] == token].sum() / max(masses.sum(), 1e-300) for token in range(vocab)]
        mixed = (1 - share) * model + share * np.array(second)
        assert mixed[best] == pytest.approx(max(mixed), rel=1e-12)


def test_missing_neighbours_count_for_nothing_and_none_at_all_are_no_distribution():
    distances = np.array([[0.5, np.inf], [np.inf, np.inf]], np.float32)
    found = neighbour_log_probability(distances, np.array([[True, False], [False, False]]), 2.0)
    assert found[0] == 0 and np.isnan(found[1])


def test_the_logarithm_of_a_sum_does_not_overflow():
    np.testing.assert_allclose(log_sum(np.array([[1e4, 1e4], [-1e4, -np.inf]])), [1e4 + math.log(2), -1e4])
    assert log_sum(np.full((1, 2), -np.inf)) == -np.inf
