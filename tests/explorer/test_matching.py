"""Runs in common with the neighbours, against the definition."""

from hypothesis import given
from hypothesis import strategies as st

from retro_jax.explorer.matching import common_runs

ids = st.lists(st.integers(4, 7), max_size=12)


def by_definition(tokens, others):
    def occurs(run):
        return any(run == other[i : i + len(run)] for other in others for i in range(len(other) - len(run) + 1))

    return [
        max((n for n in range(1, end + 1) if occurs(tokens[end - n : end])), default=0)
        for end in range(1, len(tokens) + 1)
    ]


@given(ids, st.lists(ids, max_size=3))
def test_a_run_is_the_longest_that_ends_here_and_occurs_in_a_neighbour(tokens, others):
    assert common_runs(tokens, others) == by_definition(tokens, others)
