"""How the next token is chosen from the logits, on the device."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from retro_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Settings of the choice. Applied in this order: repetition penalty, temperature, top-k, top-p, min-p.

    Attributes:
      temperature: logits are divided by it; 0 is greedy.
      top_k: only the k most likely tokens are kept; 0 keeps all.
      top_p: of these the smallest set whose probability reaches top_p is kept; 1 keeps all.
      seed: of the random draws.
      min_p: only tokens at least min_p times as likely as the most likely one are kept; 0 keeps all.
      repetition_penalty: logits of tokens that the text already has, prompt included, are divided by it where positive
        and multiplied where negative; 1 changes nothing.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature {self.temperature} must be finite and not negative; 0 is greedy")
        if self.top_k < 0:
            raise UserError(f"top_k {self.top_k} must not be negative; 0 keeps all tokens")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p} must be above 0 and at most 1")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed {self.seed} must be at least 0 and below 2**32")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p {self.min_p} must be between 0 and 1; 0 keeps all tokens")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise UserError(f"repetition_penalty {self.repetition_penalty} must be finite and above 0; 1 is none")

    def choice(self) -> "Choice":
        """The settings as data of a compiled program, so that others need no other program."""
        return Choice(
            np.float32(self.temperature),
            np.int32(min(self.top_k, 2**31 - 1)),
            np.float32(self.top_p),
            np.uint32(self.seed),
            np.float32(self.min_p),
            np.float32(self.repetition_penalty),
        )


_LANES = 128


class Choice(NamedTuple):
    """`Decoding` as scalars."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    seed: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array


def choose(logits: jax.Array, seen: jax.Array, choice: Choice, samples: jax.Array, positions: jax.Array) -> jax.Array:
    """The next token of each row.

    A draw depends on seed, sample and position alone: neither on the other rows nor on where a computation began.

    Args:
      logits: [B, V]; -inf is never chosen.
      seen: [B, V] bool, tokens that the row already has.
      choice: settings.
      samples: [B] int32, number of the row among the samples of one prompt.
      positions: [B] int32, place of the chosen token in its text.

    Returns:
      [B] int32; with temperature 0 the most likely token, the lowest id among equals.
    """
    penalty = choice.repetition_penalty
    logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)

    def draw() -> jax.Array:
        scaled = logits / choice.temperature
        filters = (choice.top_k > 0) | (choice.top_p < 1) | (choice.min_p > 0)
        scaled = jax.lax.cond(filters, lambda: jnp.where(kept(scaled, choice), scaled, -jnp.inf), lambda: scaled)
        return _draw(scaled, _uniform(choice.seed, samples, positions))

    greedy = choice.temperature == 0
    return jax.lax.cond(greedy, lambda: jnp.argmax(logits, axis=-1), draw).astype(jnp.int32)


def kept(scaled: jax.Array, choice: Choice) -> jax.Array:
    """Which tokens top-k, top-p and min-p leave, bool [B, V] of logits [B, V].

    By rank; among equal logits the lower id ranks higher. The most likely token is always left.
    """
    best = jnp.max(scaled, axis=-1, keepdims=True)
    ones = jnp.ones_like(scaled)
    left = jax.lax.cond(
        choice.top_k > 0, lambda: _first_by_rank(scaled, ones, choice.top_k.astype(scaled.dtype)), lambda: ones > 0
    )

    def nucleus() -> jax.Array:
        weights = jnp.where(left, jnp.exp(scaled - best), 0)
        return left & _first_by_rank(scaled, weights, choice.top_p * jnp.sum(weights, axis=-1, keepdims=True))

    left = jax.lax.cond(choice.top_p < 1, nucleus, lambda: left)
    return left & (scaled >= best + jnp.log(choice.min_p))


def _first_by_rank(values: jax.Array, weights: jax.Array, enough: jax.Array) -> jax.Array:
    """The smallest set of the largest values whose weights reach `enough`, bool [B, V]; of equal values those first.

    The least value in it is found bit by bit, which is much faster than sorting.
    """
    bits = jax.lax.bitcast_convert_type(jnp.where(values == 0, 0, values), jnp.uint32)  # -0 is 0
    ordered = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))  # as integers they compare as the floats do

    def mass(mask: jax.Array) -> jax.Array:
        # Rows of lanes are added to each other first: a CPU adds the numbers of one row one after the other.
        return _lanes(jnp.where(mask, weights, 0)).sum(1).sum(-1, keepdims=True)

    def narrow(step: jax.Array, least: jax.Array) -> jax.Array:
        higher = least | (jnp.uint32(1 << 31) >> step.astype(jnp.uint32))
        return jnp.where(mass(ordered >= higher) >= enough, higher, least)

    least = jax.lax.fori_loop(0, 32, narrow, jnp.zeros((len(values), 1), jnp.uint32))
    above, equal = ordered > least, ordered == least

    def one_by_one() -> jax.Array:
        among = jnp.where(equal, weights, 0)
        return equal & (mass(above) + jnp.cumsum(among, axis=-1) - among < enough)

    return above | jax.lax.cond(jnp.any(jnp.sum(equal, axis=-1) > 1), one_by_one, lambda: equal)


def _draw(scaled: jax.Array, uniform: jax.Array) -> jax.Array:
    """The token [B] at which the probabilities of logits [B, V], added up, pass the uniform numbers [B].

    Found in two steps, the row of lanes and then the lane, which needs no sum over all that go before.
    """
    weights = _lanes(jnp.exp(scaled - jnp.max(scaled, axis=-1, keepdims=True)))
    rows = weights.sum(-1)
    reached = jnp.cumsum(rows, axis=-1)
    target = uniform[:, None] * reached[:, -1:]
    row = jnp.argmax(reached > target, axis=-1)[:, None]
    rest = target - (jnp.take_along_axis(reached, row, 1) - jnp.take_along_axis(rows, row, 1))
    inside = jnp.take_along_axis(weights, row[..., None], 1)[:, 0]
    possible = inside > 0
    passed = possible & (jnp.cumsum(inside, axis=-1) > rest)
    # Sums in another order may fall short by a rounding: then it is the last possible one.
    last = _LANES - 1 - jnp.argmax(possible[:, ::-1], axis=-1)
    return row[:, 0] * _LANES + jnp.where(passed.any(-1), jnp.argmax(passed, axis=-1), last)


def _lanes(values: jax.Array) -> jax.Array:
    """[B, V] to [B, rows, lanes], filled up with 0."""
    return jnp.pad(values, ((0, 0), (0, -values.shape[1] % _LANES))).reshape(len(values), -1, _LANES)


def _uniform(seed: jax.Array, samples: jax.Array, positions: jax.Array) -> jax.Array:
    """A number in [0, 1) for each row, [B]."""

    def row(sample: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), sample), position))

    return jax.vmap(row)(samples, positions)
