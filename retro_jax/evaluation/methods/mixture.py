"""Mixtures of a language model with a second distribution over the next token, in log space.

    p = lambda p_other + (1 - lambda) p_LM

(paper section 4.1; kNN-LM, Khandelwal et al. 2020, equation 3; the continuous cache, Grave et al. 2017, equation 3).
Only the probability of the token that came is needed, so both sides are one number a token. Where the second
distribution does not exist (nothing is remembered yet) its logarithm is NaN and the language model stands alone.
"""

from collections.abc import Iterable

import numpy as np

_HALVINGS = 60
_MOST = 1 - 1e-6  # a weight of 1 would give probability 0 to what only the language model knows


def mix(nats: np.ndarray, log_other: np.ndarray, weight: np.ndarray | float) -> np.ndarray:
    """-ln((1 - weight) exp(-nats) + weight exp(log_other)) [n] float64; exactly `nats` where the weight is 0.

    Args:
      nats: [n], -ln p_LM(token).
      log_other: [n], ln p_other(token), -inf for probability 0, NaN where there is no such distribution.
      weight: lambda in [0, 1], one number or [n].
    """
    nats = np.asarray(nats, np.float64)
    weight = np.asarray(weight, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        mixed = -np.logaddexp(np.log1p(-weight) - nats, np.log(weight) + log_other)
    return np.where(np.isnan(log_other), nats, mixed)


def best_weight(nats: np.ndarray, log_other: np.ndarray) -> float:
    """The lambda in [0, 1) with the least sum of `mix`, which is convex: the zero of its slope is found by halving.

    Args:
      nats, log_other: [n] of the tokens that it is tuned on; as for `mix`.
    """
    known = ~np.isnan(log_other)
    if not known.any():
        return 0.0
    # d/d lambda of -ln((1 - lambda) p + lambda q) = -(r - 1) / (1 + lambda (r - 1)) with r = q / p.
    excess = np.expm1(np.minimum(np.asarray(log_other[known], np.float64) + nats[known], 700.0))
    low, high = 0.0, _MOST
    if excess.sum() <= 0:
        return low
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if (excess / (1 + middle * excess)).sum() > 0:
            low = middle
        else:
            high = middle
    # The lower end: the sum still falls towards it from 0.
    return low


def best_mixture(nats: np.ndarray, candidates: Iterable[tuple[float, np.ndarray]]) -> tuple[float, float]:
    """Of several second distributions the one that makes the best mixture, and its weight.

    Args:
      nats: [n] of the tokens that it is tuned on.
      candidates: a number that names it (a temperature, say) and `log_other` [n] of each, at least one.

    Returns:
      (the number, lambda); the first candidate's with weight 0 where none is of use.
    """
    least, best = np.asarray(nats, np.float64).sum(), None
    for name, log_other in candidates:
        weight = best_weight(nats, log_other)
        found = mix(nats, log_other, weight).sum()
        if best is None or found < least:
            best = (name, weight if found < least else 0.0)
            least = min(found, least)
    assert best is not None, "no candidate to choose from"
    return best


def neighbour_log_probability(distances: np.ndarray, matches: np.ndarray, sharpness: float) -> np.ndarray:
    """ln p_kNN(token) [n] float64: p_kNN(y) is proportional to the sum of exp(-sharpness d) over neighbours of value y.

    (Paper appendix C.2, where sharpness is called alpha; Khandelwal et al. 2020, equation 2.)

    Args:
      distances: [n, k] squared L2 distances, +inf for none.
      matches: bool [n, k], whether the neighbour's value is the token that came.
      sharpness: inverse of the temperature, at least 0.

    Returns:
      -inf where no neighbour has the token, NaN where there is no neighbour.
    """
    logits = neighbour_logits(distances, sharpness)
    with np.errstate(invalid="ignore"):  # NaN is meant where there is nothing
        return log_sum(np.where(matches, logits, -np.inf)) - log_sum(logits)


def neighbour_logits(distances: np.ndarray, sharpness: float) -> np.ndarray:
    """-sharpness d float64 [n, k] of squared distances, -inf for none: ln of a weight but for a constant."""
    return np.where(np.isfinite(distances), -sharpness * np.asarray(distances, np.float64), -np.inf)


def most_probable(own: np.ndarray, tokens: np.ndarray, other: np.ndarray, weight: np.ndarray | float) -> np.ndarray:
    """The most probable token [n] int32 of (1 - weight) p_LM + weight p_other, the first of equals.

    Args:
      own: [n, V] logits of the language model.
      tokens: [n, S] int, tokens that the second distribution knows; a repeated one adds up.
      other: [n, S] their logits, -inf for none. Where all are, there is no such distribution.
      weight: lambda in [0, 1], one number or [n].
    """
    known = np.isfinite(other).any(axis=-1)
    weight = np.where(known, weight, 0.0)[:, None]
    mixed = (1 - weight) * _softmax(own)
    np.add.at(mixed, (np.arange(len(own))[:, None], tokens), weight * _softmax(np.where(known[:, None], other, 0.0)))
    return mixed.argmax(axis=-1).astype(np.int32)


def log_sum(logits: np.ndarray) -> np.ndarray:
    """ln of the sum of exponentials over the last axis, -inf for nothing but -inf; -inf minus it is NaN then."""
    highest = logits.max(axis=-1, initial=-np.inf)
    shift = np.where(np.isfinite(highest), highest, 0)
    with np.errstate(divide="ignore"):
        return shift + np.log(np.exp(logits - shift[..., None]).sum(axis=-1))


def _softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits - log_sum(logits)[:, None])
