"""How the next token is chosen from the logits."""

import dataclasses
import math

import numpy as np

from retro_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Settings of the choice.

    Attributes:
      temperature: logits are divided by it; 0 is greedy.
      top_k: only the k most likely tokens are kept; 0 keeps all.
      top_p: of these the smallest set whose probability reaches top_p is kept; 1 keeps all.
      seed: of the random draws.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature {self.temperature} must be finite and not negative; 0 is greedy")
        if self.top_k < 0:
            raise UserError(f"top_k {self.top_k} must not be negative; 0 keeps all tokens")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p} must be above 0 and at most 1")


def distribution(logits: np.ndarray, decoding: Decoding) -> np.ndarray:
    """The probabilities tokens are drawn with.

    Args:
      logits: [V].
      decoding: settings; with temperature 0 all mass is on the most likely token, the lowest id among equals.

    Returns:
      [V] float64 summing to 1. Tokens are kept by rank; among equal logits the lower id ranks higher.
    """
    logits = np.asarray(logits, np.float64)
    order = np.argsort(-logits, kind="stable")
    if decoding.temperature == 0:
        return np.eye(1, len(logits), order[0])[0]
    scaled = logits / decoding.temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    keep = len(order) if decoding.top_k == 0 else min(decoding.top_k, len(order))
    ranked = probabilities[order[:keep]]
    if decoding.top_p < 1:
        reached = np.searchsorted(np.cumsum(ranked) / ranked.sum(), decoding.top_p) + 1
        keep = min(keep, int(reached))
    kept = np.zeros_like(probabilities)
    kept[order[:keep]] = probabilities[order[:keep]]
    return kept / kept.sum()


def choose(logits: np.ndarray, decoding: Decoding, position: int) -> int:
    """Draws the token of a position; the draw depends on (seed, position) alone, so a sample is repeatable."""
    probabilities = distribution(logits, decoding)
    if decoding.temperature == 0:
        return int(probabilities.argmax())
    uniform = np.random.default_rng((decoding.seed, position)).random()
    cumulative = np.cumsum(probabilities)
    return int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
