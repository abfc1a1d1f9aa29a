"""Bits per byte as a function of how much of the text stands in the training data (paper sections 2.6 and 4.4)."""

import dataclasses
import itertools
from typing import Any

import numpy as np

from retro_jax.data.corpus import Corpus
from retro_jax.evaluation.bits_per_byte import document_scores
from retro_jax.evaluation.losses import TokenLosses

NEIGHBOURS = 10
ALPHAS = tuple(eighth / 8 for eighth in range(1, 9))
# Upper ends of the classes of overlap that losses are compared in: shares of a chunk, the last one whole chunks.
SHARES = (0.0625, 0.125, 0.25, 0.5, 1.0)
# Classes of the run that ends with a token, as in the paper's figures (appendix E.1): 0, 1, 2, 3, 4, 5 and more.
RUNS = (0, 1, 2, 3, 4, 5)


@dataclasses.dataclass(frozen=True)
class Point:
    """One point of bpb(alpha).

    Attributes:
      alpha: chunks of which at most this share stands in a neighbour are kept.
      bits_per_byte: of the kept chunks.
      chunks: how many are kept.
      bytes: of their text.
    """

    alpha: float
    bits_per_byte: float
    chunks: int
    bytes: int


def leaked_shares(corpus: Corpus, runs: np.ndarray) -> np.ndarray:
    """r(C) = s / m, float64 [chunks]: the longest common substring s of each chunk over its m tokens of text.

    Args:
      corpus: the chunks'.
      runs: `retro_jax.evaluation.overlap.runs_in_own_neighbours` with 10 neighbours in the training data.
    """
    tokens = corpus.tokenizer.is_text(corpus.tokens(np.arange(corpus.num_chunks))).sum(axis=1)
    return runs.max(axis=1) / np.maximum(tokens, 1)


def leakage_curve(losses: TokenLosses, shares: np.ndarray, alphas: tuple[float, ...] = ALPHAS) -> list[Point]:
    """bpb(alpha) = -log2 likelihood of the chunks with r(C) <= alpha over their bytes (paper equation 5).

    Args:
      losses: of any model or method.
      shares: [chunks] r(C).
      alphas: in [0, 1]; at 1 it is the ordinary value.
    """
    corpus, nats = losses.corpus, losses.chunk_nats()
    size = corpus.byte_counts(np.arange(corpus.num_chunks))
    points = []
    for alpha in alphas:
        kept = shares <= alpha
        total = int(size[kept].sum())
        bits = float(nats[kept].sum()) / np.log(2) / total if total else float("nan")
        points.append(Point(alpha, bits, int(kept.sum()), total))
    return points


def overlap_classes(shares: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Names of the classes of overlap, and the class int [chunks] of each chunk's share."""
    ends = [0.0, *SHARES]
    names = [f"{100 * low:g}-{100 * high:g} %" for low, high in itertools.pairwise(ends)]
    return names, np.searchsorted(SHARES, shares, side="left")


def run_classes(runs: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Names of the classes of runs, and the class int [...] of each token's run."""
    return [str(run) for run in RUNS[:-1]] + [f"{RUNS[-1]}+"], np.minimum(runs, RUNS[-1])


def class_scores(losses: TokenLosses, names: list[str], classes: np.ndarray) -> dict[str, dict[str, Any]]:
    """Score of the text of each class, in order.

    Args:
      losses: of any model or method.
      names: of the classes.
      classes: int [chunks] or [chunks, M], the class of every chunk or token.
    """
    classes = np.broadcast_to(classes.reshape(len(classes), -1), losses.nats.shape)
    return {name: document_scores(losses, classes == number).total().as_json() for number, name in enumerate(names)}
