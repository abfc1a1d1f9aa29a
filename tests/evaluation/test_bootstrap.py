"""Intervals cover what they should, and documents that belong together are drawn together."""

import math

import numpy as np
import pytest

from retro_jax.evaluation.bits_per_byte import DocumentScores
from retro_jax.evaluation.bootstrap import bits_per_byte_difference, rate_difference


def scores(nats, size=None, keys=None):
    nats = np.asarray(nats, np.float64)
    size = np.full(len(nats), 100) if size is None else np.asarray(size)
    return DocumentScores(nats, size, size, np.arange(len(nats)) if keys is None else np.asarray(keys))


def test_the_estimate_is_the_difference_of_the_bits_per_byte_of_all_documents():
    first, second = scores([50, 100, 30], [10, 40, 5]), scores([40, 110, 20], [10, 40, 5])
    found = bits_per_byte_difference(first, second)
    assert found.estimate == pytest.approx(second.total().bits_per_byte - first.total().bits_per_byte)
    assert found.low <= found.estimate <= found.high and found.units == 3


def test_a_difference_that_every_document_shows_is_certain_and_one_that_chance_makes_is_not():
    generator = np.random.default_rng(1)
    base = generator.uniform(50, 100, 200)
    assert bits_per_byte_difference(scores(base), scores(base - 1 - generator.uniform(0, 1, 200))).is_certain
    assert not bits_per_byte_difference(scores(base), scores(base + generator.normal(0, 5, 200))).is_certain
    same = bits_per_byte_difference(scores(base), scores(base))
    assert (same.estimate, same.low, same.high, same.is_certain) == (0, 0, 0, False)


def test_the_interval_is_as_wide_as_the_normal_approximation_says():
    change = np.random.default_rng(0).normal(-3, 10, 400)
    found = bits_per_byte_difference(scores(np.full(400, 200.0)), scores(200 + change))
    half = 1.96 * change.std() / math.sqrt(400) / 100 / math.log(2)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)


def test_documents_of_a_group_count_as_one():
    change = np.random.default_rng(0).normal(0, 10, 40)
    alone = bits_per_byte_difference(scores(np.full(40, 200.0)), scores(200 + change))
    repeated = np.repeat(change, 9)
    keys = np.repeat(np.arange(40), 9)
    together = bits_per_byte_difference(scores(np.full(360, 200.0), keys=keys), scores(200 + repeated, keys=keys))
    assert together.units == 40
    assert (together.low, together.high) == pytest.approx((alone.low, alone.high))


def test_few_documents_prove_nothing_however_alike_they_are():
    for count, certain in ((7, False), (8, True)):
        base = np.full(count, 100.0)
        assert bits_per_byte_difference(scores(base), scores(base - 50)).is_certain == certain


def test_documents_without_scored_bytes_count_for_nothing():
    found = bits_per_byte_difference(scores([50, 0], [10, 0]), scores([40, 0], [10, 0]))
    assert found.units == 1 and not found.is_certain
    nothing = bits_per_byte_difference(scores([0], [0]), scores([0], [0]))
    assert math.isnan(nothing.estimate) and nothing.units == 0 and not nothing.is_certain


def test_rates_are_compared_too():
    right = np.arange(100) % 2 == 0
    found = rate_difference(right, np.ones(100, bool), np.arange(100))
    assert found.estimate == 0.5 and found.is_certain


def test_scores_of_other_text_are_refused():
    with pytest.raises(AssertionError, match="not of the same text"):
        bits_per_byte_difference(scores([1], [10]), scores([1], [11]))
