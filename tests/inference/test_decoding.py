"""Greedy, temperature, top-k and top-p choose as they say."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from retro_jax.errors import UserError
from retro_jax.inference.decoding import Decoding, choose, distribution

LOGITS = arrays(np.float32, st.integers(1, 20), elements=st.floats(-20, 20, width=32))


def test_greedy_takes_the_most_likely_token_and_the_lower_id_of_equals():
    assert choose(np.asarray([0.0, 2.0, 2.0, 1.0]), Decoding(temperature=0), 5) == 1


@settings(deadline=None, max_examples=200)
@given(logits=LOGITS, temperature=st.floats(0.1, 3), top_k=st.integers(0, 25), top_p=st.floats(0.01, 1))
def test_kept_tokens_are_the_smallest_prefix_by_rank(logits, temperature, top_k, top_p):
    probabilities = distribution(logits, Decoding(temperature, top_k, top_p))
    assert probabilities.sum() == pytest.approx(1)
    full = np.exp(logits.astype(np.float64) / temperature - np.max(logits.astype(np.float64) / temperature))
    full /= full.sum()
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: top_k or None]
    kept = [i for i in order if probabilities[i] > 0 or full[i] == 0]
    count = np.count_nonzero(probabilities)
    assert set(np.flatnonzero(probabilities)) <= set(order[:count]) or full.min() == 0
    mass = full[order].sum()
    if top_p < 1 and count:
        assert full[order[:count]].sum() >= top_p * mass * (1 - 1e-9)
        assert full[order[: count - 1]].sum() <= top_p * mass * (1 + 1e-9)
    np.testing.assert_allclose(
        probabilities[kept], full[kept] / full[np.flatnonzero(probabilities)].sum(), rtol=1e-6, atol=1e-12
    )


def test_draws_repeat_with_the_seed_and_follow_the_distribution():
    logits = np.log(np.asarray([0.5, 0.3, 0.2]))
    draws = [choose(logits, Decoding(seed=7), position) for position in range(4000)]
    assert draws == [choose(logits, Decoding(seed=7), position) for position in range(4000)]
    assert draws != [choose(logits, Decoding(seed=8), position) for position in range(4000)]
    np.testing.assert_allclose(np.bincount(draws) / 4000, [0.5, 0.3, 0.2], atol=0.03)


def test_a_banned_token_is_never_drawn():
    logits = np.asarray([-np.inf, 0.0, 0.0])
    assert 0 not in {choose(logits, Decoding(seed=s), 1) for s in range(50)}


@pytest.mark.parametrize("mistake", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_settings_out_of_range_are_refused(mistake):
    with pytest.raises(UserError, match=next(iter(mistake))):
        Decoding(**mistake)
