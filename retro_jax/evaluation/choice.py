"""What a suite does where nobody says: which methods, sweeps and earlier checkpoints apply and are affordable."""

from collections.abc import Iterable, Sequence

import numpy as np

from retro_jax.evaluation.evaluated import Evaluated
from retro_jax.evaluation.methods import METHODS
from retro_jax.retrieval.segments import DatabaseCorpus

# A datastore has a key for every token; so many are searched exactly and take 2 kB a token at a width of 1024.
DATASTORE_TOKENS = 1_000_000
EARLIER_STEPS = 3


def chosen_methods(*, baseline: bool, retro: bool, tuning: bool) -> tuple[list[str], list[str]]:
    """All comparison methods that can be made, and lines that say which cannot and why.

    Args:
      baseline, retro: whether there is such a run.
      tuning: whether there is a tuning set.
    """
    chosen, left_out = [], []
    for name, kind in METHODS.items():
        if not (retro if kind.for_retro else baseline):
            left_out.append(f"{name}, which is for a {'RETRO' if kind.for_retro else 'baseline'}")
        elif kind.needs_tuning and not tuning:
            left_out.append(f"{name}, which needs a tuning set")
        else:
            chosen.append(name)
    return chosen, left_out


def chosen_sweeps(sets: Iterable[Evaluated]) -> tuple[str, ...]:
    """The first set that has neighbours: a sweep of up to 100 of them costs as much as a hundred evaluations."""
    return tuple(one.name for one in sets if one.neighbours is not None)[:1]


def chosen_steps(saved: Iterable[Sequence[int]], evaluated: Sequence[int]) -> list[int]:
    """At most three steps, evenly spread over those that runs have checkpoints of beside the evaluated ones.

    Args:
      saved: steps of the checkpoints of every run, ascending.
      evaluated: the step of each run that is evaluated anyway.
    """
    steps = sorted({step for of_run, own in zip(saved, evaluated, strict=True) for step in of_run if step < own})
    places = np.linspace(0, len(steps) - 1, min(EARLIER_STEPS, len(steps))).round().astype(int)
    return [steps[place] for place in places.tolist()]


def chosen_datastore_share(database: DatabaseCorpus) -> float:
    """Of the database's documents: all, or as many as have about a million tokens."""
    return min(1.0, DATASTORE_TOKENS / sum(part.num_tokens for part in database.parts))
