"""The continuous cache: words of the same document come again after states like those that they came after before.

    p_cache(y) proportional to the sum over i < t with x_(i+1) = y of exp(theta h_i h_t)

over the last tokens of the document (Grave et al. 2017, equations 2 and 3), mixed with the language model. It needs no
database, so it tells what of a gain is mere repetition inside a document.
"""

import functools
from typing import Any

import numpy as np

from retro_jax.evaluation.evaluated import Evaluated
from retro_jax.evaluation.methods.activations import Predicted, predictions
from retro_jax.evaluation.methods.knn_lm import predicted_text
from retro_jax.evaluation.methods.method import MethodContext
from retro_jax.evaluation.methods.mixture import best_mixture, log_sum, mix
from retro_jax.evaluation.methods.tuned import Evidence, Mixture, Other

# theta times the mean squared length of the states.
_SHARPNESS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
_FIXED = {"weight": 0.1, "theta": 4.0}
_QUERIES_AT_ONCE = 256


class ContinuousCache(Mixture):
    """p = lambda p_cache + (1 - lambda) p_LM; lambda and theta are tuned."""

    name = "cache"

    def __init__(self, context: MethodContext) -> None:
        super().__init__(context)
        self.settings |= {"cache_size": context.options.cache_size}

    def gather(self, evaluated: Evaluated) -> Evidence:
        context = self.context
        documents, _, nats = predicted_text(context, evaluated)
        thetas = np.array(_SHARPNESS) / self._length
        found = [
            cache_log_probabilities(one.states, one.labels, thetas, context.options.cache_size)
            for one in predictions(
                context.with_states,
                evaluated.corpus,
                **context.windows,
                description=f"{evaluated.name}: cache",
            )
        ]
        return Evidence(documents, nats, {"log_cache": np.concatenate(found)})

    def fit(self, evidence: Evidence) -> dict[str, Any]:
        theta, weight = best_mixture(evidence.nats, zip(_SHARPNESS, evidence["log_cache"].T, strict=True))
        return {"weight": weight, "theta": theta}

    def fixed(self, evidence: Evidence) -> dict[str, Any]:
        return dict(_FIXED)

    def apply(self, parameters: dict[str, Any], evidence: Evidence) -> np.ndarray:
        column = _SHARPNESS.index(parameters["theta"])
        return mix(evidence.nats, evidence["log_cache"][:, column], parameters["weight"])

    def other(self, parameters: dict[str, Any], evidence: Evidence, text: Predicted, places: np.ndarray) -> Other:
        memory = np.arange(places.max(initial=0))
        remembered = memory < places[:, None]
        remembered &= memory >= places[:, None] - self.context.options.cache_size
        products = (text.states[places] @ text.states[memory].T).astype(np.float64)
        logits = np.where(remembered, parameters["theta"] / self._length * products, -np.inf)
        return Other(np.broadcast_to(text.labels[memory], logits.shape), logits, parameters["weight"])

    @functools.cached_property
    def _length(self) -> float:
        """Mean squared length of the states, which does not depend on the text: theta means the same for every set."""
        norm = self.context.run.plan.merge(self.context.run.params).decoder.norm
        return float(np.square(np.asarray(norm.scale[...], np.float64)).sum())


def cache_log_probabilities(states: np.ndarray, labels: np.ndarray, thetas: np.ndarray, size: int) -> np.ndarray:
    """ln p_cache of every token of one document, for several theta.

    Args:
      states: [n, D] float32, what predicted each token.
      labels: [n] the tokens.
      thetas: [G].
      size: how many earlier tokens are remembered.

    Returns:
      [n, G] float64: -inf where no remembered token is the one that came, NaN for the first token, before which there
      is nothing.
    """
    count = len(labels)
    result = np.empty((count, len(thetas)))
    for first in range(0, count, _QUERIES_AT_ONCE):
        queries = np.arange(first, min(first + _QUERIES_AT_ONCE, count))
        oldest = max(0, first - size)
        memory = np.arange(oldest, queries[-1])
        remembered = (memory < queries[:, None]) & (memory >= queries[:, None] - size)
        products = np.where(remembered, states[queries] @ states[memory].T, -np.inf).astype(np.float64)
        matching = labels[memory] == labels[queries][:, None]
        for column, theta in enumerate(thetas):
            logits = theta * products
            with np.errstate(invalid="ignore"):  # NaN is meant where there is nothing
                result[queries, column] = log_sum(np.where(matching, logits, -np.inf)) - log_sum(logits)
    return result
