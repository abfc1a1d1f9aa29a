"""Shards made of cells: balanced, and a query visits those of its nearest cells and no fewer than can answer it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_jax.retrieval import router as router_module
from retro_jax.retrieval.router import Router, fit_cells, group_cells, rows_at_once, squared_to_cells


@given(st.integers(0, 10**6), st.integers(1, 40), st.data())
@settings(deadline=None, max_examples=60)
def test_every_shard_gets_cells_and_a_fair_share(seed, cells, data):
    shards = data.draw(st.integers(1, cells))
    rng = np.random.default_rng(seed)
    weights = rng.integers(0, 100, cells)
    of_cell = group_cells(rng.normal(size=(cells, 4)), weights, shards)
    assert sorted(set(of_cell.tolist())) == list(range(shards))
    if (weights == weights[0]).all() or cells >= 8 * shards:
        # No shard is heavier than its share by more than the heaviest cell on each cut of the way down.
        cuts = max(1, int(np.ceil(np.log2(shards)))) if shards > 1 else 0
        loads = np.bincount(of_cell, weights, minlength=shards)
        assert loads.max() <= weights.sum() / shards + (cuts + 1) * weights.max() + 1e-6


@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 12), st.integers(1, 60))
@settings(deadline=None, max_examples=80)
def test_a_query_visits_the_shards_of_its_nearest_cells_and_enough_vectors(seed, cells, visit, k):
    rng = np.random.default_rng(seed)
    visit = min(visit, cells)
    shards = int(rng.integers(1, cells + 1))
    centroids = rng.normal(size=(cells, 3)).astype(np.float32)
    of_cell = group_cells(centroids, np.ones(cells), shards)
    sizes = rng.integers(0, 20, shards)
    router = Router(centroids, of_cell, visit, sizes)
    queries = rng.normal(size=(9, 3)).astype(np.float32)
    visits = router.visits(queries, k)
    for query, seen in zip(queries, visits, strict=True):
        order = np.argsort(squared_to_cells(query[None], centroids)[0], kind="stable")
        assert seen[of_cell[order[:visit]]].all()
        assert seen @ sizes >= min(k, sizes.sum())
        # What goes beyond the nearest cells is only what k needs.
        last = max((place for place in range(cells) if seen[of_cell[order[place]]]), default=0)
        before = np.zeros(shards, bool)
        before[of_cell[order[: max(visit, last)]]] = True
        if seen.sum() > len(set(of_cell[order[:visit]])) and not before[of_cell[order[last]]]:
            assert before @ sizes < min(k, sizes.sum())


@pytest.mark.parametrize("cells", [1, 256, 50_000, 10**9])
def test_distances_to_many_cells_are_taken_in_parts(cells):
    rows = rows_at_once(cells)
    assert 1 <= rows <= 65_536 and (rows == 1 or rows * cells <= 2**24)


def test_visits_are_the_same_whatever_is_taken_at_once(monkeypatch):
    rng = np.random.default_rng(0)
    centroids, queries = rng.normal(size=(10, 3)).astype(np.float32), rng.normal(size=(25, 3)).astype(np.float32)
    router = Router(centroids, group_cells(centroids, np.ones(10), 4), 2, np.full(4, 5))
    whole, taken = router.visits(queries, 3), []

    def recorded(vectors, centroids):
        taken.append(len(vectors))
        return squared_to_cells(vectors, centroids)

    monkeypatch.setattr(router_module, "_DISTANCES_AT_ONCE", 70)
    monkeypatch.setattr(router_module, "squared_to_cells", recorded)
    np.testing.assert_array_equal(router.visits(queries, 3), whole)
    assert taken == [7, 7, 7, 4]


def test_cells_are_where_the_vectors_are():
    rng = np.random.default_rng(0)
    centres = np.array([[0, 0], [10, 0], [0, 10], [10, 10]], np.float32)
    sample = (centres[rng.integers(0, 4, 400)] + 0.1 * rng.normal(size=(400, 2))).astype(np.float32)
    centroids = fit_cells(sample, 16, seed=3)
    nearest = squared_to_cells(centres, centroids).min(1) + np.square(centres).sum(1)
    assert (nearest < 0.1).all()
    np.testing.assert_array_equal(fit_cells(sample, 16, seed=3), centroids)
