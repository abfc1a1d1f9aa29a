"""The continuous cache is its equation, and knows nothing but the document before a token."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_jax.evaluation.methods import cache as cache_module
from retro_jax.evaluation.methods.activations import predictions
from retro_jax.evaluation.methods.cache import ContinuousCache, cache_log_probabilities
from retro_jax.evaluation.methods.mixture import log_sum, mix


def by_equation(states, labels, theta, size, token, t):
    """p_cache(token) before label t, in Python numbers."""
    weights = {}
    for i in range(max(0, t - size), t):
        weight = math.exp(theta * float(states[i] @ states[t]))
        weights[labels[i]] = weights.get(labels[i], 0.0) + weight
    return weights.get(token, 0.0) / sum(weights.values()) if weights else float("nan")


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 14), st.integers(1, 20), st.integers(0, 2**32 - 1), st.sampled_from([1, 3, 256]))
def test_it_is_the_equation_and_sums_to_one(count, size, seed, block):
    rng = np.random.default_rng(seed)
    states, labels = rng.normal(size=(count, 3)).astype(np.float32), rng.integers(0, 4, count)
    kept, cache_module._QUERIES_AT_ONCE = cache_module._QUERIES_AT_ONCE, block
    try:
        found = cache_log_probabilities(states, labels, np.array([0.5, 2.0]), size)
    finally:
        cache_module._QUERIES_AT_ONCE = kept
    assert np.isnan(found[0]).all()
    for t in range(1, count):
        for column, theta in enumerate((0.5, 2.0)):
            expected = by_equation(states, labels, theta, size, labels[t], t)
            assert math.exp(found[t, column]) == pytest.approx(expected, rel=1e-5, abs=1e-12)
            total = sum(by_equation(states, labels, theta, size, token, t) for token in range(4))
            assert total == pytest.approx(1)


def test_what_is_mixed_in_is_the_cache(make_context, valid):
    """From the tokens and logits that decide which token is the most probable one, the cache's own probabilities."""
    context = make_context(cache_size=5)
    method = ContinuousCache(context)
    text = next(predictions(context.with_states, valid.corpus, **context.windows, documents=[0]))
    places = np.array([0, 1, 4, 9])
    found = method.other({"weight": 0.3, "theta": 8.0}, None, text, places)
    assert found.weight == 0.3
    scale = np.asarray(context.run.plan.merge(context.run.params).decoder.norm.scale[...], np.float64)
    thetas = np.array([8.0]) / np.square(scale).sum()
    expected = cache_log_probabilities(text.states, text.labels, thetas, 5)[places, 0]
    assert np.isneginf(found.logits[0]).all() and np.isnan(expected[0])
    for logits, tokens, place, log_probability in zip(found.logits, found.tokens, places, expected, strict=True):
        if place:
            weights = np.exp(logits - log_sum(logits))
            assert weights[tokens == text.labels[place]].sum() == pytest.approx(
                np.exp(log_probability), rel=1e-4, abs=1e-9
            )
            assert np.isfinite(logits).sum() == min(place, 5)


def test_a_cache_of_weight_zero_is_the_model_and_a_tuned_one_no_worse(make_context, valid):
    method = ContinuousCache(make_context(cache_size=40))
    evidence = method.gather(valid)
    np.testing.assert_array_equal(method.apply({"weight": 0.0, "theta": 4.0}, evidence), evidence.nats)
    found = method.fit(evidence)
    assert method.apply(found, evidence).sum() <= evidence.nats.sum(dtype=np.float64)
    assert found["weight"] > 0  # a model that was never trained gains by any repetition
    first = np.unique(evidence.documents, return_index=True)[1]
    np.testing.assert_array_equal(method.apply(found, evidence)[first], evidence.nats[first])
    assert mix(evidence.nats, evidence["log_cache"][:, 0], 0.3).sum() != evidence.nats.sum()
