"""Greedy, temperature, top-k, top-p, min-p and the repetition penalty choose as they say."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from retro_jax.errors import UserError
from retro_jax.inference import decoding
from retro_jax.inference.decoding import Decoding

SIZE = 12
# Without subnormal numbers, which a compiled program takes for zero.
LOGITS = arrays(np.float32, SIZE, elements=st.floats(-20, 20, width=32, allow_subnormal=False) | st.just(-np.inf))
_choose, _kept = jax.jit(decoding.choose), jax.jit(decoding.kept)


def choose(logits, settings_, positions, *, seen=None, samples=None):
    """Tokens of rows with the same logits [V] at several positions."""
    rows = len(positions)
    logits = np.broadcast_to(np.asarray(logits, np.float32), (rows, len(logits)))
    seen = np.zeros(logits.shape, bool) if seen is None else np.broadcast_to(seen, logits.shape)
    samples = np.zeros(rows, np.int32) if samples is None else np.asarray(samples, np.int32)
    return np.asarray(_choose(logits, seen, settings_.choice(), samples, np.asarray(positions, np.int32))).tolist()


def test_greedy_takes_the_most_likely_token_and_the_lower_id_of_equals():
    assert choose([0.0, 2.0, 2.0, 1.0], Decoding(temperature=0), [5]) == [1]


@functools.cache
def _oracle(logits, probabilities, top_k, top_p, min_p):
    """Tokens left, by the sentences of Decoding's docstring."""
    order = sorted(range(len(probabilities)), key=lambda token: (-logits[token], token))
    order = order[: top_k or None]
    whole, left, mass = sum(probabilities[token] for token in order), [], 0.0
    for token in order:
        if top_p < 1 and mass >= top_p * whole:
            break
        left.append(token)
        mass += probabilities[token]
    return {token for token in left if probabilities[token] >= min_p * probabilities[order[0]]} | {order[0]}


@settings(deadline=None, max_examples=150)
@given(
    logits=LOGITS,
    top_k=st.integers(0, SIZE + 3),
    top_p=st.sampled_from([0.05, 0.3, 0.5, 0.9, 0.99, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
)
def test_kept_tokens_are_those_of_the_definition(logits, top_k, top_p, min_p):
    if np.isinf(logits).all():
        logits[3] = 0
    kept = np.asarray(_kept(logits[None], Decoding(top_k=top_k, top_p=top_p, min_p=min_p).choice()))[0]
    # Only where float32 sums decide nothing: the oracle is asked a little to both sides.
    weights = np.exp(logits.astype(np.float64) - logits.max())
    probabilities = tuple((weights / weights.sum()).tolist())
    few = _oracle(
        tuple(logits.tolist()), probabilities, top_k, top_p * (1 - 1e-5) if top_p < 1 else 1.0, min_p * (1 + 1e-5)
    )
    many = _oracle(tuple(logits.tolist()), probabilities, top_k, min(1.0, top_p * (1 + 1e-5)), min_p * (1 - 1e-5))
    possible = {token for token in np.flatnonzero(kept).tolist() if probabilities[token] > 0}
    assert {token for token in few if probabilities[token] > 0} <= possible <= many


def test_draws_repeat_with_seed_sample_and_position_and_follow_the_distribution():
    logits, positions = np.log([0.5, 0.3, 0.2]), range(4000)
    draws = choose(logits, Decoding(seed=7), positions)
    assert draws == choose(logits, Decoding(seed=7), positions)
    assert draws[17:20] == choose(logits, Decoding(seed=7), positions[17:20])  # whatever the other rows are
    assert draws != choose(logits, Decoding(seed=8), positions)
    assert draws != choose(logits, Decoding(seed=7), positions, samples=np.ones(4000))
    np.testing.assert_allclose(np.bincount(draws) / 4000, [0.5, 0.3, 0.2], atol=0.03)
    colder = choose(logits, Decoding(temperature=0.5), positions)
    np.testing.assert_allclose(np.bincount(colder) / 4000, np.square([0.5, 0.3, 0.2]) / 0.38, atol=0.03)
    narrow = choose(logits, Decoding(top_k=2), positions)
    np.testing.assert_allclose(np.bincount(narrow) / 4000, [0.625, 0.375], atol=0.03)


def test_draws_over_many_rows_of_lanes_follow_the_distribution():
    logits = np.full(1000, -np.inf)
    logits[[5, 127, 128, 700, 999]] = np.log([0.4, 0.1, 0.2, 0.1, 0.2])
    draws = np.bincount(choose(logits, Decoding(), range(4000)), minlength=1000) / 4000
    np.testing.assert_allclose(draws, np.exp(logits), atol=0.03)
    assert not draws[np.isinf(logits)].any()


def test_a_banned_token_is_never_drawn():
    assert 0 not in choose([-np.inf, 0.0, 0.0], Decoding(), range(200))
    assert set(choose([-np.inf, 0.0, 0.0], Decoding(top_p=0.9), range(200))) == {1, 2}


def test_the_penalty_is_on_tokens_that_the_text_has():
    logits, seen = [2.0, 1.5, -1.0, -1.5], np.asarray([True, False, True, False])
    greedy = Decoding(temperature=0, repetition_penalty=2.0)
    assert choose(logits, greedy, [0]) == [0]
    assert choose(logits, greedy, [0], seen=seen) == [1]  # 2.0 became 1.0
    assert choose([-np.inf, -np.inf, *logits[2:]], greedy, [0], seen=seen) == [3]  # and -1.0 became -2.0


@pytest.mark.parametrize(
    "mistake",
    [
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"seed": -1},
    ],
)
def test_settings_out_of_range_are_refused(mistake):
    with pytest.raises(UserError, match=next(iter(mistake))):
        Decoding(**mistake)
